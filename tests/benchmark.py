"""Measurements that take too long for the test suite. Each compares two sides, in turn, in the same
run, and prints medians of their ratios.

    python tests/benchmark.py --rounds 1 --images 4          # all but distill
    python tests/benchmark.py stitching single-pass          # some of them
    python tests/benchmark.py --device cuda --images 16 --backbone ViT-B-16-SigLIP2-512
        # on a GPU, in fp16
    python tests/benchmark.py distill
        # ViT-B/16 with the last two blocks trained; 6 minutes on a CPU core
    python tests/benchmark.py distill --images 16 --size 1024x1024      # what a GPU should be given

stitching: 1024 x 2048 pixels, window 512, stride 24, against upsampling and adding window by window
(a row of windows, scaled up); similarities up to the last strip of pixels that evaluation needs.
extraction: extract_teacher.py as a whole against batches of ten copied windows in fp32, and against
the machine's matrix products.
single-pass: encode_dense on 672 x 896 pixels against the library's own blocks on the same tokens.
student: the same single pass against the windows of stride 24 (eight of them, scaled up), with a
ViT-B/16 of native size 512.
frozen-windows: a student whose first ten blocks see windows, against the plain one.
evaluation: 150 classes at 512 x 683, from the file to the labels, against its encoder alone.
knn: the exact search of evaluate_probes.py, 768 features, k = 30, against its matrix products.
memory: resident memory while 200 images are extracted and evaluated with tiny.
help: seconds until --help.
distill: images/s of a plain loop (decode, all blocks, one image after the other) and of distill.py
in its first and in a later epoch, on the same images; the ratio that the operations allow; and
memory over an epoch.

Weights are random, which costs the same operations. The measurements are added to a JSON file under
tests/results/, with machine and versions.
"""
import argparse
import contextlib
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import common
import distill
import evaluate_ovs
import extract_teacher
from common import (FrozenWindows, NativeViT, Runtime, Stitcher, cut_windows, dense_features,
                    label_strips, load_backbone, prepare, start_runtime, synchronised_time,
                    window_starts)
from data.files import apply_augmentation, read_image, read_index, write_json
from data.benchmarks import Classes
from extras.probes import nearest
from time_inference import (count_flops, machine_and_versions, matrix_product_rate, peak_memory,
                            reset_peak_memory)

ROOT = Path(__file__).resolve().parent.parent
TRAINED = 2  # blocks


def run(stage, *flags):
    stage.main(stage.parse_args([str(flag) for flag in flags]))


