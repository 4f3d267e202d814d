"""Labelled images: class names, the benchmarks, reading and checking images with masks.

The folder layouts are those of the mmsegmentation data guide. data/classes/NAME.txt has a class
per line in label order, with commas between synonyms, as in published evaluations. Functions
raise UsageError for a list of classes that cannot be used, and RunError for a file that cannot.
"""
import functools
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common import BACKBONES, DEMO, IGNORE, prefetch
from data.files import (RunError, UsageError, exif_orientation, list_images, read_image,
                        read_json, reading, resize_image, upright)

CLASS_FILES = Path(__file__).resolve().parent / "classes"


# ---- class names -----------------------------------------------------------------------------

@dataclass
class Classes:
    """Class names in label order."""
    names: list  # the synonyms of each class, of which the first is its title
    background: bool = False  # class 0 is everything else, and thresholds send pixels to it
    colours: np.ndarray | None = None  # those of its data set, (K, 3)

    def __post_init__(self):
        self.titles = [synonyms[0] for synonyms in self.names]
        if self.background:
            self.titles[0] = "background"
        self.flat = [name for synonyms in self.names for name in synonyms]  # N strings
        classes = [k for k, synonyms in enumerate(self.names) for _ in synonyms]
        self.class_of_name = torch.tensor(classes)  # (N,) int64

    def __len__(self):
        return len(self.names)

    def __str__(self):
        return f"{len(self)} classes ({len(self.flat)} names)"


def read_classes(source, background=None):
    """Read classes from a file, one per line, or from a text like "cat, grass | lawn, sky".
    background: words for a class 0 before them, which a first class called background is, too."""
    source, where = str(source), f"classes {source}"
    if os.path.isfile(source):  # also False for a text that is too long for a path
        names = read_class_file(source)
    elif source.endswith((".txt", ".csv", ".json")) or os.sep in source or os.path.isdir(source):
        raise UsageError(f"{where}: no such file (and no name contains {os.sep!r})")
    else:
        where = "classes"
        names = [entry.split("|") for entry in source.split(",")] if source.strip() else []
    if names and background is not None:
        names.insert(0, re.split("[,|]", background))
    if len(names) < 2:
        problem = "a single class would take every pixel" if names else "the list is empty"
        raise UsageError(f"{where}: {problem}; give a file with one class per line, or a text like "
                         "\"cat, grass | lawn, sky\"")
    names = [[name.strip() for name in synonyms] for synonyms in names]
    if len(names) > IGNORE:
        raise UsageError(f"{where}: {len(names)} classes, but labels are one byte, of which "
                         f"{IGNORE} is ignored; at most {IGNORE} classes can be told apart")
    if Path(source).parent != CLASS_FILES:  # published lists are kept as they are
        check_names(names, where, first=1 if background is None else 0)
    return Classes(names, background is not None or names[0][0].lower() == "background")


def read_class_file(path):
    """Return the synonyms of each class, not stripped."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError:
        raise UsageError(f"classes {path} is not UTF-8 text; save it as UTF-8") from None
    for line in lines:
        if re.match(r'\s*([\[{"]|\d+\s*[:;,])', line):
            raise UsageError(f"classes {path} looks like JSON, CSV or a numbered list "
                             f"({line.strip()[:40]}); give plain names, one class per line")
    return [line.split(",") for line in lines] if any(lines) else []


def check_names(names, where, first):
    """Raise UsageError for an empty or a repeated name. first: the number of the first class."""
    seen = {}
    for number, synonyms in enumerate(names, first):
        place = f"{where}: class {number}" if number else "background"  # which precedes class 1
        for name in synonyms:
            if not name:
                raise UsageError(f"{place}: an empty name")
            if name.lower() in seen:
                raise UsageError(f"{place}: '{name}' is a name of class {seen[name.lower()]}, "
                                 "too; names must be unique")
            seen[name.lower()] = number
        if number and not first and synonyms[0].lower() == "background":
            raise UsageError(f"{place} is called background, although background words are given")


# ---- benchmarks: label ids, layouts, protocol ------------------------------------------------

OUT_OF_RANGE = -1  # of label ids that the data set does not have
# Cityscapes has 34 label ids, of which 19 are evaluated; these are in the order of the train ids
CITYSCAPES_TRAIN_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
CITYSCAPES_COLOURS = [
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
    (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
    (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
    (0, 80, 100), (0, 0, 230), (119, 11, 32)]
# the 171 ids of COCO-Stuff's pixel maps, things first, in the order of the train ids
COCO_IDS = sorted(set(range(182)) - {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90})


@functools.cache
def label_table(kind, count):
    """Return the class of each value of a mask file, with `count` classes: (256,) int64. The kind
    "plain" is 0..count-1, "zero-ignored" 1..count, and the others are a benchmark's raw ids."""
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
    elif kind == "coco-stuff-ids":
        table[COCO_IDS] = np.arange(171)
    elif kind == "coco-object-ids":  # stuff and unlabelled pixels are background, as published
        table[[*COCO_IDS, IGNORE]] = 0
        table[COCO_IDS[:80]] = 1 + np.arange(80)
    return table


