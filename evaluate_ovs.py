"""Stage 3: open-vocabulary segmentation with a student or a pre-trained backbone, scored or just
shown (paper, section 4).

In: a student's folder (or a backbone's name), pictures, class names, and label masks if there are
any. Out: a table of mIoU, the same as JSON (--json), label maps, overlays and PCA pictures
(--save-maps); or an ONNX file (--export).

    python evaluate_ovs.py                                    # the demo: window and student
    python evaluate_ovs.py --images photo.jpg --classes "cat, grass | lawn"    # your own words
    python evaluate_ovs.py --images pictures --masks masks --classes classes.txt --compare
    python evaluate_ovs.py --dataset voc21 --data-root /data --check-data      # look at it first
    torchrun --nproc-per-node 4 evaluate_ovs.py --dataset all --data-root /data --compare
    python evaluate_ovs.py --short-side 128 192 256 --json runs/sweep.json --plot runs/sweep.png
    python evaluate_ovs.py --results runs/sweep.json --plot runs/again.png     # from that file
    python evaluate_ovs.py --backbone siglip2 --checkpoint spar.ckpt --save-student runs/official
    python evaluate_ovs.py --classes "sky, grass | lawn" --export segmenter.onnx

Interrupted, the same command continues. What IoU is, data/scores.py says.
"""
import argparse
import os
import signal
from dataclasses import dataclass, field, fields, replace


