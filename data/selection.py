"""What evaluate_ovs.py and evaluate_probes.py are asked to evaluate: flags, models, folders.

Nothing here imports torch before it is needed, so that --help and a wrong flag answer at once.
"""
import argparse
import os
from dataclasses import dataclass, fields
from pathlib import Path

from data.flags import add_backbone_flags, bounded, filled


def ending(*suffixes):
    """Return an argparse type: a path that ends in one of the suffixes."""
    def parse_path(text):
        if os.path.splitext(text)[1] not in suffixes:
            raise argparse.ArgumentTypeError(f"{text}: must end in {' or '.join(suffixes)}")
        return text
    return parse_path


def add_selection_flags(parser):
    """Add the flags of a Selection."""
    group, positive = parser.add_argument_group("what to evaluate"), bounded(int, 1, 10 ** 9)
    add = group.add_argument
    add("--checkpoint", type=filled, help="a student: a folder that distill.py wrote (default: "
        "runs/spar); or, with --backbone, a file with a SPAR state dict of the authors")
    add_backbone_flags(group, "to evaluate a pre-trained model; default: none, but the student")
    add("--positions", choices=["size", "scale"], help="how a file of the authors resamples "
        "positional embeddings: to a grid's size, or by the factor (grid + 0.1) / native grid "
        "(default: scale for OpenCLIP's, which were trained so, and size for others)")
    add("--inference", choices=["single-pass", "sliding-window"], help="(default: single-pass)")
    add("--stride", "--strides", type=positive, nargs="+", metavar="N", help="pixels between "
        "windows; several give a row each (default: 1.5 patches, in evaluate_ovs.py also half a "
        "window)")
    add("--window", type=positive, metavar="N", help="side of the sliding window in pixels "
        "(default: the image size that the backbone was trained on)")
    add("--compare", action=argparse.BooleanOptionalAction, help="pre-trained single pass, "
        "pre-trained sliding window and student in one table (default: on for the demo)")
    add("--batch-size", type=positive, default=60, help="most windows per forward pass "
        "(%(default)s); a CPU takes as many as its caches hold")


def add_data_flags(parser):
    """Add the flags of open_datasets."""
    add = parser.add_argument_group("on what").add_argument
    add("--dataset", type=filled, metavar="NAME", help="demo (default, unless --images is given),"
        " voc21, voc20, cityscapes, ade20k, context60, context59, or all six")
    add("--data-root", type=filled, default="data", metavar="DIR", help="the folder of the "
        "benchmarks: DIR/VOCdevkit/VOC2012, DIR/cityscapes ... (%(default)s)")
    add("--check-data", action="store_true", help="only check counts, pairs, sizes and label ids")
    add("--images", type=filled, metavar="PATH", help="your own images: a folder or one file")
    add("--masks", type=filled, metavar="DIR", help="label masks of --images: PNG files of the "
        "same relative names, one channel of class numbers, 255 is ignored")
    add("--classes", metavar="FILE|NAMES", help="a file with one class a line and commas between "
        "synonyms, the first line is label 0; or \"cat, grass | lawn, sky\"; with --dataset: "
        "other names for its classes")
    add("--background", metavar="WORDS", help="of --images: a class 0 before --classes for all "
        "else, with what that may be: \"wall, floor, road\"")
    add("--limit", type=bounded(int, 1, 10 ** 9), metavar="N", help="use only the first N images")


@dataclass(frozen=True)
class Selection:
    """What to evaluate. The fields are named like their flags."""
    checkpoint: str | None = None  # a student's folder, or with a backbone a file of the authors
    backbone: str | None = None
    random_init: bool = False
    hub_dir: str | None = None
    dinov3_weights: list | None = None
    positions: str | None = None
    inference: str | None = None
    stride: list | None = None
    window: int | None = None
    compare: bool = False
    batch_size: int = 60


def read_selection(args):
    """Return what the flags select. --compare is on for the demo without other flags."""
    from data.files import UsageError
    official = args.backbone and args.checkpoint and not os.path.isdir(args.checkpoint)
    for flag in ("positions", "save_student"):
        if getattr(args, flag, None) and not official:
            raise UsageError(f"--{flag.replace('_', '-')} goes with a checkpoint of the authors: "
                             "--backbone NAME --checkpoint FILE")
    given = {field.name: getattr(args, field.name) for field in fields(Selection)}
    if args.compare is None:
        others = args.images, args.inference, args.backbone, args.checkpoint, args.stride
        given["compare"] = args.dataset in (None, "demo") and not any(others)
    if not (args.backbone or args.checkpoint):
        given["checkpoint"] = "runs/spar"
    return Selection(**given)