@dataclass(frozen=True)
class Layout:
    """Where one part of a benchmark is below the data root; {} is the name of an image."""
    folder: str
    images: str
    masks: dict  # {pattern: kind of label ids, or None for Benchmark.labels}, the best one first
    listing: str | None = None  # the file with the names of the images; None for all that match
    count: int | None = None  # number of images, if known
    panoptic: tuple | None = None  # JSON of the true segments, PNG folder, kind of category ids
    palette: bool = False  # whether palettes of VOC's colours say which label ids are meant


VOC = {
    part: Layout("VOCdevkit/VOC2012", "JPEGImages/{}.jpg",
                 {f"{folder}/{{}}.png": None for folder in folders},
                 f"ImageSets/Segmentation/{part}.txt", count, palette=True)
    for part, count, *folders in (
        ("val", 1449, "SegmentationClass"),
        ("train", 1464, "SegmentationClass"),
        # the training set with the labels of SBD (Hariharan et al.)
        ("trainaug", 10582, "SegmentationClassAug", "SegmentationClass"))}
CONTEXT = {
    part: Layout("VOCdevkit/VOC2010", "JPEGImages/{}.jpg",
                 {"SegmentationClassContext/{}.png": None},
                 f"ImageSets/SegmentationContext/{part}.txt", count)
    for part, count in (("val", 5104), ("train", None))}
ADE = {
    part: Layout("ADEChallengeData2016", f"images/{folder}/{{}}.jpg",
                 {f"annotations/{folder}/{{}}.png": None}, None, count,
                 (f"ade20k_panoptic_{part}.json", f"ade20k_panoptic_{part}", "plain"))
    for part, folder, count in (("val", "validation", 2000), ("train", "training", 20210))}
CITYSCAPES = {
    part: Layout("cityscapes", f"leftImg8bit/{part}/{{}}_leftImg8bit.png",
                 {f"gtFine/{part}/{{}}_gtFine_labelTrainIds.png": None,
                  f"gtFine/{part}/{{}}_gtFine_labelIds.png": "cityscapes-ids"}, None, count,
                 (f"gtFine/cityscapes_panoptic_{part}.json", f"gtFine/cityscapes_panoptic_{part}",
                  "cityscapes-ids"))
    for part, count in (("val", 500), ("train", 2975))}
COCO_STUFF, COCO_OBJECT = (
    {part: Layout("coco_stuff164k", f"images/{part}2017/{{}}.jpg",
                  {f"annotations/{part}2017/{{}}_{suffix}.png": None,
                   f"annotations/{part}2017/{{}}.png": raw}, None, count)
     for part, count in (("val", 5000), ("train", 118287))}
    for suffix, raw in (("labelTrainIds", "coco-stuff-ids"),
                        ("instanceTrainIds", "coco-object-ids")))


@dataclass(frozen=True)
class Size:
    """What images are resized to before inference, keeping their aspect ratio, if anything."""
    short_side: int | None = None  # with a long side of at most LONGEST pixels
    area: int | None = None  # that of a square of this side
    LONGEST = 2048

    def __str__(self):
        if self.area:
            return f"area of {self.area} x {self.area}"
        return f"short side {self.short_side}" if self.short_side else "own size"

    @property
    def requested(self):
        """The number that was asked for, or None."""
        return self.short_side or self.area

    def resize(self, image):
        """Return an image with sides rounded to whole numbers: (3, H, W) uint8 -> (3, H', W')."""
        height, width = image.shape[-2:]
        scale = 1.0
        if self.area:
            scale = self.area / (height * width) ** 0.5
        elif self.short_side:
            scale = min(self.short_side / min(height, width), self.LONGEST / max(height, width))
        return resize_image(image, [max(1, int(side * scale + 0.5)) for side in (height, width)])