def make_images(folder, count, size):
    """Write JPEG images of (H, W), as hard to decode as photographs are. Return their paths."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for k in range(count):
        coarse = rng.integers(0, 256, (size[0] // 24, size[1] // 24, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize(size[::-1], Image.BICUBIC)
        noisy = np.asarray(smooth, np.int16) + rng.integers(-12, 13, (*size, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{k}.jpg", quality=90)
    return sorted(folder.iterdir())


def in_turns(rounds, device, **sides):
    """Run each side (a function) once a round, one after the other. Return {name: seconds of each
    round}; a first round warms up."""
    seconds = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            started = synchronised_time(device)
            side()
            if turn:
                seconds[name].append(synchronised_time(device) - started)
    return seconds


def median_ratio(over, under):
    return statistics.median(a / b for a, b in zip(over, under))


# ---- the plain implementations ---------------------------------------------------------------

def library_blocks(visual, tokens):
    """Run open_clip's own blocks, with MaskCLIP's value path in the last one:
    (B, 1 + n, C) -> (B, n, D)."""
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        tokens = block(tokens)
    tokens, width = tokens[:, 1:], tokens.shape[-1]
    values = F.linear(last.ln_1(tokens), last.attn.in_proj_weight[2 * width:],
                      last.attn.in_proj_bias[2 * width:])
    tokens = tokens + last.attn.out_proj(values)
    tokens = tokens + last.mlp(last.ln_2(tokens))
    return visual.ln_post(tokens) @ visual.proj


class WindowLoop:
    """Joins windows as a straightforward reader of the paper does: each map is upsampled and added
    to an accumulator of cells."""

    def __init__(self, size, window, stride, cell, channels, device):
        self.window, self.cell = window, cell
        self.starts = [(top, left) for top in window_starts(size[0], window[0], stride)
                       for left in window_starts(size[1], window[1], stride)]
        self.total = torch.zeros(channels, size[0] // cell, size[1] // cell, device=device)
        self.counts = torch.zeros(1, size[0] // cell, size[1] // cell, device=device)

    def add(self, maps, first):
        """Add maps (n, C, i, j) of the windows from number `first` on."""
        for features, (top, left) in zip(maps, self.starts[first:]):
            upsampled = F.interpolate(features[None], size=[side // self.cell
                                                            for side in self.window],
                                      mode="bilinear", align_corners=False)[0]
            cells = (slice(None),
                     slice(top // self.cell, (top + self.window[0]) // self.cell),
                     slice(left // self.cell, (left + self.window[1]) // self.cell))
            self.total[cells] += upsampled
            self.counts[cells] += 1

    def result(self, size):
        return F.interpolate((self.total / self.counts)[None], size=size, mode="bilinear",
                             align_corners=False)[0].permute(1, 2, 0)


@torch.no_grad()
def window_loop_teacher(backbone, images, stride):
    """Return the features of images (3, H, W) by WindowLoop, in fp32, from ten copied windows at a
    time."""
    outputs, grid = [], [side // backbone.patch for side in backbone.window]
    for image in images:
        loop = WindowLoop(image.shape[-2:], backbone.window, stride,
                          math.gcd(stride, backbone.patch), backbone.dim, image.device)
        windows = torch.stack([window.clone()
                               for window in cut_windows(image, backbone.window, stride)])
        for first in range(0, len(windows), 10):
            batch = windows[first:first + 10]
            if isinstance(backbone, NativeViT) and backbone.pooling == "class token":
                maps = library_blocks(backbone.visual, backbone.embed(batch)).unflatten(1, grid)
            else:
                maps = backbone.encode_dense(batch)
            loop.add(maps.permute(0, 3, 1, 2).float(), first)
        outputs.append(loop.result(backbone.grid(image)))
    return outputs


# ---- speed -----------------------------------------------------------------------------------

def stitched_map(layout, maps, count, device):
    """Stitch `count` windows, whose maps are `maps` again and again: (H / patch, W / patch, C)."""
    stitcher = Stitcher.of_features(*layout, device)
    for _ in range(0, count, len(maps)):
        stitcher.add(maps)
    return stitcher.result()


def stitched_pixels(layout, maps, count, device):
    """Stitch the same at pixel resolution, in the strips that label_map would take. Return (H, W)
    of one channel, of which a copy is kept."""
    size, stitcher = layout[0], evaluate_ovs.PixelStitcher(*layout, device)
    for _ in range(0, count, len(maps)):
        stitcher.add(maps)
    return label_strips(lambda strip: strip[0].clone(), stitcher.strips(size), size,
                        torch.arange(maps.shape[-1], device=device))


def measure_stitching(args, work, runtime):
    size, window, stride, patch = layout = (1024, 2048), (512, 512), 24, 16
    counts = [len(window_starts(length, side, stride)) for length, side in zip(size, window)]
    print(f"\nstitching 1024 x 2048, window 512, stride 24 ({math.prod(counts)} windows)")
    return {name: measure_stitcher(name, join, layout, counts, channels, cell, args.rounds,
                                   runtime.device)
            for name, join, channels, cell in (
                ("768 features", stitched_map, 768, math.gcd(stride, patch)),
                ("150 similarities", stitched_pixels, 150, 1))}


def measure_stitcher(name, join, layout, counts, channels, cell, rounds, device):
    """Compare `join`, one of the two above, with WindowLoop on cells of so many pixels. counts:
    windows (down, across)."""
    size, window, stride, patch = layout
    down, across = counts
    # a fifth of a row of windows, again and again
    maps = torch.rand(across // 5, *(side // patch for side in window), channels, device=device)
    swapped = maps.permute(0, 3, 1, 2).contiguous()
    loop = WindowLoop(size, window, stride, cell, channels, device)

    def ours():
        return join(layout, maps, down * across, device)

    def one_row():
        for first in range(0, across, len(maps)):
            loop.add(swapped, first)

    seconds = in_turns(rounds, device, ours=ours, one_row=one_row)
    accumulator, loop.total, loop.counts = loop.total.nbytes, None, None
    output, extra = memory_of(ours, device)
    result = {"seconds": statistics.median(seconds["ours"]),
              "loop_seconds": down * statistics.median(seconds["one_row"]),
              "ratio": down * median_ratio(seconds["one_row"], seconds["ours"]),
              "output_mb": output / 1e6, "extra_mb": extra / 1e6,
              "accumulator_mb": accumulator / 1e6}
    print("{:18} {seconds:7.2f} s, window by window {loop_seconds:7.1f} s: {ratio:.0f} times; "
          "output {output_mb:.0f} MB, beyond it {extra_mb:.0f} MB (there, an accumulator of "
          "{accumulator_mb:.0f} MB)".format(name, **result))
    return result


def memory_of(function, device):
    """Return the bytes of the tensor that a function returns, and those beyond it at its peak."""
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # or freed memory would be used again, unseen
    reset_peak_memory(device)
    before, out = peak_memory(device), function()
    return out.nbytes, peak_memory(device) - before - out.nbytes


def extract_timed(images, out, args, precision):
    """Run extract_teacher.py in this process. Return the seconds from the first decoding to the
    last written file, and those of the forward passes in them."""
    forward, started = [], []
    load, encode = extract_teacher.AugmentedImages.load, common.Backbone.encode_dense

    def loading(self, job):
        started.append(time.perf_counter())
        return load(self, job)

    def encoding(self, views):
        before = synchronised_time(views.device)
        features = encode(self, views)
        forward.append(synchronised_time(views.device) - before)
        return features

    with (mock.patch.object(extract_teacher.AugmentedImages, "load", loading),
          mock.patch.object(common.Backbone, "encode_dense", encoding)):
        run(extract_teacher, "--images", images, "--out", out, "--backbone", args.backbone,
            "--random-init", "--augment", "none", "--stride", 24, "--precision", precision,
            "--device", args.device, *args.compile)
    return time.perf_counter() - min(started), sum(forward)


def measure_extraction(args, work, runtime):
    """Measure images of twice the native size, with 121 windows each at 224."""
    torch.manual_seed(0)  # extract_teacher.py's own, so that both sides have the same weights
    backbone = load_backbone(args.backbone, True, runtime.device)
    side, folder = 2 * backbone.window[0], work / "extraction"
    paths = make_images(folder, args.images, (side, side))
    images = [prepare(backbone, read_image(path)) for path in paths]
    windows = len(images) * len(cut_windows(images[0], backbone.window, 24))
    flop = windows * count_flops(backbone, backbone.window)
    print(f"\nextraction, {args.backbone}, stride 24, {len(images)} images of {side} x {side}: "
          f"{windows} windows, {flop / 1e12:.3g} TFLOP")
    times, loop = {"fp32": [], "fp16" if runtime.device.type == "cuda" else "bf16": []}, []
    for turn in range(args.rounds):
        for precision, measured in times.items():
            side = Runtime(runtime.device, precision)
            before = matrix_product_rate(side)
            seconds = extract_timed(folder, work / f"{precision}-{turn}", args, precision)
            measured.append((*seconds, before, matrix_product_rate(side)))
        started = synchronised_time(runtime.device)
        expected = window_loop_teacher(backbone, images, 24)[0].cpu()
        loop.append(synchronised_time(runtime.device) - started)

    result = {"windows": windows, "tflop": flop / 1e12, "loop_seconds": statistics.median(loop)}
    for precision, measured in times.items():
        seconds, forward, *rates = zip(*measured)
        rate = statistics.median(sum(rates, ()))
        stored = np.load(work / f"{precision}-0" / "features" / f"{paths[0].name}.npy")
        difference = (torch.from_numpy(stored).float() - expected).norm() / expected.norm()
        result[precision] = {
            "seconds": statistics.median(seconds), "matrix_tflops": rate / 1e12,
            "share_of_matrix_rate": flop / statistics.median(seconds) / rate,
            "forward_share": median_ratio(forward, seconds),
            "times_the_loop": median_ratio(loop, seconds), "difference": difference.item()}
        print("{}: {seconds:7.1f} s, {share_of_matrix_rate:.1%} of the measured peak of "
              "{matrix_tflops:.3f} TFLOP/s, {forward_share:.1%} of it in forward passes; "
              "{times_the_loop:.2f} times as fast as the window loop in fp32; "
              "features differ by {difference:.2%}".format(precision, **result[precision]))
    return result


def measure_single_pass(args, work, runtime):
    backbone, size = load_backbone("ViT-B-16", True, runtime.device), (672, 896)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    with torch.no_grad(), runtime.autocast():
        tokens = backbone.embed(prepare(backbone, image)[None])
        seconds = in_turns(2 * args.rounds, runtime.device,
                           ours=lambda: dense_features(backbone, image),
                           bare=lambda: library_blocks(backbone.visual, tokens))
    result = {"seconds": statistics.median(seconds["ours"]),
              "bare_seconds": statistics.median(seconds["bare"]),
              "ratio": median_ratio(seconds["ours"], seconds["bare"])}
    print("\nsingle pass, ViT-B-16, 672 x 896: {seconds:.3f} s from pixels to features, "
          "the library's blocks alone {bare_seconds:.3f} s: {ratio:.3f} times".format(**result))
    return result


def measure_student(args, work, runtime):
    backbone, size = load_backbone("siglip2", True, runtime.device), (672, 896)
    image = torch.randn(3, *size, device=runtime.device)
    views = cut_windows(image, backbone.window, 24)
    batch = 60 if runtime.device.type == "cuda" else 8
    some = torch.stack(views[:batch])
    with torch.no_grad(), runtime.autocast():
        seconds = in_turns(args.rounds, runtime.device,
                           student=lambda: backbone.encode_dense(image[None]),
                           windows=lambda: backbone.encode_dense(some))
    result = {"windows": len(views), "student_seconds": statistics.median(seconds["student"]),
              "teacher_seconds": len(views) / batch * statistics.median(seconds["windows"]),
              "ratio": len(views) / batch * median_ratio(seconds["windows"], seconds["student"]),
              "by_operations": (len(views) * count_flops(backbone, backbone.window)
                                / count_flops(backbone, size))}
    print("\nViT-B/16-512, 672 x 896: student {student_seconds:.2f} s, "
          "teacher of stride 24 ({windows} windows) {teacher_seconds:.1f} s: {ratio:.1f} times, "
          "{by_operations:.1f} by operations".format(**result))
    return result


def measure_windows(args, work, runtime):
    """Compare students whose first ten blocks see windows with the plain student."""
    backbone, result = load_backbone("siglip2", True, runtime.device), {}
    for size in ((672, 896), (1024, 2048)):
        image, rows = torch.randn(1, 3, *size, device=runtime.device), {}

        def encode(stride):
            backbone.windows = FrozenWindows(10, backbone.window, stride) if stride else None
            return backbone.encode_dense(image)
        with torch.no_grad(), runtime.autocast():
            seconds = in_turns(args.rounds, runtime.device, **{
                str(stride): lambda stride=stride: encode(stride) for stride in (0, 512, 256)})
            for stride in (0, 512, 256):
                reset_peak_memory(runtime.device)
                encode(stride)
                row = {"seconds": statistics.median(seconds[str(stride)]),
                       "ratio": median_ratio(seconds[str(stride)], seconds["0"]),
                       "peak_gb": peak_memory(runtime.device) / 1e9,
                       "tflop": count_flops(backbone, size) / 1e12}
                rows[stride] = row
                row["by_operations"] = row["tflop"] / rows[0]["tflop"]
                print("ViT-B/16-512, {}x{}, frozen stride {}: {seconds:.2f} s, {ratio:.2f} of the "
                      "plain student, {by_operations:.2f} by operations, peak {peak_gb:.2f} GB"
                      .format(*size, stride, **row))
        result["x".join(map(str, size))] = rows
    return result


def measure_evaluation(args, work, runtime):
    backbone, size = load_backbone("ViT-B-16", True, runtime.device), (512, 683)
    (path,) = make_images(work / "evaluation", 1, size)
    classes = Classes([[str(k)] for k in range(150)])
    texts = F.normalize(torch.randn(150, backbone.dim, device=runtime.device), dim=-1)
    truth, image = torch.randint(0, 150, size), prepare(backbone, read_image(path))[None]
    method = evaluate_ovs.Method(backbone, "", autocast=runtime.autocast)

    def whole():
        labels = method.predict(read_image(path), size, classes, texts)
        evaluate_ovs.confusion_matrix(truth.to(labels.device), labels, 150)

    @torch.no_grad()
    def encoder():
        with runtime.autocast():
            backbone.encode_dense(image)

    seconds = in_turns(2 * args.rounds, runtime.device, whole=whole, encoder=encoder)
    result = {"seconds": statistics.median(seconds["whole"]),
              "encoder_seconds": statistics.median(seconds["encoder"]),
              "rest": median_ratio(seconds["whole"], seconds["encoder"]) - 1}
    print("\nevaluation, ViT-B-16, 150 classes, 512 x 683: {seconds:.3f} s, of which the encoder "
          "{encoder_seconds:.3f} s; all the rest is {rest:.1%} of it".format(**result))
    return result


def measure_knn(args, work, runtime, queries=2048, chunk=2 ** 16, dim=768, k=30):
    """Compare the kNN probe's exact search on a chunk of its bank with the matrix product in it."""
    rows = F.normalize(torch.randn(chunk, dim, device=runtime.device), dim=-1)
    half = F.normalize(torch.randn(queries, dim, device=runtime.device), dim=-1).half()
    single = half.float()
    product, search = in_turns(
        args.rounds, runtime.device,
        product=lambda: [single[first:first + 1024] @ rows.T for first in range(0, queries, 1024)],
        search=lambda: nearest(half, [rows], k)).values()
    share = median_ratio(product, search)
    rate = 2 * queries * chunk * dim / statistics.median(search) / 1e12
    print(f"\nkNN, {queries} queries, {chunk} rows of {dim}, k = {k}: "
          f"{statistics.median(search):.2f} s, {share:.0%} of the matrix products' rate "
          f"({rate:.3f} TFLOP/s)")
    return {"seconds": statistics.median(search), "share_of_products": share}


