"""Measurements that take too long for the test suite, each of two sides in turn in the same run,
with medians of their ratios.

    python tests/benchmark.py --rounds 1 --images 4          # all but distill
    python tests/benchmark.py stitching single-pass          # some of them
    python tests/benchmark.py --device cuda --images 16 --backbone ViT-B-16-SigLIP2-512
        # on a GPU, in fp16
    python tests/benchmark.py distill
        # ViT-B/16 with the last two blocks trained; 6 minutes on a CPU core
    python tests/benchmark.py distill --images 16 --size 1024x1024      # what a GPU should be given

stitching: 1024 x 2048 pixels, window 512, stride 24, against upsampling and adding window by window
(a row of windows, scaled up); similarities up to the last strip of pixels that evaluation asks for.
extraction: extract_teacher.py as a whole against batches of ten copied windows in fp32, and against
the machine's matrix products; and, with tiny on pictures of the demo, the forward passes and the
stitching of one picture at a time against batches of windows that cross from picture to picture.
single-pass: encode_dense on 672 x 896 pixels against the bare blocks of the library on the same
tokens.
student: the same single pass against the windows of stride 24 (eight of them, scaled up), with a
ViT-B/16 of native size 512.
evaluation: 150 classes at 512 x 683, from the file to the labels, against the encoder in it.
knn: the exact search of evaluate_probes.py, 768 features, k = 30, against its matrix products.
memory: resident memory while 200 pictures are extracted and evaluated with tiny. help: seconds
until --help.
distill: images/s of the plain loop (decode, all blocks, one image after the other) and of
distill.py in its first and in a later epoch, in turns, on the same pictures; what the operations
allow; memory over an epoch; and what 25,000 pictures of one megapixel would take on this machine.
Weights are random, which costs the same operations. What is measured goes into a JSON under
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
from common import (DEMO, Stitcher, apply_augmentation, cut_windows, dense_features, label_strips,
                    list_images, load_backbone, prepare, read_image, read_index, start_runtime,
                    stitched_features, window_starts, windows_a_pass, write_json)
from data.benchmarks import Classes
from data.probes import nearest
from data.scores import confusion_matrix
from time_inference import (count_flops, machine_and_versions, matrix_product_rate, peak_memory,
                            reset_peak_memory, synchronised_time)

ROOT = Path(__file__).resolve().parent.parent
TRAINED = 2  # blocks


def run(stage, *flags):
    stage.main(stage.parse_args([str(flag) for flag in flags]))


def make_pictures(folder, count, size):
    """JPEG pictures of (H, W), as hard to decode as photographs are."""
    rng = np.random.default_rng(0)
    for k in range(count):
        coarse = Image.fromarray(
            rng.integers(0, 256, (size[0] // 24, size[1] // 24, 3), np.uint8)
        ).resize(size[::-1], Image.BICUBIC)
        Image.fromarray(
            (np.asarray(coarse, np.int16) + rng.integers(-12, 13, (*size, 1)))
            .clip(0, 255).astype(np.uint8)
        ).save(folder / f"{k}.jpg", quality=90)


def in_turns(rounds, device, **sides):
    """Seconds of each side (a function) in each round, one after the other: {name: [seconds]}; a
    first round warms up."""
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


# ---- the plain implementations -------------------------------------------------------------------

def library_blocks(visual, tokens):
    """open_clip's own blocks, and MaskCLIP's value path in the last one:
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
    """Windows as a straightforward reader of the paper joins them: each map upsampled and added to
    an accumulator of cells."""

    def __init__(self, size, window, stride, cell, channels, device):
        self.window, self.cell = window, cell
        self.starts = [(top, left) for top in window_starts(size[0], window[0], stride)
                       for left in window_starts(size[1], window[1], stride)]
        self.total = torch.zeros(channels, size[0] // cell, size[1] // cell, device=device)
        self.counts = torch.zeros(1, size[0] // cell, size[1] // cell, device=device)

    def add(self, maps, first):
        """Maps (n, C, i, j) of the windows from number `first` on."""
        for map_, (top, left) in zip(maps, self.starts[first:]):
            upsampled = F.interpolate(map_[None], size=[side // self.cell for side in self.window],
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
    """Features of images (3, H, W) as WindowLoop makes them, in fp32, ten copied windows at a
    time."""
    outputs = []
    for image in images:
        loop = WindowLoop(image.shape[-2:], backbone.window, stride,
                          math.gcd(stride, backbone.patch), backbone.dim, image.device)
        windows = torch.stack([window.clone()
                               for window in cut_windows(image, backbone.window, stride)])
        grid = [side // backbone.patch for side in backbone.window]
        for first in range(0, len(windows), 10):
            if isinstance(backbone, common.NativeViT) and backbone.pooling == "class token":
                maps = library_blocks(
                    backbone.visual, backbone.embed(windows[first:first + 10])).unflatten(1, grid)
            else:
                maps = backbone.encode_dense(windows[first:first + 10])
            loop.add(maps.permute(0, 3, 1, 2).float(), first)
        outputs.append(loop.result(backbone.grid(image)))
    return outputs


@torch.no_grad()
def crossing_teacher(backbone, images, stride, autocast, batch_size=60):
    """stitched_features of images (3, H, W), none smaller than the window, in even batches of
    windows that cross from one image to the next."""
    stitchers, owners, views = [], [], []
    for image in images:
        windows = cut_windows(image, backbone.window, stride)
        stitchers.append(Stitcher.of_features(image.shape[-2:], backbone.window, stride,
                                              backbone.patch, image.device))
        owners += [stitchers[-1]] * len(windows)
        views += windows
    passes = math.ceil(len(views) / windows_a_pass(backbone, backbone.window, batch_size))
    size = math.ceil(len(views) / passes)
    with autocast():
        for first in range(0, len(views), size):
            maps = backbone.encode_dense(torch.stack(views[first:first + size]))
            with torch.autocast(maps.device.type, enabled=False):
                for stitcher, features in zip(owners[first:], maps.float()):
                    stitcher.add(features[None])
    return [stitcher.result() for stitcher in stitchers]


# ---- speed ---------------------------------------------------------------------------------------

def stitched_map(layout, maps, count, device):
    """(H / patch, W / patch, C) of `count` windows, whose maps are `maps` again and again."""
    stitcher = Stitcher.of_features(*layout, device)
    for _ in range(0, count, len(maps)):
        stitcher.add(maps)
    return stitcher.result()


def stitched_pixels(layout, maps, count, device):
    """The same at pixel resolution, in the strips that label_map would take; (H, W) of one channel,
    of which a copy is kept."""
    size, stitcher = layout[0], evaluate_ovs.PixelStitcher(*layout, device)
    for _ in range(0, count, len(maps)):
        stitcher.add(maps)
    return label_strips(lambda strip: strip[0].clone(), stitcher.strips(size), size, maps.shape[-1])


def measure_stitching(args, work, runtime):
    size, window, stride, patch = layout = (1024, 2048), (512, 512), 24, 16
    down, across = (len(window_starts(length, side, stride))
                    for length, side in zip(size, window))
    print(f"\nstitching 1024 x 2048, window 512, stride 24 ({down * across} windows)")
    return {name: measure_stitcher(name, join, layout, (down, across), channels, cell, args.rounds,
                                   runtime.device)
            for name, join, channels, cell in (
                ("768 features", stitched_map, 768, math.gcd(stride, patch)),
                ("150 similarities", stitched_pixels, 150, 1))}


def measure_stitcher(name, join, layout, counts, channels, cell, rounds, device):
    """`join`, one of the two above, against WindowLoop on cells of so many pixels; counts: windows
    (down, across)."""
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
    """(bytes of the tensor that a function returns, bytes it takes beyond that at its peak)."""
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        # or what others gave back would be used again, unseen
        ctypes.CDLL(None).malloc_trim(0)
    reset_peak_memory(device)
    before, out = peak_memory(device), function()
    return out.nbytes, peak_memory(device) - before - out.nbytes


def extract_timed(images, out, backbone, precision, args):
    """extract_teacher.py in this process: seconds from the first decoding to the last written file,
    and those of the forward passes in them."""
    forward, started = [], []
    load, encode = extract_teacher.Pictures.load, common.Backbone.encode_dense

    def loading(self, job):
        started.append(time.perf_counter())
        return load(self, job)

    def encoding(self, views):
        before = synchronised_time(views.device)
        features = encode(self, views)
        forward.append(synchronised_time(views.device) - before)
        return features

    with (mock.patch.object(extract_teacher.Pictures, "load", loading),
          mock.patch.object(common.Backbone, "encode_dense", encoding)):
        run(extract_teacher, "--images", images, "--out", out, "--backbone", backbone,
            "--random-init", "--augment", "none", "--stride", 24,
            "--precision", precision, "--device", args.device, *args.compile)
    return time.perf_counter() - min(started), sum(forward)


def time_extraction(args, work, pictures, images, backbone, precisions):
    """Both sides in turn, extract_teacher.py once in each precision: {precision: its measurements,
    a list a kind}, seconds of the window loop, and a map that it makes."""
    device = images[0].device
    times, loop = {name: {"seconds": [], "forward": [], "rates": []} for name in precisions}, []
    for turn in range(args.rounds):
        for name, each in times.items():
            precision = common.Runtime(device, name)
            each["rates"].append(matrix_product_rate(precision))
            seconds, forward = extract_timed(pictures, work / f"{name}-{turn}", args.backbone, name,
                                             args)
            each["rates"].append(matrix_product_rate(precision))
            each["seconds"].append(seconds)
            each["forward"].append(forward)
        started = synchronised_time(device)
        baseline = window_loop_teacher(backbone, images, 24)
        loop.append(synchronised_time(device) - started)
    return times, loop, baseline[0].cpu()


def measure_extraction(args, work, runtime):
    """Twice the native size, so 121 windows a picture at 224."""
    torch.manual_seed(0)  # extract_teacher.py's own, so that both sides have the same weights
    backbone = load_backbone(args.backbone, True, runtime.device)
    side, pictures = 2 * backbone.window[0], work / "extraction"
    pictures.mkdir()
    make_pictures(pictures, args.images, (side, side))
    paths = sorted(pictures.iterdir())
    images = [prepare(backbone, read_image(path)) for path in paths]
    windows = len(images) * len(cut_windows(images[0], backbone.window, 24))
    flop = windows * count_flops(backbone, backbone.window)
    print(f"\nextraction, {args.backbone}, stride 24, {len(images)} pictures of {side} x {side}: "
          f"{windows} windows, {flop / 1e12:.3g} TFLOP")
    precisions = ["fp32", "fp16" if runtime.device.type == "cuda" else "bf16"]
    times, loop, expected = time_extraction(args, work, pictures, images, backbone, precisions)
    result = {"windows": windows, "tflop": flop / 1e12, "loop_seconds": statistics.median(loop)}
    for name, each in times.items():
        stored = np.load(work / f"{name}-0" / "features" / f"{paths[0].name}.npy")
        rate, seconds = statistics.median(each["rates"]), statistics.median(each["seconds"])
        result[name] = {
            "seconds": seconds, "matrix_tflops": rate / 1e12,
            "share_of_matrix_rate": flop / seconds / rate,
            "forward_share": median_ratio(each["forward"], each["seconds"]),
            "times_the_loop": median_ratio(loop, each["seconds"]),
            "difference": relative_difference(torch.from_numpy(stored), expected)}
        print("{}: {seconds:7.1f} s, {share_of_matrix_rate:.1%} of the machine's "
              "{matrix_tflops:.3f} TFLOP/s, {forward_share:.1%} of it in forward passes; "
              "{times_the_loop:.2f} times as fast as the window loop in fp32; "
              "features differ by {difference:.2%}".format(name, **result[name]))
    return result | {"one picture at a time": measure_one_at_a_time(args, runtime)}


def relative_difference(value, expected):
    return ((value.float() - expected).norm() / expected.norm()).item()


def measure_one_at_a_time(args, runtime, count=8):
    """What batches of windows that end with their picture cost, where it costs most: tiny's windows
    are quick, and the demo's pictures have few of them."""
    backbone = load_backbone("tiny", True, runtime.device)
    pictures = extract_teacher.Pictures(DEMO / "train", extract_teacher.PRESETS["tiny"]["paper"],
                                        backbone.patch, seed=0)
    loaded = [pictures.load((name, 0)) for name in list_images(pictures.root)[:count]]
    images = [backbone.normalise(pixels) for _, pixels, _ in loaded]
    windows = sum(len(cut_windows(image, backbone.window, 24)) for image in images)
    flop, outputs = windows * count_flops(backbone, backbone.window), {}

    def one_at_a_time():
        outputs["ours"] = [stitched_features(backbone, image, backbone.window, 24,
                                             autocast=runtime.autocast) for image in images]

    def crossing():
        outputs["crossing"] = crossing_teacher(backbone, images, 24, runtime.autocast)

    before = matrix_product_rate(runtime)
    seconds = in_turns(max(3, args.rounds), runtime.device, ours=one_at_a_time, crossing=crossing)
    rate = statistics.median([before, matrix_product_rate(runtime)])
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    result = {"windows": windows, "seconds": medians["ours"],
              "crossing_seconds": medians["crossing"],
              "ratio": median_ratio(seconds["ours"], seconds["crossing"]),
              "share_of_matrix_rate": flop / medians["ours"] / rate,
              "crossing_share_of_matrix_rate": flop / medians["crossing"] / rate,
              "difference": max(map(relative_difference, outputs["ours"], outputs["crossing"]))}
    print(f"tiny, stride 24, {len(images)} pictures of the demo, {windows} windows: one picture at "
          "a time {seconds:.3f} s ({share_of_matrix_rate:.1%} of the matrix rate), in batches "
          "across them {crossing_seconds:.3f} s ({crossing_share_of_matrix_rate:.1%}): "
          "{ratio:.3f} times; features differ by {difference:.1e}".format(**result))
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
          "bare blocks of the library {bare_seconds:.3f} s: {ratio:.3f} times".format(**result))
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


def measure_evaluation(args, work, runtime):
    backbone, size, path = (load_backbone("ViT-B-16", True, runtime.device), (512, 683),
                            work / "evaluation")
    path.mkdir()
    make_pictures(path, 1, size)
    classes = Classes([[str(k)] for k in range(150)])
    texts = F.normalize(torch.randn(150, backbone.dim, device=runtime.device), dim=-1)
    truth, encoder = torch.randint(0, 150, size), []
    picture = prepare(backbone, read_image(path / "0.jpg"))[None]
    method = evaluate_ovs.Method("single-pass", "", backbone, "", autocast=runtime.autocast)

    def whole():
        labels = method.predict(read_image(path / "0.jpg"), size, classes, texts)
        confusion_matrix(truth, labels, 150)

    def bare():
        with torch.no_grad(), runtime.autocast():
            encoder.append(backbone.encode_dense(picture))

    seconds = in_turns(2 * args.rounds, runtime.device, whole=whole, encoder=bare)
    result = {"seconds": statistics.median(seconds["whole"]),
              "encoder_seconds": statistics.median(seconds["encoder"]),
              "rest": median_ratio(seconds["whole"], seconds["encoder"]) - 1}
    print("\nevaluation, ViT-B-16, 150 classes, 512 x 683: {seconds:.3f} s, of which the encoder "
          "{encoder_seconds:.3f} s; all the rest is {rest:.1%} of it".format(**result))
    return result


def measure_knn(args, work, runtime, queries=2048, chunk=2 ** 16, dim=768, k=30):
    """The kNN probe's exact search on a chunk of its bank, against the matrix product in it."""
    rows = F.normalize(torch.randn(chunk, dim, device=runtime.device), dim=-1)
    asked = F.normalize(torch.randn(queries, dim, device=runtime.device), dim=-1).half()
    single = asked.float()
    product, search = in_turns(
        args.rounds, runtime.device,
        product=lambda: [single[first:first + 1024] @ rows.T for first in range(0, queries, 1024)],
        search=lambda: nearest(asked, [rows], k)).values()
    share = median_ratio(product, search)
    rate = 2 * queries * chunk * dim / statistics.median(search) / 1e12
    print(f"\nkNN, {queries} queries, {chunk} rows of {dim}, k = {k}: "
          f"{statistics.median(search):.2f} s, {share:.0%} of the matrix products' rate "
          f"({rate:.3f} TFLOP/s)")
    return {"seconds": statistics.median(search), "share_of_products": share}


def measure_help(args, work, runtime):
    seconds = {}
    for stage in ("extract_teacher", "distill", "evaluate_ovs", "evaluate_probes",
                  "time_inference"):
        started = time.perf_counter()
        subprocess.run([sys.executable, ROOT / f"{stage}.py", "--help"], stdout=subprocess.DEVNULL,
                       check=True)
        seconds[stage] = time.perf_counter() - started
    print("\n--help: " + ", ".join(f"{stage} {value:.2f} s" for stage, value in seconds.items()))
    return seconds


def measure_memory(args, work, runtime):
    pictures, result = work / "memory", {}
    pictures.mkdir()
    make_pictures(pictures, 200, (256, 384))
    # what is called once for each picture
    for stage, owner, hook, flags in (
            ("extract_teacher", extract_teacher.FeatureFolder, "write",
             ["--out", work / "memory-maps"]),
            ("evaluate_ovs", evaluate_ovs.Row, "count",
             ["--inference", "single-pass", "--save-maps", work / "memory-labels",
              "--state", work / "memory-state", "--classes", "sky, grass, water"])):
        clock, original = Clock(runtime.device), getattr(owner, hook)

        def noted(*arguments):
            clock.note()
            return original(*arguments)

        with mock.patch.object(owner, hook, noted):
            run(sys.modules[stage], "--images", pictures, "--backbone", "tiny",
                "--device", args.device, *flags)
        result[stage] = {f"{share} %": clock.resident(len(clock.notes), 0, share)
                         for share in (10, 50, 100)}
        print(f"\nresident memory, {stage}, {len(clock.notes)} pictures: "
              + ", ".join(f"at {share} {value:.0f} MB" for share, value in result[stage].items()))
    return result


# ---- distillation --------------------------------------------------------------------------------

class Clock:
    """Wall and processor seconds, and resident bytes, noted at each step of a loop."""

    def __init__(self, device):
        self.device, self.notes = device, []

    def note(self, wait=True):
        """wait: until a GPU has done what it was given."""
        now = synchronised_time(self.device) if wait else time.perf_counter()
        pages = (int(Path("/proc/self/statm").read_text().split()[1])
                 if os.path.exists("/proc/self/statm") else 0)
        self.notes.append((now, time.process_time(), pages * os.sysconf("SC_PAGE_SIZE")))

    def epoch(self, count, index):
        """(wall, processor) seconds an image of an epoch: from its first step's end in epoch 0,
        from the epoch before in others."""
        first, last = self.notes[max(0, index * count - 1)], self.notes[(index + 1) * count - 1]
        return [(after - before) / (count - (index == 0))
                for before, after in zip(first[:2], last[:2])]

    def resident(self, count, index, share):
        """Megabytes when so many percent of an epoch are done."""
        return self.notes[index * count + count * share // 100 - 1][2] / 1e6


def plain_loop(teacher, entries, backbone, device, precision):
    """What a first version does: seconds an image, (wall, processor)."""
    student = load_backbone(backbone, True, device)
    parameters = [p for block in student.blocks[-TRAINED:]
                  for p in block.requires_grad_(True).parameters()]
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
    """distill.py as it is, without what it saves (a full-size run saves once in 500 steps), each
    step noted by a clock; which waits for a GPU after the first step and the last one of an epoch
    only, as distill.py runs ahead of it in between."""
    read = distill.Log.read

    def noted(log, now=False):
        stop = read(log, now)
        clock.note(wait=now or not clock.notes)
        return stop

    with contextlib.ExitStack() as patches:
        for owner, name in ((distill.Trainer, "save"), (distill.Log, "plot"),
                            (common.Backbone, "save")):
            patches.enter_context(mock.patch.object(owner, name, return_value="not saved"))
        patches.enter_context(mock.patch.object(distill.Log, "read", noted))
        run(distill, "--train-blocks", TRAINED, "--lr", 2e-5, "--workers", 1, *flags)


def split_flops(name, size):
    """Of one image's forward pass: (FLOP of the frozen blocks and all before, FLOP of the trained
    ones and all behind, shape (n, C) of the tokens between them).

    Without data, as in count_flops; with gradients, or torch's fused kernels would hide products.
    """
    with torch.device("meta"):
        backbone = load_backbone(name, random_init=True, device="meta").requires_grad_(True)
        image = torch.empty(1, 3, *size)
    first, grid = len(backbone.blocks) - TRAINED, backbone.grid(image)
    with FlopCounterMode(display=False) as counter:
        tokens = backbone.run_blocks(backbone.embed(image), grid, stop=first)
        frozen = counter.get_total_flops()
        backbone.project(backbone.run_blocks(tokens, grid, start=first), grid)
    return frozen, counter.get_total_flops() - frozen, tokens.shape[1:]


def time_distill(args, work, runtime):
    """(wall, processor) seconds an image of each kind of loop in each round: {name: [pairs]}."""
    flags = ["--device", args.device, "--precision", args.precision]
    (work / "pictures").mkdir()
    make_pictures(work / "pictures", args.images, args.size)
    teacher = work / "teacher"
    run(extract_teacher, "--images", work / "pictures", "--out", teacher,
        "--backbone", args.backbone, "--random-init", "--augment", "none", "--stride", 0, *flags)
    entries = read_index(teacher)
    plain, early, later = [], [], []
    for turn in range(args.rounds):
        plain.append(plain_loop(teacher, entries, args.backbone, runtime.device, runtime))
        clock = Clock(runtime.device)
        our_loop(clock, "--teacher", teacher, "--out", work / f"spar-{turn}", "--epochs", 3,
                 "--batch-size", 1,
                 "--cache-frozen", work / f"tokens-{turn}", *flags)
        early.append(clock.epoch(args.images, 0))
        later.append(clock.epoch(args.images, 2))
    return {"plain loop": plain, "distill.py, epoch 1": early, "distill.py, later": later}


def measure_distill(args, work, runtime):
    times = time_distill(args, work, runtime)
    frozen, trained, _ = split_flops(args.backbone, args.size)
    allowed = (frozen + 3 * trained) / (3 * trained)  # a backward pass costs two forward passes
    print(f"\n{args.backbone}, {args.images} pictures of {args.size[0]} x {args.size[1]}, "
          f"{args.rounds} rounds; the operations allow {allowed:.2f} "
          "(16/6 = 2.67 if ViT-B's last block were like the others)\n"
          f"{'':24}{'images/s':>10}{'ratio':>8}{'of processor time':>20}")
    rates, ratios = {}, {}
    for name, pairs in times.items():
        rates[name] = 1 / statistics.median(wall for wall, _ in pairs)
        ratios[name] = [statistics.median(a[k] / b[k] for a, b in zip(times["plain loop"], pairs))
                        for k in (0, 1)]
        print(f"{name:24}{rates[name]:10.3f}{ratios[name][0]:8.2f}{ratios[name][1]:20.2f}")
    hours, gigabytes = megapixel_costs(args, rates, runtime)
    return {"ratio": ratios, "allowed": allowed, "images_per_second": rates, "hours": hours,
            "gigabytes": gigabytes, "memory_mb": distill_memory(args, work)}


def megapixel_costs(args, rates, runtime, images=25000, size=(1024, 1024)):
    """(hours, gigabytes) that so many pictures would take over ten epochs, by the rates of this run
    (images/s) and the operations that they need."""
    backbone = load_backbone(args.backbone, True, runtime.device)
    window, dim, cells = backbone.window, backbone.dim, math.prod(size) // backbone.patch ** 2
    frozen, trained, _ = split_flops(args.backbone, args.size)
    frozen_large, trained_large, tokens = split_flops(args.backbone, size)
    all_blocks = (frozen_large + 3 * trained_large) / (frozen + 3 * trained)
    first = all_blocks / rates["distill.py, epoch 1"]
    later = trained_large / trained / rates["distill.py, later"]
    windows = math.prod(len(window_starts(length, side, 24)) for length, side in zip(size, window))
    features = windows * seconds_per_window(backbone, args.windows, runtime)
    hours = {name: images * seconds / 3600 for name, seconds in (
        ("features", features), ("training", first + 9 * later),
        ("training without kept tokens", 10 * all_blocks / rates["plain loop"]))}
    gigabytes = {"features": images * cells * dim * 2 / 1e9,
                 "tokens": images * math.prod(tokens) * 2 / 1e9}
    print(f"\n{images:,} pictures of {size[0]} x {size[1]} here: "
          f"features {hours['features']:,.0f} h ({windows} windows of {window[0]} a picture, "
          f"stitching left out) and {gigabytes['features']:.0f} GB; "
          f"ten epochs {hours['training']:,.0f} h and {gigabytes['tokens']:.0f} GB of kept tokens, "
          f"or {hours['training without kept tokens']:,.0f} h without them")
    return hours, gigabytes


@torch.no_grad()
def seconds_per_window(backbone, count, runtime):
    """Of the forward pass of a batch of so many windows."""
    views = torch.rand(count, 3, *backbone.window, device=runtime.device)
    with runtime.autocast():
        seconds = in_turns(3, runtime.device, encoder=lambda: backbone.encode_dense(views))
    return statistics.median(seconds["encoder"]) / count


def distill_memory(args, work):
    """Resident memory of distill.py on the demo's maps, which have many sizes."""
    run(extract_teacher, "--out", work / "demo", "--stride", 0, "--device", args.device)
    clock = Clock(torch.device("cpu"))
    our_loop(clock, "--teacher", work / "demo", "--out", work / "demo-spar", "--epochs", 2,
             "--device", args.device)
    count = len(clock.notes) // 2
    marks = {f"epoch {epoch + 1} at {share} %": clock.resident(count, epoch, share)
             for epoch in (0, 1) for share in (10, 50, 100)}
    print("\nresident memory: "
          + ", ".join(f"{name} {value:.0f} MB" for name, value in marks.items()))
    return marks


MEASURES = {"stitching": measure_stitching, "extraction": measure_extraction,
            "single-pass": measure_single_pass, "student": measure_student,
            "evaluation": measure_evaluation, "knn": measure_knn, "memory": measure_memory,
            "help": measure_help, "distill": measure_distill}


def sides(text):
    """"448x640" -> (448, 640)."""
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
    add("--images", type=int, default=6, help="pictures of extraction and distill (%(default)s)")
    add("--size", type=sides, default="448x640", metavar="HxW",
        help="of distill's pictures (%(default)s)")
    add("--rounds", type=int, default=3,
        help="turns of the sides (%(default)s); medians are printed")
    add("--windows", type=int, default=8,
        help="windows per batch when distill measures the teacher's rate (%(default)s; a GPU "
             "wants 60)")
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
