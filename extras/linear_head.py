"""The linear head of evaluate_probes.py, as in benchmark-vfm-ss: one map D -> K for every patch.

It is trained and tested on whole images or on crops (the paper's "repository resolution"): random
crops to train on, windows spread over an image to test. `features` is a Features.
"""
import json
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torchvision.transforms.v2 import functional as colour
from tqdm import tqdm

from common import IGNORE, bilinear_strips, prefetch, weights_hash
from data.files import atomic_path, nearest_multiple, reading
from data.benchmarks import nearest_labels, read_mask

# ---- training ------------------------------------------------------------------------------------

def schedule(indices, settings, seed):
    """Return (index, flip) of the images of all steps, shuffled anew in each epoch."""
    needed = settings.steps * settings.images_per_step
    rng, epochs = np.random.default_rng(seed), math.ceil(needed / len(indices))
    order = np.concatenate([rng.permutation(len(indices)) for _ in range(epochs)])
    return [(indices[k], bool(flip)) for k, flip in zip(order, rng.random(needed) < 0.5)]


def image_loss(head, features, labels):
    """Return the cross-entropy of bilinearly enlarged logits, averaged over the labelled pixels."""
    logits = head(features.float()).permute(2, 0, 1)[None].contiguous()  # faster on a CPU
    logits = F.interpolate(logits, size=labels.shape, mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, labels[None], ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


def load_sample(features, index, flip, crop, seed):
    """Load a feature map, or the pixels of a random crop, to learn from, and their labels (H, W).
    The former is None for an image that cannot be read."""
    labels = read_mask(features.dataset, index)
    labels = labels.flip(-1) if flip else labels
    if not crop:
        size = [nearest_multiple(side, features.patch) for side in labels.shape]
        return features.load(index, flip), nearest_labels(labels, size)
    image = features.read(index, flip)
    if image is None:
        return None, labels
    return random_crop(image, labels, crop, np.random.default_rng(seed))


def train_head(features, indices, settings, seed, state):
    """Return a linear head, trained by AdamW with a learning rate of lr (1 - t / steps)^0.9.

    Processes share out the images of each step. An interrupted training continues from `state`.
    """
    runtime, size = features.runtime, settings.images_per_step
    torch.manual_seed(seed)
    head = torch.nn.Linear(features.dim, len(features.dataset.classes)).to(runtime.device)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=settings.weight_decay)
    start, saved, samples = 0, time.monotonic(), schedule(indices, settings, seed)
    if state.is_file():
        with reading(state, "delete it, and the head is trained anew"):
            before = torch.load(state, map_location=runtime.device, weights_only=True)
            head.load_state_dict(before["head"])
            optimizer.load_state_dict(before["optimizer"])
            start = before["step"]
    runtime.barrier()  # before the first process writes the next state

    def load_batch(step):
        positions = range(step * size + runtime.rank, (step + 1) * size, runtime.world)
        return [load_sample(features, *samples[position], settings.crop, [seed, position])
                for position in positions]
    steps = range(start, settings.steps)
    progress = tqdm(steps, "linear head", initial=start, total=settings.steps, leave=False,
                    disable=runtime.rank > 0)
    for step, batch in zip(progress, prefetch(load_batch, steps, features.workers)):
        for parameter in head.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for loaded, labels in batch:
            image_features = features.encode(loaded)
            if image_features.numel():
                loss = image_loss(head, image_features, labels.to(runtime.device))
                (loss / size).backward()
        for parameter in head.parameters():
            runtime.sum(parameter.grad)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 - step / settings.steps) ** 0.9
        optimizer.step()
        if runtime.rank == 0 and time.monotonic() - saved > 30:
            with atomic_path(state) as temporary:
                torch.save({"head": head.state_dict(), "optimizer": optimizer.state_dict(),
                            "step": step + 1}, temporary)
            saved = time.monotonic()
    return head.requires_grad_(False)


# ---- its file ------------------------------------------------------------------------------------

HEAD_KEYS = {"method", "backbone", "weights", "stride", "window", "crop", "classes"}