@dataclass(frozen=True)
class Rule:
    """How pixels become background, label 0: where the largest probability, the softmax over all
    names of logit_scale times similarity, is below `threshold`. Before that, classes are dropped
    that win at most the share `area_threshold` of the foreground.
    """
    logit_scale: float = 40.0
    threshold: float = 0.0
    area_threshold: float = 0.0


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's files and protocol."""
    layouts: dict  # by part
    classes: int
    background: bool
    labels: str  # the kind of its label ids
    short_side: int | None  # of images before inference; None keeps their size
    rules: dict  # by backbone; "*" is for all others


BENCHMARKS = {
    #                        layouts   classes background label ids short side
    "voc21":       Benchmark(VOC,         21,  True,  "plain",        672,
                             {"*": Rule(65), "openclip": Rule(65, 0.1, 0.1)}),
    "voc20":       Benchmark(VOC,         20,  False, "zero-ignored", 672,  {"*": Rule(40)}),
    "cityscapes":  Benchmark(CITYSCAPES,  19,  False, "plain",        None, {"*": Rule(40)}),
    "ade20k":      Benchmark(ADE,         150, False, "zero-ignored", 672,  {"*": Rule(40)}),
    "context60":   Benchmark(CONTEXT,     60,  True,  "plain",        672,  {"*": Rule(50, 0.1)}),
    "context59":   Benchmark(CONTEXT,     59,  False, "zero-ignored", 672,  {"*": Rule(40)}),
    # not in the paper; SCLIP's thresholds
    "coco-object": Benchmark(COCO_OBJECT, 81,  True,  "plain",        672,  {"*": Rule(50, 0.1)}),
    "coco-stuff":  Benchmark(COCO_STUFF,  171, False, "plain",        672,  {"*": Rule(40)}),
}
GROUPS = {"all": list(BENCHMARKS)[:6], "all8": list(BENCHMARKS)}  # the paper's, the field's


def benchmark_classes(name, source=None):
    """Return the classes of a benchmark, with its own names or those of a source."""
    benchmark, own = BENCHMARKS[name], CLASS_FILES / f"{name}.txt"
    classes = renamed_classes(source or own, benchmark.classes, name, own)
    colours = {"voc21": voc_palette()[:21], "voc20": voc_palette()[1:21],
               "cityscapes": np.array(CITYSCAPES_COLOURS)}
    return Classes(classes.names, benchmark.background, colours.get(name))


def renamed_classes(source, count, name, own):
    """Return classes that must be as many as those in the file `own` of a data set."""
    classes = read_classes(source)
    if len(classes) != count:
        raise UsageError(f"classes {source}: {len(classes)} classes, but {name} has {count}; "
                         f"{own} shows their order")
    return classes


def benchmark_rule(name, backbone):
    """Return the rule for a backbone, given by its short name or by the id behind it."""
    if name not in BENCHMARKS:
        return Rule()  # without thresholds
    rules = {BACKBONES.get(known, known): rule for known, rule in BENCHMARKS[name].rules.items()}
    return rules.get(BACKBONES.get(backbone, backbone), rules["*"])


# ---- data sets -------------------------------------------------------------------------------

@dataclass(frozen=True)
class Dataset:
    """Images, their masks if there are any, and what the masks mean."""
    name: str
    root: Path
    images: list  # paths relative to root
    masks: list | None  # paths of the masks
    tables: list | None  # label_table of each mask
    classes: Classes
    size: Size = Size()  # of the protocol
    known: int | None = None  # number of images that the data set is known to have
    panoptic: dict | None = None  # {image: (PNG file, {segment id: class})}, without crowds
    things: frozenset = frozenset()  # classes whose segments are single objects
    palette: bool = False  # as in Layout


def own_images(paths, mask_root, classes, limit=None, name=None):
    """Return images, or those of folders, as a Dataset. Masks have their names in mask_root."""
    name = name or str(paths[0])
    folders = [Path(path) if os.path.isdir(path) else Path(path).parent for path in paths]
    root = folders[0] if len(folders) == 1 else Path(os.path.commonpath(
        [folder.absolute() for folder in folders]))
    images = [os.path.relpath(folder / image, root) for path, folder in zip(paths, folders)
              for image in list_images(path)]
    images = list(dict.fromkeys(images))[:limit]
    if mask_root is None:
        return Dataset(name, root, images, None, None, classes)
    # file systems differ in how they compose accents
    stored = {unicodedata.normalize("NFC", str(path)): path for path in Path(mask_root).rglob("*")}
    masks = [Path(mask_root) / Path(image).with_suffix(".png") for image in images]
    masks = [stored.get(unicodedata.normalize("NFC", str(mask)), mask) for mask in masks]
    image_of = {}
    for image, mask in zip(images, masks):
        if image_of.setdefault(mask, image) != image:
            raise RunError(f"{mask} would be the mask of several images: {image_of[mask]}, "
                           f"{image}")
    tables = [label_table("plain", len(classes))] * len(masks)
    return Dataset(name, root, images, masks, tables, classes)


