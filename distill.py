"""Stage 2: distil the sliding-window teacher into a single-pass student (paper, section 3.4).

In: a folder that extract_teacher.py wrote, and the pictures it was made from. Out, in --out: a folder that plain open_clip
loads as local-dir:runs/spar, spar.json (what it was trained from and how), log.jsonl, loss.png, training_state.pt.

    python distill.py                                        # the demo, CPU
    python distill.py --teacher runs/teacher --epochs 10     # one GPU
    torchrun --nproc-per-node 2 distill.py                   # the paper's two GPUs: one image each, averaged gradients
    python distill.py --train-only qkv --out runs/qkv        # a variant; tests/variants.py runs all of the paper's

The same command continues after an interruption (Ctrl-C, SIGTERM, SIGKILL, a process that died), and ends with the weights of an
uninterrupted run, bit for bit on a CPU.
"""
import argparse


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", default="runs/teacher", help="folder of teacher features (%(default)s)")
    add("--out", default="runs/spar", help="folder to write (%(default)s)")
    add("--train-blocks", metavar="N", help="how many of the last blocks to train (default: 2), or 'all' for the whole image tower, "
        "which is better at very large pictures and costs three times the time")
    add("--train-only", choices=list(PARTS), help="train only this part: the attention inputs or the MLPs of those blocks, or instead of blocks the "
        "patch projection or the positional embedding, whose gradients cross all blocks")
    add("--epochs", type=int, help="passes over the features (default: 10; tiny 6)")
    add("--optimizer", choices=["adamw", "muon"], help="muon takes the blocks' matrices, and leaves the rest to AdamW (default: adamw, as in the paper; tiny muon)")
    add("--lr", type=float, help="learning rate (default: 2e-5; tiny 2e-3)")
    add("--schedule", choices=["constant", "cosine"], help="of the learning rate (default: constant; tiny cosine)")
    add("--weight-decay", type=float, help="a step shrinks weights by this times the learning rate (default: 1e-4; tiny 0.1)")
    add("--batch-size", type=int, metavar="N", help="images a step, over all processes (default: one a process, as in the paper; tiny 4)")
    add("--loss", choices=["feature", "similarity"], default="feature", help="what should agree with the teacher: features (%(default)s), or their cosines with "
        "the names of --classes, which favours the domain of those names")
    add("--classes", metavar="FILE", help="for --loss similarity: one class a line, synonyms separated by commas")
    add("--random-scale", type=float, nargs=2, metavar=("LO", "HI"), help="show the student every image rescaled by a random factor (0.5 2, say) that is new in "
        "each epoch; with features of --stride 0 this is the paper's multi-resolution distillation")
    add("--cache-frozen", default="auto", metavar="{auto,off,DIR}", help="keep what enters the first trained block, float16, so that later epochs neither decode "
        "pictures nor run frozen blocks: in DIR, or beside the features if the disk has room (%(default)s)")
    add("--save-every", type=int, default=500, metavar="N", help="steps between resumable states (%(default)s), besides one at the end of each epoch")
    add("--workers", type=int, default=2, help="threads that read pictures and features ahead (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s: a GPU if there is one)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of the matrix products (%(default)s: fp16 on a GPU, fp32 on a CPU)")
    add("--seed", type=int, default=0, help="of the order of the pictures and of --random-scale (%(default)s)")
    return parser.parse_args(argv)


# --train-only: words of which one stands in the name of every such parameter, over open_clip's ViTs, timm's and DINOv3's
PARTS = {
    "qkv": {"in_proj_weight", "in_proj_bias", "qkv", "q_proj", "k_proj", "v_proj", "q_bias", "k_bias", "v_bias"},
    "mlp": {"mlp"},
    "patch-embed": {"conv1", "patch_embed"},
    "pos-embed": {"positional_embedding", "pos_embed"},
}

