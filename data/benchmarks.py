"""Labelled pictures: class names, the six benchmarks - where their files lie, what their label ids
mean, the protocol that published numbers follow - and the reading and checking of any pictures with
masks.

Folder layouts are those that the mmsegmentation data guide makes. Class names stand in
data/classes/NAME.txt, one class a line in label order, synonyms behind commas; they are the names
of the published evaluations, glued words included.
"""
import collections
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common import (BACKBONES, DEMO, IGNORE, RunFailed, WrongCall, list_images, prefetch,
                    raise_unless_the_files_fault, read_image, read_json, resize_image)

CLASS_FILES = Path(__file__).resolve().parent / "classes"


# ---- class names ---------------------------------------------------------------------------------

@dataclass
class Classes:
    """Class names in label order. names[k] lists class k's synonyms, the first of which is what it
    is called.

    background: class 0 is everything else; its names stand for what that may be, and thresholds
    send pixels to it.
    """
    names: list
    background: bool = False

    def __len__(self):
        return len(self.names)

    @property
    def titles(self):
        titles = [synonyms[0] for synonyms in self.names]
        return ["background", *titles[1:]] if self.background else titles

    @property
    def flat(self):
        """Every name with its synonyms, in order: N strings."""
        return [name for synonyms in self.names for name in synonyms]

    @property
    def owner(self):
        """The class of each flat name: (N,) int64."""
        return torch.tensor([k for k, synonyms in enumerate(self.names) for _ in synonyms])


def read_classes(source, background=None):
    """Classes from a file (one class a line, synonyms separated by commas) or from "cat, grass |
    lawn, sky" itself.

    background: words for a class 0 before them ("wall, floor"); a first class called "background"
    is one, too. Raises WrongCall for an empty list, an empty name, a repeated one, or more classes
    than a label PNG can hold.
    """
    source = str(source)
    where = f"`classes` {source}"
    if os.path.isfile(source):  # False also for a list of names that is too long for a path
        try:
            lines = Path(source).read_text(encoding="utf-8-sig").rstrip().splitlines()
        except UnicodeDecodeError:
            raise WrongCall(f"{where} is no UTF-8 text; save it as such") from None
        names = [line.split(",") for line in lines]
    elif source.endswith((".txt", ".csv", ".json")) or os.sep in source or os.path.isdir(source):
        raise WrongCall(f"{where}: no such file")
    else:
        where = "`classes`"
        names = [entry.split("|") for entry in source.split(",")] if source.strip() else []
    if not names:
        raise WrongCall(f"{where}: the list is empty; give one class a line, or \"cat, grass | "
                        "lawn, sky\"")
    if background is not None:
        names.insert(0, background.split(","))
    names = [[name.strip() for name in synonyms] for synonyms in names]
    if len(names) > IGNORE:
        raise WrongCall(f"{where}: {len(names)} classes, but labels are one byte, and {IGNORE} is "
                        f"ignored; at most {IGNORE} classes can be told apart")
    check_names(names, where, background is not None)
    return Classes(names, background is not None or names[0][0].lower() == "background")


def check_names(names, where, own_background):
    """Raise WrongCall for a name that is empty or stands twice. own_background: class 0 is not of
    `where`, so that its lines count from class 1 on."""
    seen = {}
    for line, synonyms in enumerate(names, 0 if own_background else 1):
        if own_background and line and synonyms[0].lower() == "background":
            raise WrongCall(f"{where}: a class called background, beside the one of `background`; "
                            "leave one of them out")
        for name in synonyms:
            if not name and not line:
                raise WrongCall("`background`: an empty name; give words like \"wall, floor\"")
            if not name:
                raise WrongCall(f"{where}: class {line} has an empty name")
            if name.lower() in seen:
                raise WrongCall(f"{where}: '{name}' stands for class {seen[name.lower()]} and "
                                f"again for class {line}; a name must be unique")
            seen[name.lower()] = line


# ---- label ids: a file's 256 values -> class, IGNORE, or OUT_OF_RANGE ----------------------------