def demo_images(source=None, limit=None):
    """Return the demo's labelled test images. source: other names for its classes."""
    own, test = DEMO / "classes.txt", DEMO / "test"
    classes = renamed_classes(source or own, len(read_classes(own)), "the demo", own)
    return own_images([test / "images"], test / "masks", classes, limit, "demo")


def open_benchmark(name, data_root, source=None, limit=None, part="val", panoptic=False):
    """Return a part of a benchmark as a Dataset, with other class names from a source if given."""
    benchmark, classes = BENCHMARKS[name], benchmark_classes(name, source)
    layout = benchmark.layouts[part]
    root = Path(data_root) / layout.folder
    names = image_names(name, layout, root)[:limit]
    images = [layout.images.format(image_name) for image_name in names]
    found = []  # the first mask that is there, and the kind of its label ids
    for image_name in names:
        masks = [(root / mask.format(image_name), kind) for mask, kind in layout.masks.items()]
        found.append(next((each for each in masks if each[0].is_file()), masks[-1]))
    tables = [label_table(kind or benchmark.labels, benchmark.classes) for _, kind in found]
    segments, things = None, frozenset()
    if panoptic and layout.panoptic:
        listing, folder, kind = layout.panoptic
        table = label_table(kind, benchmark.classes)
        segments_of, things = read_panoptic(root / listing, root / folder, table)
        segments = {image: segments_of.get(Path(image_name).name)
                    for image, image_name in zip(images, names)}
        missing = [image for image, found_segments in segments.items() if not found_segments]
        if missing:
            raise RunError(f"{root / listing} has no segments of {missing[0]}")
    return Dataset(name, root, images, [mask for mask, _ in found], tables, classes,
                   Size(benchmark.short_side), layout.count, segments, things, layout.palette)


def image_names(name, layout, root):
    """Return the names of a benchmark's images."""
    advice = (f"--data-root is the folder that holds {layout.folder.split('/')[0]}, laid out as "
              "in the mmsegmentation data guide")
    if not root.is_dir():
        raise RunError(f"dataset {name}: {root} does not exist; {advice}")
    if layout.listing is None:
        before, after = layout.images.split("{}")
        names = sorted(str(path.relative_to(root))[len(before):-len(after)]
                       for path in root.glob(layout.images.replace("{}", "**/*")))
    else:
        with reading(root / layout.listing, advice):
            lines = (root / layout.listing).read_text(encoding="utf-8-sig").splitlines()
        names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise RunError(f"dataset {name}: {root / layout.images.replace('{}', '*')} matches no "
                       f"image; {advice}")
    return names


def read_panoptic(path, folder, table):
    """Read true segments without crowds from a panoptic JSON in COCO's format. Return
    {image id: (PNG file, {segment id: class})} and the classes that are things."""
    remedy = "make it with the benchmark's own tool, in COCO's panoptic format"
    report = read_json(path, remedy)
    segments = {}
    with reading(path, remedy):
        categories = report["categories"]
        classes = {category["id"]: int(table[category["id"]]) for category in categories}
        things = {classes[category["id"]] for category in categories if category["isthing"]}
        for annotation in report["annotations"]:
            segments[annotation["image_id"]] = folder / annotation["file_name"], {
                segment["id"]: classes[segment["category_id"]]
                for segment in annotation["segments_info"] if not segment.get("iscrowd")}
    return segments, frozenset(things - {IGNORE, OUT_OF_RANGE})


# ---- reading and checking --------------------------------------------------------------------

def image_size(path):
    """Return the (H, W) of the image that read_image would give, from the file's header."""
    with reading(path, "replace this image, or remove it"), Image.open(path) as image:
        sideways = exif_orientation(image) in (5, 6, 7, 8)
        return image.size if sideways else image.size[::-1]


