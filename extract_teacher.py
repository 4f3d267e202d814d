"""Stage 1: features of a sliding-window teacher, stitched and stored once per image (paper, section 3.4).

In: a folder of pictures, no labels. Out, in --out: features/<path>.npy (float16, (H/patch, W/patch, D)), index.jsonl (how each
image was augmented), teacher.json (the settings), failures.jsonl (pictures that could not be used).

    python extract_teacher.py                                             # the demo, CPU
    python extract_teacher.py --images photos                             # SigLIP2, one GPU, or a CPU with patience
    torchrun --nproc-per-node 4 extract_teacher.py --images photos        # four GPUs share the pictures
    python extract_teacher.py --images photos --shard 2/3                 # the second of three machines that share a disk

The same command continues after an interruption.
"""
import argparse


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", help="folder of jpg, jpeg, png, webp pictures, searched recursively (default: the demo's training pictures)")
    add("--out", default="runs/teacher", help="folder to write (%(default)s); about 2 bytes x D for every 16 x 16 pixels")
    add("--backbone", help="tiny, siglip2, openclip, dinov3txt, siglip2-naflex, or what open_clip takes: hf-hub:ORG/NAME, local-dir:PATH, ARCH/TAG "
        "(default: tiny on the demo, siglip2 with --images)")
    add("--random-init", action="store_true", help="the architecture without weights, for timing and tests")
    add("--stride", type=int, default=24, help="pixels between windows (%(default)s); finer costs quadratically more; 0 is a single-pass teacher")
    add("--window", type=int, help="side of the window in pixels (default: the size that the backbone was trained on)")
    add("--augment", choices=["paper", "large", "none"], default="paper",
        help="how pictures are resized, cropped and flipped before (%(default)s); the flags below override it one by one; tiny uses lengths scaled to its window")
    add("--long-side", type=int, metavar="N", help="longest side after resizing at ratio 1, pixels")
    add("--short-side", type=int, metavar="N", help="longest short side after resizing at ratio 1, pixels")
    add("--ratio", type=float, nargs=2, metavar=("LO", "HI"), help="range of the random factor on both")
    add("--min-side", type=int, metavar="N", help="pictures with a shorter short side are enlarged to it; crops are at least as long")
    add("--crop-prob", type=float, metavar="P", help="probability of a crop")
    add("--flip-prob", type=float, metavar="P", help="probability of a horizontal flip")
    add("--hub-dir", metavar="DIR", help="dinov3txt: a clone of github.com/facebookresearch/dinov3, instead of torch.hub's download")
    add("--dinov3-weights", nargs=2, metavar=("BACKBONE", "TEXT"), help="dinov3txt: the two .pth files that Meta gives after its licence is accepted")
    add("--list-backbones", action="store_true", help="print every architecture of open_clip, and how its dense features are made or why it has none (25 s)")
    add("--versions", type=int, metavar="N", help="differently augmented versions of every picture, for small sets (default: 1; the demo 6)")
    add("--batch-size", type=int, default=60, help="windows per forward pass (%(default)s); less if memory runs out")
    add("--compile", action="store_true", help="compile the backbone by torch.compile with its weights folded in: some faster after half a minute or more; needs a C++ compiler on a CPU")
    add("--workers", type=int, default=2, help="threads that read pictures ahead (%(default)s)")
    add("--limit", type=int, metavar="N", help="use the first N pictures only")
    add("--shard", default="1/1", metavar="I/N", help="make the Ith of N shares (%(default)s): one command on each of N machines that write to one --out")
    add("--strict", action="store_true", help="stop at the first picture that cannot be used, instead of noting it")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s: a GPU if there is one)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of the matrix products (%(default)s: fp16 on a GPU, fp32 on a CPU)")
    add("--seed", type=int, default=0, help="of the augmentation (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":  # before torch is imported, so that --help and a wrong flag answer at once
    ARGS = parse_args()

import concurrent.futures
import dataclasses
import os
import shutil
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from tqdm import tqdm

from common import (DEMO, DEMO_AUGMENTATION, PRESETS, RunFailed, WrongCall, append_json_line, apply_augmentation, atomic_path,
                    chosen_window, command_line, free_bytes, list_images, load_backbone, open_features, plan_augmentation,
                    planned_size, prefetch, read_image, read_index, read_json_lines, require_room, require_same_settings, start_runtime,
                    stitched_features, weights_hash, write_json_lines)

IMAGES_PER_GROUP = 8  # whose windows share batches; fixed, so that a resumed run computes in the same batches


def chosen_augmentation(args):
    """The preset with the flags that override it, or None for --augment none."""
    overrides = {name: getattr(args, name) for name in ("long_side", "short_side", "ratio", "min_side", "crop_prob", "flip_prob")}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if args.augment == "none":
        if overrides:
            raise WrongCall(f"--augment none leaves nothing for --{', --'.join(overrides).replace('_', '-')} to change")
        return None
    augmentation = dataclasses.replace((DEMO_AUGMENTATION if args.backbone == "tiny" else PRESETS)[args.augment], **overrides)
    low, high = augmentation.ratio
    if not 0 < low <= high or min(augmentation.long_side, augmentation.short_side, augmentation.min_side) < 1:
        raise WrongCall("--ratio needs 0 < LO <= HI, and --long-side, --short-side and --min-side at least one pixel")
    return augmentation


def parse_shard(text):
    """--shard I/N as (I - 1, N)."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise WrongCall(f"--shard {text}: give I/N with I from 1 to N, such as 1/4, 2/4, 3/4 and 4/4 on four machines")
    return int(index) - 1, int(count)


def estimate_bytes(jobs, root, augmentation, patch, seed, dim, looked_at=500):
    """Disk needs of some jobs' features, from the sizes of (at most looked_at, evenly spread) pictures: float16, D to a cell."""
    sizes = []
    for image, version in jobs[::max(1, len(jobs) // looked_at)]:
        try:
            with Image.open(root / image) as picture:
                size = planned_size(plan_augmentation(picture.size[::-1], augmentation, patch, f"{seed}/{version}/{image}"))
        except Exception:  # not a picture; it will be noted when its turn comes
            continue
        sizes.append(size[0] // patch * (size[1] // patch) * dim * 2 + 128)  # 128: the header of an .npy file
    return int(np.mean(sizes or [0]) * len(jobs))


def feature_path(image, version):
    return f"features/{image}.npy" if version == 0 else f"features/{image}.{version}.npy"


def is_done(out, entry, dim):
    """Whether an index entry's features are there, whole and of the right shape."""
    try:
        return open_features(out / entry["file"]).shape == (*entry["grid"], dim)
    except (RunFailed, KeyError):
        return False


def load_group(jobs, root, augmentation, patch, seed):
    """Decode and augment some pictures: a list of (image, version, plan, pixels or None, error or None)."""
    loaded = []
    for image, version in jobs:
        try:
            pixels = read_image(root / image)
            if min(pixels.shape[-2:]) < patch:
                raise RunFailed(f"{root / image}: {pixels.shape[-2]} x {pixels.shape[-1]} pixels are less than one patch of {patch}")
            plan = plan_augmentation(pixels.shape[-2:], augmentation, patch, f"{seed}/{version}/{image}")
            loaded.append((image, version, plan, apply_augmentation(pixels, plan), None))
        except RunFailed as error:
            loaded.append((image, version, None, None, str(error)))
    return loaded


def save_features(out, index, entry, features):
    """One .npy file, and then its line in this writer's index: whoever finds the line finds a whole file."""
    with atomic_path(out / entry["file"]) as temporary, open(temporary, "wb") as file:
        np.save(file, features.to(torch.float16).cpu().numpy())
    append_json_line(index, entry)


def list_backbones():
    """The table of --list-backbones, from the architectures themselves, built without memory for weights."""
    known = 0
    for name in open_clip.list_models():
        try:
            with torch.device("meta"):
                backbone = load_backbone(name, random_init=True, device="meta")
            known += 1
            native = f"{backbone.window[0]} x {backbone.window[1]}" if backbone.window else "any size"
            print(f"{name:36} patch {backbone.patch}, {native}, {len(backbone.blocks)} blocks, {backbone.dim} dimensions, "
                  f"pooled by {backbone.pooling}; {len(open_clip.list_pretrained_tags_by_model(name))} published weights")
        except (WrongCall, RunFailed) as error:
            print(f"{name:36} no: {str(error).partition(': ')[2]}")
    print(f"{known} of {len(open_clip.list_models())} architectures work; besides them, siglip2-naflex and dinov3txt")


def main(args):
    if args.list_backbones:
        return list_backbones()
    on_demo = args.images is None
    root, out = Path(args.images or DEMO / "train").resolve(), Path(args.out)
    args.backbone = args.backbone or ("tiny" if on_demo else "siglip2")
    versions = args.versions or (6 if on_demo else 1)
    augmentation = chosen_augmentation(args)
    shard, shards = parse_shard(args.shard)
    images = list_images(root)[:args.limit]
    root = root.parent if root.is_file() else root

    runtime = start_runtime(args.device, args.precision, args.seed)
    backbone = load_backbone(args.backbone, args.random_init, runtime.device, hub_dir=args.hub_dir, dinov3_weights=args.dinov3_weights)
    window = chosen_window(backbone, args.window, args.stride)
    if args.compile:
        if runtime.device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
            raise WrongCall("--compile: torch.compile needs a C++ compiler on a CPU, and neither g++ nor clang++ is there; install one, or leave the flag out")
        backbone.encode_dense = torch.compile(backbone.encode_dense, options={"freezing": True})
    settings = {
        "backbone": args.backbone, "random_init": args.random_init, "hub_dir": args.hub_dir, "dinov3_weights": args.dinov3_weights,
        "weights": weights_hash(backbone), "stride": args.stride, "window": window and list(window),
        "augment": dataclasses.asdict(augmentation) | {"ratio": list(augmentation.ratio)} if augmentation else "none", "versions": versions,
        "seed": args.seed, "precision": runtime.precision, "compile": args.compile, "images": str(root), "patch": backbone.patch, "dim": backbone.dim,
        "torch": torch.__version__, "open_clip": open_clip.__version__,
    }
    me, writers = shard * runtime.world + runtime.rank, shards * runtime.world
    suffix = "" if writers == 1 else f"-{me + 1}of{writers}"  # every writer appends to files of its own
    failures = out / f"failures{suffix}.jsonl"
    if runtime.rank == 0:
        require_same_settings(out / "teacher.json", settings, free=("torch", "open_clip"), writer=f"{me}-")
        for old in out.glob("failures*.jsonl") if shards == 1 else ():
            old.unlink()
    runtime.barrier()
    failures.unlink(missing_ok=True)

    index = {(entry["image"], entry["version"]): entry for entry in read_index(out)}
    jobs = [(image, version) for image in images for version in range(versions)]
    groups = [jobs[first:first + IMAGES_PER_GROUP] for first in range(0, len(jobs), IMAGES_PER_GROUP)]
    groups = groups[me::writers]  # by place alone, so that no two writers ever have the same one, whenever they start
    missing = {job for group in groups for job in group if job not in index or not is_done(out, index[job], backbone.dim)}
    mine = [group for group in groups if missing.intersection(group)]
    if runtime.rank == 0:
        print(f"{len(images)} pictures in {root}, {sum(job in index for job in jobs)} of {len(jobs)} feature maps are there; "
              f"{f'window {window[0]} x {window[1]}, stride {args.stride}' if args.stride else 'single pass'}, weights {'RANDOM' if args.random_init else args.backbone}")
        need = estimate_bytes([job for job in jobs if job not in index], root, augmentation, backbone.patch, args.seed, backbone.dim)
        print(f"the missing maps need about {need / 1e9:.2f} GB, and the disk has {free_bytes(out) / 1e9:.0f} GB free")
        require_room(out, need, "the missing feature maps")

    started, cells = time.time(), 0
    bar = tqdm(total=sum(len(missing.intersection(group)) for group in mine), desc="teacher", unit="map", disable=runtime.rank > 0)
    with bar as progress, concurrent.futures.ThreadPoolExecutor(1) as writer:
        writing = []
        for group in prefetch(lambda group: load_group(group, root, augmentation, backbone.patch, args.seed), mine, args.workers):
            usable = [(image, version, plan, pixels) for image, version, plan, pixels, error in group if error is None]
            for image, version, _, _, error in group:
                if error is not None and (image, version) in missing:
                    if args.strict:
                        raise RunFailed(f"{error} (--strict)")
                    append_json_line(failures, {"image": image, "version": version, "error": error})
                    progress.update()
            maps = stitched_features(backbone, [backbone.normalise(pixels) for *_, pixels in usable], window, args.stride, args.batch_size, runtime.autocast)
            for (image, version, plan, _), features in zip(usable, maps):
                if (image, version) in missing:
                    assert features.shape == (*(side // backbone.patch for side in planned_size(plan)), backbone.dim)
                    entry = {"image": image, "version": version, "file": feature_path(image, version), **plan, "grid": list(features.shape[:2])}
                    writing.append(writer.submit(save_features, out, out / f"index{suffix}.jsonl", entry, features))
                    cells += features.shape[0] * features.shape[1]
            while writing and (len(writing) > 2 * IMAGES_PER_GROUP or writing[0].done()):
                writing.pop(0).result()  # a failed write ends the run here
                progress.update()
        for future in writing:
            future.result()
            progress.update()
    cells = runtime.add_up(torch.tensor(float(cells), device=runtime.device)).item()
    if runtime.rank == 0:
        finish(out, jobs, shards, me, time.time() - started, cells * backbone.dim * 2)


def finish(out, jobs, shards, me, seconds, size):
    """Merge what the writers noted, in order, and say what came out. With shards, the last to finish merges all of it."""
    index = read_index(out)
    done = {(entry["image"], entry["version"]) for entry in index}
    failures = {(entry["image"], entry["version"]): entry for path in sorted(out.glob("failures*.jsonl")) for entry in read_json_lines(path)}
    failures = [failures[job] for job in sorted(failures) if job not in done]
    write_json_lines(out / "index.jsonl", index, f"{me}-")
    if failures:
        write_json_lines(out / "failures.jsonl", failures, f"{me}-")
    for part in [*out.glob("index-*.jsonl"), *out.glob("failures-*.jsonl")] if shards == 1 else ():
        part.unlink()  # with shards another machine may still be writing, or merging
    count = sum(job in done for job in jobs)
    print(f"{count} of {len(jobs)} feature maps in {out} ({size / 1e9:.2f} GB new, {seconds:.0f} s)")
    if failures:
        print(f"{len(failures)} could not be made; {out / 'failures.jsonl'} says why, for example: {failures[0]['error']}")
    if count + len(failures) < len(jobs):
        print("the rest belongs to other shards" if shards > 1 else "the rest is missing; the same command makes it")
    if not count and shards == 1:
        raise RunFailed(f"none of the pictures could be used; {out / 'failures.jsonl'} says why")


if __name__ == "__main__":
    command_line(main, ARGS)