def measure_help(args, work, runtime):
    stages = "extract_teacher", "distill", "evaluate_ovs", "evaluate_probes", "time_inference"
    seconds = {}
    for stage in stages:
        started = time.perf_counter()
        subprocess.run([sys.executable, ROOT / f"{stage}.py", "--help"], stdout=subprocess.DEVNULL,
                       check=True)
        seconds[stage] = time.perf_counter() - started
    print("\n--help: " + ", ".join(f"{stage} {value:.2f} s" for stage, value in seconds.items()))
    return seconds


def measure_memory(args, work, runtime):
    images, result = work / "memory", {}
    make_images(images, 200, (256, 384))
    for stage, owner, hook, flags in (  # hook: what is called once for each image
            (extract_teacher, extract_teacher, "append_lines", ["--out", work / "memory-maps"]),
            (evaluate_ovs, evaluate_ovs.Evaluation, "count",
             ["--inference", "single-pass", "--save-maps", work / "memory-labels",
              "--state", work / "memory-state", "--classes", "sky, grass, water"])):
        clock = Clock(runtime.device)
        with noting(clock, owner, hook):
            run(stage, "--images", images, "--backbone", "tiny", "--device", args.device, *flags)
        result[stage.__name__] = {f"{share} %": clock.resident(len(clock.notes), 0, share)
                                  for share in (10, 50, 100)}
        print(f"\nresident memory, {stage.__name__}, {len(clock.notes)} images: " + ", ".join(
            f"at {share} {value:.0f} MB" for share, value in result[stage.__name__].items()))
    return result


