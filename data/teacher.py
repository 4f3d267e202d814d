"""What distill.py reads and stores: a teacher's folder, and the tokens of frozen blocks."""
import contextlib
import math
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from common import LOADING, open_features
from data.files import (RunError, apply_augmentation, is_unchanged, nearest_multiple,
                        planned_size, read_image, read_index, read_json, read_lines, reading,
                        resize_image, save_array)
from data.journal import text_hash


# settings of an extraction on which its feature maps do not depend
FREE = ("maps", "threads", "torch", "open_clip")


class Teacher:
    """A folder of extract_teacher.py: settings, feature maps, and an index entry for each map."""

    def __init__(self, folder, partial=False):
        self.folder, path = Path(folder), Path(folder) / "teacher.json"
        self.settings = read_json(path, "run extract_teacher.py")
        self.entries = read_index(folder)
        self.failed = len(read_lines(self.folder / "failures.jsonl"))
        with reading(path, "run extract_teacher.py again"):
            self.images = Path(self.settings["images"])
            self.patch, self.dim = self.settings["patch"], self.settings["dim"]
            self.loading = {key: self.settings[key] for key in LOADING}  # for load_backbone
            self.loading["name"] = str(self.settings["backbone"])
            if self.patch < 1:
                raise ValueError(f"a patch of {self.patch} pixels")
            missing = self.settings["maps"] - len(self.entries) - self.failed
        if not self.entries or missing > 0 and not partial:
            raise RunError(f"{folder} has {len(self.entries)} feature maps and lacks {missing}; "
                           "its extract_teacher.py command makes them, or give --partial to "
                           "train on those that are there")
        self.smallest = min(self.entries, key=lambda entry: math.prod(entry["grid"]))

    @property
    def lasting_settings(self):
        """The settings that remain the same when the extraction is run again."""
        return {key: value for key, value in self.settings.items() if key not in FREE}

    @property
    def digest(self):
        """A digest of the images and their augmentations, which identifies the feature maps."""
        entries = [{key: value for key, value in entry.items() if key != "stat"}
                   for entry in self.entries]
        return text_hash(entries)[:16]

    def image(self, entry, factor=1.0, device="cpu"):
        """Return the augmented image, rescaled by a factor on a device: (3, H, W) uint8."""
        path = self.images / entry["image"]
        if not is_unchanged(path, entry):
            raise RunError(f"{path} is missing, or has changed since its feature map was made; "
                           "run extract_teacher.py again (if its --images was moved, write the "
                           f"new place into {self.folder / 'teacher.json'})")
        image = apply_augmentation(read_image(path).to(device), entry)
        if factor == 1:
            return image
        sides = [nearest_multiple(side * factor, self.patch) for side in image.shape[-2:]]
        return resize_image(image, sides)

    def target(self, entry):
        """Return the feature map: (h, w, D) float16."""
        path = self.folder / entry["file"]
        target = torch.from_numpy(np.array(open_features(path)))
        height, width = planned_size(entry)
        expected = (height // self.patch, width // self.patch, self.dim)
        if (target.shape != expected or not target.sum(dtype=torch.float32).isfinite()
                or "crc32" in entry and zlib.crc32(path.read_bytes()) != entry["crc32"]):
            raise RunError(f"{path} does not hold the finite values of shape {expected} that were "
                           "written; delete it and run extract_teacher.py again")
        return target


class FrozenTokens:
    """What enters the first trained block: a float16 .npy (n, C) per feature map on the disk."""

    def __init__(self, root, teacher, student, precision, example):
        first, windows = student.first, student.backbone.windows
        _, count, self.width = example.shape  # tokens of the teacher's smallest image
        self.entries = teacher.entries
        self.extra = count - math.prod(teacher.smallest["grid"])  # class, register tokens
        depends = [teacher.loading["name"], teacher.settings["weights"], teacher.digest, first,
                   windows and asdict(windows), precision]
        self.folder = Path(root) / f"frozen-{first}-{text_hash(depends)[:8]}"

    def path(self, entry):
        return self.folder / entry["file"].removeprefix("features/")

    def shape(self, entry):
        return math.prod(entry["grid"]) + self.extra, self.width

    def missing_bytes(self):
        """Return how many bytes are still to be written."""
        return sum(2 * math.prod(self.shape(entry)) for entry in self.entries
                   if not self.path(entry).exists())

    def read(self, entry):
        """Return tokens (1, n, C), or None if they are missing or damaged."""
        with contextlib.suppress(Exception):  # numpy raises many types for a damaged file
            tokens = torch.from_numpy(np.load(self.path(entry), allow_pickle=False))
            expected = (torch.float16, self.shape(entry))
            total = tokens.sum(dtype=torch.float32)
            if (tokens.dtype, tokens.shape) == expected and total.isfinite():
                return tokens[None]

    def keep(self, entry, tokens):
        """Store tokens (1, n, C) as float16. Return what was stored, on which to train."""
        tokens = tokens.half()
        save_array(self.path(entry), tokens[0].cpu().numpy())
        return tokens
