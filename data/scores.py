"""Scores of label maps: the confusion matrix, IoU, and tables and plots of results, which are the
dictionaries that a stage's --json holds.

IoU of a class: its pixels in label and prediction over those in either, ignored pixels left out, in
one confusion matrix over all pictures; mIoU is the mean over classes that occur in labels or
predictions.
"""
import math
from pathlib import Path

import numpy as np
import torch

from common import IGNORE, NUMBER, RunFailed, atomic_path, fits, read_json
from data.benchmarks import Size


def confusion_matrix(labels, predictions, count):
    """Pixels by label (rows) and prediction (columns): (count, count) int64. Label 255 counts
    nowhere."""
    kept = labels != IGNORE
    cells = labels[kept] * count + predictions[kept]
    return torch.bincount(cells, minlength=count * count).view(count, count)


def scores(confusion):
    """(IoU of each class in percent, nan for a class in neither labels nor predictions; their mean;
    pixel accuracy in percent)."""
    confusion = confusion.double()
    hits = confusion.diagonal()
    iou = 100 * hits / (confusion.sum(0) + confusion.sum(1) - hits)
    return iou, iou.nanmean().item(), (100 * hits.sum() / confusion.sum()).item()


def match_segments(true, predicted, areas, classes, stuff=()):
    """What a picture's true masks, each given a class, add to panoptic quality: true positives,
    false positives, false negatives and the sum of IoU of each class, (4, classes) float64.

    true, predicted: classes of the S masks, areas: their pixels. stuff: classes of which a picture
    has at most one segment, so that masks predicted as the same one are merged first.
    """
    merged = torch.isin(predicted, torch.tensor(sorted(stuff), dtype=torch.int64))
    group = torch.where(merged, -1 - predicted, torch.arange(len(true)))
    groups, group = group.unique(return_inverse=True)
    sizes = torch.zeros(len(groups), dtype=torch.float64).index_add_(0, group, areas.double())
    iou = torch.where(true == predicted, areas / sizes[group], 0)
    hit = iou > 0.5  # at most one mask of a group
    owners = torch.zeros_like(groups).scatter_(0, group, predicted)
    owners = owners[~torch.isin(torch.arange(len(groups)), group[hit])]
    counts = torch.zeros(4, classes, dtype=torch.float64)
    for row, each in enumerate((true[hit], owners, true[~hit])):
        counts[row] += torch.bincount(each, minlength=classes)
    counts[3].index_add_(0, true[hit], iou[hit])
    return counts


def panoptic_scores(counts):
    """(PQ of each class, nan for one without segments; mean PQ, SQ and RQ), in percent (Kirillov
    et al., 2019). SQ of a class without a true positive is 0."""
    hits, extra, missed, overlap = counts
    size = torch.where(hits + extra + missed > 0, hits + (extra + missed) / 2, math.nan)
    sq = torch.where(size.isnan(), math.nan, overlap / hits.clamp(min=1))
    each = 100 * overlap / size
    return each, *(value.nanmean().item() for value in (each, 100 * sq, 100 * hits / size))


# ---- tables and plots ----------------------------------------------------------------------------

def label_of(name, refine, upsampler):
    """What a row is called: "spar", "spar +lposs", "single-pass +anyup" ..."""
    added = [f"+{refine}"] * (refine != "none") + [f"+{upsampler}"] * (upsampler != "bilinear")
    return " ".join([name, *added])


def result_label(result):
    return label_of(result["method"], result["refine"], result["upsampler"])


def result_size(result):
    return Size(result.get("short_side"), result.get("area"))


def print_table(results):
    """Per-class IoU of one data set at one size, a column for each method."""
    names = list(dict.fromkeys(name for each in results for name in each["per_class_iou"]))
    labels = [result_label(each) for each in results]
    width = max(len("pixel accuracy"), *map(len, names)) + 2
    cell = max(20, *(len(label) + 2 for label in labels))
    print("\n" + " " * width + "".join(f"{label:>{cell}}" for label in labels))
    for name in names:
        values = [each["per_class_iou"].get(name) for each in results]
        cells = ("-" if value is None else f"{value:.1f}" for value in values)
        print(f"{name:<{width}}" + "".join(f"{text:>{cell}}" for text in cells))
    for title, key, digits in (("mIoU", "miou", 1), ("pixel accuracy", "pixel_accuracy", 1),
                               ("seconds/image", "seconds_per_image", 3)):
        print(f"{title:<{width}}" + "".join(f"{each[key]:>{cell}.{digits}f}" for each in results))


