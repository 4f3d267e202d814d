"""What every stage needs: windows and their stitching, positional embeddings, backbones,
class-name prompts and segmentation; last, images, files, ranks and errors.

Shapes: images are (3, H, W) and feature maps (h, w, D), with h = H / patch and w = W / patch.
Heights come before widths everywhere.
"""
import collections
import concurrent.futures
import contextlib
import datetime
import functools
import hashlib
import importlib
import json
import logging
import math
import os
import shlex
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from data.files import (RunError, UsageError, as_tensor, atomic_path, first_line, fit_to_patches,
                        is_out_of_memory, naming, read_image, read_index, read_json, reading,
                        write_json)

# what users import from here
__all__ = ["dense_features", "load_backbone", "open_features", "read_image", "read_index",
           "segment"]

ROOT = Path(__file__).resolve().parent
DEMO = ROOT / "data" / "demo"
IGNORE = 255  # the label of pixels that no score counts

# never ask on stdin whether a downloaded model's own code may run: it may not
transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


# ---- windows and stitching (paper, section 3.4) ----------------------------------------------

def window_starts(length, window, stride):
    """Return where windows start along an axis: 0, s, 2s, ... and one flush with the border."""
    starts = list(range(0, max(length - window, 0) + 1, stride))
    if starts[-1] + window < length:
        starts.append(length - window)
    return starts


def default_stride(patch):
    """Return the teacher's default stride: 1.5 patches, the paper's 24 pixels for patches of 16."""
    return 3 * patch // 2


def choose_window(backbone, side, stride):
    """Return (H, W) of the window: of the given side, or the native one (None if there is none).

    Raises UsageError, unless stride is 0, for windows that do not divide into patches or leave
    pixels uncovered.
    """
    window = (side, side) if side else backbone.window
    if stride == 0:
        return window
    if window is None:
        raise UsageError(f"backbone {backbone.source['name']} has no native size to slide over "
                         "an image: only the single pass (stride 0) works, or give a window")
    if any(length % backbone.patch for length in window):
        raise UsageError(f"window {window[0]}: must be a multiple of the patch, {backbone.patch}")
    if not 1 <= stride <= min(window):
        raise UsageError(f"stride {stride}: must be from 1 to the window's side, {min(window)}, "
                         "or pixels would be left uncovered (0 is the single pass)")
    return window


def cut_windows(image, window, stride):
    """Return all windows of an image (3, H, W) in reading order, as views (3, h, w)."""
    height, width = image.shape[-2:]
    return [image[:, top:top + window[0], left:left + window[1]]
            for top in window_starts(height, window[0], stride)
            for left in window_starts(width, window[1], stride)]


# most feature values per forward pass on a CPU; more overflow its caches (batches of 54 windows
# of ViT-B/16 are a tenth slower than batches of 6)
CPU_VALUES = 600_000


