"""What the stages share, in the order in which data meets it: errors and files, device and ranks, pictures and their
augmentation, the backbones, windows and their stitching, class names and their embeddings, segmentation.

Shapes: images are (3, H, W), maps (h, w, C) with h = H / patch and w = W / patch; heights come before widths everywhere.
"""
import collections
import concurrent.futures
import contextlib
import copy
import datetime
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import sys
import traceback
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

ROOT = Path(__file__).resolve().parent
DEMO = ROOT / "data" / "demo"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
IGNORE = 255  # the label that counts nowhere
UMASK = os.umask(0)
os.umask(UMASK)


# ---- errors and files ------------------------------------------------------------------------------------------------

class WrongCall(Exception):
    """A flag or a combination of flags that cannot work; the command ends with exit code 2."""


class RunFailed(Exception):
    """The call is right but the run cannot go on (a bad file, a full disk); the command ends with exit code 1."""


def command_line(main, *args):
    """Run a stage's main(*args) and exit: what a user can cause ends in one line on stderr, without a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's SIGTERM ends a stage as Ctrl-C does
    try:
        main(*args)
        code = 0
    except WrongCall as error:
        code = report(error, 2)
    except RunFailed as error:
        code = report(error, 1)
    except KeyboardInterrupt:
        code = report(f"interrupted; continue with: {this_command()}", 130) if os.environ.get("RANK", "0") == "0" else 130
    except OSError as error:
        code = report(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    except torch.OutOfMemoryError as error:
        code = report(f"the device is out of memory ({str(error).splitlines()[0]}); a smaller --batch-size needs less", 1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(code)


def report(error, code):
    if os.environ.get("SPAR_TRACEBACK"):
        traceback.print_exc()
    print(f"error: {error}", file=sys.stderr)
    return code


def this_command():
    """The command line of this process, as a user would type it again."""
    launcher = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]] if "LOCAL_WORLD_SIZE" in os.environ else ["python"]
    return shlex.join(launcher + sys.argv)


@contextlib.contextmanager
def atomic_path(path, writer=""):
    """A temporary path in path's folder, for the caller to write; on success it replaces path, on failure it is removed.

    writer: sets apart processes that may write the same path at once; the last of them to finish wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{writer}{path.name}")  # the same name each time, so that a killed run's remains are overwritten
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~UMASK)  # safetensors would leave it to its owner alone
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk, mostly; what stands at path is still the old file
            raise RunFailed(f"{path} could not be written ({error.strerror or error}); what was finished is kept, and the same command "
                            "continues from there") from error
        raise


def write_json(path, value, writer=""):
    with atomic_path(path, writer) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path, made_by):
    """A JSON file that a stage wrote. Raises RunFailed, naming the command that makes it."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise RunFailed(f"{path} does not exist; {made_by} makes it") from None
    except (ValueError, IsADirectoryError, NotADirectoryError) as error:
        raise RunFailed(f"{path} is not readable JSON ({error}); {made_by} makes it anew") from None


def read_json_lines(path):
    """The entries of a .jsonl file, without a last line that an interruption cut short: a list (empty without the file)."""
    if not Path(path).exists():
        return []
    entries = []
    for line in Path(path).read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def write_json_lines(path, entries, writer=""):
    with atomic_path(path, writer) as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def append_json_line(path, entry):
    """Add one line in a single write, so that processes sharing the file do not mix their lines."""
    with open(path, "ab", buffering=0) as file:
        file.write((json.dumps(entry) + "\n").encode())


def read_index(folder):
    """What extract_teacher.py made: the entries of index.jsonl and of the index-*.jsonl of its separate writers, one a map, in order."""
    entries = {(entry["image"], entry["version"]): entry for path in sorted(Path(folder).glob("index*.jsonl")) for entry in read_json_lines(path)}
    return [entries[key] for key in sorted(entries)]


def require_room(folder, need, what):
    """Raise RunFailed unless the disk of a folder (which need not exist yet) has room for `need` bytes more."""
    free = free_bytes(folder)
    if need > free:
        raise RunFailed(f"{what} need {need / 1e9:.2f} GB in {folder}, whose disk has {free / 1e9:.2f} GB free; give a folder on a larger disk")


def free_bytes(folder):
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def require_same_settings(path, settings, free=(), flag="--out", writer=""):
    """Keep a folder to one set of settings: write them on the first run, and refuse other ones on the next.

    path: the JSON file of the settings. free: keys that may differ (library versions, say). flag: what names the folder.
    Raises WrongCall.
    """
    if not Path(path).exists():
        write_json(path, settings, writer)
        return
    before = read_json(path, "an earlier run")
    differing = [key for key in settings if key not in free and before.get(key) != settings[key]]
    if differing:
        changes = ", ".join(f"{key} was {before.get(key)!r} and is now {settings[key]!r}" for key in differing)
        raise WrongCall(f"{Path(path).parent} was made with other settings: {changes}. Give another {flag}, or delete that folder")


# ---- device, precision, ranks ----------------------------------------------------------------------------------------

@dataclass
class Runtime:
    """Where and how a stage computes. precision is "fp32", "bf16" or "fp16"; rank and world count torchrun's processes."""
    device: torch.device
    precision: str
    rank: int = 0
    world: int = 1

    def autocast(self):
        """The context for forward passes: matrix products in `precision`, normalisation and softmax kept in fp32 by torch."""
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")

    def barrier(self):
        self.add_up(torch.zeros(1, device=self.device))

    def add_up(self, tensor):
        """Sum a tensor over all processes, in place, and return it. Raises RunFailed when one of them is gone."""
        if self.world > 1:
            try:
                torch.distributed.all_reduce(tensor)
                if tensor.is_cuda:
                    torch.cuda.synchronize()  # where a lost process shows
            except RuntimeError as error:
                raise RunFailed(f"process {self.rank} lost the others ({str(error).splitlines()[0][:120]}); their own lines say why. "
                                "What was saved is kept, and the same command continues from there") from None
        return tensor


def start_runtime(device="auto", precision="auto", seed=0):
    """Choose the device and the precision, seed torch, join torchrun's processes. Raises WrongCall for what is not there.

    precision "auto" is fp16 on a GPU (half the time, as in the paper) and fp32 on a CPU.
    """
    rank, world, local = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WrongCall(f"--device {device}: {str(error).splitlines()[0]}") from None
    if precision == "auto":
        precision = "fp16" if device.type == "cuda" else "fp32"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(seed)
    if world > 1:
        # one process may wait for another's last images for long; that one has died is seen by torchrun
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
    runtime = Runtime(device, precision, rank, world)
    if rank == 0:
        print(f"device {device}, precision {precision}" + (f", {world} processes" if world > 1 else f", {torch.get_num_threads()} threads"))
    return runtime


def prefetch(function, items, workers=2):
    """function(item) for each item, in order, computed ahead by threads (decoding and resizing release the interpreter)."""
    with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
        waiting, items = collections.deque(), iter(items)
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


# ---- pictures --------------------------------------------------------------------------------------------------------

def list_images(root):
    """The pictures under a folder (or the one that is given itself), as sorted paths relative to it. Raises RunFailed."""
    root = Path(root)
    if root.is_file():
        return [root.name]
    if not root.is_dir():
        raise RunFailed(f"{root}: no such folder; give a folder of {', '.join(sorted(IMAGE_SUFFIXES))} pictures")
    paths = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise RunFailed(f"{root} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))}), nor does any folder below it")
    return paths


