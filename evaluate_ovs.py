"""Stage 3: open-vocabulary segmentation by a student or a pre-trained backbone (paper, section 4).

Reads a student's folder or a backbone's name, images, class names and label masks, if any. Writes
a table of IoU, also as JSON (--json), label maps (--save-maps), or an ONNX file (--export).

    python evaluate_ovs.py                                    # the demo: windows and student
    python evaluate_ovs.py --images photo.jpg --classes "cat, grass | lawn"    # your own words
    python evaluate_ovs.py --images photos --masks masks --classes classes.txt --compare
    python evaluate_ovs.py --dataset voc21 --data-root /data --check-data      # check it first
    torchrun --nproc-per-node 4 evaluate_ovs.py --dataset all --data-root /data --compare
    python evaluate_ovs.py --short-side 128 192 256 --json runs/sweep.json --plot runs/sweep.png
    python evaluate_ovs.py --backbone siglip2 --checkpoint spar.ckpt --save-student runs/official
    python evaluate_ovs.py --classes "sky, grass | lawn" --export segmenter.onnx

The same command continues an interrupted run.
"""
from data.flags import (Parser, add_data_flags, add_device_flags, add_selection_flags, bounded,
                        ending, filled, parse)


def parse_args(argv=None):
    parser = Parser(__doc__)
    positive, share = bounded(int, 1), bounded(float, 0, 1)
    add_selection_flags(parser)
    add_data_flags(parser)
    group = parser.add_argument_group("inference")
    add = group.add_mutually_exclusive_group().add_argument
    add("--short-side", type=positive, nargs="+", metavar="N",
        help="resize images to a short side of N pixels, and a long one of at most 2048; several "
        "make a sweep (default: the benchmark's, mostly 672; --images keep their size)")
    add("--area", type=positive, nargs="+", metavar="N", help="resize images to the area of a "
        "square of side N instead, so that all cost the same; several make a sweep")
    add = group.add_argument
    add("--upsampler", nargs="+", choices=["bilinear", "anyup"], default=["bilinear"],
        help="how class similarities are upsampled to pixels; both give two rows each. anyup, for "
        "single passes, is from torch.hub or --hub-dir, a clone of github.com/wimmerth/anyup; it "
        "takes a minute per image on a CPU")
    add("--refine", nargs="+", choices=["none", "lposs"], default=["none"], help="label "
        "propagation over patches, without the thresholds of benchmarks; both give two rows each")
    add("--lposs", type=filled, nargs="+", metavar="KEY=VALUE", default=[],
        help="k=400 neighbours of a patch, gamma=3 power of their similarity, sigma=0.01 decay "
        "per pixel of distance, power=1 of that distance, alpha=0.95 weight of the neighbours, "
        "steps=10")
    add("--logit-scale", type=bounded(float, 1e-6), metavar="X", help="factor of similarities in "
        "the softmax that --prob-threshold looks at (default: the benchmark's, else 40)")
    add("--prob-threshold", type=share, metavar="P",
        help="less probable pixels become background (default: the benchmark's, else 0)")
    add("--area-threshold", type=share, metavar="P", help="classes with no more than this share "
        "of the foreground are left out (default: the benchmark's, else 0)")
    add = parser.add_argument_group("output").add_argument
    add("--json", type=ending(".json"), metavar="FILE", help="the results with every setting")
    add("--plot", type=ending(".png", ".pdf", ".svg"), metavar="FILE",
        help="mIoU against resolution and time")
    add("--save-maps", type=filled, metavar="DIR", help="label maps, overlays with a legend, "
        "PCA images, shares.csv and classes.csv (runs/maps for --images without --masks)")
    add("--save-student", type=filled, metavar="DIR", help="write a --checkpoint of the "
        "authors as a folder that open_clip loads; evaluate only with --dataset or --images")
    add("--export", type=ending(".onnx"), metavar="FILE",
        help="evaluate nothing: write an ONNX file that labels uint8 images (H, W, 3) of any "
        "size, or without --classes gives features; needs onnx, onnxscript and onnxruntime")
    add("--export-texts", type=ending(".npz"), metavar="FILE", help="write --classes as vectors "
        "for an --export of features, so that words can change afterwards")
    add("--plain-onnx", action="store_true", help="--export for other runtimes than onnxruntime: "
        "only operators of opset 23, with five times the memory at 1024 x 2048 pixels")
    add("--state", type=filled, metavar="DIR", default="runs/evaluate",
        help="the counts of an unfinished run, one folder for all processes (%(default)s)")
    add_device_flags(parser, seed="seed of random weights")
    return parse(parser, argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports, so that --help and a wrong flag answer at once

import contextlib
import functools
import hashlib
import itertools
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (DTYPES, IGNORE, Stitcher, bilinear_strips, choose_window, convert_weights,
                    default_stride, embed_texts, encode_windows, label_strips, prefetch, prepare,
                    require_finite, run_stage, start_runtime, stitch_axis, stitched_features,
                    synchronised_time)
from data.files import RunError, UsageError, fit_to_patches, naming, remove_stale_files
from data.benchmarks import (Dataset, Rule, Size, benchmark_rule, check_data, check_masks,
                             load_sample)
from data.journal import Journal, files_state, text_hash
from data.results import describe_settings, label_of, result_label, write_onnx, write_results
from data.selection import (find_datasets, load_models, maps_folder, read_selection,
                            say_unknown_words)

# ---- scores ----------------------------------------------------------------------------------


def confusion_matrix(labels, predictions, count):
    """Count pixels by label (rows) and prediction, without label 255: (count, count) int64."""
    kept = labels != IGNORE
    cells = labels[kept] * count + predictions[kept]
    return torch.bincount(cells, minlength=count * count).view(count, count)


def scores(confusion):
    """Return the IoU of each class, their mean and the pixel accuracy, in percent.

    IoU is a class's pixels in label and prediction over those in either, over all images. It is
    nan for a class in neither, which the mean leaves out.
    """
    confusion = confusion.double()
    hits = confusion.diagonal()
    iou = 100 * hits / (confusion.sum(0) + confusion.sum(1) - hits)
    accuracy = 100 * hits.sum() / confusion.sum()
    return iou, iou.nanmean().item(), accuracy.item()


# ---- similarities of windows, at pixel resolution --------------------------------------------

class PixelStitcher(Stitcher):
    """Averages class similarities of windows, each upsampled to pixels (paper, section 3.3).

    Along each axis the average is linear between multiples of gcd(stride, patch / 2) pixels,
    where centres of features and borders of windows lie. So only the first and the last pixel of
    each piece are summed (for a stride of 24 a sixteenth of all), and the others interpolated.
    """

    def __init__(self, size, window, stride, patch, device="cpu"):
        piece = math.gcd(stride, 1 if patch % 2 else patch // 2)
        ends = sorted({0, piece - 1})
        axes = []
        self.held = []  # pixels along each axis
        for length, side in zip(size, window):
            pixels = torch.arange(length).view(-1, piece)[:, ends].flatten()
            weights = stitch_axis(length, side, stride, patch, cell=1)
            axes.append(weights[:, pixels])
            self.held.append(pixels.double())
        super().__init__(*axes, device)

    @staticmethod
    def neighbours(held, outputs):
        """Return the held pixels around each output of an axis, and where it is between, 0 to 1."""
        length = held[-1].item() + 1
        centres = torch.arange(outputs, dtype=torch.float64) + 0.5
        positions = (centres * length / outputs - 0.5).clamp(0, length - 1)
        after = torch.searchsorted(held, positions).clamp(min=1)
        before = after - 1
        fraction = (positions - held[before]) / (held[after] - held[before])
        return before, after, fraction

    def strips(self, size):
        """Return a function of (first, last) that gives these rows at `size`: (N, rows, W)."""
        pixels = self.result()  # (held along H, held along W, N)
        rows, columns = (
            [value.to(pixels.device) for value in self.neighbours(held, outputs)]
            for held, outputs in zip(self.held, size))
        left, right, across = columns

        def strip(first, last):
            above, below, down = (value[first:last] for value in rows)
            lines = torch.lerp(pixels[above], pixels[below], down.to(pixels)[:, None, None])
            lines = torch.lerp(lines[:, left], lines[:, right], across.to(pixels)[:, None])
            return lines.permute(2, 0, 1)  # (rows, W, N) -> (N, rows, W)
        return strip


# ---- methods: a backbone, and how it segments an image ---------------------------------------

@dataclass(frozen=True, eq=False)
class Method:
    """One way to segment an image: a backbone, what it sees, and how that becomes labels."""
    backbone: torch.nn.Module
    origin: str  # name of the pre-trained backbone, which decides on a benchmark's thresholds
    checkpoint: str | None = None  # of a student
    stride: int = 0  # 0 is a single pass
    window: tuple | None = None
    batch_size: int = 60
    autocast: object = contextlib.nullcontext
    lposs: object = None  # extras.lposs.Lposs, or None for no refinement
    anyup: object = None  # extras.anyup.AnyUp, or None for bilinear upsampling

    @property
    def name(self):
        if self.stride:
            return f"sliding-window/{self.stride}"
        return "single-pass" if self.checkpoint is None else "spar"

    @property
    def refine(self):
        return "lposs" if self.lposs else "none"

    @property
    def upsampler(self):
        return "anyup" if self.anyup else "bilinear"

    @property
    def label(self):
        return label_of(self.name, self.refine, self.upsampler)

    @torch.no_grad()
    def predict(self, image, size, classes, texts, rule=Rule()):
        """Segment (3, H, W) uint8 by the names' unit vectors (N, D): (*size) int64."""
        prepared = prepare(self.backbone, image)
        class_of_name = classes.class_of_name.to(prepared.device)
        if self.lposs:
            from extras.lposs import best_synonyms, propagated
            similarities = propagated(self, prepared, texts)
            similarities = best_synonyms(similarities, class_of_name)  # (h, w, K)
            strips = self.enlarge(image, similarities, size)
            class_of_name = torch.arange(len(classes), device=prepared.device)
        elif self.stride:
            similarities = (F.normalize(maps, dim=-1) @ texts.T  # (n, h, w, N)
                            for maps in self.window_maps(prepared))
            strips = self.stitch(prepared, similarities).strips(size)
        else:
            features = F.normalize(self.features(prepared), dim=-1)
            strips = self.enlarge(image, features @ texts.T, size)  # of (h, w, N)
        return label_map(strips, size, class_of_name, rule)

    def features(self, prepared):
        """Return an image's feature map, as a teacher's is stitched: (H/patch, W/patch, D)."""
        return stitched_features(self.backbone, prepared, self.window, self.stride,
                                 self.batch_size, self.autocast)

    def window_maps(self, prepared):
        """Yield the feature maps of a prepared image's windows, batch by batch: (n, h, w, D)."""
        return encode_windows(self.backbone, prepared, self.window, self.stride, self.batch_size,
                              self.autocast)

    def stitch(self, prepared, similarities):
        """Return the stitched class similarities of an image's windows, from batches of them."""
        stitcher = PixelStitcher(prepared.shape[-2:], self.window, self.stride,
                                 self.backbone.patch, prepared.device)
        for batch in similarities:
            stitcher.add(batch)  # (n, h, w, N)
        require_finite(stitcher.result(), self.backbone)
        return stitcher

    def enlarge(self, image, similarities, size):
        """Return strips of (h, w, N) at `size`, by the upsampler."""
        if self.anyup is None:
            return bilinear_strips(similarities, size)
        return self.anyup.strips(fit_to_patches(image, self.backbone.patch), similarities, size)


def label_map(strip, size, class_of_name, rule=Rule()):
    """Return the class of each pixel, from strips of similarities (N, rows, W): (H, W) int64.

    A class is as similar as its best synonym. Only thresholds need a softmax.
    """
    def assign(similarities, banned=None):
        allowed = similarities
        if banned is not None:
            allowed = allowed.masked_fill(banned[:, None, None], -torch.inf)
        best, name = allowed.max(0)  # (rows, W)
        labels = class_of_name[name]
        # areas are counted before the threshold applies
        if rule.threshold and (banned is not None or not rule.area_threshold):
            logits = rule.logit_scale * similarities
            probability = (rule.logit_scale * best - logits.logsumexp(0)).exp()
            labels[probability < rule.threshold] = 0
        return labels

    labels = label_strips(assign, strip, size, class_of_name)
    if rule.area_threshold:
        count = int(class_of_name[-1]) + 1
        areas = torch.bincount(labels.flatten(), minlength=count)
        small = areas <= rule.area_threshold * areas[1:].sum()
        small[0] = False  # the background
        assign = functools.partial(assign, banned=small[class_of_name])
        labels = label_strips(assign, strip, size, class_of_name)
    return labels


# ---- which methods, by which thresholds ------------------------------------------------------

def choose_methods(selection, runtime, strides=None):
    """Return the selected ways to segment an image, a list of Method. strides: a function of a
    backbone and its window (H, W), in place of half a window and the paper's stride."""
    slide = selection.compare or selection.inference == "sliding-window"
    if selection.inference and selection.compare:
        raise UsageError("--compare shows both kinds of inference; leave out --inference")
    if (selection.stride or selection.window) and not slide:
        raise UsageError("--stride and --window go with --inference sliding-window or --compare")
    pretrained, student, name = load_models(selection, runtime)
    if selection.random_init and not selection.checkpoint:
        runtime.print("RANDOM WEIGHTS (--random-init): times mean something, scores do not")

    def method(backbone, stride=0):
        checkpoint = selection.checkpoint if backbone is student else None
        window = choose_window(backbone, selection.window, stride)
        return Method(backbone, name, checkpoint, stride, window, selection.batch_size,
                      runtime.autocast)

    sliding, slider = [], pretrained or student
    if slide:
        window = choose_window(slider, selection.window, 1)
        usual = [min(window) // 2, default_stride(slider.patch)]
        chosen = selection.stride or (strides(slider, window) if strides else usual)
        sliding = [method(slider, stride) for stride in dict.fromkeys(chosen)]
    if selection.compare:
        return [method(pretrained), *sliding, method(student)]
    return sliding or [method(slider)]


def open_methods(args, selection, runtime):
    """Return the rows of a table: the selected methods with each refinement and upsampler."""
    methods = choose_methods(selection, runtime)
    lposs = anyup = None
    if "lposs" in args.refine:
        from extras.lposs import read_settings
        lposs = read_settings(args.lposs)
    elif args.lposs:
        raise UsageError("--lposs goes with --refine lposs")
    if "anyup" in args.upsampler:
        if all(method.stride for method in methods):
            raise UsageError("--upsampler anyup enlarges the map of a single pass; sliding windows "
                             "are joined at pixels already")
        from extras.anyup import AnyUp
        anyup = AnyUp(args.hub_dir, args.random_init, runtime.device)
    rows = {}
    for method, refine, upsampler in itertools.product(methods, args.refine, args.upsampler):
        row = replace(method, lposs=lposs if refine == "lposs" else None,
                      anyup=anyup if upsampler == "anyup" and not method.stride else None)
        rows.setdefault(row.label, row)
    return list(rows.values())


def choose_rule(method, dataset, given):
    """Return the benchmark's thresholds for a method, except for those in `given`."""
    rule = Rule() if method.lposs else benchmark_rule(dataset.name, method.origin)
    rule = replace(rule, **given)
    if (rule.threshold or rule.area_threshold) and not dataset.classes.background:
        raise UsageError("--prob-threshold and --area-threshold send pixels to a background "
                         f"class, and {dataset.name} has none; give --background WORDS, or a "
                         "first class called background")
    return rule


# ---- an evaluation, which remembers what it counted ------------------------------------------

@dataclass(eq=False)
class Evaluation:
    """A row of a table: a method on a data set at one size by one rule, and what it counted."""
    method: Method
    dataset: Dataset
    size: Size
    rule: Rule
    texts: torch.Tensor  # (N, D), unit vectors of the class names
    maps: Path | None  # folder for label maps

    def open(self, state, settings, runtime):
        """Open the journal named by all that counts depend on, and take a share of the rest."""
        method, dataset = self.method, self.dataset
        depends = text_hash([
            settings, method.label, repr(method.lposs),
            method.anyup and method.anyup.digest, str(self.size), asdict(self.rule),
            dataset.classes.names, hashlib.sha256(self.texts.cpu().numpy()).hexdigest(),
            files_state(dataset), str(self.maps)])
        name = f"{Path(dataset.name).name[-40:]}-{folder_name(method.label)}-{depends[:16]}.jsonl"
        self.journal = Journal(Path(state) / name)
        self.journal.open(runtime)
        missing = [index for index, image in enumerate(dataset.images)
                   if image not in self.journal.done]
        self.share = missing[runtime.rank::runtime.world]

    def load(self, index):
        """Return what load_sample does, and the image at the size that the backbone sees."""
        image, labels, error = load_sample(self.dataset, index)
        patch = self.method.backbone.patch
        resized = None if error else fit_to_patches(self.size.resize(image), patch)
        return image, labels, error, resized

    def predict(self, index, resized, size):
        with naming(self.dataset.images[index]):
            return self.method.predict(resized, size, self.dataset.classes, self.texts, self.rule)

    def draw(self, index, image, labels, resized):
        """Save the maps of an image."""
        from extras.drawing import save_maps
        features = self.method.features(prepare(self.method.backbone, resized))
        save_maps(self.maps, self.dataset.images[index], image, labels, features,
                  self.dataset.classes)

    def count(self, index, labels, predictions, seconds):
        """Write an image's confusion matrix to the journal. Without labels, all are 0."""
        labels = torch.zeros_like(predictions) if labels is None else labels
        labels = labels.to(predictions.device)
        confusion = confusion_matrix(labels, predictions, len(self.dataset.classes)).cpu()
        self.journal.count(self.dataset.images[index], confusion, seconds)

    def confusion(self, images=None):
        """Return the confusion matrix of some images, or of all that were counted."""
        return self.journal.confusion(len(self.dataset.classes), images)

    def result(self, confusion):
        """Return an entry of the JSON's results."""
        method, rule, journal = self.method, self.rule, self.journal
        windows = method.backbone.windows
        iou, miou, accuracy = scores(confusion)
        values = [None if math.isnan(value) else value for value in iou.tolist()]
        seconds = [entry["seconds"] for entry in journal.done.values()]
        return {
            "dataset": self.dataset.name,
            "method": method.name,
            "refine": method.refine,
            "upsampler": method.upsampler,
            "stride": method.stride,
            "frozen_stride": windows.stride if windows else 0,
            "checkpoint": method.checkpoint,
            **asdict(self.size),
            "miou": miou,
            "miou_labelled": iou[confusion.any(1)].mean().item(),
            "pixel_accuracy": accuracy,
            "images": len(seconds),
            "unreadable": sorted(journal.failed),
            "seconds_per_image": float(np.mean(seconds)),
            "logit_scale": rule.logit_scale,
            "prob_threshold": rule.threshold,
            "area_threshold": rule.area_threshold,
            "per_class_iou": dict(zip(self.dataset.classes.titles, values))}


# ---- the loop --------------------------------------------------------------------------------

def evaluate(evaluation, runtime, workers=2):
    """Segment, time and count this process's share of the images."""
    dataset, share = evaluation.dataset, evaluation.share
    samples = prefetch(evaluation.load, share, workers)
    progress = tqdm(zip(share, samples), f"{dataset.name}, {evaluation.method.label}", len(share),
                    unit="image", disable=runtime.rank > 0)
    advised, warm = False, dataset.masks is None  # without masks, no time is reported
    for index, (image, labels, error, resized) in progress:
        if error:
            progress.write(f"left out: {error}")
            evaluation.journal.leave_out(dataset.images[index], error)
            continue
        size = image.shape[-2:]
        advised = advised or say_large(resized, evaluation.method, progress)
        if not warm:
            evaluation.predict(index, resized, size)  # not timed
            warm = True
        started = synchronised_time(runtime.device)
        predictions = evaluation.predict(index, resized, size)  # (H, W)
        seconds = synchronised_time(runtime.device) - started
        if evaluation.maps:  # before the image counts as done
            evaluation.draw(index, image, predictions, resized)
        evaluation.count(index, labels, predictions, seconds)


def say_large(image, method, progress):
    """Print how a single pass over a large image can be made faster. Returns whether it can."""
    height, width = image.shape[-2:]
    tokens = height * width // method.backbone.patch ** 2
    large = tokens > 8000 and not method.stride
    if large:
        better = "" if method.backbone.windows else ", as is a student of --frozen-stride"
        progress.write(f"{height} x {width} pixels are {tokens} patches, whose attention takes "
                       f"long; --short-side 672 is quicker{better}")
    return large


def announce(table, state):
    """Print what is about to run on one data set at one size, and by which thresholds."""
    dataset = table[0].dataset
    count = len(dataset.images)
    print(f"{dataset.name}: {count} images, {dataset.classes}, {table[0].size}")
    for evaluation in table:
        rule = evaluation.rule
        if rule.threshold or rule.area_threshold:
            print(f"{evaluation.method.label}: background below a class probability of "
                  f"{rule.threshold:g} at logit scale {rule.logit_scale:g}, area threshold "
                  f"{rule.area_threshold:g}")
    done = sum(len(evaluation.journal.done) for evaluation in table)
    if done:
        print(f"continuing an unfinished run: {done} of {len(table) * count} label maps are "
              f"counted in {state}")


def conclude(table):
    """Print and draw what all processes counted. Return the results, none without masks."""
    dataset, count = table[0].dataset, len(table[0].dataset.images)
    confusions = []
    for evaluation in table:
        journal = evaluation.journal
        journal.read()
        lost = count - len(journal.done) - len(journal.failed)
        if lost > 0:
            raise RunError(f"the counts of {lost} images are missing in {journal.path}: --state "
                           "must be a folder that all processes share, with one run at a time; "
                           "run the same command again")
        if not journal.done:
            raise RunError(f"none of the {count} images of {dataset.name} could be read")
        confusions.append(evaluation.confusion())
        if not confusions[-1].any():
            raise RunError(f"{dataset.name}: no pixel of its masks counts, so there is nothing "
                           f"to score ({IGNORE} is ignored)")
    failed = table[0].journal.failed
    if failed:
        print(f"{len(failed)} of {count} images could not be read and are left out")
    if table[0].maps:
        from extras.drawing import write_shares
        write_shares(table)
    if dataset.masks is None:
        return []
    results = [evaluation.result(counts) for evaluation, counts in zip(table, confusions)]
    print_table(results)
    return results


def print_table(results):
    """Print the IoU of each class on one data set at one size, with a column for each method."""
    labels = list(map(result_label, results))
    names = list(results[0]["per_class_iou"])
    width = max(len("pixel accuracy"), *map(len, names)) + 2
    cell = max(18, *map(len, labels)) + 2
    lines = [("", labels)]
    for name in names:
        values = [row["per_class_iou"][name] for row in results]
        lines.append((name, ["-" if value is None else f"{value:.1f}" for value in values]))
    lines.append(("mIoU", [f"{row['miou']:.1f}" for row in results]))
    if any(abs(row["miou_labelled"] - row["miou"]) > 1e-9 for row in results):
        # a single wrong pixel gives a class that no mask holds an IoU of 0
        lines.append(("mIoU, labelled", [f"{row['miou_labelled']:.1f}" for row in results]))
    lines.append(("pixel accuracy", [f"{row['pixel_accuracy']:.1f}" for row in results]))
    lines.append(("seconds/image", [f"{row['seconds_per_image']:.3f}" for row in results]))
    print()
    for title, texts in lines:
        print(f"{title:<{width}}" + "".join(f"{text:>{cell}}" for text in texts))


# ---- main ------------------------------------------------------------------------------------

def plan_tables(args, methods, datasets, maps):
    """Return what each table compares on one data set at one size, a list of Evaluation."""
    sizes = [Size(short_side=side) for side in dict.fromkeys(args.short_side or [])]
    sizes += [Size(area=side) for side in dict.fromkeys(args.area or [])]
    given = {"logit_scale": args.logit_scale, "threshold": args.prob_threshold,
             "area_threshold": args.area_threshold}
    given = {name: value for name, value in given.items() if value is not None}
    tables = []
    for dataset in datasets:
        rules = [choose_rule(method, dataset, given) for method in methods]
        # a student has the text tower of its teacher
        texts = embed_texts(methods[-1].backbone, dataset.classes.flat)
        for size in sizes or [dataset.size]:
            folder = subfolder(maps, dataset.name, datasets)
            folder = subfolder(folder, str(size.requested), sizes)
            tables.append([
                Evaluation(method, dataset, size, rule, texts,
                           subfolder(folder, method.label, methods))
                for method, rule in zip(methods, rules)])
    return tables


def subfolder(folder, name, among):
    """Return folder / name where there are several things to tell apart."""
    return folder / folder_name(name) if folder and len(among) > 1 else folder


def folder_name(label):
    return label.replace("/", "-").replace(" ", "")


def main(args):
    selection = read_selection(args)
    if args.export or args.export_texts:
        return write_onnx(args, selection, defaults=parse_args([]))
    openers = find_datasets(args)
    if args.check_data:
        return check_data(openers, args.workers, whole=args.limit is None)
    datasets = [open_dataset() for open_dataset in openers]
    labelled = all(dataset.masks is not None for dataset in datasets)
    maps = maps_folder(args.save_maps, args.images, labelled)
    if maps:
        remove_stale_files(maps)
    runtime = start_runtime(args.device, args.precision, args.seed)
    methods = open_methods(args, selection, runtime)
    if args.save_student:
        from extras.official import save_student
        save_student(methods[-1].backbone, args.save_student, args.checkpoint, runtime)
    for dataset in datasets:
        check_masks(dataset, runtime, args.workers)
        say_unknown_words(methods[0].origin, dataset.classes, runtime)
    settings = describe_settings(args, selection, methods, runtime)
    for method in methods:
        convert_weights(method.backbone.visual, DTYPES[runtime.precision])
    tables = plan_tables(args, methods, datasets, maps)
    results = []
    for table in tables:
        for evaluation in table:
            evaluation.open(args.state, settings, runtime)
        if runtime.rank == 0:
            announce(table, args.state)
        for evaluation in table:
            evaluate(evaluation, runtime, args.workers)
        runtime.barrier()  # until all have written their counts
        results += conclude(table) if runtime.rank == 0 else []
    if runtime.rank == 0:
        write_results(args, settings, results, methods, datasets, runtime)
        for evaluation in itertools.chain(*tables):
            evaluation.journal.path.unlink(missing_ok=True)


if __name__ == "__main__":
    run_stage(main, ARGS)
