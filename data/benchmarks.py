"""Labelled pictures: the six benchmarks - where their files lie, what their label ids mean, the protocol that published numbers
follow - and the reading and checking of any pictures with masks.

Folder layouts are those that the mmsegmentation data guide makes. Class names stand in data/classes/NAME.txt, one class a line in
label order, synonyms behind commas; they are the names of the published evaluations, glued words included.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import BACKBONES, IGNORE, Classes, Rule, RunFailed, WrongCall, prefetch, read_classes, read_image

CLASS_FILES = Path(__file__).resolve().parent / "classes"


# ---- label ids: a file's 256 values -> class, IGNORE, or OUT_OF_RANGE ----------------------------------------------------

OUT_OF_RANGE = -1
# "Cityscapes labelIds": 34 ids, of which 19 are evaluated, in the order of their train ids
CITYSCAPES_TRAIN_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def label_table(kind, count):
    """What each value of a label file stands for, with `count` classes: (256,) int64.

    kind: "plain" is 0..count-1; "zero-ignored" is 1..count, and 0 counts nowhere; "cityscapes-ids" are raw labelIds. 255 is ignored in all.
    """
    table = np.full(256, OUT_OF_RANGE)
    table[IGNORE] = IGNORE
    if kind == "plain":
        table[:count] = np.arange(count)
    elif kind == "zero-ignored":
        table[0] = IGNORE
        table[1:count + 1] = np.arange(count)
    elif kind == "cityscapes-ids":
        table[:34] = IGNORE
        table[CITYSCAPES_TRAIN_IDS] = np.arange(19)
    return table


# ---- layouts -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Layout:
    """Where pictures and label files lie below --data-root; {} is a picture's name. listing: the file of the names, or None for all that match.

    masks: patterns in order of preference, each with the kind of its label ids where it is not the benchmark's own.
    """
    folder: str
    images: str
    masks: tuple
    listing: str | None
    count: int


VOC = Layout("VOCdevkit/VOC2012", "JPEGImages/{}.jpg", (("SegmentationClass/{}.png", None),), "ImageSets/Segmentation/val.txt", 1449)
CONTEXT = Layout("VOCdevkit/VOC2010", "JPEGImages/{}.jpg", (("SegmentationClassContext/{}.png", None),), "ImageSets/SegmentationContext/val.txt", 5104)
ADE = Layout("ADEChallengeData2016", "images/validation/{}.jpg", (("annotations/validation/{}.png", None),), None, 2000)
CITYSCAPES = Layout("cityscapes", "leftImg8bit/val/{}_leftImg8bit.png",
                    (("gtFine/val/{}_gtFine_labelTrainIds.png", None), ("gtFine/val/{}_gtFine_labelIds.png", "cityscapes-ids")), None, 500)


# ---- the protocol, data set by data set and backbone by backbone -----------------------------------------------------------

@dataclass(frozen=True)
class Benchmark:
    """labels: kind of the label ids. short_side: of pictures before inference (the long side at most 2048); None keeps their size.

    rules: logit scale, probability threshold and area threshold by backbone; "*" is for every other one.
    """
    layout: Layout
    classes: int
    background: bool
    labels: str
    short_side: int | None
    rules: dict


BENCHMARKS = {
    #                       layout   classes background labels      short side  scale, probability and area thresholds
    "voc21":      Benchmark(VOC,        21, True,  "plain",        672,  {"*": Rule(65), "openclip": Rule(65, 0.1, 0.1)}),
    "voc20":      Benchmark(VOC,        20, False, "zero-ignored", 672,  {"*": Rule(40)}),
    "cityscapes": Benchmark(CITYSCAPES, 19, False, "plain",        None, {"*": Rule(40)}),
    "ade20k":     Benchmark(ADE,       150, False, "zero-ignored", 672,  {"*": Rule(40)}),
    "context60":  Benchmark(CONTEXT,    60, True,  "plain",        672,  {"*": Rule(50, 0.1)}),
    "context59":  Benchmark(CONTEXT,    59, False, "zero-ignored", 672,  {"*": Rule(40)}),
}


def benchmark_classes(name, source=None):
    """The names of a benchmark's classes: its own, or those of another file of as many lines. Raises WrongCall."""
    benchmark = BENCHMARKS[name]
    classes = read_classes(source or CLASS_FILES / f"{name}.txt")
    if len(classes) != benchmark.classes:
        raise WrongCall(f"--classes {source} lists {len(classes)} classes, but --dataset {name} has {benchmark.classes}; "
                        f"data/classes/{name}.txt shows their order")
    return Classes(classes.names, benchmark.background)


