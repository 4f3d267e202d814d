"""Stage 3: open-vocabulary segmentation with a student or a pre-trained backbone, scored or just shown (paper, section 4).

In: a student's folder (or a backbone's name), pictures, class names, and label masks if there are any. Out: a table of mIoU,
the same as JSON (--json), label maps, overlays and PCA pictures (--save-maps).

    python evaluate_ovs.py                                                     # the demo: pre-trained, sliding window, student
    python evaluate_ovs.py --images photo.jpg --classes "cat, grass | lawn"    # your own picture, your own words
    python evaluate_ovs.py --images pictures --masks masks --classes classes.txt --compare
    python evaluate_ovs.py --dataset voc21 --data-root /data --check-data      # look at a benchmark's files first
    torchrun --nproc-per-node 4 evaluate_ovs.py --dataset all --data-root /data --compare --json runs/all.json
    python evaluate_ovs.py --short-side 128 192 256 --json runs/sweep.json --plot runs/sweep.png
    python evaluate_ovs.py --results runs/sweep.json --plot runs/again.png     # tables and plot from what a run wrote

Interrupted, the same command continues. IoU of a class: its pixels in label and prediction over those in either, ignored pixels left out, in one
confusion matrix over all pictures; mIoU is the mean over classes that occur in labels or predictions.
"""
import argparse

