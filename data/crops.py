"""Pictures at the size that a network was trained on: random crops to learn from, and windows that
are spread over a picture to score it, as benchmark-vfm-ss has them (the paper's "repository
resolution").
"""
import math

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as colour

from common import IGNORE, bilinear_strips, prefetch
from data.benchmarks import nearest_labels


def random_crop(image, labels, side, rng):
    """The reference's augmentation but for the flip: colour jitter, a scale of 0.5 to 2 times what
    fits the crop, a crop; 0 and IGNORE beyond the picture. (3, H, W) uint8, (H, W) -> (side, side).
    """
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
    beyond = (0, max(0, side - size[1]), 0, max(0, side - size[0]))
    image, labels = F.pad(image, beyond), F.pad(labels, beyond, value=IGNORE)
    top, left = (int(rng.integers(0, length - side + 1)) for length in labels.shape)
    return image[:, top:top + side, left:left + side], labels[top:top + side, left:left + side]


def smooth_resize(image, size):
    """Bilinear with antialiasing: (3, H, W) uint8 -> (3, *size)."""
    resized = F.interpolate(image[None].float(), size=tuple(size), mode="bilinear", antialias=True)
    return resized[0].round().to(torch.uint8)


def crop_logits(head, encode, image, side):
    """Logits (H', W', K) of a picture whose short side becomes `side`, averaged over windows that
    are spread evenly along the long one."""
    scale = max(side / length for length in image.shape[-2:])
    image = smooth_resize(image, [round(length * scale) for length in image.shape[-2:]])
    upright = image.shape[1] > image.shape[2]
    image = image.transpose(1, 2) if upright else image
    length = image.shape[2]
    count = math.ceil(length / side)
    total = torch.zeros(side, length, head.out_features, device=head.weight.device)
    times = torch.zeros(length, 1, device=head.weight.device)
    for k in range(count):
        first = int(k * (length - side) / max(1, count - 1))
        window = image[:, :, first:first + side]
        logits = head(encode(window.transpose(1, 2) if upright else window).float())
        logits = bilinear_strips(logits, (side, side))(0, side).permute(1, 2, 0)
        total[:, first:first + side] += logits.transpose(0, 1) if upright else logits
        times[first:first + side] += 1
    logits = total / times
    return logits.transpose(0, 1) if upright else logits


def logits_of(head, features, indices, crop):
    """(index, logits (h, w, K)) of pictures, by a linear head on whole pictures or on windows."""
    if not crop:
        for index, each in features.stream(indices):
            yield index, head(each.float())
        return
    for index, image in zip(indices, prefetch(features.pixels, indices, features.workers)):
        if image is not None:
            yield index, crop_logits(head, features.encode, image, crop)