OUT_OF_RANGE = -1
# "Cityscapes labelIds": 34 ids, of which 19 are evaluated, in the order of their train ids
CITYSCAPES_TRAIN_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def label_table(kind, count):
    """What each value of a label file stands for, with `count` classes: (256,) int64.

    kind: "plain" is 0..count-1; "zero-ignored" is 1..count, and 0 counts nowhere; "cityscapes-ids"
    are raw labelIds. 255 is ignored in all.
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


# ---- layouts -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Layout:
    """Where pictures and label files lie below --data-root; {} is a picture's name.

    masks: patterns in order of preference, each with the kind of its label ids where it is not the
    benchmark's own. listing: the file of the names, or None for all that match. count: of pictures,
    where it is known. panoptic: the JSON of its true segments, the folder of their PNG files and
    the kind of its category ids, or None.
    """
    folder: str
    images: str
    masks: tuple
    listing: str | None
    count: int | None
    panoptic: tuple | None = None


def voc(part, count, *masks):
    return Layout("VOCdevkit/VOC2012", "JPEGImages/{}.jpg",
                  tuple((f"{folder}/{{}}.png", None) for folder in masks),
                  f"ImageSets/Segmentation/{part}.txt", count)


def context(part, count):
    return Layout("VOCdevkit/VOC2010", "JPEGImages/{}.jpg",
                  (("SegmentationClassContext/{}.png", None),),
                  f"ImageSets/SegmentationContext/{part}.txt", count)


def ade(part, short, count):
    return Layout("ADEChallengeData2016", f"images/{part}/{{}}.jpg",
                  ((f"annotations/{part}/{{}}.png", None),), None, count,
                  (f"ade20k_panoptic_{short}.json", f"ade20k_panoptic_{short}", "plain"))


def cityscapes(part, count):
    return Layout("cityscapes", f"leftImg8bit/{part}/{{}}_leftImg8bit.png",
                  ((f"gtFine/{part}/{{}}_gtFine_labelTrainIds.png", None),
                   (f"gtFine/{part}/{{}}_gtFine_labelIds.png", "cityscapes-ids")), None, count,
                  (f"gtFine/cityscapes_panoptic_{part}.json", f"gtFine/cityscapes_panoptic_{part}",
                   "cityscapes-ids"))


# by part; "trainaug" is VOC's training set with the labels of SBD (Hariharan et al.) added
VOC = {"val": voc("val", 1449, "SegmentationClass"),
       "train": voc("train", 1464, "SegmentationClass"),
       "trainaug": voc("trainaug", 10582, "SegmentationClassAug", "SegmentationClass")}
CONTEXT = {"val": context("val", 5104), "train": context("train", None)}
ADE = {"val": ade("validation", "val", 2000), "train": ade("training", "train", 20210)}
CITYSCAPES = {"val": cityscapes("val", 500), "train": cityscapes("train", 2975)}


# ---- the protocol, data set by data set and backbone by backbone ---------------------------------

@dataclass(frozen=True)
class Size:
    """What pictures are resized to before inference, aspect ratio kept: a short side (with a long
    one of at most LONGEST pixels), the area of a square, or nothing."""
    short_side: int | None = None
    area: int | None = None  # side of that square
    LONGEST = 2048

    def __str__(self):
        if self.area:
            return f"area of {self.area} x {self.area}"
        return f"short side {self.short_side}" if self.short_side else "own size"

    @property
    def asked(self):
        """The number that was asked for, or None."""
        return self.short_side or self.area

    def scale(self, height, width):
        """The factor, and whether the bound on the long side made it smaller."""
        if self.area:
            return self.area / (height * width) ** 0.5, False
        if not self.short_side:
            return 1.0, False
        wanted, most = self.short_side / min(height, width), self.LONGEST / max(height, width)
        return min(wanted, most), most < wanted

    def resize(self, image):
        """(3, H, W) uint8 -> (3, H', W'), each side rounded to the nearest whole number."""
        scale, _ = self.scale(*image.shape[-2:])
        return resize_image(image, [max(1, int(side * scale + 0.5)) for side in image.shape[-2:]])


@dataclass(frozen=True)
class Rule:
    """How similarities become labels, beyond the largest one winning (protocol.md); needs a
    background class 0.

    A pixel whose largest class probability - softmax over all names of logit_scale times similarity
    - is under `threshold` becomes label 0; a foreground class that wins no more than the share
    `area_threshold` of the foreground is left out first.
    """
    logit_scale: float = 40.0
    threshold: float = 0.0
    area_threshold: float = 0.0


@dataclass(frozen=True)
class Benchmark:
    """layouts: by part. labels: kind of the label ids. short_side: of pictures before inference;
    None keeps theirs.

    rules: thresholds by backbone; "*" is for every other one.
    """
    layouts: dict
    classes: int
    background: bool
    labels: str
    short_side: int | None
    rules: dict


BENCHMARKS = {
    #                       layouts     classes background label ids short side
    "voc21":      Benchmark(VOC,        21,     True,  "plain",        672,
                            {"*": Rule(65), "openclip": Rule(65, 0.1, 0.1)}),
    "voc20":      Benchmark(VOC,        20,     False, "zero-ignored", 672,  {"*": Rule(40)}),
    "cityscapes": Benchmark(CITYSCAPES, 19,     False, "plain",        None, {"*": Rule(40)}),
    "ade20k":     Benchmark(ADE,        150,    False, "zero-ignored", 672,  {"*": Rule(40)}),
    "context60":  Benchmark(CONTEXT,    60,     True,  "plain",        672,  {"*": Rule(50, 0.1)}),
    "context59":  Benchmark(CONTEXT,    59,     False, "zero-ignored", 672,  {"*": Rule(40)}),
}


def benchmark_classes(name, source=None):
    """The names of a benchmark's classes: its own, or those of another file of as many lines.
    Raises WrongCall."""
    benchmark = BENCHMARKS[name]
    classes = read_classes(source or CLASS_FILES / f"{name}.txt")
    if len(classes) != benchmark.classes:
        raise WrongCall(f"`classes` {source} lists {len(classes)} classes, but {name} has "
                        f"{benchmark.classes}; data/classes/{name}.txt shows their order")
    return Classes(classes.names, benchmark.background)


def benchmark_rule(name, backbone):
    """The thresholds for a backbone, by its short name or the identifier behind it: Rule. Outside
    the benchmarks there are none."""
    if name not in BENCHMARKS:
        return Rule()
    rules = BENCHMARKS[name].rules
    for known, rule in rules.items():
        if BACKBONES.get(known, known) == BACKBONES.get(backbone, backbone):
            return rule
    return rules["*"]


# ---- data sets -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Dataset:
    name: str
    root: Path
    images: list  # paths relative to root
    masks: list | None  # paths of their label masks, or None
    tables: list | None  # label_table of each mask
    classes: Classes
    size: Size = Size()  # of the protocol
    known: int | None = None  # how many pictures the data set should have
    panoptic: dict | None = None  # (PNG file, {segment id: class}) by picture, without crowds
    things: frozenset = frozenset()  # the classes whose segments are single objects


def own_pictures(path, mask_root, classes, limit=None, name=None):
    """A Dataset of a folder of pictures, or one; a mask is the PNG file of the same relative name.
    Raises RunFailed."""
    root, images = Path(path), list_images(path)[:limit]
    root = root.parent if root.is_file() else root
    if mask_root is None:
        return Dataset(name or str(path), root, images, None, None, classes)
    masks = [Path(mask_root) / Path(image).with_suffix(".png") for image in images]
    for mask, times in collections.Counter(masks).items():
        if times > 1:
            sharing = [image for image, other in zip(images, masks) if other == mask]
            raise RunFailed(f"{mask} would be the mask of several pictures: {', '.join(sharing)}")
    tables = [label_table("plain", len(classes))] * len(masks)
    return Dataset(name or str(path), root, images, masks, tables, classes)


def demo_pictures(source=None, limit=None):
    """The demo's labelled test pictures, with other names for its classes if a source is given."""
    classes = read_classes(DEMO / "classes.txt")
    own = read_classes(source) if source else classes
    if len(own) != len(classes):
        raise WrongCall(f"`classes` {source} lists {len(own)} classes, but the demo has "
                        f"{len(classes)}; name own pictures with --images")
    return own_pictures(DEMO / "test" / "images", DEMO / "test" / "masks", own, limit, "demo")


