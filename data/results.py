"""Files that evaluate_ovs.py writes: results with their settings, a model as ONNX."""
import contextlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import open_clip
import PIL
import timm
import torch

from common import start_runtime, weights_hash
from data.files import RunError, UsageError, write_json
from data.benchmarks import read_classes
from data.journal import text_hash
from data.selection import load_models


def label_of(name, refine="none", upsampler="bilinear"):
    """Return what a row of the table is called: "spar", "spar +lposs", "single-pass +anyup"."""
    refined = "" if refine == "none" else f" +{refine}"
    enlarged = "" if upsampler == "bilinear" else f" +{upsampler}"
    return name + refined + enlarged


def result_label(result):
    """Return what an entry of the JSON's results is called."""
    return label_of(result["method"], result["refine"], result["upsampler"])


def describe_settings(args, selection, methods, runtime):
    """Return what all results depend on, apart from the data."""
    window = methods[0].window
    hashes = {method.backbone: weights_hash(method.backbone.visual) for method in methods}
    return {
        "checkpoint": selection.checkpoint, "backbone": methods[0].origin,
        "random_init": args.random_init, "window": list(window) if window else None,
        "weights": {method.label: hashes[method.backbone] for method in methods},
        "positions": methods[-1].backbone.positions,
        "frozen_windows": str(methods[-1].backbone.windows),
        "resize": "bilinear without antialiasing on 8 bits, a short side so that the long one "
                  "has at most 2048; sides then resampled to multiples of the patch",
        "templates": len(open_clip.OPENAI_IMAGENET_TEMPLATES), "limit": args.limit,
        "seed": args.seed, "precision": runtime.precision, "torch": torch.__version__,
        "open_clip": open_clip.__version__, "timm": timm.__version__, "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def write_results(args, settings, results, methods, datasets, runtime):
    """Print a summary and write what the flags ask for: JSON, a plot, scores in a model card."""
    if len({(row["dataset"], row["short_side"], row["area"]) for row in results}) > 1:
        from extras.drawing import print_summary
        print_summary(results)
    if args.json and results:
        lposs = next((method.lposs for method in methods if method.lposs), None)
        anyup = next((method.anyup for method in methods if method.anyup), None)
        names = {dataset.name: dataset.classes.names for dataset in datasets}
        settings = settings | {
            "upsampler": args.upsampler,
            "anyup": anyup and anyup.digest,
            "refine": args.refine, "lposs": lposs and asdict(lposs),
            "device": str(runtime.device), "processes": runtime.world,
            "short_side": args.short_side, "area": args.area, "classes": names,
            "names_sha256": {name: text_hash(value) for name, value in names.items()},
        }
        write_json(args.json, {"dataset": args.dataset or datasets[0].name, "results": results,
                               "settings": settings})
        print(f"results in {args.json}")
    if args.plot and results:
        from extras.drawing import plot
        plot(results, args.plot)
        print(f"plot in {args.plot}")
    student = next((row["checkpoint"] for row in results if row["method"] == "spar"), None)
    if student and args.limit is None and Path(student, "spar.json").is_file():
        with contextlib.suppress(ModuleNotFoundError, RunError):  # no extras/; a locked folder
            from extras.model_card import write_card
            write_card(student, results)


EXPORTED = ("checkpoint", "backbone", "random_init", "hub_dir", "dinov3_weights", "classes",
            "background", "seed", "export", "export_texts", "plain_onnx")


def write_onnx(args, selection, defaults):
    """Write an ONNX file. Raise UsageError for flags, not defaults, that it would not follow."""
    others = ["--" + name.replace("_", "-") for name, default in vars(defaults).items()
              if name not in EXPORTED and getattr(args, name) != default]
    if others:
        raise UsageError("exports are a single pass in float32, with bilinear enlargement and no "
                         f"thresholds; leave out {', '.join(others)}")
    for flag in ("background", "export_texts"):
        if getattr(args, flag) and not args.classes:
            raise UsageError(f"--{flag.replace('_', '-')} goes with --classes")
    from extras.export_onnx import export, export_texts
    classes = read_classes(args.classes, args.background) if args.classes else None
    runtime = start_runtime("cpu", "fp32", args.seed)
    pretrained, student, _ = load_models(replace(selection, compare=False), runtime)
    if args.export_texts:
        export_texts(student or pretrained, args.export_texts, classes)
        classes = None
    if args.export:
        export(student or pretrained, args.export, classes, args.plain_onnx)
