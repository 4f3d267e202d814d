"""Students that the method's authors published: checkpoints, which become folders like those of
distill.py."""
from pathlib import Path

import torch

from common import LOADING, load_backbone, load_strictly, read_tensors
from data.files import UsageError, read_json, reading, write_json
from extras.model_card import write_card


class Unread:
    """Stands for an object beside the tensors, such as settings, whose class is not loaded."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass


def load_official(selection, device):
    """Return the student that a Selection's checkpoint, a file of the authors, makes of its
    backbone."""
    path = Path(selection.checkpoint)
    if not path.is_file():
        raise UsageError(f"--checkpoint {path}: no such file or folder")
    loading = {key: getattr(selection, key) for key in LOADING}
    student = load_backbone(selection.backbone, device=device, text=True, **loading)
    load_checkpoint(student, path)
    choose_positions(student, selection.positions)
    return student


def load_checkpoint(backbone, path):
    """Fill a backbone from a checkpoint, a state dict of both towers or of the image tower alone.

    Its keys are those of the model behind "model.", or behind "segmentor.net.model." as Lightning
    saved them.
    """
    with reading(path, "fetch the file again"):
        pickled = not str(path).endswith(".safetensors")
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if pickled else []
    with torch.serialization.safe_globals([(Unread, name) for name in unknown]):
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
    """Let a student resample its positions by the rule, or if that is None as its kind was
    trained."""
    if rule and backbone.positions is None:
        raise UsageError(f"--positions {rule}: this backbone resamples positions by a rule of "
                         "its own; leave it out")
    backbone.positions = rule or backbone.official_positions
    if backbone.positions:
        print(f"positional embeddings are resized by {backbone.positions} (--positions)")


def save_student(student, folder, checkpoint, runtime):
    """Write the folder that distill.py would have written, in the first process. checkpoint: the
    student's file."""
    if runtime.rank > 0:
        return
    folder = Path(folder)
    note = folder / "spar.json"
    if note.exists() and "converted_from" not in read_json(note, "delete it"):
        raise UsageError(f"--save-student {folder} holds a student that distill.py trained; give "
                         "another folder")
    loading = student.save(folder)
    teacher = {"backbone": student.source["name"],
               **{key: student.source[key] for key in LOADING}}
    write_json(note, {"teacher": teacher, "converted_from": checkpoint,
                      "positions": student.positions})
    write_card(folder)
    print(f"student in {folder}: {loading}")
