"""The mathematics of evaluate_probes.py (paper, supplement 10): nearest patches, true masks as
their mean feature, and the scores of all probes. The linear head has a file of its own.

Feature maps are (h, w, D), label maps (H, W) int64; `features` is a Features.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import IGNORE, bilinear_strips
from data.files import RunError
from data.benchmarks import nearest_labels, read_mask, true_segments
from evaluate_ovs import label_map, scores


@dataclass(frozen=True)
class Settings:
    """What the probes depend on: flags of evaluate_probes.py, and constants of benchmark-vfm-ss."""
    k: int = 30
    temperature: float = 0.02
    bank_size: int | None = None
    train_share: float = 1.0
    ignored: str = "left-out"
    steps: int = 50
    lr: float = 3e-2
    crop: int | None = None
    classifier: str = "text"
    seeds: tuple = (0,)
    weight_decay: float = 0.05
    images_per_step: int = 16

    def useful_seeds(self, probe):
        """Return the seeds that make a difference to a probe."""
        probe = self.classifier if probe == "panoptic" else probe
        draws = self.train_share < 1 or self.bank_size
        return self.seeds if probe == "linear" or probe == "knn" and draws else self.seeds[:1]


# ---- kNN: in-context segmentation, as in open-hummingbird-eval 2.0 without its defects -----------

def draw_images(indices, share, seed):
    """Draw a random share of the training images."""
    count = max(1, round(share * len(indices)))
    kept = np.random.default_rng(seed).permutation(len(indices))[:count]
    return [indices[k] for k in sorted(kept)]


def patch_shares(labels, grid, patch, count, ignored="left-out"):
    """Return the share of each patch's pixels that each class has: (H, W) -> (h * w, count)."""
    (height, width), labels = grid, nearest_labels(labels, [side * patch for side in grid])
    if ignored == "class0":
        labels = labels.where(labels != IGNORE, 0)
    cells = labels.view(height, patch, width, patch).transpose(1, 2).reshape(height * width, -1)
    cells = cells.where(cells != IGNORE, count)  # an additional class, which is cut off below
    shares = torch.zeros(len(cells), count + 1)
    return shares.scatter_add_(1, cells, torch.ones(cells.shape))[:, :count] / patch ** 2


def rare_patches(shares, most, generator):
    """Choose at most `most` patches of an image, rare classes first: those with the smallest sum,
    over the patch's classes, of how many patches hold the class, times a random number."""
    present = (shares > 0).float()
    score = (present @ present.sum(0)) * torch.rand(len(shares), generator=generator)
    return score.topk(min(most, len(score)), largest=False).indices.sort().values


