"""Say whether the CUDA path is right, by comparing it with the CPU, and how fast it is.

    python tests/gpu_check.py                      # one GPU, about five minutes
    python tests/gpu_check.py --only stage speed   # the checks whose names hold one of these words
    python tests/gpu_check.py --device cpu --tiny  # the script itself, without a GPU

One line a check: PASS, FAIL, INFO (only numbers) or SKIP. A failure stops nothing. Weights are
random, except the demo's tiny, and nothing is downloaded. Exit code: the number of failures.
"""
import argparse
import contextlib
import copy
import functools
import io
import itertools
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import torch

THREADS = torch.get_num_threads()  # conftest sets one, for small tensors on a CPU
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import distill
import evaluate_ovs
import evaluate_probes
import extract_teacher
import time_inference
from benchmark import Clock, make_images, noting, our_loop
from common import (DEMO, FrozenWindows, Runtime, Stitcher, cut_windows, load_backbone,
                    open_features, start_runtime)
from conftest import NATIVE, copy_files, losses, results, run, shaken, weights, write_folder
from data.files import (RunError, apply_augmentation, first_line, read_index, read_json,
                        read_lines, write_json)

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 6e-2}  # of relative errors


def assert_close(found, expected, tolerance, what=""):
    """Return the relative error of a tensor, which must be finite and small."""
    found, expected = (torch.as_tensor(each).detach().double().cpu() for each in (found, expected))
    assert found.shape == expected.shape, f"{what} {found.shape} in place of {expected.shape}"
    assert found.isfinite().all(), f"{what} values that are not finite"
    error = ((found - expected).norm() / expected.norm().clamp(min=1e-9)).item()
    assert error <= tolerance, f"{what} off by {error:.1e}, more than {tolerance:.0e}"
    return error


# ---- families of image towers, with random weights, and the joining of windows ----------------

FAMILIES = {**NATIVE, "PE-Core": "PE-Core-T-16-384", "NaFlex": "siglip2-naflex", "TIPSv2": None}
for title, pooling in (("test_vit3", "map"), ("eva02_tiny_patch14_224", "token")):
    FAMILIES[title] = {"timm_model_name": title, "timm_pool": pooling, "timm_proj": "linear"}


def small_backbone(folder, family):
    """Return the first three blocks of a family's backbone on the CPU."""
    source = write_folder(folder, family) if isinstance(family, dict) else family
    if family is None:
        from test_tipsv2 import write_tipsv2  # skips the check without transformers 5.14
        source = write_tipsv2(folder)
    backbone = shaken(load_backbone(source, random_init=source == family))
    del backbone.blocks[3:]
    return backbone