def benchmark_rule(name, backbone):
    """The thresholds for a --backbone value, by its short name or the identifier behind it: Rule."""
    rules = BENCHMARKS[name].rules
    for known, rule in rules.items():
        if BACKBONES.get(known, known) == BACKBONES.get(backbone, backbone):
            return rule
    return rules["*"]


def benchmark_files(name, data_root):
    """(folder, pictures relative to it, label files, label tables), in a fixed order. Raises RunFailed for what is missing."""
    benchmark, layout = BENCHMARKS[name], BENCHMARKS[name].layout
    root = Path(data_root) / layout.folder
    advice = f"--data-root names the folder that holds {layout.folder.split('/')[0]}, laid out as in the mmsegmentation data guide"
    if not root.is_dir():
        raise RunFailed(f"--dataset {name}: {root} does not exist; {advice}")
    if layout.listing:
        if not (root / layout.listing).is_file():
            raise RunFailed(f"--dataset {name}: {root / layout.listing}, the list of its pictures, does not exist; {advice}")
        names = [line.strip() for line in (root / layout.listing).read_text().splitlines() if line.strip()]
    else:
        before, after = layout.images.split("{}")
        names = sorted(str(path.relative_to(root))[len(before):-len(after)] for path in root.glob(layout.images.replace("{}", "**/*")))
    if not names:
        raise RunFailed(f"--dataset {name}: {root / layout.images.replace('{}', '*')} matches no picture; {advice}")
    images, masks, tables = [], [], []
    by_kind = {kind: label_table(kind, benchmark.classes) for kind in ("plain", "zero-ignored", "cityscapes-ids")}
    for each in names:
        image = layout.images.format(each)
        candidates = [(root / pattern.format(each), kind or benchmark.labels) for pattern, kind in layout.masks]
        mask, kind = next(((mask, kind) for mask, kind in candidates if mask.is_file()), candidates[-1])
        images.append(image)
        masks.append(mask)
        tables.append(by_kind[kind])
    return root, images, masks, tables


# ---- reading and checking ------------------------------------------------------------------------------------------------

@dataclass
class Dataset:
    name: str
    root: Path
    images: list  # paths relative to root
    masks: list | None  # paths of their label masks, or None
    tables: list | None  # label_table of each mask
    classes: Classes
    short_sides: list  # to evaluate at; None is the pictures' own size
    known: int | None = None  # how many pictures the data set should have


