"""What an unfinished evaluation keeps on the disk: a line per image that it has counted."""
import hashlib
import json
from pathlib import Path

import torch

from data.files import append_lines, read_lines, reading, write_lines


class Journal:
    """A .jsonl file of confusion matrices, which outlives a run and joins torchrun's processes.
    done: the entries of counted images. failed: why others could not be read."""

    def __init__(self, path):
        self.path, self.done, self.failed = Path(path), {}, {}

    def open(self, runtime):
        """Read what an earlier run counted. Failures are removed, so that they are tried again."""
        if runtime.rank == 0:
            counted = [entry for entry in read_lines(self.path) if "counts" in entry]
            write_lines(self.path, counted)
        runtime.barrier()
        self.read()
        runtime.barrier()  # nobody counts before all have read

    def read(self):
        """Read what all processes have written."""
        with reading(self.path, "delete it"):
            for entry in read_lines(self.path):
                if "error" in entry:
                    self.failed[entry["image"]] = entry["error"]
                else:
                    self.done.setdefault(entry["image"], entry)

    def count(self, image, confusion, seconds):
        """Add an image's confusion matrix (K, K)."""
        cells = confusion.view(-1).nonzero()[:, 0]
        counts = confusion.view(-1)[cells].tolist()
        append_lines(self.path, {"image": image, "seconds": seconds, "cells": cells.tolist(),
                                 "counts": counts})

    def leave_out(self, image, error):
        """Add an image that could not be read."""
        append_lines(self.path, {"image": image, "error": error})

    def confusion(self, classes, images=None):
        """Return the confusion matrix of some images, or of all, with K classes: (K, K) int64."""
        total = torch.zeros(classes * classes, dtype=torch.int64)
        with reading(self.path, "delete it"):
            for image in self.done if images is None else images:
                entry = self.done[image]
                total[entry["cells"]] += torch.tensor(entry["counts"], dtype=torch.int64)
        return total.view(classes, classes)


def text_hash(value):
    """Return the sha256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def files_state(dataset):
    """Return path, size and date of each file of a data set, and the true segments."""
    files = [dataset.root / image for image in dataset.images] + (dataset.masks or [])
    panoptic = list((dataset.panoptic or {}).values())
    files += [path for path, _ in panoptic]
    stats = [path.stat() if path.exists() else None for path in files]
    return [(str(path), stat and (stat.st_size, stat.st_mtime_ns))
            for path, stat in zip(files, stats)] + [str(panoptic)]
