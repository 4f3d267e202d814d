"""Stage 2: distil the sliding-window teacher into a single-pass student (paper, section 3.4).

In: a folder that extract_teacher.py wrote, and the pictures it was made from. Out, in --out: a
folder that plain open_clip loads as local-dir:runs/spar, spar.json (what it was trained from and
how), README.md (a model card), log.jsonl, loss.png, training_state.pt.

    python distill.py                                      # the demo, CPU
    python distill.py --teacher runs/teacher --epochs 10   # one GPU
    torchrun --nproc-per-node 2 distill.py                 # the paper's two GPUs, one image each
    python distill.py --train-only qkv --out runs/qkv      # a variant; tests/variants.py runs all

The same command continues after an interruption (Ctrl-C, SIGTERM, SIGKILL, a process that died),
and ends with the weights of an uninterrupted run, bit for bit on a CPU.
"""
import argparse
import os
import signal

# --train-only: words of which one stands in the name of every such parameter, over open_clip's
# ViTs, timm's, DINOv3's and TIPSv2's
PARTS = {
    "qkv": {"in_proj_weight", "in_proj_bias", "qkv", "q_proj", "k_proj", "v_proj",
            "q_bias", "k_bias", "v_bias"},
    "mlp": {"mlp"},
    "patch-embed": {"conv1", "patch_embed", "patch_embeddings"},
    "pos-embed": {"positional_embedding", "pos_embed", "position_embeddings"},
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add("--teacher", default="runs/teacher", help="folder of teacher features (%(default)s)")
    add("--out", default="runs/spar", help="folder to write (%(default)s)")
    add("--train-blocks", metavar="N", help="how many of the last blocks to train (default: 2), or "
        "'all' for the whole image tower, which is better at very large pictures and costs three "
        "times the time")
    add("--train-only", choices=list(PARTS), help="train only this part: the attention inputs or "
        "the MLPs of those blocks, or instead of blocks the patch projection or the positional "
        "embedding, whose gradients cross all blocks")
    add = parser.add_argument_group("the recipe").add_argument
    add("--epochs", type=int, help="passes over the features (default: 10; tiny 8)")
    add("--lr", type=float, help="learning rate (default: 2e-5; tiny 5e-4)")
    add("--schedule", choices=["constant", "cosine"],
        help="of the learning rate (default: constant; tiny cosine)")
    add("--weight-decay", type=float, help="a step shrinks weights by this times the learning rate "
        "(default: 1e-4)")
    add("--batch-size", type=int, metavar="N", help="images a step, over all processes (default: "
        "one a process, as in the paper)")
    add("--loss", choices=["feature", "similarity"], dest="loss_of", help="what should agree with "
        "the teacher: features (default), or their cosines with the names of --classes, which "
        "favours the domain of those names")
    add("--classes", metavar="FILE",
        help="names for --loss similarity: one class a line, synonyms separated by commas")
    add("--random-scale", type=float, nargs=2, metavar=("LO", "HI"), help="show the student every "
        "image rescaled by a random factor (0.5 2, say) that is new in each epoch; with features "
        "of --stride 0 this is the paper's multi-resolution distillation")
    add("--seed", type=int, default=0,
        help="of the order of the pictures and of --random-scale (%(default)s)")
    add("--partial", action="store_true", help="train on an extraction that is not finished")
    add = parser.add_argument_group("how it is computed").add_argument
    add("--cache-frozen", default="auto", metavar="{auto,off,DIR}", help="keep what enters the "
        "first trained block, float16, so that later epochs neither decode pictures nor run frozen "
        "blocks: in DIR, or beside the features if the disk has room (%(default)s)")
    add("--save-every", type=int, default=500, metavar="N", help="steps between resumable states "
        "(%(default)s), besides one at the end of each epoch")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="threads that read pictures and features ahead (default: one a core, at most 8)")
    add("--device", default="auto",
        help="auto, cpu, cuda, cuda:1 ... (%(default)s: a GPU if there is one)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="of the matrix products (%(default)s: fp16 on a GPU, fp32 on a CPU)")
    return parser.parse_args(argv)


if __name__ == "__main__":  # before torch's import, so that --help and a wrong flag answer at once
    ARGS = parse_args()
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell's background job has it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until command_line: no import's traceback

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (FAILURE, NUMBER, OF_BACKBONE, RunFailed, WriteBehind, WrongCall,
                    append_json_lines, apply_augmentation, atomic_path, command_line, embed_texts,
                    first_line, free_bytes, is_unchanged, load_backbone, nearest_multiple,
                    open_features, planned_size, prefetch, read_image, read_index, read_json,
                    read_json_lines, remove_remains, require_room, require_same_settings,
                    resize_image, speaks_flags, start_runtime, this_process, weights_hash,
                    write_json, write_json_lines)
from data.benchmarks import read_classes
from data.model_card import write_card

STATE = "training_state.pt"
LOGGED = {"step": int, "epoch": int, "loss": NUMBER, "lr": NUMBER, "seconds": NUMBER}


# ---- settings ------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a student is trained. The defaults are the paper's, for the published backbones."""
    epochs: int = 10
    lr: float = 2e-5
    schedule: str = "constant"
    weight_decay: float = 1e-4
    batch_size: int = 1  # images a step, over all processes
    loss_of: str = "feature"
    random_scale: list | None = None  # (lowest, highest) factor
    seed: int = 0


# by backbone; tiny is 30 times smaller than the published ones, and has a fiftieth of the maps
RECIPES = {"tiny": Recipe(epochs=8, lr=5e-4, schedule="cosine")}


def choose_recipe(backbone, overrides, world=1):
    """The recipe of a backbone with what `overrides` gives, for so many processes."""
    given = {name: value for name, value in overrides.items() if value is not None}
    recipe = dataclasses.replace(RECIPES.get(backbone, Recipe()), **({"batch_size": world} | given))
    if recipe.random_scale and recipe.random_scale[0] > recipe.random_scale[1]:
        raise WrongCall("--random-scale needs LO <= HI")
    if recipe.batch_size % world:
        raise WrongCall(f"--batch-size {recipe.batch_size}: must be a multiple of the number of "
                        f"processes, {world}")
    return recipe


# ---- data ----------------------------------------------------------------------------------------

class Sample(NamedTuple):
    """One image for the student, or in its place what its frozen blocks made of it, and the
    teacher's map."""
    entry: dict  # its line in the index
    image: torch.Tensor | None  # (3, H, W) uint8
    tokens: torch.Tensor | None  # (n, C) float16
    target: torch.Tensor  # (h, w, D) float16


class Teacher:
    """What extract_teacher.py wrote: settings, an entry for each map, the maps, their pictures."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.settings = read_json(self.folder / "teacher.json", "extract_teacher.py",
                                  OF_BACKBONE | {"weights": str, "images": str, "patch": int,
                                                 "dim": int})
        self.entries = read_index(self.folder)
        self.patch = self.settings["patch"]
        if min(self.patch, self.settings["dim"]) < 1:
            raise RunFailed(f"{self.folder / 'teacher.json'}: patch and dim must be at least 1")
        if not self.entries:
            raise RunFailed(f"{self.folder / 'index.jsonl'} lists no features; run "
                            "extract_teacher.py first")
        for entry in self.entries:
            if planned_size(entry) != tuple(side * self.patch for side in entry["grid"]):
                raise RunFailed(f"{self.folder}: {entry['file']} and its picture in index.jsonl "
                                "are of different sizes; run extract_teacher.py again")

    def require_whole(self):
        """Raise RunFailed if maps are still to be made, which would be missing without a word."""
        planned = self.folder / "planned.json"
        if not planned.exists():
            return
        planned = read_json(planned, "extract_teacher.py", {"maps": int})["maps"]
        failed = read_json_lines(self.folder / "failures.jsonl", FAILURE)
        if len(self.entries) + len(failed) < planned:
            raise RunFailed(f"{self.folder} has {len(self.entries)} of {planned} maps; the "
                            "extract_teacher.py command that began it makes the others, or give "
                            "--partial to train on these")

    def image(self, entry, factor=1.0):
        """The augmented picture, rescaled by a factor: (3, H, W) uint8."""
        path = Path(self.settings["images"]) / entry["image"]
        if not is_unchanged(path, entry):
            wrong = "has changed since its features were made" if path.exists() else "no such file"
            raise RunFailed(f"{path}: {wrong}; run extract_teacher.py again, as before")
        image = apply_augmentation(read_image(path), entry)
        if factor == 1:
            return image
        sides = [nearest_multiple(side * factor, self.patch) for side in image.shape[-2:]]
        return resize_image(image, sides)

    def target(self, entry):
        """The map, (h, w, D) float16. Raises RunFailed, naming the file that is missing or bad."""
        path = self.folder / entry["file"]
        target = torch.from_numpy(np.array(open_features(path)))
        grid = (side // self.patch for side in planned_size(entry))
        expected, wrong = (*grid, self.settings["dim"]), None
        if target.shape != expected:
            wrong = f"a map of {tuple(target.shape)} where its picture needs {expected}"
        elif not torch.isfinite(target).all():
            wrong = "values that are not finite"
        if wrong:
            raise RunFailed(f"{path} holds {wrong}; delete the file and run extract_teacher.py "
                            "again")
        return target


def epoch_order(count, batch, seed, epoch, rank=0, world=1):
    """This process's share of an epoch's permutation, which depends on seed and epoch alone:
    (steps, batch / world) indices. The last batch is filled up from the permutation's beginning."""
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return np.resize(order, (math.ceil(count / batch), batch))[:, rank::world]


def random_factor(bounds, seed, epoch, index):
    """The factor of --random-scale for an image in an epoch; 1 without."""
    if not bounds:
        return 1.0
    return float(np.random.default_rng((seed, epoch, index)).uniform(*bounds))


class Sampler:
    """The batches of every epoch, of which this process reads its share ahead."""

    def __init__(self, teacher, recipe, runtime, cache=None, workers=2):
        self.teacher, self.recipe, self.runtime = teacher, recipe, runtime
        self.cache, self.workers = cache, workers
        self.waited = 0.0  # seconds that the computation waited for data
        self.steps = math.ceil(len(teacher.entries) / recipe.batch_size)  # an epoch
        self.total_steps = recipe.epochs * self.steps

    def load(self, epoch, index):
        entry = self.teacher.entries[index]
        target = self.teacher.target(entry)
        tokens, image = self.cache.read(entry) if self.cache else None, None
        if tokens is None:
            factor = random_factor(self.recipe.random_scale, self.recipe.seed, epoch, index)
            image = self.teacher.image(entry, factor)
        return Sample(entry, image, tokens, target)

    def to_device(self, sample):
        device = self.runtime.device
        if device.type == "cpu":
            return sample
        return Sample(*(field.pin_memory().to(device, non_blocking=True)
                        if torch.is_tensor(field) else field for field in sample))

    def batches(self, epoch, start=0):
        """Lists of samples, this process's share of each batch from step `start` on."""
        order = epoch_order(len(self.teacher.entries), self.recipe.batch_size, self.recipe.seed,
                            epoch, self.runtime.rank, self.runtime.world)[start:]
        indices = order.flatten().tolist()
        samples = prefetch(lambda index: self.load(epoch, index), indices, self.workers)
        for share in order:
            asked = time.time()
            batch = [self.to_device(next(samples)) for _ in share]
            self.waited += time.time() - asked
            yield batch
        if self.cache:
            self.cache.wait()  # the next epoch finds them


# ---- frozen blocks, computed once ----------------------------------------------------------------

FLOAT16_MAX = 65504


def frozen_tokens(student, image, first):
    """What enters block `first`, without gradient bookkeeping: (3, H, W) uint8 -> (1, n, C)."""
    image = student.normalise(image)[None]
    with torch.no_grad():
        return student.run_blocks(student.embed(image), student.grid(image), stop=first)


class FrozenTokens:
    """What enters the first trained block, on disk: one float16 .npy (n, C) a map, n = h w and the
    class and register tokens.

    It is the same in every epoch, because augmentation is fixed per image. Tokens are rounded to
    float16 before their first use too, so that runs that make them and runs that find them train
    alike to the last bit. Processes may share a folder.
    """

    def __init__(self, folder, settings, entries, extra, width):
        self.folder, self.settings, self.entries = Path(folder), settings, entries
        self.extra, self.width = extra, width  # tokens besides the patches', C
        self.write_behind = WriteBehind(self.write)
        self.wait = self.write_behind.wait

    def path(self, entry):
        return self.folder / entry["file"].replace("features/", "tokens/", 1)

    def bytes(self, entry):
        height, width = entry["grid"]
        return 2 * (height * width + self.extra) * self.width + 128  # 128: the header of an .npy

    def read(self, entry):
        """(n, C) float16, or None if it is not there yet, or not whole."""
        try:
            tokens = np.load(self.path(entry), allow_pickle=False)
        except Exception:  # numpy raises many types for a damaged header
            return None
        height, width = entry["grid"]
        whole = (isinstance(tokens, np.ndarray) and tokens.dtype == np.float16
                 and tokens.shape == (height * width + self.extra, self.width)
                 and np.isfinite(tokens).all())
        return torch.from_numpy(tokens) if whole else None

    def keep(self, entry, tokens):
        """Round (1, n, C) to float16, store it while the computation goes on, return it."""
        rounded = tokens.to(torch.float16)
        self.write_behind(entry, rounded[0])
        return rounded

    def write(self, entry, tokens):
        tokens = tokens.cpu().numpy()
        if not np.isfinite(tokens).all():
            raise RunFailed(f"the tokens of {entry['image']} are beyond {FLOAT16_MAX} before the "
                            "first trained block, which float16 cannot hold; use --cache-frozen "
                            "off and another --out")
        path = self.path(entry)
        with atomic_path(path, this_process()) as temporary, open(temporary, "wb") as file:
            np.save(file, tokens)

    def decide(self, must, earlier, epochs):
        """Whether tokens are kept, which is said with what they need and have. Raises RunFailed
        where they must be and the disk is too small.

        earlier: what an earlier run of the same training decided, or None.
        """
        missing = sum(self.bytes(entry) for entry in self.entries
                      if not self.path(entry).exists())
        total = sum(map(self.bytes, self.entries))
        free = free_bytes(self.folder)
        needs = (f"{total / 1e9:.2f} GB in {self.folder}, {missing / 1e9:.2f} GB of it still to be "
                 f"written, {free / 1e9:.0f} GB free")
        kept = must or earlier
        if kept is None:
            kept = missing < 0.9 * free and (epochs > 1 or not missing)
        if not kept:
            once = "" if epochs > 1 else ", and one epoch uses them once"
            print(f"frozen tokens are not kept: they would need {needs}{once}")
            return False
        print(f"frozen tokens are kept: {needs}")
        require_room(self.folder, missing, "the frozen tokens (--cache-frozen)")
        return True


def plan_cache(where, student, first, teacher, runtime, random_scale=None):
    """The FrozenTokens of --cache-frozen `where`, whose size one picture tells, and None; or None
    and the reason why nothing can be kept."""
    if where == "off":
        return None, "off"
    if first is None or random_scale:
        reason = ("--random-scale changes the image in every epoch" if random_scale else
                  "gradients reach the embedding, so no block is frozen")
        if where == "auto":
            return None, reason
        raise WrongCall(f"--cache-frozen {where}: nothing can be kept, because {reason}; leave it "
                        "out")
    grids = [math.prod(entry["grid"]) for entry in teacher.entries]
    smallest = teacher.entries[int(np.argmin(grids))]
    with runtime.autocast():
        tokens = frozen_tokens(student, teacher.image(smallest).to(runtime.device), first)
    largest = tokens.abs().max().item()
    if where == "auto" and largest > FLOAT16_MAX / 4:
        return None, f"its tokens reach {largest:g}, too close to the end of float16"
    keys = ("file", "resize", "crop", "flip", "grid", "digest")
    plans = json.dumps([teacher.settings["images"], *([entry.get(key) for key in keys]
                                                      for entry in teacher.entries)])
    settings = {"backbone": teacher.settings["backbone"], "weights": teacher.settings["weights"],
                "first_block": first, "precision": runtime.precision,
                "images": hashlib.sha256(plans.encode()).hexdigest()}
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    folder = teacher.folder / f"frozen-{first}-{name}" if where == "auto" else where
    extra = tokens.shape[1] - min(grids)
    return FrozenTokens(folder, settings, teacher.entries, extra, tokens.shape[2]), None


# ---- model and loss ------------------------------------------------------------------------------

def select_trained(student, blocks, only=None):
    """Unfreeze what is to be trained: the last `blocks` blocks ("all": the tower), or one of PARTS
    of them or before them.

    Returns the index of the first block with trained parameters (None if gradients must reach the
    embedding) and the parameters. OpenCLIP's last block uses no queries and keys (MaskCLIP); they
    share a tensor with its values, so their gradient is zero, not absent: AdamW leaves them but for
    the weight decay, 2e-9 a step at the paper's settings, which no patch feature can notice.
    """
    depth, first, named = len(student.blocks), None, student.visual.named_parameters()
    before_blocks = only in ("patch-embed", "pos-embed")
    if before_blocks and blocks is not None:
        raise WrongCall(f"--train-only {only} trains no block; leave --train-blocks out")
    if not before_blocks and (only is not None or blocks != "all"):
        count = {None: "2", "all": str(depth)}.get(blocks, blocks)
        if not count.isdecimal() or not 1 <= int(count) <= depth:
            raise WrongCall(f"--train-blocks {blocks}: must be from 1 to {depth}, the number of "
                            "blocks, or 'all'")
        first = depth - int(count)
        named = [pair for block in student.blocks[first:] for pair in block.named_parameters()]
    parameters = [parameter for name, parameter in named
                  if only is None or PARTS[only] & set(name.split("."))]
    if not parameters:
        why = " (its positions are not learned)" if only == "pos-embed" else ""
        raise WrongCall(f"--train-only {only}: this image tower has no such parameters, so nothing "
                        f"would be trained{why}")
    for parameter in parameters:
        parameter.requires_grad_(True)
    return first, parameters


def student_features(student, sample, first, cache=None):
    """Single-pass map of one image, with gradients from block `first` on: (h, w, D). Stores what
    its frozen blocks made of it in the cache, if there is one."""
    if first is None:
        return student.encode_dense(student.normalise(sample.image)[None])[0]
    if sample.tokens is not None:
        tokens, grid = sample.tokens[None].float(), tuple(sample.target.shape[:2])
    else:
        tokens, grid = frozen_tokens(student, sample.image, first), student.grid(sample.image)
        tokens = cache.keep(sample.entry, tokens).float() if cache else tokens
    return student.project(student.run_blocks(tokens, grid, start=first), grid)[0]


def distillation_loss(features, target, kind="feature", texts=None):
    """Mean squared error between maps, or ("similarity") between their cosines with texts (N, D),
    in float32: (h', w', D), (h, w, D) -> scalar."""
    features, target = features.float(), target.float()
    if features.shape != target.shape:  # --random-scale
        features = F.interpolate(features.permute(2, 0, 1)[None], size=target.shape[:2],
                                 mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    if kind == "similarity":
        features, target = (F.normalize(map_, dim=-1) @ texts.T for map_ in (features, target))
    return F.mse_loss(features, target)


def learning_rate(step, steps, recipe):
    if recipe.schedule == "constant":
        return recipe.lr
    return recipe.lr * (1 + math.cos(math.pi * step / steps)) / 2


# ---- the trainer: a step, and the state between two ----------------------------------------------

class Trainer:
    """A student with its trained parameters, optimizer and loss scaler, on one of several
    processes that hold the same."""

    def __init__(self, student, trained, recipe, runtime, cache=None):
        self.student, self.runtime, self.cache = student, runtime, cache
        self.first, self.parameters = trained  # of select_trained
        self.optimizer = torch.optim.AdamW(self.parameters, lr=recipe.lr, fused=True,
                                           weight_decay=recipe.weight_decay)
        self.scaler = torch.amp.GradScaler(runtime.device.type,
                                           enabled=runtime.precision == "fp16")
        self.step = 0  # how many are done

    def features(self, sample):
        with self.runtime.autocast():
            return student_features(self.student, sample, self.first, self.cache)

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def update(self, rate, loss, stop):
        """One step of the optimizer, from gradients, loss and the wish to stop summed over the
        processes. Returns (loss, stop) on the device, (2,), equal in all of them."""
        summed = self.add_up(torch.stack([loss, loss.new_full((), float(stop))]))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.optimizer.zero_grad()
        self.scaler.update()
        self.step += 1
        return summed

    def add_up(self, values):
        """Sum gradients and values in one exchange whose layout is always the same, so that a
        resumed run adds in the same order."""
        if self.runtime.world == 1:
            return values
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = self.runtime.add_up(torch.cat([*(grad.flatten() for grad in gradients), values]))
        *parts, values = flat.split([*(grad.numel() for grad in gradients), len(values)])
        for gradient, summed in zip(gradients, parts):
            gradient.copy_(summed.view_as(gradient))
        return values

    def require_finite(self):
        """Raise RunFailed for parameters that an update has spoilt."""
        if not all(torch.isfinite(parameter).all() for parameter in self.parameters):
            raise RunFailed(f"a parameter is not finite after step {self.step}; the last good "
                            "state is kept. Start again with a lower --lr, in another --out")

    def save(self, path):
        self.require_finite()
        state = {"step": self.step, "parameters": [p.detach() for p in self.parameters],
                 "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        with atomic_path(path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # how torch reports a full disk
                raise OSError(first_line(error)) from error

    @torch.no_grad()
    def load(self, path):
        """Continue from a saved state, if there is one."""
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.runtime.device, weights_only=True)
            for parameter, stored in zip(self.parameters, state["parameters"], strict=True):
                if parameter.shape != stored.shape:
                    raise ValueError("parameters of other shapes")
                parameter.copy_(stored)
            # its settings are the recipe's, whatever stands in the file
            self.optimizer.load_state_dict(self.optimizer.state_dict()
                                           | {"state": state["optimizer"]["state"]})
            for parameter, values in self.optimizer.state.items():
                if any(value.shape != (() if name == "step" else parameter.shape)
                       for name, value in values.items()):
                    raise ValueError("an optimizer's state of other shapes")
            self.scaler.load_state_dict(state["scaler"])
            self.step = int(state["step"])
            if self.step < 0:
                raise ValueError(f"step {self.step}")
        except Exception as error:  # torch raises many types for a damaged file
            raise RunFailed(f"{path} cannot be read ({type(error).__name__}: {first_line(error)}); "
                            "delete it to start this training again") from None


# ---- log and signals -----------------------------------------------------------------------------

class Log:
    """log.jsonl, loss.png and the progress bar, from losses that stay on the device until they are
    read."""

    def __init__(self, out, trainer, sampler):
        self.out, self.path, self.trainer, self.sampler = out, out / "log.jsonl", trainer, sampler
        self.first_process = trainer.runtime.rank == 0
        self.pending, self.started, self.plotted, before = [], time.time(), time.time(), []
        if self.first_process:
            before = [entry for entry in read_json_lines(self.path, LOGGED)
                      if entry["step"] <= trainer.step]
            write_json_lines(self.path, before)
        self.seconds = before[-1]["seconds"] if before else 0.0
        size = sampler.recipe.batch_size
        self.bar = tqdm(total=sampler.total_steps * size, initial=trainer.step * size,
                        desc="distill", unit="img", disable=not self.first_process)
        # to read a loss is to wait for a GPU, which would then idle between its small steps
        share = size // trainer.runtime.world
        self.every = 1 if trainer.runtime.device.type == "cpu" else max(1, 20 // share)

    def add(self, values, epoch, rate):
        """values: (loss, stop) of the step that was just done."""
        passed = self.seconds + time.time() - self.started
        entry = {"step": self.trainer.step, "epoch": epoch, "loss": None, "lr": rate,
                 "seconds": round(passed, 3)}
        self.pending.append((entry, values))
        self.bar.update(self.sampler.recipe.batch_size)

    def read(self, now=False):
        """Write the losses since the last time, if it is time. Returns whether to stop. Raises
        RunFailed for one that is not finite."""
        if not (now or len(self.pending) >= self.every):
            return False
        with self.trainer.runtime.together():
            values = torch.stack([values for _, values in self.pending]).tolist()
        entries = [entry | {"loss": loss} for (entry, _), (loss, _) in zip(self.pending, values)]
        self.pending = []
        for entry in entries:
            if not math.isfinite(entry["loss"]):
                if self.trainer.cache:
                    self.trainer.cache.wait()  # an overflow there has an error of its own
                raise RunFailed(f"the loss is {entry['loss']} at step {entry['step']}; {self.out} "
                                "keeps the last good state. Start again with a lower --lr or with "
                                "--precision fp32, in another --out")
        if self.first_process:
            append_json_lines(self.path, *entries)
            waiting = self.sampler.waited / max(1e-9, time.time() - self.started)
            self.bar.set_postfix(epoch=entries[-1]["epoch"] + 1, waiting=f"{waiting:.0%}",
                                 loss=f"{entries[-1]['loss']:.4f}", refresh=False)
        return any(stop > 0 for _, stop in values)

    def plot(self, every=0, points=1000):
        """loss.png: means of equally many steps, at most so many points; unless it was drawn less
        than `every` seconds ago."""
        if not self.first_process or time.time() - self.plotted < every:
            return
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        self.plotted = time.time()
        curve = np.array([(entry["step"], entry["loss"])
                          for entry in read_json_lines(self.path, LOGGED)])
        if not len(curve):  # somebody took the log away
            return
        run = math.ceil(len(curve) / points)
        curve = curve[:len(curve) // run * run].reshape(-1, run, 2).mean(1)  # (points, 2)
        figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
        axes.plot(*curve.T, linewidth=1)
        axes.set(xlabel="step", ylabel="mean squared error to the teacher", yscale="log")
        axes.set_title(f"{self.out.name}: distillation loss", parse_math=False)
        axes.grid(alpha=0.3)
        with atomic_path(self.out / "loss.png") as temporary:
            figure.savefig(temporary, dpi=120)
        plt.close(figure)


@contextlib.contextmanager
def noted_signals():
    """Within it SIGTERM and Ctrl-C are only noted, in the list it yields, so that the step under
    way is finished and saved."""
    noted = []
    before = {number: signal.signal(number, lambda number, _: noted.append(number))
              for number in (signal.SIGTERM, signal.SIGINT)
              if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- the loop ------------------------------------------------------------------------------------

def train(trainer, sampler, recipe, log, texts=None, save_every=500):
    """Draw the student's single-pass maps to the teacher's, until the last step or a signal."""
    with noted_signals() as signals, log.bar:
        while trainer.step < sampler.total_steps:
            epoch, start = divmod(trainer.step, sampler.steps)
            for batch in sampler.batches(epoch, start):
                rate = learning_rate(trainer.step, sampler.total_steps, recipe)
                total = torch.zeros((), device=trainer.runtime.device)
                for sample in batch:
                    features = trainer.features(sample)  # (h, w, D)
                    loss = distillation_loss(features, sample.target, recipe.loss_of, texts)
                    loss = loss / recipe.batch_size
                    trainer.backward(loss)
                    total += loss.detach()
                log.add(trainer.update(rate, total, bool(signals)), epoch, rate)
                save = trainer.step % save_every == 0 or trainer.step % sampler.steps == 0
                stop = log.read(now=save)
                if (save or stop) and trainer.runtime.rank == 0:
                    trainer.save(log.out / STATE)
                    log.plot(every=60)
                if stop:
                    return


# ---- main ----------------------------------------------------------------------------------------

def load_student(teacher, device, text):
    """The backbone that the teacher's windows went through, with the same weights."""
    settings = teacher.settings
    student = load_backbone(settings["backbone"], settings["random_init"], device, text,
                            settings.get("hub_dir"), settings.get("dinov3_weights"))
    if weights_hash(student) != settings["weights"]:
        raise RunFailed(f"{settings['backbone']} has other weights than when {teacher.folder} was "
                        "made; extract the features again, into another folder")
    return student


@speaks_flags
def main(args):
    teacher, out = Teacher(args.teacher), Path(args.out)
    if not args.partial:
        teacher.require_whole()
    if (args.loss_of == "similarity") != (args.classes is not None):
        raise WrongCall("--loss similarity and --classes FILE go together")
    classes = read_classes(args.classes) if args.classes is not None else None
    runtime = start_runtime(args.device, args.precision, args.seed)
    overrides = {field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)}
    recipe = choose_recipe(teacher.settings["backbone"], overrides, runtime.world)
    student = load_student(teacher, runtime.device, text=classes is not None)
    first, parameters = select_trained(student, args.train_blocks, args.train_only)
    texts = embed_texts(student, classes.flat) if classes else None
    cache, reason = plan_cache(args.cache_frozen, student, first, teacher, runtime,
                               recipe.random_scale)
    blocks = args.train_blocks or (None if first is None else "2")
    settings = dataclasses.asdict(recipe) | {
        "teacher": teacher.settings, "maps": len(teacher.entries), "train_blocks": blocks,
        "train_only": args.train_only, "classes": classes and classes.names,
        "precision": runtime.precision, "processes": runtime.world}
    if runtime.rank == 0:
        begin(out, settings, parameters, cache, reason, must=args.cache_frozen != "auto")
    runtime.barrier()
    settings = read_json(out / "spar.json", "distill.py")  # as the first process decided
    cache = cache if settings["cache_frozen"] else None

    with hold(out) if runtime.rank == 0 else contextlib.nullcontext():
        trainer = Trainer(student, (first, parameters), recipe, runtime, cache)
        trainer.load(out / STATE)
        sampler = Sampler(teacher, recipe, runtime, cache, args.workers)
        if runtime.rank == 0:
            announce(trainer, sampler, args.train_only, blocks)
        log = Log(out, trainer, sampler)
        train(trainer, sampler, recipe, log, texts, args.save_every)
        log.plot()
        runtime.barrier()  # until everything is on the disk
        if runtime.rank == 0:
            finish(out, settings, trainer, sampler.total_steps)
    if trainer.step < sampler.total_steps:
        raise KeyboardInterrupt


def begin(out, settings, parameters, cache, reason, must):
    """Decide on the frozen tokens, see that the disk has room, and that the folder is of the same
    settings."""
    earlier = None
    if (out / "spar.json").exists():
        earlier = read_json(out / "spar.json", "an earlier run").get("cache_frozen")
    if cache is None:
        print(f"frozen tokens are not kept: {reason}")
    kept = cache is not None and cache.decide(must, earlier, settings["epochs"])
    # a state in place and one being written, of weights and AdamW's two moments in float32
    state = 12 * sum(parameter.numel() for parameter in parameters)
    there = (out / STATE).stat().st_size if (out / STATE).exists() else 0
    require_room(out, 2 * state - there, "training states")
    require_same_settings(out / "spar.json", settings | {"cache_frozen": kept})
    if kept:
        known = (cache.folder / "frozen.json").exists()
        if not known and any(cache.path(entry).exists() for entry in cache.entries):
            raise RunFailed(f"{cache.folder} holds tokens, but no frozen.json that says what of; "
                            "delete that folder, or give another --cache-frozen")
        require_same_settings(cache.folder / "frozen.json", cache.settings, flag="--cache-frozen")
        remove_remains(cache.folder)


@contextlib.contextmanager
def hold(out):
    """Keep a folder to one training at a time, by a lock that goes when its process does. Raises
    RunFailed."""
    with open(out / "spar.json") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFailed(f"another distill.py is training in {out}; wait for it, or give "
                            "another --out") from None
        except OSError:  # a file system without locks
            pass
        for remains in out.glob(".tmp*"):  # safetensors has a name of its own, .tmpXXXXXX
            if remains.is_file():
                remains.unlink(missing_ok=True)
        yield


def announce(trainer, sampler, only, blocks):
    recipe, tower = sampler.recipe, trainer.student.visual.parameters()
    trained, all_ = (sum(p.numel() for p in some) / 1e6 for some in (trainer.parameters, tower))
    where = "all blocks" if blocks == "all" else f"the last {blocks} blocks" if blocks else None
    print(f"{len(sampler.teacher.entries)} teacher maps, {recipe.epochs} epochs, "
          f"{sampler.total_steps} steps of {recipe.batch_size}"
          + (f", continuing after step {trainer.step}" if trainer.step else ""))
    print(f"training {trained:.2f} M of {all_:.1f} M parameters of the image tower "
          f"({', '.join(filter(None, [only, where]))}), AdamW, learning rate "
          f"{recipe.lr:g}, {recipe.schedule}")


def finish(out, settings, trainer, steps):
    """Save the student, or say where an interrupted training stands."""
    if trainer.step < steps:
        print(f"stopped and saved after step {trainer.step} of {steps}")
        return
    trainer.require_finite()
    loading = trainer.student.save(out)
    log = read_json_lines(out / "log.jsonl", LOGGED)
    write_json(out / "spar.json", {**settings, "steps": steps,
                                   "loss": log[-1]["loss"] if log else None})
    write_card(out)
    print(f"student in {out}: {loading}")
    if trainer.cache:
        print(f"frozen tokens in {trainer.cache.folder}: other runs of these blocks use them; "
              "delete them when there are none")


if __name__ == "__main__":
    command_line(main, ARGS)
