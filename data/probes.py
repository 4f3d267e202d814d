"""The three probes on frozen features (paper, supplement 10): kNN over labelled patches, a linear
head, and true masks, each as the mean of its features.
"""
import json
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from common import IGNORE, RunFailed, atomic_path, first_line
from data.benchmarks import nearest_labels, read_mask, true_segments

# ---- kNN: in-context segmentation, as open-hummingbird-eval 2.0 but for its defects --------------

@dataclass(frozen=True)
class Knn:
    """k patches vote, by the softmax of their cosines over a temperature. bank_size: patches to be
    kept (None for all); train_share: of the training pictures, drawn at random; ignored: "class0"
    takes pixels of 255 for class 0, "left-out" for none."""
    k: int = 30
    temperature: float = 0.02
    bank_size: int | None = None
    train_share: float = 1.0
    ignored: str = "left-out"

    def draw(self, indices, seed):
        """The training pictures of a draw."""
        count = max(1, round(self.train_share * len(indices)))
        kept = np.random.default_rng(seed).permutation(len(indices))[:count]
        return [indices[k] for k in sorted(kept)]


def patch_shares(labels, grid, patch, count, ignored="left-out"):
    """Which share of each patch's pixels is of each class: (H, W) int64 -> (h * w, count) float32.
    """
    (height, width), labels = grid, nearest_labels(labels, [side * patch for side in grid])
    if ignored == "class0":
        labels = labels.where(labels != IGNORE, 0)
    cells = labels.view(height, patch, width, patch).transpose(1, 2).reshape(height * width, -1)
    cells = cells.where(cells != IGNORE, count)  # a class that is cut off
    shares = torch.zeros(len(cells), count + 1)
    return shares.scatter_add_(1, cells, torch.ones(cells.shape))[:, :count] / patch ** 2


def rare_patches(shares, most, generator):
    """The numbers of at most so many patches of a picture: those with the smallest sum, over a
    patch's classes, of how many patches hold that class, times a random number from 0 to 1."""
    present = (shares > 0).float()
    score = (present @ present.sum(0)) * torch.rand(len(shares), generator=generator)
    return score.topk(min(most, len(score)), largest=False).indices.sort().values


