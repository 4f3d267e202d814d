"""Measurements that take too long for the test suite.

    python tests/benchmark.py distill                                   # ViT-B/16 with the last two blocks trained; 6 minutes on a CPU core
    python tests/benchmark.py distill --images 16 --size 1024x1024      # what a GPU should be given

distill: images/s of the plain loop (decode, all blocks, one image after the other) and of distill.py in its first and in a later
epoch, in turns, on the same pictures; what the operations allow; memory over an epoch; and what 25,000 pictures of one
megapixel would take on this machine. Weights are random, which costs the same operations. Ends with one line of JSON.
"""
import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import distill
import extract_teacher
from common import apply_augmentation, load_backbone, read_image, read_index, start_runtime, window_starts

TRAINED = 2  # blocks


def run(stage, *flags):
    stage.main(stage.parse_args([str(flag) for flag in flags]))


def make_pictures(folder, count, size):
    """JPEG pictures of (H, W), as hard to decode as photographs are."""
    rng = np.random.default_rng(0)
    for k in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (size[0] // 24, size[1] // 24, 3), np.uint8)).resize(size[::-1], Image.BICUBIC)
        Image.fromarray((np.asarray(coarse, np.int16) + rng.integers(-12, 13, (*size, 1))).clip(0, 255).astype(np.uint8)).save(folder / f"{k}.jpg", quality=90)


class Clock:
    """Wall and processor seconds, and resident bytes, noted at each step of a loop."""

    def __init__(self, device):
        self.device, self.notes = device, []

    def note(self, *_):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        pages = int(Path("/proc/self/statm").read_text().split()[1]) if os.path.exists("/proc/self/statm") else 0
        self.notes.append((time.perf_counter(), time.process_time(), pages * os.sysconf("SC_PAGE_SIZE")))

    def epoch(self, count, index):
        """(wall, processor) seconds an image of an epoch: from its first step's end in epoch 0, from the epoch before in others."""
        first, last = self.notes[max(0, index * count - 1)], self.notes[(index + 1) * count - 1]
        return [(after - before) / (count - (index == 0)) for before, after in zip(first[:2], last[:2])]


def plain_loop(teacher, entries, backbone, device, precision):
    """What a first version does: seconds an image, (wall, processor)."""
    student = load_backbone(backbone, True, device)
    parameters = [p for block in student.blocks[-TRAINED:] for p in block.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, weight_decay=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.precision == "fp16")
    settings, clock = json.loads((teacher / "teacher.json").read_text()), Clock(device)
    for entry in entries:
        image = apply_augmentation(read_image(Path(settings["images"]) / entry["image"]), entry)
        target = torch.from_numpy(np.load(teacher / entry["file"])).to(device)
        with precision.autocast():
            features = student.encode_dense(student.normalise(image)[None])[0]
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(features.float(), target.float())).backward()
        scaler.step(optimizer)
        scaler.update()
        clock.note()
    return clock.epoch(len(entries), 0)


def our_loop(clock, *flags):
    """distill.py as it is, without what it saves (a full-size run saves once in 500 steps), its log noted by a clock."""
    distill.append_json_line, distill.save_state, distill.plot_log, distill.save_open_clip = clock.note, *[lambda *_: None] * 3
    distill.read_json_lines = lambda path: [{"loss": 0, "step": 0, "seconds": 0}]
    run(distill, "--train-blocks", TRAINED, "--lr", 2e-5, "--workers", 1, *flags)


