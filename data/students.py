"""Students from a disk: folders of distill.py, and the checkpoints that the method's authors
published, which become such folders.
"""
from pathlib import Path

from common import (BACKBONES, MODEL_FILES, OF_BACKBONE, RunFailed, WrongCall, fits, load_backbone,
                    load_strictly, read_json, read_tensors, said_positions, write_json)
from data.model_card import write_card


def load_checkpoint(backbone, path):
    """Fill a backbone from an official SPAR checkpoint: the state dict of both towers, or of the
    image tower alone.

    Its keys are those of the model with "model." before them, or "segmentor.net.model." as
    Lightning saved them.
    """
    tensors = read_tensors(path)
    for prefix in ("segmentor.net.model.", "model."):
        if any(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
            break
    image = {key.removeprefix(backbone.visual_prefix): value for key, value in tensors.items()
             if key.startswith(backbone.visual_prefix)}
    if backbone.model is None or len(image) == len(tensors):
        load_strictly(backbone.visual, image, path)
    else:
        load_strictly(backbone.model, tensors, path)


def choose_positions(backbone, rule):
    """How an official student resamples its positions: by the rule, or as its kind was trained."""
    if rule and backbone.positions is None:
        raise WrongCall(f"--positions {rule}: this backbone resamples positions by a rule of its "
                        "own; leave it out")
    backbone.positions = rule or backbone.official_positions
    if backbone.positions:
        print(said_positions(backbone))


def save_student(student, args):
    """--save-student: the folder that distill.py would have written."""
    folder = Path(args.save_student)
    note = folder / "spar.json"
    if note.exists() and "converted_from" not in read_json(note, "distill.py"):
        raise WrongCall(f"--save-student {folder} holds a student that distill.py trained; give "
                        "another folder")
    loading = student.save(folder)
    teacher = {"backbone": args.backbone, "random_init": args.random_init,
               "hub_dir": args.hub_dir, "dinov3_weights": args.dinov3_weights}
    write_json(note, {"teacher": teacher, "converted_from": args.checkpoint,
                      "positions": student.positions})
    write_card(folder)
    print(f"student in {folder}: {loading}")


def read_student(folder, needs_teacher):
    """The settings of the teacher of a student's folder. Raises RunFailed where it is none."""
    if not folder.exists():
        raise RunFailed(f"{folder} does not exist; distill.py writes a student there, or give "
                        "--backbone for a pre-trained model")
    if not folder.is_dir():
        raise RunFailed(f"{folder} is no folder with a student; distill.py writes one; an official "
                        "checkpoint file needs --backbone with it")
    teacher = {"backbone": str(folder)}
    if needs_teacher or (folder / "spar.json").is_file():
        path = folder / "spar.json"
        teacher = read_json(path, "distill.py", {"teacher": dict})["teacher"]
        if not fits({"random_init": False} | teacher, OF_BACKBONE):
            raise RunFailed(f"{path} does not say which backbone its teacher is of; distill.py "
                            "makes it anew")
    if not any((folder / name).is_file() for name in MODEL_FILES):
        raise RunFailed(f"{folder} holds no finished student: the distill.py command that began it "
                        "continues, and writes one")
    return teacher


def load_models(args, compare, device):
    """(pre-trained backbone or None, student or None, the backbone's name)."""
    files = {"hub_dir": args.hub_dir, "dinov3_weights": args.dinov3_weights}
    checkpoint = Path(args.checkpoint or "runs/spar")
    if args.backbone and not (args.checkpoint and checkpoint.is_dir()):
        if args.checkpoint and not checkpoint.is_file():
            raise WrongCall(f"--checkpoint {checkpoint}: no such file or folder")
        if args.compare and not args.checkpoint:
            raise WrongCall("--compare needs a student; give --checkpoint instead of --backbone, "
                            "which follows from it")
        origin, random_init = args.backbone, args.random_init
        model = load_backbone(origin, random_init, device, text=True, **files)
        if args.checkpoint:
            load_checkpoint(model, checkpoint)
            choose_positions(model, args.positions)
        pretrained, student = (None, model) if args.checkpoint else (model, None)
    else:
        teacher = read_student(checkpoint, compare)
        origin, random_init = teacher["backbone"], teacher.get("random_init", False)
        given = args.backbone or origin
        if BACKBONES.get(given, given) != BACKBONES.get(origin, origin):
            raise WrongCall(f"--checkpoint {checkpoint} with --backbone {args.backbone} must be a "
                            "file with an official SPAR state dict; this is a folder with a "
                            f"student of {origin}, which needs no --backbone")
        files = {key: value or teacher.get(key) for key, value in files.items()}
        pretrained = None
        student = load_backbone(checkpoint.absolute(), device=device, text=True, **files)
    if compare:
        pretrained = load_backbone(origin, random_init, device, **files)
    return pretrained, student, origin
