"""Stage 2: distil the sliding-window teacher into a single-pass student (paper, section 3.4).

In: a folder of extract_teacher.py, and its images. Out: a folder that plain open_clip loads as
local-dir:runs/spar, with spar.json, README.md, log.jsonl, loss.png and training_state.pt.

    python distill.py                                      # the demo, CPU
    python distill.py --teacher runs/teacher --epochs 10   # one GPU
    torchrun --nproc-per-node 2 distill.py                 # the paper's two GPUs, one image each
    python distill.py --train-only qkv --out runs/qkv      # a variant; tests/variants.py runs all

The same command continues an interrupted run, to the same weights, bit for bit on a CPU.
"""
from data.flags import Parser, add_device_flags, bounded, filled, parse

# --train-only: words in the names of parameters, of open_clip, timm, DINOv3 and TIPSv2
PARTS = {
    "qkv": {"in_proj_weight", "in_proj_bias", "qkv", "q_proj", "k_proj", "v_proj",
            "q_bias", "k_bias", "v_bias"},
    "mlp": {"mlp"},
    "patch-embed": {"conv1", "patch_embed", "patch_embeddings"},
    "pos-embed": {"positional_embedding", "pos_embed", "position_embeddings"},
}


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument_group("what").add_argument
    add("--teacher", type=filled, default="runs/teacher", help="folder of extract_teacher.py "
        "(%(default)s)")
    add("--images", type=filled, metavar="DIR", help="first run extract_teacher.py on these images "
        "into --teacher, with its defaults")
    add("--backbone", type=filled, help="backbone for --images (default: siglip2)")
    add("--out", type=filled, default="runs/spar", help="folder to write (%(default)s)")
    add("--train-blocks", metavar="N", help="number of last blocks to train (default: 2), or "
        "'all' for the image tower: better on very large images, and three times slower")
    add("--frozen-stride", type=bounded(int, 0), default=0, metavar="N", help="run the frozen "
        "blocks on windows of the native size, N pixels apart: the window's side costs no more "
        "than a single pass on large images, half of it is more accurate (default: 0, no windows)")
    add("--train-only", choices=list(PARTS), help="train only this part: the queries, keys "
        "and values or the MLPs of those blocks, the patch projection, the positional embedding")
    add("--partial", action="store_true", help="train on an extraction that is not finished")
    add = parser.add_argument_group("recipe").add_argument
    add("--epochs", type=bounded(int, 1), help="passes over the images (default: 10, the paper's; "
        "20 for fewer than 1000 feature maps; tiny 8)")
    add("--lr", type=bounded(float, 1e-12, 1e99), help="learning rate (default: 2e-5, the paper's; "
        "2e-4 for fewer than 1000 feature maps; tiny 5e-4)")
    add("--schedule", choices=["constant", "cosine"], help="of the rate (default: constant; "
        "cosine for fewer than 1000 feature maps, and for tiny)")
    add("--weight-decay", type=bounded(float, 0, 1000), help="decay of AdamW (default: 1e-4)")
    add("--batch-size", type=bounded(int, 1), metavar="N", help="images per step, in all "
        "processes together (default: one per process, as in the paper)")
    add("--loss", choices=["feature", "similarity"], dest="loss_of", help="compare features "
        "(default), or their cosine similarities to --classes, which favours these names")
    add("--classes", type=filled, metavar="FILE",
        help="names for --loss similarity: one class a line, synonyms separated by commas")
    add("--random-scale", type=bounded(float, 1e-6, 1000), nargs=2, metavar=("LO", "HI"),
        help="rescale each image in every epoch by a random factor (0.5 2, say); with feature "
        "maps of --stride 0 this is the paper's multi-resolution distillation")
    add = parser.add_argument_group("computation").add_argument
    add("--cache-frozen", type=filled, default="auto", metavar="{auto,off,DIR}",
        help="store what enters the first trained block, so that later epochs neither decode "
        "images nor run frozen blocks: in DIR, or if there is room with the feature maps (auto)")
    add("--save-every", type=bounded(float, 0), default=60, metavar="SECONDS", help="seconds "
        "between resumable states, besides each epoch's end (%(default)s)")
    add_device_flags(parser, seed="seed of the order of the images and of --random-scale")
    return parse(parser, argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports, so that --help and a wrong flag answer at once

import contextlib
import dataclasses
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from common import (FrozenWindows, choose_window, embed_texts, load_backbone, prefetch, run_stage,
                    start_runtime, weights_hash)
from data.files import (RunError, UsageError, append_lines, atomic_path, free_bytes, in_words,
                        keep_settings, read_lines, reading, remove_stale_files, require_room,
                        same_threads, save_torch, write_json, write_lines)
from data.benchmarks import read_classes
from data.teacher import FrozenTokens, Teacher


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a student is trained. The defaults are the paper's, for the published backbones."""
    epochs: int = 10
    lr: float = 2e-5
    schedule: str = "constant"
    weight_decay: float = 1e-4
    batch_size: int = 1  # images per step, over all processes
    loss_of: str = "feature"
    random_scale: list | None = None  # (lowest, highest) factor
    seed: int = 0


# tiny is 30 times smaller than the published backbones, and has a fiftieth of the feature maps
RECIPES = {"tiny": Recipe(epochs=8, lr=5e-4, schedule="cosine")}
# for fewer than 1000 feature maps, from which the paper's rate would take hundreds of epochs
SMALL = Recipe(epochs=20, lr=2e-4, schedule="cosine")


def choose_recipe(args, backbone, maps, world):
    """Return the recipe for a backbone and a number of feature maps, with the changes that flags
    make, for `world` processes."""
    usual = RECIPES.get(backbone, SMALL if maps < 1000 else Recipe())
    given = {"batch_size": world}
    for field in dataclasses.fields(Recipe):
        if getattr(args, field.name) is not None:
            given[field.name] = getattr(args, field.name)
    recipe = dataclasses.replace(usual, **given)
    if recipe.random_scale and recipe.random_scale[0] > recipe.random_scale[1]:
        raise UsageError("--random-scale needs LO <= HI")
    if recipe.batch_size % world:
        raise UsageError(f"--batch-size must be a multiple of the number of processes, {world}")
    if (recipe.loss_of == "similarity") != (args.classes is not None):
        raise UsageError("--loss similarity and --classes FILE go together")
    return recipe


# ---- data -------------------------------------------------------------------------------------

def plan_frozen_tokens(where, student, teacher, recipe, runtime):
    """Return the FrozenTokens of --cache-frozen or None, and a remark on them."""
    auto = where == "auto"
    if where == "off":
        return None, "--cache-frozen off"
    if student.first is None:
        return None, "the embedding is trained, so that no block is frozen"
    if recipe.random_scale:
        return None, "--random-scale changes the images in every epoch"
    if auto and recipe.epochs == 1:
        return None, "a single epoch uses them only once"
    with runtime.autocast():
        example = frozen_tokens(student, teacher.image(teacher.smallest, 1.0, runtime.device))
    largest = example.abs().max().item()
    if auto and largest > 65504 / 4:  # other images may reach more
        return None, f"they reach {largest:g}, too close to the largest float16, 65504"
    root = teacher.folder if auto else where
    if auto and not os.access(root, os.W_OK):
        return None, f"{root} cannot be written to"
    frozen = FrozenTokens(root, teacher, student, runtime.precision, example)
    need = frozen.missing_bytes()
    if auto and need > free_bytes(root):
        return None, f"they need {need / 1e9:.2f} GB, more than the disk of {root} has free"
    require_room(frozen.folder, need, "frozen tokens")
    rest = f", of which {need / 1e9:.2f} GB are still to be written" if need else ""
    return frozen, f"in {frozen.folder}{rest}"


def epoch_order(count, batch, seed, epoch, rank=0, world=1):
    """Return this process's share of a shuffled epoch: (steps, batch / world) indices."""
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return np.resize(order, (math.ceil(count / batch), batch))[:, rank::world]


def batches(teacher, frozen, recipe, runtime, step, workers):
    """Yield this process's share of each batch, from a step to the end: lists of (index entry,
    image or None, frozen tokens or None, target)."""
    def load(epoch, index):
        entry, factor = teacher.entries[index], 1.0
        target = teacher.target(entry)
        tokens = frozen.read(entry) if frozen else None
        if tokens is not None:
            return entry, None, tokens, target
        if recipe.random_scale:
            random = np.random.default_rng((recipe.seed, epoch, index))
            factor = float(random.uniform(*recipe.random_scale))
        return entry, teacher.image(entry, factor, runtime.device), None, target

    def to_device(value):
        if not torch.is_tensor(value) or value.device == runtime.device:
            return value
        return value.pin_memory().to(runtime.device, non_blocking=True)

    count = len(teacher.entries)
    first, start = divmod(step, math.ceil(count / recipe.batch_size))
    for epoch in range(first, recipe.epochs):
        order = epoch_order(count, recipe.batch_size, recipe.seed, epoch, runtime.rank,
                            runtime.world)[start if epoch == first else 0:]
        samples = prefetch(lambda index: load(epoch, index), order.flatten().tolist(), workers)
        for share in order:
            yield [tuple(map(to_device, next(samples))) for _ in share]


# ---- student and loss -------------------------------------------------------------------------

class Student(NamedTuple):
    backbone: torch.nn.Module
    first: int | None  # first block with trained parameters; None if the embedding is trained
    parameters: list
    texts: torch.Tensor | None  # (N, D), for the similarity loss


def select_trained(backbone, blocks, only=None):
    """Unfreeze the last `blocks` blocks ("all": the image tower), or a part in or before them.
    Return the first block with trained parameters (None if gradients must reach the embedding)
    and the parameters. Weight decay also changes unused queries and keys of OpenCLIP's last block.
    """
    depth, first, named = len(backbone.blocks), None, backbone.visual.named_parameters()
    before_blocks = only in ("patch-embed", "pos-embed")
    if before_blocks and blocks is not None:
        raise UsageError(f"--train-only {only} trains no block; leave --train-blocks out")
    if not before_blocks and (only is not None or blocks != "all"):
        count = {None: "2", "all": str(depth)}.get(blocks, blocks)
        if not count.isdecimal() or not 1 <= int(count) <= depth:
            raise UsageError(f"--train-blocks {blocks}: must be from 1 to {depth}, or 'all'")
        first = depth - int(count)
        named = [pair for block in backbone.blocks[first:] for pair in block.named_parameters()]
    parameters = [parameter for name, parameter in named
                  if only is None or PARTS[only] & set(name.split("."))]
    if not parameters:
        raise UsageError(f"--train-only {only}: this image tower has no such learned parameters")
    for parameter in parameters:
        parameter.requires_grad_(True)
    return first, parameters


def frozen_tokens(student, image):
    """Return what enters the first trained block: (3, H, W) uint8 -> (1, n, C)."""
    image = student.backbone.normalise(image)[None]
    with torch.set_grad_enabled(student.first is None):
        return student.backbone.tokens_before(student.first or 0, image)


def distillation_loss(features, target, texts=None):
    """Return the mean squared error between feature maps, or between their cosine similarities
    to texts (N, D), in float32: (h', w', D), (h, w, D) -> scalar."""
    features, target = features.float(), target.float()
    if features.shape != target.shape:  # --random-scale
        features = F.interpolate(features.permute(2, 0, 1)[None], size=target.shape[:2],
                                 mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    if texts is not None:
        features = F.normalize(features, dim=-1) @ texts.T
        target = F.normalize(target, dim=-1) @ texts.T
    return F.mse_loss(features, target)


def sum_gradients(parameters, loss, runtime):
    """Sum gradients and the loss over processes, in one exchange whose layout never changes, so
    that a resumed run adds in the same order. Returns the loss."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    summed = runtime.sum(parameters_to_vector([*gradients, loss]))
    vector_to_parameters(summed[:-1], gradients)
    return summed[-1].clone()  # a view would keep all of `summed`


# ---- training ---------------------------------------------------------------------------------

def load_state(path, parameters, optimizer, scaler):
    """Continue from a saved state, if there is one. Returns how many steps are done."""
    if not path.exists():
        return 0
    with reading(path, "delete it to start this training again"), torch.no_grad():
        state = torch.load(path, map_location=parameters[0].device, weights_only=True)
        for parameter, stored in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(stored)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        return state["step"]


def save_state(path, step, parameters, optimizer, scaler):
    if not all(parameter.isfinite().all() for parameter in parameters):
        raise RunError(f"a parameter is not finite after step {step}; {path} keeps the last good "
                       "state. Start again with a lower --lr, in another --out")
    save_torch(path, {
        "step": step, "parameters": [parameter.detach() for parameter in parameters],
        "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()})


def write_log(path, pending, runtime):
    """Append entries to the log, once their losses are read from the device."""
    for entry in pending:
        entry["loss"] = entry["loss"].item()
        if not math.isfinite(entry["loss"]):
            raise RunError(f"the loss is {entry['loss']} at step {entry['step']}; the last good "
                           "state is kept. Start again with a lower --lr, --precision fp32 or "
                           "--cache-frozen off, in another --out")
    if runtime.rank == 0:
        append_lines(path, *pending)


def plot_log(path, points=1000):
    """Draw the losses of a log, as means over equally many steps."""
    from matplotlib.figure import Figure
    curve = np.array([(entry["step"], entry["loss"]) for entry in read_lines(path)])
    run = math.ceil(len(curve) / points)
    curve = curve[:len(curve) // run * run].reshape(-1, run, 2).mean(1)  # (points, 2)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="mean squared error to the teacher")
    axes.semilogy(*curve.T, linewidth=1)
    with atomic_path(path.with_name("loss.png")) as temporary:
        figure.savefig(temporary, dpi=120)


def train(student, teacher, frozen, recipe, runtime, args):
    """Train the student to match the teacher's feature maps. Returns the number of steps."""
    backbone, first, parameters, texts = student
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay,
                                  fused=True)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
    state_path, log_path = Path(args.out, "training_state.pt"), Path(args.out, "log.jsonl")
    step = load_state(state_path, parameters, optimizer, scaler)
    epoch_steps = math.ceil(len(teacher.entries) / recipe.batch_size)
    steps = recipe.epochs * epoch_steps
    done = f", continuing after step {step}" if step else ""
    runtime.print(f"{steps} steps{done}" if step < steps else
                  f"already trained, {step} of {steps} steps; give another --out")
    log = [entry for entry in read_lines(log_path) if entry["step"] <= step]
    if runtime.rank == 0:
        write_lines(log_path, log)
    saved, begun = time.time(), time.time() - (log[-1]["seconds"] if log else 0)
    log_every = 20 if runtime.device.type == "cuda" else 1  # reading a loss stalls a GPU
    pending, bar = [], tqdm(total=steps, initial=step, desc="distill", disable=runtime.rank > 0)
    with bar:
        for batch in batches(teacher, frozen, recipe, runtime, step, args.workers):
            total = torch.zeros((), device=runtime.device)  # the loss of the batch
            for entry, image, tokens, target in batch:
                grid = target.shape[:2] if image is None else backbone.grid(image)
                with runtime.autocast():
                    if tokens is None:
                        tokens = frozen_tokens(student, image)
                        tokens = frozen.keep(entry, tokens) if frozen else tokens
                    tokens = tokens.float() if frozen else tokens  # float16 on disk
                    tokens = backbone.run_blocks(tokens, grid, start=first or 0)
                    features = backbone.project(tokens, grid)[0]  # (h, w, D)
                loss = distillation_loss(features, target, texts) / recipe.batch_size
                scaler.scale(loss).backward()
                total += loss.detach()
            if runtime.world > 1:
                total = sum_gradients(parameters, total, runtime)
            rate = recipe.lr
            if recipe.schedule == "cosine":
                rate *= (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.param_groups[0]["lr"] = rate
            scaler.step(optimizer)
            optimizer.zero_grad()
            scaler.update()
            pending.append({"step": step + 1, "epoch": step // epoch_steps, "loss": total,
                            "lr": rate, "seconds": round(time.time() - begun, 3)})
            step += 1
            epoch_ends = step % epoch_steps == 0
            save = epoch_ends or time.time() >= saved + args.save_every
            if save or len(pending) == log_every:
                # AdamW counts no step that GradScaler skipped, since fp16 gradients overflowed
                updates = max((int(state["step"]) for state in optimizer.state.values()),
                              default=0)
                pending[-1]["skipped"] = step - updates
                write_log(log_path, pending, runtime)
                bar.set_postfix(loss=f"{pending[-1]['loss']:.4f}", skipped=step - updates,
                                refresh=False)
                bar.update(len(pending))
                pending = []
                saved = time.time() if save else saved
            if save and runtime.rank == 0:
                save_state(state_path, step, parameters, optimizer, scaler)
            if epoch_ends and runtime.rank == 0:
                plot_log(log_path)
    return steps


@contextlib.contextmanager
def locked(out):
    """Let no other training use a folder, by a lock file that the system releases."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(out / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise RunError(f"another distill.py is training in {out}; wait for it, or give another "
                       "--out") from None


def load_student(teacher, classes, args, device):
    """Load the backbone that made the teacher's maps, and unfreeze what is to be trained."""
    stride = args.frozen_stride
    backbone = load_backbone(**teacher.loading, device=device, text=classes is not None)
    if weights_hash(backbone.visual) != teacher.settings["weights"]:
        raise RunError(f"{teacher.loading['name']} has other weights than when {teacher.folder} "
                       "was made; extract the feature maps again, into another folder")
    first, parameters = select_trained(backbone, args.train_blocks, args.train_only)
    backbone.windows = None
    if stride and not first:
        raise UsageError("--frozen-stride: no block is frozen, so none can see windows; train "
                         "fewer blocks")
    if stride % backbone.patch:
        raise UsageError(f"--frozen-stride {stride}: must be a multiple of the patch, "
                         f"{backbone.patch}")
    if stride:
        backbone.windows = FrozenWindows(first, choose_window(backbone, None, stride), stride)
    texts = embed_texts(backbone, classes.flat) if classes else None
    return Student(backbone, first, parameters, texts)


def extract_first(args):
    """Run extract_teacher.py with its defaults for --images, if there are any."""
    if args.images is None:
        if args.backbone:
            raise UsageError("--backbone goes with --images; without, the feature maps decide")
        return
    import extract_teacher
    flags = {"--images": args.images, "--out": args.teacher, "--backbone": args.backbone,
             "--device": args.device, "--precision": args.precision, "--workers": args.workers}
    extract_teacher.main(extract_teacher.parse_args(
        [f"{flag}={value}" for flag, value in flags.items() if value is not None]))


def main(args):
    extract_first(args)
    teacher, out = Teacher(args.teacher, args.partial), Path(args.out)
    runtime = start_runtime(args.device, args.precision, args.seed)
    recipe = choose_recipe(args, teacher.loading["name"], len(teacher.entries), runtime.world)
    classes = args.classes and read_classes(args.classes)
    student = load_student(teacher, classes, args, runtime.device)
    size = sum(parameter.numel() for parameter in student.parameters)
    blocks = args.train_blocks or (None if student.first is None else "2")
    failed = f" ({teacher.failed} failed, see failures.jsonl)" if teacher.failed else ""
    runtime.print(f"feature maps: {len(teacher.entries)}{failed}; training {size / 1e6:.2f} M "
                  f"parameters (blocks: {blocks or 'none'}, part: {args.train_only or 'all'}), "
                  f"{in_words(recipe)}")
    frozen, remark = plan_frozen_tokens(args.cache_frozen, student, teacher, recipe, runtime)
    frozen = None if runtime.total(frozen is None) else frozen  # all processes store, or none
    runtime.print(f"frozen tokens are {'stored' if frozen else 'not stored:'} {remark}")
    same_threads(out / "spar.json")
    settings = {
        **dataclasses.asdict(recipe),
        "teacher": teacher.lasting_settings,
        "maps": len(teacher.entries),
        "index": teacher.digest,
        "train_blocks": blocks,
        "train_only": args.train_only,
        "frozen_stride": args.frozen_stride,
        "classes": classes and classes.names,
        "precision": runtime.precision,
        "processes": runtime.world,
        "cache_frozen": frozen is not None,
        "threads": torch.get_num_threads(),
    }
    with locked(out) if runtime.rank == 0 else contextlib.nullcontext():
        if runtime.rank == 0:
            states = 2 - (out / "training_state.pt").exists()  # the last, and the one being written
            require_room(out, states * 12 * size, "training states")
            keep_settings(out / "spar.json", settings, free=("threads",))
            remove_stale_files(out)
        runtime.barrier()
        settings["steps"] = train(student, teacher, frozen, recipe, runtime, args)
        if runtime.rank == 0:
            loading = student.backbone.save(out)
            log = read_lines(out / "log.jsonl")
            write_json(out / "spar.json", settings | {"loss": log[-1]["loss"] if log else None})
            with contextlib.suppress(ModuleNotFoundError):  # extras/ may be missing
                from extras.model_card import write_card
                write_card(out)
            print(f"student in {out}, for evaluate_ovs.py --checkpoint {out}; open_clip: {loading}")


if __name__ == "__main__":
    run_stage(main, ARGS)