@functools.cache
def voc_palette():
    """Return the colours of label ids in PASCAL VOC's files: (256, 3) int64."""
    ids, colours = np.arange(256), np.zeros((256, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (ids >> (3 * bit + channel) & 1) << (7 - bit)
    return colours


def meant_by_palette(ids, palette):
    """Return the label ids (H, W) that a palette of VOC's colours means. A tool that saved a mask
    anew may have put these in another order; other palettes mean nothing."""
    colours = {tuple(colour): k for k, colour in enumerate(voc_palette().tolist())}
    meant = [colours.get(tuple(colour), -1) for colour in np.reshape(palette, (-1, 3)).tolist()]
    meant = np.array(meant)[ids]
    return ids if meant.min() < 0 else meant


def read_label_ids(path, size=None, palette=False):
    """Return the values of a mask file, (H, W). size: that of its image. palette: as in Layout."""
    with reading(path, "replace this mask"), Image.open(path) as image:
        if image.format == "JPEG":
            raise RunError(f"{path} is a JPEG, whose compression changes labels; masks are PNG")
        # Pillow stretches grey levels of 2 and 4 bits to 0..255
        stretch = {"L;2": 85, "L;4": 17}.get(image.tile[0][3]) if image.format == "PNG" else None
        ids = np.asarray(upright(image))
        if palette and image.mode == "P":
            ids = meant_by_palette(ids, image.getpalette())
    if ids.ndim != 2:
        raise RunError(f"{path} has {ids.shape[2]} channels; a mask has one, of class numbers")
    if ids.dtype.kind not in "bui":
        raise RunError(f"{path} holds {ids.dtype} values; a mask holds whole numbers")
    if size is not None and ids.shape != tuple(size):
        raise RunError(f"{path} is {ids.shape[0]} x {ids.shape[1]} pixels (height x width), but "
                       f"its image is {size[0]} x {size[1]}")
    ids = ids.astype(np.uint8) if ids.dtype.kind == "b" else ids
    return ids // stretch if stretch else ids


def to_classes(ids, table, path):
    """Map label ids to classes with their label_table: (H, W) -> (H, W) int64."""
    wrong = [int(value) for value in np.unique(ids)
             if not 0 <= value < 256 or table[value] == OUT_OF_RANGE]
    if wrong:
        allowed = [value for value in range(IGNORE) if table[value] != OUT_OF_RANGE]
        count = len(set(table) - {OUT_OF_RANGE, IGNORE})
        raise RunError(f"{path} holds labels {', '.join(map(str, wrong[:5]))}; with {count} "
                       f"classes they go from {allowed[0]} to {allowed[-1]}, and {IGNORE} is "
                       "ignored")
    return torch.from_numpy(table[ids])


def read_mask(dataset, index, size=None):
    """Read the mask of an image of this size as classes: (H, W) int64."""
    path = dataset.masks[index]
    ids = read_label_ids(path, size, dataset.palette)
    return to_classes(ids, dataset.tables[index], path)


def load_sample(dataset, index):
    """Return an image (3, H, W) uint8, its mask (H, W) int64 and an error, or None for each."""
    try:
        image = read_image(dataset.root / dataset.images[index])
    except RunError as error:
        return None, None, str(error)
    if dataset.masks is None:
        return image, None, None
    return image, read_mask(dataset, index, image.shape[-2:]), None


def nearest_labels(labels, size):
    """Resize labels by the nearest pixel: (H, W) int64 -> (*size)."""
    resized = F.interpolate(labels[None, None].float(), size=tuple(size), mode="nearest-exact")
    return resized[0, 0].long()


def true_segments(dataset, index, labels):
    """Return the segment of each pixel (H, W), -1 for none, and the class of each segment (S,).
    Without a panoptic truth, all pixels of one class in the labels (H, W) are a segment."""
    if dataset.panoptic is None:
        ids, class_of_id = labels, {k: k for k in range(len(dataset.classes))}
    else:
        path, class_of_id = dataset.panoptic[dataset.images[index]]
        colours = read_image(path).long()
        ids = colours[0] + 256 * colours[1] + 256 ** 2 * colours[2]
        if ids.shape != labels.shape:
            raise RunError(f"{path} has another size than the mask of its image")
    present, segments = ids.unique(return_inverse=True)
    classes = torch.tensor([class_of_id.get(value, IGNORE) for value in present.tolist()])
    known = (classes != IGNORE) & (classes != OUT_OF_RANGE)
    number = torch.where(known, known.cumsum(0) - 1, -1)
    return number[segments], classes[known]


def inspect(dataset, index, decode):
    """Check an image, of which `decode` reads all, not only the header, and its mask. Return what
    is wrong with each, or None, and how many pixels have each label id: (256,)."""
    path, mask = dataset.root / dataset.images[index], dataset.masks and dataset.masks[index]
    size = bad_image = bad_mask = None
    pixels = np.zeros(256, np.int64)
    try:
        size = read_image(path).shape[-2:] if decode else image_size(path)
    except RunError as error:
        bad_image = str(error)
    if mask:
        try:
            if not mask.is_file():
                raise RunError(f"{path} has no mask: {mask} does not exist")
            ids = read_label_ids(mask, size, dataset.palette)
            pixels += np.bincount(ids[(ids >= 0) & (ids < 256)], minlength=256)
            to_classes(ids, dataset.tables[index], mask)
        except RunError as error:
            bad_mask = str(error)
    return bad_image, bad_mask, pixels


def check_masks(dataset, runtime, workers):
    """Raise RunError for a bad mask. Print which classes no mask holds, and what is ignored."""
    if dataset.masks is None:
        return
    total = torch.zeros(256, dtype=torch.float64)
    mine = range(runtime.rank, len(dataset.masks), runtime.world)
    inspections = prefetch(lambda k: inspect(dataset, k, decode=False), mine, workers)
    for _, problem, pixels in tqdm(inspections, total=len(mine), unit="mask", leave=False,
                                   desc=f"masks of {dataset.name}", disable=runtime.rank > 0):
        if problem:
            raise RunError(f"{problem} (--check-data lists all such files)")
        total += torch.from_numpy(pixels)
    for line in describe_labels(dataset, runtime.sum(total.to(runtime.device)).cpu().numpy()):
        runtime.print(line)


def describe_labels(dataset, pixels):
    """Yield lines on what no mask holds and what is ignored. pixels: of each label id (256,)."""
    tables = np.unique(np.stack(dataset.tables), axis=0)  # masks may be of two kinds
    present = set(tables[:, pixels > 0].ravel().tolist())
    absent = [title for k, title in enumerate(dataset.classes.titles) if k not in present]
    if absent:
        yield f"in no mask of {dataset.name}: {', '.join(absent)}"
    ignored = (tables == IGNORE).all(0)  # label ids
    if pixels[ignored].any():
        yield (f"{pixels[ignored].sum() / pixels.sum():.1%} of the pixels of {dataset.name} have "
               f"label {' or '.join(map(str, np.flatnonzero(ignored & (pixels > 0))))}, which is "
               "ignored")


def check_data(openers, workers, whole):
    """Print what is there, with all images if `whole`. Raise RunError if anything is wrong.
    openers: functions that return a Dataset each."""
    found = 0
    for open_dataset in openers:
        try:
            dataset = open_dataset()
        except RunError as error:
            print(f"problem: {error}")
            found += 1
            continue
        problems, count, pixels = [], len(dataset.images), np.zeros(256, np.int64)
        if whole and dataset.known and count != dataset.known:
            problems.append(f"{count} images, but {dataset.name} is known to have {dataset.known}")
        inspections = prefetch(lambda k: inspect(dataset, k, decode=True), range(count), workers)
        for *bad, counts in tqdm(inspections, total=count, desc=dataset.name, unit="image"):
            problems += filter(None, bad)
            pixels += counts
        print(f"\n{dataset.name}: {count} images in {dataset.root}, {dataset.classes}")
        if dataset.masks is not None:
            print_label_ids(dataset, pixels)
        for problem in problems:
            print(f"problem: {problem}")
        print(f"{len(problems)} problems" if problems else "no problem found")
        found += len(problems)
    if found:
        raise RunError("the data has the problems listed above")


def print_label_ids(dataset, pixels):
    """Print a line per label id, of which there are so many pixels: (256,)."""
    titles = dict(enumerate(dataset.classes.titles))
    meaning = {IGNORE: "ignored", OUT_OF_RANGE: "OUT OF RANGE"} | titles
    tables = np.unique(np.stack(dataset.tables), axis=0)
    print("label id   pixels  class")
    for value in np.flatnonzero(pixels):
        classes = " or ".join(meaning[k] for k in np.unique(tables[:, value]).tolist())
        print(f"{value:>8}  {pixels[value] / pixels.sum():>7.2%}  {classes}")
    for line in describe_labels(dataset, pixels):
        print(line)