def print_results(results):
    """A table for each data set and size."""
    tables = {}
    for each in results:
        tables.setdefault((each["dataset"], str(result_size(each))), []).append(each)
    for (name, size), some in tables.items():
        print(f"\n{name}, {size}", end="")
        print_table(some)


def print_summary(results):
    """mIoU of every method by data set and size, where there are several, and its average over the
    data sets."""
    columns = list(dict.fromkeys((each["dataset"], result_size(each)) for each in results))
    if len(columns) < 2:
        return
    datasets, sizes = (list(dict.fromkeys(axis)) for axis in zip(*columns))
    labels = list(dict.fromkeys(map(result_label, results)))
    cells = {(result_label(each), each["dataset"], result_size(each)): each["miou"]
             for each in results}
    by_size = len(sizes) > 1 and len(datasets) < len(columns)
    titles = [" ".join([name] * (len(datasets) > 1) + [str(size.asked or "own size")] * by_size)
              for name, size in columns]
    averaged = len(datasets) > 1 and len(datasets) == len(columns)
    titles += ["average"] * averaged
    width, cell = max(map(len, labels)) + 2, max(10, *(len(title) + 2 for title in titles))
    print("\n" + f"{'mIoU':<{width}}" + "".join(f"{title:>{cell}}" for title in titles))
    for label in labels:
        line = [cells.get((label, *column), math.nan) for column in columns]
        line += [float(np.mean(line))] * averaged
        values = ("-" if math.isnan(value) else f"{value:.1f}" for value in line)
        print(f"{label:<{width}}" + "".join(f"{value:>{cell}}" for value in values))


# ---- probes --------------------------------------------------------------------------------------

def probe_result(probe, method, dataset, draws):
    """The entry of a probe's JSON results, from {seed: (counts, pictures)}: means over the draws.
    Raises RunFailed where there is nothing to score."""
    entry = {"method": method, "probe": probe, "dataset": dataset.name,
             "images": next(iter(draws.values()))[1], "draws": len(draws)}

    def add(counts, name, kind, names, score):
        if not sum(each.sum() for each in counts):
            raise RunFailed(f"{dataset.name}: no pixel of its masks counts; nothing to score")
        rows = [score(each) for each in counts]
        for key, position in names.items():
            values = [row[position] for row in rows]
            entry[key] = float(np.mean(values))
            if position == names[name]:
                entry[f"deviation{kind}"] = float(np.std(values))
        each = torch.stack([row[0] for row in rows]).nanmean(0).tolist()
        entry[f"per_class_{'iou' if name == 'miou' else name}"] = {
            title: None if math.isnan(value) else value
            for title, value in zip(dataset.classes.titles, each)}

    counts = [each for each, _ in draws.values()]
    if probe != "panoptic":
        add(counts, "miou", "", {"miou": 1, "pixel_accuracy": 2}, scores)
        return entry
    for row, kind in enumerate(("", "_merged")):
        names = {f"pq{kind}": 1, f"sq{kind}": 2, f"rq{kind}": 3}
        add([each[row] for each in counts], f"pq{kind}", kind, names, panoptic_scores)
    return entry


LINES = {"knn": {"kNN, mIoU": "miou"}, "linear": {"linear, mIoU": "miou"}, "panoptic": {
    "panoptic, PQ": "pq", "SQ": "sq", "RQ": "rq", "PQ, stuff merged": "pq_merged"}}