def parameter(default, text):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Lposs:
    """What label propagation depends on. Defaults are those of its published code, for a network
    that sees patches of 16 pixels."""
    k: int = parameter(400, "neighbours of a patch by its features, itself included")
    gamma: float = parameter(3.0, "power of a neighbour's cosine similarity")
    sigma: float = parameter(0.01, "decay per pixel of distance; smaller spreads labels further")
    power: float = parameter(1.0, "power of the distance")
    alpha: float = parameter(0.95, "weight of the neighbours against the patch's own similarities, "
                             "under 1")
    steps: int = parameter(10, "of conjugate gradients, which are not run to convergence")
    tau: float = parameter(0.01, "lposs+: scale of colour differences, Lab / (100, 128, 128)")
    reach: int = parameter(6, "lposs+: pixels to each side that a pixel is joined with")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to evaluate").add_argument
    add("--checkpoint", help="a student: a folder that distill.py wrote (default: runs/spar); or, "
        "with --backbone, a file with an official SPAR state dict")
    add("--backbone", help="evaluate this pre-trained model instead: tiny, siglip2, openclip, "
        "dinov3txt, siglip2-naflex, tipsv2 (-b, -so, -g), hf-hub:ORG/NAME, local-dir:PATH, "
        "ARCH/TAG")
    add("--positions", choices=["size", "scale"], help="of an official checkpoint: positional "
        "embeddings are resampled to a grid's size, or by a scale factor of (grid + 0.1) / native "
        "grid, as the OpenCLIP ones were trained (default: scale for these, size for others)")
    add("--random-init", action="store_true",
        help="the architecture (and AnyUp's) without weights, for timing and tests")
    add("--inference", choices=["single-pass", "sliding-window"], help="(default: single-pass)")
    add("--stride", "--strides", type=int, nargs="+", metavar="N", help="pixels between sliding "
        "windows; several give several rows (default: half the window, and 1.5 patches)")
    add("--window", type=int, metavar="N", help="side of the sliding window in pixels (default: "
        "the size that the backbone was trained on)")
    add("--compare", action=argparse.BooleanOptionalAction, help="pre-trained single pass, "
        "pre-trained sliding window and student in one table (default: on for the demo)")
    add = parser.add_argument_group("on what").add_argument
    add("--dataset", metavar="NAME", help="demo (default, unless --images is given), voc21, voc20, "
        "cityscapes, ade20k, context60, context59, or all six benchmarks")
    add("--data-root", default="data", metavar="DIR", help="the folder of the benchmarks: "
        "DIR/VOCdevkit/VOC2012, DIR/cityscapes ... (%(default)s)")
    add("--check-data", action="store_true",
        help="only look at the files: counts, pairs, sizes, label ids")
    add("--images", metavar="PATH",
        help="own pictures: a folder, searched recursively, or one file")
    add("--masks", metavar="DIR", help="label masks of --images: PNG files of the same relative "
        "names, one channel of class numbers, 255 is ignored")
    add("--classes", metavar="FILE|NAMES", help="a file with one class a line and commas between "
        "synonyms, the first line is label 0; or \"cat, grass | lawn, sky\"; with --dataset: other "
        "names for its classes")
    add("--background", metavar="WORDS", help="own pictures: a class 0 before --classes for "
        "everything else, with what that may be: \"wall, floor, road\"")
    add("--limit", type=int, metavar="N", help="the first N pictures only")
    add = parser.add_argument_group("how").add_argument
    add("--short-side", type=int, nargs="+", metavar="N", help="resize pictures before inference "
        "so that the short side has N pixels, the long one at most 2048; several make a sweep over "
        "resolutions (default: the benchmark's, 672 mostly; own pictures: as they are)")
    add("--area", type=int, nargs="+", metavar="N", help="resize pictures to the area of a square "
        "of side N instead, so that all cost alike; several make a sweep")
    add("--upsampler", nargs="+", choices=["bilinear", "anyup"], default=["bilinear"], help="of "
        "class similarities to pixels; both give two rows each. anyup, for the single pass only, "
        "takes its code and weights from torch.hub and a minute a picture on a CPU")
    add("--anyup-model", choices=["anyup_multi_backbone", "anyup"], default="anyup_multi_backbone",
        help="which published AnyUp weights (%(default)s: trained on several encoders)")
    add("--hub-dir", metavar="DIR", help="use this clone of github.com/wimmerth/anyup (its "
        "checkpoint beside hubconf.py) or of github.com/facebookresearch/dinov3 instead of the "
        "network; or a folder with both, named anyup and dinov3")
    add("--dinov3-weights", nargs=2, metavar=("BACKBONE", "TEXT"),
        help="dinov3txt: the two .pth files that Meta gives after its licence is accepted")
    add("--refine", nargs="+", choices=["none", "lposs", "lposs+"], default=["none"], help="label "
        "propagation over patches (lposs) and then over pixels (lposs+); several give several "
        "rows. Thresholds of benchmarks are for cosine similarities and do not apply")
    for each in fields(Lposs):
        add(f"--lposs-{each.name}", type=type(each.default), default=each.default, metavar="X",
            help=f"{each.metadata['help']} (%(default)s)")
    add("--protocol", choices=["spar", "tips"], default="spar", help="tips: as TIPSv2's authors "
        "evaluate: TCL's 9 templates in the place of 80, a short side of 448, windows (of stride "
        "336) whose class probabilities at a logit scale of 1 are averaged in the place of "
        "similarities, no thresholds. They also resize pictures bicubically, and do not glue words "
        "of ADE20K's names; both is not done here (%(default)s)")
    add("--logit-scale", type=float, metavar="X", help="of similarities in the softmax that "
        "--prob-threshold looks at (default: the benchmark's, else 40)")
    add("--prob-threshold", type=float, metavar="P",
        help="less probable pixels become background (default: the benchmark's, else 0)")
    add("--area-threshold", type=float, metavar="P", help="classes that win no more of the "
        "foreground are left out (default: the benchmark's, else 0)")
    add("--batch-size", type=int, default=60, help="most windows per forward pass (%(default)s; a "
        "CPU takes as many as its caches hold)")
    add = parser.add_argument_group("what to write").add_argument
    add("--json", metavar="FILE", help="write the results with every setting to FILE")
    add("--plot", metavar="FILE", help="mIoU against resolution and time (.png, .pdf, .svg)")
    add("--results", metavar="FILE", nargs="+", help="evaluate nothing: the tables and --plot of "
        "files that --json wrote, together")
    add("--save-maps", metavar="DIR", help="write label maps, overlays with a legend, PCA pictures "
        "and a contact sheet to DIR (own pictures without masks: runs/maps)")
    add("--save-student", metavar="DIR", help="write what an official checkpoint holds as a "
        "student's folder, which open_clip loads and --checkpoint and --backbone take; evaluates "
        "only if --dataset or --images is given")
    add("--export", metavar="FILE", help="evaluate nothing: write the single pass as an ONNX file, "
        "from uint8 pictures (H, W, 3) of any size to labels (H, W) of --classes, or without to "
        "features; needs pip install onnx onnxscript onnxruntime")
    add("--plain-onnx", action="store_true", help="--export for other runtimes than onnxruntime: "
        "operators of opset 23 alone, with five times the memory at 1024 x 2048 pixels")
    add("--state", metavar="DIR", default="runs/evaluate", help="where the counts of an unfinished "
        "run are kept, one folder for all processes (%(default)s)")
    add = parser.add_argument_group("with what").add_argument
    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="threads that read pictures ahead (default: one a core, at most 8)")
    add("--device", default="auto",
        help="auto, cpu, cuda, cuda:1 ... (%(default)s: a GPU if there is one)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="of the matrix products (%(default)s: fp16 on a GPU, fp32 on a CPU)")
    add("--seed", type=int, default=0, help="of random weights (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":  # before torch's import, so that --help and a wrong flag answer at once
    ARGS = parse_args()
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell's background job has it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until command_line: no import's traceback

import contextlib
import csv
import functools
import hashlib
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import open_clip
import PIL
import timm
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (IGNORE, NUMBER, RunFailed, Stitcher, WrongCall, append_json_lines, atomic_path,
                    bilinear_strips, chosen_window, command_line, default_stride, embed_texts,
                    encode_windows, fit_to_patches, fits, label_strips, prefetch, prepare,
                    read_json_lines, short_name, speaks_flags, start_runtime, stitch_axis,
                    stitched_features, weights_hash, whole_numbers, window_starts, write_json,
                    write_json_lines)
from data.anyup import AnyUp
from data.benchmarks import (BENCHMARKS, Rule, Size, benchmark_rule, check_data, check_masks,
                             demo_pictures, label_table, load_sample, open_benchmark, own_pictures,
                             picture_size, read_classes, read_labels)
from data.drawing import MAP_KINDS, contact_sheet, map_path, save_maps, save_picture
from data.export_onnx import export
from data.lposs import propagate_patches, propagate_pixels
from data.model_card import write_card
from data.scores import (confusion_matrix, label_of, print_results, print_table, read_results,
                         scores, show)
from data.students import load_models, save_student

# ---- similarities of windows, at pixel resolution ------------------------------------------------


class PixelStitcher(Stitcher):
    """Class similarities of windows, each upsampled to pixels, averaged where they overlap (paper,
    section 3.3).

    Between multiples of gcd(stride, patch / 2) pixels - the only places where features' centres and
    windows' borders lie - that average is linear along each axis. So the first and the last pixel
    of each such piece are all that is summed and held (for a stride of 24 a sixteenth of the
    pixels), and whatever lies between two neighbours of them is interpolated, exactly.
    """

    def __init__(self, size, window, stride, patch, device="cpu"):
        piece, axes = math.gcd(stride, 1 if patch % 2 else patch // 2), []
        self.held = []  # pixels along each axis
        for length, side in zip(size, window):
            pixels = torch.arange(length).view(-1, piece)[:, sorted({0, piece - 1})].flatten()
            axes.append(stitch_axis(length, side, stride, patch, 1)[:, pixels])
            self.held.append(pixels.double())
        super().__init__(*axes, device)

    @staticmethod
    def neighbours(held, outputs):
        """Of each output along an axis that is resized (bilinear, align_corners=False): the held
        pixels before and after it, and where it is between them, 0 to 1."""
        length = held[-1].item() + 1
        places = (torch.arange(outputs, dtype=torch.float64) + 0.5) * length / outputs - 0.5
        places = places.clamp(0, length - 1)
        after = torch.searchsorted(held, places).clamp(min=1)
        before = after - 1
        return before, after, (places - held[before]) / (held[after] - held[before])

    def strips(self, size):
        """A function of (first, last) that gives these rows at `size`: (N, rows, W)."""
        pixels = self.result()  # (held along H, held along W, N)
        rows, (left, right, across) = (
            [each.to(pixels.device) for each in self.neighbours(held, outputs)]
            for held, outputs in zip(self.held, size))

        def strip(first, last):
            above, below, down = (each[first:last] for each in rows)
            some = torch.lerp(pixels[above], pixels[below], down.to(pixels)[:, None, None])
            some = torch.lerp(some[:, left], some[:, right], across.to(pixels)[:, None])
            return some.permute(2, 0, 1)
        return strip


class ProbabilityStitcher:
    """Class probabilities of windows at pixels - the softmax of upsampled similarities, at a logit
    scale of 1 - averaged where they overlap (TIPS' notebook).

    Unlike the others this is not linear, so that whole maps are summed: N x H x W floats.
    """

    def __init__(self, size, window, stride, patch, device="cpu"):
        starts = (window_starts(length, side, stride) for length, side in zip(size, window))
        self.corners = itertools.product(*starts)  # of windows that are still to come
        self.window = [min(pair) for pair in zip(size, window)]
        self.counts, self.total = torch.zeros(size, device=device), None

    def add(self, similarities):
        """The next windows in reading order: (n, i, j, N)."""
        height, width = self.window
        for each in similarities:
            top, left = next(self.corners)
            place = slice(top, top + height), slice(left, left + width)
            if self.total is None:
                self.total = self.counts.new_zeros(each.shape[2], *self.counts.shape)
            pixels = bilinear_strips(each.float(), self.window)(0, height)  # (N, height, width)
            self.total[:, *place] += pixels.softmax(0)
            self.counts[place] += 1

    def strips(self, size):
        """A function of (first, last) that gives these rows at `size`: (N, rows, W)."""
        assert self.counts.min() > 0, "windows are missing"
        return bilinear_strips((self.total / self.counts).permute(1, 2, 0), size)


@dataclass(frozen=True)
class Protocol:
    """What published evaluations do differently, whatever the backbone. None: as the data set or
    the backbone has it."""
    templates: tuple  # of the text, functions of a name
    stitcher: type = PixelStitcher  # of a sliding window's similarities
    strides: tuple | None = None
    size: Size | None = None
    rule: Rule | None = None


# "tips": TIPS_zeroshot_segmentation.ipynb in github.com/google-deepmind/tips
PROTOCOLS = {
    "spar": Protocol(tuple(open_clip.OPENAI_IMAGENET_TEMPLATES)),
    "tips": Protocol(
        tuple(text.format for text in (
            "itap of a {}.", "a bad photo of a {}.", "a origami {}.", "a photo of the large {}.",
            "a {} in a video game.", "art of the {}.", "a photo of the small {}.",
            "a photo of many {}.", "a photo of {}s.")),
        ProbabilityStitcher, (336,), Size(448), Rule(1.0)),
}


# ---- methods -------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Method:
    """One way to segment a picture: a backbone, how it looks at it (stride 0 is the single pass),
    and what happens to the similarities between that and pixels."""
    name: str  # single-pass, sliding-window/STRIDE or spar
    title: str
    backbone: torch.nn.Module
    origin: str  # the backbone that it, or its teacher, was loaded by: thresholds go by it
    stride: int = 0
    window: tuple | None = None
    batch_size: int = 60
    autocast: object = contextlib.nullcontext
    protocol: Protocol = PROTOCOLS["spar"]
    refine: str = "none"
    lposs: Lposs = Lposs()
    anyup: AnyUp | None = None

    @property
    def upsampler(self):
        return "anyup" if self.anyup else "bilinear"

    @property
    def label(self):
        return label_of(self.name, self.refine, self.upsampler)

    @torch.no_grad()
    def predict(self, image, size, classes, texts, rule=Rule()):
        """(3, H, W) uint8, its classes and their N unit vectors -> (*size) int64 on the CPU."""
        owner, picture = classes.owner, prepare(self.backbone, image)
        if self.refine == "none" and self.stride:
            strips = self.window_similarities(picture, texts).strips(size)
        elif self.refine == "none":
            similarities = F.normalize(self.features(picture), dim=-1) @ texts.T  # (h, w, N)
            strips = self.enlarge(image, similarities, size)
        else:
            similarities = best_synonyms(self.propagated(image, picture, texts), owner)
            strips, owner = self.enlarge(image, similarities, size), torch.arange(len(classes))
        return label_map(strips, size, owner, rule).cpu()

    def features(self, picture):
        """A prepared picture (3, H, W) -> (H/patch, W/patch, D), as the teacher stitches them."""
        return stitched_features(self.backbone, picture, self.window, self.stride, self.batch_size,
                                 self.autocast)

    def window_maps(self, picture):
        return encode_windows(self.backbone, picture, self.window, self.stride, self.batch_size,
                              self.autocast)

    def stitcher(self, picture):
        return self.protocol.stitcher(picture.shape[-2:], self.window, self.stride,
                                      self.backbone.patch, picture.device)

    def window_similarities(self, picture, texts):
        """The sliding-window baseline: similarities of all windows, joined at pixels."""
        stitcher = self.stitcher(picture)
        for maps in self.window_maps(picture):
            stitcher.add(F.normalize(maps, dim=-1) @ texts.T)  # (n, i, j, N)
        return stitcher

    def enlarge(self, image, similarities, size):
        """Strips of (h, w, N) at `size`, by the upsampler."""
        if self.anyup and min(similarities.shape[:2]) < 2:
            say_once("AnyUp needs two patches to each side; smaller pictures are enlarged "
                     "bilinearly")
        elif self.anyup:
            return self.anyup.strips(fit_to_patches(image, self.backbone.patch), similarities, size)
        return bilinear_strips(similarities, size)

    def propagated(self, image, picture, texts):
        """Similarities after LPOSS: over the patches of a single pass (h, w, N), or over those of
        all windows in one graph, then joined at pixels; LPOSS+ goes on over pixels, (H, W, N)."""
        if self.stride:
            maps = torch.cat(list(self.window_maps(picture)))  # (n, i, j, D)
        else:
            maps = self.features(picture)[None]
        maps = F.normalize(maps, dim=-1)
        centres = patch_centres(picture.shape[-2:], maps.shape[1:3], self.backbone.patch,
                                self.stride or max(picture.shape[-2:]))
        flat = maps.flatten(0, 2)
        similarities = propagate_patches(flat, centres.to(flat), flat @ texts.T, self.lposs)
        similarities = similarities.unflatten(0, maps.shape[:3])  # (n, i, j, N)
        if self.stride:
            stitcher, size = self.stitcher(picture), picture.shape[-2:]
            stitcher.add(similarities)
            similarities = stitcher.strips(size)(0, size[0]).permute(1, 2, 0)
        else:
            similarities = similarities[0]
        if self.refine == "lposs":
            return similarities
        pixels = fit_to_patches(image, self.backbone.patch).to(picture.device)
        return propagate_pixels(pixels, similarities, self.lposs)


@functools.cache
def say_once(text):
    print(text)


def patch_centres(size, grid, patch, stride):
    """(y, x) in pixels of the centres of all patches of all windows of a (h, w) grid, in reading
    order: (n * h * w, 2)."""
    starts = [window_starts(length, cells * patch, stride) for length, cells in zip(size, grid)]
    corners = torch.cartesian_prod(*map(torch.tensor, starts))  # (n, 2)
    cells = torch.cartesian_prod(*map(torch.arange, grid))  # (h * w, 2)
    return (corners[:, None] + patch * cells + patch / 2).flatten(0, 1)


def best_synonyms(similarities, owner):
    """(h, w, N) -> the largest among each class's names, (h, w, K)."""
    count = int(owner[-1]) + 1
    best = similarities.new_full((*similarities.shape[:2], count), -torch.inf)
    owner = owner.to(similarities.device).expand(similarities.shape)
    return best.scatter_reduce(2, owner, similarities, "amax")


def label_map(strip, size, owner, rule=Rule()):
    """The class of each pixel, from strips of similarities (N, rows, W): (H, W) int64.

    owner: the class of each name, (N,). The most similar of all names belongs to the class whose
    best synonym is the most similar, and softmax changes no order: it is only computed where a
    threshold asks for a probability.
    """
    def assign(similarities, banned=None):
        kept = similarities
        if banned is not None:
            kept = kept.masked_fill(banned.to(kept.device)[:, None, None], -torch.inf)
        best, name = kept.max(0)  # (rows, W)
        labels = owner.to(name.device)[name]
        # areas are counted before the threshold
        if rule.threshold and (banned is not None or not rule.area_threshold):
            logits = rule.logit_scale * similarities
            probability = (rule.logit_scale * best - logits.logsumexp(0)).exp()
            labels[probability < rule.threshold] = 0
        return labels

    labels = label_strips(assign, strip, size, len(owner))
    if rule.area_threshold:
        areas = torch.bincount(labels.flatten().cpu(), minlength=int(owner[-1]) + 1)
        small = areas <= rule.area_threshold * areas[1:].sum()
        small[0] = False
        assign = functools.partial(assign, banned=small[owner])
        labels = label_strips(assign, strip, size, len(owner))
    return labels


# ---- scores --------------------------------------------------------------------------------------

class Row:
    """One row of the table: a method on a data set at one size by one rule, and what it counted.

    Its journal is a file with a line for each picture, where an interrupted run continues and
    torchrun's processes meet. So the final confusion matrix is one exact sum, however the pictures
    were shared out. Pictures without masks are counted as if label 0 were everywhere.
    """

    def __init__(self, method, dataset, size, rule, journal, maps=None):
        self.method, self.dataset, self.size, self.rule = method, dataset, size, rule
        self.journal, self.maps = Path(journal), maps  # a folder for label maps, or None

    def open(self, runtime):
        """Continue from the journal, without a line that was cut short, and without failures, which
        are tried again."""
        if runtime.rank == 0:
            write_json_lines(self.journal, [entry for entry in self.entries()
                                            if "counts" in entry])
        runtime.barrier()
        self.read()
        # settled before any process goes on: what another one draws meanwhile moves no share
        self.mine = self.missing()[runtime.rank::runtime.world]
        runtime.barrier()

    def read(self):
        self.done, self.failed = {}, {}  # journal entries by picture; reasons
        self.confusion = self.counts_of({"cells": [], "counts": []})
        for entry in self.entries():
            if "error" in entry:
                self.failed[entry["image"]] = entry["error"]
            elif entry["image"] not in self.done:
                self.done[entry["image"]] = entry
                self.confusion += self.counts_of(entry)

    def entries(self):
        """The journal's lines that say what a picture counts, or why it does not."""
        cells = len(self.dataset.classes) ** 2
        return [entry for entry in read_json_lines(self.journal, {"image": str})
                if fits(entry, {"error": str})
                or fits(entry, {"seconds": NUMBER, "cells": list, "counts": list})
                and len(entry["cells"]) == len(entry["counts"])
                and whole_numbers(entry["cells"], high=cells) and whole_numbers(entry["counts"])]

    def missing(self):
        """Numbers of the pictures that are not counted, or whose maps are not all there."""
        return [k for k, name in enumerate(self.dataset.images) if name not in self.done
                or self.maps and not all(map_path(self.maps, name, kind).is_file()
                                         for kind in MAP_KINDS)]

    def count(self, index, labels, predictions, seconds):
        name = self.dataset.images[index]
        if name in self.done:  # only its maps were missing
            return
        labels = torch.zeros_like(predictions) if labels is None else labels
        counts = confusion_matrix(labels, predictions, len(self.dataset.classes)).view(-1)
        cells = counts.nonzero()[:, 0]
        append_json_lines(self.journal, {"image": name, "seconds": seconds, "cells": cells.tolist(),
                                         "counts": counts[cells].tolist()})
        self.confusion += counts.view_as(self.confusion)

    def leave_out(self, index, error):
        append_json_lines(self.journal, {"image": self.dataset.images[index], "error": error})

    def draw(self, index, image, labels, resized):
        """The maps of one picture."""
        features = self.method.features(prepare(self.method.backbone, resized))
        save_maps(self.maps, self.dataset.images[index], image, labels, features,
                  self.dataset.classes)

    def counts_of(self, entry):
        """The confusion matrix of one picture's journal entry."""
        counts = torch.zeros(len(self.dataset.classes) ** 2, dtype=torch.int64)
        counts[entry["cells"]] = torch.tensor(entry["counts"], dtype=torch.int64)
        return counts.view(len(self.dataset.classes), -1)

    def miou(self, name=None):
        """Of one picture, or so far."""
        return scores(self.confusion if name is None else self.counts_of(self.done[name]))[1]

    def result(self):
        """The entry of the JSON's results. Raises RunFailed where there is nothing to score."""
        method, name = self.method, self.dataset.name
        if not self.confusion.any():
            raise RunFailed(f"{name}: no pixel of these masks counts, so there is nothing to score "
                            f"({IGNORE} is ignored)")
        iou, miou, accuracy = scores(self.confusion)
        by_class = {title: None if math.isnan(value) else value
                    for title, value in zip(self.dataset.classes.titles, iou.tolist())}
        seconds = [entry["seconds"] for entry in self.done.values()]
        return {"dataset": name, "method": method.name, "refine": method.refine,
                "upsampler": method.upsampler, "short_side": self.size.short_side,
                "area": self.size.area, "miou": miou, "pixel_accuracy": accuracy,
                "images": len(self.done), "unreadable": sorted(self.failed),
                "seconds_per_image": float(np.mean(seconds)),
                "logit_scale": self.rule.logit_scale, "prob_threshold": self.rule.threshold,
                "area_threshold": self.rule.area_threshold, "per_class_iou": by_class}


def warn_of_nonsense(row):
    """Scores that a wrong label order, size or normalisation would give."""
    confusion, classes, label = row.confusion, row.dataset.classes, row.method.label
    _, _, accuracy = scores(confusion)
    share, winner = (confusion.sum(0) / confusion.sum()).max(0)
    if len(classes) > 2 and accuracy < 200 / len(classes):
        print(f"warning: {label}: pixel accuracy {accuracy:.1f} % is less than twice that of "
              "guessing; are the class names in the labels' order?")
    if share > 0.9 and confusion.sum(1).max() < 0.9 * confusion.sum():
        print(f"warning: {label}: {100 * share:.0f} % of all pixels became "
              f"'{classes.titles[winner]}'")


# ---- the loop ------------------------------------------------------------------------------------

def evaluate(row, texts, runtime, workers=2):
    """Every picture of a row that is this process's and not done yet: predict, time, count."""
    dataset, mine = row.dataset, row.mine
    predict = functools.partial(row.method.predict, classes=dataset.classes, texts=texts,
                                rule=row.rule)
    warm = False
    with progress_bar(row, len(mine), runtime.rank > 0) as progress:
        samples = prefetch(lambda k: load_sample(dataset, k), mine, workers)
        for k, (image, labels, error) in zip(mine, samples):
            if error:
                progress.write(f"left out: {error}")
                row.leave_out(k, error)
                progress.update()
                continue
            resized, size = row.size.resize(image), image.shape[-2:]
            if not warm:
                predict(resized, size)  # not timed
                warm = True
            started = time.perf_counter()
            predictions = predict(resized, size)  # (H, W)
            seconds = time.perf_counter() - started
            if row.maps:  # before the picture counts as done
                row.draw(k, image, predictions, resized)
            row.count(k, labels, predictions, seconds)
            if labels is not None:
                progress.set_postfix_str(f"mIoU {row.miou():.1f}", refresh=False)
            progress.update()


def progress_bar(row, total, disable):
    size = f" {row.size.asked}" if row.size.asked else ""
    return tqdm(total=total, desc=f"{row.dataset.name}{size}, {row.method.label}", unit="map",
                disable=disable)


def announce(rows, state):
    """What is about to run on one data set at one size, and by which thresholds."""
    dataset, size = rows[0].dataset, rows[0].size
    count, known = len(dataset.images), ""
    if dataset.known not in (None, count):
        known = f" of the known {dataset.known}"
    print(f"{dataset.name}: {count} pictures{known}, {len(dataset.classes)} classes "
          f"({len(dataset.classes.flat)} names), {'at their ' if not size.asked else ''}{size}")
    bounded = list(filter(None, (bounded_side(size, dataset.root / image)
                                 for image in dataset.images if size.short_side)))
    if bounded:
        sides = " to ".join(map(str, sorted({min(bounded), max(bounded)})))
        print(f"{len(bounded)} of {count} pictures get a short side of {sides} pixels only, as "
              f"their long side may have {size.LONGEST} at most")
    for rule in dict.fromkeys(row.rule for row in rows):
        if rule.threshold or rule.area_threshold:
            print(f"background: class probability under {rule.threshold:g} at logit scale "
                  f"{rule.logit_scale:g}, area threshold {rule.area_threshold:g} "
                  f"({', '.join(row.method.label for row in rows if row.rule == rule)})")
    done = sum(len(row.done) for row in rows)
    if done:
        print(f"continuing an unfinished run: {done} of {len(rows) * count} maps are counted in "
              f"{state}")


def bounded_side(size, path):
    """The short side that a picture gets where the bound on the long one makes it shorter than was
    asked for; else None."""
    try:
        height, width = picture_size(path)
    except RunFailed:  # it will be left out when its turn comes
        return None
    scale, bounded = size.scale(height, width)
    return int(min(height, width) * scale + 0.5) if bounded else None


def conclude(rows, folder):
    """Read what all processes counted on one data set at one size: print and draw it, and return
    the results of scored rows. Raises RunFailed where something is missing."""
    dataset, failed = rows[0].dataset, set()
    for row in rows:
        row.read()
        failed |= row.failed.keys()
        lost = set(dataset.images) - row.done.keys() - row.failed.keys()
        if lost:
            raise RunFailed(f"the counts of {len(lost)} pictures are missing in {row.journal}: "
                            "--state must be a folder that all processes share, with one run at a "
                            "time; the same command makes them")
    if len(failed) == len(dataset.images):
        raise RunFailed(f"none of the {len(failed)} pictures of {dataset.name} could be read")
    results = [] if dataset.masks is None else [row.result() for row in rows]
    if results:
        print_table(results)
        for row in rows:
            warn_of_nonsense(row)
    else:
        write_shares(rows, folder / "shares.csv")
    if failed:
        print(f"{len(failed)} of {len(dataset.images)} pictures could not be read and are left out")
    if folder and len(failed) < len(dataset.images):
        save_picture(draw_sheet(rows), folder / "sheet.png")
        print(f"maps in {folder}, some of them side by side in {folder / 'sheet.png'}")
    return results


def write_shares(rows, path):
    """What share of each picture every class takes: a line each on the screen and in a CSV file."""
    titles, lines = rows[0].dataset.classes.titles, []
    for row in rows:
        for name, entry in sorted(row.done.items()):
            areas = (100 * row.counts_of(entry)[0] / sum(entry["counts"])).tolist()
            lines.append([name, row.method.label, *(f"{area:.2f}" for area in areas)])
            largest = sorted(zip(areas, titles), reverse=True)
            print(f"{name} ({row.method.label}): " + ", ".join(
                f"{title} {area:.1f} %" for area, title in largest if area > 0))
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8",
                                              errors="surrogateescape") as file:
        csv.writer(file).writerows([["image", "method", *(f"{t} %" for t in titles)], *lines])


def draw_sheet(rows, most=6):
    """Pictures beside the saved label maps of all rows: those where the last sliding window leads
    the first row most (mIoU of the picture alone), or else the first ones."""
    dataset, methods = rows[0].dataset, [row.method for row in rows]
    names = [name for name in dataset.images if all(name in row.done for row in rows)]
    windows = [row for row in rows if row.method.stride and row is not rows[0]]
    if windows and dataset.masks:
        leads = {name: windows[-1].miou(name) - rows[0].miou(name) for name in names}
        # nan where a picture's mask ignores every pixel
        names.sort(key=lambda name: math.inf if math.isnan(leads[name]) else -leads[name])
    sheet = []
    for name in names[:most]:
        image, labels, _ = load_sample(dataset, dataset.images.index(name))
        maps = [read_labels(map_path(row.maps, name, "labels"), image.shape[-2:],
                            label_table("plain", len(dataset.classes))) for row in rows]
        sheet.append([image, *([] if labels is None else [labels]), *maps])
    titles = [method.title + method.label.removeprefix(method.name) for method in methods]
    return contact_sheet(sheet, ["picture", *["labels"] * bool(dataset.masks), *titles],
                         dataset.classes)


# ---- main ----------------------------------------------------------------------------------------

def check_flags(args):
    """Raise WrongCall for flags that can be seen to be wrong by themselves."""
    for flag, endings in (("plot", (".png", ".pdf", ".svg")), ("json", (".json",)),
                          ("export", (".onnx",))):
        value = getattr(args, flag)
        if value and Path(value).suffix not in endings:
            raise WrongCall(f"--{flag} {value}: must end in {' or '.join(endings)}")
    if args.short_side and args.area:
        raise WrongCall("--short-side and --area exclude each other")
    if not 0 <= args.lposs_alpha < 1 or args.lposs_tau <= 0:
        raise WrongCall("--lposs-alpha must be from 0 to under 1, --lposs-tau positive")
    if args.protocol == "tips" and (args.prob_threshold or args.area_threshold):
        raise WrongCall("--protocol tips has no thresholds; leave --prob-threshold and "
                        "--area-threshold away")
    official = args.backbone and args.checkpoint and not Path(args.checkpoint).is_dir()
    for flag in ("positions", "save_student"):
        if getattr(args, flag) and not official:
            raise WrongCall(f"--{flag.replace('_', '-')} goes with an official checkpoint: "
                            "--backbone NAME --checkpoint FILE")
    if args.results and args.json:
        raise WrongCall("--results reads what --json wrote; leave --json away")
    if args.upsampler == ["anyup"] and (args.inference == "sliding-window"
                                        or args.refine == ["lposs+"]):
        raise WrongCall("--upsampler anyup enlarges a map of patches; sliding windows are joined, "
                        "and lposs+ ends, at pixels already")


def open_datasets(args):
    """What the flags ask for: a list of Dataset. Raises WrongCall or RunFailed."""
    if args.images is not None:
        if args.dataset:
            raise WrongCall("--dataset and --images exclude each other")
        if not args.classes:
            raise WrongCall("--images needs --classes, a file or names like \"cat, grass | lawn, "
                            "sky\"")
        classes = read_classes(args.classes, args.background)
        return [own_pictures(args.images, args.masks, classes, args.limit)]
    for flag in ("masks", "background"):
        if getattr(args, flag):
            raise WrongCall(f"--{flag} goes with --images")
    if args.dataset in (None, "demo"):
        return [demo_pictures(args.classes, args.limit)]
    if args.dataset not in ("all", *BENCHMARKS):
        raise WrongCall(f"--dataset {args.dataset}: unknown; known are demo, all, "
                        f"{', '.join(BENCHMARKS)}")
    if args.classes and args.dataset == "all":
        raise WrongCall("--classes renames the classes of one --dataset, not of all")
    return [open_benchmark(name, args.data_root, args.classes, args.limit)
            for name in (BENCHMARKS if args.dataset == "all" else [args.dataset])]


def usual_strides(backbone, window):
    return [min(window) // 2, default_stride(backbone.patch)]


def plain_methods(args, runtime, strides=usual_strides):
    """The ways to look at pictures, from the flags: a list of Method. strides: of a backbone and
    its window, where no flag says."""
    demo_as_it_is = args.dataset in (None, "demo") and not (
        args.images or args.inference or args.backbone or args.checkpoint or args.stride)
    compare = demo_as_it_is if args.compare is None else args.compare
    if args.inference and args.compare:
        raise WrongCall("--compare shows both kinds of inference; leave --inference away")
    slide = compare or args.inference == "sliding-window"
    if args.stride and not slide:
        raise WrongCall("--stride goes with --inference sliding-window or --compare")
    pretrained, student, origin = load_models(args, compare, runtime.device)
    slider = pretrained or student

    def method(name, title, backbone, stride=0):
        window = chosen_window(backbone, args.window, stride)
        return Method(name, title, backbone, origin, stride, window, args.batch_size,
                      runtime.autocast)

    if slide:
        window = chosen_window(slider, args.window, 1)
        strides = dict.fromkeys(args.stride or strides(slider, window))
    single = [method("single-pass", "single pass", pretrained)] if pretrained else []
    sliding = [method(f"sliding-window/{stride}", f"window, stride {stride}", slider, stride)
               for stride in strides] if slide else []
    spar = [method("spar", "SPAR, single pass", student)] if student else []
    return single + sliding + spar if compare else sliding or spar or single


def open_methods(args, runtime):
    """The rows of the table, from the flags: a list of Method."""
    protocol, anyup = PROTOCOLS[args.protocol], None
    strides = (lambda *_: protocol.strides) if protocol.strides else usual_strides
    methods = plain_methods(args, runtime, strides)
    single_pass = any(not method.stride for method in methods)
    if "anyup" in args.upsampler and single_pass and set(args.refine) != {"lposs+"}:
        anyup = AnyUp(args.anyup_model, args.hub_dir, args.random_init, runtime.device)
    lposs = Lposs(**{each.name: getattr(args, f"lposs_{each.name}") for each in fields(Lposs)})

    def rows(method):
        pairs = [(refine, None if method.stride or refine == "lposs+" or upsampler != "anyup"
                  else anyup) for refine in args.refine for upsampler in args.upsampler]
        return [replace(method, protocol=protocol, refine=refine, lposs=lposs, anyup=upsampler)
                for refine, upsampler in dict.fromkeys(pairs)]
    return [row for method in methods for row in rows(method)]


def choose_rule(method, dataset, scale, threshold, area_threshold):
    """The thresholds of a method on a data set: the protocol's, or the benchmark's for its
    backbone, but for those that are given. Raises WrongCall."""
    usual = benchmark_rule(dataset.name, method.origin) if method.refine == "none" else Rule()
    rule = method.protocol.rule or usual
    rule = Rule(rule.logit_scale if scale is None else scale,
                rule.threshold if threshold is None else threshold,
                rule.area_threshold if area_threshold is None else area_threshold)
    if not rule.logit_scale > 0 or not (0 <= rule.threshold < 1 and 0 <= rule.area_threshold < 1):
        raise WrongCall("--logit-scale must be positive, --prob-threshold and --area-threshold "
                        "from 0 to under 1")
    if (rule.threshold or rule.area_threshold) and not dataset.classes.background:
        raise WrongCall("--prob-threshold and --area-threshold send pixels to a background class, "
                        f"and {dataset.name} has none; give --background WORDS, or a first class "
                        "called background")
    return rule


def protocol_settings(args, runtime, methods):
    """What the numbers depend on, apart from the data: for --json, and to know whether an
    unfinished run is the same one."""
    hashes = {method.backbone: None for method in methods}
    hashes = {backbone: weights_hash(backbone) for backbone in hashes}
    anyup, window = next((m.anyup for m in methods if m.anyup), None), methods[0].window
    return {
        "checkpoint": args.checkpoint or (None if args.backbone else "runs/spar"),
        "backbone": methods[0].origin, "random_init": args.random_init,
        "weights": {method.label: hashes[method.backbone] for method in methods},
        "window": list(window) if window else None,
        "positions": methods[-1].backbone.positions,
        "resize": "bilinear without antialiasing on 8 bits, a short side so that the long one has "
                  "at most 2048; sides then resampled to multiples of the patch",
        "protocol": args.protocol, "templates": len(methods[0].protocol.templates),
        "upsampler": args.upsampler,
        "anyup": anyup and {"model": args.anyup_model, "weights": anyup.digest},
        "refine": args.refine,
        "lposs": {each.name: getattr(args, f"lposs_{each.name}") for each in fields(Lposs)},
        "limit": args.limit, "seed": args.seed, "precision": runtime.precision,
        "torch": torch.__version__, "open_clip": open_clip.__version__, "timm": timm.__version__,
        "numpy": np.__version__, "pillow": PIL.__version__}


def text_hash(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def files_state(dataset):
    """Path, size and date of each file of a data set, for JSON: what its counts depend on."""
    files = [dataset.root / image for image in dataset.images] + (dataset.masks or [])
    stats = [path.stat() if path.exists() else None for path in files]
    return [(str(path), stat and (stat.st_size, stat.st_mtime_ns))
            for path, stat in zip(files, stats)]


def journal_name(settings, dataset, texts, size, method, rule):
    """The name of a row's journal, which changes with everything that its counts depend on, the
    files' sizes and dates included."""
    # other rows may come and go
    settings = settings | {"weights": settings["weights"][method.label], "refine": method.refine,
                           "upsampler": method.upsampler,
                           "anyup": method.anyup and settings["anyup"]}
    key = [settings, dataset.classes.names, hashlib.sha256(texts.cpu().numpy()).hexdigest(),
           str(size), method.label, [rule.logit_scale, rule.threshold, rule.area_threshold],
           files_state(dataset)]
    label = method.label.replace("/", "-").replace(" ", "")
    name = f"{Path(dataset.name).name}-{label}-{size.asked or 'own'}-{text_hash(key)[:12]}.jsonl"
    return short_name(name, 200)


def maps_folder(save_maps, images, labelled):
    """Where maps go, or None. Raises WrongCall for a folder that the next run would read."""
    if not save_maps and labelled:
        return None
    maps = Path(save_maps or "runs/maps")
    if images and Path(images).is_dir() and maps.resolve().is_relative_to(Path(images).resolve()):
        raise WrongCall(f"--save-maps {maps} lies inside --images {images}, where the next run "
                        "would take the maps for pictures; give a folder outside")
    return maps


def subfolder(folder, name, among):
    """folder / name where there are several things to tell apart."""
    if folder is None or len(among) < 2:
        return folder
    return folder / name.replace("/", "-").replace(" ", "")


EXPORTED = {"checkpoint", "backbone", "random_init", "hub_dir", "dinov3_weights", "classes",
            "background", "seed", "export", "plain_onnx"}


def export_model(args):
    """--export. Raises WrongCall for flags that its file would not follow."""
    others = ["--" + name.replace("_", "-") for name, value in vars(parse_args([])).items()
              if name not in EXPORTED and value != getattr(args, name)]
    if others:
        raise WrongCall("--export writes a single pass in float32, with bilinear enlargement and "
                        f"no thresholds; leave away {', '.join(others)}")
    if args.background and not args.classes:
        raise WrongCall("--background goes with --classes")
    classes = read_classes(args.classes, args.background) if args.classes else None
    runtime = start_runtime("cpu", "fp32", args.seed)
    pretrained, student, _ = load_models(args, False, runtime.device)
    export(student or pretrained, args.export, classes, args.plain_onnx)


@speaks_flags
def main(args):
    check_flags(args)
    if args.export:
        return export_model(args)
    if args.results:
        results = read_results(args.results)
        print_results(results)
        return show(results, None, args.plot)
    datasets = open_datasets(args)
    if args.check_data:
        if sum(check_data(dataset, args.workers, args.limit is None) for dataset in datasets):
            raise RunFailed("the data has the problems listed above")
        return
    labelled = datasets[0].masks is not None
    if not labelled and (args.json or args.plot):
        raise WrongCall("--json and --plot hold scores, which need --masks")
    maps = maps_folder(args.save_maps, args.images, labelled)
    runtime = start_runtime(args.device, args.precision, args.seed)
    methods = open_methods(args, runtime)
    if args.save_student:
        if runtime.rank == 0:
            save_student(methods[-1].backbone, args)
        if not (args.dataset or args.images):
            return
    given = args.logit_scale, args.prob_threshold, args.area_threshold
    rules = [[choose_rule(method, dataset, *given) for method in methods] for dataset in datasets]
    for dataset in datasets:
        check_masks(dataset, runtime, args.workers)
    runtime.barrier()
    settings = protocol_settings(args, runtime, methods)
    if args.random_init and args.backbone and not args.checkpoint and runtime.rank == 0:
        print("RANDOM WEIGHTS (--random-init): times mean something, scores and maps do not")

    sizes = [Size(side) for side in dict.fromkeys(args.short_side or [])]
    sizes += [Size(area=side) for side in dict.fromkeys(args.area or [])]
    results, finished, protocol = [], [], PROTOCOLS[args.protocol]
    for dataset, dataset_rules in zip(datasets, rules):
        # the student's text tower is the pre-trained one
        texts = embed_texts(methods[-1].backbone, dataset.classes.flat, protocol.templates)
        for size in sizes or [protocol.size or dataset.size]:
            folder = subfolder(subfolder(maps, dataset.name, datasets), str(size.asked), sizes)
            rows = [Row(method, dataset, size, rule, Path(args.state) / journal_name(
                settings, dataset, texts, size, method, rule),
                subfolder(folder, method.label, methods))
                for method, rule in zip(methods, dataset_rules)]
            for row in rows:
                row.open(runtime)
            if runtime.rank == 0:
                announce(rows, args.state)
            for row in rows:
                evaluate(row, texts, runtime, args.workers)
            runtime.barrier()  # until all have written their counts
            if runtime.rank == 0:
                results += conclude(rows, folder)
                finished += rows
    if runtime.rank > 0:
        return
    if args.json:
        names = {dataset.name: dataset.classes.names for dataset in datasets}
        settings |= {"device": str(runtime.device), "processes": runtime.world,
                     "short_side": args.short_side, "area": args.area, "classes": names,
                     "names_sha256": {name: text_hash(each) for name, each in names.items()}}
        write_json(args.json, {"dataset": args.dataset or datasets[0].name, "results": results,
                               "settings": settings})
    show(results, args.json, args.plot)
    folder = Path(args.checkpoint or "runs/spar")
    scored = any(each["method"] == "spar" for each in results)
    if scored and not args.limit and (folder / "spar.json").is_file():
        try:
            write_card(folder, results)
        except RunFailed as error:  # somebody else's student, say
            print(f"the model card lacks these scores: {error}")
    for row in finished:
        row.journal.unlink(missing_ok=True)


if __name__ == "__main__":
    command_line(main, ARGS)