# ---- distillation ----------------------------------------------------------------------------

class Clock:
    """Wall and processor seconds, and resident bytes, noted at each step of a loop."""

    def __init__(self, device):
        self.device, self.notes = device, []

    def note(self, wait=True):
        """wait: until a GPU has finished its work."""
        now = synchronised_time(self.device) if wait else time.perf_counter()
        pages = (int(Path("/proc/self/statm").read_text().split()[1])
                 if os.path.exists("/proc/self/statm") else 0)
        self.notes.append((now, time.process_time(), pages * os.sysconf("SC_PAGE_SIZE")))

    def epoch(self, count, index):
        """Return the (wall, processor) seconds per image of an epoch: from its first step's end in
        epoch 0, from the end of the epoch before in others."""
        first, last = self.notes[max(0, index * count - 1)], self.notes[(index + 1) * count - 1]
        return [(after - before) / (count - (index == 0))
                for before, after in zip(first[:2], last[:2])]

    def resident(self, count, index, share):
        """Return the megabytes when so many percent of an epoch are done."""
        return self.notes[index * count + count * share // 100 - 1][2] / 1e6


@contextlib.contextmanager
def noting(clock, owner, name, wait=lambda: True):
    """Note the time at the end of each call of owner.name."""
    original = getattr(owner, name)

    def noted(*arguments):
        result = original(*arguments)
        clock.note(wait())
        return result

    with mock.patch.object(owner, name, noted):
        yield


def plain_loop(teacher, entries, args, runtime):
    """Train as a first version would. Return the (wall, processor) seconds per image."""
    student = load_backbone(args.backbone, True, runtime.device)
    parameters = [parameter for block in student.blocks[-TRAINED:]
                  for parameter in block.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, weight_decay=1e-4, fused=True)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
    clock = Clock(runtime.device)
    for entry in entries:
        image = apply_augmentation(read_image(teacher.parent / "images" / entry["image"]), entry)
        target = torch.from_numpy(np.load(teacher / entry["file"])).to(runtime.device)
        with runtime.autocast():
            features = student.encode_dense(student.normalise(image)[None])[0]
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(features.float(), target.float())).backward()
        scaler.step(optimizer)
        scaler.update()
        clock.note()
    return clock.epoch(len(entries), 0)


