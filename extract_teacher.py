"""Stage 1: stitched features of a sliding-window teacher, once per image (paper, section 3.4).

Reads a folder of images without labels. Writes to --out: features/<image>.npy (float16, of shape
(H / patch, W / patch, D)), index.jsonl (how each image was augmented), teacher.json (settings),
failures.jsonl (images that could not be used). The same command continues an interrupted run.

    python extract_teacher.py                                       # the demo, on a CPU
    python extract_teacher.py --images photos                       # SigLIP2, on one GPU
    torchrun --nproc-per-node 4 extract_teacher.py --images photos  # four GPUs share the images
    python extract_teacher.py --images photos --shard 2/3           # one of 3 machines, one disk
"""
from data.flags import Parser, add_backbone_flags, add_device_flags, bounded, filled, parse


def parse_args(argv=None):
    parser = Parser(__doc__)
    positive, probability = bounded(int, 1), bounded(float, 0, 1)
    add = parser.add_argument_group("what").add_argument
    add("--images", type=filled, help="folder of jpg, jpeg, png and webp images up to 16:1, "
        "searched recursively (default: the demo's training images)")
    add("--out", type=filled, default="runs/teacher", help="folder to write (%(default)s)")
    add("--limit", type=positive, help="use only the first LIMIT images")
    add_backbone_flags(parser.add_argument_group("backbone"), "tiny on the demo, else siglip2")
    add = parser.add_argument_group("the teacher").add_argument
    add("--stride", type=bounded(int, 0), help="pixels between windows (default: 1.5 "
        "patches, 24 for patches of 16); half of it costs 4 times as much; 0 is a single pass")
    add("--window", type=positive, help="side of the window (default: the backbone's own size)")
    add("--augment", choices=["auto", "paper", "large", "none"], default="auto", help="how images "
        "are resized, cropped and flipped: as in the paper, but images smaller than the paper's "
        "keep their sizes (auto); the next six flags override single values")
    add("--long-side", type=positive, help="limit of the long side at ratio 1, in pixels")
    add("--short-side", type=positive, help="limit of the short side at ratio 1, in pixels")
    add("--ratio", type=bounded(float, 1e-6, 1000), nargs=2, metavar=("LO", "HI"),
        help="range of the random factor that multiplies both")
    add("--min-side", type=positive, help="shortest side; smaller images are enlarged to it")
    add("--crop-prob", type=probability, help="probability of a crop")
    add("--flip-prob", type=probability, help="probability of a horizontal flip")
    add("--versions", type=positive, help="augmented versions per image (1, but 3 on the "
        "demo); 2 train better on few images")
    add = parser.add_argument_group("how it is computed").add_argument
    add("--batch-size", type=positive, default=60, help="most windows per forward pass "
        "(%(default)s; a CPU takes as many as its caches hold); reduce it if memory runs out")
    add("--features", choices=["float16", "int8"], default="float16", help="how feature maps are "
        "stored (%(default)s); int8, with a scale per patch, takes half the disk")
    add("--compile", action="store_true", help="use torch.compile, which needs g++ (or CXX)")
    add("--shard", default="1/1", metavar="I/N", help="share I of N, on N machines and one --out")
    add("--strict", action="store_true", help="stop at the first image that cannot be used")
    add_device_flags(parser, seed="seed of the augmentation")
    args = parse(parser, argv)
    args.backbone = args.backbone or ("siglip2" if args.images else "tiny")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports, so that --help and a wrong flag answer at once

import contextlib
import os
import shutil
import zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
from tqdm import tqdm

from common import (DEMO, DTYPES, LOADING, as_int8, choose_window, convert_weights, default_stride,
                    load_backbone, open_features, prefetch, run_stage, start_runtime,
                    stitched_features, weights_hash)
from data.files import (RunError, UsageError, append_lines, apply_augmentation, file_state,
                        in_words, is_unchanged, keep_settings, list_images, naming,
                        nearest_multiple, planned_size, read_image, read_index, read_json,
                        read_lines, reading, remove_stale_files, require_room, same_threads,
                        save_array, write_lines)
from data.benchmarks import image_size
from data.teacher import FREE

# ---- augmentation: drawn once, since a feature map belongs to one version of an image --------

@dataclass(frozen=True)
class Augmentation:
    """How an image is resized into a box of (long_side, short_side) times a random factor from
    `ratio`, enlarged to min_side, cropped and flipped (paper, supplement 6)."""
    long_side: int
    short_side: int
    ratio: list
    min_side: int
    crop_prob: float = 0.5
    flip_prob: float = 0.5