def bank(features, indices, knn, seed, rows=2 ** 16):
    """The labelled patches of training pictures, some `rows` at a time: (unit vectors (R, D)
    float32, their shares of classes (R, K) float16)."""
    count, most = len(features.dataset.classes), None
    if knn.bank_size:
        most = max(1, knn.bank_size // len(indices))
    chunk, held = [], 0
    for index, each in features.stream(indices, "kNN, to learn from"):
        labels = read_mask(features.dataset, index)
        shares = patch_shares(labels, each.shape[:2], features.patch, count, knn.ignored)
        kept = shares.any(1).nonzero()[:, 0]
        if most:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            kept = kept[rare_patches(shares[kept], most, generator)]
        vectors = each.flatten(0, 1)[kept.to(each.device)]
        chunk.append((F.normalize(vectors.float(), dim=-1), shares[kept].half()))
        held += len(kept)
        if held >= rows:
            yield tuple(map(torch.cat, zip(*chunk)))
            chunk, held = [], 0
    if held:
        yield tuple(map(torch.cat, zip(*chunk)))


def nearest(queries, chunks, k, block=1024):
    """The k largest cosines of each query in a bank that comes in chunks (R, D), and their rows in
    it: (Q, k) float32, (Q, k) int64; where the bank has fewer, -inf and 0.

    queries: (Q, D) unit vectors. Exact: each chunk's best are merged with those before.
    """
    best = torch.full((len(queries), k), -torch.inf, device=queries.device)
    rows = torch.zeros(best.shape, dtype=torch.int64, device=queries.device)
    before = 0
    for chunk in chunks:
        for first in range(0, len(queries), block):
            some = slice(first, first + block)
            cosines = queries[some].float() @ chunk.T  # (q, R)
            cosines, found = cosines.topk(min(k, len(chunk)))
            best[some], order = torch.cat([best[some], cosines], 1).topk(k)
            rows[some] = torch.cat([rows[some], before + found], 1).gather(1, order)
        before += len(chunk)
    return best, rows


def vote(cosines, shares, temperature):
    """Labels by neighbours: cosines (Q, k), their shares (Q, k, K) -> (Q, K) float32."""
    weights = (cosines / temperature).softmax(-1)
    return (weights[:, None] @ shares.to(weights.device).float())[:, 0]


def neighbours(queries, chunks, k):
    """nearest, for a bank of (vectors, shares): a function of a slice of the queries, to their
    cosines and the shares of their neighbours. Raises RunFailed for an empty bank."""
    shares = []

    def vectors():
        for chunk, labels in chunks:
            shares.append(labels)
            yield chunk
    cosines, rows = nearest(queries, vectors(), k)
    if not shares:
        raise RunFailed("no pixel of the training masks counts, so there is nothing to learn from")
    shares = torch.cat(shares)
    if len(shares) < k:
        tqdm.write(f"there are {len(shares)} to learn from, fewer than --k {k}; all of them vote")
    return lambda some: (cosines[some], shares[rows[some].cpu()])


# ---- linear: one map D -> K on each patch, as benchmark-vfm-ss trains it -------------------------

@dataclass(frozen=True)
class Training:
    """Of the linear head: AdamW from lr by (1 - t / steps)^0.9, no warm-up; a step is the mean of
    some pictures' means. crop: side of random crops, or None for whole pictures."""
    steps: int
    lr: float
    crop: int | None = None
    weight_decay: float = 0.05
    pictures: int = 16

    def schedule(self, indices, seed):
        """(index, flip) of the pictures of all steps, shuffled anew for each epoch."""
        rng, needed = np.random.default_rng(seed), self.steps * self.pictures
        order = np.concatenate([rng.permutation(len(indices))
                                for _ in range(math.ceil(needed / len(indices)))])
        return [(indices[k], bool(flip)) for k, flip in zip(order, rng.random(needed) < 0.5)]


def picture_loss(head, features, labels):
    """Cross-entropy of bilinearly enlarged logits, averaged over the pixels that count (0 where
    there are none): features (h, w, D), labels (H, W)."""
    logits = head(features.float()).permute(2, 0, 1)[None].contiguous()  # faster on a CPU
    logits = F.interpolate(logits, size=labels.shape, mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, labels[None], ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


def train_head(head, batches, encode, training, runtime, state):
    """Train a linear head; `state` is a file to continue from.

    batches: a function of the first step, to the (loaded, labels (H, W)) of this process in each
    step from there on; encode: loaded -> (h, w, D).
    """
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=training.weight_decay)
    start, saved = 0, time.monotonic()
    if state.is_file():
        try:
            before = torch.load(state, map_location=runtime.device, weights_only=True)
            head.load_state_dict(before["head"])
            optimizer.load_state_dict(before["optimizer"])
            start = before["step"]
        except Exception as error:  # torch raises many types for a damaged file
            raise RunFailed(f"{state} is no state of a linear head ({first_line(error)}); delete "
                            "it, and the head is trained anew") from None
    runtime.barrier()  # all have read it
    steps = tqdm(range(start, training.steps), initial=start, total=training.steps, unit="step",
                 desc="linear head", disable=runtime.rank > 0, leave=False)
    for step, batch in zip(steps, batches(start)):
        for parameter in head.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for loaded, labels in batch:
            loss = picture_loss(head, encode(loaded), labels.to(runtime.device))
            (loss / training.pictures).backward()
        for parameter in head.parameters():
            runtime.add_up(parameter.grad)
        for group in optimizer.param_groups:
            group["lr"] = training.lr * (1 - step / training.steps) ** 0.9
        optimizer.step()
        if runtime.rank == 0 and time.monotonic() - saved > 30:
            with atomic_path(state) as temporary:
                torch.save({"head": head.state_dict(), "optimizer": optimizer.state_dict(),
                            "step": step + 1}, temporary)
            saved = time.monotonic()


def save_head(path, head, about):
    with atomic_path(path) as temporary:
        save_file({key: value.cpu() for key, value in head.state_dict().items()}, temporary,
                  {"probe": json.dumps(about)})


def read_head(path, device):
    """(linear head, what its file says about it). Raises RunFailed."""
    try:
        with safe_open(path, "pt", str(device)) as file:
            about = json.loads(file.metadata()["probe"])
            weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
        head = torch.nn.Linear(*weight.shape[::-1], device=device)
        head.load_state_dict({"weight": weight, "bias": bias})
    except FileNotFoundError:
        raise RunFailed(f"{path} does not exist; --probe linear writes one") from None
    except Exception as error:  # safetensors raises its own types
        raise RunFailed(f"{path} is no linear head of evaluate_probes.py ({first_line(error)})"
                        ) from None
    return head.requires_grad_(False), about


# ---- panoptic: true masks, named by their mean feature -------------------------------------------

def pool(features, segments, count):
    """Mean feature of each of `count` segments, each patch weighted by the pixels of the segment in
    it, and their areas: (h, w, D), (H, W) numbers (-1 for none) -> (count, D), (count,)."""
    (height, width), (rows, columns) = features.shape[:2], segments.shape
    patches = (torch.arange(rows) * height // rows)[:, None] * width
    patches = patches + torch.arange(columns) * width // columns  # of each pixel
    inside = segments >= 0
    pixels = torch.zeros(count * height * width)
    pixels.index_add_(0, segments[inside] * height * width + patches[inside],
                      torch.ones(int(inside.sum())))
    pixels = pixels.view(count, -1).to(features.device)
    areas = pixels.sum(1)
    return pixels @ features.flatten(0, 1).float() / areas[:, None], areas.cpu()


def segments_of(features, indices):
    """Mean features (S, D), classes (S,) and areas (S,) of the true segments of each picture."""
    for index, each in features.stream(indices):
        labels = read_mask(features.dataset, index)
        segments, classes = true_segments(features.dataset, index, labels)
        yield *pool(each, segments, len(classes)), classes