def our_loop(clock, count, *flags):
    """Run distill.py without what it saves (a full-size run saves once in 500 steps), and note each
    of the `count` steps per epoch. A GPU is waited for only after the first step and the last one
    of an epoch, as distill.py runs ahead of it in between."""
    def wait():
        return len(clock.notes) % count in (0, count - 1)

    with contextlib.ExitStack() as patches:
        for name in ("save_state", "plot_log"):
            patches.enter_context(mock.patch.object(distill, name))
        patches.enter_context(noting(clock, torch.amp.GradScaler, "update", wait))
        run(distill, "--train-blocks", TRAINED, "--lr", 2e-5, "--workers", 1, *flags)


def split_flops(name, size):
    """Return the FLOP of one image's forward pass up to the trained blocks, and from there on.

    They are counted without data, as in count_flops, and with gradients, or torch's fused kernels
    would hide products.
    """
    with torch.device("meta"):
        backbone = load_backbone(name, random_init=True, device="meta").requires_grad_(True)
        image = torch.empty(1, 3, *size)
    first, grid = len(backbone.blocks) - TRAINED, backbone.grid(image)
    with FlopCounterMode(display=False) as counter:
        tokens = backbone.run_blocks(backbone.embed(image), grid, stop=first)
        frozen = counter.get_total_flops()
        backbone.project(backbone.run_blocks(tokens, grid, start=first), grid)
    return frozen, counter.get_total_flops() - frozen