def open_benchmark(name, data_root, source=None, limit=None, part="val", panoptic=False):
    """A benchmark as a Dataset, its pictures in a fixed order. Raises RunFailed for missing files.

    source: another class file for it. part: of its layouts. panoptic: with its true segments.
    """
    benchmark, layout = BENCHMARKS[name], BENCHMARKS[name].layouts[part]
    classes, root = benchmark_classes(name, source), Path(data_root) / layout.folder
    images, masks, tables = [], [], []
    by_kind = {kind: label_table(kind, benchmark.classes)
               for kind in ("plain", "zero-ignored", "cityscapes-ids")}
    names = picture_names(name, layout, root)[:limit]
    for each in names:
        candidates = [(root / pattern.format(each), kind or benchmark.labels)
                      for pattern, kind in layout.masks]
        mask, kind = next((pair for pair in candidates if pair[0].is_file()), candidates[-1])
        images.append(layout.images.format(each))
        masks.append(mask)
        tables.append(by_kind[kind])
    segments, things = None, frozenset()
    if panoptic and layout.panoptic:
        known, things = read_panoptic(root, *layout.panoptic, benchmark.classes)
        segments = {image: known.get(Path(each).name) for image, each in zip(images, names)}
        for image, segment in segments.items():
            if segment is None:
                raise RunFailed(f"{root / layout.panoptic[0]} has no segments of {image}")
    return Dataset(name, root, images, masks, tables, classes, Size(benchmark.short_side),
                   layout.count, segments, things)