@torch.no_grad()
def check_family(args, name):
    """Compare features at three sizes, in each precision, with the CPU's in fp32."""
    cpu, errors = small_backbone(args.work / name, FAMILIES[name]), dict.fromkeys(TOLERANCES, 0)
    device = copy.deepcopy(cpu).to(args.device)
    native = tuple(side // cpu.patch for side in cpu.window or (128, 128))
    for grid, precision in itertools.product((native, (5, 9), (3, 2)), TOLERANCES):
        images = torch.randn(2, 3, *(cpu.patch * side for side in grid))
        with Runtime(args.device, precision).autocast():
            features = device.encode_dense(images.to(args.device))
        error = assert_close(features, cpu.encode_dense(images), TOLERANCES[precision],
                             f"{precision}, grid {grid}:")
        assert precision == "fp32" or error > 1e-5, f"{precision} is as exact as fp32"
        errors[precision] = max(error, errors[precision])
    return "off by " + ", ".join(f"{error:.0e} in {key}" for key, error in errors.items())


def check_stitching(args):
    size, window, stride, found = (160, 208), (64, 64), 24, []
    maps = torch.randn(len(cut_windows(torch.zeros(3, *size), window, stride)), 4, 4, 7)
    for device in (args.device, "cpu"):
        features = Stitcher.of_features(size, window, stride, 16, device)
        pixels = evaluate_ovs.PixelStitcher(size, window, stride, 16, device)
        for stitcher in (features, pixels):
            stitcher.add(maps.to(device))
        found.append((features.result(), pixels.result(), pixels.strips((150, 190))(0, 150)))
    return f"off by {max(assert_close(*pair, 1e-5) for pair in zip(*found)):.0e}"


def check_resizing(args):
    """Compare images that the device resizes, whose values may be rounded to the next level."""
    image = torch.randint(0, 256, (3, 333, 500), dtype=torch.uint8)
    plan, moved = {"resize": [412, 619], "crop": [7, 9, 400, 560], "flip": True}, 0
    for factor in (1, 2):
        plan["resize"] = [side * factor for side in plan["resize"]]
        expected, found = (apply_augmentation(image.to(device), plan).cpu().int()
                           for device in ("cpu", args.device))
        difference = (found - expected).abs()
        assert difference.max() <= 1 and difference.sum() < 1e-3 * difference.numel()
        moved = max(moved, (difference.sum() / difference.numel()).item())
    return f"{moved:.0e} of the values differ by a level"


# ---- stages, with the demo's tiny; a command that is repeated finds everything done -----------

def extract(out, device, precision, *flags):
    """Extract feature maps of eight images, and return their folder."""
    run(extract_teacher, "--out", out, "--limit", 8, "--versions", 1, "--long-side", 224,
        "--short-side", 224, "--device", device, "--precision", precision, *flags)
    return out


def check_extraction(args):
    expected, errors = extract(args.work / "teacher", "cpu", "fp32"), []
    for precision, features, tolerance in (("fp32", "float16", 1e-3), ("fp32", "int8", 1e-2),
                                           ("fp16", "float16", 1e-2), ("bf16", "float16", 6e-2)):
        found = extract(args.work / f"{precision}-{features}", args.device, precision,
                        "--features", features)
        errors.append(max(assert_close(*(np.array(open_features(folder / entry["file"]))
                                         for folder in (found, expected)), tolerance, precision)
                          for entry in read_index(expected)))
    return "off by {:.0e} in fp32, {:.0e} as int8, {:.0e} in fp16, {:.0e} in bf16".format(*errors)


def check_overflow(args):
    folder, tensors = args.work / "large", weights(DEMO / "tiny")
    copy_files(DEMO / "tiny", folder, "open_clip_config.json")
    tensors["visual.transformer.resblocks.1.mlp.c_proj.weight"] *= 1e4
    save_file(tensors, folder / "open_clip_model.safetensors")
    flags = "--images", DEMO / "train", "--backbone", folder
    with pytest.raises(RunError, match=r"^\S+\.jpg: .*--precision bf16") as refusal:
        extract(args.work / "large-fp16", args.device, "fp16", *flags)
    extract(args.work / "large-bf16", args.device, "bf16", *flags)
    return f"refused in fp16 with the name of {str(refusal.value).partition(':')[0]}"


def train(out, device, precision, *flags):
    """Train for two epochs on the CPU's feature maps, and return the student's folder."""
    teacher = extract(out.parent / "teacher", "cpu", "fp32")
    run(distill, "--teacher", teacher, "--out", out, "--epochs", 2, "--lr", 1e-4,
        "--cache-frozen", "off", "--device", device, "--precision", precision, *flags)
    return out


def check_training(args, flags):
    """Compare losses with the CPU's; in fp16 also count steps whose gradients overflow."""
    def curve(device, precision, scale=2.0 ** 10):
        out = args.work / f"student {flags} {device} {precision} {scale:.0f}"
        scaler = functools.partial(torch.amp.GradScaler, init_scale=scale)
        with mock.patch.object(torch.amp, "GradScaler", scaler):
            train(out, device, precision, *flags.split())
        return losses(out), read_lines(out / "log.jsonl")[-1]["skipped"]

    expected = curve("cpu", "fp32")[0]
    errors = [assert_close(curve(args.device, precision)[0], expected, tolerance, precision)
              for precision, tolerance in (("fp32", 1e-3), ("bf16", 0.1), ("fp16", 0.1))]
    values, skipped = curve(args.device, "fp16", 2.0 ** 30)
    assert np.isfinite(values).all() and 0 < skipped < len(values), f"{skipped} steps skipped"
    return ("losses off by {:.0e} in fp32, {:.0e} in bf16, {:.0e} in fp16; after a scale of 2^30, "
            "{} of {} steps are skipped".format(*errors, skipped, len(values)))


def check_interruption(args):
    flags = args.device, "fp32", "--cache-frozen", args.work / "tokens", "--save-every", 0
    saving = mock.Mock(wraps=distill.save_state,
                       side_effect=[mock.DEFAULT] * 4 + [KeyboardInterrupt])
    with mock.patch.object(distill, "save_state", saving), pytest.raises(KeyboardInterrupt):
        train(args.work / "again", *flags)
    found, expected = (weights(train(args.work / name, *flags)) for name in ("again", "whole"))
    assert len(losses(args.work / "again")) == 16
    error = max(assert_close(found[key], expected[key], 1e-3, key) for key in expected)
    return f"continued after step 4 of 16, weights off by {error:.0e}"


def check_evaluation(args):
    """Compare the label maps of six methods, with thresholds and synonyms."""
    student, labels = train(args.work / "windowed", "cpu", "fp32", "--frozen-stride", 64), []
    flags = ("--compare --stride 64 --refine none lposs --lposs k=100 --limit 3 --background wall "
             "--prob-threshold 0.4 --area-threshold 0.05").split()
    for device, precision in (("cpu", "fp32"), (args.device, "fp32"), (args.device, "fp16")):
        out = args.work / f"maps-{len(labels)}"
        run(evaluate_ovs, "--checkpoint", student, *flags, "--images", DEMO / "test" / "images",
            "--classes", "sky, grass | lawn | meadow, sand, tent, red ball", "--save-maps", out,
            "--state", args.work / "state", "--device", device, "--precision", precision)
        paths = sorted(out.rglob("*.labels.png"))
        labels.append(np.concatenate([np.array(Image.open(path)).ravel() for path in paths]))
    shares = [100 * (found == labels[0]).mean() for found in labels[1:]]
    assert shares[0] > 99.9 and shares[1] > 98, shares
    return f"labels equal: {shares[0]:.3f} % in fp32, {shares[1]:.3f} % in fp16"


def check_probes(args):
    rows = []
    for device in ("cpu", args.device):
        out = args.work / f"probes-{len(rows)}"
        run(evaluate_probes, "--backbone", "tiny", "--limit", 6, "--steps", 5, "--heads", out,
            "--json", f"{out}.json", "--state", out, "--device", device, "--precision", "fp32")
        rows.append([row.get("miou", row.get("pq")) for row in results(f"{out}.json")])
    assert np.abs(np.subtract(*rows)).max() < 0.2, rows
    return "kNN, linear, panoptic: " + ", ".join(f"{score:.2f}" for score in rows[1])


# ---- speed -----------------------------------------------------------------------------------

def pace(args, owner, name, stage, *flags):
    """Run a stage, and return how often per second it calls owner.name, after the first call."""
    clock = Clock(args.device)
    with noting(clock, owner, name):
        run(stage, "--device", args.device, *flags)
    times = [note[0] for note in clock.notes]
    return (len(times) - 1) / (times[-1] - times[0])


def extract_photographs(args, out, count, *flags):
    """Extract feature maps of large images at the pace that is returned, in images a second."""
    make_images(args.work / f"{count}-images", count, args.sizes[1])
    return pace(args, extract_teacher, "append_lines", extract_teacher, "--out", out, "--images",
                args.work / f"{count}-images", "--backbone", args.backbone, "--random-init",
                "--augment", "none", *flags)


def extraction_speed(args):
    backbone = load_backbone(args.backbone, True, args.device)
    windows = len(cut_windows(torch.empty(3, *args.sizes[1]), backbone.window, 24))
    rate = windows * extract_photographs(args, args.work / "speed", 4, "--stride", 24)
    flops = rate * time_inference.count_flops(backbone, backbone.window)
    peak = time_inference.matrix_product_rate(Runtime(args.device, args.precision))
    return (f"{rate:.1f} windows/s in {args.precision}, {flops / peak:.1%} of the "
            f"{peak / 1e12:.3g} TFLOP/s of matrix products")


def distillation_speed(args):
    teacher, clock = args.work / "speed-teacher", Clock(args.device)
    extract_photographs(args, teacher, args.count, "--stride", 0)
    our_loop(clock, args.count, "--teacher", teacher, "--out", args.work / "speed-student",
             "--epochs", 3, "--device", args.device, "--workers", 8)
    first, later = (1 / clock.epoch(args.count, epoch)[0] for epoch in (0, 2))
    return f"{first:.1f} images/s at first, {later:.1f} in later epochs, of {args.sizes[1]} pixels"


def evaluation_speed(args):
    name = "tiny" if args.tiny else "ViT-B-16"  # whose tokenizer open_clip has
    single, windows = (
        pace(args, evaluate_ovs.Evaluation, "count", evaluate_ovs, "--backbone", name,
             "--random-init", "--dataset", "demo", "--limit", 2 * args.count, "--short-side",
             args.sizes[0][0], "--state", args.work / "speed-state", *more)
        for more in ([], ["--inference", "sliding-window", "--stride", 24]))
    return f"{name}: {single:.1f} images/s in a single pass, {windows:.2f} by windows"


def pass_speed(args):
    out, backbone = args.work / "passes.json", load_backbone(args.backbone, True, args.device)
    strides = backbone.window[0], backbone.window[0] // 2
    run(time_inference, "--backbone", args.backbone, "--random-init", "--device", args.device,
        "--sizes", *(f"{height}x{width}" for height, width in args.sizes), "--strides", 0,
        strides[1], 24, "--warmup", 2, "--repeats", 3, "--json", out)
    rows = read_json(out, "")["rows"]
    for size, stride in itertools.product(args.sizes, strides):
        backbone.windows = FrozenWindows(len(backbone.blocks) - 2, backbone.window, stride)
        row = time_inference.measure(backbone, torch.randn(3, *size, device=args.device), None, 0,
                                     (60, 2, 3), Runtime(args.device, args.precision))
        rows.append(row | {"method": f"frozen-stride/{stride}"})
    return "; ".join("{height}x{width} {method} {ms_median:.1f} ms, {tflops:.3g} TFLOP/s"
                     .format(**row) for row in rows)


CHECKS = {
    **{f"family: {name}": functools.partial(check_family, name=name) for name in FAMILIES},
    "stitching": check_stitching, "resizing": check_resizing,
    "stage: extraction": check_extraction,
    "stage: extraction whose activations overflow": check_overflow,
    **{f"stage: distillation {flags}".rstrip(): functools.partial(check_training, flags=flags)
       for flags in ("", "--frozen-stride 64", "--train-blocks all", "--random-scale 0.5 2")},
    "stage: distillation, interrupted, with stored tokens": check_interruption,
    "stage: evaluation": check_evaluation, "stage: probes": check_probes,
    "speed: extraction": extraction_speed, "speed: distillation": distillation_speed,
    "speed: evaluation": evaluation_speed, "speed: passes": pass_speed,
}


def outcome(name, args):
    """Run a check without what it prints. Return PASS, FAIL, INFO or SKIP, and a text."""
    try:
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            text = CHECKS[name](args)
        torch.ones(1, device=args.device).item()  # waits, so that an error belongs to its check
        return "INFO" if name.startswith("speed") else "PASS", text
    except pytest.skip.Exception as reason:
        return "SKIP", str(reason)
    except (Exception, SystemExit, pytest.fail.Exception) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "FAIL", f"{type(error).__name__} in {place.name}:{place.lineno}: {first_line(error)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    add("--tiny", action="store_true", help="small sizes in the measurements of speed")
    add("--only", nargs="+", default=[""], metavar="WORD")
    add("--budget", type=float, default=340, help="seconds after which no check starts")
    add("--json", metavar="FILE", help="write the lines to FILE")
    args, started, lines = parser.parse_args(), time.monotonic(), []
    args.device = start_runtime(args.device).device
    args.precision = "fp16" if args.device.type == "cuda" else "fp32"
    torch.set_num_threads(THREADS if args.device.type == "cuda" else 1)
    args.backbone, args.count, *args.sizes = (
        ("tiny", 3, (160, 192), (192, 256)) if args.tiny else
        ("ViT-B-16-SigLIP2-512", 24, (672, 896), (1024, 2048)))
    with tempfile.TemporaryDirectory() as work:
        args.work = Path(work)
        for name in [name for name in CHECKS if any(word in name for word in args.only)]:
            begun, status, text = time.monotonic(), "SKIP", "no time is left"
            if begun - started < args.budget:
                status, text = outcome(name, args)
            seconds = round(time.monotonic() - begun, 1)
            print(f"{status}  {name}: {text}  [{seconds} s]", flush=True)
            lines.append({"status": status, "check": name, "text": text, "seconds": seconds})
    failures = sum(line["status"] == "FAIL" for line in lines)
    print(f"{failures} of {len(lines)} failed, {time.monotonic() - started:.0f} s")
    if args.json:
        write_json(args.json, lines)
    sys.exit(failures)


if __name__ == "__main__":
    main()