# the paper's lengths, for a window of 512; "large" is its extended range (supplement 6)
PUBLISHED = {"paper": Augmentation(2048, 1024, [0.5, 1.0], 512),
             "large": Augmentation(2560, 2560, [0.2, 1.0], 512)}
# per backbone; tiny has a window of 128, and the demo's images are no larger than 450
PRESETS = {"tiny": {"paper": Augmentation(448, 448, [0.5, 1.0], 128),
                    "large": Augmentation(640, 640, [0.2, 1.0], 128)}}


def given_values(args):
    """Return the values of an Augmentation that flags give."""
    return {field.name: getattr(args, field.name) for field in fields(Augmentation)
            if getattr(args, field.name) is not None}


def choose_augmentation(args):
    """Return the backbone's preset with the values that flags override, or None for "none"."""
    given = given_values(args)
    if args.augment == "none":
        if given or (args.versions or 1) > 1:
            flag = [*given, "versions"][0].replace("_", "-")
            raise UsageError(f"--augment none would ignore --{flag}; leave one of them out")
        return None
    preset = "paper" if args.augment == "auto" else args.augment
    augmentation = replace(PRESETS.get(args.backbone, PUBLISHED)[preset], **given)
    if augmentation.ratio[0] > augmentation.ratio[1]:
        raise UsageError("--ratio needs LO <= HI")
    return augmentation


def fit_to_images(args, augmentation, sides, window):
    """Return the augmentation and the number of versions for images of these sides (short, long),
    where flags leave that open. A student should be trained at the sizes that it will segment, so
    images smaller than the paper's keep their sizes. An earlier run in the same folder is
    continued as it began."""
    path, before = Path(args.out, "teacher.json"), {}
    if path.is_file():
        before = read_json(path, "delete that folder")
    usual = 1 if args.images or args.augment == "none" else 3
    versions = args.versions or before.get("versions") or usual
    if args.augment != "auto" or not args.images:
        return augmentation, versions
    fitted = before.get("augment")
    if not isinstance(fitted, dict):
        short, long = sides
        fitted = {"long_side": min(long, augmentation.long_side),
                  "short_side": min(short, augmentation.short_side),
                  "min_side": min(short, *(window or [augmentation.min_side]))}
        if long < augmentation.long_side or short < augmentation.short_side:
            fitted["ratio"] = [0.7, 1.0]
    with reading(path, "delete that folder"):
        return replace(augmentation, **fitted | given_values(args)), versions