def to_rgb(picture):
    """A PIL image of any mode as an upright RGB tensor (3, H, W) uint8; transparency is laid over white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits a pixel; PIL's own conversion would clip it at 255
        picture = Image.fromarray((np.asarray(picture, np.float64).clip(0, 65535) / 257 + 0.5).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def read_image(path):
    """A picture file as (3, H, W) uint8. Raises RunFailed, naming the file, if it cannot be decoded whole."""
    try:
        with Image.open(path) as picture:
            return to_rgb(picture)
    except FileNotFoundError:
        raise RunFailed(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises many types for damaged pixels and metadata
        raise RunFailed(f"{path} cannot be read as a picture: {error}") from None


def resize_image(image, size):
    """Bilinear without antialiasing, rounded to 8 bits as the published preprocessing does: (3, H, W) uint8 -> (3, *size)."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    resized = F.interpolate(image[None].float(), size=tuple(size), mode="bilinear", align_corners=False)[0]
    return resized.round_().to(torch.uint8)


def nearest_multiple(length, patch):
    """The multiple of patch nearest to length, at least one patch."""
    return max(patch, int(length / patch + 0.5) * patch)


def fit_to_patches(image, patch):
    """Resample to sides that are multiples of the patch, so that cells and pixels stay aligned: (3, H, W) -> (3, H', W')."""
    return resize_image(image, [nearest_multiple(side, patch) for side in image.shape[-2:]])


def resize_short_side(image, short_side, longest=2048):
    """Keep the aspect ratio; the short side becomes short_side unless the long one would pass longest (the protocol's resize)."""
    height, width = image.shape[-2:]
    scale = min(short_side / min(height, width), longest / max(height, width))
    return resize_image(image, [max(1, int(side * scale + 0.5)) for side in (height, width)])


# ---- augmentation: once per image, because a teacher map belongs to one version of it (method.md, "Distillation") -------

@dataclass
class Augmentation:
    """Resize into a box of (long_side r, short_side r), r uniform in ratio; enlarge to min_side; or crop; flip."""
    long_side: int
    short_side: int
    ratio: tuple
    min_side: int
    crop_prob: float
    flip_prob: float


# the paper's lengths, which belong to a window of 512; "large" is its extended range (supplement 6)
PRESETS = {"paper": Augmentation(2048, 1024, (0.5, 1.0), 512, 0.5, 0.5), "large": Augmentation(2560, 2560, (0.2, 1.0), 512, 0.5, 0.5)}

# for tiny, whose window is 128 and whose pictures are no larger than 450
DEMO_AUGMENTATION = {"paper": Augmentation(448, 448, (0.7, 1.0), 128, 0.3, 0.5), "large": Augmentation(640, 640, (0.2, 1.0), 128, 0.5, 0.5)}