def picture_size(path):
    """(H, W) as read_image will give it, from the file's header alone. Raises RunFailed."""
    try:
        with Image.open(path) as picture:
            turned = picture.getexif().get(0x0112, 1) >= 5  # the orientations that swap the sides
            return picture.size if turned else picture.size[::-1]
    except FileNotFoundError:
        raise RunFailed(f"{path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RunFailed(f"{path} cannot be read as a picture: {error}") from None


def read_label_ids(path, size=None):
    """A label file's values, (H, W) as stored, checked against its picture's size. Raises RunFailed."""
    try:
        with Image.open(path) as picture:
            ids = np.asarray(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RunFailed(f"{path} cannot be read as a mask: {error}") from None
    if ids.ndim != 2:
        raise RunFailed(f"{path} has {ids.shape[2]} channels; a mask has one, of class numbers")
    if ids.dtype.kind not in "bui":
        raise RunFailed(f"{path} holds {ids.dtype} values; a mask holds whole numbers")
    ids = ids.astype(np.uint8) if ids.dtype.kind == "b" else ids
    if size is not None and ids.shape != tuple(size):
        raise RunFailed(f"{path} is {ids.shape[0]} x {ids.shape[1]} pixels (height x width), but its picture {size[0]} x {size[1]}")
    return ids


def to_classes(ids, table, path):
    """Label ids as classes, by their label_table: (H, W) int64. Raises RunFailed for ids that the data set does not have."""
    present = np.unique(ids)
    wrong = [int(value) for value in present if not 0 <= value < 256 or table[value] == OUT_OF_RANGE]
    if wrong:
        allowed = [value for value in range(IGNORE) if table[value] != OUT_OF_RANGE]
        raise RunFailed(f"{path} holds labels {', '.join(map(str, wrong[:5]))}; with {len(set(table) - {OUT_OF_RANGE, IGNORE})} classes they go from "
                        f"{allowed[0]} to {allowed[-1]}, and {IGNORE} is ignored")
    return torch.from_numpy(table[ids])


def load_sample(dataset, index):
    """(picture (3, H, W) uint8 or None, mask (H, W) int64 or None, what is wrong with the picture or None)."""
    try:
        image = read_image(dataset.root / dataset.images[index])
    except RunFailed as error:
        return None, None, str(error)
    if dataset.masks is None:
        return image, None, None
    return image, to_classes(read_label_ids(dataset.masks[index], image.shape[-2:]), dataset.tables[index], dataset.masks[index]), None


def inspect(dataset, index, decode):
    """(what is wrong with the picture, what is wrong with its mask, the mask's pixels by label id (256,)); decode reads the whole picture."""
    size = bad_picture = bad_mask = None
    pixels = np.zeros(256, np.int64)
    try:
        path = dataset.root / dataset.images[index]
        size = read_image(path).shape[-2:] if decode else picture_size(path)
    except RunFailed as error:
        bad_picture = str(error)
    if dataset.masks is not None:
        try:
            if not dataset.masks[index].is_file():
                raise RunFailed(f"{dataset.root / dataset.images[index]} has no mask: {dataset.masks[index]} does not exist")
            ids = read_label_ids(dataset.masks[index], size)
            pixels += np.bincount(ids[(ids >= 0) & (ids < 256)], minlength=256)
            to_classes(ids, dataset.tables[index], dataset.masks[index])
        except RunFailed as error:
            bad_mask = str(error)
    return bad_picture, bad_mask, pixels


def check_masks(dataset, args, runtime):
    """Stop at a bad mask now, and not after hours. An unreadable picture is met, and left out, in the run itself."""
    if dataset.masks is None:
        return
    mine = range(runtime.rank, len(dataset.masks), runtime.world)
    inspections = prefetch(lambda k: inspect(dataset, k, decode=False), mine, args.workers)
    with tqdm(inspections, total=len(mine), desc=f"masks of {dataset.name}", unit="mask", leave=False, disable=runtime.rank > 0) as progress:
        problem = next((bad_mask for _, bad_mask, _ in progress if bad_mask), None)
    if problem:
        raise RunFailed(f"{problem} (--check-data lists all such files)")


def check_data(dataset, args):
    """--check-data: what is there, what is wrong, and how often each label id occurs. Returns the number of problems."""
    problems = []
    if dataset.known and not args.limit and len(dataset.images) != dataset.known:
        problems.append(f"{len(dataset.images)} pictures, but {dataset.name} is known to have {dataset.known}")
    pixels, files = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for bad_picture, bad_mask, counts in tqdm(prefetch(lambda k: inspect(dataset, k, decode=True), range(len(dataset.images)), args.workers),
                                              total=len(dataset.images), desc=dataset.name, unit="picture"):
        problems += [problem for problem in (bad_picture, bad_mask) if problem]
        pixels += counts
        files += counts > 0
    known = f" of the known {dataset.known}" if dataset.known else ""
    classes = dataset.classes
    print(f"\n{dataset.name}: {len(dataset.images)}{known} pictures in {dataset.root}, {len(classes)} classes ({len(classes.flat)} names)")
    if dataset.masks is not None:
        meaning = {IGNORE: "ignored", OUT_OF_RANGE: "OUT OF RANGE"} | dict(enumerate(classes.titles))
        tables = {tuple(table): table for table in dataset.tables}.values()
        print(f"{'label id':>8}  {'pictures':>8}  {'pixels':>7}  class")
        for value in np.flatnonzero(pixels):
            kinds = sorted({int(table[value]) for table in tables})  # several only where the masks are of several kinds
            print(f"{value:>8}  {files[value]:>8}  {pixels[value] / pixels.sum():>7.2%}  {' or '.join(meaning[kind] for kind in kinds)}")
        present = {int(table[value]) for table in tables for value in np.flatnonzero(pixels)}
        absent = [title for k, title in enumerate(classes.titles) if k not in present]
        if absent:
            print(f"in no mask: {', '.join(absent)}")
    for problem in problems:
        print(f"problem: {problem}")
    print(f"{len(problems)} problems" if problems else "no problem found")
    return len(problems)