if __name__ == "__main__":  # before torch is imported, so that --help and a wrong flag answer at once
    ARGS = parse_args()

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
import platform
import signal
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (RunFailed, WrongCall, append_json_line, apply_augmentation, atomic_path, command_line, embed_texts, free_bytes,
                    load_backbone, nearest_multiple, open_features, planned_size, prefetch, read_classes, read_image, read_index, read_json,
                    read_json_lines, require_room, require_same_settings, resize_image, start_runtime, weights_hash,
                    write_json, write_json_lines)

# the paper's, for the published backbones; and what a backbone that is 30 times smaller wants, on 40 times fewer images
RECIPES = {"paper": {"epochs": 10, "optimizer": "adamw", "lr": 2e-5, "schedule": "constant", "weight_decay": 1e-4, "batch_size": 1},
           "tiny": {"epochs": 6, "optimizer": "muon", "lr": 2e-3, "schedule": "cosine", "weight_decay": 0.1, "batch_size": 4}}
FLOAT16_MAX = 65504


# ---- data ------------------------------------------------------------------------------------------------------------

class Sample(NamedTuple):
    """One image for the student, or in its place what its frozen blocks made of it, and the teacher's map."""
    entry: dict  # its line in the index
    image: torch.Tensor | None  # (3, H, W) uint8
    tokens: torch.Tensor | None  # (n, C) float16
    target: torch.Tensor  # (h, w, D) float16