def read_panoptic(root, listing, folder, kind, count):
    """The true segments that a panoptic JSON (COCO's format) lists: ({image id: (PNG file, {segment
    id: class})}, the classes of things). Crowds are left out. Raises RunFailed."""
    report, table = read_json(root / listing, "the benchmark's own tool"), label_table(kind, count)
    try:
        classes = {each["id"]: int(table[each["id"]]) for each in report["categories"]}
        things = {classes[each["id"]] for each in report["categories"] if each["isthing"]}
        segments = {each["image_id"]: (root / folder / each["file_name"], {
            segment["id"]: classes[segment["category_id"]] for segment in each["segments_info"]
            if not segment.get("iscrowd")}) for each in report["annotations"]}
    except (KeyError, TypeError, IndexError) as error:
        raise RunFailed(f"{root / listing} is no panoptic JSON in COCO's format ({error!r})"
                        ) from None
    return segments, frozenset(things - {IGNORE, OUT_OF_RANGE})


def picture_names(name, layout, root):
    """The names that a layout lists below its root. Raises RunFailed."""
    advice = (f"--data-root names the folder that holds {layout.folder.split('/')[0]}, laid out as "
              "in the mmsegmentation data guide")
    if not root.is_dir():
        raise RunFailed(f"--dataset {name}: {root} does not exist; {advice}")
    if layout.listing is None:
        before, after = layout.images.split("{}")
        names = sorted(str(path.relative_to(root))[len(before):-len(after)]
                       for path in root.glob(layout.images.replace("{}", "**/*")))
    elif (root / layout.listing).is_file():
        names = [line.strip() for line in (root / layout.listing).read_text().splitlines()]
    else:
        raise RunFailed(f"--dataset {name}: {root / layout.listing}, the list of its pictures, "
                        f"does not exist; {advice}")
    if not any(names):
        raise RunFailed(f"--dataset {name}: {root / layout.images.replace('{}', '*')} matches no "
                        f"picture; {advice}")
    return [name for name in names if name]


# ---- reading and checking ------------------------------------------------------------------------