# LPOSS: name, default, what it is. Defaults are those of the published code, for a network that sees patches of 16 pixels.
LPOSS = [("k", 400, "neighbours of a patch by its features, itself included"), ("gamma", 3.0, "power of a neighbour's cosine similarity"),
         ("sigma", 0.01, "decay per pixel of distance; smaller spreads labels further"), ("power", 1.0, "power of the distance"),
         ("alpha", 0.95, "weight of the neighbours against the patch's own similarities, under 1"),
         ("steps", 10, "of conjugate gradients, which are not run to convergence"),
         ("tau", 0.01, "lposs+: scale of colour differences, Lab / (100, 128, 128)"),
         ("reach", 6, "lposs+: pixels to each side that a pixel is joined with")]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to evaluate").add_argument
    add("--checkpoint", help="a student: a folder that distill.py wrote (default: runs/spar); or, with --backbone, a file with an official SPAR state dict")
    add("--backbone", help="evaluate this pre-trained model instead: tiny, siglip2, openclip, dinov3txt, siglip2-naflex, hf-hub:ORG/NAME, local-dir:PATH, ARCH/TAG")
    add("--random-init", action="store_true", help="the architecture (and AnyUp's) without weights, for timing and tests")
    add("--inference", choices=["single-pass", "sliding-window"], help="(default: single-pass)")
    add("--stride", "--strides", type=int, nargs="+", metavar="N",
        help="pixels between sliding windows; several give several rows (default: half the window, and 24)")
    add("--window", type=int, metavar="N", help="side of the sliding window in pixels (default: the size that the backbone was trained on)")
    add("--compare", action=argparse.BooleanOptionalAction,
        help="pre-trained single pass, pre-trained sliding window and student in one table (default: on for the demo)")
    add = parser.add_argument_group("on what").add_argument
    add("--dataset", choices=["demo", "voc21", "voc20", "cityscapes", "ade20k", "context60", "context59", "all"], metavar="NAME",
        help="demo (default, unless --images is given), voc21, voc20, cityscapes, ade20k, context60, context59, or all six benchmarks")
    add("--data-root", default="data", metavar="DIR", help="the folder of the benchmarks: DIR/VOCdevkit/VOC2012, DIR/cityscapes ... (%(default)s)")
    add("--check-data", action="store_true", help="only look at the files: counts, pairs, sizes, label ids")
    add("--images", metavar="PATH", help="own pictures: a folder, searched recursively, or one file")
    add("--masks", metavar="DIR", help="label masks of --images: PNG files of the same relative names, one channel of class numbers, 255 is ignored")
    add("--classes", metavar="FILE|NAMES", help="a file with one class a line and commas between synonyms, the first line is label 0; "
        "or \"cat, grass | lawn, sky\"; with --dataset: other names for its classes")
    add("--background", metavar="WORDS",
        help="own pictures: a class 0 before --classes for everything else, with what that may be: \"wall, floor, road\"")
    add("--limit", type=int, metavar="N", help="the first N pictures only")
    add = parser.add_argument_group("how").add_argument
    add("--short-side", type=int, nargs="+", metavar="N", help="resize pictures before inference so that the short side has N pixels, the long one "
        "at most 2048; several make a sweep over resolutions (default: the benchmark's, 672 mostly; own pictures: as they are)")
    add("--upsampler", nargs="+", choices=["bilinear", "anyup"], default=["bilinear"], help="of class similarities to pixels; both give two rows each. "
        "anyup, for the single pass only, takes its code and weights from torch.hub and a minute a picture on a CPU")
    add("--hub-dir", metavar="DIR", help="use this clone of github.com/wimmerth/anyup (its checkpoint beside hubconf.py) or of github.com/facebookresearch/dinov3 "
        "instead of the network; or a folder with both, named anyup and dinov3")
    add("--dinov3-weights", nargs=2, metavar=("BACKBONE", "TEXT"), help="dinov3txt: the two .pth files that Meta gives after its licence is accepted")
    add("--anyup-model", choices=["anyup_multi_backbone", "anyup"], default="anyup_multi_backbone",
        help="which published AnyUp weights (%(default)s: trained on several encoders)")
    add("--refine", nargs="+", choices=["none", "lposs", "lposs+"], default=["none"], help="label propagation over patches (lposs) and then over "
        "pixels (lposs+); several give several rows. Thresholds of benchmarks are for cosine similarities and do not apply")
    for name, default, text in LPOSS:
        add(f"--lposs-{name}", type=type(default), default=default, metavar="X", help=f"{text} (%(default)s)")
    add("--logit-scale", type=float, metavar="X", help="of similarities in the softmax that --prob-threshold looks at (default: the benchmark's, else 40)")
    add("--prob-threshold", type=float, metavar="P", help="less probable pixels become background (default: the benchmark's, else 0)")
    add("--area-threshold", type=float, metavar="P", help="classes that win no more of the foreground are left out (default: the benchmark's, else 0)")
    add("--batch-size", type=int, default=60, help="windows per forward pass (%(default)s)")
    add = parser.add_argument_group("what to write").add_argument
    add("--json", metavar="FILE", help="write the results with every setting to FILE")
    add("--plot", metavar="FILE", help="mIoU against resolution and against time (.png, .pdf, .svg)")
    add("--results", metavar="FILE", nargs="+", help="evaluate nothing: the tables and --plot of files that --json wrote, together")
    add("--save-maps", metavar="DIR",
        help="write label maps, overlays with a legend, PCA pictures and a contact sheet to DIR (own pictures without masks: runs/maps)")
    add("--state", metavar="DIR", default="runs/evaluate", help="where the counts of an unfinished run are kept, one folder for all processes (%(default)s)")
    add = parser.add_argument_group("with what").add_argument
    add("--workers", type=int, default=2, help="threads that read pictures ahead (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s: a GPU if there is one)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="of the matrix products (%(default)s: fp16 on a GPU, fp32 on a CPU)")
    add("--seed", type=int, default=0, help="of random weights (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":  # before torch is imported, so that --help and a wrong flag answer at once
    ARGS = parse_args()

import collections
import colorsys
import csv
import hashlib
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import PIL
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from common import (DEMO, DINOV3, IGNORE, Classes, Rule, RunFailed, Stitcher, WrongCall, append_json_line, atomic_path, bilinear_strips, check_window,
                    chosen_window, command_line, dense_features, embed_texts, encode_windows, first_line, fit_to_patches, hub_clone, label_map,
                    list_images, load_backbone, load_checkpoint, prefetch, prepare, read_classes, read_json, read_json_lines, resize_short_side,
                    single_pass_similarities, sliding_window_similarities, start_runtime, stitched_features, weights_hash, window_starts,
                    write_json, write_json_lines)
from data.benchmarks import (BENCHMARKS, Dataset, benchmark_classes, benchmark_files, benchmark_rule, check_data, check_masks, label_table,
                             load_sample)

SHEET_ROWS = 6  # pictures in the contact sheet


# ---- data ----------------------------------------------------------------------------------------------------------------

def open_datasets(args):
    """What the flags ask for. Raises WrongCall or RunFailed before anything long has run."""
    sides = list(dict.fromkeys(args.short_side or [])) or None
    if args.images is not None:
        if args.dataset:
            raise WrongCall("--dataset and --images exclude each other")
        if not args.classes:
            raise WrongCall("--images needs --classes, a file or names like \"cat, grass | lawn, sky\"")
        root, classes = Path(args.images), read_classes(args.classes, args.background)
        images = list_images(root)[:args.limit]
        root = root.parent if root.is_file() else root
        return [with_masks(str(args.images), root, images, args.masks, classes, sides)]
    for flag in ("masks", "background"):
        if getattr(args, flag):
            raise WrongCall(f"--{flag} goes with --images")
    if args.dataset in (None, "demo"):
        classes = read_classes(DEMO / "classes.txt")
        if args.classes:
            own = read_classes(args.classes)
            if len(own) != len(classes):
                raise WrongCall(f"--classes {args.classes} lists {len(own)} classes, but the demo has {len(classes)}; name own pictures with --images")
            classes = own
        root = DEMO / "test" / "images"
        return [with_masks("demo", root, list_images(root)[:args.limit], DEMO / "test" / "masks", classes, sides)]
    if args.classes and args.dataset == "all":
        raise WrongCall("--classes renames the classes of one --dataset, not of all")
    datasets = []
    for name in BENCHMARKS if args.dataset == "all" else [args.dataset]:
        root, *files = benchmark_files(name, args.data_root)
        datasets.append(Dataset(name, root, *(each[:args.limit] for each in files), benchmark_classes(name, args.classes),
                                sides or [BENCHMARKS[name].short_side], BENCHMARKS[name].layout.count))
    return datasets


def with_masks(name, root, images, mask_root, classes, short_sides):
    """A data set of own pictures: a mask is the PNG file of the same relative name."""
    if mask_root is None:
        return Dataset(name, root, images, None, None, classes, short_sides or [None])
    masks = [Path(mask_root) / Path(image).with_suffix(".png") for image in images]
    for mask, times in collections.Counter(masks).items():
        if times > 1:
            raise RunFailed(f"{mask} would be the mask of several pictures: {', '.join(i for i, m in zip(images, masks) if m == mask)}")
    return Dataset(name, root, images, masks, [label_table("plain", len(classes))] * len(masks), classes, short_sides or [None])


# ---- label propagation: LPOSS (Stojnic et al., CVPR 2025), with the student in the places of its two backbones (paper, supplement 9) ----------

def conjugate_gradients(apply, targets, steps, tolerance=1e-6):
    """Solve apply(X) = targets from 0, one system a row, each with its own step sizes: targets (Q, ...) -> (Q, ...).

    A row that has come below tolerance times its target stays as it is; a row of zeros stays zero.
    """
    def dot(a, b):
        return (a * b).flatten(1).sum(1, dtype=torch.float64)

    def times(scales, rows):
        return scales.to(rows.dtype).view(-1, *[1] * (rows.ndim - 1)) * rows

    solution, residual, direction = torch.zeros_like(targets), targets.clone(), targets.clone()
    power = dot(residual, residual)
    limit = tolerance ** 2 * power
    for _ in range(steps):
        active = power > limit
        applied = apply(direction)
        step = torch.where(active, power / dot(direction, applied), 0)
        solution += times(step, direction)
        residual -= times(step, applied)
        before, power = power, dot(residual, residual)
        direction = residual + times(torch.where(active, power / before, 0), direction)
    return solution


def patch_graph(features, centres, k, gamma, sigma, power, values=2 ** 24):
    """LPOSS' normalised adjacency S = D^-1/2 (A + A^T) D^-1/2 of patches: (M, M) sparse float64, its entries computed in float32.

    features: (M, D), L2-normalised; centres: (M, 2) in pixels of the network's input. A joins each patch with its k nearest by
    features, weighted by cosine^gamma * exp(-sigma * distance^power); no patch with itself. values: floats held at a time.
    """
    count = len(features)
    k, part = min(k, count), max(1, values // count)
    neighbours, weights = [], []
    for first in range(0, count, part):
        cosine, index = (features[first:first + part] @ features.T).topk(k)  # (part, k)
        distance = (centres[first:first + part, None] - centres[index]).norm(dim=-1)
        neighbours.append(index)
        weights.append(cosine.clamp(min=0) ** gamma * torch.exp(-sigma * distance ** power))
    neighbours, weights = torch.cat(neighbours).flatten(), torch.cat(weights).flatten()
    owners = torch.arange(count, device=features.device).repeat_interleave(k)
    weights[owners == neighbours] = 0
    edges = torch.stack([torch.cat([owners, neighbours]), torch.cat([neighbours, owners])])
    graph = torch.sparse_coo_tensor(edges, torch.cat([weights, weights]), (count, count), check_invariants=False)
    graph = graph.coalesce()  # mutual neighbours get the sum of both weights
    (rows, columns), weights = graph.indices(), graph.values()
    degrees = torch.zeros(count, device=features.device).index_add_(0, rows, weights)
    scale = torch.where(degrees > 0, degrees, 1).rsqrt()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR tensors beta
        return torch.sparse_coo_tensor(graph.indices(), (weights * scale[rows] * scale[columns]).double(), (count, count), is_coalesced=True,
                                       check_invariants=False).to_sparse_csr()


def propagate_patches(features, centres, similarities, args):
    """LPOSS: (M, D) L2-normalised features, (M, 2) centres, (M, N) cosine similarities -> propagated similarities (M, N) float32.

    (1 - alpha) (I - alpha S)^-1 applied to each name's column; the factor only keeps the range of a similarity.
    """
    graph = patch_graph(features, centres, args.lposs_k, args.lposs_gamma, args.lposs_sigma, args.lposs_power)
    solution = conjugate_gradients(lambda rows: rows - args.lposs_alpha * (graph @ rows.T).T, similarities.T.double(), args.lposs_steps)
    return (1 - args.lposs_alpha) * solution.T.float()


def rgb_to_lab(image):
    """sRGB (3, H, W) uint8 -> CIE L*a*b* for white D65, (3, H, W) float32."""
    rgb = image.float() / 255
    rgb = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = torch.tensor([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]], device=image.device)
    x, y, z = (to_xyz @ rgb.flatten(1)).view_as(rgb) / torch.tensor([0.95047, 1.0, 1.08883], device=image.device).view(3, 1, 1)
    x, y, z = (torch.where(v > 0.008856, v.clamp(min=1e-9) ** (1 / 3), 7.787 * v + 16 / 116) for v in (x, y, z))
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


class PixelGraph:
    """LPOSS+'s normalised adjacency of pixels: each joined with the square around it by exp(-colour difference / tau).

    image: (3, H, W) uint8. There is no matrix: one map of weights for each half of the offsets, (2 reach^2 + 2 reach) x H x W floats
    (84 for a reach of 6), and products of shifted maps.
    """

    def __init__(self, image, reach, tau):
        height, width = image.shape[-2:]
        lab = rgb_to_lab(image) / torch.tensor([100.0, 128.0, 128.0], device=image.device).view(3, 1, 1)
        self.reach, self.size = reach, (height, width)
        self.offsets = [(dy, dx) for dy in range(reach + 1) for dx in range(-reach, reach + 1) if (dy, dx) > (0, 0)]
        # weights[d, reach + y, reach + x] joins (y, x) with (y, x) + offset d; 0 where that lies outside
        self.weights = lab.new_zeros(len(self.offsets), height + 2 * reach, width + 2 * reach)
        for weights, (dy, dx) in zip(self.weights, self.offsets):
            if dy < height and abs(dx) < width:
                here, there = lab[:, :height - dy, max(0, -dx):width - max(0, dx)], lab[:, dy:, max(0, dx):width + min(0, dx)]
                weights[reach:reach + height - dy, reach + max(0, -dx):reach + width - max(0, dx)] = torch.exp(-(here - there).norm(dim=0) / tau)
        degrees = self.apply(torch.ones(1, height, width, device=image.device))[0]
        scale = F.pad(torch.where(degrees > 0, degrees, 1).rsqrt(), (reach,) * 4)
        for weights, (dy, dx) in zip(self.weights, self.offsets):
            weights *= scale * scale.roll((-dy, -dx), (0, 1))

    def apply(self, maps, rows=64):
        """(Q, H, W) -> the product with the adjacency, (Q, H, W); a CPU goes by strips that stay in its cache."""
        (height, width), reach = self.size, self.reach
        padded, products = F.pad(maps, (reach,) * 4), torch.zeros_like(maps)
        for first in range(0, height, rows if maps.device.type == "cpu" else height):
            out = products[:, first:first + (rows if maps.device.type == "cpu" else height)]

            def shifted(values, dy, dx):
                return values[..., reach + first + dy:reach + first + dy + out.shape[1], reach + dx:reach + dx + width]

            for weights, (dy, dx) in zip(self.weights, self.offsets):
                out.addcmul_(shifted(weights, 0, 0), shifted(padded, dy, dx))
                out.addcmul_(shifted(weights, -dy, -dx), shifted(padded, -dy, -dx))
        return products


def propagate_pixels(image, similarities, args, values=2 ** 24):
    """LPOSS+: (3, H, W) uint8 and its similarities (h, w, N), stretched to (H, W) -> propagated similarities (H, W, N) float32.

    In float32: ten steps on so well conditioned a system lose no digit that a label depends on. values: floats of one map held at a time.
    """
    height, width = image.shape[-2:]
    graph = PixelGraph(image, args.lposs_reach, args.lposs_tau)
    propagated = similarities.new_empty(similarities.shape[2], height, width)
    part = max(1, values // (height * width))
    for first in range(0, len(propagated), part):
        maps = bilinear_strips(similarities[..., first:first + part], (height, width))(0, height).contiguous()
        propagated[first:first + part] = conjugate_gradients(lambda rows: rows - args.lposs_alpha * graph.apply(rows), maps, args.lposs_steps)
    return (1 - args.lposs_alpha) * propagated.permute(1, 2, 0)


# ---- AnyUp (Wimmer et al., 2025): its published network on class similarities, in tiles ------------------------------------------------

class AnyUp(torch.nn.Module):
    """Guided upsampling of similarities by the published code and weights, of which only the attention is computed differently.

    The published attention masks each pixel to a tenth of the picture around it with a matrix of pixels x patches (17 GB at 1024 x 2048); here
    each tile of pixels meets only the patches that its mask lets through. What remains is the encoders' memory, 3 kB a pixel, in fp32.
    """

    def __init__(self, args, device):
        super().__init__()
        checkpoint = {"anyup": "anyup_paper.pth", "anyup_multi_backbone": "anyup_multi_backbone.pth"}[args.anyup_model]
        clone = hub_clone("anyup", args.hub_dir)
        local = clone and clone / checkpoint
        if local and not args.random_init and not local.is_file():
            raise RunFailed(f"{local} does not exist; fetch it from the releases of https://github.com/wimmerth/anyup")
        try:
            self.model = torch.hub.load(str(clone or "wimmerth/anyup"), args.anyup_model, source="local" if clone else "github", verbose=False,
                                        trust_repo=True, pretrained=not (args.random_init or local), device=device)
            if local and not args.random_init:
                self.model.load_state_dict(torch.load(local, map_location=device, weights_only=True))
        except Exception as error:  # torch.hub and the code it loads raise many types
            raise RunFailed(f"--upsampler anyup cannot be loaded: {first_line(error)}. Without network, clone "
                            f"https://github.com/wimmerth/anyup elsewhere, put {checkpoint} of its releases into the clone and give --hub-dir CLONE") from error
        self.digest = hashlib.sha256(b"".join(parameter.detach().cpu().numpy().tobytes() for parameter in self.model.parameters())).hexdigest()
        self.block, self.model.cross_decode, self.model.rope = self.model.cross_decode, Keep(), InParts(self.model.rope)
        for module in self.model.modules():
            if isinstance(module, torch.nn.SiLU):
                module.inplace = True  # all of them follow a normalisation, whose output nobody else needs
        self.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def strips(self, image, similarities, size, tile=32):
        """(3, H, W) uint8, (h, w, N) -> a function of (first, last) that gives these rows at `size`: (N, rows, W). See bilinear_strips."""
        mean, std = (torch.tensor(v, device=similarities.device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        guide = (image.to(similarities.device).float() / 255 - mean) / std
        queries, keys, values = self.model(guide[None], similarities.permute(2, 0, 1)[None], tuple(size))  # (1, C, H, W), (1, C, h, w), (1, N, h, w)
        attention, (height, width) = self.block.cross_attn, keys.shape[-2:]
        heads, channels = attention.attention.num_heads, queries.shape[1]
        projection = attention.attention
        (query_weight, key_weight, _), (query_bias, key_bias, _) = projection.in_proj_weight.chunk(3), projection.in_proj_bias.chunk(3)
        keys = F.linear(attention.norm_k(keys[0].permute(1, 2, 0)), key_weight, key_bias).unflatten(-1, (heads, -1))  # (h, w, heads, C')
        values = values[0].permute(1, 2, 0)  # (h, w, N)
        rows, columns = (self.reach(inputs, outputs) for inputs, outputs in zip((height, width), size))

        def one_tile(projected, top, left):
            near_rows, near_columns = rows[top:top + projected.shape[0]], columns[left:left + projected.shape[1]]
            used = [slice(int(near[:, 0].min()), int(near[:, 1].max())) for near in (near_rows, near_columns)]
            patches = [torch.arange(span.start, span.stop) for span in used]
            allowed = [((index >= near[:, :1]) & (index < near[:, 1:])).to(projected.device) for index, near in zip(patches, (near_rows, near_columns))]
            mask = (allowed[0][:, None, :, None] & allowed[1][None, :, None, :]).flatten(0, 1).flatten(1)  # (pixels, patches)
            some = keys[used[0], used[1]].flatten(0, 1)  # (patches, heads, C')
            scores = torch.einsum("qhc,khc->hqk", projected.flatten(0, 1).unflatten(-1, (heads, -1)), some) * (channels // heads) ** -0.5
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).mean(0)
            return (weights @ values[used[0], used[1]].flatten(0, 1)).unflatten(0, projected.shape[:2])  # (rows, columns, N)

        def strip(first, last):
            joined = []
            for top in range(first, last, tile):
                bottom = min(top + tile, last)
                above = max(top - 1, 0)
                smooth = self.block.conv2d(queries[:, :, above:bottom + 1])[0, :, top - above:top - above + bottom - top]  # with one row of halo
                projected = F.linear(attention.norm_q(smooth.permute(1, 2, 0)), query_weight, query_bias)  # (rows, W, C)
                joined.append(torch.cat([one_tile(projected[:, left:left + tile], top, left) for left in range(0, size[1], tile)], 1))
            return torch.cat(joined).permute(2, 0, 1)
        return strip

    def reach(self, inputs, outputs):
        """First and past-the-last patch that each pixel of an axis attends to: (outputs, 2). In float32 and in the published order of operations."""
        centres = (torch.arange(outputs, dtype=torch.float32) + 0.5) / outputs
        low, high = (centres - self.block.window_ratio).clamp(0, 1), (centres + self.block.window_ratio).clamp(0, 1)
        return torch.stack([(low * inputs).floor().long(), (high * inputs).ceil().long()], 1)


class InParts(torch.nn.Module):
    """AnyUp's positional encoding, some positions at a time: as a whole it is the network's peak of memory."""

    def __init__(self, encode):
        super().__init__()
        self.encode = encode

    def forward(self, values, coordinates, part=2 ** 16):
        encoded = torch.empty_like(values)  # (1, H * W, C)
        for first in range(0, values.shape[1], part):
            encoded[:, first:first + part] = self.encode(values[:, first:first + part], coordinates[:, first:first + part])
        return encoded


class Keep(torch.nn.Module):
    """In the place of AnyUp's attention: hands its inputs out."""

    def forward(self, queries, keys, values, **_):
        return queries, keys, values


# ---- methods -----------------------------------------------------------------------------------------------------------

@dataclass
class Method:
    """One row of the table: a backbone, how it looks at a picture (stride 0 is the single pass), and what happens to the similarities."""
    name: str  # single-pass, sliding-window/STRIDE or spar
    title: str
    backbone: object
    origin: str  # the --backbone value that it, or its teacher, was loaded by: thresholds go by it
    stride: int = 0
    refine: str = "none"
    upsampler: str = "bilinear"

    @property
    def label(self):
        return label_of(self.name, self.refine, self.upsampler)

    @torch.no_grad()
    def predict(self, image, size, classes, texts, rule, anyup, args, runtime):
        """(3, H, W) uint8 -> class of each pixel, (*size) int64."""
        if self.refine != "none":
            similarities = self.propagated(image, size, texts, args, runtime)  # (h, w, N)
            if self.refine == "lposs+":
                similarities = propagate_pixels(fit_to_patches(image, self.backbone.patch).to(similarities.device), similarities, args)
            similarities, classes = best_synonyms(similarities, classes), Classes([[title] for title in classes.titles], classes.background)
        elif self.stride:
            similarities = sliding_window_similarities(self.backbone, image, texts, size, window_of(self.backbone, args), self.stride, args.batch_size,
                                                       runtime.autocast)
        else:
            similarities = single_pass_similarities(self.backbone, image, texts, runtime.autocast)
        if self.upsampler == "anyup":
            strips = anyup.strips(fit_to_patches(image, self.backbone.patch), similarities, size)
        else:
            strips = bilinear_strips(similarities, size)
        return label_map(strips, size, classes, rule).cpu()  # so the device has finished

    def propagated(self, image, size, texts, args, runtime):
        """LPOSS over the patches of the single pass, (h, w, N); or over those of all windows in one graph, and then stitched, (*size, N)."""
        backbone = self.backbone
        picture = prepare(backbone, image)
        window = window_of(backbone, args) if self.stride else picture.shape[-2:]
        stride = self.stride or max(window)
        maps = Collected()
        encode_windows(backbone, [picture], [maps], window, stride, args.batch_size, runtime.autocast, lambda each: F.normalize(each, dim=-1))
        maps = torch.cat(maps)  # (n, i, j, D)
        starts = [window_starts(length, side, stride) for length, side in zip(picture.shape[-2:], window)]
        corners = torch.cartesian_prod(*map(torch.tensor, starts))  # (n, 2), in reading order
        cells = torch.stack(torch.meshgrid(*(torch.arange(side) for side in maps.shape[1:3]), indexing="ij"), -1)  # (i, j, 2)
        centres = (corners[:, None, None] + backbone.patch * cells + backbone.patch / 2).to(maps.device)  # (n, i, j, 2)
        flat = maps.flatten(0, 2)
        similarities = propagate_patches(flat, centres.flatten(0, 2).float(), flat @ texts.T, args).unflatten(0, maps.shape[:3])
        if not self.stride:
            return similarities[0]
        stitcher = Stitcher(picture.shape[-2:], window, stride, backbone.patch, 1, picture.shape[-2:] if self.refine == "lposs+" else size, maps.device)
        stitcher.add(similarities)
        return stitcher.result()

    def features(self, image, args, runtime):
        """The features behind it, for a picture of their principal components: (h, w, D)."""
        if self.stride == 0:
            return dense_features(self.backbone, image, runtime.autocast)
        with torch.no_grad():
            return stitched_features(self.backbone, [prepare(self.backbone, image)], window_of(self.backbone, args), self.stride, args.batch_size,
                                     runtime.autocast)[0]


def label_of(name, refine, upsampler):
    """What a row is called: "spar", "spar +lposs", "single-pass +anyup" ..."""
    return " ".join([name] + [f"+{refine}"] * (refine != "none") + [f"+{upsampler}"] * (upsampler != "bilinear"))


class Collected(list):
    """In the place of a Stitcher: keeps the windows' maps as they come."""
    add = list.append


def best_synonyms(similarities, classes):
    """(h, w, N) -> the largest among each class's names, (h, w, K)."""
    owner = classes.owner.to(similarities.device).expand(similarities.shape)
    return similarities.new_full((*similarities.shape[:2], len(classes)), -torch.inf).scatter_reduce(2, owner, similarities, "amax")


def window_of(backbone, args):
    return (args.window, args.window) if args.window else backbone.window


def open_methods(args, runtime):
    """The rows of the table, from the flags."""
    plain_demo = args.dataset in (None, "demo") and not (args.images or args.inference or args.backbone or args.checkpoint or args.stride)
    compare = plain_demo if args.compare is None else args.compare
    if args.backbone and args.checkpoint and not Path(args.checkpoint).is_file():
        raise WrongCall(f"--checkpoint {args.checkpoint} with --backbone must be a file with an official SPAR state dict; a student's folder needs no --backbone")
    if args.backbone and args.compare and not args.checkpoint:
        raise WrongCall("--compare needs a student; give --checkpoint instead of --backbone, which follows from it")
    if args.inference and args.compare:
        raise WrongCall("--compare shows both kinds of inference; leave --inference away")
    if args.stride and not compare and args.inference != "sliding-window":
        raise WrongCall("--stride goes with --inference sliding-window or --compare")
    if args.upsampler == ["anyup"] and (args.inference == "sliding-window" or args.refine == ["lposs+"]):
        raise WrongCall("--upsampler anyup enlarges a map of patches; sliding windows are joined, and lposs+ ends, at pixels already")
    files = {"hub_dir": args.hub_dir, "dinov3_weights": args.dinov3_weights}
    if args.backbone:
        origin, random_init = args.backbone, args.random_init
        model = load_backbone(origin, random_init, runtime.device, text=True, **files)
        if args.checkpoint:
            load_checkpoint(model, args.checkpoint)
        pretrained, student = (None, model) if args.checkpoint else (model, None)
    else:
        folder = Path(args.checkpoint or "runs/spar")
        if not folder.is_dir():
            raise RunFailed(f"{folder} is no folder with a student; distill.py writes one; an official checkpoint file needs --backbone with it" if folder.exists() else
                            f"{folder} does not exist; distill.py writes a student there, or give --backbone for a pre-trained model")
        teacher = read_json(folder / "spar.json", "distill.py")["teacher"] if compare or (folder / "spar.json").is_file() else {"backbone": str(folder)}
        origin, random_init = teacher["backbone"], teacher.get("random_init", False)
        files = {key: value or teacher.get(key) for key, value in files.items()}
        if not any((folder / name).is_file() for name in ("open_clip_config.json", DINOV3)):
            raise RunFailed(f"{folder} holds no finished student: the distill.py command that began it continues, and writes one")
        pretrained, student = None, load_backbone(folder.absolute(), device=runtime.device, text=True, **files)
    if compare:
        pretrained = load_backbone(origin, random_init, runtime.device, **files)
    model = pretrained or student
    strides = []
    if compare or args.inference == "sliding-window":
        window = chosen_window(model, args.window, 1)
        strides = list(dict.fromkeys(args.stride or [min(window) // 2, 24]))
        for stride in strides:
            check_window(window, stride, model.patch)

    def rows(name, title, backbone, stride=0):
        pairs = [(refine, "bilinear" if stride or refine == "lposs+" else upsampler) for refine in args.refine for upsampler in args.upsampler]
        return [Method(name, title, backbone, origin, stride, *pair) for pair in dict.fromkeys(pairs)]

    sliding = [row for stride in strides for row in rows(f"sliding-window/{stride}", f"window, stride {stride}", model, stride)]
    if compare:
        return rows("single-pass", "single pass", pretrained) + sliding + rows("spar", "SPAR, single pass", student)
    if args.inference == "sliding-window":
        return sliding
    return rows("spar", "SPAR, single pass", student) if student else rows("single-pass", "single pass", pretrained)


def rule_of(method, dataset, args):
    """The thresholds of a method on a data set: the benchmark's for its backbone, overridden by the flags. Raises WrongCall."""
    rule = benchmark_rule(dataset.name, method.origin) if dataset.name in BENCHMARKS and method.refine == "none" else Rule()
    given = (args.logit_scale, args.prob_threshold, args.area_threshold)
    rule = Rule(*(default if value is None else value for value, default in zip(given, (rule.logit_scale, rule.threshold, rule.area_threshold))))
    if not rule.logit_scale > 0 or not (0 <= rule.threshold < 1 and 0 <= rule.area_threshold < 1):
        raise WrongCall("--logit-scale must be positive, --prob-threshold and --area-threshold from 0 to under 1")
    if (rule.threshold or rule.area_threshold) and not dataset.classes.background:
        raise WrongCall(f"--prob-threshold and --area-threshold send pixels to a background class, and {dataset.name} has none; "
                        "give --background WORDS, or a first class called background")
    return rule


# ---- scores ----------------------------------------------------------------------------------------------------------

def confusion_matrix(labels, predictions, count):
    """Pixels by label (rows) and prediction (columns): (count, count) int64. Label 255 counts nowhere."""
    kept = labels != IGNORE
    return torch.bincount(labels[kept] * count + predictions[kept], minlength=count * count).view(count, count)


def scores(confusion):
    """(IoU of each class in percent, nan for a class in neither labels nor predictions; their mean; pixel accuracy in percent)."""
    confusion = confusion.double()
    hits = confusion.diagonal()
    iou = 100 * hits / (confusion.sum(0) + confusion.sum(1) - hits)
    return iou, iou.nanmean().item(), (100 * hits.sum() / confusion.sum()).item()


class Tally:
    """The counts of one method on one data set: a line for each picture in a file, where an interrupted run continues and torchrun's processes meet.

    So the final confusion matrix is one exact sum, however the pictures were shared out. The file's name holds a hash of all settings.
    """

    def __init__(self, path, count, runtime):
        self.path, self.count = path, count
        if runtime.rank == 0:  # without a line that was cut short, and without the failures, which are tried again
            write_json_lines(path, [entry for entry in read_json_lines(path) if "counts" in entry])
        runtime.barrier()
        self.read()
        runtime.barrier()

    def read(self):
        self.confusion, self.seconds, self.done, self.failed = torch.zeros(self.count, self.count, dtype=torch.int64), [], set(), {}
        for entry in read_json_lines(self.path):
            if "error" in entry:
                self.failed[entry["image"]] = entry["error"]
            elif entry["image"] not in self.done:
                self.confusion.view(-1)[entry["cells"]] += torch.tensor(entry["counts"], dtype=torch.int64)
                self.seconds.append(entry["seconds"])
                self.done.add(entry["image"])

    def add(self, image, labels, predictions, seconds):
        confusion = confusion_matrix(labels, predictions, self.count)
        cells = confusion.view(-1).nonzero()[:, 0]
        append_json_line(self.path, {"image": image, "seconds": seconds, "cells": cells.tolist(), "counts": confusion.view(-1)[cells].tolist()})
        self.confusion += confusion
        self.seconds.append(seconds)
        self.done.add(image)

    def fail(self, image, error):
        append_json_line(self.path, {"image": image, "error": error})


def result_row(method, dataset, short_side, rule, tally):
    """One entry of the JSON's results."""
    if not tally.confusion.any():
        raise RunFailed(f"{dataset.name}: no pixel of these masks counts, so there is nothing to score ({IGNORE} is ignored)")
    iou, miou, accuracy = scores(tally.confusion)
    return {"dataset": dataset.name, "method": method.name, "refine": method.refine, "upsampler": method.upsampler, "short_side": short_side,
            "miou": miou, "pixel_accuracy": accuracy, "images": len(tally.done), "unreadable": sorted(tally.failed),
            "seconds_per_image": float(np.mean(tally.seconds)),
            "logit_scale": rule.logit_scale, "prob_threshold": rule.threshold, "area_threshold": rule.area_threshold,
            "per_class_iou": {title: None if value != value else value for title, value in zip(dataset.classes.titles, iou.tolist())}}


def row_label(row):
    return label_of(row["method"], row["refine"], row["upsampler"])


def print_table(rows):
    """Per-class IoU of one data set at one size, a column for each method."""
    names = list(dict.fromkeys(name for row in rows for name in row["per_class_iou"]))
    width, cell = max(len("pixel accuracy"), *map(len, names)) + 2, max(20, *(len(row_label(row)) + 2 for row in rows))
    print("\n" + " " * width + "".join(f"{row_label(row):>{cell}}" for row in rows))
    for name in names:
        values = [row["per_class_iou"].get(name) for row in rows]
        print(f"{name:<{width}}" + "".join(f"{'-' if value is None else f'{value:.1f}':>{cell}}" for value in values))
    for title, key, digits in (("mIoU", "miou", 1), ("pixel accuracy", "pixel_accuracy", 1), ("seconds/image", "seconds_per_image", 3)):
        print(f"{title:<{width}}" + "".join(f"{row[key]:>{cell}.{digits}f}" for row in rows))


def warn_of_nonsense(method, confusion, classes):
    """Scores that a wrong label order, size or normalisation would give."""
    _, _, accuracy = scores(confusion)
    share, winner = (confusion.sum(0) / confusion.sum()).max(0)
    if len(classes) > 2 and accuracy < 200 / len(classes):
        print(f"warning: {method.label}: pixel accuracy {accuracy:.1f} % is less than twice that of guessing; are the class names in the labels' order?")
    if share > 0.9 and confusion.sum(1).max() < 0.9 * confusion.sum():
        print(f"warning: {method.label}: {100 * share:.0f} % of all pixels became '{classes.titles[winner]}'")


def print_summary(rows):
    """mIoU of every method by data set and short side, where there are several, and its average over the data sets."""
    columns = list(dict.fromkeys((row["dataset"], row["short_side"]) for row in rows))
    datasets, sides = list(dict.fromkeys(name for name, _ in columns)), list(dict.fromkeys(side for _, side in columns))
    if len(columns) == 1:
        return
    methods = list(dict.fromkeys(row_label(row) for row in rows))
    cells = {(row_label(row), row["dataset"], row["short_side"]): row["miou"] for row in rows}
    by_side = len(sides) > 1 and len(datasets) < len(columns)
    titles = [" ".join([name] * (len(datasets) > 1) + [str(side or "own size")] * by_side) for name, side in columns]
    averaged = len(datasets) > 1 and len(datasets) == len(columns)
    width, cell = max(map(len, methods)) + 2, max(10, *(len(title) + 2 for title in titles))
    print("\n" + f"{'mIoU':<{width}}" + "".join(f"{title:>{cell}}" for title in titles + ["average"] * averaged))
    for method in methods:
        line = [cells.get((method, *column), float("nan")) for column in columns]
        line += [float(np.mean(line))] * averaged
        print(f"{method:<{width}}" + "".join(f"{'-' if value != value else f'{value:.1f}':>{cell}}" for value in line))


def plot(rows, path):
    """mIoU against milliseconds, a line for each method through its resolutions; where there are several of them, also against resolution.

    Both average over the data sets that a method was evaluated on.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    sweep = len({row["short_side"] for row in rows} - {None}) > 1
    points = {}  # method -> short side -> its rows
    for row in rows:
        points.setdefault(row_label(row), {}).setdefault(row["short_side"] if sweep else None, []).append(row)
    figure, panels = plt.subplots(1, 1 + sweep, figsize=(6 + 5 * sweep, 4), layout="constrained", squeeze=False)
    for position, (method, by_side) in enumerate(points.items()):
        marks = sorted(by_side.items(), key=lambda item: item[0] or 0)
        miou = [np.mean([row["miou"] for row in each]) for _, each in marks]
        style = {"marker": "os^Dv*PX"[position % 8], "label": method}
        panels[0, -1].plot([1e3 * np.mean([row["seconds_per_image"] for row in each]) for _, each in marks], miou, **style)
        if sweep:
            panels[0, 0].plot(*zip(*[(side, value) for (side, _), value in zip(marks, miou) if side]), **style)
            panels[0, 0].set(xlabel="short side of the picture in pixels", ylabel="mIoU")
    panels[0, -1].set(xscale="log", xlabel="milliseconds per image, all of inference", ylabel="mIoU")
    for panel in panels.flat:
        panel.grid(alpha=0.3, which="both")
    panels[0, -1].legend(fontsize=8)
    figure.suptitle(", ".join(dict.fromkeys(row["dataset"] for row in rows)), fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


# ---- pictures of the results ---------------------------------------------------------------------------------------------

def palette(classes):
    """Distinct colours by golden-ratio steps around the hue circle, grey for a background, black for what is ignored: (256, 3) uint8."""
    colours = np.zeros((256, 3), np.uint8)
    for k in range(len(classes)):
        colours[k] = [round(255 * c) for c in colorsys.hsv_to_rgb(k * 0.618034 % 1, (0.85, 0.6, 0.45)[k % 3], (0.95, 0.75, 0.55)[k // 3 % 3])]
    if classes.background:
        colours[0] = 90
    return colours


def palette_picture(labels, classes):
    picture = Image.fromarray(labels.numpy().astype(np.uint8))
    picture.putpalette(palette(classes).ravel().tolist())
    return picture


def overlay_picture(image, labels, classes):
    """The picture under its class colours, with a legend of the classes and their share of the area."""
    colours = palette(classes)
    blend = (0.45 * image.permute(1, 2, 0).numpy() + 0.55 * colours[labels.numpy()]).astype(np.uint8)
    shares = torch.bincount(labels.flatten(), minlength=len(classes)) / labels.numel()
    shown = [k for k in shares.argsort(descending=True).tolist() if shares[k] >= 0.001]
    line, font = 18, ImageFont.load_default(13)
    sheet = Image.new("RGB", (blend.shape[1] + 190, max(blend.shape[0], line * len(shown) + 8)), "white")
    sheet.paste(Image.fromarray(blend))
    draw = ImageDraw.Draw(sheet)
    for row, k in enumerate(shown):
        left, top = blend.shape[1] + 10, 6 + row * line
        draw.rectangle([left, top, left + 12, top + 12], fill=tuple(colours[k].tolist()))
        draw.text((left + 20, top - 2), f"{classes.titles[k]}  {100 * shares[k]:.1f} %", fill="black", font=font)
    return sheet


def pca_picture(features, size):
    """The first three principal components of L2-normalised features as red, green and blue: (h, w, D) -> a picture of size (H, W)."""
    flat = F.normalize(features.flatten(0, 1).float().cpu(), dim=-1)
    flat = flat - flat.mean(0)
    components = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(1)  # (D, 3), the largest first
    scores = flat @ (components * torch.sign(components.sum(0)))  # (h * w, 3)
    low, high = scores.quantile(0.02, 0), scores.quantile(0.98, 0)
    pixels = ((scores - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).view(*features.shape[:2], -1)
    return Image.fromarray((255 * pixels).byte().numpy()).resize((size[1], size[0]), Image.BILINEAR)


def contact_sheet(rows, titles, classes, height=150):
    """Pictures side by side: rows of ((3, H, W) uint8, then label maps (H, W)) under column titles, with a legend below."""
    colours, font, gap = palette(classes), ImageFont.load_default(13), 4
    strips = []
    for image, *label_maps in rows:
        pixels = image.permute(1, 2, 0).numpy()
        cells = [pixels] + [(0.25 * pixels + 0.75 * colours[labels.numpy()]).astype(np.uint8) for labels in label_maps]
        strips.append([Image.fromarray(cell).resize((max(1, round(height * cell.shape[1] / cell.shape[0])), height), Image.BILINEAR) for cell in cells])
    width = max(150, *(strip[0].width for strip in strips))
    shown = sorted({k for _, *label_maps in rows for labels in label_maps for k in labels.unique().tolist() if k < len(classes)})
    per_line = max(1, (width + gap) * len(titles) // 130)
    sheet = Image.new("RGB", ((width + gap) * len(titles), 22 + (height + gap) * len(strips) + 18 * -(-len(shown) // per_line) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((column * (width + gap) + 2, 3), title, fill="black", font=font)
        for row, strip in enumerate(strips):
            sheet.paste(strip[column], (column * (width + gap), 22 + row * (height + gap)))
    for position, k in enumerate(shown):
        left, top = position % per_line * 130 + 2, 24 + (height + gap) * len(strips) + position // per_line * 18
        draw.rectangle([left, top, left + 12, top + 12], fill=tuple(colours[k].tolist()))
        draw.text((left + 18, top - 2), classes.titles[k], fill="black", font=font)
    return sheet


def save_picture(picture, path):
    with atomic_path(path) as temporary:
        picture.save(temporary)


def save_maps(folder, image_name, image, labels, features, classes):
    """NAME.labels.png (palette PNG of class numbers), NAME.overlay.png and NAME.pca.png."""
    save_picture(palette_picture(labels, classes), folder / f"{image_name}.labels.png")
    save_picture(overlay_picture(image, labels, classes), folder / f"{image_name}.overlay.png")
    save_picture(pca_picture(features, labels.shape), folder / f"{image_name}.pca.png")


# ---- the loop --------------------------------------------------------------------------------------------------------

def evaluate(dataset, short_side, methods, rules, texts, anyup, tallies, maps, args, runtime):
    """Every method on the pictures that are this process's and not done yet: counts into the tallies, maps into the folder `maps` if it is not None."""
    classes = dataset.classes
    shown = SHEET_ROWS if maps else 0  # pictures of the contact sheet, which the first process needs whatever is done
    folders = [maps / method.label.replace("/", "-").replace(" ", "") if len(methods) > 1 else maps for method in methods] if maps else [None] * len(methods)

    def finished(position, name):
        return tallies and name in tallies[position].done and (not maps or (folders[position] / f"{name}.pca.png").is_file())

    missing = [k for k, name in enumerate(dataset.images) if k < shown or not all(finished(position, name) for position in range(len(methods)))]
    mine = [k for k in missing if k < shown and runtime.rank == 0] + [k for k in missing if k >= shown][runtime.rank::runtime.world]
    sheet, shares, warm, failures = [], [], set(), 0
    bar = tqdm(total=len(mine) * len(methods), desc=dataset.name + (f" {short_side}" if short_side else ""), unit="map", disable=runtime.rank > 0)
    with bar as progress:
        for k, (image, labels, error) in zip(mine, prefetch(lambda k: load_sample(dataset, k), mine, args.workers)):
            name = dataset.images[k]
            if error:
                progress.write(f"left out: {error}")
                progress.update(len(methods))
                failures += 1
                for tally in tallies:
                    tally.fail(name, error)
                continue
            size = image.shape[-2:]
            resized = resize_short_side(image, short_side) if short_side else image
            row = [image] if labels is None else [image, labels]
            for position, method in enumerate(methods):
                if k >= shown and finished(position, name):
                    progress.update()
                    continue
                inputs = (resized, size, classes, texts, rules[position], anyup, args, runtime)
                if position not in warm:
                    method.predict(*inputs)  # warm-up, not timed
                    warm.add(position)
                started = time.perf_counter()
                predictions = method.predict(*inputs)
                seconds = time.perf_counter() - started
                row.append(predictions)
                if maps:  # before the picture counts as done
                    save_maps(folders[position], name, image, predictions, method.features(resized, args, runtime), classes)
                if not tallies:
                    areas = (torch.bincount(predictions.flatten(), minlength=len(classes)) / predictions.numel()).tolist()
                    shares.append([name, method.label, *(f"{100 * area:.2f}" for area in areas)])
                    progress.write(f"{name} ({method.label}): " + ", ".join(
                        f"{classes.titles[c]} {100 * areas[c]:.1f} %" for c in sorted(range(len(classes)), key=lambda c: -areas[c]) if areas[c] > 0))
                elif name not in tallies[position].done:
                    tallies[position].add(name, labels, predictions, seconds)
                    progress.set_postfix_str(f"{method.label} mIoU {scores(tallies[position].confusion)[1]:.1f}", refresh=False)
                progress.update()
            if k < shown:
                sheet.append(row)
    if sheet:
        titles = ["picture"] + ["labels"] * (dataset.masks is not None) + [method.title + method.label.removeprefix(method.name) for method in methods]
        save_picture(contact_sheet(sheet, titles, classes), maps / "sheet.png")
    if shares:
        part = f".{runtime.rank}" if runtime.world > 1 else ""
        with atomic_path(maps / f"shares{part}.csv") as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([["image", "method", *(f"{title} %" for title in classes.titles)], *shares])
    return failures


def protocol_settings(args, runtime, methods, anyup):
    """What the numbers depend on, apart from the data: for --json, and to know whether an unfinished run is the same one."""
    hashes = {backbone: weights_hash(backbone) for backbone in {method.backbone for method in methods}}
    return {"checkpoint": args.checkpoint or (None if args.backbone else "runs/spar"), "backbone": methods[0].origin, "random_init": args.random_init,
            "weights": {method.label: hashes[method.backbone] for method in methods}, "window": list(window_of(methods[0].backbone, args) or []) or None,
            "resize": "bilinear without antialiasing on 8 bits, long side at most 2048; sides then resampled to multiples of the patch",
            "templates": 80, "upsampler": args.upsampler, "anyup": anyup and {"model": args.anyup_model, "weights": anyup.digest},
            "refine": args.refine, "lposs": {name: getattr(args, f"lposs_{name}") for name, *_ in LPOSS}, "limit": args.limit, "seed": args.seed,
            "precision": runtime.precision, "torch": torch.__version__, "open_clip": open_clip.__version__, "timm": timm.__version__,
            "numpy": np.__version__, "pillow": PIL.__version__}


def text_hash(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def tally_path(args, settings, dataset, texts, short_side, method, rule):
    """The file of a run's counts, whose name changes with everything that they depend on, the files' sizes and dates included."""
    files = [(str(path), *((path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else ()))
             for path in [*(dataset.root / image for image in dataset.images), *dataset.masks]]
    # other rows may come and go
    settings = settings | {"weights": settings["weights"][method.label], "refine": method.refine, "upsampler": method.upsampler}
    key = text_hash([settings, dataset.classes.names, hashlib.sha256(texts.cpu().numpy()).hexdigest(), short_side, method.label, [rule.logit_scale, rule.threshold, rule.area_threshold], files])[:12]
    return Path(args.state) / f"{Path(dataset.name).name}-{method.label.replace('/', '-').replace(' ', '')}-{short_side or 'own'}-{key}.jsonl"


def check_flags(args):
    """Raise WrongCall for flags that can be seen to be wrong by themselves."""
    for flag in ("plot", "json"):
        value = getattr(args, flag)
        if value and Path(value).suffix not in {"plot": (".png", ".pdf", ".svg"), "json": (".json",)}[flag]:
            raise WrongCall(f"--{flag} {value}: must end in {'.png, .pdf or .svg' if flag == 'plot' else '.json'}")
    for flag in ("limit", "batch_size", "window", "lposs_k", "lposs_steps", "lposs_reach"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise WrongCall(f"--{flag.replace('_', '-')} {value}: must be at least 1")
    if any(side < 1 for side in args.short_side or []):
        raise WrongCall(f"--short-side {min(args.short_side)}: must be at least 1")
    if not 0 <= args.lposs_alpha < 1 or args.lposs_tau <= 0:
        raise WrongCall("--lposs-alpha must be from 0 to under 1, --lposs-tau positive")
    if args.results and args.json:
        raise WrongCall("--results reads what --json wrote; leave --json away")


def main(args):
    check_flags(args)
    if args.results:
        rows = read_results(args.results)
        print_results(rows)
        show(rows, args)
        return
    datasets = open_datasets(args)
    if args.check_data:
        if sum(check_data(dataset, args) for dataset in datasets):
            raise RunFailed("the data has the problems listed above")
        return
    if datasets[0].masks is None and (args.json or args.plot):
        raise WrongCall("--json and --plot hold scores, which need --masks")
    runtime = start_runtime(args.device, args.precision, args.seed)
    methods = open_methods(args, runtime)
    rules = [[rule_of(method, dataset, args) for method in methods] for dataset in datasets]
    anyup = AnyUp(args, runtime.device) if any(method.upsampler == "anyup" for method in methods) else None
    for dataset in datasets:
        check_masks(dataset, args, runtime)
    runtime.barrier()
    settings = protocol_settings(args, runtime, methods, anyup)
    if args.random_init and args.backbone and not args.checkpoint and runtime.rank == 0:
        print("RANDOM WEIGHTS (--random-init): times mean something, scores and maps do not")

    maps = Path(args.save_maps or "runs/maps") if args.save_maps or datasets[0].masks is None else None
    if maps and args.images and Path(args.images).is_dir() and maps.resolve().is_relative_to(Path(args.images).resolve()):
        raise WrongCall(f"--save-maps {maps} lies inside --images {args.images}, where the next run would take the maps for pictures; give a folder outside")
    rows, tallies = [], []
    for dataset, dataset_rules in zip(datasets, rules):
        texts = embed_texts(methods[-1].backbone, dataset.classes.flat)  # the student's text tower is the pre-trained one
        for short_side in dataset.short_sides:
            folder = maps
            if maps:
                folder = maps.joinpath(*[dataset.name] * (len(datasets) > 1), *[str(short_side)] * (len(dataset.short_sides) > 1))
            each = [] if dataset.masks is None else [
                Tally(tally_path(args, settings, dataset, texts, short_side, *pair), len(dataset.classes), runtime) for pair in zip(methods, dataset_rules)]
            announce(dataset, short_side, methods, dataset_rules, each, args, runtime)
            failures = evaluate(dataset, short_side, methods, dataset_rules, texts, anyup, each, folder, args, runtime)
            failures = int(runtime.add_up(torch.tensor(failures, device=runtime.device)))  # all processes have come here, and written their counts
            if runtime.rank > 0:
                continue
            if failures == len(dataset.images):
                raise RunFailed(f"none of the {len(dataset.images)} pictures of {dataset.name} could be read")
            if each:
                for tally in each:
                    tally.read()
                    lost = set(dataset.images) - tally.done - tally.failed.keys()
                    if lost:
                        raise RunFailed(f"the counts of {len(lost)} pictures are missing in {tally.path}: --state must be a folder that all processes share, "
                                        "with one run at a time; the same command makes them")
                rows += [result_row(method, dataset, short_side, *pair) for method, *pair in zip(methods, dataset_rules, each)]
                print_table(rows[-len(methods):])
                for method, tally in zip(methods, each):
                    warn_of_nonsense(method, tally.confusion, dataset.classes)
            if failures:
                print(f"{failures} of {len(dataset.images)} pictures could not be read and are left out")
            if folder:
                print(f"maps in {folder}, the first {min(SHEET_ROWS, len(dataset.images))} side by side in {folder / 'sheet.png'}")
            tallies += each
    if runtime.rank > 0:
        return
    if args.json:
        write_json(args.json, {"dataset": args.dataset or datasets[0].name, "results": rows, "settings": settings | {
            "device": str(runtime.device), "processes": runtime.world, "short_side": args.short_side,
            "classes": {dataset.name: dataset.classes.names for dataset in datasets},
            "names_sha256": {dataset.name: text_hash(dataset.classes.names) for dataset in datasets}}})
    show(rows, args)
    for tally in tallies:
        tally.path.unlink(missing_ok=True)


def announce(dataset, short_side, methods, rules, tallies, args, runtime):
    """What is about to run, and by which thresholds."""
    if runtime.rank > 0:
        return
    known = f" of the known {dataset.known}" if dataset.known not in (None, len(dataset.images)) else ""
    print(f"{dataset.name}: {len(dataset.images)} pictures{known}, {len(dataset.classes)} classes ({len(dataset.classes.flat)} names), "
          f"{f'short side {short_side}' if short_side else 'at their own size'}")
    for rule in dict.fromkeys(rules):
        if rule.threshold or rule.area_threshold:
            print(f"background: class probability under {rule.threshold:g} at logit scale {rule.logit_scale:g}, area threshold {rule.area_threshold:g} "
                  f"({', '.join(method.label for method, each in zip(methods, rules) if each == rule)})")
    done = sum(len(tally.done) for tally in tallies)
    if done:
        print(f"continuing an unfinished run: {done} of {len(tallies) * len(dataset.images)} maps are counted in {args.state}")


def print_results(rows):
    """The per-class tables of rows that were read from files."""
    for key in dict.fromkeys((row["dataset"], row["short_side"]) for row in rows):
        print(f"\n{key[0]}, {f'short side {key[1]}' if key[1] else 'own size'}", end="")
        print_table([row for row in rows if (row["dataset"], row["short_side"]) == key])


def read_results(paths):
    """The rows of files that --json wrote; where methods repeat, their files' names come first. Raises RunFailed."""
    files = {}
    for path in paths:
        report = read_json(path, "evaluate_ovs.py --json")
        try:
            files[str(path)] = [row for row in report["results"] if row["miou"] + row["seconds_per_image"] >= 0 and
                                {"method", "dataset", "refine", "upsampler", "short_side"} <= row.keys()]
        except (KeyError, TypeError):
            raise RunFailed(f"{path} holds no results of evaluate_ovs.py --json") from None
        if not files[str(path)]:
            raise RunFailed(f"{path} holds no results with a score")
    stems = [Path(path).stem for path in files]
    rows = [row for each in files.values() for row in each]
    if len({(row_label(row), row["dataset"], row["short_side"]) for row in rows}) < len(rows):
        rows = [row | {"method": f"{Path(path).stem if stems.count(Path(path).stem) == 1 else path}: {row['method']}"} for path, each in files.items() for row in each]
    return rows


def show(rows, args):
    """The summary of several data sets or sizes, and what was asked for in files."""
    if rows:
        print_summary(rows)
    if args.json:
        print(f"results in {args.json}")
    if args.plot:
        plot(rows, args.plot)
        print(f"plot in {args.plot}")


if __name__ == "__main__":
    command_line(main, ARGS)