def load_models(selection, device):
    """Return the pre-trained backbone and the student, or None, and the name of the former."""
    from common import LOADING, load_backbone
    from data.files import UsageError
    name, checkpoint = selection.backbone, selection.checkpoint
    loading = {key: getattr(selection, key) for key in LOADING}
    pretrained = student = None
    if checkpoint is None:
        if selection.compare:
            raise UsageError("--compare needs a student; give --checkpoint in place of "
                             "--backbone, which follows from it")
        pretrained = load_backbone(name, device=device, text=True, **loading)
    elif name and not Path(checkpoint).is_dir():
        from extras.official import load_official
        student = load_official(selection, device)
    else:
        teacher = read_student(Path(checkpoint), name, selection.compare)
        name = teacher["backbone"]
        loading = {key: loading[key] or teacher.get(key) for key in ("hub_dir", "dinov3_weights")}
        student = load_backbone(Path(checkpoint).absolute(), device=device, text=True, **loading)
        loading["random_init"] = teacher.get("random_init", False)
    if selection.compare:
        pretrained = load_backbone(name, device=device, **loading)
    return pretrained, student, name


def read_student(folder, backbone=None, needs_teacher=False):
    """Return how a student's teacher was loaded: {"backbone": ..., ...}; it must be `backbone`."""
    from common import BACKBONES, MODEL_FILES
    from data.files import RunError, UsageError, read_json, reading
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise RunError(f"{folder} {problem}; distill.py writes a student there, or give "
                       "--backbone for a pre-trained model (and for a file of the authors)")
    note, teacher = folder / "spar.json", {"backbone": str(folder)}
    with reading(note, "run distill.py again"):
        if needs_teacher or note.is_file():
            teacher = read_json(note, "run distill.py again")["teacher"]
        name = teacher["backbone"]
        same = not backbone or BACKBONES.get(backbone, backbone) == BACKBONES.get(name, name)
    if not any((folder / file).is_file() for file in MODEL_FILES):
        raise RunError(f"{folder} holds no finished student; the distill.py command that began "
                       "it continues, and writes one")
    if not same:
        raise UsageError(f"--checkpoint {folder} with --backbone {backbone} must be a file with "
                         "a SPAR state dict of the authors; this is a folder with a student of "
                         f"{name}, which needs no --backbone")
    return teacher


def open_datasets(args):
    """Return what the flags ask to segment, a list of Dataset."""
    from data.files import UsageError
    from data.benchmarks import (BENCHMARKS, demo_images, open_benchmark, own_images,
                                 read_classes)
    if getattr(args, "save_student", None) and not (args.dataset or args.images):
        return []
    if args.images and args.dataset:
        raise UsageError("--dataset and --images are mutually exclusive")
    if args.images:
        if not args.classes:
            raise UsageError("--images needs --classes, a file or names like \"cat, grass | "
                             "lawn, sky\"")
        if not args.masks and (args.json or args.plot):
            raise UsageError("--json and --plot hold scores, which need --masks")
        classes = read_classes(args.classes, args.background)
        return [own_images(args.images, args.masks, classes, args.limit)]
    for flag in ("masks", "background"):
        if getattr(args, flag):
            raise UsageError(f"--{flag} goes with --images")
    if args.dataset in (None, "demo"):
        return [demo_images(args.classes, args.limit)]
    if args.dataset not in ("all", *BENCHMARKS):
        raise UsageError(f"--dataset {args.dataset}: unknown; known are demo, all, "
                         f"{', '.join(BENCHMARKS)}")
    if args.classes and args.dataset == "all":
        raise UsageError("--classes renames the classes of one --dataset, not of all")
    names = list(BENCHMARKS) if args.dataset == "all" else [args.dataset]
    return [open_benchmark(name, args.data_root, args.classes, args.limit) for name in names]




def maps_folder(save_maps, images, labelled):
    """Return the folder for label maps, or None. Raise UsageError for one among the images."""
    from data.files import UsageError
    if not save_maps and labelled:
        return None
    maps = Path(save_maps or "runs/maps")
    if images and Path(images).is_dir() and maps.resolve().is_relative_to(Path(images).resolve()):
        raise UsageError(f"--save-maps {maps} lies inside --images {images}, where the next run "
                         "would take the maps for images; give a folder outside")
    return maps