def window_batches(backbone, image, window, stride, batch_size=60):
    """Yield an image's windows in reading order, as many as share a forward pass: (n, 3, h, w)."""
    views = cut_windows(image, window, stride)
    if image.device.type == "cpu":
        values = math.prod(side // backbone.patch for side in views[0].shape[-2:]) * backbone.dim
        batch_size = max(1, min(batch_size, CPU_VALUES // values))
    passes = math.ceil(len(views) / batch_size)
    size = math.ceil(len(views) / passes)  # even batches, rather than a small last one
    for first in range(0, len(views), size):
        yield torch.stack(views[first:first + size])


@torch.no_grad()
def encode_windows(backbone, image, window, stride, batch_size=60,
                   autocast=contextlib.nullcontext):
    """Yield the feature maps of a normalised image's windows in reading order: (3, H, W) ->
    (n, h, w, D) float32, batch by batch."""
    for views in window_batches(backbone, image, window, stride, batch_size):
        with autocast():
            maps = backbone.encode_dense(views)
        yield maps.float()


def linear_matrix(inputs, outputs):
    """Return bilinear resizing along one axis (align_corners=False, no antialiasing) as a
    matrix: (outputs, inputs) float64."""
    unit_vectors = torch.eye(inputs, dtype=torch.float64)[None]
    resized = F.interpolate(unit_vectors, size=outputs, mode="linear", align_corners=False)
    return resized[0].T.contiguous()


def stitch_axis(length, window, stride, patch, cell):
    """Return the stitching along an axis as one matrix per window: (n, length / cell, window /
    patch) float64. It upsamples features to cells of `cell` pixels, places them, and divides by
    the number of windows over a cell. PixelStitcher relies on these equal weights."""
    starts = window_starts(length, window, stride)
    window = min(window, length)
    upsample = linear_matrix(window // patch, window // cell)  # (cells, features) of a window
    placed = torch.zeros(len(starts), length // cell, window // patch, dtype=torch.float64)
    counts = torch.zeros(length // cell, dtype=torch.float64)
    for index, start in enumerate(starts):
        cells = slice(start // cell, (start + window) // cell)
        placed[index, cells] = upsample
        counts[cells] += 1
    assert counts.min() > 0, "windows must cover every cell"
    return placed / counts[:, None]


@functools.lru_cache(256)
def feature_axis(length, window, stride, patch):
    """Return stitch_axis followed by downsampling to patches: (n, length / patch, window / patch)
    float64."""
    cell = math.gcd(stride, patch)  # a patch divided by u = lcm(stride, patch) / stride
    downsample = linear_matrix(length // cell, length // patch)
    return downsample @ stitch_axis(length, window, stride, patch, cell)


class Stitcher:
    """Joins the feature maps of overlapping windows into one map.

    Upsampling by u = lcm(stride, patch) / stride, averaging over overlaps and downsampling are
    linear and, as windows lie on a product grid, separable. So channel c of the stitched map is
    the sum over windows (a, b) of R_a F_ab[c] C_b^T, where F_ab[c] is the window's map (i, j).
    rows: a matrix R_a (H', i) for each row of windows; columns: C_b (W', j) for each column."""

    def __init__(self, rows, columns, device="cpu"):
        self.row_spans = [self.span(weights) for weights in rows]
        self.column_spans = [self.span(weights) for weights in columns]
        self.rows = rows.to(device, torch.float32)
        self.columns = columns.to(device, torch.float32)
        # windows of a row per product; a GPU takes longer to start products than to do them
        self.together = len(columns) if torch.device(device).type == "cuda" else 1
        self.row_sum = self.out = None
        self.next = 0

    @classmethod
    def of_features(cls, size, window, stride, patch, device="cpu"):
        """Return a stitcher for windows (H, W) of an image of `size`, to its patch grid."""
        axes = [feature_axis(length, side, stride, patch) for length, side in zip(size, window)]
        return cls(*axes, device)

    @staticmethod
    def span(weights):
        """Return the outputs that a window's matrix (outputs, features) contributes to."""
        used = weights.any(1).nonzero()
        return slice(int(used[0]), int(used[-1]) + 1)

    def add(self, maps):
        """Add the next windows in reading order: (n, i, j, C), summed in float32."""
        while len(maps):
            row, first = divmod(self.next, len(self.columns))
            if first == 0:
                shape = maps.shape[1], self.columns.shape[1], maps.shape[3]
                self.row_sum = maps.new_zeros(shape, dtype=torch.float32)
            last = min(first + self.together, first + len(maps), len(self.columns))
            group, maps = maps[:last - first].float(), maps[last - first:]
            span = slice(self.column_spans[first].start, self.column_spans[last - 1].stop)
            weights = self.columns[first:last, span].transpose(0, 1).flatten(1)  # (W'', n' * j)
            joined = weights @ group.transpose(0, 1).flatten(1, 2)  # (i, W'', C)
            self.row_sum[:, span].add_(joined)
            self.next += last - first
            if last == len(self.columns):
                self.add_row(row)

    def add_row(self, row):
        """Add a row of windows whose columns are joined."""
        if self.out is None:
            self.out = self.row_sum.new_zeros(self.rows.shape[1], *self.row_sum.shape[1:])
        span = self.row_spans[row]
        self.out[span].flatten(1).addmm_(self.rows[row, span], self.row_sum.flatten(1))

    def result(self):
        """Return the stitched map (H', W', C) float32, once every window was added."""
        assert self.next == len(self.rows) * len(self.columns), "windows are missing"
        return self.out


@torch.no_grad()
def stitched_features(backbone, image, window, stride, batch_size=60,
                      autocast=contextlib.nullcontext):
    """Return the teacher's feature map of a normalised image: (3, H, W) -> (H/patch, W/patch, D)
    float32. Stride 0 is a single pass."""
    if stride == 0:
        with autocast():
            features = backbone.encode_dense(image[None])[0].float()
        return require_finite(features, backbone)
    size, patch = image.shape[-2:], backbone.patch
    stitcher = Stitcher.of_features(size, window, stride, patch, image.device)
    for maps in encode_windows(backbone, image, window, stride, batch_size, autocast):
        stitcher.add(maps)
    return require_finite(stitcher.result(), backbone)


def as_int8(features):
    """Return a feature map (h, w, D) as (h, w, D + 2) int8: each patch's values as multiples of a
    step, 1/127 of the largest magnitude, then the two bytes of that step as float16."""
    step = (features.abs().amax(-1, keepdim=True) / 127).half()  # (h, w, 1)
    step = step.where(step > 0, 1)
    values = (features / step.float()).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([values, step.view(torch.int8)], -1)


def open_features(path):
    """Return a stored feature map: (h, w, D) float16, memory-mapped unless it is stored as int8.
    Raise RunError."""
    with reading(path, "delete it and run extract_teacher.py again"):
        features = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(features, np.ndarray):
            raise ValueError("a zip file, not an .npy file")
        if features.dtype == np.int8 and features.ndim == 3:
            step = features[..., -2:].copy().view(np.float16).astype(np.float32)
            features = (features[..., :-2] * step).astype(np.float16)
        if features.ndim != 3 or features.dtype != np.float16:
            raise ValueError(f"{features.dtype} of shape {features.shape}, not float16 (h, w, D)")
    return features


# ---- positional embeddings -------------------------------------------------------------------

def resize_positions(table, grid, new_grid, rule="size"):
    """Return learned positional embeddings for another patch grid, (h' * w', C): bicubic, without
    antialiasing (paper, section 3.4).

    table: (h * w, C) for grid (h, w); returned as it is for the same grid. rule: "size" resizes to
    the new grid's size; "scale" steps by h / (h' + 0.1), as DINO's code and the paper's OpenCLIP
    students do."""
    # an exported graph must not take the size of its example for every size
    if tuple(grid) == tuple(new_grid) and not torch.compiler.is_exporting():
        return table
    image = table.float().reshape(1, *grid, -1).permute(0, 3, 1, 2)  # (1, C, h, w)
    target = {"size": tuple(new_grid)}
    if rule == "scale":
        target = {"scale_factor": [(new + 0.1) / old for new, old in zip(new_grid, grid)]}
    image = F.interpolate(image, mode="bicubic", align_corners=False, antialias=False, **target)
    return image.permute(0, 2, 3, 1).reshape(new_grid[0] * new_grid[1], -1).to(table.dtype)


# ---- backbones -------------------------------------------------------------------------------

BACKBONES = {
    "tiny": f"local-dir:{DEMO / 'tiny'}",
    "siglip2": "ViT-B-16-SigLIP2-512/webli",
    "openclip": "ViT-B-16/laion2b_s34b_b88k",
    "dinov3txt": "torch.hub facebookresearch/dinov3 dinov3_vitl16_dinotxt_tet1280d20h24l",
    "siglip2-naflex": "hf-hub:timm/ViT-B-16-SigLIP2-naflex",
    "tipsv2": "hf-hub:google/tipsv2-l14",
    "tipsv2-b": "hf-hub:google/tipsv2-b14",
    "tipsv2-so": "hf-hub:google/tipsv2-so400m14",
    "tipsv2-g": "hf-hub:google/tipsv2-g14",
}
LOADING = ("random_init", "hub_dir", "dinov3_weights")  # what load_backbone takes besides a name
PREPROCESS = ("mean", "std", "interpolation", "resize_mode")  # keys of open_clip's preprocess_cfg
DINOV3 = "dinov3txt_model.safetensors"  # the file of a student of DINOv3.txt
MODEL_FILES = ("open_clip_config.json", DINOV3, "config.json")  # any marks a folder as a model


@dataclass(frozen=True)
class FrozenWindows:
    """How the first blocks of a student see an image: in windows of `size` (H, W) pixels every
    `stride` pixels, which are joined before the other blocks see the whole image."""
    blocks: int
    size: tuple
    stride: int


class Backbone(nn.Module):
    """A vision-language ViT as a dense feature extractor for images of any size, with a subclass
    per family of image towers.

    The forward pass is embed -> run_blocks -> project. Tokens (B, n, C) that enter block k can be
    stored and continued from with run_blocks(tokens, grid, start=k).

    Dense features follow from how the tower pools its patches into the image embedding, which is
    what was aligned with text. With a class token, the attention matrix of the last block becomes
    the identity (MaskCLIP). With attention pooling, patches take the value path of the pooling
    layer. With mean pooling, they are used as they are.

    Attributes: visual (the image tower), model (both towers, or None without text), blocks, patch
    (pixels), window (native H, W in pixels, or None), dim (D, shared with the text), pooling,
    mean and std (of the normalisation), source (the arguments of load_backbone), config
    (open_clip's model_cfg), positions (the rule of resize_positions; None for a tower that resizes
    them itself), official_positions (that of the authors' students, if it differs), windows.
    """
    visual_prefix = "visual."  # of the image tower's keys in the state dict of both towers
    source = config = positions = official_positions = windows = None

    def __init__(self, model, preprocess):
        super().__init__()
        self.model = model
        self.embedded_names = {}  # the texts that segment() has embedded: names -> (N, D)
        self.visual = model.get_submodule(self.visual_prefix[:-1])
        for name in ("mean", "std"):
            values = torch.tensor(preprocess[name]).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def normalise(self, images):
        """Return (..., 3, H, W) uint8 normalised as the model was trained, in its precision."""
        images = images.to(self.mean.device).float() / 255  # a quarter of the bytes to copy
        return ((images - self.mean) / self.std).to(self.mean.dtype)

    def embed(self, images):
        """Return the tokens (B, n, C) that enter the first block, positions added, of normalised
        images (B, 3, H, W)."""
        raise NotImplementedError

    def run_block(self, index, tokens, grid):
        """Run one block on the tokens of a patch grid (h, w): (B, n, C) -> (B, n, C)."""
        raise NotImplementedError

    def project(self, tokens, grid):
        """Return text-aligned patch features (B, h, w, D) of the tokens after the last block."""
        raise NotImplementedError

    def run_blocks(self, tokens, grid, start=0, stop=None):
        """Run blocks start..stop-1 (all by default): (B, n, C) -> (B, n, C)."""
        for index in range(start, len(self.blocks) if stop is None else stop):
            tokens = self.run_block(index, tokens, grid)
        return tokens

    def grid(self, images):
        """Return the patch grid (h, w) of images (..., H, W), whose sides are multiples of p."""
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"an image of {height} x {width} is not divisible by the patch of "
                             f"{self.patch}; use fit_to_patches")
        return height // self.patch, width // self.patch

    def set_windows(self, windows, source):
        """Set the first blocks' windows from a student's file: {"blocks": int, "size": [H, W],
        "stride": int}, or None. Raise RunError."""
        if windows is None:
            return
        with reading(source, "distill.py writes it"):
            blocks, size, stride = windows["blocks"], tuple(windows["size"]), windows["stride"]
            height, width = size
            if (not 0 < blocks < len(self.blocks) or not 0 < stride <= min(size)
                    or any(side % self.patch for side in (height, width, stride))):
                raise ValueError(f"{windows} do not fit its blocks and patches")
        self.windows = FrozenWindows(blocks, size, stride)

    def tokens_before(self, block, images):
        """Return the tokens (B, n, C) that enter a block, of normalised images (B, 3, H, W). With
        `windows`, the blocks before it have seen windows."""
        if self.windows is None:
            return self.run_blocks(self.embed(images), self.grid(images), stop=block)
        return torch.stack([self.joined_tokens(block, image) for image in images])

    def joined_tokens(self, block, image):
        """Return the tokens (n, C) of an image's windows: patches averaged over overlaps, class
        and register tokens over all windows."""
        window, stride = self.windows.size, self.windows.stride
        stitcher = Stitcher.of_features(image.shape[-2:], window, stride, self.patch, image.device)
        prefix, count = 0, 0
        for views in window_batches(self, image, window, stride):
            grid = self.grid(views)
            tokens = self.run_blocks(self.embed(views), grid, stop=block)
            first, patches = tokens.split([tokens.shape[1] - grid[0] * grid[1],
                                           grid[0] * grid[1]], dim=1)
            prefix, count = prefix + first.float().sum(0), count + len(views)
            kind = image.device.type  # "meta" where FLOP are counted; autocast does not know it
            with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):  # in float32
                stitcher.add(patches.unflatten(1, grid))
        return torch.cat([prefix / count, stitcher.result().flatten(0, 1)])

    def encode_dense(self, images):
        """Return text-aligned patch features, not L2-normalised, in a single pass: normalised
        images (B, 3, H, W) -> (B, H/patch, W/patch, D)."""
        grid, block = self.grid(images), self.windows.blocks if self.windows else 0
        tokens = self.tokens_before(block, images)
        return self.project(self.run_blocks(tokens, grid, start=block), grid)

    @property
    def digest(self):
        """A text that identifies what features depend on, besides the image."""
        return f"{weights_hash(self.visual)} {self.positions} {self.windows}"

    @property
    def has_own_tokenizer(self):
        return bool(self.config["text_cfg"].get("hf_tokenizer_name"))

    @functools.cached_property
    def tokenizer(self):
        """The tokenizer that the model was trained with. Raises RunError if it cannot be loaded."""
        name = self.source["name"]
        architecture, tag = resolve_backbone(name)
        own = {"trust_remote_code": False} if self.has_own_tokenizer else {}
        with loading(f"the tokenizer of backbone {name}", offline_advice(architecture, tag)):
            tokenizer = open_clip.get_tokenizer(architecture, **own)
            if isinstance(tokenizer, open_clip.tokenizer.HFTokenizer):
                ids, inner = tokenizer(["a"])[0], tokenizer.tokenizer
                endless = inner.eos_token_id is not None and inner.eos_token_id not in ids
                if ids[0] == inner.pad_token_id or endless:
                    raise ValueError("it pads on the left or does not end texts, so its files "
                                     "are not those of this model")
        return tokenizer

    def encode_text(self, texts):
        """Return embeddings (N, D) float32 of N strings, not L2-normalised."""
        tokens = self.tokenizer(texts).to(self.mean.device)
        return self.both_towers().encode_text(tokens).float()

    def both_towers(self):
        """Return the model with its text tower, which is loaded now if it was left out before."""
        if self.model is None:
            self.model = load_backbone(**self.source, text=True, device=self.mean.device).model
            setattr(self.model, self.visual_prefix[:-1], self.visual)
        return self.model

    def save(self, folder):
        """Write a folder that plain open_clip loads: configuration, weights, and the tokenizer if
        the model has its own. Return how to load it."""
        model = self.both_towers()
        preprocess = open_clip.get_model_preprocess_cfg(model)
        config = {"model_cfg": self.config,
                  "preprocess_cfg": {key: preprocess[key] for key in PREPROCESS}}
        if self.positions == "scale":  # not the usual rule
            config["positions"] = self.positions
        if self.windows:
            config["windows"] = asdict(self.windows)
        save_tensors(model, Path(folder) / "open_clip_model.safetensors")
        write_json(Path(folder) / "open_clip_config.json", config)
        if self.has_own_tokenizer:
            try:
                self.tokenizer.tokenizer.save_pretrained(folder)
            except RunError as error:
                print(f"warning: saved without the tokenizer that open_clip needs: {error}",
                      file=sys.stderr)
        return f"open_clip.create_model_and_transforms('local-dir:{folder}')"


def single_tokens(function, tokens, most=2 ** 15):
    """Apply a function to each token as a sequence of its own: (B, n, C) -> (B, n, C'). Softmax
    over a single key is 1, so attention returns that token's value. most: sequences at a time
    (CUDA takes under 2^16)."""
    sequences = tokens.flatten(0, 1).unsqueeze(1)  # (B * n, 1, C)
    # the number of parts must not become part of an exported graph
    parts = [sequences] if torch.compiler.is_exporting() else sequences.split(most)
    return torch.cat([function(part) for part in parts]).view(*tokens.shape[:2], -1)


def self_attention(attention, tokens, values_only=False):
    """Apply an nn.MultiheadAttention to tokens (B, n, C). With values_only, each token attends only
    to itself. The module's own forward puts n before B, so that bf16 products on a CPU copy the
    weights per sequence."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    if values_only:
        width = tokens.shape[-1]
        return attention.out_proj(F.linear(tokens, weight[2 * width:], bias[2 * width:]))
    joined = F.linear(tokens, weight, bias).unflatten(-1, (3, attention.num_heads, -1))
    queries, keys, values = joined.permute(2, 0, 3, 1, 4)  # (B, heads, n, C / heads) each
    attended = F.scaled_dot_product_attention(queries, keys, values)
    return attention.out_proj(attended.transpose(1, 2).flatten(2))


class NativeViT(Backbone):
    """open_clip's own VisionTransformer (OpenCLIP, CLIPA, CoCa)."""
    positions, official_positions = "size", "scale"

    def __init__(self, model, preprocess):
        super().__init__(model, preprocess)
        visual = self.visual
        if visual.pool_type == "none" or visual.patch_size[0] != visual.patch_size[1]:
            raise UsageError("its image tower pools twice, or has patches that are not square")
        self.blocks = visual.transformer.resblocks
        self.patch = visual.patch_size[0]
        self.window = tuple(side * self.patch for side in visual.grid_size)
        self.dim = visual.output_dim
        self.pooling = {"tok": "class token", "avg": "mean"}[visual.pool_type]
        if visual.attn_pool is not None:
            self.pooling = "attention"

    def embed(self, images):
        visual, grid = self.visual, self.grid(images)
        patches = visual.conv1(images).flatten(2).transpose(1, 2)  # (B, h * w, C)
        class_position, table = visual.positional_embedding[0], visual.positional_embedding[1:]
        positions = resize_positions(table, visual.grid_size, grid, self.positions)
        patches = patches + positions.to(patches.dtype)
        class_token = (visual.class_embedding + class_position).to(patches.dtype)
        class_token = class_token.expand(images.shape[0], 1, -1)
        return visual.ln_pre(torch.cat([class_token, patches], 1))

    def run_block(self, index, tokens, grid):
        block = self.blocks[index]
        mask_clip = index == len(self.blocks) - 1 and self.pooling == "class token"
        if mask_clip:
            tokens = tokens[:, 1:]  # no patch needs the class token from here on
        if not isinstance(block.attn, nn.MultiheadAttention):
            return single_tokens(block, tokens) if mask_clip else block(tokens)
        attended = self_attention(block.attn, block.ln_1(tokens), values_only=mask_clip)
        tokens = tokens + block.ls_1(attended)
        return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))

    def project(self, tokens, grid):
        visual = self.visual
        patches = tokens if self.pooling == "class token" else tokens[:, 1:]
        if self.pooling == "attention":  # with a single key, attention returns its value
            pool, attention = visual.attn_pool, visual.attn_pool.attn
            joined, separate = attention.in_proj_weight, attention.v_proj_weight
            weight = separate if joined is None else joined.chunk(3)[2]
            values = F.linear(pool.ln_k(patches), weight, attention.in_proj_bias.chunk(3)[2])
            patches = attention.out_proj(values)
        return (visual.ln_post(patches) @ visual.proj).unflatten(1, grid)


class TimmViT(Backbone):
    """timm's VisionTransformer in open_clip (SigLIP 1 and 2, MobileCLIP-B)."""
    positions = "size"

    def __init__(self, model, preprocess):
        super().__init__(model, preprocess)
        trunk, head = self.visual.trunk, self.visual.head
        poolings = {"token": "class token", "avg": "mean", "map": "attention"}
        if trunk.global_pool not in poolings:
            raise UsageError(f"its image tower pools its patches by {trunk.global_pool!r}; token, "
                             "avg and map are known")
        self.trunk, self.blocks, self.pooling = trunk, trunk.blocks, poolings[trunk.global_pool]
        self.dim = head[-1].out_features if len(head) else trunk.num_classes or trunk.embed_dim
        self.set_sizes()

    def set_sizes(self):
        embedding = self.trunk.patch_embed
        embedding.strict_img_size = False  # it would refuse every size but the native one
        self.patch = embedding.feat_ratio()
        # SO400M-14-SigLIP-384 sees 378 of its 384 pixels
        self.window = tuple(side * self.patch for side in embedding.grid_size)

    def embed(self, images):
        trunk, grid = self.trunk, self.grid(images)
        patches = trunk.patch_embed(images).flatten(1, -2)  # (B, h * w, C); some keep (B, h, w, C)
        # class token and registers
        prefix = [token for token in (trunk.cls_token, trunk.reg_token) if token is not None]
        prefix = torch.cat(prefix, 1) if prefix else patches.new_empty(1, 0, patches.shape[-1])
        if trunk.pos_embed is not None:
            table = trunk.pos_embed[0]
            own = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
            positions = resize_positions(table[own:], trunk.patch_embed.grid_size, grid,
                                         self.positions)
            patches = patches + positions.to(patches.dtype)
            prefix = prefix + table[:own] if own else prefix
        prefix = prefix.to(patches.dtype).expand(images.shape[0], -1, -1)
        return trunk.norm_pre(torch.cat([prefix, patches], 1))

    def attend(self, block, tokens, grid):
        return block(tokens)

    def run_block(self, index, tokens, grid):
        if index < len(self.blocks) - 1 or self.pooling != "class token":
            return self.attend(self.blocks[index], tokens, grid)
        patches = tokens[:, self.trunk.num_prefix_tokens:]
        return single_tokens(self.blocks[index], patches)  # MaskCLIP

    def project(self, tokens, grid):
        trunk = self.trunk
        prefix = 0 if self.pooling == "class token" else trunk.num_prefix_tokens
        patches = trunk.norm(tokens[:, prefix:])
        if self.pooling == "attention":
            pool, width = trunk.attn_pool, patches.shape[-1]
            bias = None if pool.kv.bias is None else pool.kv.bias[width:]
            patches = pool.proj(F.linear(patches, pool.kv.weight[width:], bias))
            patches = patches + pool.mlp(pool.norm(patches))
        return self.visual.head(trunk.head(trunk.fc_norm(patches))).unflatten(1, grid)


class DinoTxt(Backbone):
    """DINOv3.txt from its public code: the patch tokens after the vision head's two blocks,
    compared with the patch half of the text embedding. `blocks` are the backbone's; the head's
    belong to project."""
    visual_prefix = "visual_model."
    window = (384, 384)  # the teacher's; positions are rotary, so no size is native
    pooling = "mean"

    def __init__(self, model, tokenizer):
        super().__init__(model, {"mean": open_clip.constants.IMAGENET_MEAN,
                                 "std": open_clip.constants.IMAGENET_STD})
        self.vit = self.visual.backbone
        assert not self.vit.untie_cls_and_patch_norms, "class token and patches share their norm"
        self.blocks, self.patch = self.vit.blocks, self.vit.patch_size
        self.dim = self.vit.embed_dim
        self.tokenizer = tokenizer

    def embed(self, images):
        return self.vit.prepare_tokens_with_masks(images)[0]

    def run_block(self, index, tokens, grid):
        return self.blocks[index](tokens, self.vit.rope_embed(H=grid[0], W=grid[1]))

    def project(self, tokens, grid):
        prefix = 1 + self.vit.n_storage_tokens
        return self.visual.head(self.vit.norm(tokens))[:, prefix:].unflatten(1, grid)

    def encode_text(self, texts):
        tokens = self.tokenizer.tokenize(texts).to(self.mean.device)
        # the class token's half comes first
        return self.both_towers().encode_text(tokens).float()[:, self.dim:]

    def save(self, folder):
        """Write one file, which the public code's model loads strictly with load_state_dict. It
        stays under the DINOv3 licence."""
        header = {"license": "DINOv3 License", "architecture": BACKBONES["dinov3txt"]}
        if self.windows:
            header["windows"] = json.dumps(asdict(self.windows))
        save_tensors(self.both_towers(), Path(folder) / DINOV3, header)
        return (f"load_state_dict(safetensors.torch.load_file('{folder}/{DINOV3}')) of the "
                "public code's model")


def image_family(visual):
    """Return the Backbone class for open_clip's image tower. Raise UsageError if there is none."""
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        return NativeViT
    if type(getattr(visual, "trunk", None)) is timm.models.vision_transformer.VisionTransformer:
        return TimmViT
    from extras.families import other_family
    return other_family(visual)


# ---- loading and saving backbones ------------------------------------------------------------

def load_backbone(name, random_init=False, device="cpu", text=False, hub_dir=None,
                  dinov3_weights=None):
    """Load a pre-trained model, or a student's folder: frozen, in eval mode, on a device.

    name: a --backbone value. random_init: without weights. text: with the text tower, for
    encode_text. hub_dir: a clone of DINOv3's public code. dinov3_weights: its two files (backbone;
    head and text). Raises UsageError for a name or tower that cannot work, RunError if weights
    cannot be loaded."""
    name = str(name)
    place = BACKBONES.get(name, name).removeprefix("hf-hub:").removeprefix("local-dir:")
    if name == "dinov3txt" or (Path(name) / DINOV3).is_file():
        backbone = load_dinotxt(name, random_init, hub_dir, dinov3_weights)
    elif is_tipsv2(place):
        from extras.families import load_tipsv2
        backbone = load_tipsv2(name, place, random_init)
    else:
        backbone = load_open_clip(name, random_init, text, device)
    backbone.source = {"name": name, "random_init": random_init, "hub_dir": hub_dir,
                       "dinov3_weights": dinov3_weights}
    if not text:
        backbone.model = None
    return backbone.to(device).eval().requires_grad_(False)


def is_tipsv2(place):
    """Return whether a repository or folder holds a TIPSv2 model."""
    config = Path(place) / "config.json"
    if not config.is_file():
        return place.startswith("google/tipsv2-")
    return read_json(config, "fetch it again").get("model_type") == "tipsv2"


def resolve_backbone(name):
    """Return open_clip's (model name, pretrained tag or None) for a name. Raise UsageError."""
    if name not in BACKBONES and (Path(name) / "open_clip_config.json").is_file():
        name = f"local-dir:{name}"
    identifier = BACKBONES.get(name, name)
    if identifier.startswith(("hf-hub:", "local-dir:")):
        return identifier, None
    architecture, _, tag = identifier.partition("/")
    if architecture not in open_clip.list_models():
        raise UsageError(f"backbone {name}: unknown. Known are {', '.join(BACKBONES)}, "
                         "hf-hub:ORG/NAME, local-dir:PATH and ARCH/PRETRAINED_TAG with an "
                         "architecture of open_clip.list_models()")
    return architecture, tag or None


def load_open_clip(name, random_init, text, device):
    """Return a Backbone for the open_clip model behind a name."""
    architecture, tag = resolve_backbone(name)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not (random_init or ":" in architecture or tag in tags or Path(tag or "").is_file()):
        raise UsageError(f"backbone {name}: give weights as {architecture}/TAG, where TAG is a "
                         f"file or one of {', '.join(tags) or '(none are published)'}; or give "
                         "--random-init")
    with loading(f"backbone {name}", offline_advice(architecture, tag)):
        config = read_model_config(name)
        path = None if random_init else find_weights(architecture, tag)
        model = create_open_clip(config, path, text, device)
        preprocess = open_clip.get_model_preprocess_cfg(model)
        with naming(f"backbone {name}"):
            backbone = image_family(model.visual)(model, preprocess)
    backbone.config = config["model_cfg"]
    backbone.positions = config.get("positions", backbone.positions)  # of an official student
    backbone.set_windows(config.get("windows"), f"{name}: open_clip_config.json")
    return backbone


def read_model_config(name):
    """Return what an open_clip_config.json holds, {"model_cfg": ..., "preprocess_cfg": ...}."""
    architecture, tag = resolve_backbone(name)
    kind, _, place = architecture.partition(":")
    if name == "siglip2-naflex":  # open_clip 3.3 lacks it; all but the trunk is its sibling's
        config = read_model_config("siglip2")
        config["model_cfg"]["vision_cfg"]["timm_model_name"] = "naflexvit_base_patch16_siglip"
        return config
    if place:
        path = Path(place) / "open_clip_config.json"
        if kind == "hf-hub":
            path = open_clip.pretrained.download_pretrained_from_hf(place, "open_clip_config.json")
        return check_model_config(read_json(path, "fetch the model's files again"), path)
    model = open_clip.get_model_config(architecture)
    # assume that a file of weights needs the preprocessing of the published ones
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    similar = tag if tag in tags else "".join(tags[:1])
    published = open_clip.get_pretrained_cfg(architecture, similar)
    if tag in tags and published.get("quick_gelu"):
        model["quick_gelu"] = True  # as the weights were trained; open_clip only warns
    return {"model_cfg": model, "preprocess_cfg": {
        key: published[key] for key in PREPROCESS if key in published}}


def check_model_config(config, path):
    """Return a downloaded configuration without what open_clip 3.3 does not know. Raise RunError
    for one that would run code."""
    with reading(path, "fetch the model's files again"):
        config["model_cfg"]["vision_cfg"].pop("image_seq_len", None)  # of NaFlex towers
    if "trust_remote_code" in json.dumps(config):
        raise RunError(f"{path} asks to run Python code of its own (trust_remote_code), which is "
                       "not done; remove that if the model works without it")
    return config


def find_weights(architecture, tag):
    """Return the path of a model's weights, downloaded into the library's cache if necessary."""
    kind, _, place = architecture.partition(":")
    if kind == "local-dir":
        # private; checked with open_clip 3.3
        path = open_clip.factory._find_checkpoint_in_dir(Path(place))
        if path is None:
            raise FileNotFoundError(f"{place} holds no weights")
        return path
    if tag and Path(tag).is_file():
        return tag
    print(f"{architecture}: fetching the weights, unless they are in the cache", flush=True)
    if kind == "hf-hub":
        return open_clip.pretrained.download_pretrained_from_hf(place)
    return open_clip.download_pretrained(open_clip.get_pretrained_cfg(architecture, tag))


# a minimal text tower, for when none is needed
STUB = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}


def create_open_clip(config, path, text, device):
    """Return open_clip's model of a configuration, with the weights of a file, if one is given.

    Without text, the text tower is a stub and its weights are not read, which halves the memory."""
    big_vision = str(path).endswith(".npz")  # open_clip converts these only as a whole
    if not (text or big_vision):
        towers = config["model_cfg"]
        stubs = {key: STUB for key in ("text_cfg", "multimodal_cfg") if key in towers}
        config = config | {"model_cfg": towers | stubs}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(config))
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False,
                                       pretrained_text=False, device=device)
    if path is not None and not big_vision:
        refuse_parts(path)
        state = open_clip.factory.load_state_dict(str(path))
        state = open_clip.convert.convert_state_dict(model, state)
        image = {key.removeprefix("visual."): value for key, value in state.items()
                 if key.startswith("visual.")}
        if any(key.startswith("_orig_mod.") for key in state):
            raise RunError(f"{path} was saved from a compiled model: remove \"_orig_mod.\" from "
                           "the names of its weights")
        load_strictly(model.visual, image, path)  # open_clip would resize positions silently
    if path is not None and (text or big_vision):
        open_clip.load_checkpoint(model, str(path))
    return model


def refuse_parts(path):
    """Raise RunError for a Git LFS pointer, or for one shard of several."""
    with open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise RunError(f"{path} is a Git LFS pointer in place of the weights; where it came "
                           "from, run: git lfs pull")
    if "-of-0" in Path(path).name:
        raise RunError(f"{path} is one of several shards; save all weights as one file")


@contextlib.contextmanager
def loading(what, advice):
    """Turn any error of the libraries that load a model into a RunError with advice, and silence
    open_clip and huggingface_hub, which log where nothing is wrong."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    except (UsageError, RunError):
        raise
    except Exception as error:  # the libraries raise many types
        if is_out_of_memory(error):
            raise
        raise RunError(f"{what} cannot be loaded: {first_line(error)}. {advice}") from error
    finally:
        logging.disable(before)


def offline_advice(architecture, tag):
    """Return advice on how to fetch a model's files by hand and where to put them."""
    kind, _, place = architecture.partition(":")
    if kind == "local-dir":
        return ("The folder must hold open_clip_config.json, the weights it describes and any "
                "tokenizer files, as open_clip saves them")
    source = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    repository = place if kind == "hf-hub" else source.get("hf_hub", "").rstrip("/")
    if repository:
        return ("Without network, fetch open_clip_config.json, the weights and any tokenizer "
                f"files of https://huggingface.co/{repository} elsewhere, put them into one "
                "folder and give --backbone local-dir:FOLDER; if it is gated, accept its licence "
                "there and run: hf auth login")
    if tag and not source:
        return ("The file must hold this architecture's weights; a model with a tokenizer of its "
                "own belongs in a folder for --backbone local-dir:FOLDER")
    return (f"Without network, fetch {source.get('url', 'the weights')} elsewhere and give "
            f"--backbone {architecture}/FILE")


def hub_clone(name, hub_dir):
    """Return the clone of a public repository: hub_dir, or its subfolder of that name."""
    if hub_dir is None:
        return None
    for folder in (Path(hub_dir) / name, Path(hub_dir)):
        if (folder / "hubconf.py").is_file():
            return folder
    raise UsageError(f"--hub-dir {hub_dir} holds no hubconf.py, nor does a folder {name} in it; "
                     "give a clone of the repository that --help names")


DINOV3_ADVICE = (
    "DINOv3.txt needs its public code and two weight files: ask for these at https://ai.meta.com/"
    "resources/models-and-libraries/dinov3-downloads, then give --dinov3-weights "
    "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth "
    "dinov3_vitl16_dinotxt_vision_head_and_text_encoder-a442d8f5.pth, and, without network, "
    "--hub-dir FOLDER, a clone of https://github.com/facebookresearch/dinov3")


def load_dinotxt(name, random_init, hub_dir, weights):
    """Return DINOv3.txt by its public code, or a student of it from the folder `name`."""
    student = None if name == "dinov3txt" else Path(name) / DINOV3
    clone = hub_clone("dinov3", hub_dir)
    if not (random_init or student or weights):
        raise UsageError(DINOV3_ADVICE)
    for path in () if student else weights or ():
        if not Path(path).is_file():
            raise UsageError(f"--dinov3-weights {path}: no such file. {DINOV3_ADVICE}")
    with loading("DINOv3's public code", DINOV3_ADVICE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # 0.9 G parameters need no values before the file's
        with torch.device("cpu" if random_init else "meta"):
            model, tokenizer = build_dinotxt(clone)
    if student:
        load_strictly(model, read_tensors(student), student)
    elif not random_init:
        # the second file lacks the backbone, and nothing else
        backbone = {f"visual_model.backbone.{key}": value
                    for key, value in read_tensors(weights[0]).items()}
        both = backbone | read_tensors(weights[1])
        load_strictly(model, both, " with ".join(map(str, weights)))
    backbone = DinoTxt(model, tokenizer)
    if student:
        with safe_open(student, "pt") as file:
            header = file.metadata() or {}
        backbone.set_windows(json.loads(header.get("windows", "null")), student)
    return backbone


def build_dinotxt(clone):
    """Return the public code's (model, tokenizer), from a clone or from torch.hub's."""
    if clone is None:
        # its hubconf.py imports packages that are not needed; the download is what counts
        with contextlib.suppress(ModuleNotFoundError):
            torch.hub.list("facebookresearch/dinov3", trust_repo=True, verbose=False)
        clone = Path(torch.hub.get_dir()) / "facebookresearch_dinov3_main"
    vocabulary = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")  # the same
    sys.path.insert(0, str(clone))
    try:
        entries = importlib.import_module("dinov3.hub.dinotxt")
        return entries.dinov3_vitl16_dinotxt_tet1280d20h24l(pretrained=False,
                                                            bpe_path_or_url=str(vocabulary))
    finally:
        sys.path.remove(str(clone))


def read_tensors(path):
    """Return the tensors of a .safetensors or torch file by name. Nothing in it is executed."""
    with reading(path, "fetch it again, or save its state dict alone, as safetensors"):
        if str(path).endswith(".safetensors"):
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    tensors = {}
    if isinstance(state, dict):
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise RunError(f"{path} holds no state dict (tensors by name), neither itself nor as "
                       "\"state_dict\"")
    return tensors


def load_strictly(module, tensors, source):
    """Load a module's state dict. Raise RunError, naming keys, if it does not fit exactly."""
    expected = module.state_dict()
    misfits = {
        "missing": [key for key in expected if key not in tensors],
        "unknown": [key for key in tensors if key not in expected],
        "of another shape": [key for key in tensors
                             if key in expected and tensors[key].shape != expected[key].shape],
    }
    refuse_misfits(misfits, source)
    module.load_state_dict(tensors, assign=any(tensor.is_meta for tensor in expected.values()))


def refuse_misfits(misfits, source):
    """Raise RunError if there are any of {what is wrong with them: names of weights}."""
    complaints = [f"{len(keys)} {what} ({', '.join([*keys][:3])}{', ...' * (len(keys) > 3)})"
                  for what, keys in misfits.items() if keys]
    if complaints:
        raise RunError(f"{source} does not fit this architecture: of its weights, "
                       f"{'; '.join(complaints)}")


def save_tensors(model, path, header=None):
    """Write a model's state dict as safetensors. header: {name: text} beside the tensors."""
    tensors = {key: value.detach().cpu().contiguous()
               for key, value in model.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=header)
        with contextlib.suppress(PermissionError):  # a file system without modes
            temporary.chmod(0o644)  # safetensors leaves it to its owner alone


def weights_hash(module):
    """Return the sha256 of a module's parameters in float32, which identifies them."""
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def convert_weights(module, dtype):
    """Convert the weights of matrix products to a dtype once, where autocast would convert frozen
    ones in every pass. Results are equal to the last bit."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            part.weight = nn.Parameter(part.weight.to(dtype), requires_grad=False)
        elif isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None:
            weight = part.in_proj_weight.to(dtype)
            part.in_proj_weight = nn.Parameter(weight, requires_grad=False)


# ---- prompts, dense features and segmentation ------------------------------------------------

@torch.no_grad()
def embed_texts(backbone, names, chunk=256):
    """Return one unit vector per class name, (N, D) float32: normalised prompt embeddings,
    averaged over open_clip's 80 templates, normalised."""
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    texts = [template(name) for name in names for template in templates]
    embeddings = torch.cat([backbone.encode_text(texts[first:first + chunk])
                            for first in range(0, len(texts), chunk)])
    embeddings = F.normalize(embeddings, dim=-1)
    embeddings = embeddings.unflatten(0, (len(names), len(templates)))  # (N, T, D)
    return F.normalize(embeddings.mean(1), dim=-1)


def prepare(backbone, image):
    """Return an image normalised, with sides resampled to multiples of the patch: (3, H', W')."""
    return backbone.normalise(fit_to_patches(as_tensor(image), backbone.patch))


def dense_features(backbone, image, autocast=contextlib.nullcontext):
    """Return single-pass features of an image of any size, comparable with text but not
    L2-normalised: (H/patch, W/patch, D) float32.

    image: a path, a PIL image, an array (H, W, 3) or a tensor (3, H, W) of uint8.
    """
    return stitched_features(backbone, prepare(backbone, image), None, 0, autocast=autocast)


def require_finite(features, backbone):
    """Return features. Raise RunError if any of them is not finite."""
    if not torch.isfinite(features.sum()):
        raise RunError(f"the features of backbone {backbone.source['name']} are not finite: its "
                       "weights are damaged, or its activations exceed fp16 (then give --precision "
                       "bf16)")
    return features


def bilinear_strips(similarities, size):
    """Return a function of (first, last) that gives these rows of (h, w, N), enlarged bilinearly
    to `size`: (N, rows, W). So a map of 150 classes is never held at full size."""
    height, width, count = similarities.shape
    if (height, width) == tuple(size):
        return lambda first, last: similarities[first:last].permute(2, 0, 1)
    weights = linear_matrix(height, size[0]).to(similarities)

    def strip(first, last):
        rows = (weights[first:last] @ similarities.flatten(1)).view(last - first, width, count)
        rows = rows.permute(2, 0, 1)[None].contiguous()
        return F.interpolate(rows, size=(last - first, size[1]), mode="bilinear",
                             align_corners=False)[0]
    return strip


def label_strips(assign, strip, size, class_of_name, values=None):
    """Apply assign(similarities (N, rows, W)) -> labels (rows, W) to all strips: (H, W) int64.
    class_of_name: (N,). values: floats that a strip may hold; more overflow a CPU's caches."""
    values = values or (2 ** 25 if class_of_name.is_cuda else 2 ** 21)
    rows = max(1, values // (len(class_of_name) * size[1]))
    return torch.cat([assign(strip(first, min(first + rows, size[0])))
                      for first in range(0, size[0], rows)])


def segment(backbone, image, classes, autocast=contextlib.nullcontext):
    """Return the class of each pixel of an image, in a single pass: (H, W) int64.

    image: as in dense_features. classes: a list of names, or of lists of synonyms, which are
    embedded once, at the first call that has them."""
    if isinstance(classes, str) or not classes or not all(classes):
        raise TypeError("classes: give a list of names or of lists of synonyms, such as "
                        "['sky', ['grass', 'lawn']]")
    classes = [[names] if isinstance(names, str) else names for names in classes]
    class_of_name = torch.tensor([k for k, names in enumerate(classes) for _ in names])  # (N,)
    names = tuple(name for names in classes for name in names)
    if names not in backbone.embedded_names:
        backbone.embedded_names[names] = embed_texts(backbone, names)
    texts = backbone.embedded_names[names].to(backbone.mean.device)
    return label_pixels(backbone, as_tensor(image), texts, class_of_name, autocast)


def label_pixels(backbone, image, texts, class_of_name, autocast=contextlib.nullcontext):
    """Return the class of the most similar of N names (N, D) at each pixel: (3, H, W) uint8 ->
    (H, W) int64. class_of_name: (N,) int64."""
    size = image.shape[-2:]
    features = F.normalize(dense_features(backbone, image, autocast), dim=-1)
    similarities = features @ texts.T  # (h, w, N)
    class_of_name = class_of_name.to(similarities.device)
    return label_strips(lambda strip: class_of_name[strip.argmax(0)],
                        bilinear_strips(similarities, size), size, class_of_name).cpu()


# ---- device, precision and processes ---------------------------------------------------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Runtime:
    """Where and how a stage computes. precision: a key of DTYPES; rank, world: torchrun's."""
    device: torch.device
    precision: str
    rank: int = 0
    world: int = 1

    def autocast(self):
        """Return the context for forward passes: matrix products in `precision`, while torch
        keeps normalisation and softmax in fp32."""
        return torch.autocast(self.device.type, DTYPES[self.precision],
                              enabled=self.precision != "fp32")

    def print(self, text):
        """Print in the first process only."""
        if self.rank == 0:
            print(text, flush=True)

    @contextlib.contextmanager
    def together(self):
        """Raise RunError if another process is lost during an exchange."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or is_out_of_memory(error):
                raise
            raise RunError(f"process {self.rank} lost the others ({first_line(error)[:120]}); "
                           "their own messages say why. What was saved is kept, and the same "
                           "command continues from there") from None

    def sum(self, tensor):
        """Sum a tensor over all processes, in place, and return it."""
        if self.world > 1:
            with self.together():
                torch.distributed.all_reduce(tensor)
        return tensor

    def total(self, value):
        """Return the sum of a number over all processes, after all have reached this call."""
        with self.together():
            return self.sum(torch.tensor(float(value), device=self.device)).item()

    def barrier(self):
        """Wait until all processes reach this call."""
        self.total(0)


def launcher_ranks():
    """Return (rank, world, local rank) of torchrun's environment, or (0, 1, 0) without one."""
    texts = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if not (texts[0] and texts[1]):
        return 0, 1, 0  # left over from something else
    if all(text.isdecimal() for text in texts if text):
        rank, world, local = (int(text or 0) for text in texts)
        if rank < world:
            return rank, world, local
    raise UsageError(f"RANK={texts[0]}, WORLD_SIZE={texts[1]}, LOCAL_RANK={texts[2]} in the "
                     "environment cannot be; unset them, or start with torchrun")


def start_runtime(device="auto", precision="auto", seed=0):
    """Choose the device and the precision, seed torch, and join torchrun's processes. "auto" is
    fp16 on a GPU (half the time, as in the paper) and fp32 on a CPU. Raise UsageError."""
    rank, world, local = launcher_ranks()
    gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and gpus:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        if here > gpus:
            raise UsageError(f"{here} processes on a machine with {gpus} GPUs; start one per GPU")
        device = f"cuda:{local}"
    elif device.startswith("cuda:") and world > 1:
        raise UsageError(f"--device {device}: {world} processes need a GPU each; give cuda")
    try:
        device = torch.device(device)
        torch.empty(1, device=device).item()  # fails on meta, too
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {first_line(error)}") from None
    if precision == "auto":
        precision = "fp16" if device.type == "cuda" else "fp32"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, in the patch embedding too
    torch.manual_seed(seed)
    if world > 1 and not torch.distributed.is_initialized():
        try:
            # one process may wait long for another's last images; torchrun sees when one has died
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                                 timeout=datetime.timedelta(days=1))
        except (RuntimeError, ValueError) as error:  # a taken port, no address
            raise RunError(f"{world} processes (WORLD_SIZE) cannot meet: {first_line(error)}; "
                           "start them with torchrun, with another --master-port if that one is "
                           "taken, or unset WORLD_SIZE") from None
    runtime = Runtime(device, precision, rank, world)
    share = f"{world} processes" if world > 1 else f"{torch.get_num_threads()} threads"
    exact = " without TF32" if device.type == "cuda" and precision == "fp32" else ""
    runtime.print(f"device {device}, precision {precision}{exact}, {share}")
    return runtime


def synchronised_time(device):
    """Return the time in seconds, once a device has done all that it was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def prefetch(function, items, workers=2):
    """Yield function(item) for each item, in order, computed ahead by threads."""
    pool = concurrent.futures.ThreadPoolExecutor(max(1, workers))
    waiting = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # without waiting, as Ctrl-C may have left a lock of the pool locked
        pool.shutdown(wait=False, cancel_futures=True)


# ---- running a stage -------------------------------------------------------------------------

def run_stage(main, args):
    """Run a stage's main(args) and exit. Errors that a user can cause end in one line on stderr."""
    # a batch system's SIGTERM ends a stage as Ctrl-C does; a background job ignores Ctrl-C
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM)
               if signal.getsignal(number) != signal.SIG_IGN]

    def end_at_once():
        """Let another signal end the process, without a traceback."""
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    def interrupt(*_):
        end_at_once()
        raise KeyboardInterrupt
    for number in numbers:
        signal.signal(number, interrupt)
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it is closed
        stream.reconfigure(errors="backslashreplace")  # file names need not be text
    code, text = 0, None
    try:
        main(args)
    except UsageError as error:
        code, text = 2, error
    except RunError as error:
        code, text = 1, error
    except KeyboardInterrupt:
        code = 130
        if os.environ.get("RANK", "0") == "0":
            text = f"interrupted; continue with: {command_of_this_process()}"
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        code, text = 1, f"{error.filename or 'a file'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code, text = 1, (f"out of memory ({first_line(error)[:120]}); smaller images, half "
                         "precision or a smaller --batch-size of windows need less")
    if text:
        print(f"error: {text}", file=sys.stderr)
    end_at_once()  # torchrun sends signals, too
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if code == 130:  # sys.exit would wait for the threads of prefetch
        with contextlib.suppress(OSError):
            print(end="", flush=True)
        os._exit(code)
    sys.exit(code)


def command_of_this_process():
    """Return the command line of this process, as a user would type it again."""
    launcher = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        launcher = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    return shlex.join(launcher + sys.argv)