def measure_distill(args, work):
    height, width = size = [int(side) for side in args.size.split("x")]
    flags = ["--device", args.device, "--precision", args.precision]
    (work / "pictures").mkdir()
    make_pictures(work / "pictures", args.images, size)
    teacher = work / "teacher"
    run(extract_teacher, "--images", work / "pictures", "--out", teacher, "--backbone", args.backbone, "--random-init", "--augment", "none", "--stride", 0, *flags)
    entries, runtime = read_index(teacher), start_runtime(args.device, args.precision)
    plain, early, later = [], [], []
    for turn in range(args.rounds):
        plain.append(plain_loop(teacher, entries, args.backbone, runtime.device, runtime))
        clock = Clock(runtime.device)
        our_loop(clock, "--teacher", teacher, "--out", work / f"spar-{turn}", "--epochs", 3, "--cache-frozen", work / f"tokens-{turn}", *flags)
        early.append(clock.epoch(args.images, 0))
        later.append(clock.epoch(args.images, 2))

    backbone = load_backbone(args.backbone, True, runtime.device)

    first, _ = distill.select_trained(backbone, str(TRAINED))  # with gradients, or torch's fused kernels would hide their products
    tokens = distill.frozen_tokens(backbone, torch.zeros(3, *backbone.window, dtype=torch.uint8), first)
    channels, extra = tokens.shape[2], tokens.shape[1] - math.prod(side // backbone.patch for side in backbone.window)

    def operations(size):
        """FLOP of the forward pass of one image: (frozen part, trained part)."""
        grid = [side // backbone.patch for side in size]
        with FlopCounterMode(display=False) as counter:
            backbone.project(backbone.run_blocks(torch.zeros(1, math.prod(grid) + extra, channels, device=runtime.device), grid, start=first), grid)
        return backbone.flops(size) - counter.get_total_flops(), counter.get_total_flops()

    frozen, trained = operations(size)
    allowed = (frozen + 3 * trained) / (3 * trained)  # a backward pass costs two forward passes
    print(f"\n{args.backbone}, {len(backbone.blocks)} blocks, {args.images} pictures of {height} x {width}, {args.rounds} rounds; the operations allow {allowed:.2f} "
          f"(16/6 = 2.67 if the last block were like the others)\n{'':24}{'images/s':>10}{'ratio':>8}{'of processor time':>20}")
    ratios = {}
    for name, times in (("plain loop", plain), ("distill.py, epoch 1", early), ("distill.py, later", later)):
        ratios[name] = [statistics.median(a[k] / b[k] for a, b in zip(plain, times)) for k in (0, 1)]
        print(f"{name:24}{1 / statistics.median(wall for wall, _ in times):10.3f}{ratios[name][0]:8.2f}{ratios[name][1]:20.2f}")

    # 25,000 pictures of 1024 x 1024, ten epochs, by the rates of this run and the operations that it would take
    window = backbone.window
    views = torch.rand(args.windows, 3, *window, device=runtime.device)
    times = []
    with torch.no_grad(), runtime.autocast():
        for _ in range(4):
            began = time.perf_counter()
            backbone.encode_dense(views).sum().item()
            times.append((time.perf_counter() - began) / len(views))
    count = len(window_starts(1024, window[0], 24)) * len(window_starts(1024, window[1], 24))
    frozen_large, trained_large = operations((1024, 1024))
    first = statistics.median(wall for wall, _ in early) * (frozen_large + 3 * trained_large) / (frozen + 3 * trained)
    next_ = statistics.median(wall for wall, _ in later) * trained_large / trained
    cells, images = (1024 // backbone.patch) ** 2, 25000
    hours = {"features": images * count * statistics.median(times[1:]) / 3600, "training": images * (first + 9 * next_) / 3600,
             "training without kept tokens": images * 10 * statistics.median(wall for wall, _ in plain) * (frozen_large + 3 * trained_large) / (frozen + 3 * trained) / 3600}
    gigabytes = {"features": images * cells * backbone.dim * 2 / 1e9, "tokens": images * (cells + extra) * channels * 2 / 1e9}
    print(f"\n25,000 pictures of 1024 x 1024 here: features {hours['features']:,.0f} h ({count} windows of {window[0]} a picture, stitching left out) and "
          f"{gigabytes['features']:.0f} GB; ten epochs {hours['training']:,.0f} h and {gigabytes['tokens']:.0f} GB of kept tokens, or "
          f"{hours['training without kept tokens']:,.0f} h without them")
    return {"ratio": ratios, "allowed": allowed, "images_per_second": {"plain": 1 / statistics.median(wall for wall, _ in plain),
            "epoch 1": 1 / statistics.median(wall for wall, _ in early), "later": 1 / statistics.median(wall for wall, _ in later)}, "hours": hours, "gigabytes": gigabytes}


def measure_memory(args, work):
    """Resident memory of distill.py on the demo's 450 maps of many sizes."""
    run(extract_teacher, "--out", work / "demo", "--stride", 0, "--device", args.device)
    clock = Clock(torch.device("cpu"))
    our_loop(clock, "--teacher", work / "demo", "--out", work / "demo-spar", "--epochs", 2, "--device", args.device)
    count = len(clock.notes) // 2
    marks = {f"epoch {epoch + 1} at {share} %": clock.notes[epoch * count + count * share // 100 - 1][2] / 1e6 for epoch in (0, 1) for share in (10, 50, 100)}
    print("\nresident memory: " + ", ".join(f"{name} {value:.0f} MB" for name, value in marks.items()))
    return marks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=["distill"])
    add("--backbone", default="ViT-B-16", help="an architecture of open_clip (%(default)s)")
    add("--images", type=int, default=6, help="pictures (%(default)s)")
    add("--size", default="448x640", metavar="HxW", help="of the pictures (%(default)s)")
    add("--rounds", type=int, default=3, help="turns of the loops (%(default)s); medians are printed")
    add("--windows", type=int, default=8, help="windows per batch when the teacher's rate is measured (%(default)s; a GPU wants 60)")
    add("--device", default="auto")
    add("--precision", default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure_distill(args, Path(folder)) | {"memory_mb": measure_memory(args, Path(folder))}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