def describe_head(features, crop):
    """Return what a linear head's file says of it, by HEAD_KEYS."""
    method = features.method
    return {"method": method.name, "backbone": method.origin, "crop": crop,
            "weights": weights_hash(method.backbone), "stride": method.stride,
            "window": list(method.window) if method.stride else None,
            "classes": features.dataset.classes.names}


def read_head(path, device):
    """Return the linear head in a file, and what the file says of it. Raise RunError."""
    with reading(path, "--probe linear writes one where there is none"):
        with safe_open(path, "pt", str(device)) as file:
            about = json.loads(file.metadata()["probe"])
            tensors = {key: file.get_tensor(key) for key in ("weight", "bias")}
        head = torch.nn.Linear(*tensors["weight"].shape[::-1], device=device)
        head.load_state_dict(tensors)
        if HEAD_KEYS - about.keys():
            raise ValueError(f"it does not say its {', '.join(sorted(HEAD_KEYS - about.keys()))}")
        if len(about["classes"]) != head.out_features:
            raise ValueError("it has not one output per class")
        if not all(value.isfinite().all() for value in tensors.values()):
            raise ValueError("it holds numbers that are not finite")
    return head.requires_grad_(False), about


# ---- crops ---------------------------------------------------------------------------------------

def random_crop(image, labels, side, rng):
    """Augment as the reference does, without the flip: colour jitter, a scale of 0.5 to 2 times
    what fits the crop, a crop. (3, H, W) uint8, (H, W) -> (side, side), 0 and IGNORE outside."""
    contrast = [(colour.adjust_contrast, rng.uniform(0.5, 1.5))]
    tone = [(colour.adjust_saturation, rng.uniform(0.5, 1.5)),
            (colour.adjust_hue, rng.uniform(-0.05, 0.05))]
    tones = contrast + tone if rng.random() < 0.5 else tone + contrast
    for adjust, factor in [(colour.adjust_brightness, rng.uniform(223 / 255, 287 / 255)), *tones]:
        if rng.random() < 0.5:
            image = adjust(image, factor)
    scale = rng.uniform(0.5, 2) * min(side / length for length in labels.shape)
    size = [max(1, int(length * scale)) for length in labels.shape]
    image, labels = smooth_resize(image, size), nearest_labels(labels, size)
    outside = (0, max(0, side - size[1]), 0, max(0, side - size[0]))
    image, labels = F.pad(image, outside), F.pad(labels, outside, value=IGNORE)
    top, left = (int(rng.integers(0, length - side + 1)) for length in labels.shape)
    return image[:, top:top + side, left:left + side], labels[top:top + side, left:left + side]


def smooth_resize(image, size):
    """Resize bilinearly with antialiasing: (3, H, W) uint8 -> (3, *size)."""
    resized = F.interpolate(image[None].float(), size=tuple(size), mode="bilinear", antialias=True)
    return resized[0].round().to(torch.uint8)


def crop_logits(head, encode, image, side):
    """Return the logits (H', W', K) of an image whose short side becomes `side`, averaged over
    windows that are spread evenly along the long side."""
    scale = max(side / length for length in image.shape[-2:])
    image = smooth_resize(image, [round(length * scale) for length in image.shape[-2:]])
    axis, length = (0, image.shape[1]) if image.shape[1] > image.shape[2] else (1, image.shape[2])
    total = torch.zeros(*image.shape[1:], head.out_features, device=head.weight.device)
    times = torch.zeros(*image.shape[1:], 1, device=head.weight.device)
    count = math.ceil(length / side)
    for k in range(count):
        first = int(k * (length - side) / max(1, count - 1))
        logits = head(encode(image.narrow(axis + 1, first, side)).float())
        logits = bilinear_strips(logits, (side, side))(0, side).permute(1, 2, 0)
        total.narrow(axis, first, side).add_(logits)
        times.narrow(axis, first, side).add_(1)
    return total / times


def head_logits(head, features, indices, crop):
    """Yield (index, logits (h, w, K)) of images, from whole images or from windows of `crop`."""
    if not crop:
        for index, image_features in features.stream(indices):
            yield index, head(image_features.float())
        return
    for index, image in zip(indices, prefetch(features.read, indices, features.workers)):
        if image is not None:
            yield index, crop_logits(head, features.encode, image, crop)