def time_distill(args, work, runtime):
    """Return the (wall, processor) seconds per image of each kind of loop in each round:
    {name: [pairs]}."""
    flags = ["--device", args.device, "--precision", args.precision]
    teacher = work / "teacher"
    make_images(work / "images", args.images, args.size)
    run(extract_teacher, "--images", work / "images", "--out", teacher, "--backbone",
        args.backbone, "--random-init", "--augment", "none", "--stride", 0, *flags)
    entries = read_index(teacher)
    plain, early, later = [], [], []
    for turn in range(args.rounds):
        plain.append(plain_loop(teacher, entries, args, runtime))
        clock = Clock(runtime.device)
        our_loop(clock, args.images, "--teacher", teacher, "--out", work / f"spar-{turn}",
                 "--epochs", 3, "--batch-size", 1, "--cache-frozen", work / f"tokens-{turn}",
                 *flags)
        early.append(clock.epoch(args.images, 0))
        later.append(clock.epoch(args.images, 2))
    return {"plain loop": plain, "distill.py, epoch 1": early, "distill.py, later": later}


def measure_distill(args, work, runtime):
    times = time_distill(args, work, runtime)
    frozen, trained = split_flops(args.backbone, args.size)
    allowed = (frozen + 3 * trained) / (3 * trained)  # a backward pass costs two forward passes
    print(f"\n{args.backbone}, {args.images} images of {args.size[0]} x {args.size[1]}, "
          f"{args.rounds} rounds; the operations allow {allowed:.2f} "
          "(16/6 = 2.67 if ViT-B's last block were like the others)\n"
          f"{'':24}{'images/s':>10}{'ratio':>8}{'of processor time':>20}")
    rates, ratios = {}, {}
    for name, pairs in times.items():
        rates[name] = 1 / statistics.median(wall for wall, _ in pairs)
        ratios[name] = [statistics.median(a[k] / b[k] for a, b in zip(times["plain loop"], pairs))
                        for k in (0, 1)]
        print(f"{name:24}{rates[name]:10.3f}{ratios[name][0]:8.2f}{ratios[name][1]:20.2f}")
    return {"ratio": ratios, "allowed": allowed, "images_per_second": rates,
            "memory_mb": distill_memory(args, work)}


