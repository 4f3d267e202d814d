"""Checkpoints of the method's authors, which become folders like those of distill.py."""
from pathlib import Path

import torch

from common import LOADING, load_backbone, load_strictly, read_tensors
from data.files import UsageError, read_json, reading, write_json
from extras.model_card import write_card


class Unread(dict):
    """Stands for an object beside the tensors, such as settings, whose class is not loaded."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def load_official(selection, device):
    """Return a Selection's backbone with the weights of its checkpoint, a file of the authors."""
    path = Path(selection.checkpoint)
    if not path.is_file():
        raise UsageError(f"--checkpoint {path}: no such file or folder")
    loading = {key: getattr(selection, key) for key in LOADING}
    student = load_backbone(selection.backbone, device=device, text=True, **loading)
    load_checkpoint(student, path)
    student.positions = student.official_positions or student.positions
    return student


def load_checkpoint(backbone, path):
    """Fill a backbone from a checkpoint, a state dict of both towers or of the image tower alone,
    with keys behind "model.", or as Lightning saved them behind "segmentor.net.model."."""
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


def save_student(student, folder, checkpoint, runtime):
    """Write what distill.py would have written for a checkpoint's file, in the first process."""
    if runtime.rank > 0:
        return
    note = Path(folder) / "spar.json"
    if note.exists() and "converted_from" not in read_json(note, "delete it"):
        raise UsageError(f"--save-student {folder} holds a student that distill.py trained; give "
                         "another folder")
    loading = student.save(Path(folder))
    teacher = {"backbone": student.source["name"],
               **{key: student.source[key] for key in LOADING}}
    write_json(note, {"teacher": teacher, "converted_from": checkpoint,
                      "positions": student.positions})
    write_card(folder)
    print(f"student in {folder}: {loading}")