def plan_augmentation(size, augmentation, patch, seed):
    """Draw one version of an image.

    size: (H, W) of the image. augmentation: None only makes the sides multiples of the patch. seed: of any hashable text.
    Returns {"resize": [H, W], "crop": [top, left, H, W] or None, "flip": bool}, with the final sides multiples of patch.
    """
    height, width = size
    if augmentation is None:
        return {"resize": [nearest_multiple(height, patch), nearest_multiple(width, patch)], "crop": None, "flip": False}
    rng = np.random.default_rng(zlib.crc32(seed.encode()))
    low, high = augmentation.ratio
    ratio = rng.uniform(low, high)
    scale = min(augmentation.long_side * ratio / max(size), augmentation.short_side * ratio / min(size))
    enlarged = scale * min(size) < augmentation.min_side
    if enlarged:
        scale = augmentation.min_side / min(size)
    height, width = int(height * scale + 0.5), int(width * scale + 0.5)
    crop, flip = None, False
    cropped = rng.uniform() < augmentation.crop_prob and not enlarged
    if cropped:
        sides = [max(patch, int(rng.uniform(max(augmentation.min_side, 0.4 * side), side)) // patch * patch) for side in (height, width)]
        crop = [int(rng.integers(0, side - kept + 1)) for side, kept in zip((height, width), sides)] + sides
    else:
        height, width = (max(patch, side // patch * patch) for side in (height, width))
    flip = bool(rng.uniform() < augmentation.flip_prob)
    return {"resize": [height, width], "crop": crop, "flip": flip}


def apply_augmentation(image, plan):
    """(3, H, W) uint8 -> the planned version, (3, H', W') uint8."""
    image = resize_image(image, plan["resize"])
    if plan["crop"] is not None:
        top, left, height, width = plan["crop"]
        image = image[:, top:top + height, left:left + width]
    return image.flip(-1) if plan["flip"] else image


def planned_size(plan):
    """(H, W) of the image that a plan makes."""
    return tuple(plan["crop"][2:]) if plan["crop"] else tuple(plan["resize"])


# ---- backbones -------------------------------------------------------------------------------------------------------

BACKBONES = {
    "tiny": f"local-dir:{DEMO / 'tiny'}",
    "siglip2": "ViT-B-16-SigLIP2-512/webli",
    "openclip": "ViT-B-16/laion2b_s34b_b88k",
    "dinov3txt": "torch.hub facebookresearch/dinov3 dinov3_vitl16_dinotxt_tet1280d20h24l",
    "siglip2-naflex": "hf-hub:timm/ViT-B-16-SigLIP2-naflex",
}
DINOV3 = "dinov3txt_model.safetensors"  # what a folder with a student of DINOv3.txt holds


def resize_positions(table, grid, new_grid):
    """Learned positional embeddings for another grid (method.md, "Student"): bicubic, by size, without antialiasing.

    table: (h * w, C) for grid (h, w). Returns (h' * w', C); the table itself when the grid is the same.
    """
    if tuple(grid) == tuple(new_grid):
        return table
    image = table.float().reshape(1, *grid, -1).permute(0, 3, 1, 2)  # (1, C, h, w)
    image = F.interpolate(image, size=tuple(new_grid), mode="bicubic", align_corners=False, antialias=False)
    return image.permute(0, 2, 3, 1).reshape(new_grid[0] * new_grid[1], -1).to(table.dtype)


def one_by_one(function, tokens, most=2 ** 15):
    """function on each token as a sequence of its own, where attention over the one key is its value, exactly: (B, n, C) -> (B, n, C').

    most: sequences at a time (CUDA's attention kernels take fewer than 2^16).
    """
    parts = tokens.flatten(0, 1).unsqueeze(1).split(most)  # (B * n, 1, C)
    return torch.cat([function(part) for part in parts]).view(*tokens.shape[:2], -1)


def self_attention(attention, tokens, values_only=False):
    """An nn.MultiheadAttention of tokens (B, n, C) with themselves, or the values alone, which is what each token sees of itself.

    The module itself puts n before B, and for that torch's matrix products in bf16 on a CPU copy the weights once per sequence.
    """
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    if values_only:
        width = tokens.shape[-1]
        return attention.out_proj(F.linear(tokens, weight[2 * width:], bias[2 * width:]))
    queries, keys, values = F.linear(tokens, weight, bias).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.out_proj(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))


class Backbone(nn.Module):
    """A vision-language ViT as a dense feature extractor for images of any size; one subclass per family of towers.

    The forward pass is embed -> run_blocks -> project. Tokens (B, n, C) that enter block k can be kept and continued from with
    run_blocks(tokens, grid, start=k), which is how frozen blocks are computed once.

    Dense features follow from how the tower pools its patches into an image embedding, which is what was aligned with text:
    by a class token, the last block's attention matrix becomes the identity (MaskCLIP); by attention, the pooling's value path
    is taken; by their mean, the patches themselves are what it is the mean of.

    Attributes: visual (the image tower), model (both towers, or None where the text tower was not loaded), blocks (its ViT
    blocks), patch (pixels), window (native H, W in pixels; None if there is no such size), dim (D, shared with the text),
    pooling ("class token", "attention" or "mean"), mean and std (of the normalisation), source (the arguments of load_backbone).
    """
    visual_prefix = "visual."  # of the image tower's keys in the state dict of both towers

    def __init__(self, model, preprocess):
        super().__init__()
        self.model = model
        self.visual = model.get_submodule(self.visual_prefix[:-1])
        self.register_buffer("mean", torch.tensor(preprocess["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess["std"]).view(3, 1, 1), persistent=False)

    def normalise(self, images):
        """(..., 3, H, W) uint8 -> float32 as the model was trained on."""
        return (images.to(self.mean.device, torch.float32) / 255 - self.mean) / self.std

    def embed(self, images):
        """Normalised images (B, 3, H, W) -> tokens (B, n, C) that enter the first block, with their positions added."""
        raise NotImplementedError

    def run_block(self, index, tokens, grid):
        """One block, on the tokens of an (h, w) grid: (B, n, C) -> (B, n, C)."""
        raise NotImplementedError

    def project(self, tokens, grid):
        """Tokens after the last block -> text-aligned patch features (B, h, w, D)."""
        raise NotImplementedError

    def run_blocks(self, tokens, grid, start=0, stop=None):
        """Blocks start..stop-1 (all by default): (B, n, C) -> (B, n, C)."""
        for index in range(start, len(self.blocks) if stop is None else stop):
            tokens = self.run_block(index, tokens, grid)
        return tokens

    def grid(self, images):
        """(h, w) of the patch grid of images (..., H, W), whose sides must be multiples of the patch."""
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"an image of {height} x {width} is not divisible by the patch of {self.patch}; use fit_to_patches")
        return height // self.patch, width // self.patch

    def encode_dense(self, images):
        """Text-aligned patch features in a single pass: normalised (B, 3, H, W) -> (B, H/patch, W/patch, D), not L2-normalised."""
        grid = self.grid(images)
        return self.project(self.run_blocks(self.embed(images), grid), grid)

    def flops(self, size):
        """FLOP of the matrix products and convolutions of encode_dense on one image of (H, W) pixels; a multiply-add counts as two.

        Counted by torch on a copy without data. Gradients are on because torch's fused inference kernel hides its products.
        """
        from torch.utils.flop_counter import FlopCounterMode
        empty = {id(p): nn.Parameter(p.detach().to("meta")) for p in self.parameters()} | {id(b): b.detach().to("meta") for b in self.buffers()}
        with FlopCounterMode(display=False) as counter, torch.enable_grad():
            copy.deepcopy(self, empty).encode_dense(torch.empty(1, 3, *size, device="meta"))
        return counter.get_total_flops()

    @functools.cached_property
    def tokenizer(self):
        """The tokenizer that the model was trained with. Raises RunFailed where its files are missing or do not fit."""
        import open_clip
        name = self.source["name"]
        architecture, tag = resolve_backbone(name)
        try:
            with quiet_open_clip():
                tokenizer = open_clip.get_tokenizer(architecture)
        except Exception as error:  # transformers raises many types here
            raise RunFailed(f"the tokenizer of --backbone {name} cannot be loaded: {first_line(error)}. {offline_advice(architecture, tag)}") from error
        if isinstance(tokenizer, open_clip.tokenizer.HFTokenizer):
            ids, inner = tokenizer(["a"])[0], tokenizer.tokenizer
            if ids[0] == inner.pad_token_id or inner.eos_token_id is not None and inner.eos_token_id not in ids:
                raise RunFailed(f"the tokenizer of --backbone {name} pads on the left or ends no text with {inner.eos_token!r}: its tokenizer.json and "
                                "tokenizer_config.json are not the ones of this model; fetch them again")
        return tokenizer

    def encode_text(self, texts):
        """N strings -> (N, D) float32, not L2-normalised."""
        return self.both_towers().encode_text(self.tokenizer(texts).to(self.mean.device)).float()

    def both_towers(self):
        """The model with its text tower, which is fetched from where the image tower came if it was not loaded."""
        if self.model is None:
            self.model = load_backbone(**self.source, text=True, device=self.mean.device).model
            setattr(self.model, self.visual_prefix[:-1], self.visual)
        return self.model

    def save(self, folder):
        """Write a folder that plain open_clip loads: configuration, weights, and the tokenizer where it is the model's own. Returns how to load it."""
        config = model_config(self.source["name"])["model_cfg"]
        save_open_clip(self.both_towers(), config, folder)
        if config["text_cfg"].get("hf_tokenizer_name"):
            try:
                self.tokenizer.tokenizer.save_pretrained(folder)
            except RunFailed as error:
                print(f"warning: saved without a tokenizer, which open_clip needs beside it: {error}", file=sys.stderr)
        return f"open_clip.create_model_and_transforms('local-dir:{folder}')"


class NativeViT(Backbone):
    """open_clip's own VisionTransformer (OpenCLIP, CLIPA, CoCa), pooled by class token, by mean or by attention."""

    def __init__(self, model, preprocess):
        super().__init__(model, preprocess)
        visual = self.visual
        if visual.pool_type == "none" or visual.patch_size[0] != visual.patch_size[1]:
            raise WrongCall("its image tower pools twice, or has patches that are not square")
        self.blocks = visual.transformer.resblocks
        self.patch = visual.patch_size[0]
        self.window = tuple(side * self.patch for side in visual.grid_size)  # what it sees of its image size
        self.dim = visual.output_dim
        self.pooling = "attention" if visual.attn_pool is not None else {"tok": "class token", "avg": "mean"}[visual.pool_type]

    def embed(self, images):
        visual, grid = self.visual, self.grid(images)
        patches = visual.conv1(images).flatten(2).transpose(1, 2)  # (B, h * w, C)
        positions = visual.positional_embedding
        patches = patches + resize_positions(positions[1:], visual.grid_size, grid).to(patches.dtype)
        class_token = (visual.class_embedding + positions[0]).to(patches.dtype).expand(len(images), 1, -1)
        return visual.ln_pre(torch.cat([class_token, patches], 1))

    def run_block(self, index, tokens, grid):
        block = self.blocks[index]
        values_only = index == len(self.blocks) - 1 and self.pooling == "class token"  # MaskCLIP
        if values_only:
            tokens = tokens[:, 1:]  # the class token serves no patch from here on
        if not isinstance(block.attn, nn.MultiheadAttention):
            return one_by_one(block, tokens) if values_only else block(tokens)
        tokens = tokens + block.ls_1(self_attention(block.attn, block.ln_1(tokens), values_only))
        return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))

    def project(self, tokens, grid):
        visual = self.visual
        patches = tokens if self.pooling == "class token" else tokens[:, 1:]
        if self.pooling == "attention":  # every query sees the one key, so any of them gives its value
            pool = visual.attn_pool
            query = pool.ln_q(pool.query[:1])
            patches = one_by_one(lambda keys: pool.attn(query.expand(len(keys), 1, -1), keys, keys, need_weights=False)[0], pool.ln_k(patches))
        return (visual.ln_post(patches) @ visual.proj).unflatten(1, grid)


class TimmViT(Backbone):
    """timm's VisionTransformer in open_clip (SigLIP 1 and 2, MobileCLIP-B, ViTamin), pooled by class token, by mean or by attention."""

    def __init__(self, model, preprocess):
        super().__init__(model, preprocess)
        trunk = self.trunk = self.visual.trunk
        if trunk.global_pool not in ("token", "avg", "map"):
            raise WrongCall(f"its image tower pools its patches by {trunk.global_pool!r}; known are token, avg and map")
        self.blocks = trunk.blocks
        self.dim = self.visual.head[-1].out_features if len(self.visual.head) else trunk.num_classes or trunk.embed_dim
        self.pooling = {"token": "class token", "avg": "mean", "map": "attention"}[trunk.global_pool]
        self.set_sizes()

    def set_sizes(self):
        embedding = self.trunk.patch_embed
        embedding.strict_img_size = False  # it would refuse every size but the native one
        self.patch = embedding.feat_ratio()
        self.window = tuple(side * self.patch for side in embedding.grid_size)  # SO400M-14-SigLIP-384 sees 378 of its 384 pixels

    def embed(self, images):
        trunk, grid = self.trunk, self.grid(images)
        patches = trunk.patch_embed(images)  # (B, h * w, C)
        first = [token for token in (trunk.cls_token, trunk.reg_token) if token is not None]
        first = torch.cat(first, 1) if first else patches.new_empty(1, 0, patches.shape[-1])  # class token, registers
        if trunk.pos_embed is not None:
            table, own = trunk.pos_embed[0], 0 if trunk.no_embed_class else trunk.num_prefix_tokens
            patches = patches + resize_positions(table[own:], trunk.patch_embed.grid_size, grid).to(patches.dtype)
            first = first + table[:own] if own else first
        return trunk.norm_pre(torch.cat([first.to(patches.dtype).expand(len(images), -1, -1), patches], 1))

    def attend(self, block, tokens, grid):
        return block(tokens)

    def run_block(self, index, tokens, grid):
        if index < len(self.blocks) - 1 or self.pooling != "class token":
            return self.attend(self.blocks[index], tokens, grid)
        patches = tokens[:, self.trunk.num_prefix_tokens:]
        return one_by_one(self.blocks[index], patches)  # MaskCLIP

    def project(self, tokens, grid):
        trunk = self.trunk
        patches = trunk.norm(tokens if self.pooling == "class token" else tokens[:, trunk.num_prefix_tokens:])
        if self.pooling == "attention":
            pool, width = trunk.attn_pool, patches.shape[-1]
            patches = pool.proj(F.linear(patches, pool.kv.weight[width:], None if pool.kv.bias is None else pool.kv.bias[width:]))
            patches = patches + pool.mlp(pool.norm(patches))
        return self.visual.head(trunk.head(trunk.fc_norm(patches))).unflatten(1, grid)


class EvaViT(TimmViT):
    """timm's Eva in open_clip (EVA-01 and EVA-02, PE-Core), whose blocks take rotary positions.

    These are computed for the grid at hand, stretched over the native one's range as timm does for other sizes.
    """

    def __init__(self, model, preprocess):
        super().__init__(model, preprocess)
        if self.trunk.rope_mixed:
            raise WrongCall("its rotary positions differ from block to block, which is not supported")

    def attend(self, block, tokens, grid):
        rope = self.trunk.rope
        if rope is None:
            return block(tokens)
        rope.update_feat_shape(list(grid))
        return block(tokens, rope=rope.get_embed())


class NaFlexViT(TimmViT):
    """timm's NaFlexVit in open_clip (SigLIP2 NaFlex), which takes any grid and interpolates its positions itself, bilinearly."""

    def set_sizes(self):
        self.window, self.patch = None, self.trunk.embeds.patch_size[0]

    def embed(self, images):
        return self.trunk.norm_pre(self.trunk.embeds(images)[0])


class DinoTxt(Backbone):
    """DINOv3.txt from its public code: the patch tokens after the vision head's two blocks, against the patch half of the text.

    `blocks` are the backbone's; the head's belong to project. Stays in eval mode, or its rotary positions would be random.
    """
    visual_prefix = "visual_model."
    window = (384, 384)  # of the teacher; its positions are rotary, so that no size is native
    pooling = "mean"

    def __init__(self, model, tokenizer):
        import open_clip
        super().__init__(model, {"mean": open_clip.constants.IMAGENET_MEAN, "std": open_clip.constants.IMAGENET_STD})
        self.vit = self.visual.backbone
        assert not self.vit.untie_cls_and_patch_norms, "class token and patches must share their norm"
        self.blocks, self.patch, self.dim = self.vit.blocks, self.vit.patch_size, self.vit.embed_dim
        self.tokenizer = tokenizer

    def embed(self, images):
        return self.vit.prepare_tokens_with_masks(images)[0]

    def run_block(self, index, tokens, grid):
        return self.blocks[index](tokens, self.vit.rope_embed(H=grid[0], W=grid[1]))

    def project(self, tokens, grid):
        return self.visual.head(self.vit.norm(tokens))[:, 1 + self.vit.n_storage_tokens:].unflatten(1, grid)

    def encode_text(self, texts):
        tokens = self.tokenizer.tokenize(texts).to(self.mean.device)
        return self.both_towers().encode_text(tokens).float()[:, self.dim:]  # after the class token's half

    def save(self, folder):
        """One file, which the public code's model loads strictly with load_state_dict; it stays under the DINOv3 licence."""
        from safetensors.torch import save_file
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self.both_towers().state_dict().items()}
        with atomic_path(Path(folder) / DINOV3) as temporary:
            save_file(tensors, temporary, metadata={"license": "DINOv3 License", "architecture": BACKBONES["dinov3txt"]})
        return f"load_state_dict(safetensors.torch.load_file('{folder}/{DINOV3}')) of the public code's model"


def resolve_backbone(name):
    """A --backbone value as open_clip's (model name, pretrained tag). A folder may be given as it is. Raises WrongCall."""
    import open_clip
    name = str(name)
    if name not in BACKBONES and (Path(name) / "open_clip_config.json").is_file():
        name = f"local-dir:{name}"
    identifier = BACKBONES.get(name, name)
    if identifier.startswith(("hf-hub:", "local-dir:")):
        return identifier, None
    architecture, _, tag = identifier.partition("/")
    if architecture not in open_clip.list_models():
        raise WrongCall(f"--backbone {name}: unknown. Known are {', '.join(BACKBONES)}, hf-hub:ORG/NAME, local-dir:PATH and ARCH/PRETRAINED_TAG "
                        "with an architecture of open_clip.list_models()")
    return architecture, tag or None


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def offline_advice(architecture, tag):
    """Where a model's files can be had by hand, and where to put them."""
    import open_clip
    if architecture.startswith("local-dir:"):
        return "The folder must hold open_clip_config.json, the weights it describes and any tokenizer files, as open_clip saves them"
    source = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    repository = architecture.removeprefix("hf-hub:") if architecture.startswith("hf-hub:") else source.get("hf_hub", "").rstrip("/")
    if repository:
        return (f"Without network, fetch open_clip_config.json, the weights and any tokenizer files of https://huggingface.co/{repository} elsewhere, "
                "put them into one folder and give --backbone local-dir:FOLDER; where it is gated, accept its licence there and run: hf auth login")
    if tag and not source:
        return "The file must hold this architecture's weights; with a tokenizer of its own, it belongs into a folder for --backbone local-dir:FOLDER"
    return f"Without network, fetch {source.get('url', 'the weights')} elsewhere and give --backbone {architecture}/FILE"


@contextlib.contextmanager
def quiet_open_clip():
    """open_clip and huggingface_hub log warnings where nothing is wrong, and errors that they then raise as well."""
    import logging
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def model_config(name):
    """What a folder's open_clip_config.json holds, of the model behind a --backbone value: {"model_cfg": ..., "preprocess_cfg"?: ...}."""
    import open_clip
    architecture, tag = resolve_backbone(name)
    if name == "siglip2-naflex":  # open_clip 3.3 has no configuration of it; all but the trunk is that of its sibling
        config = open_clip.get_model_config("ViT-B-16-SigLIP2-512")
        config["vision_cfg"]["timm_model_name"] = "naflexvit_base_patch16_siglip"
        return {"model_cfg": config}
    if ":" in architecture:
        config = (read_json(Path(architecture.removeprefix("local-dir:")) / "open_clip_config.json", "open_clip") if architecture.startswith("local-dir:") else
                  open_clip.factory._get_hf_config(architecture.removeprefix("hf-hub:")))
        config["model_cfg"]["vision_cfg"].pop("image_seq_len", None)  # of NaFlex towers; newer than the open_clip of today
        return config
    config = open_clip.get_model_config(architecture)
    if tag and open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu"):
        config["quick_gelu"] = True  # as the weights were trained; open_clip only warns
    return {"model_cfg": config}


def normalisation(architecture, tag):
    """Mean and standard deviation of a built-in architecture's pictures: those of its tag, or for a file those of its other published weights."""
    import open_clip
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    published = open_clip.get_pretrained_cfg(architecture, tag if tag in tags else tags[0]) if tags else {}
    return {key: published[key] for key in ("mean", "std") if key in published}


def weights_file(architecture, tag):
    """The file of a model's weights, downloaded into the cache of huggingface_hub or open_clip if need be. Raises many types."""
    import open_clip
    from open_clip.pretrained import download_pretrained_from_hf
    if architecture.startswith("local-dir:"):
        folder = architecture.removeprefix("local-dir:")
        path = open_clip.factory._find_checkpoint_in_dir(Path(folder))
        if path is None:
            raise FileNotFoundError(f"{folder} holds no weights")
        return path
    if architecture.startswith("hf-hub:"):
        return download_pretrained_from_hf(architecture.removeprefix("hf-hub:"))
    if Path(tag).is_file():
        return tag
    return open_clip.download_pretrained(open_clip.get_pretrained_cfg(architecture, tag))


def load_image_tower(model, path):
    """Fill model.visual from a file of both towers, strictly, without reading the text tower's weights (safetensors are memory-mapped)."""
    from open_clip.convert import convert_state_dict
    from open_clip.factory import load_state_dict
    state = convert_state_dict(model, load_state_dict(path))
    load_strictly(model.visual, {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}, path)


STUB = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}  # stands in for a text tower that is not needed


def create_open_clip(name, random_init, text, device):
    """open_clip's model behind a --backbone value, with its weights and preprocessing; without text its text tower is a stub."""
    import open_clip
    architecture, tag = resolve_backbone(name)
    config = model_config(name)["model_cfg"]
    path = None if random_init else str(weights_file(architecture, tag))
    whole = text or path is not None and path.endswith(".npz")  # big_vision's files, which open_clip converts whole
    overrides = {"vision_cfg": config["vision_cfg"]}
    if "timm_model_name" in config["vision_cfg"]:
        overrides["vision_cfg"] |= {"timm_model_pretrained": False}
    if not whole:
        overrides |= {key: STUB for key in ("text_cfg", "multimodal_cfg") if key in config}
    base = "ViT-B-16-SigLIP2-512" if name == "siglip2-naflex" else architecture
    model = open_clip.create_model(base, load_weights=False, pretrained_text=False, device=device, force_quick_gelu=config.get("quick_gelu", False),
                                   force_preprocess_cfg={} if ":" in base else normalisation(base, tag), **overrides)
    if path is not None and not path.endswith(".npz"):
        load_image_tower(model, path)
    if path is not None and whole:
        open_clip.factory.load_checkpoint(model, path)
    return model


def image_family(visual):
    """The Backbone class for open_clip's image tower. Raises WrongCall, saying why, for one that has none."""
    import open_clip
    from timm.models import eva, naflexvit, vision_transformer
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        return NativeViT
    if isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        raise WrongCall("its image tower is a ResNet (ModifiedResNet), which has neither patch tokens nor blocks of a transformer")
    trunk = type(visual.trunk)
    families = {vision_transformer.VisionTransformer: TimmViT, eva.Eva: EvaViT, naflexvit.NaFlexVit: NaFlexViT}
    if trunk in families:
        return families[trunk]
    if trunk.__name__ == "VisionTransformerRelPos":
        raise WrongCall("its image tower has tables of relative positions, which belong to one grid size")
    raise WrongCall(f"its image tower is a {trunk.__name__}, convolutional or hierarchical: it has no one sequence of patch tokens")


def load_backbone(name, random_init=False, device="cpu", text=False, hub_dir=None, dinov3_weights=None):
    """A pre-trained model by its --backbone value (interface.md), frozen, in eval mode, on device.

    random_init builds the architecture without weights. text: load the text tower too, for encode_text. hub_dir: a clone of DINOv3's
    public code; dinov3_weights: its (backbone, head and text) files. Raises WrongCall for a name or tower that cannot
    work, RunFailed when weights cannot be had.
    """
    import open_clip
    if name == "dinov3txt" or (Path(name) / DINOV3).is_file():
        backbone = load_dinotxt(name, random_init, hub_dir, dinov3_weights)
    else:
        architecture, tag = resolve_backbone(name)
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if not random_init and ":" not in architecture and tag not in tags and not Path(tag or "").is_file():
            raise WrongCall(f"--backbone {name}: give weights as {architecture}/TAG, where TAG is a file or one of {', '.join(tags) or '(none are published)'}; "
                            "or --random-init")
        if tag and tag not in tags and any(open_clip.get_pretrained_cfg(architecture, each).get("quick_gelu") for each in tags):
            print(f"{name}: taken as trained with GELU; if it was QuickGELU, as OpenAI's weights were, give {architecture}-quickgelu/FILE", file=sys.stderr)
        try:
            with quiet_open_clip():
                model = create_open_clip(name, random_init, text, device)
            backbone = image_family(model.visual)(model, open_clip.get_model_preprocess_cfg(model))
        except WrongCall as error:
            raise WrongCall(f"--backbone {name}: {error}") from None
        except RunFailed:
            raise
        except Exception as error:  # open_clip raises many types here, most of them from the libraries below it
            raise RunFailed(f"--backbone {name} cannot be loaded: {first_line(error)}. {offline_advice(architecture, tag)}") from error
    backbone.source = {"name": str(name), "random_init": random_init, "hub_dir": hub_dir, "dinov3_weights": dinov3_weights}
    if not text:
        backbone.model = None
    return backbone.to(device).eval().requires_grad_(False)


def hub_clone(name, hub_dir):
    """The clone of a public repository that --hub-dir gives: the folder itself, or the one in it of that name. None without --hub-dir. Raises WrongCall."""
    if hub_dir is None:
        return None
    for folder in (Path(hub_dir) / name, Path(hub_dir)):
        if (folder / "hubconf.py").is_file():
            return folder
    raise WrongCall(f"--hub-dir {hub_dir} holds no hubconf.py, nor does a folder {name} in it; give a clone of the repository that --help names")


def load_dinotxt(name, random_init, hub_dir, weights):
    """DINOv3.txt through its public entry point, or a student of it from the folder `name`."""
    import open_clip
    entry = "dinov3_vitl16_dinotxt_tet1280d20h24l"
    where = ("--backbone dinov3txt needs DINOv3's public code and two weight files: ask for these at https://ai.meta.com/resources/models-and-libraries/dinov3-downloads, "
             "then give --dinov3-weights dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth dinov3_vitl16_dinotxt_vision_head_and_text_encoder-a442d8f5.pth, and, "
             "without network, --hub-dir FOLDER, a clone of https://github.com/facebookresearch/dinov3")
    clone, student = hub_clone("dinov3", hub_dir), None if name == "dinov3txt" else Path(name) / DINOV3
    if not (random_init or student or weights):
        raise WrongCall(where)
    for path in weights or ():
        if not Path(path).is_file():
            raise WrongCall(f"--dinov3-weights {path}: no such file. {where}")
    arguments = {"pretrained": False, "bpe_path_or_url": str(Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz"))}
    try:
        with warnings.catch_warnings(), torch.device("cpu" if random_init else "meta"):  # 0.9 G parameters need no values before the file's
            warnings.simplefilter("ignore")
            if clone is None:
                with contextlib.suppress(ModuleNotFoundError):  # its hubconf.py imports packages that this model does not need; the download is what counts
                    torch.hub.list("facebookresearch/dinov3", trust_repo=True, verbose=False)
                clone = Path(torch.hub.get_dir()) / "facebookresearch_dinov3_main"
            sys.path.insert(0, str(clone))
            try:
                model, tokenizer = getattr(importlib.import_module("dinov3.hub.dinotxt"), entry)(**arguments)
            finally:
                sys.path.remove(str(clone))
    except Exception as error:  # no network, no such clone, a package that is missing
        raise RunFailed(f"DINOv3's public code cannot be used: {first_line(error)}. {where}") from error
    if student:
        load_strictly(model, read_tensors(student), student)
    elif not random_init:
        # the second file lacks the backbone, and nothing else
        load_strictly(model, {f"visual_model.backbone.{key}": value for key, value in read_tensors(weights[0]).items()} | read_tensors(weights[1]),
                      " with ".join(map(str, weights)))
    return DinoTxt(model, tokenizer)


# ---- checkpoints that others saved -------------------------------------------------------------------------------------

class Unread:
    """Stands for an object in a checkpoint whose class is not loaded: settings and the like, beside the tensors."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass


def read_tensors(path):
    """The tensors of a .safetensors or torch file by name, whatever wraps them as "state_dict". Nothing in it is executed. Raises RunFailed."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Unread, name) for name in unknown]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise RunFailed(f"{path} holds objects that cannot be passed over without running code of theirs; save its state dict alone, as safetensors") from None
    except Exception as error:  # torch and safetensors raise many types for a damaged file
        raise RunFailed(f"{path} cannot be read as weights: {first_line(error)}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise RunFailed(f"{path} holds no state dict (tensors by name), neither itself nor as \"state_dict\"")
    return tensors


def load_strictly(module, tensors, source):
    """module.load_state_dict with an error that names keys. Raises RunFailed for any that is missing, too many or of another shape."""
    expected = module.state_dict()
    wrong = {"missing": [key for key in expected if key not in tensors], "unknown": [key for key in tensors if key not in expected],
             "of another shape": [key for key in tensors if key in expected and tensors[key].shape != expected[key].shape]}
    complaints = [f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" for what, keys in wrong.items() if keys]
    if complaints:
        raise RunFailed(f"{source} does not fit this architecture: of its weights, {'; '.join(complaints)}")
    module.load_state_dict(tensors, assign=any(tensor.is_meta for tensor in expected.values()))


def load_checkpoint(backbone, path):
    """Fill a backbone from an official SPAR checkpoint: the state dict of both towers, or of the image tower alone.

    Its keys are those of the model with "model." before them, or "segmentor.net.model." as Lightning saved them.
    """
    tensors = read_tensors(path)
    for prefix in ("segmentor.net.model.", "model."):
        if any(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
            break
    image = {key.removeprefix(backbone.visual_prefix): value for key, value in tensors.items() if key.startswith(backbone.visual_prefix)}
    if backbone.model is None or len(image) == len(tensors):
        load_strictly(backbone.visual, image, path)
    else:
        load_strictly(backbone.model, tensors, path)


def save_open_clip(model, config, folder):
    """Write an open_clip model as a folder that open_clip loads as local-dir:FOLDER, with nothing of this repository in it.

    config: its model_cfg.
    """
    import open_clip
    from safetensors.torch import save_file
    preprocess = open_clip.get_model_preprocess_cfg(model)
    config = {"model_cfg": config, "preprocess_cfg": {key: preprocess[key] for key in ("mean", "std", "interpolation", "resize_mode")}}
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    with atomic_path(Path(folder) / "open_clip_model.safetensors") as temporary:
        save_file(tensors, temporary)
    write_json(Path(folder) / "open_clip_config.json", config)


def weights_hash(backbone):
    """sha256 of the image tower's parameters, by which later stages know that they continue from the same weights."""
    digest = hashlib.sha256()
    for parameter in backbone.visual.parameters():
        digest.update(parameter.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


# ---- windows, stitching and stored features (method.md, "Teacher") -----------------------------------------------------------------------

def window_starts(length, window, stride):
    """Starts along an axis: 0, s, 2s, ... and one flush with the border; an axis no longer than the window has the one 0."""
    starts = list(range(0, max(length - window, 0) + 1, stride))
    if starts[-1] + window < length:
        starts.append(length - window)
    return starts


def check_window(window, stride, patch):
    """Raise WrongCall unless every pixel gets covered by windows (H, W) that divide into patches."""
    if any(side % patch or side < patch for side in window):
        raise WrongCall(f"--window {window[0]}: must be a multiple of the patch, {patch}")
    if not 1 <= stride <= min(window):
        raise WrongCall(f"--stride {stride}: must be from 1 to the window's side, {min(window)}, or pixels would be left uncovered (0 is the single pass)")


def chosen_window(backbone, side, stride):
    """(H, W) of the window: of --window, or the native one; checked unless the stride is 0. None for a backbone without either."""
    window = (side, side) if side else backbone.window
    if stride and window is None:
        raise WrongCall(f"--backbone {backbone.source['name']} has no native size to slide over a picture: only the single pass (--stride 0), or give --window")
    if stride:
        check_window(window, stride, backbone.patch)
    return window


def linear_matrix(inputs, outputs):
    """One axis of bilinear resizing (align_corners=False, no antialiasing) as a matrix (outputs, inputs) float64."""
    return F.interpolate(torch.eye(inputs, dtype=torch.float64)[None], size=outputs, mode="linear", align_corners=False)[0].T.contiguous()


def stitch_matrices(length, window, stride, patch, cell, outputs):
    """One axis of the stitching as a matrix per window: (n, outputs, window / patch) float64.

    Upsamples a window's features to cells of `cell` pixels, places them, divides by how many windows cover a cell, and
    resizes the axis from length / cell cells to `outputs`. Rows sum to one over all windows and features.
    """
    starts, window = window_starts(length, window, stride), min(window, length)
    up = linear_matrix(window // patch, window // cell)  # (cells of a window, its features)
    placed = torch.zeros(len(starts), length // cell, window // patch, dtype=torch.float64)
    counts = torch.zeros(length // cell, dtype=torch.float64)
    for index, start in enumerate(starts):
        cells = slice(start // cell, (start + window) // cell)
        placed[index, cells] = up
        counts[cells] += 1
    assert counts.min() > 0, "windows must cover every cell"
    placed /= counts[:, None]
    return placed if outputs == length // cell else linear_matrix(length // cell, outputs) @ placed


class Stitcher:
    """Joins maps of overlapping windows into one, without upsampled maps and without an accumulator of cells.

    Upsampling, averaging over the overlaps and downsampling are linear and separable (the windows lie on a product grid), so
    out[c] = sum over a, b of R_a F_ab[c] C_b^T, with one matrix per row and per column of windows.

    size: (H, W) of the image; window: (H, W); cell: pixels a cell is wide (patch / u for features, 1 for similarities);
    outputs: (H', W') of the result.
    """

    def __init__(self, size, window, stride, patch, cell, outputs, device="cpu"):
        axes = [stitch_matrices(length, side, stride, patch, cell, out) for length, side, out in zip(size, window, outputs)]
        self.row_spans, self.column_spans = [[self.span(weights) for weights in axis] for axis in axes]
        self.rows, self.columns = [axis.to(device, torch.float32) for axis in axes]  # (A, H', i), (B, W', j)
        self.row_sum = self.out = None
        self.next = 0

    @staticmethod
    def span(weights):
        """The outputs that a window touches, as a slice, from its matrix (outputs, features)."""
        used = weights.any(1).nonzero()
        return slice(int(used[0]), int(used[-1]) + 1)

    def add(self, maps):
        """The next windows in reading order: (n, i, j, C), summed in float32."""
        for features in maps:
            row, column = divmod(self.next, len(self.columns))
            if column == 0:
                self.row_sum = features.new_zeros(features.shape[0], self.columns.shape[1], features.shape[2], dtype=torch.float32)
            span = self.column_spans[column]
            self.row_sum[:, span] += self.columns[column, span] @ features.float()  # (i, W'', C)
            if column == len(self.columns) - 1:
                self.add_row(row)
            self.next += 1

    def add_row(self, row):
        """A row of windows whose columns are joined."""
        if self.out is None:
            self.out = self.row_sum.new_zeros(self.rows.shape[1], *self.row_sum.shape[1:])
        span = self.row_spans[row]
        self.out[span].flatten(1).addmm_(self.rows[row, span], self.row_sum.flatten(1))

    def result(self):
        """(H', W', C) float32, once every window was added."""
        assert self.next == len(self.rows) * len(self.columns), "windows are missing"
        return self.out


def cut_windows(image, window, stride):
    """All windows of an image (3, H, W) in reading order, as views: a list of (3, window H, window W)."""
    height, width = image.shape[-2:]
    return [image[:, top:top + window[0], left:left + window[1]]
            for top in window_starts(height, window[0], stride) for left in window_starts(width, window[1], stride)]


CPU_VALUES = 600_000  # features of the windows of one forward pass: with more, a CPU's caches overflow (ViT-B/16: 54 windows are a tenth slower than 6)


def encode_windows(backbone, images, stitchers, window, stride, batch_size, autocast=contextlib.nullcontext, transform=lambda maps: maps):
    """Run the windows of some images through the backbone, in full batches that cross from one image to the next (on a CPU in smaller ones).

    images: normalised (3, H, W), of any sizes; stitchers: one each, which gets transform(features of its windows).
    """
    jobs = [(k, view) for k, image in enumerate(images) for view in cut_windows(image, window, stride)]
    jobs.sort(key=lambda job: job[1].shape)  # only images smaller than the window have other shapes
    with autocast():  # around all batches, or every one of them would cast the weights again
        for _, same in itertools.groupby(jobs, key=lambda job: job[1].shape):
            same = list(same)
            most = batch_size if same[0][1].is_cuda else max(1, min(batch_size, CPU_VALUES // (math.prod(backbone.grid(same[0][1])) * backbone.dim)))
            size = math.ceil(len(same) / math.ceil(len(same) / most))  # even batches, instead of a small last one
            for first in range(0, len(same), size):
                owners, views = zip(*same[first:first + size])
                maps = backbone.encode_dense(torch.stack(views))
                with torch.autocast(maps.device.type, enabled=False):  # similarities and stitching stay in fp32
                    maps, done = transform(maps.float()), 0
                    for owner, run in itertools.groupby(owners):
                        count = len(list(run))
                        stitchers[owner].add(maps[done:done + count])
                        done += count


def open_features(path):
    """A stored teacher map, memory-mapped: (h, w, D) float16. Raises RunFailed if the file is missing, truncated or no such map."""
    remake = "delete the file and run extract_teacher.py again"
    try:
        features = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise RunFailed(f"{path} does not exist; run extract_teacher.py again") from None
    except (ValueError, OSError, EOFError) as error:
        raise RunFailed(f"{path} is no whole .npy file ({error}); {remake}") from None
    if features.ndim != 3 or features.dtype != np.float16:
        raise RunFailed(f"{path} holds {features.dtype} of shape {features.shape} instead of float16 (h, w, D); {remake}")
    return features


@torch.no_grad()
def stitched_features(backbone, images, window, stride, batch_size=60, autocast=contextlib.nullcontext):
    """The teacher's maps (paper, section 3.4): normalised images (3, H, W) of any sizes -> a list of (H/patch, W/patch, D) float32.

    Stride 0 is a single pass over each image.
    """
    if stride == 0:
        with autocast():
            return [backbone.encode_dense(image[None])[0].float() for image in images]
    cell = math.gcd(stride, backbone.patch)  # patch / u
    stitchers = [Stitcher(image.shape[-2:], window, stride, backbone.patch, cell, backbone.grid(image), image.device) for image in images]
    encode_windows(backbone, images, stitchers, window, stride, batch_size, autocast)
    return [stitcher.result() for stitcher in stitchers]


# ---- classes and their embeddings ------------------------------------------------------------------------------------

@dataclass
class Classes:
    """Class names in label order. names[k] lists class k's synonyms, the first of which is what it is called.

    background: class 0 is everything else; its names stand for what that may be, and thresholds (Rule) send pixels to it.
    """
    names: list
    background: bool = False

    def __len__(self):
        return len(self.names)

    @property
    def titles(self):
        titles = [synonyms[0] for synonyms in self.names]
        return ["background", *titles[1:]] if self.background else titles

    @property
    def flat(self):
        """Every name with its synonyms, in order: N strings."""
        return [name for synonyms in self.names for name in synonyms]

    @property
    def owner(self):
        """The class of each flat name: (N,) int64."""
        return torch.tensor([k for k, synonyms in enumerate(self.names) for _ in synonyms])


def read_classes(source, background=None):
    """Classes from a file (one class a line, synonyms separated by commas) or from "cat, grass | lawn, sky" itself.

    background: words for a class 0 before them ("wall, floor"); a first class called "background" is one, too.
    Raises WrongCall for an empty list, an empty name, a repeated one, or more classes than a label PNG can hold.
    """
    if os.path.isfile(source):  # False also for a list of names that is too long for a path
        try:
            where, entries = f"--classes {source}", [line.split(",") for line in Path(source).read_text(encoding="utf-8-sig").strip().splitlines()]
        except UnicodeDecodeError:
            raise WrongCall(f"--classes {source} is no UTF-8 text; save it as such, one class a line") from None
    elif str(source).endswith((".txt", ".csv", ".json")) or os.sep in str(source) or os.path.isdir(source):
        raise WrongCall(f"--classes {source}: no such file")
    else:
        where, entries = "--classes", [entry.split("|") for entry in str(source).split(",")] if str(source).strip() else []
    names = [[name.strip() for name in entry] for entry in entries]
    if not names:
        raise WrongCall(f"{where}: the list is empty; give one class a line, or \"cat, grass | lawn, sky\"")
    if background is not None:
        names.insert(0, [name.strip() for name in background.split(",")])
        if any(entry[0].lower() == "background" for entry in names[1:]):
            raise WrongCall(f"{where}: a class called background, beside the one of --background; leave one of them out")
    if len(names) > IGNORE:
        raise WrongCall(f"{where}: {len(names)} classes, but labels are one byte, and {IGNORE} is ignored; at most {IGNORE} classes can be told apart")
    seen = {}
    for line, synonyms in enumerate(names, 0 if background is not None else 1):
        for name in synonyms:
            if not name:
                raise WrongCall(f"{where}: class {line} has an empty name" if line else "--background: an empty name; give words like \"wall, floor\"")
            if name.lower() in seen:
                raise WrongCall(f"{where}: '{name}' stands for class {seen[name.lower()]} and again for class {line}; a name must be unique")
            seen[name.lower()] = line
    return Classes(names, background is not None or names[0][0].lower() == "background")


@torch.no_grad()
def embed_texts(backbone, names, chunk=256):
    """One unit vector a name from open_clip's 80 templates: each text normalised, averaged, normalised again. (N, D) float32."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES as templates
    texts = [template(name) for name in names for template in templates]
    embeddings = torch.cat([backbone.encode_text(texts[first:first + chunk]) for first in range(0, len(texts), chunk)])
    embeddings = F.normalize(embeddings, dim=-1).unflatten(0, (len(names), len(templates)))  # (N, 80, D)
    return F.normalize(embeddings.mean(1), dim=-1)


# ---- features and segmentation of one picture --------------------------------------------------------------------------

def prepare(backbone, image):
    """A PIL image or (3, H, W) uint8 -> normalised (3, H', W'), sides resampled to the nearest multiples of the patch."""
    return backbone.normalise(fit_to_patches(to_rgb(image) if isinstance(image, Image.Image) else image, backbone.patch))


@torch.no_grad()
def dense_features(backbone, image, autocast=contextlib.nullcontext):
    """Single-pass features of one picture of any size: PIL image or (3, H, W) uint8 -> (H/patch, W/patch, D) float32."""
    with autocast():
        return backbone.encode_dense(prepare(backbone, image)[None])[0].float()


def single_pass_similarities(backbone, image, texts, autocast=contextlib.nullcontext):
    """Cosine similarities of every patch with every name: (3, H, W) uint8 or PIL image, (N, D) -> (H/patch, W/patch, N)."""
    return F.normalize(dense_features(backbone, image, autocast), dim=-1) @ texts.T


@torch.no_grad()
def sliding_window_similarities(backbone, image, texts, size, window, stride, batch_size=60, autocast=contextlib.nullcontext):
    """The sliding-window baseline: similarities stitched at pixel resolution (paper, section 3.3): (*size, N)."""
    image = prepare(backbone, image)
    stitcher = Stitcher(image.shape[-2:], window, stride, backbone.patch, 1, size, image.device)
    encode_windows(backbone, [image], [stitcher], window, stride, batch_size, autocast, lambda maps: F.normalize(maps, dim=-1) @ texts.T)
    return stitcher.result()


@dataclass(frozen=True)
class Rule:
    """How similarities become labels, beyond the largest one winning (protocol.md); needs a background class 0.

    A pixel whose largest class probability - softmax over all names of logit_scale times similarity - is under `threshold`
    becomes label 0; a foreground class that wins no more than the share `area_threshold` of the foreground is left out first.
    """
    logit_scale: float = 40.0
    threshold: float = 0.0
    area_threshold: float = 0.0


def bilinear_strips(similarities, size):
    """(h, w, N) -> a function of (first, last) that gives these rows of the bilinear enlargement to size: (N, rows, W).

    So a map of 150 classes at full size is never held as a whole.
    """
    height, width, count = similarities.shape
    if (height, width) == tuple(size):
        return lambda first, last: similarities[first:last].permute(2, 0, 1)
    weights = linear_matrix(height, size[0]).to(similarities)

    def strip(first, last):
        rows = (weights[first:last] @ similarities.flatten(1)).view(last - first, width, count)
        return F.interpolate(rows.permute(2, 0, 1)[None].contiguous(), size=(last - first, size[1]), mode="bilinear", align_corners=False)[0]
    return strip


def label_map(strip, size, classes, rule=Rule(), values=2 ** 21):
    """The class of each pixel, from strips of similarities (N, rows, W): (H, W) int64 on the strips' device.

    The most similar of all names belongs to the class whose best synonym is the most similar, and softmax changes no order:
    it is only computed where a threshold asks for a probability. values: floats that one strip may hold.
    """
    owner, banned = classes.owner, None
    step = max(1, values // (len(owner) * size[1]))

    def assign():
        for first in range(0, size[0], step):
            similarities = strip(first, min(first + step, size[0]))
            left = similarities if banned is None else similarities.masked_fill(banned.to(similarities.device)[:, None, None], -torch.inf)
            best, name = left.max(0)  # (rows, W)
            labels = owner.to(name.device)[name]
            if rule.threshold and (banned is not None or not rule.area_threshold):  # areas are counted before the threshold
                probability = (rule.logit_scale * best - (rule.logit_scale * similarities).logsumexp(0)).exp()
                labels[probability < rule.threshold] = 0
            yield labels

    labels = torch.cat(list(assign()))
    if rule.area_threshold:
        areas = torch.bincount(labels.flatten().cpu(), minlength=len(classes))
        small = areas <= rule.area_threshold * areas[1:].sum()
        small[0] = False
        banned = small[owner]
        labels = torch.cat(list(assign()))
    return labels


def segment(backbone, image, classes):
    """Open-vocabulary segmentation in a single pass: a PIL image and class names, each with any synonyms -> (H, W) int64.

    classes: a list of names, or of lists of synonyms.
    """
    classes = Classes([[names] if isinstance(names, str) else list(names) for names in classes])
    image = to_rgb(image)
    size = image.shape[-2:]
    similarities = single_pass_similarities(backbone, image, embed_texts(backbone, classes.flat))
    return label_map(bilinear_strips(similarities, size), size, classes).cpu()