def print_probes(results):
    """A column for each method, a line for each score."""
    methods = list(dict.fromkeys(each["method"] for each in results))
    cell = max(20, *(len(name) + 2 for name in methods))
    print("\n" + " " * 18 + "".join(f"{name:>{cell}}" for name in methods))
    for probe in dict.fromkeys(each["probe"] for each in results):
        row = {each["method"]: each for each in results if each["probe"] == probe}
        for title, key in LINES[probe].items():
            texts = [f"{row[name][key]:.1f}" + f" ± {row[name]['deviation']:.1f}"
                     * (row[name]["draws"] > 1) for name in methods]
            print(f"{title:<18}" + "".join(f"{text:>{cell}}" for text in texts))


# ---- plots and files -----------------------------------------------------------------------------

def plot(results, path):
    """mIoU against milliseconds, a line for each method through its resolutions; where there are
    several of them, also against resolution.

    Both average over the data sets that a method was evaluated on.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    sweep = len({result_size(each).asked for each in results} - {None}) > 1
    points = {}  # method -> number of pixels asked for -> its results
    for each in results:
        asked = result_size(each).asked if sweep else None
        points.setdefault(result_label(each), {}).setdefault(asked, []).append(each)
    figure, panels = plt.subplots(1, 1 + sweep, figsize=(6 + 5 * sweep, 4), layout="constrained",
                                  squeeze=False)
    for position, (label, by_size) in enumerate(points.items()):
        marks = sorted(by_size.items(), key=lambda item: item[0] or 0)
        miou = [np.mean([each["miou"] for each in some]) for _, some in marks]
        time_ = [1e3 * np.mean([each["seconds_per_image"] for each in some]) for _, some in marks]
        style = {"marker": "os^Dv*PX"[position % 8], "label": label.replace("$", r"\$")}
        panels[0, -1].plot(time_, miou, **style)
        if sweep:
            pairs = [(asked, value) for (asked, _), value in zip(marks, miou) if asked]
            panels[0, 0].plot(*zip(*pairs), **style)
    if sweep:
        by_area = any(result_size(each).area for each in results)
        panels[0, 0].set(ylabel="mIoU", xlabel="side of the square of the picture's area in pixels"
                         if by_area else "short side of the picture in pixels")
    panels[0, -1].set(xscale="log", xlabel="milliseconds per image, all of inference",
                      ylabel="mIoU")
    for panel in panels.flat:
        panel.grid(alpha=0.3, which="both")
    panels[0, -1].legend(fontsize=8)
    names = ", ".join(dict.fromkeys(each["dataset"] for each in results))
    figure.suptitle(names.replace("$", r"\$"), fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


def is_result(value):
    """Whether an entry of a JSON's results is one, with a score."""
    kinds = {"method": str, "dataset": str, "refine": str, "upsampler": str,
             "short_side": int | None, "area": int | None, "miou": NUMBER,
             "pixel_accuracy": NUMBER, "seconds_per_image": NUMBER, "per_class_iou": dict}
    return (isinstance(value, dict) and fits({"area": None} | value, kinds)
            and fits(value["per_class_iou"], dict.fromkeys(value["per_class_iou"], NUMBER | None)))


def read_results(paths):
    """The results of files that --json wrote; where methods repeat, their files' names come first.
    Raises RunFailed."""
    files = {}
    for path in paths:
        report = read_json(path, "evaluate_ovs.py --json")
        results = report.get("results")
        if not isinstance(results, list):
            raise RunFailed(f"{path} holds no results of evaluate_ovs.py --json")
        files[str(path)] = [each for each in results if is_result(each)]
        if not files[str(path)]:
            raise RunFailed(f"{path} holds no results with a score")
    stems = [Path(path).stem for path in files]
    results = [each for some in files.values() for each in some]
    if len({(result_label(each), each["dataset"], result_size(each))
            for each in results}) < len(results):
        results = []
        for path, some in files.items():
            name = Path(path).stem if stems.count(Path(path).stem) == 1 else path
            results += [each | {"method": f"{name}: {each['method']}"} for each in some]
    return results


def show(results, json_path, plot_path):
    """The summary of several data sets or sizes, and what was asked for in files."""
    if results:
        print_summary(results)
    if json_path:
        print(f"results in {json_path}")
    if plot_path:
        plot(results, plot_path)
        print(f"plot in {plot_path}")
