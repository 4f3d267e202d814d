"""What probes learn from and score: folds of labelled pictures, and the features of a data set's
pictures, which are kept on a disk where it has room.
"""
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import (RunFailed, WrongCall, atomic_path, free_bytes, nearest_multiple, open_features,
                    prefetch, prepare, read_image, require_room, short_name)
from data.benchmarks import (BENCHMARKS, Dataset, demo_pictures, open_benchmark, own_pictures,
                             picture_size, read_classes)

# ---- folds ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fold:
    """Pictures to learn from and pictures to score: each a data set, and the numbers of some of its
    pictures."""
    train: Dataset
    learn: list
    test: Dataset
    score: list


def open_folds(args):
    """What each probe learns from and scores, from the flags: {probe: a list of Fold}. Raises
    WrongCall or RunFailed."""
    name, limit = args.dataset or "demo", args.limit
    if args.images:
        if args.dataset or not (args.masks and args.classes):
            raise WrongCall("--images needs --masks and --classes, and no --dataset")
        if bool(args.train_images) != bool(args.train_masks):
            raise WrongCall("--train-images and --train-masks go together")
        classes = read_classes(args.classes)
        test = own_pictures(args.images, args.masks, classes, limit)
        if args.train_images:
            train = own_pictures(args.train_images, args.train_masks, classes, limit)
            return dict.fromkeys(args.probe, [whole_fold(train, test)])
    elif args.train_images or args.train_masks or args.masks:
        raise WrongCall("--masks, --train-images and --train-masks go with --images")
    elif name in BENCHMARKS:
        files = name, args.data_root, args.classes, limit
        parts = {"knn": "trainaug"} if "trainaug" in BENCHMARKS[name].layouts else {}
        parts = {probe: parts.get(probe, "train") for probe in args.probe}
        test = open_benchmark(*files, panoptic="panoptic" in args.probe)
        train = {part: open_benchmark(*files, part, "panoptic" in args.probe
                                      and args.classifier == "knn") for part in parts.values()}
        return {probe: [whole_fold(train[part], test)] for probe, part in parts.items()}
    elif name == "demo":
        test = demo_pictures(args.classes, limit)
    else:
        raise WrongCall(f"--dataset {name}: unknown; known are demo, {', '.join(BENCHMARKS)}")
    if len(test.images) < 2:
        raise WrongCall("two folds need two pictures; give --train-images, or more --images")
    halves = [[*range(first, len(test.images), 2)] for first in (0, 1)]
    return dict.fromkeys(args.probe, [Fold(test, halves[0], test, halves[1]),
                                      Fold(test, halves[1], test, halves[0])])


def whole_fold(train, test):
    return Fold(train, [*range(len(train.images))], test, [*range(len(test.images))])


def name_absent(folds, present):
    """Say which classes occur among the pictures to score and in none to learn from."""
    for fold in {id(fold): fold for some in folds.values() for fold in some}.values():
        learnt, scored = ({int(label) for k in some for label in
                           dataset.tables[k][present[id(dataset)][k]]}
                          for dataset, some in ((fold.train, fold.learn), (fold.test, fold.score)))
        absent = [title for k, title in enumerate(fold.test.classes.titles)
                  if k in scored - learnt]
        if absent:
            print(f"in no mask to learn from, so never found: {', '.join(absent)}")


# ---- features ------------------------------------------------------------------------------------

class Features:
    """What a method sees of the pictures of a data set: maps (h, w, D), float16.

    folder: where they are kept, for a restarted run and for torchrun's other processes; without
    one they are computed whenever they are asked for. A picture that cannot be read has no patches.
    silent: without progress bars.
    """

    def __init__(self, method, dataset, folder=None, workers=2, silent=False):
        self.method, self.dataset, self.folder, self.workers = method, dataset, folder, workers
        self.silent = silent
        self.patch, self.dim = method.backbone.patch, method.backbone.dim
        self.device = method.backbone.mean.device

    def path(self, index, flip=False):
        path = self.folder / f"{self.dataset.images[index]}{'.flip' * flip}.npy"
        return path.with_name(short_name(path.name, 240))

    def pixels(self, index, flip=False):
        """(3, H, W) uint8, or None for a picture that cannot be read."""
        try:
            image = read_image(self.dataset.root / self.dataset.images[index])
        except RunFailed as error:
            tqdm.write(f"left out: {error}")
            return None
        return image.flip(-1) if flip else image

    def load(self, index, flip=False):
        """The part of a map's making that needs no device: the stored map, or else pixels."""
        if self.folder:
            return torch.from_numpy(np.array(open_features(self.path(index, flip))))
        return self.pixels(index, flip)

    def encode(self, loaded):
        """A stored map or pixels -> (h, w, D) float16 on the device."""
        if loaded is None:
            return torch.zeros(0, 0, self.dim, device=self.device)
        if loaded.dtype == torch.uint8:
            loaded = self.method.features(prepare(self.method.backbone, loaded)).half()
        return loaded.to(self.device)

    def stream(self, indices, said=None):
        """(index, its map) of those that have one, in order, read ahead; under a progress bar that
        says what they are for."""
        maps = prefetch(self.load, indices, self.workers)
        for index, loaded in tqdm(zip(indices, maps), total=len(indices), unit="map", leave=False,
                                  desc=f"{said}, {self.method.name}",
                                  disable=self.silent or said is None):
            features = self.encode(loaded)
            if features.numel():
                yield index, features

    def fill(self, jobs, runtime):
        """Make this process's share of the maps of (index, flip) that are not kept yet."""
        # by place alone: what another process writes meanwhile moves no share
        mine = [job for job in jobs[runtime.rank::runtime.world] if not self.path(*job).is_file()]
        pixels = prefetch(lambda job: self.pixels(*job), mine, self.workers)
        for job, loaded in tqdm(zip(mine, pixels), total=len(mine), unit="map",
                                desc=f"features, {self.method.name}", disable=self.silent):
            with atomic_path(self.path(*job)) as temporary, open(temporary, "wb") as file:
                np.save(file, self.encode(loaded).cpu().numpy().astype(np.float16))

    def bytes(self, jobs):
        """What the maps of (index, flip) need on a disk, from the headers of at most 500."""
        cells = []
        for index, _ in jobs[::max(1, len(jobs) // 500)]:
            with contextlib.suppress(RunFailed):  # it has no patches
                size = picture_size(self.dataset.root / self.dataset.images[index])
                cells.append(math.prod(nearest_multiple(side, self.patch) // self.patch
                                       for side in size))
        return int(np.mean(cells or [0]) * len(jobs)) * self.dim * 2


def keep_features(where, own, need, runtime):
    """The folder for the features of a method's pictures, or None to compute them for each probe
    anew: as --keep-features says, with what they need and have. Raises WrongCall or RunFailed."""
    folder = own if where == "auto" else Path(where)
    free, amount = free_bytes(folder), f"{need / 1e9:.2f} GB of features"
    kept = where != "off" and (where != "auto" or need <= free or runtime.world > 1)
    if not kept and runtime.world > 1:
        raise WrongCall("--keep-features off: torchrun's processes meet in the files of features")
    if kept:
        require_room(folder, need, amount)
    if runtime.rank == 0:
        print(f"{amount} in {folder}, which has {free / 1e9:.0f} GB free" if kept else
              f"{amount} are not kept ({free / 1e9:.0f} GB free); each probe encodes its pictures")
    return folder if kept else None
