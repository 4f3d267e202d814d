"""Results of evaluate_ovs.py over several data sets and sizes: a summary and a plot."""
import math

import numpy as np

from data.files import atomic_path
from data.benchmarks import Size
from evaluate_ovs import label_of


def result_label(result):
    return label_of(result["method"], result["refine"], result["upsampler"])


def result_size(result):
    return Size(result["short_side"], result["area"])


def print_summary(results):
    """Print the mIoU of every method by data set and size, and its average over the data sets."""
    columns = list(dict.fromkeys((result["dataset"], result_size(result)) for result in results))
    datasets, sizes = (list(dict.fromkeys(axis)) for axis in zip(*columns))
    labels = list(dict.fromkeys(map(result_label, results)))
    cells = {(result_label(result), result["dataset"], result_size(result)): result["miou"]
             for result in results}
    by_size = len(sizes) > 1 and len(datasets) < len(columns)
    titles = [" ".join([name] * (len(datasets) > 1)
                       + [str(size.requested or "own size")] * by_size) for name, size in columns]
    averaged = len(datasets) > 1 and len(datasets) == len(columns)
    titles += ["average"] * averaged
    width, cell = max(map(len, labels)) + 2, max(10, *(len(title) + 2 for title in titles))
    print("\n" + f"{'mIoU':<{width}}" + "".join(f"{title:>{cell}}" for title in titles))
    for label in labels:
        line = [cells.get((label, *column), math.nan) for column in columns]
        line += [float(np.mean(line))] * averaged
        values = ("-" if math.isnan(value) else f"{value:.1f}" for value in line)
        print(f"{label:<{width}}" + "".join(f"{value:>{cell}}" for value in values))


def plot(results, path):
    """Plot mIoU against time, and resolution if it varies, averaged over a method's data sets."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    sweep = len({result_size(result).requested for result in results} - {None}) > 1
    points = {}  # method -> requested number of pixels -> its results
    for result in results:
        side = result_size(result).requested if sweep else None
        points.setdefault(result_label(result), {}).setdefault(side, []).append(result)
    figure, panels = plt.subplots(1, 1 + sweep, figsize=(6 + 5 * sweep, 4), layout="constrained",
                                  squeeze=False)
    for position, (label, by_size) in enumerate(points.items()):
        marks = sorted(by_size.items(), key=lambda item: item[0] or 0)
        miou, milliseconds = ([factor * np.mean([result[key] for result in group])
                               for _, group in marks]
                              for key, factor in (("miou", 1), ("seconds_per_image", 1e3)))
        style = {"marker": "os^Dv*PX"[position % 8], "label": as_text(label)}
        panels[0, -1].plot(milliseconds, miou, **style)
        if sweep:
            pairs = [(side, value) for (side, _), value in zip(marks, miou) if side]
            panels[0, 0].plot(*zip(*pairs), **style)
    if sweep:
        by_area = any(result["area"] for result in results)
        panels[0, 0].set(ylabel="mIoU", xlabel="side of the square of the image's area in pixels"
                         if by_area else "short side of the image in pixels")
    panels[0, -1].set(xscale="log", xlabel="milliseconds per image", ylabel="mIoU")
    for panel in panels.flat:
        panel.grid(alpha=0.3, which="both")
    panels[0, -1].legend(fontsize=8)
    names = ", ".join(dict.fromkeys(result["dataset"] for result in results))
    figure.suptitle(as_text(names), fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


def as_text(name):
    """Return a name, which may be a path, as matplotlib can draw it."""
    return name.encode(errors="backslashreplace").decode().replace("$", r"\$")