def bank(features, indices, settings, seed, rows=2 ** 16):
    """Yield the labelled patches of training images in chunks of about `rows`: unit vectors (R, D)
    float32 and their shares of classes (R, K) float16."""
    count, chunk, held = len(features.dataset.classes), [], 0
    for index, image_features in features.stream(indices):
        labels = read_mask(features.dataset, index)
        grid = image_features.shape[:2]
        shares = patch_shares(labels, grid, features.patch, count, settings.ignored)
        kept = shares.any(1).nonzero()[:, 0]
        if settings.bank_size:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            most = max(1, settings.bank_size // len(indices))
            kept = kept[rare_patches(shares[kept], most, generator)]
        vectors = image_features.flatten(0, 1)[kept.to(image_features.device)]
        chunk.append((F.normalize(vectors.float(), dim=-1), shares[kept].half()))
        held += len(kept)
        if held >= rows:
            yield tuple(map(torch.cat, zip(*chunk)))
            chunk, held = [], 0
    if held:
        yield tuple(map(torch.cat, zip(*chunk)))


def nearest(queries, chunks, k, block=1024):
    """Find the k nearest rows to unit vectors (Q, D) in a bank of (unit vectors (R, D), shares of
    classes (R, K)): cosines (Q, k) float32, row numbers (Q, k) and all shares, on the CPU.

    The search is exact: the best of each chunk are merged with the best of those before it. A bank
    with fewer than k rows leaves -inf and 0.
    """
    best = torch.full((len(queries), k), -torch.inf, device=queries.device)
    rows = torch.zeros(best.shape, dtype=torch.int64, device=queries.device)
    shares, before = [], 0
    for vectors, chunk_shares in chunks:
        for first in range(0, len(queries), block):
            part = slice(first, first + block)
            cosines = queries[part].float() @ vectors.T  # (q, R)
            cosines, found = cosines.topk(min(k, len(vectors)))
            best[part], order = torch.cat([best[part], cosines], 1).topk(k)
            rows[part] = torch.cat([rows[part], before + found], 1).gather(1, order)
        shares.append(chunk_shares)
        before += len(vectors)
    if not before:
        raise RunError("there is nothing to learn from: no pixel of the training masks counts")
    if before < k:
        tqdm.write(f"there are only {before} neighbours, fewer than --k {k}; all of them vote")
    return best, rows.cpu(), torch.cat(shares)


def vote(cosines, shares, temperature):
    """Mix the labels of neighbours: cosines (Q, k), shares (Q, k, K) -> (Q, K) float32."""
    weights = (cosines / temperature).softmax(-1)
    return (weights[:, None] @ shares.to(weights.device).float())[:, 0]


# ---- panoptic: true masks, named by their mean feature -------------------------------------------

def pool(features, segments, count):
    """Return the mean feature of each of `count` segments, with patches weighted by how many pixels
    of the segment they hold, and the areas: (h, w, D), (H, W) numbers (-1 for none) -> (count, D),
    (count,)."""
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


def pooled_segments(features, indices):
    """Yield mean features (S, D), areas (S,) and classes (S,) of each image's true segments."""
    for index, image_features in features.stream(indices):
        labels = read_mask(features.dataset, index)
        segments, classes = true_segments(features.dataset, index, labels)
        yield *pool(image_features, segments, len(classes)), classes


def segment_bank(features, indices):
    """Yield each image's true segments as a bank: unit vectors (S, D), one-hot classes (S, K)."""
    count = len(features.dataset.classes)
    for vectors, _, classes in pooled_segments(features, indices):
        yield F.normalize(vectors, dim=-1), F.one_hot(classes, count).half()


def match_segments(true, predicted, areas, classes, stuff=()):
    """Count what the true masks of an image, each with a predicted class, add to panoptic quality:
    true positives, false positives, false negatives and the sum of IoU of each class, (4, classes).

    true, predicted, areas: (S,). stuff: classes of which an image has at most one segment, so that
    masks that were predicted as the same one are merged first.
    """
    merged = torch.isin(predicted, torch.tensor(sorted(stuff), dtype=torch.int64))
    group = torch.where(merged, -1 - predicted, torch.arange(len(true)))
    groups, group = group.unique(return_inverse=True)
    sizes = torch.zeros(len(groups), dtype=torch.float64).index_add_(0, group, areas.double())
    iou = torch.where(true == predicted, areas / sizes[group], 0)
    hit = iou > 0.5  # at most one mask of a group
    group_class = torch.zeros_like(groups).scatter_(0, group, predicted)
    unmatched = group_class[~torch.isin(torch.arange(len(groups)), group[hit])]
    counts = torch.zeros(4, classes, dtype=torch.float64)
    for row, found in enumerate((true[hit], unmatched, true[~hit])):
        counts[row] += torch.bincount(found, minlength=classes)
    counts[3].index_add_(0, true[hit], iou[hit])
    return counts


def panoptic_scores(counts):
    """Return PQ of each class (nan for one without segments) and the means of PQ, SQ and RQ, in
    percent (Kirillov et al., 2019). SQ of a class without a true positive is 0."""
    hits, extra, missed, overlap = counts
    size = torch.where(hits + extra + missed > 0, hits + (extra + missed) / 2, math.nan)
    sq = torch.where(size.isnan(), math.nan, overlap / hits.clamp(min=1))
    pq = 100 * overlap / size
    return pq, *(value.nanmean().item() for value in (pq, 100 * sq, 100 * hits / size))


# ---- scores --------------------------------------------------------------------------------------

TITLES = {"miou": "mIoU", "pq": "PQ", "sq": "SQ", "rq": "RQ", "pq_merged": "PQ, stuff merged"}


def label_pixels(logits, size):
    """Return the largest of logits (h, w, K), enlarged bilinearly: (*size) int64."""
    classes = torch.arange(logits.shape[-1])
    return label_map(bilinear_strips(logits, size), size, classes).cpu()


def score_draw(probe, counts):
    """Return the scores of one draw in percent: {key: a number, or one for each class}."""
    if probe != "panoptic":
        iou, miou, accuracy = scores(counts)
        return {"miou": miou, "pixel_accuracy": accuracy, "per_class_iou": iou}
    table = {}
    for kind, kind_counts in zip(("", "_merged"), counts):
        per_class, pq, sq, rq = panoptic_scores(kind_counts)
        table |= {f"pq{kind}": pq, f"sq{kind}": sq, f"rq{kind}": rq,
                  f"per_class_pq{kind}": per_class}
    return table


def probe_result(probe, method, dataset, draws):
    """Return an entry of --json's results: the means over draws of (counts, images)."""
    if not draws[0][0].any():
        raise RunError(f"{dataset.name}: no pixel of its masks counts; there is nothing to score")
    result = {"method": method, "probe": probe, "dataset": dataset.name, "images": draws[0][1],
              "draws": len(draws)}
    tables = [score_draw(probe, counts) for counts, _ in draws]
    for key in tables[0]:
        values = [table[key] for table in tables]
        if key.startswith("per_class"):
            means = torch.stack(values).nanmean(0).tolist()
            result[key] = {title: None if math.isnan(mean) else mean
                           for title, mean in zip(dataset.classes.titles, means)}
        else:
            result[key] = float(np.mean(values))
        if key in ("miou", "pq", "pq_merged"):
            result["deviation_merged" if "_" in key else "deviation"] = float(np.std(values))
    return result


def print_results(results):
    """Print a line for each result."""
    print(f"\n{'probe':<10}{'method':<20}images  percent")
    for result in results:
        cells = [f"{title} {result[key]:.1f}" for key, title in TITLES.items() if key in result]
        if result["draws"] > 1:
            cells[0] += f" ± {result['deviation']:.1f}"
        print(f"{result['probe']:<10}{result['method']:<20}{result['images']:>6}  "
              + ", ".join(cells))
