"""Stage 1: features of a sliding-window teacher, stitched and stored once per image (paper, section
3.4).

In: a folder of pictures, no labels. Out, in --out: features/<path>.npy (float16, (H/patch, W/patch,
D)), index.jsonl (how each image was augmented), teacher.json (the settings), failures.jsonl
(pictures that could not be used).

    python extract_teacher.py                                       # the demo, CPU
    python extract_teacher.py --images photos                       # SigLIP2, one GPU, or patience
    torchrun --nproc-per-node 4 extract_teacher.py --images photos  # four GPUs share the pictures
    python extract_teacher.py --images photos --shard 2/3           # one of 3 machines on one disk

The same command continues after an interruption.
"""
import argparse
import os
import signal

DEMO_VERSIONS = 3  # of each of its 150 pictures


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add("--images", help="folder of jpg, jpeg, png, webp pictures up to 16:1, searched recursively "
        "(default: the demo's training pictures)")
    add("--out", default="runs/teacher",
        help="folder to write (%(default)s); about 2 bytes x D for every 16 x 16 pixels")
    add("--backbone", help="tiny, siglip2, openclip, dinov3txt, siglip2-naflex, tipsv2 (-b, -so, "
        "-g), or what open_clip takes: hf-hub:ORG/NAME, local-dir:PATH, ARCH/TAG (default: tiny on "
        "the demo, siglip2 with --images)")
    add("--random-init", action="store_true",
        help="the architecture without weights, for timing and tests")
    add("--hub-dir", metavar="DIR", help="dinov3txt: a clone of github.com/facebookresearch/dinov3 "
        "in the place of torch.hub's download")
    add("--dinov3-weights", nargs=2, metavar=("BACKBONE", "TEXT"),
        help="dinov3txt: the two .pth files that Meta gives after its licence is accepted")
    add("--list-backbones", action="store_true", help="print every architecture of open_clip, and "
        "how its dense features are made or why it has none (25 s)")
    add("--limit", type=int, metavar="N", help="use the first N pictures only")
    add = parser.add_argument_group("the teacher").add_argument
    add("--stride", type=int, help="pixels between windows (default: 1.5 patches, 24 for patches "
        "of 16); finer costs quadratically more; 0 is a single-pass teacher")
    add("--window", type=int, help="side of the window in pixels (default: the size that the "
        "backbone was trained on)")
    add("--augment", choices=["paper", "large", "none"], default="paper", help="how pictures are "
        "resized, cropped and flipped before (%(default)s); the flags below override it one by "
        "one; tiny uses lengths scaled to its window")
    add("--long-side", type=int, metavar="N", help="longest side after resizing at ratio 1, pixels")
    add("--short-side", type=int, metavar="N",
        help="longest short side after resizing at ratio 1, pixels")
    add("--ratio", type=float, nargs=2, metavar=("LO", "HI"),
        help="range of the random factor on both")
    add("--min-side", type=int, metavar="N", help="pictures with a shorter short side are enlarged "
        "to it; crops are at least as long")
    add("--crop-prob", type=float, metavar="P", help="probability of a crop")
    add("--flip-prob", type=float, metavar="P", help="probability of a horizontal flip")
    add("--versions", type=int, metavar="N", help="differently augmented versions of each picture, "
        f"for small sets (default: 1; the demo {DEMO_VERSIONS})")
    add("--seed", type=int, default=0, help="of the augmentation (%(default)s)")
    add = parser.add_argument_group("how it is computed").add_argument
    add("--batch-size", type=int, default=60, help="most windows per forward pass (%(default)s; a "
        "CPU takes as many as its caches hold); less if memory runs out")
    add("--compile", action="store_true", help="compile the backbone by torch.compile with its "
        "weights folded in: some faster after half a minute or more; needs a C++ compiler on a CPU")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="threads that read pictures ahead (default: one a core, at most 8)")
    add("--shard", default="1/1", metavar="I/N", help="make the Ith of N shares (%(default)s): one "
        "command on each of N machines that write to one --out")
    add("--strict", action="store_true",
        help="stop at the first picture that cannot be used, instead of noting it")
    add("--device", default="auto",
        help="auto, cpu, cuda, cuda:1 ... (%(default)s: a GPU if there is one)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="of the matrix products (%(default)s: fp16 on a GPU, fp32 on a CPU)")
    return parser.parse_args(argv)


if __name__ == "__main__":  # before torch's import, so that --help and a wrong flag answer at once
    ARGS = parse_args()
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell's background job has it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until command_line: no import's traceback

import dataclasses
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from tqdm import tqdm

from common import (DEMO, FAILURE, RunFailed, WriteBehind, WrongCall, append_json_lines,
                    apply_augmentation, atomic_path, chosen_window, command_line, default_stride,
                    file_stat, file_state, free_bytes, is_unchanged, list_images, load_backbone,
                    nearest_multiple, open_features, planned_size, prefetch, read_image, read_index,
                    read_json_lines, require_room, require_same_settings, speaks_flags,
                    start_runtime, stitched_features, weights_hash, windows_a_pass, write_json,
                    write_json_lines)

# ---- augmentation: once per image, as a teacher map belongs to one version of it -----------------


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Resize into a box of (long_side r, short_side r), r uniform in ratio; enlarge to min_side; or
    crop; flip (method.md, "Distillation")."""
    long_side: int
    short_side: int
    ratio: tuple
    min_side: int
    crop_prob: float
    flip_prob: float


# the paper's lengths, which belong to a window of 512; "large" is its extended range (supplement 6)
PUBLISHED = {"paper": Augmentation(2048, 1024, (0.5, 1.0), 512, 0.5, 0.5),
             "large": Augmentation(2560, 2560, (0.2, 1.0), 512, 0.5, 0.5), "none": None}
# by backbone; tiny's window is 128, and its pictures are no larger than 450
PRESETS = {"tiny": {"paper": Augmentation(448, 448, (0.5, 1.0), 128, 0.5, 0.5),
                    "large": Augmentation(640, 640, (0.2, 1.0), 128, 0.5, 0.5), "none": None}}


def choose_augmentation(backbone, preset, overrides):
    """The preset of a backbone with the fields that `overrides` gives; None for "none"."""
    overrides = {name: value for name, value in overrides.items() if value is not None}
    augmentation = PRESETS.get(backbone, PUBLISHED)[preset]
    if augmentation is None:
        if overrides:
            flags = ", --".join(overrides).replace("_", "-")
            raise WrongCall(f"--augment none leaves nothing for --{flags} to change")
        return None
    augmentation = dataclasses.replace(augmentation, **overrides)
    low, high = augmentation.ratio
    if low > high:
        raise WrongCall("--ratio needs LO <= HI")
    return augmentation


def plan_augmentation(size, augmentation, patch, seed):
    """Draw one version of an image, for apply_augmentation.

    size: (H, W) of the image. augmentation: None only makes the sides multiples of the patch.
    seed: of any text. Returns {"resize": [H, W], "crop": [top, left, H, W] or None, "flip": bool},
    with the final sides multiples of patch.
    """
    if augmentation is None:
        return {"resize": [nearest_multiple(side, patch) for side in size], "crop": None,
                "flip": False}
    rng = np.random.default_rng(zlib.crc32(seed.encode(errors="surrogateescape")))
    ratio = rng.uniform(*augmentation.ratio)
    scale = min(augmentation.long_side * ratio / max(size),
                augmentation.short_side * ratio / min(size))
    enlarged = scale * min(size) < augmentation.min_side
    if enlarged:
        scale = augmentation.min_side / min(size)
    resized, crop = [int(side * scale + 0.5) for side in size], None
    if rng.uniform() < augmentation.crop_prob and not enlarged:
        kept = [max(augmentation.min_side, rng.uniform(0.4 * side, side)) for side in resized]
        kept = [max(patch, int(side) // patch * patch) for side in kept]
        crop = [int(rng.integers(0, side - part + 1)) for side, part in zip(resized, kept)] + kept
    else:
        resized = [max(patch, side // patch * patch) for side in resized]
    flip = bool(rng.uniform() < augmentation.flip_prob)
    return {"resize": resized, "crop": crop, "flip": flip}


# ---- the pictures and what is made of them -------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Pictures:
    """Augmented versions of the pictures below a folder; a job is an (image, version)."""
    root: Path
    augmentation: Augmentation | None
    patch: int
    seed: int

    def plan(self, job, size):
        image, version = job
        return plan_augmentation(size, self.augmentation, self.patch,
                                 f"{self.seed}/{version}/{image}")

    def load(self, job):
        """(plan, pixels (3, H, W) uint8, None), or (None, None, what is wrong with the picture)."""
        path = self.root / job[0]
        try:
            if len(os.fsencode(Path(feature_path(job)).name)) > 255:
                raise RunFailed(f"{path}: its name is too long for a file of features beside it")
            pixels = read_image(path)
            height, width = pixels.shape[-2:]
            if min(height, width) < self.patch:
                raise RunFailed(f"{path}: {height} x {width} pixels are less than one patch of "
                                f"{self.patch}")
            if max(height, width) > 16 * min(height, width):
                raise RunFailed(f"{path}: {height} x {width} pixels are beyond 16 to 1")
            plan = self.plan(job, (height, width))
            return plan | file_state(path), apply_augmentation(pixels, plan), None
        except RunFailed as error:
            return None, None, str(error)

    def estimate_bytes(self, jobs, dim, looked_at=500):
        """What the features of some jobs need on a disk, from the sizes of (at most looked_at,
        evenly spread) pictures: float16, D to a cell."""
        sizes = []
        for job in jobs[::max(1, len(jobs) // looked_at)]:
            try:
                with Image.open(self.root / job[0]) as picture:
                    height, width = planned_size(self.plan(job, picture.size[::-1]))
            except Exception:  # not a picture; it will be noted when its turn comes
                continue
            cells = height // self.patch * (width // self.patch)
            sizes.append(cells * dim * 2 + 128)  # 128: the header of an .npy file
        return int(np.mean(sizes or [0]) * len(jobs))


def feature_path(job):
    image, version = job
    return f"features/{image}.npy" if version == 0 else f"features/{image}.{version}.npy"


class FeatureFolder:
    """Where one of several writers puts feature maps, and notes them in files of its own."""

    def __init__(self, out, root, writer, writers, dim, strict=False):
        self.out, self.root, self.dim, self.strict = out, root, dim, strict
        self.writer = writer
        self.bytes = 0  # of new features
        suffix = "" if writers == 1 else f"-{writer + 1}of{writers}"
        self.index_path, self.failures_path = (out / f"{name}{suffix}.jsonl"
                                               for name in ("index", "failures"))
        self.write_behind = WriteBehind(self.write, pending=16)

    def missing(self, jobs):
        """Those whose features are not there, whole, of the right shape and of today's picture.
        Notes the new date of a picture that proved to be the same, so that it is not read again."""
        index = {(entry["image"], entry["version"]): entry for entry in read_index(self.out)}
        done = {job: index[job] for job in jobs if job in index and self.is_done(index[job])}
        dated = [entry | {"stat": now} for (image, _), entry in done.items() if "stat" in entry
                 and (now := file_stat(self.root / image)) != entry["stat"]]
        if dated:
            append_json_lines(self.index_path, *dated)
        return [job for job in jobs if job not in done]

    def is_done(self, entry):
        try:
            whole = open_features(self.out / entry["file"]).shape == (*entry["grid"], self.dim)
        except RunFailed:
            return False
        return whole and is_unchanged(self.root / entry["image"], entry)

    def save(self, job, plan, features):
        """Features (h, w, D) of a job, and how it was augmented; written by a thread."""
        entry = {"image": job[0], "version": job[1], "file": feature_path(job), **plan,
                 "grid": list(features.shape[:2])}
        self.bytes += 2 * features.numel()
        self.write_behind(entry, features)

    def write(self, entry, features):
        """One .npy file, and then its line: whoever finds the line finds a whole file."""
        with atomic_path(self.out / entry["file"]) as temporary, open(temporary, "wb") as file:
            np.save(file, features.to(torch.float16).cpu().numpy())
        append_json_lines(self.index_path, entry)

    def fail(self, job, error):
        """Note why a picture cannot be used, or end the run."""
        if self.strict:
            raise RunFailed(f"{error} (--strict)")
        append_json_lines(self.failures_path, {"image": job[0], "version": job[1], "error": error})

    def tidy(self):
        """Take away what earlier runs left: failures, which are tried again, temporary files, and
        lines of separate writers, which are merged."""
        known = {self.out / entry["file"] for entry in read_index(self.out)}
        if any(self.out.glob("index-*.jsonl")):
            self.merge(alone=True)
        remains = [*self.out.glob(".tmp-*"), *(self.out / "features").rglob(".tmp-*.npy")]
        for path in [*self.out.glob("failures*.jsonl"), *remains]:
            if path.is_file() and path not in known:
                path.unlink(missing_ok=True)

    def merge(self, alone):
        """What all writers noted so far, in order, as one index and one list of failures: (done
        jobs, failures). alone: no other machine is still writing, or merging."""
        failures = {(entry["image"], entry["version"]): entry
                    for path in sorted(self.out.glob("failures*.jsonl"))
                    for entry in read_json_lines(path, FAILURE)}
        # a picture that was deleted or spoilt since cannot be trained on
        index = [entry for entry in read_index(self.out) if (self.root / entry["image"]).is_file()
                 and ((entry["image"], entry["version"]) not in failures or self.is_done(entry))]
        done = {(entry["image"], entry["version"]) for entry in index}
        failures = [failures[job] for job in sorted(failures) if job not in done]
        write_json_lines(self.out / "index.jsonl", index, f"{self.writer}-")
        if failures:
            write_json_lines(self.out / "failures.jsonl", failures, f"{self.writer}-")
        else:
            (self.out / "failures.jsonl").unlink(missing_ok=True)
        for part in [*self.out.glob("index-*.jsonl"), *self.out.glob("failures-*.jsonl")]:
            if alone:
                part.unlink()
        return done, failures


# ---- the loop ------------------------------------------------------------------------------------

def extract(pictures, jobs, encode, folder, progress, workers=2):
    """For each job: its picture's pixels, their stitched features, a file of them."""
    for job, (plan, pixels, error) in zip(jobs, prefetch(pictures.load, jobs, workers)):
        if error is None:
            folder.save(job, plan, encode(pixels))  # (3, H, W) -> (H / patch, W / patch, D)
        else:
            folder.fail(job, error)
        progress.update()
    folder.write_behind.wait()


# ---- main ----------------------------------------------------------------------------------------

def parse_shard(text):
    """--shard I/N as (I - 1, N)."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise WrongCall(f"--shard {text}: give I/N with I from 1 to N, such as 1/4, 2/4, 3/4 and "
                        "4/4 on four machines")
    return int(index) - 1, int(count)


def list_backbones():
    """The table of --list-backbones, from the architectures themselves, built without memory for
    weights."""
    known, names = 0, open_clip.list_models()
    for name in names:
        try:
            with torch.device("meta"):
                backbone = load_backbone(name, random_init=True, device="meta")
        except (WrongCall, RunFailed) as error:
            print(f"{name:36} no: {str(error).partition(': ')[2]}")
            continue
        known += 1
        window = backbone.window
        print(f"{name:36} patch {backbone.patch}, "
              f"{f'{window[0]} x {window[1]}' if window else 'any size'}, "
              f"{len(backbone.blocks)} blocks, {backbone.dim} dimensions, "
              f"pooled by {backbone.pooling}; "
              f"{len(open_clip.list_pretrained_tags_by_model(name))} published weights")
    print(f"{known} of {len(names)} architectures work; besides them, siglip2-naflex, dinov3txt "
          "and tipsv2")


def compile_backbone(backbone, device):
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if device.type == "cpu" and not any(shutil.which(name) for name in compilers):
        raise WrongCall("--compile: torch.compile needs a C++ compiler on a CPU, and neither g++ "
                        "nor clang++ is there; install one, or leave the flag out")
    backbone.encode_dense = torch.compile(backbone.encode_dense, options={"freezing": True})


def announce(folder, pictures, images, jobs, dim):
    """Say what is there and what is to come. Raises RunFailed for a disk that is too small."""
    there = {(entry["image"], entry["version"]) for entry in read_index(folder)}
    print(f"{len(images)} pictures in {pictures.root}, {len(there.intersection(jobs))} of "
          f"{len(jobs)} feature maps are there")
    need = pictures.estimate_bytes([job for job in jobs if job not in there], dim)
    print(f"the missing maps need about {need / 1e9:.2f} GB, and the disk has "
          f"{free_bytes(folder) / 1e9:.0f} GB free")
    require_room(folder, need, "the missing feature maps")


def describe_teacher(backbone, window, stride, batch_size):
    weights = "RANDOM" if backbone.source["random_init"] else backbone.source["name"]
    if not stride:
        return f"single pass, weights {weights}"
    at_once = windows_a_pass(backbone, window, batch_size)
    reason = " (a CPU's caches hold no more)" if at_once < batch_size else ""
    return (f"window {window[0]} x {window[1]}, stride {stride}, at most {at_once} windows a "
            f"forward pass{reason}, weights {weights}")


def finish(folder, jobs, shards, seconds, size):
    """Merge what the writers noted, and say what came out. The last of shards merges all."""
    done, failures = folder.merge(alone=shards == 1)
    count = len(done.intersection(jobs))
    reasons = folder.out / "failures.jsonl"
    print(f"{count} of {len(jobs)} feature maps in {folder.out} ({size / 1e9:.2f} GB new, "
          f"{seconds:.0f} s)")
    if failures:
        print(f"{len(failures)} could not be made; {reasons} says why, for example: "
              f"{failures[0]['error']}")
    if count + len(failures) < len(jobs):
        print("the rest belongs to other shards" if shards > 1 else
              "the rest is missing; the same command makes it")
    if not count and shards == 1:
        raise RunFailed(f"none of the pictures could be used; {reasons} says why")


@speaks_flags
def main(args):
    if args.list_backbones:
        return list_backbones()
    on_demo, out = args.images is None, Path(args.out)
    name = args.backbone or ("tiny" if on_demo else "siglip2")
    versions = args.versions or (DEMO_VERSIONS if on_demo else 1)
    fields = [field.name for field in dataclasses.fields(Augmentation)]
    augmentation = choose_augmentation(name, args.augment,
                                       {field: getattr(args, field) for field in fields})
    shard, shards = parse_shard(args.shard)
    root = Path(args.images or DEMO / "train").resolve()
    images = list_images(root)[:args.limit]
    root = root.parent if root.is_file() else root

    runtime = start_runtime(args.device, args.precision, args.seed)
    backbone = load_backbone(name, args.random_init, runtime.device, hub_dir=args.hub_dir,
                             dinov3_weights=args.dinov3_weights)
    stride = default_stride(backbone.patch) if args.stride is None else args.stride
    window = chosen_window(backbone, args.window, stride)
    if args.compile:
        compile_backbone(backbone, runtime.device)
    pictures = Pictures(root, augmentation, backbone.patch, args.seed)
    settings = {
        "backbone": name, "random_init": args.random_init, "hub_dir": args.hub_dir,
        "dinov3_weights": args.dinov3_weights, "weights": weights_hash(backbone),
        "stride": stride, "window": window and list(window),
        "augment": dataclasses.asdict(augmentation) | {"ratio": list(augmentation.ratio)}
        if augmentation else "none", "versions": versions, "seed": args.seed,
        "precision": runtime.precision, "compile": args.compile, "images": str(root),
        "patch": backbone.patch, "dim": backbone.dim, "torch": torch.__version__,
        "open_clip": open_clip.__version__}

    me, writers = shard * runtime.world + runtime.rank, shards * runtime.world
    folder = FeatureFolder(out, root, me, writers, backbone.dim, args.strict)
    jobs = [(image, version) for image in images for version in range(versions)]
    if runtime.rank == 0:
        require_same_settings(out / "teacher.json", settings, free=("torch", "open_clip"))
        write_json(out / "planned.json", {"maps": len(jobs)}, f"{me}-")
        if shards == 1:
            folder.tidy()
    runtime.barrier()
    folder.failures_path.unlink(missing_ok=True)
    # by place alone, so that no two writers ever have the same job, whenever they start
    mine = folder.missing(jobs[me::writers])
    if runtime.rank == 0:
        print(describe_teacher(backbone, window, stride, args.batch_size))
        announce(out, pictures, images, jobs, backbone.dim)

    def encode(pixels):
        return stitched_features(backbone, backbone.normalise(pixels), window, stride,
                                 args.batch_size, runtime.autocast)

    started = time.time()
    with tqdm(total=len(mine), desc="teacher", unit="map", disable=runtime.rank > 0) as progress:
        extract(pictures, mine, encode, folder, progress, args.workers)
    size = runtime.total(folder.bytes)
    if runtime.rank == 0:
        finish(folder, jobs, shards, time.time() - started, size)


if __name__ == "__main__":
    command_line(main, ARGS)
