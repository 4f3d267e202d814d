"""What evaluate_ovs.py and evaluate_probes.py are asked to evaluate: models, images, folders."""
import os
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download

from common import BACKBONES, DEMO, LOADING, MODEL_FILES, load_backbone, loading
from data.files import RunError, UsageError, read_json, reading
from data.benchmarks import (BENCHMARKS, GROUPS, demo_images, open_benchmark, own_images,
                             read_classes)


@dataclass(frozen=True)
class Selection:
    """What to evaluate. The fields are named like their flags."""
    checkpoint: str | None = None  # a student's folder, or with a backbone a file of the authors
    backbone: str | None = None
    random_init: bool = False
    hub_dir: str | None = None
    dinov3_weights: list | None = None
    inference: str | None = None
    stride: list | None = None
    window: int | None = None
    compare: bool = False
    batch_size: int = 60


def read_selection(args):
    """Return what the flags select. --compare is on for the demo without other flags."""
    official = args.backbone and args.checkpoint and not os.path.isdir(args.checkpoint)
    if getattr(args, "save_student", None) and not official:
        raise UsageError("--save-student goes with a checkpoint of the authors: --backbone NAME "
                         "--checkpoint FILE")
    given = {field.name: getattr(args, field.name) for field in fields(Selection)}
    given["checkpoint"] = args.checkpoint and args.checkpoint.removeprefix("local-dir:")
    if args.compare is None:
        others = args.images, args.inference, args.backbone, args.checkpoint, args.stride
        given["compare"] = args.dataset in (None, "demo") and not any(others)
    if not (args.backbone or args.checkpoint):
        given["checkpoint"] = "runs/spar"
    return Selection(**given)


def load_models(selection, runtime):
    """Return the pre-trained backbone and the student, None if not loaded, and the former's
    name."""
    name, checkpoint, device = selection.backbone, selection.checkpoint, runtime.device
    flags = {key: getattr(selection, key) for key in LOADING}
    pretrained = student = None
    if checkpoint is None:
        if selection.compare:
            raise UsageError("--compare needs a student; give --checkpoint in place of "
                             "--backbone, which follows from it")
        pretrained = load_backbone(name, device=device, text=True, **flags)
    elif name and not Path(checkpoint).is_dir():
        from extras.official import load_official
        student = load_official(selection, device)
    else:
        if checkpoint.startswith("hf-hub:"):
            with loading(checkpoint, "The repository must hold a folder of distill.py"):
                checkpoint = snapshot_download(checkpoint.removeprefix("hf-hub:"))
        teacher, made = read_student(Path(checkpoint), name, selection.compare)
        name = teacher["backbone"]
        runtime.print(f"student {selection.checkpoint} ({made})")
        clone = teacher.get("hub_dir")
        flags["hub_dir"] = flags["hub_dir"] or (clone if clone and Path(clone).exists() else None)
        flags["dinov3_weights"] = flags["dinov3_weights"] or teacher.get("dinov3_weights")
        flags["random_init"] = False
        student = load_backbone(Path(checkpoint).absolute(), device=device, text=True, **flags)
        flags["random_init"] = teacher.get("random_init", False)
    if selection.compare:
        pretrained = load_backbone(name, device=device, **flags)
    return pretrained, student, name


def read_student(folder, backbone=None, needs_teacher=False):
    """Return how a student's teacher was loaded, {"backbone": ..., ...}, which must be `backbone`,
    and in words what the student was made from."""
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise RunError(f"{folder} {problem}; distill.py writes a student there, or give "
                       "--backbone for a pre-trained model (and for a file of the authors)")
    note, settings = folder / "spar.json", {"teacher": {"backbone": str(folder)}}
    with reading(note, "run distill.py again"):
        if needs_teacher or note.is_file():
            settings = read_json(note, "run distill.py again")
        teacher = settings["teacher"]
        name = made = teacher["backbone"]
        if "maps" in settings:
            made = (f"{name}, {settings['maps']} feature maps of {Path(teacher['images']).name}, "
                    f"trained blocks: {settings['train_blocks'] or 'none'}")
        same = not backbone or BACKBONES.get(backbone, backbone) == BACKBONES.get(name, name)
    if not any((folder / file).is_file() for file in MODEL_FILES):
        raise RunError(f"{folder} holds no finished student; give the --out of distill.py, whose "
                       "command continues what was interrupted")
    if not same:
        raise UsageError(f"--checkpoint {folder} with --backbone {backbone} must be a file with "
                         "a SPAR state dict of the authors; this is a folder with a student of "
                         f"{name}, which needs no --backbone")
    return teacher, made


def find_datasets(args):
    """Return what the flags ask to segment, a list of functions that return a Dataset each."""
    if getattr(args, "save_student", None) and not (args.dataset or args.images):
        return []
    if args.images and args.dataset:
        raise UsageError("--dataset and --images are mutually exclusive")
    if args.images:
        if not args.classes:
            raise UsageError("--images needs --classes, a file or names like \"cat, grass | "
                             "lawn, sky\"")
        if not args.masks and (args.json or getattr(args, "plot", None)):
            raise UsageError("--json and --plot hold scores, which need --masks")
        classes = read_classes(args.classes, args.background)
        return [partial(own_images, args.images, args.masks, classes, args.limit)]
    for flag in ("masks", "background"):
        if getattr(args, flag):
            raise UsageError(f"--{flag} goes with --images")
    if args.dataset in (None, "demo"):
        return [partial(demo_images, args.classes, args.limit)]
    if args.dataset not in (*GROUPS, *BENCHMARKS):
        raise UsageError(f"--dataset {args.dataset}: unknown; known are demo, "
                         f"{', '.join((*BENCHMARKS, *GROUPS))}")
    if args.classes and args.dataset in GROUPS:
        raise UsageError("--classes renames the classes of one --dataset, not of all")
    return [partial(open_benchmark, name, args.data_root, args.classes, args.limit)
            for name in GROUPS.get(args.dataset, [args.dataset])]


def say_unknown_words(backbone, classes, runtime):
    """Print the words that the demo's small backbone was never trained on."""
    if backbone != "tiny":
        return
    known = set((DEMO / "tiny" / "words.txt").read_text().split())
    unknown = {word for name in classes.flat for word in name.lower().split()} - known
    if unknown:
        runtime.print(f"tiny never learnt {', '.join(sorted(unknown))}; another --backbone knows "
                      "more words")


def maps_folder(save_maps, images, labelled):
    """Return the folder for label maps, or None. Raise UsageError for one among the images."""
    if not save_maps and labelled:
        return None
    maps = Path(save_maps or "runs/maps")
    for folder in filter(os.path.isdir, images or ()):
        if maps.resolve().is_relative_to(Path(folder).resolve()):
            raise UsageError(f"--save-maps {maps} lies inside --images {folder}, where the next "
                             "run would take the maps for images; give a folder outside")
    return maps
