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
(a row of windows, scaled up).
extraction: extract_teacher.py as a whole against batches of ten copied windows in fp32, and against
the machine's matrix products.
single-pass: encode_dense on 672 x 896 pixels against the bare blocks of the library on the same
tokens.
student: the same single pass against the windows of stride 24 (eight of them, scaled up), with a
ViT-B/16 of native size 512.
evaluation: 150 classes at 512 x 683, from the file to the labels, against the encoder in it.
memory: resident memory while 200 pictures are extracted and evaluated with tiny. help: seconds
until --help.
distill: images/s of the plain loop (decode, all blocks, one image after the other) and of
distill.py in its first and in a later epoch, in turns, on the same pictures; what the operations
allow; memory over an epoch; and what 25,000 pictures of one megapixel would take on this machine.
Weights are random, which costs the same operations. What is measured goes into a JSON under
tests/results/, with machine and versions.
"""
import argparse
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
from common import (Classes, Stitcher, apply_augmentation, bilinear_strips, cut_windows,
                    dense_features, label_map, load_backbone, prepare, read_image, read_index,
                    single_pass_similarities, start_runtime, window_starts, write_json)
from time_inference import (machine_and_versions, matrix_product_rate, peak_memory,
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
            if isinstance(backbone, common.NativeViT):
                maps = library_blocks(
                    backbone.visual, backbone.embed(windows[first:first + 10])).unflatten(1, grid)
            else:
                maps = backbone.encode_dense(windows[first:first + 10])
            loop.add(maps.permute(0, 3, 1, 2).float(), first)
        outputs.append(loop.result(backbone.grid(image)))
    return outputs


# ---- speed ---------------------------------------------------------------------------------------

def measure_stitching(args, work, runtime):
    size, window, stride, rows = (1024, 2048), (512, 512), 24, {}
    print("\nstitching 1024 x 2048, window 512, stride 24 (1495 windows)")
    for name, channels, cell, outputs in (("768 features", 768, 8, (64, 128)),
                                          ("150 similarities", 150, 1, size)):
        # a fifth of a row of windows, again and again
        maps = torch.rand(13, 32, 32, channels, device=runtime.device)
        swapped = maps.permute(0, 3, 1, 2).contiguous()
        count, row = (len(window_starts(length, side, stride))
                      for length, side in zip(size, window))

        def ours():
            stitcher = Stitcher(size, window, stride, 16, cell, outputs, runtime.device)
            for _ in range(0, count * row, len(maps)):
                stitcher.add(maps)
            return stitcher.result()

        loop = WindowLoop(size, window, stride, cell, channels, runtime.device)

        def one_row():
            for first in range(0, row, len(maps)):
                loop.add(swapped, first)

        seconds = in_turns(args.rounds, runtime.device, ours=ours, one_row=one_row)
        del loop
        if hasattr(ctypes.CDLL(None), "malloc_trim"):
            # or what the other side gave back would be used again, unseen
            ctypes.CDLL(None).malloc_trim(0)
        reset_peak_memory(runtime.device)
        before, out = peak_memory(runtime.device), ours()
        extra = peak_memory(runtime.device) - before - out.nbytes
        rows[name] = {"seconds": statistics.median(seconds["ours"]),
                      "loop_seconds": count * statistics.median(seconds["one_row"]),
                      "ratio": count * median_ratio(seconds["one_row"], seconds["ours"]),
                      "output_mb": out.nbytes / 1e6, "extra_mb": extra / 1e6}
        print("{:18} {seconds:7.2f} s, window by window {loop_seconds:7.1f} s: {ratio:.0f} times; "
              "output {output_mb:.0f} MB, beyond it {extra_mb:.0f} MB".format(name, **rows[name]))
        del out
    return rows


def extract_timed(images, out, backbone, precision, args):
    """extract_teacher.py in this process: seconds from the first decoding to the last written file,
    and those of the forward passes in them."""
    forward, started, load_group, encode = (
        [], [], extract_teacher.load_group, common.Backbone.encode_dense)

    def loading(*arguments):
        started.append(time.perf_counter())
        return load_group(*arguments)

    def encoding(self, views):
        before = synchronised_time(views.device)
        features = encode(self, views)
        forward.append(synchronised_time(views.device) - before)
        return features

    extract_teacher.load_group, common.Backbone.encode_dense = loading, encoding
    try:
        run(extract_teacher, "--images", images, "--out", out, "--backbone", backbone,
            "--random-init", "--augment", "none", "--stride", 24,
            "--precision", precision, "--device", args.device, *args.compile)
    finally:
        extract_teacher.load_group, common.Backbone.encode_dense = load_group, encode
    return time.perf_counter() - min(started), sum(forward)


def measure_extraction(args, work, runtime):
    """Twice the native size, so 121 windows a picture at 224."""
    backbone = load_backbone(args.backbone, True, runtime.device)
    side, pictures = 2 * backbone.window[0], work / "extraction"
    pictures.mkdir()
    make_pictures(pictures, args.images, (side, side))
    images = [prepare(backbone, read_image(path)) for path in sorted(pictures.iterdir())]
    windows = len(images) * len(cut_windows(images[0], backbone.window, 24))
    flop, precisions = (windows * backbone.flops(backbone.window),
                        ["fp32", "fp16" if runtime.device.type == "cuda" else "bf16"])
    print(f"\nextraction, {args.backbone}, stride 24, {len(images)} pictures of {side} x {side}: "
          f"{windows} windows, {flop / 1e12:.1f} TFLOP")
    rates, seconds, forward, loop = (
        {}, {name: [] for name in precisions}, {name: [] for name in precisions}, [])
    runtimes = {name: common.Runtime(runtime.device, name) for name in precisions}
    for turn in range(args.rounds):
        for name in precisions:
            rates.setdefault(name, []).append(matrix_product_rate(runtimes[name]))
            whole, inside = extract_timed(pictures, work / f"{name}-{turn}", args.backbone, name,
                                          args)
            rates[name].append(matrix_product_rate(runtimes[name]))
            seconds[name].append(whole)
            forward[name].append(inside)
        started = synchronised_time(runtime.device)
        baseline = window_loop_teacher(backbone, images, 24)
        loop.append(synchronised_time(runtime.device) - started)
    result = {"windows": windows, "tflop": flop / 1e12, "loop_seconds": statistics.median(loop)}
    expected = baseline[0].cpu()
    for name in precisions:
        stored = torch.from_numpy(np.load(
            work / f"{name}-0" / "features" / f"{sorted(pictures.iterdir())[0].name}.npy")).float()
        result[name] = {"seconds": statistics.median(seconds[name]),
                        "matrix_tflops": statistics.median(rates[name]) / 1e12,
                        "share_of_matrix_rate": (flop / statistics.median(seconds[name])
                                                 / statistics.median(rates[name])),
                        "forward_share": statistics.median(
                            b / a for a, b in zip(seconds[name], forward[name])),
                        "times_the_loop": median_ratio(loop, seconds[name]),
                        "difference": ((stored - expected).norm() / expected.norm()).item()}
        print("{}: {seconds:7.1f} s, {share_of_matrix_rate:.1%} of the machine's "
              "{matrix_tflops:.3f} TFLOP/s, {forward_share:.1%} of it in forward passes; "
              "{times_the_loop:.2f} times as fast as the window loop in fp32; "
              "features differ by {difference:.2%}".format(name, **result[name]))
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
              "by_operations": (len(views) * backbone.flops(backbone.window)
                                / backbone.flops(size))}
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
    truth, encoder, picture = (torch.randint(0, 150, size), [],
                               prepare(backbone, read_image(path / "0.jpg"))[None])

    def whole():
        image = read_image(path / "0.jpg")
        similarities = single_pass_similarities(backbone, image, texts, runtime.autocast)
        labels = label_map(bilinear_strips(similarities, size), size, classes).cpu()
        evaluate_ovs.confusion_matrix(truth, labels, 150)

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


def measure_help(args, work, runtime):
    seconds = {}
    for stage in ("extract_teacher", "distill", "evaluate_ovs", "time_inference"):
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
    for stage, hook, flags in (
            ("extract_teacher", "save_features",
             ["--backbone", "tiny", "--out", work / "memory-maps"]),
            ("evaluate_ovs", "load_sample",
             ["--backbone", "tiny", "--inference", "single-pass",
              "--save-maps", work / "memory-labels", "--classes", "sky, grass, water"])):
        clock, module = Clock(runtime.device), sys.modules[stage]
        original = getattr(module, hook)
        setattr(module, hook, lambda *arguments: (clock.note(), original(*arguments))[1])
        run(module, "--images", pictures, "--device", args.device, *flags)
        setattr(module, hook, original)
        result[stage] = {f"{share} %": clock.resident(len(clock.notes), 0, share)
                         for share in (10, 50, 100)}
        print(f"\nresident memory, {stage}, 200 pictures: "
              + ", ".join(f"at {share} {value:.0f} MB" for share, value in result[stage].items()))
    return result


# ---- distillation --------------------------------------------------------------------------------

class Clock:
    """Wall and processor seconds, and resident bytes, noted at each step of a loop."""

    def __init__(self, device):
        self.device, self.notes = device, []

    def note(self, *_):
        now = synchronised_time(self.device)
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
    """distill.py as it is, without what it saves (a full-size run saves once in 500 steps), its log
    noted by a clock."""
    distill.append_json_line, distill.save_state, distill.plot_log, distill.save_open_clip = (
        clock.note, *[lambda *_: None] * 3)
    distill.read_json_lines = lambda path: [{"loss": 0, "step": 0, "seconds": 0}]
    run(distill, "--train-blocks", TRAINED, "--lr", 2e-5, "--workers", 1, *flags)


def measure_distill(args, work, runtime):
    height, width = size = [int(side) for side in args.size.split("x")]
    flags = ["--device", args.device, "--precision", args.precision]
    (work / "pictures").mkdir()
    make_pictures(work / "pictures", args.images, size)
    teacher = work / "teacher"
    run(extract_teacher, "--images", work / "pictures", "--out", teacher,
        "--backbone", args.backbone, "--random-init", "--augment", "none", "--stride", 0, *flags)
    entries = read_index(teacher)
    plain, early, later = [], [], []
    for turn in range(args.rounds):
        plain.append(plain_loop(teacher, entries, args.backbone, runtime.device, runtime))
        clock = Clock(runtime.device)
        our_loop(clock, "--teacher", teacher, "--out", work / f"spar-{turn}", "--epochs", 3,
                 "--cache-frozen", work / f"tokens-{turn}", *flags)
        early.append(clock.epoch(args.images, 0))
        later.append(clock.epoch(args.images, 2))

    backbone = load_backbone(args.backbone, True, runtime.device)

    # with gradients, or torch's fused kernels would hide their products
    first, _ = distill.select_trained(backbone, str(TRAINED))
    tokens = distill.frozen_tokens(
        backbone, torch.zeros(3, *backbone.window, dtype=torch.uint8), first)
    channels, extra = (
        tokens.shape[2],
        tokens.shape[1] - math.prod(side // backbone.patch for side in backbone.window))

    def operations(size):
        """FLOP of the forward pass of one image: (frozen part, trained part)."""
        grid = [side // backbone.patch for side in size]
        with FlopCounterMode(display=False) as counter:
            backbone.project(backbone.run_blocks(
                torch.zeros(1, math.prod(grid) + extra, channels, device=runtime.device), grid,
                start=first), grid)
        return backbone.flops(size) - counter.get_total_flops(), counter.get_total_flops()

    frozen, trained = operations(size)
    allowed = (frozen + 3 * trained) / (3 * trained)  # a backward pass costs two forward passes
    print(f"\n{args.backbone}, {len(backbone.blocks)} blocks, {args.images} pictures of "
          f"{height} x {width}, {args.rounds} rounds; the operations allow {allowed:.2f} "
          "(16/6 = 2.67 if the last block were like the others)\n"
          f"{'':24}{'images/s':>10}{'ratio':>8}{'of processor time':>20}")
    ratios = {}
    for name, times in (("plain loop", plain), ("distill.py, epoch 1", early),
                        ("distill.py, later", later)):
        ratios[name] = [statistics.median(a[k] / b[k] for a, b in zip(plain, times))
                        for k in (0, 1)]
        print(f"{name:24}{1 / statistics.median(wall for wall, _ in times):10.3f}"
              f"{ratios[name][0]:8.2f}{ratios[name][1]:20.2f}")

    # 25,000 pictures of 1024 x 1024, ten epochs, by the rates of this run and the operations that
    # it would take
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
    first = (statistics.median(wall for wall, _ in early)
             * (frozen_large + 3 * trained_large) / (frozen + 3 * trained))
    next_ = statistics.median(wall for wall, _ in later) * trained_large / trained
    cells, images = (1024 // backbone.patch) ** 2, 25000
    hours = {"features": images * count * statistics.median(times[1:]) / 3600,
             "training": images * (first + 9 * next_) / 3600,
             "training without kept tokens": (
                 images * 10 * statistics.median(wall for wall, _ in plain)
                 * (frozen_large + 3 * trained_large) / (frozen + 3 * trained) / 3600)}
    gigabytes = {"features": images * cells * backbone.dim * 2 / 1e9,
                 "tokens": images * (cells + extra) * channels * 2 / 1e9}
    print("\n25,000 pictures of 1024 x 1024 here: "
          f"features {hours['features']:,.0f} h ({count} windows of {window[0]} a picture, "
          f"stitching left out) and {gigabytes['features']:.0f} GB; "
          f"ten epochs {hours['training']:,.0f} h and {gigabytes['tokens']:.0f} GB of kept tokens, "
          f"or {hours['training without kept tokens']:,.0f} h without them")
    return {"ratio": ratios, "allowed": allowed,
            "images_per_second": {"plain": 1 / statistics.median(wall for wall, _ in plain),
                                  "epoch 1": 1 / statistics.median(wall for wall, _ in early),
                                  "later": 1 / statistics.median(wall for wall, _ in later)},
            "hours": hours, "gigabytes": gigabytes, "memory_mb": distill_memory(args, work)}


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
            "evaluation": measure_evaluation, "memory": measure_memory, "help": measure_help,
            "distill": measure_distill}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", choices=[[], *MEASURES], metavar="WHAT",
        help=f"{', '.join(MEASURES)} (default: all but distill)")
    add("--backbone", default="ViT-B-16",
        help="of extraction and distill: an architecture of open_clip (%(default)s)")
    add("--images", type=int, default=6, help="pictures of extraction and distill (%(default)s)")
    add("--size", default="448x640", metavar="HxW", help="of distill's pictures (%(default)s)")
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