def distill_memory(args, work):
    """Return the resident memory of distill.py on the demo's maps, which have many sizes."""
    run(extract_teacher, "--out", work / "demo", "--stride", 0, "--device", args.device)
    clock, count = Clock(torch.device("cpu")), len(read_index(work / "demo"))
    our_loop(clock, count, "--teacher", work / "demo", "--out", work / "demo-spar", "--epochs", 2,
             "--device", args.device)
    marks = {f"epoch {epoch + 1} at {share} %": clock.resident(count, epoch, share)
             for epoch in (0, 1) for share in (10, 50, 100)}
    print("\nresident memory: "
          + ", ".join(f"{name} {value:.0f} MB" for name, value in marks.items()))
    return marks


MEASURES = {"stitching": measure_stitching, "extraction": measure_extraction,
            "single-pass": measure_single_pass, "student": measure_student,
            "frozen-windows": measure_windows,
            "evaluation": measure_evaluation, "knn": measure_knn, "memory": measure_memory,
            "help": measure_help, "distill": measure_distill}


def parse_size(text):
    """Return "448x640" as (448, 640)."""
    height, width = text.split("x")
    return int(height), int(width)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", choices=[[], *MEASURES], metavar="WHAT",
        help=f"{', '.join(MEASURES)} (default: all but distill)")
    add("--backbone", default="ViT-B-16",
        help="of extraction and distill: tiny, or an architecture of open_clip (%(default)s)")
    add("--images", type=int, default=6, help="images of extraction and distill (%(default)s)")
    add("--size", type=parse_size, default="448x640", metavar="HxW",
        help="of distill's images (%(default)s)")
    add("--rounds", type=int, default=3,
        help="turns of the sides (%(default)s); medians are printed")
    add("--compile", action="store_const", const=["--compile"], default=[],
        help="extraction with --compile")
    add("--device", default="auto")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="of all but extraction, which measures two")
    add("--json", type=Path, help="file to add to (tests/results/cpu.json, or that of the GPU)")
    args = parser.parse_args()
    if "distill" in args.what and args.images < 2:
        parser.error("distill needs at least two --images; the first of a loop warms up")
    runtime = start_runtime(args.device, args.precision)
    on_gpu = runtime.device.type == "cuda"
    path = args.json or ROOT / "tests" / "results" / (
        f"{torch.cuda.get_device_name().replace(' ', '-') if on_gpu else 'cpu'}.json")
    results = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    for name in args.what or [name for name in MEASURES if name != "distill"]:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = (MEASURES[name](args, Path(folder), runtime)
                             | machine_and_versions(runtime))
        write_json(path, results)
    print(f"\nresults in {path}")


if __name__ == "__main__":
    main()