def load_sample(folder, teacher, entry, frozen=None, factor=1.0):
    """Read what one step needs; factor rescales the image. Raises RunFailed, naming the file that is missing or bad."""
    path, patch = folder / entry["file"], teacher["patch"]
    target = torch.from_numpy(np.array(open_features(path)))
    expected = (*(side // patch for side in planned_size(entry)), teacher["dim"])
    if target.shape != expected:
        raise RunFailed(f"{path} holds a map of {tuple(target.shape)} where its picture needs {expected}; delete the file and run extract_teacher.py again")
    if not torch.isfinite(target).all():
        raise RunFailed(f"{path} holds values that are not finite; delete the file and run extract_teacher.py again")
    tokens = frozen.read(entry) if frozen else None
    if tokens is not None:
        return Sample(entry, None, tokens, target)
    image = apply_augmentation(read_image(Path(teacher["images"]) / entry["image"]), entry)
    if factor != 1:
        image = resize_image(image, [nearest_multiple(side * factor, patch) for side in image.shape[-2:]])
    return Sample(entry, image, None, target)


def epoch_order(count, batch, seed, epoch, rank=0, world=1):
    """This process's share of an epoch's permutation, which depends on seed and epoch alone: (steps, batch / world) indices.

    The last batch is filled up from the permutation's beginning.
    """
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return np.resize(order, (math.ceil(count / batch), batch))[:, rank::world]


def random_factor(bounds, seed, epoch, index):
    """The factor of --random-scale for an image in an epoch; 1 without."""
    return float(np.random.default_rng((seed, epoch, index)).uniform(*bounds)) if bounds else 1.0


def to_device(sample, device, stream):
    """Called by the reading threads: a sample on the device, copied on a stream of its own so that this overlaps with the computation."""
    if stream is None:  # a CPU
        return sample
    with torch.cuda.stream(stream):
        sample = Sample(*(field.pin_memory().to(device, non_blocking=True) if torch.is_tensor(field) else field for field in sample))
    stream.synchronize()
    for field in filter(torch.is_tensor, sample):
        field.record_stream(torch.cuda.default_stream(device))  # or its memory could be reused while it is still read
    return sample


# ---- model and loss --------------------------------------------------------------------------------------------------

def select_trained(student, blocks, only=None):
    """Unfreeze what is to be trained: the last `blocks` blocks ("all": the tower), or one of PARTS of them or before them.

    Returns the index of the first block with trained parameters (None if gradients must reach the embedding) and the parameters.
    OpenCLIP's last block uses no queries and keys (MaskCLIP); they share a tensor with its values, so their gradient is zero, not
    absent: AdamW leaves them but for the weight decay, 2e-9 a step at the paper's settings, which no patch feature can notice.
    """
    depth, tower = len(student.blocks), student.visual
    if only in ("patch-embed", "pos-embed"):
        if blocks is not None:
            raise WrongCall(f"--train-only {only} trains no block; leave --train-blocks out")
        first, named = None, tower.named_parameters()
    elif blocks == "all" and only is None:
        first, named = None, tower.named_parameters()
    else:
        count = {None: "2", "all": str(depth)}.get(blocks, blocks)
        if not count.isdecimal() or not 1 <= int(count) <= depth:
            raise WrongCall(f"--train-blocks {blocks}: must be from 1 to {depth}, the number of blocks, or 'all'")
        first = depth - int(count)
        named = [pair for index in range(first, depth) for pair in student.blocks[index].named_parameters()]
    parameters = [parameter for name, parameter in named if only is None or PARTS[only] & set(name.split("."))]
    if not parameters:
        raise WrongCall(f"--train-only {only}: this image tower has no such parameters, so nothing would be trained"
                        + (" (its positions are not learned)" if only == "pos-embed" else ""))
    for parameter in parameters:
        parameter.requires_grad_(True)
    return first, parameters


def frozen_tokens(student, image, first):
    """What enters block `first`, without gradient bookkeeping: (3, H, W) uint8 -> (1, n, C)."""
    image = student.normalise(image)[None]
    with torch.no_grad():
        return student.run_blocks(student.embed(image), student.grid(image), stop=first)


def student_features(student, sample, first, frozen=None):
    """Single-pass map of one image, with gradients from block `first` on: (h, w, D). Stores the frozen part in `frozen`, if given."""
    if first is None:
        return student.encode_dense(student.normalise(sample.image)[None])[0]
    if sample.tokens is not None:
        tokens, grid = sample.tokens[None].float(), tuple(sample.target.shape[:2])
    else:
        tokens, grid = frozen_tokens(student, sample.image, first), student.grid(sample.image)
        tokens = frozen.keep(sample.entry, tokens).float() if frozen else tokens
    return student.project(student.run_blocks(tokens, grid, start=first), grid)[0]


def distillation_loss(features, target, texts=None):
    """Mean squared error between maps, or between their cosines with texts (N, D): (h', w', D), (h, w, D) -> scalar, float32."""
    features, target = features.float(), target.float()
    if features.shape != target.shape:  # --random-scale
        features = F.interpolate(features.permute(2, 0, 1)[None], size=target.shape[:2], mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    if texts is not None:
        features, target = (F.normalize(map_, dim=-1) @ texts.T for map_ in (features, target))  # (h, w, N)
    return F.mse_loss(features, target)


def make_optimizers(student, parameters, kind, lr, weight_decay):
    """AdamW over the parameters, or ("muon") Muon (Jordan et al. 2024) over the matrices of blocks and AdamW over the rest: a list.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that one learning rate suits both.
    """
    of_blocks = {id(p) for block in student.blocks for p in block.parameters()}
    matrices = [p for p in parameters if kind == "muon" and p.ndim == 2 and id(p) in of_blocks]
    taken = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in taken]
    optimizers = [torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")] if matrices else []
    return optimizers + ([torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, fused=True)] if rest else [])


def learning_rate(step, steps, peak, schedule):
    return peak if schedule == "constant" else peak * (1 + math.cos(math.pi * step / steps)) / 2


# ---- frozen blocks, computed once --------------------------------------------------------------------------------------

class FrozenTokens:
    """What enters the first trained block, on disk: one float16 .npy (n, C) a map, n = h w and the class and register tokens.

    It is the same in every epoch, because augmentation is fixed per image. Tokens are rounded to float16 before their first use
    too, so that runs that make them and runs that find them train alike to the last bit. Processes may share a folder.
    """

    def __init__(self, folder, settings, extra, width):
        self.folder, self.settings, self.extra, self.width = Path(folder), settings, extra, width
        self.thread, self.writing = concurrent.futures.ThreadPoolExecutor(1), collections.deque()

    def path(self, entry):
        return self.folder / entry["file"].replace("features/", "tokens/", 1)

    def bytes(self, entry):
        return 2 * (entry["grid"][0] * entry["grid"][1] + self.extra) * self.width + 128  # 128: the header of an .npy file

    def read(self, entry):
        """(n, C) float16, or None if it is not there yet, or not whole."""
        try:
            tokens = np.load(self.path(entry), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return torch.from_numpy(tokens) if tokens.dtype == np.float16 and tokens.nbytes + 128 == self.bytes(entry) else None

    def keep(self, entry, tokens):
        """Round (1, n, C) to float16, store it while the computation goes on, return it. Raises RunFailed for an overflow."""
        rounded = tokens.to(torch.float16)
        if not torch.isfinite(rounded).all():
            raise RunFailed(f"the tokens of {entry['image']} reach {tokens.abs().max().item():g} before the first trained block, which float16 cannot hold; "
                            "use --cache-frozen off and another --out")
        self.writing.append(self.thread.submit(self.write, entry, rounded[0]))
        self.flush(pending=4)
        return rounded

    def write(self, entry, tokens):
        with atomic_path(self.path(entry), f"{platform.node()}-{os.getpid()}-") as temporary, open(temporary, "wb") as file:
            np.save(file, tokens.cpu().numpy())

    def flush(self, pending=0):
        """Wait until no more than `pending` writes are under way; a failed one ends the run here."""
        while len(self.writing) > pending:
            self.writing.popleft().result()


def frozen_folder(args, student, first, folder, teacher, entries, runtime):
    """The FrozenTokens that --cache-frozen asks for, or None with the reason why there are none."""
    if args.cache_frozen == "off":
        return None, "off"
    if first is None or args.random_scale:
        reason = "--random-scale changes the image in every epoch" if args.random_scale else "gradients reach the embedding, so no block is frozen"
        if args.cache_frozen != "auto":
            raise WrongCall(f"--cache-frozen {args.cache_frozen}: nothing can be kept, because {reason}; leave it out")
        return None, reason
    smallest = min(entries, key=lambda entry: entry["grid"][0] * entry["grid"][1])
    image = load_sample(folder, teacher, smallest).image.to(runtime.device)
    with runtime.autocast():
        tokens = frozen_tokens(student, image, first)
    if args.cache_frozen == "auto" and tokens.abs().max() > FLOAT16_MAX / 4:
        return None, f"its tokens reach {tokens.abs().max().item():g}, too close to the end of float16"
    plans = json.dumps([[entry[key] for key in ("file", "resize", "crop", "flip", "grid")] for entry in entries])
    settings = {"backbone": teacher["backbone"], "weights": teacher["weights"], "first_block": first, "precision": runtime.precision,
                "images": hashlib.sha256(plans.encode()).hexdigest()}
    name = f"frozen-{first}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"
    extra = tokens.shape[1] - smallest["grid"][0] * smallest["grid"][1]
    return FrozenTokens(folder / name if args.cache_frozen == "auto" else args.cache_frozen, settings, extra, tokens.shape[2]), None


def decide_cache(frozen, reason, automatic, decided, entries, epochs):
    """Say how much the frozen tokens need and have. Returns whether they are kept; an earlier run's decision stands. Raises RunFailed."""
    if frozen is None:
        print(f"frozen tokens are not kept: {reason}")
        return False
    total = sum(map(frozen.bytes, entries))
    missing = sum(frozen.bytes(entry) for entry in entries if not frozen.path(entry).exists())
    free = free_bytes(frozen.folder)
    needs = f"{total / 1e9:.2f} GB in {frozen.folder}, {missing / 1e9:.2f} GB of it still to be written, {free / 1e9:.0f} GB free"
    if not automatic:
        decided = True
    elif decided is None:
        decided = missing < 0.9 * free and (epochs > 1 or not missing)
    if decided is False:
        print(f"frozen tokens are not kept: they would need {needs}" + ("" if epochs > 1 else ", and one epoch uses them once"))
        return False
    print(f"frozen tokens are kept: {needs}")
    require_room(frozen.folder, missing, "the frozen tokens (--cache-frozen)")
    return True


# ---- state and log ---------------------------------------------------------------------------------------------------

def save_state(out, step, parameters, optimizers, scaler):
    """training_state.pt; the one before it stays as training_state.previous.pt."""
    state = {"step": step, "parameters": [p.detach() for p in parameters], "optimizers": [optimizer.state_dict() for optimizer in optimizers],
             "scaler": scaler.state_dict()}
    with atomic_path(out / "training_state.pt") as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(str(error).splitlines()[0]) from error
        if (out / "training_state.pt").exists():
            os.replace(out / "training_state.pt", out / "training_state.previous.pt")


@torch.no_grad()
def load_state(out, parameters, optimizers, scaler, device):
    """Continue from the last whole state: returns the number of steps done, 0 without one."""
    paths = [path for path in (out / "training_state.pt", out / "training_state.previous.pt") if path.exists()]
    for path in paths:
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            break
        except Exception as error:  # torch raises many types for a damaged file
            print(f"{path} cannot be read ({type(error).__name__})")
    else:
        if paths:
            raise RunFailed(f"no state in {out} can be read; delete {' and '.join(path.name for path in paths)} there to start this training again")
        return 0
    for parameter, stored in zip(parameters, state["parameters"], strict=True):
        parameter.copy_(stored)
    for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(stored)
    scaler.load_state_dict(state["scaler"])
    return state["step"]


def plot_log(out, points=1000):
    """log.jsonl as a curve of at most so many points, means of equally many steps: loss.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    curve = np.array([(entry["step"], entry["loss"]) for entry in read_json_lines(out / "log.jsonl")])
    run = math.ceil(len(curve) / points)
    curve = curve[:len(curve) // run * run].reshape(-1, run, 2).mean(1)  # (points, 2)
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(*curve.T, linewidth=1)
    axes.set(xlabel="step", ylabel="mean squared error to the teacher", yscale="log", title=f"{out.name}: distillation loss")
    axes.grid(alpha=0.3)
    with atomic_path(out / "loss.png") as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


@contextlib.contextmanager
def noted_signals():
    """Within it SIGTERM and Ctrl-C are only noted, in the list it yields, so that the step under way is finished and saved."""
    noted = []
    before = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- the loop --------------------------------------------------------------------------------------------------------

def accumulate_gradients(student, samples, batch, first, frozen, texts, scaler, runtime):
    """Add the gradients of this process's share of a batch. Returns its part of the batch's mean loss, and the seconds waited for data."""
    total, waiting = torch.zeros((), device=runtime.device), 0.0
    for _ in range(batch // runtime.world):
        asked = time.time()
        sample = next(samples)
        waiting += time.time() - asked
        with runtime.autocast():
            features = student_features(student, sample, first, frozen)
        loss = distillation_loss(features, sample.target, texts) / batch
        scaler.scale(loss).backward()
        total += loss.detach()
    return total, waiting


def add_up_gradients(parameters, loss, stop, runtime):
    """Sum gradients, loss and the wish to stop over the processes, in one exchange whose layout is always the same, so that a
    resumed run adds in the same order. Returns (loss, stop), equal in all of them."""
    if runtime.world > 1:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = runtime.add_up(torch.cat([*(gradient.flatten() for gradient in gradients), torch.stack([loss, loss.new_tensor(float(stop))])]))
        for gradient, summed in zip(gradients, flat[:-2].split([gradient.numel() for gradient in gradients])):
            gradient.copy_(summed.view_as(gradient))
        loss, stop = flat[-2], flat[-1] > 0
    return loss.item(), bool(stop)


def main(args):
    folder, out = Path(args.teacher), Path(args.out)
    teacher = read_json(folder / "teacher.json", "extract_teacher.py")
    entries = read_index(folder)
    if not entries:
        raise RunFailed(f"{folder / 'index.jsonl'} lists no features; run extract_teacher.py first")
    recipe = RECIPES["tiny" if teacher["backbone"] == "tiny" else "paper"]
    epochs, optimizer, peak, schedule, weight_decay = (
        recipe[key] if getattr(args, key) is None else getattr(args, key) for key in ("epochs", "optimizer", "lr", "schedule", "weight_decay"))
    if epochs < 1 or not peak > 0 or not weight_decay >= 0:
        raise WrongCall("--epochs must be at least 1, --lr greater than 0, and --weight-decay at least 0")
    if (args.loss == "similarity") != (args.classes is not None):
        raise WrongCall("--loss similarity and --classes FILE go together")
    if args.random_scale and not 0 < args.random_scale[0] <= args.random_scale[1]:
        raise WrongCall("--random-scale needs 0 < LO <= HI")
    classes = read_classes(args.classes) if args.classes is not None else None

    runtime = start_runtime(args.device, args.precision, args.seed)
    batch = math.ceil(recipe["batch_size"] / runtime.world) * runtime.world if args.batch_size is None else args.batch_size
    if batch < 1 or batch % runtime.world:
        raise WrongCall(f"--batch-size {batch}: must be a multiple of the number of processes, {runtime.world}")
    student = load_backbone(teacher["backbone"], teacher["random_init"], runtime.device, text=classes is not None,
                            hub_dir=teacher.get("hub_dir"), dinov3_weights=teacher.get("dinov3_weights"))
    if weights_hash(student) != teacher["weights"]:
        raise RunFailed(f"{teacher['backbone']} has other weights than when {folder} was made; extract the features again, into another folder")
    first, parameters = select_trained(student, args.train_blocks, args.train_only)
    trained, tower = (sum(p.numel() for p in some) for some in (parameters, student.visual.parameters()))
    texts = embed_texts(student, classes.flat) if classes else None
    frozen, reason = frozen_folder(args, student, first, folder, teacher, entries, runtime)
    blocks = args.train_blocks or (None if first is None else "2")
    if runtime.rank == 0:
        decided = read_json(out / "spar.json", "an earlier run").get("cache_frozen") if (out / "spar.json").exists() else None
        cached = decide_cache(frozen, reason, args.cache_frozen == "auto", decided, entries, epochs)
        states = sum(path.stat().st_size for path in out.glob("training_state*.pt"))
        require_room(out, 3 * 12 * trained - states, "training states")  # two kept, one being written; of weights and AdamW's two moments, float32
        require_same_settings(out / "spar.json", {
            "teacher": teacher, "maps": len(entries), "train_blocks": blocks, "train_only": args.train_only, "epochs": epochs, "optimizer": optimizer, "lr": peak,
            "schedule": schedule, "weight_decay": weight_decay, "loss_of": args.loss, "classes": classes and classes.names,
            "random_scale": args.random_scale, "batch_size": batch, "cache_frozen": cached, "seed": args.seed, "precision": runtime.precision,
            "processes": runtime.world})
        if cached:
            require_same_settings(frozen.folder / "frozen.json", frozen.settings, flag="--cache-frozen", writer=f"{platform.node()}-{os.getpid()}-")
    runtime.barrier()
    settings = read_json(out / "spar.json", "distill.py")  # as rank 0 decided
    frozen = frozen if settings["cache_frozen"] else None

    optimizers = make_optimizers(student, parameters, optimizer, peak, weight_decay)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
    steps_per_epoch = math.ceil(len(entries) / batch)
    steps = epochs * steps_per_epoch
    step = load_state(out, parameters, optimizers, scaler, runtime.device)
    if runtime.rank == 0:
        log = [entry for entry in read_json_lines(out / "log.jsonl") if entry["step"] <= step]
        seconds = log[-1]["seconds"] if log else 0.0
        write_json_lines(out / "log.jsonl", log)
        print(f"{len(entries)} teacher maps, {epochs} epochs, {steps} steps of {batch}" + (f", continuing after step {step}" if step else ""))
        print(f"training {trained / 1e6:.2f} M of {tower / 1e6:.1f} M parameters of the image tower "
              f"({', '.join(filter(None, [args.train_only, blocks and (f'the last {blocks} blocks' if blocks != 'all' else 'all blocks')]))}), "
              f"{optimizer}, learning rate {peak:g}, {schedule}")

    stream = torch.cuda.Stream(runtime.device) if runtime.device.type == "cuda" else None
    bar = tqdm(total=steps * batch, initial=step * batch, desc="distill", unit="img", disable=runtime.rank > 0)
    started, waited, plotted, stop = time.time(), 0.0, 0.0, False
    with noted_signals() as signals, bar as progress:
        for epoch in range(step // steps_per_epoch, epochs):
            order = epoch_order(len(entries), batch, args.seed, epoch, runtime.rank, runtime.world)[step - epoch * steps_per_epoch:]
            samples = prefetch(lambda k: to_device(load_sample(folder, teacher, entries[k], frozen, random_factor(args.random_scale, args.seed, epoch, k)),
                                                   runtime.device, stream), order.flatten().tolist(), args.workers)
            for _ in order:
                rate = learning_rate(step, steps, peak, schedule)
                for each in optimizers:
                    each.zero_grad()
                    for group in each.param_groups:
                        group["lr"] = rate
                loss, waiting = accumulate_gradients(student, samples, batch, first, frozen, texts, scaler, runtime)
                loss, stop = add_up_gradients(parameters, loss, bool(signals), runtime)
                waited += waiting
                if not math.isfinite(loss):
                    raise RunFailed(f"the loss is {loss} at step {step + 1}; {out} keeps the last good state. "
                                    "Start again with a lower --lr or with --precision fp32, in another --out")
                for each in optimizers:
                    scaler.step(each)
                scaler.update()
                step += 1
                progress.update(batch)
                if runtime.rank == 0:
                    append_json_line(out / "log.jsonl", {"step": step, "epoch": epoch, "loss": loss, "lr": rate,
                                                         "seconds": round(seconds + time.time() - started, 3)})
                    progress.set_postfix(epoch=epoch + 1, loss=f"{loss:.4f}", waiting=f"{waited / (time.time() - started):.0%}", refresh=False)
                    if stop or step % args.save_every == 0 or step % steps_per_epoch == 0:
                        save_state(out, step, parameters, optimizers, scaler)
                        if stop or step % steps_per_epoch == 0 or time.time() - plotted > 60:
                            plot_log(out)
                            plotted = time.time()
                if stop:
                    break
            if frozen:
                frozen.flush()
            if stop:
                break
    runtime.barrier()  # until everything is on the disk
    if stop and step < steps:
        if runtime.rank == 0:
            print(f"stopped and saved after step {step} of {steps}")
        raise KeyboardInterrupt
    if runtime.rank == 0:
        loading = student.save(out)
        write_json(out / "spar.json", {**settings, "steps": steps, "loss": read_json_lines(out / "log.jsonl")[-1]["loss"]})
        print(f"student in {out}: {loading}")
        if frozen:
            print(f"frozen tokens in {frozen.folder}: other runs of these blocks use them; delete them when there are none")


if __name__ == "__main__":
    command_line(main, ARGS)