def typical_sides(root, paths, samples=200):
    """Return the median short and long side of images, and the longest, from some headers."""
    sides = []
    for path in paths[::max(1, len(paths) // samples)]:
        with contextlib.suppress(RunError, OSError):
            sides.append(sorted(image_size(root / path)))
    sides = sides or [[2 ** 20, 2 ** 20]]
    return np.median(sides, axis=0).astype(int).tolist(), np.max(sides, axis=0).tolist()


def plan_augmentation(size, augmentation, patch, seed):
    """Draw one version of an image of `size` (H, W): {"resize": [H, W], "crop": [top, left, H,
    W] or None, "flip": bool}, with final sides that are multiples of the patch.

    augmentation: None only makes the sides multiples of the patch. seed: any text.
    """
    if augmentation is None:
        resized = [nearest_multiple(side, patch) for side in size]
        return {"resize": resized, "crop": None, "flip": False}
    rng = np.random.default_rng(zlib.crc32(seed.encode(errors="surrogateescape")))
    ratio = rng.uniform(*augmentation.ratio)
    scale = min(augmentation.long_side * ratio / max(size),
                augmentation.short_side * ratio / min(size))
    enlarged = scale * min(size) < augmentation.min_side
    if enlarged:
        scale = augmentation.min_side / min(size)
    resized, crop = [max(patch, int(side * scale + 0.5)) for side in size], None
    if rng.uniform() < augmentation.crop_prob and not enlarged:
        kept = [max(augmentation.min_side, rng.uniform(0.4 * side, side)) for side in resized]
        kept = [max(patch, int(side) // patch * patch) for side in kept]
        crop = [int(rng.integers(side - part + 1)) for side, part in zip(resized, kept)] + kept
    else:
        resized = [side // patch * patch for side in resized]
    flip = bool(rng.uniform() < augmentation.flip_prob)
    return {"resize": resized, "crop": crop, "flip": flip}


# ---- images in, feature maps out; a job is an (image, version) -------------------------------

@dataclass(frozen=True)
class AugmentedImages:
    """Augmented versions of the images in a folder."""
    root: Path
    augmentation: Augmentation | None
    patch: int
    seed: int
    device: torch.device  # which resizes the images

    def plan(self, image, version, size):
        seed = f"{self.seed}/{version}/{image}"
        return plan_augmentation(size, self.augmentation, self.patch, seed)

    def load(self, job):
        """Return a job's index entry and its pixels (3, H, W) uint8. For an image that cannot be
        used, return its entry in failures.jsonl and None."""
        image, version = job
        path, entry = self.root / image, {"image": image, "version": version}
        file = f"features/{image}.{version}.npy" if version else f"features/{image}.npy"
        try:
            if len(os.fsencode(Path(file).name)) > 255:
                raise RunError(f"{path}: its name is too long for a file of its features")
            pixels = read_image(path)
            height, width = size = pixels.shape[-2:]
            if min(size) < self.patch or max(size) > 16 * min(size):
                raise RunError(f"{path}: {height} x {width} pixels are less than a patch of "
                               f"{self.patch}, or have an aspect ratio above 16:1")
            entry |= {"file": file, **self.plan(image, version, size), **file_state(path)}
            return entry, apply_augmentation(pixels.to(self.device), entry)
        except RunError as error:
            return entry | {"error": str(error)}, None

    def estimate_bytes(self, jobs, width, samples=500):
        """Estimate the disk space of some jobs' features, of `width` bytes per cell."""
        sizes = []
        for image, version in jobs[::max(1, len(jobs) // samples)]:
            with contextlib.suppress(RunError, OSError):
                size = image_size(self.root / image)
                height, width = planned_size(self.plan(image, version, size))
                cells = height // self.patch * (width // self.patch)
                sizes.append(cells * width + 128)  # after the header of an .npy file
        return int(np.mean(sizes or [0]) * len(jobs))


def job_of(entry):
    return entry["image"], entry["version"]


def missing(jobs, out, root, dim):
    """Return the jobs that have no complete feature map of their image as it is now."""
    remaining = dict.fromkeys(jobs)
    for entry in read_index(out):
        with contextlib.suppress(RunError):  # of an incomplete file
            if (job_of(entry) in remaining
                    and open_features(out / entry["file"]).shape == (*entry["grid"], dim)
                    and is_unchanged(root / entry["image"], entry)):
                del remaining[job_of(entry)]
    return list(remaining)


def extract(loaded, encode, out, suffix, strict, int8):
    """Store the features of what AugmentedImages.load returned, as float16 or int8."""
    for entry, pixels in loaded:
        if pixels is None and strict:
            raise RunError(f"{entry['error']} (--strict)")
        if pixels is None:
            append_lines(out / f"failures{suffix}.jsonl", entry)
            continue
        with naming(entry["image"]):
            features = encode(pixels)  # (3, H, W) uint8 -> (H / patch, W / patch, D)
        if features.abs().max() > torch.finfo(torch.float16).max:
            raise RunError(f"{entry['image']}: its features exceed 65504, the largest float16; "
                           "they cannot be stored")
        stored = as_int8(features) if int8 else features.half()
        crc = save_array(out / entry["file"], stored.cpu().contiguous().numpy())
        # after the file, so that every line of the index stands for a complete file
        append_lines(out / f"index{suffix}.jsonl",
                     entry | {"grid": list(features.shape[:2]), "crc32": crc})


def merge(out, root, alone):
    """Merge the lines of all processes, and return the index and the failures. alone: whether
    no other machine is still writing."""
    failures = {job_of(entry): entry for path in out.glob("failures*.jsonl")
                for entry in read_lines(path)}
    # an image that was deleted or damaged after its extraction cannot be trained on
    index = [entry for entry in read_index(out)
             if job_of(entry) not in failures and (root / entry["image"]).is_file()]
    write_lines(out / "index.jsonl", index)
    failures = sorted(failures.values(), key=job_of)
    if failures:
        write_lines(out / "failures.jsonl", failures)
    if alone:
        remove_stale_files(out)
        for path in [*out.glob("index-*.jsonl"), *out.glob("failures-*.jsonl")]:
            path.unlink()
    return index, failures


# ---- main ------------------------------------------------------------------------------------

def parse_shard(text):
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise UsageError(f"--shard {text}: give I/N with I from 1 to N, such as 2/3")
    return int(index) - 1, int(count)


def load_teacher(args, runtime):
    """Return the backbone, the window (H, W) and the stride."""
    loading = {key: getattr(args, key) for key in LOADING}
    backbone = load_backbone(args.backbone, device=runtime.device, **loading)
    stride = default_stride(backbone.patch) if args.stride is None else args.stride
    window = choose_window(backbone, args.window, stride)
    if args.compile:
        compiler = os.environ.get("CXX", "g++")
        if not shutil.which(compiler):
            raise UsageError(f"--compile needs a C++ compiler, and there is no {compiler}; install "
                             "it, or name another one in the variable CXX")
        backbone.encode_dense = torch.compile(backbone.encode_dense, options={"freezing": True})
    weights = "RANDOM" if args.random_init else args.backbone
    runtime.print(f"window {window}, stride {stride}, weights {weights}")
    return backbone, window, stride


def describe(args, runtime, backbone):
    """Return how the feature maps are computed, for teacher.json."""
    return {
        "backbone": args.backbone, **{key: getattr(args, key) for key in LOADING},
        "weights": weights_hash(backbone.visual), "patch": backbone.patch, "dim": backbone.dim,
        "features": args.features, "seed": args.seed, "compile": args.compile,
        "precision": runtime.precision, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "open_clip": open_clip.__version__,
    }


def report(out, root, jobs, alone):
    index, failures = merge(out, root, alone)
    done = set(jobs).intersection(map(job_of, index))
    print(f"{len(done)} of {len(jobs)} feature maps, for distill.py --teacher {out}")
    if len(index) > len(done):
        print(f"{len(index) - len(done)} more of earlier runs are there; distill.py uses them, too")
    if failures:
        print(f"{len(failures)} failed, see failures.jsonl; the first: {failures[0]['error']}")
    if alone and not done:
        raise RunError("none of the images could be used")


def main(args):
    augmentation, (shard, shards) = choose_augmentation(args), parse_shard(args.shard)
    out, root = Path(args.out), Path(args.images or DEMO / "train").resolve()
    paths = list_images(root)[:args.limit]
    root = root.parent if root.is_file() else root
    runtime = start_runtime(args.device, args.precision, args.seed)
    backbone, window, stride = load_teacher(args, runtime)
    sides, longest = typical_sides(root, paths)
    augmentation, versions = fit_to_images(args, augmentation, sides, window)
    runtime.print(f"images of {sides[1]} x {sides[0]} pixels (median; up to {longest[1]} x "
                  f"{longest[0]}), versions of each: {versions}, augmentation: "
                  f"{in_words(augmentation) if augmentation else 'none'}")
    jobs = [(path, version) for path in paths for version in range(versions)]
    same_threads(out / "teacher.json")
    settings = describe(args, runtime, backbone) | {
        "stride": stride, "window": list(window) if window else None, "versions": versions,
        "augment": asdict(augmentation) if augmentation else "none", "images": str(root),
        "maps": len(jobs)}
    writer, writers = shard * runtime.world + runtime.rank, shards * runtime.world
    suffix = f"-{writer + 1}of{writers}" if writers > 1 else ""  # of this process's lists
    if runtime.rank == 0:
        keep_settings(out / "teacher.json", settings, free=FREE)
        if shards == 1:
            merge(out, root, alone=True)
    runtime.barrier()
    for part in ("", suffix):  # what failed is tried again
        (out / f"failures{part}.jsonl").unlink(missing_ok=True)
    share = jobs[shard::shards]  # by position alone, so that no two processes share a job
    mine = missing(share[runtime.rank::runtime.world], out, root, backbone.dim)
    images = AugmentedImages(root, augmentation, backbone.patch, args.seed, runtime.device)
    convert_weights(backbone.visual, DTYPES[runtime.precision])
    width = backbone.dim + 2 if args.features == "int8" else 2 * backbone.dim
    need = runtime.total(images.estimate_bytes(mine, width))  # of this machine's processes
    there = len(share) - runtime.total(len(mine))
    runtime.print(f"{len(paths)} images in {root}, {there:.0f} of {len(share)} feature maps are "
                  f"there; the others need about {need / 1e9:.2f} GB")
    require_room(out, need, "the missing feature maps")
    encode = lambda pixels: stitched_features(backbone, backbone.normalise(pixels), window,
                                              stride, args.batch_size, runtime.autocast)
    loaded = tqdm(prefetch(images.load, mine, args.workers), total=len(mine), desc="teacher",
                  unit="map", disable=runtime.rank > 0)
    extract(loaded, encode, out, suffix, args.strict, args.features == "int8")
    runtime.barrier()
    if runtime.rank == 0:
        report(out, root, jobs, alone=shards == 1)
    runtime.barrier()  # distill.py may read the merged lists next


if __name__ == "__main__":
    run_stage(main, ARGS)