def picture_size(path):
    """(H, W) as read_image will give it, from the file's header alone. Raises RunFailed."""
    try:
        with Image.open(path) as picture:
            turned = picture.getexif().get(0x0112) in range(5, 9)  # what swaps the sides
            return picture.size if turned else picture.size[::-1]
    except FileNotFoundError:
        raise RunFailed(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises many types for damaged metadata
        raise_unless_the_files_fault(error, path)
        raise RunFailed(f"{path} cannot be read as a picture: {error}") from None


def read_label_ids(path, size=None):
    """A label file's values, (H, W) as stored, checked against its picture's size. Raises
    RunFailed."""
    try:
        with Image.open(path) as picture:
            ids = np.asarray(picture)
    except Exception as error:
        raise_unless_the_files_fault(error, path)
        raise RunFailed(f"{path} cannot be read as a mask: {error}") from None
    if ids.ndim != 2:
        raise RunFailed(f"{path} has {ids.shape[2]} channels; a mask has one, of class numbers")
    if ids.dtype.kind not in "bui":
        raise RunFailed(f"{path} holds {ids.dtype} values; a mask holds whole numbers")
    ids = ids.astype(np.uint8) if ids.dtype.kind == "b" else ids
    if size is not None and ids.shape != tuple(size):
        raise RunFailed(f"{path} is {ids.shape[0]} x {ids.shape[1]} pixels (height x width), but "
                        f"its picture {size[0]} x {size[1]}")
    return ids


def to_classes(ids, table, path):
    """Label ids as classes, by their label_table: (H, W) int64. Raises RunFailed for ids that the
    data set does not have."""
    wrong = [int(value) for value in np.unique(ids)
             if not 0 <= value < 256 or table[value] == OUT_OF_RANGE]
    if wrong:
        allowed = [value for value in range(IGNORE) if table[value] != OUT_OF_RANGE]
        count = len(set(table) - {OUT_OF_RANGE, IGNORE})
        raise RunFailed(f"{path} holds labels {', '.join(map(str, wrong[:5]))}; with {count} "
                        f"classes they go from {allowed[0]} to {allowed[-1]}, and {IGNORE} is "
                        "ignored")
    return torch.from_numpy(table[ids])


def read_labels(path, size, table):
    """A mask as classes, (H, W) int64. Raises RunFailed."""
    return to_classes(read_label_ids(path, size), table, path)


def load_sample(dataset, index):
    """(picture (3, H, W) uint8 or None, mask (H, W) int64 or None, what is wrong with the picture
    or None)."""
    try:
        image = read_image(dataset.root / dataset.images[index])
    except RunFailed as error:
        return None, None, str(error)
    if dataset.masks is None:
        return image, None, None
    return image, read_mask(dataset, index, image.shape[-2:]), None


def read_mask(dataset, index, size=None):
    """A picture's mask as classes, (H, W) int64, checked against its size. Raises RunFailed."""
    return read_labels(dataset.masks[index], size, dataset.tables[index])


def nearest_labels(labels, size):
    """(H, W) int64 -> (*size), by the nearest pixel."""
    resized = F.interpolate(labels[None, None].float(), size=tuple(size), mode="nearest-exact")
    return resized[0, 0].long()


def true_segments(dataset, index, labels):
    """The segments of a picture with labels (H, W): (each pixel's segment, -1 for none, (H, W); the
    class of each segment (S,)), int64. Raises RunFailed.

    Where a data set tells no objects apart, all pixels of one class are one segment.
    """
    if dataset.panoptic is None:
        ids, by_id = labels, {k: k for k in range(len(dataset.classes))}
    else:
        path, by_id = dataset.panoptic[dataset.images[index]]
        colours = read_image(path).long()  # an id is R + 256 G + 256^2 B
        ids = colours[0] + 256 * colours[1] + 65536 * colours[2]
        if ids.shape != labels.shape:
            raise RunFailed(f"{path} has another size than the mask of its picture")
    present, segments = ids.unique(return_inverse=True)
    owners = torch.tensor([by_id.get(each, IGNORE) for each in present.tolist()])
    known = (owners != IGNORE) & (owners != OUT_OF_RANGE)
    number = torch.where(known, known.cumsum(0) - 1, -1)
    return number[segments], owners[known]


def inspect(dataset, index, decode):
    """(what is wrong with the picture, what is wrong with its mask, the mask's pixels by label id
    (256,)); decode reads the whole picture."""
    path, size, bad_picture, bad_mask = dataset.root / dataset.images[index], None, None, None
    pixels = np.zeros(256, np.int64)
    try:
        size = read_image(path).shape[-2:] if decode else picture_size(path)
    except RunFailed as error:
        bad_picture = str(error)
    if dataset.masks is not None:
        mask = dataset.masks[index]
        try:
            if not mask.is_file():
                raise RunFailed(f"{path} has no mask: {mask} does not exist")
            ids = read_label_ids(mask, size)
            pixels += np.bincount(ids[(ids >= 0) & (ids < 256)], minlength=256)
            to_classes(ids, dataset.tables[index], mask)
        except RunFailed as error:
            bad_mask = str(error)
    return bad_picture, bad_mask, pixels


def check_masks(dataset, runtime, workers):
    """Stop at a bad mask now, and not after hours. An unreadable picture is met, and left out, in
    the run itself. Returns which label ids each mask holds, (masks, 256) bool."""
    if dataset.masks is None:
        return None
    present = torch.zeros(len(dataset.masks), 256)
    mine = range(runtime.rank, len(dataset.masks), runtime.world)
    inspections = prefetch(lambda k: inspect(dataset, k, decode=False), mine, workers)
    with tqdm(inspections, total=len(mine), desc=f"masks of {dataset.name}", unit="mask",
              leave=False, disable=runtime.rank > 0) as progress:
        for k, (_, problem, pixels) in zip(mine, progress):
            if problem:
                raise RunFailed(f"{problem} (--check-data lists all such files)")
            present[k] = torch.from_numpy(pixels > 0)
    return runtime.add_up(present.to(runtime.device)).cpu() > 0


def check_data(dataset, workers, whole=True):
    """--check-data: print what is there, what is wrong, and how often each label id occurs. Returns
    the number of problems. whole: every picture that the data set is known to have should be there.
    """
    problems = []
    pixels, files = np.zeros(256, np.int64), np.zeros(256, np.int64)
    if whole and dataset.known and len(dataset.images) != dataset.known:
        problems.append(f"{len(dataset.images)} pictures, but {dataset.name} is known to have "
                        f"{dataset.known}")
    everything = range(len(dataset.images))
    inspections = prefetch(lambda k: inspect(dataset, k, decode=True), everything, workers)
    for *bad, counts in tqdm(inspections, total=len(everything), desc=dataset.name, unit="picture"):
        problems += filter(None, bad)
        pixels += counts
        files += counts > 0
    known = f" of the known {dataset.known}" if dataset.known else ""
    print(f"\n{dataset.name}: {len(dataset.images)}{known} pictures in {dataset.root}, "
          f"{len(dataset.classes)} classes ({len(dataset.classes.flat)} names)")
    if dataset.masks is not None:
        print_label_ids(dataset, pixels, files)
    for problem in problems:
        print(f"problem: {problem}")
    print(f"{len(problems)} problems" if problems else "no problem found")
    return len(problems)


def print_label_ids(dataset, pixels, files):
    """pixels, files: of each label id in all masks, and how many masks hold it, (256,)."""
    titles = dataset.classes.titles
    meaning = {IGNORE: "ignored", OUT_OF_RANGE: "OUT OF RANGE"} | dict(enumerate(titles))
    tables = {tuple(table): table for table in dataset.tables}.values()  # masks may be of two kinds
    present = set()
    print(f"{'label id':>8}  {'pictures':>8}  {'pixels':>7}  class")
    for value in np.flatnonzero(pixels):
        kinds = sorted({int(table[value]) for table in tables})
        present.update(kinds)
        print(f"{value:>8}  {files[value]:>8}  {pixels[value] / pixels.sum():>7.2%}  "
              f"{' or '.join(meaning[kind] for kind in kinds)}")
    absent = [title for k, title in enumerate(titles) if k not in present]
    if absent:
        print(f"in no mask: {', '.join(absent)}")
