"""Stage 2: distil the sliding-window teacher into a single-pass student (paper, section 3.4).

In: a folder that extract_teacher.py wrote, and the pictures it was made from. Out, in --out: a folder that plain open_clip
loads as local-dir:runs/spar, spar.json (what it was trained from and how), log.jsonl, loss.png, training_state.pt.

    python distill.py                                        # the demo, CPU
    python distill.py --teacher runs/teacher --epochs 10     # one GPU
    torchrun --nproc-per-node 2 distill.py                   # the paper's two GPUs: one image each, averaged gradients

The same command continues after an interruption, and ends with the weights of an uninterrupted run.
"""
import argparse


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", default="runs/teacher", help="folder of teacher features (%(default)s)")
    add("--out", default="runs/spar", help="folder to write (%(default)s)")
    add("--train-blocks", default="2", metavar="N", help="how many of the last blocks to train (%(default)s), or 'all' for the whole image tower, "
        "which is better at very large pictures and costs three times the time")
    add("--epochs", type=int, help="passes over the features (default: 10; tiny 8)")
    add("--lr", type=float, help="learning rate of AdamW (default: 2e-5; tiny 5e-4)")
    add("--schedule", choices=["constant", "cosine"], help="of the learning rate (default: constant; tiny cosine)")
    add("--weight-decay", type=float, default=1e-4, help="of AdamW (%(default)s)")
    add("--save-every", type=int, default=500, metavar="N", help="steps between resumable states (%(default)s), besides one at the end of each epoch")
    add("--workers", type=int, default=2, help="threads that read pictures and features ahead (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s: a GPU if there is one)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of the matrix products (%(default)s: fp16 on a GPU, fp32 on a CPU)")
    add("--seed", type=int, default=0, help="of the order of the pictures (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":  # before torch is imported, so that --help and a wrong flag answer at once
    ARGS = parse_args()

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (RunFailed, WrongCall, append_json_line, apply_augmentation, atomic_path, command_line, load_backbone,
                    open_features, prefetch, read_image, read_json, read_json_lines, require_same_settings,
                    start_runtime, weights_hash, write_json, write_json_lines)

# the paper's, for the published backbones; and what a backbone that is 30 times smaller wants, on 30 times fewer steps
RECIPES = {"paper": {"epochs": 10, "lr": 2e-5, "schedule": "constant"}, "tiny": {"epochs": 8, "lr": 5e-4, "schedule": "cosine"}}


# ---- data ------------------------------------------------------------------------------------------------------------

def load_sample(teacher_folder, teacher, entry):
    """One index entry as (image (3, H, W) uint8, teacher map (H/patch, W/patch, D) float16). Raises RunFailed, naming the file."""
    image = apply_augmentation(read_image(Path(teacher["images"]) / entry["image"]), entry)
    path = teacher_folder / entry["file"]
    features = np.array(open_features(path))
    expected = (*(side // teacher["patch"] for side in image.shape[-2:]), teacher["dim"])
    if features.shape != expected:
        raise RunFailed(f"{path} holds a map of {features.shape} where its picture needs {expected}; delete the file and run extract_teacher.py again")
    if not np.isfinite(features).all():
        raise RunFailed(f"{path} holds values that are not finite; delete the file and run extract_teacher.py again")
    return image, torch.from_numpy(features)


def epoch_order(count, seed, epoch, rank, world):
    """This process's share of an epoch's permutation, which depends on seed and epoch alone; every share is equally long."""
    order = np.random.default_rng((seed, epoch)).permutation(count)
    order = np.resize(order, math.ceil(count / world) * world)
    return order[rank::world].tolist()


# ---- model -----------------------------------------------------------------------------------------------------------

def select_trained(student, blocks):
    """Unfreeze what is to be trained. Returns the index of the first block with gradients and the parameters."""
    depth = len(student.blocks)
    if blocks == "all":
        trained, first = student.visual, 0
    elif blocks.isdecimal() and 1 <= int(blocks) <= depth:
        first = depth - int(blocks)
        trained = student.blocks[first:]
    else:
        raise WrongCall(f"--train-blocks {blocks}: must be from 1 to {depth}, the number of blocks, or 'all'")
    trained.requires_grad_(True)
    return first, [parameter for parameter in trained.parameters() if parameter.requires_grad]


def student_features(student, image, first, train_embedding):
    """Single-pass map of one normalised image, with gradients from block `first` on: (3, H, W) -> (H/patch, W/patch, D)."""
    grid = student.grid(image)
    with torch.set_grad_enabled(train_embedding):
        tokens = student.run_blocks(student.embed(image[None]), grid, stop=first)
    return student.project(student.run_blocks(tokens, grid, start=first), grid)[0]


def learning_rate(step, steps, peak, schedule):
    return peak if schedule == "constant" else peak * (1 + math.cos(math.pi * step / steps)) / 2


# ---- state and log ---------------------------------------------------------------------------------------------------

def save_state(out, step, parameters, optimizer, scaler):
    state = {"step": step, "parameters": [p.detach() for p in parameters], "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    with atomic_path(out / "training_state.pt") as temporary:
        torch.save(state, temporary)


@torch.no_grad()
def load_state(out, parameters, optimizer, scaler, device):
    """Continue from the stored state: returns the number of steps done, 0 without one."""
    path = out / "training_state.pt"
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise RunFailed(f"{path} cannot be read ({type(error).__name__}); delete it to start this training again") from None
    for parameter, stored in zip(parameters, state["parameters"], strict=True):
        parameter.copy_(stored)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state["step"]


def plot_log(out):
    """log.jsonl as a curve, loss.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    entries = read_json_lines(out / "log.jsonl")
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot([entry["step"] for entry in entries], [entry["loss"] for entry in entries], linewidth=1)
    axes.set(xlabel="step", ylabel="mean squared error to the teacher", yscale="log", title=f"{out.name}: distillation loss")
    axes.grid(alpha=0.3)
    with atomic_path(out / "loss.png") as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


# ---- the loop --------------------------------------------------------------------------------------------------------

def main(args):
    teacher_folder, out = Path(args.teacher), Path(args.out)
    teacher = read_json(teacher_folder / "teacher.json", "extract_teacher.py")
    entries = read_json_lines(teacher_folder / "index.jsonl")
    if not entries:
        raise RunFailed(f"{teacher_folder / 'index.jsonl'} lists no features; run extract_teacher.py first")
    recipe = RECIPES["tiny" if teacher["backbone"] == "tiny" else "paper"]
    epochs, peak, schedule = (recipe[key] if getattr(args, key) is None else getattr(args, key) for key in ("epochs", "lr", "schedule"))
    if epochs < 1 or not peak > 0:
        raise WrongCall("--epochs must be at least 1, and --lr greater than 0")

    runtime = start_runtime(args.device, args.precision, args.seed)
    student = load_backbone(teacher["backbone"], teacher["random_init"], runtime.device)
    if weights_hash(student) != teacher["weights"]:
        raise RunFailed(f"{teacher['backbone']} has other weights than when {teacher_folder} was made; extract the features again, into another folder")
    first, parameters = select_trained(student, args.train_blocks)
    settings = {"teacher": teacher, "maps": len(entries), "train_blocks": args.train_blocks, "epochs": epochs, "lr": peak, "schedule": schedule,
                "weight_decay": args.weight_decay, "seed": args.seed, "precision": runtime.precision, "processes": runtime.world}
    if runtime.rank == 0:
        require_same_settings(out / "spar.json", settings)
    runtime.barrier()

    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
    steps_per_epoch = math.ceil(len(entries) / runtime.world)
    steps = epochs * steps_per_epoch
    step = load_state(out, parameters, optimizer, scaler, runtime.device)
    if runtime.rank == 0:
        log = [entry for entry in read_json_lines(out / "log.jsonl") if entry["step"] <= step]
        seconds = log[-1]["seconds"] if log else 0.0
        write_json_lines(out / "log.jsonl", log)
        print(f"{len(entries)} teacher maps, {epochs} epochs, {steps} steps" + (f", continuing after step {step}" if step else ""))
        print(f"training {sum(p.numel() for p in parameters) / 1e6:.1f} M of {sum(p.numel() for p in student.visual.parameters()) / 1e6:.1f} M "
              f"parameters of the image tower: {'all' if args.train_blocks == 'all' else f'the last {args.train_blocks} blocks'}, "
              f"AdamW, learning rate {peak:g}, {schedule}")

    progress = tqdm(total=steps, initial=step, desc="distill", unit="step", disable=runtime.rank > 0)
    started = time.time()
    for epoch in range(step // steps_per_epoch, epochs):
        order = epoch_order(len(entries), args.seed, epoch, runtime.rank, runtime.world)[step - epoch * steps_per_epoch:]
        for image, target in prefetch(lambda k: load_sample(teacher_folder, teacher, entries[k]), order, args.workers):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak, schedule)
            with runtime.autocast():
                features = student_features(student, student.normalise(image), first, args.train_blocks == "all")
            loss = F.mse_loss(features.float(), target.to(runtime.device, torch.float32))
            if not torch.isfinite(loss):
                raise RunFailed(f"the loss is {loss.item()} at step {step + 1}; {out} keeps the last good state. "
                                "Start again with a lower --lr or with --precision fp32, in another --out")
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            average_gradients(parameters, runtime)
            scaler.step(optimizer)
            scaler.update()
            step += 1
            progress.update()
            if runtime.rank > 0:
                continue
            append_json_line(out / "log.jsonl", {"step": step, "epoch": epoch, "loss": loss.item(), "lr": optimizer.param_groups[0]["lr"],
                                                 "seconds": round(seconds + time.time() - started, 3)})
            progress.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.4f}", refresh=False)
            if step % args.save_every == 0 or step % steps_per_epoch == 0:
                save_state(out, step, parameters, optimizer, scaler)
                plot_log(out)
    progress.close()
    if runtime.rank == 0:
        student.save(out)
        write_json(out / "spar.json", {**settings, "steps": steps, "loss": read_json_lines(out / "log.jsonl")[-1]["loss"]})
        print(f"student in {out}: open_clip.create_model_and_transforms('local-dir:{out}')")


def average_gradients(parameters, runtime):
    if runtime.world > 1:
        for parameter in parameters:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= runtime.world


if __name__ == "__main__":
    command_line(main, ARGS)
