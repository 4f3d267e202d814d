"""What evaluate_probes.py computes (paper, supplement 10). Feature maps are (h, w, D), label maps
(H, W) int64; `features` is a Features."""
import json
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torchvision.transforms.v2 import functional as colour
from tqdm import tqdm

from common import IGNORE, bilinear_strips, prefetch, prepare
from data.files import (RunError, free_bytes, nearest_multiple, read_image, reading,
                        resize_image, save_array, save_torch)
from data.benchmarks import nearest_labels, read_mask, true_segments
from data.journal import files_state, text_hash
from evaluate_ovs import label_map, scores
from extras.drawing import save_maps

SPARE = 10 ** 9  # bytes of a disk that kept feature maps leave free


@dataclass(frozen=True)
class Settings:
    """What the probes depend on: flags of evaluate_probes.py, and constants of benchmark-vfm-ss."""
    k: int = 30
    temperature: float = 0.02
    bank_size: int | None = None
    train_share: float = 1.0
    steps: int = 50
    lr: float = 3e-2
    crop: int | None = None
    seeds: tuple = (0,)
    weight_decay: float = 0.05
    images_per_step: int = 16

    def useful_seeds(self, probe):
        """Return the seeds that make a difference to a probe."""
        draws = self.train_share < 1 or self.bank_size
        return self.seeds if probe == "linear" or probe == "knn" and draws else self.seeds[:1]


# ---- feature maps --------------------------------------------------------------------------------

class Features:
    """The feature maps (h, w, D) float16 that a method makes of a data set, kept in a folder as far
    as the disk has room. An image that cannot be read has a map without patches."""

    def __init__(self, method, dataset, runtime, workers, keep_in):
        self.method, self.dataset = method, dataset
        self.runtime, self.workers = runtime, workers
        self.patch, self.dim = method.backbone.patch, method.backbone.dim
        depends = [method.backbone.digest, method.stride, method.window, runtime.precision,
                   files_state(dataset)]
        self.keeps = str(keep_in) != "off"
        self.folder = keep_in / text_hash(depends)[:12]
        self.folder_name = method.name.replace("/", "-")

    def path(self, index, flip):
        return self.folder / f"{index}{'-flip' * flip}.npy"

    def read(self, index, flip=False):
        """Read an image: (3, H, W) uint8, or None if it cannot be read."""
        try:
            image = read_image(self.dataset.root / self.dataset.images[index])
        except RunError as error:
            tqdm.write(f"left out: {error}")
            return None
        return image.flip(-1) if flip else image

    def load(self, index, flip=False):
        """Load the kept feature map, or else the image."""
        path = self.path(index, flip)
        if not path.is_file():
            return self.read(index, flip)
        with reading(path, "delete it, and it is computed again"):
            return torch.from_numpy(np.load(path))

    def encode(self, loaded):
        """Return the feature map of what was loaded, on the device."""
        if loaded is None:
            loaded = torch.zeros(0, 0, self.dim, dtype=torch.float16)
        if loaded.dtype == torch.uint8:
            prepared = prepare(self.method.backbone, loaded)
            loaded = self.method.features(prepared).half()
        return loaded.to(self.runtime.device)

    def stream(self, indices):
        """Yield (index, feature map) of the readable images, in order."""
        loaded_maps = prefetch(self.load, indices, self.workers)
        for index, loaded in zip(self.progress(indices), loaded_maps):
            features = self.encode(loaded)
            if features.numel():
                yield index, features

    def keep(self, indices, flips=(False,)):
        """Compute and keep this process's share of the maps, as long as the disk has room."""
        jobs = [(index, flip) for index in indices for flip in flips]
        # shared out by position, so that what other processes write meanwhile changes no share
        mine = [job for job in self.share(jobs) if self.keeps and not self.path(*job).is_file()]
        images = prefetch(lambda job: self.read(*job), mine, self.workers)
        for job, image in zip(self.progress(mine), images):
            if free_bytes(self.folder) < SPARE:
                tqdm.write(f"the disk of {self.folder} is full; not all feature maps are kept")
                break
            save_array(self.path(*job), self.encode(image).cpu().numpy())
        self.runtime.barrier()

    def draw(self, folder, index, labels):
        """Write the label map, the overlay and the PCA of an image."""
        name, classes = self.dataset.images[index], self.dataset.classes
        features = self.encode(self.load(index)).float()
        save_maps(folder, name, read_image(self.dataset.root / name), labels, features, classes)

    def share(self, items):
        return items[self.runtime.rank::self.runtime.world]

    def progress(self, items):
        return tqdm(items, f"{self.dataset.name}, {self.method.name}", unit="map", leave=False,
                    disable=self.runtime.rank > 0 or not items)


# ---- kNN: in-context segmentation, as in open-hummingbird-eval 2.0 without its defects -----------

def patch_shares(labels, grid, patch, count):
    """Return the share of each patch's pixels that each class has: (H, W) -> (h * w, count)."""
    (height, width), labels = grid, nearest_labels(labels, [side * patch for side in grid])
    cells = labels.view(height, patch, width, patch).transpose(1, 2).reshape(height * width, -1)
    cells = cells.where(cells != IGNORE, count)  # an additional class, which is cut off below
    shares = torch.zeros(len(cells), count + 1)
    return shares.scatter_add_(1, cells, torch.ones(cells.shape))[:, :count] / patch ** 2


def rare_patches(shares, most, generator):
    """Choose at most `most` patches of an image at random, rare classes first."""
    present = (shares > 0).float()
    score = (present @ present.sum(0)) * torch.rand(len(shares), generator=generator)
    return score.topk(min(most, len(score)), largest=False).indices.sort().values


def bank(features, indices, settings, seed, rows=2 ** 16):
    """Yield labelled patches: unit vectors (R, D) float32, shares of classes (R, K) float16."""
    count, chunk, held = len(features.dataset.classes), [], 0
    for index, image_features in features.stream(indices):
        labels = read_mask(features.dataset, index)
        grid = image_features.shape[:2]
        shares = patch_shares(labels, grid, features.patch, count)
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
    """Find the k nearest rows of a bank to unit vectors (Q, D), exactly: cosines (Q, k) float32,
    row numbers (Q, k) and all shares, on the CPU. A bank of fewer rows leaves -inf and 0."""
    best = torch.full((len(queries), k), -torch.inf, device=queries.device)
    rows = torch.zeros(best.shape, dtype=torch.int64, device=queries.device)
    shares, before = [], 0
    for vectors, chunk_shares in chunks:
        # queries are float16 already, so TF32 changes little: 0.004 mIoU on the demo
        torch.backends.cuda.matmul.allow_tf32 = True
        for first in range(0, len(queries), block):
            part = slice(first, first + block)
            cosines = queries[part].float() @ vectors.T  # (q, R)
            cosines, found = cosines.topk(min(k, len(vectors)))
            best[part], order = torch.cat([best[part], cosines], 1).topk(k)
            rows[part] = torch.cat([rows[part], before + found], 1).gather(1, order)
        torch.backends.cuda.matmul.allow_tf32 = False  # for features, which the bank computes
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


# ---- linear: one map D -> K for every patch, as in benchmark-vfm-ss ------------------------------

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
    """Load a feature map, or pixels (None if they cannot be read), and their labels (H, W)."""
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
    """Return a linear head, trained by AdamW, also from the state of an interrupted training."""
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
        optimizer.param_groups[0]["lr"] = settings.lr * (1 - step / settings.steps) ** 0.9
        optimizer.step()
        if runtime.rank == 0 and time.monotonic() - saved > 30:
            save_torch(state, {"head": head.state_dict(), "optimizer": optimizer.state_dict(),
                               "step": step + 1})
            saved = time.monotonic()
    return head.requires_grad_(False)


def describe_head(features, crop):
    """Return the metadata of a linear head's file."""
    method = features.method
    return {"method": method.name, "backbone": method.origin, "crop": crop,
            "weights": method.backbone.digest, "stride": method.stride,
            "window": list(method.window) if method.stride else None,
            "classes": features.dataset.classes.names,
            "background": features.dataset.classes.background}


def read_head(path, device):
    """Return the linear head in a file, and what the file says of it. Raise RunError."""
    with reading(path, "--probe linear writes one where there is none"):
        with safe_open(path, "pt", str(device)) as file:
            about = json.loads((file.metadata() or {})["probe"])
            tensors = {key: file.get_tensor(key) for key in ("weight", "bias")}
        head = torch.nn.Linear(*tensors["weight"].shape[::-1], device=device)
        head.load_state_dict(tensors)
        for key in ("method", "backbone", "weights", "stride", "window", "crop", "classes"):
            if key not in about:
                raise ValueError(f"it does not say its {key}")
        if len(about["classes"]) != head.out_features:
            raise ValueError("it does not have one output per class")
        if not all(value.isfinite().all() for value in tensors.values()):
            raise ValueError("it holds numbers that are not finite")
    return head.requires_grad_(False), about


def random_crop(image, labels, side, rng):
    """Jitter colours, scale to 0.5 to 2 times what fits the crop, and crop, as the reference does:
    (3, H, W) uint8, (H, W) -> (side, side), 0 and IGNORE outside."""
    contrast = [(colour.adjust_contrast, rng.uniform(0.5, 1.5))]
    tone = [(colour.adjust_saturation, rng.uniform(0.5, 1.5)),
            (colour.adjust_hue, rng.uniform(-0.05, 0.05))]
    tones = contrast + tone if rng.random() < 0.5 else tone + contrast
    for adjust, factor in [(colour.adjust_brightness, rng.uniform(223 / 255, 287 / 255)), *tones]:
        if rng.random() < 0.5:
            image = adjust(image, factor)
    scale = rng.uniform(0.5, 2) * min(side / length for length in labels.shape)
    size = [max(1, int(length * scale)) for length in labels.shape]
    image, labels = resize_image(image, size, antialias=True), nearest_labels(labels, size)
    outside = (0, max(0, side - size[1]), 0, max(0, side - size[0]))
    image, labels = F.pad(image, outside), F.pad(labels, outside, value=IGNORE)
    top, left = (int(rng.integers(0, length - side + 1)) for length in labels.shape)
    return image[:, top:top + side, left:left + side], labels[top:top + side, left:left + side]


def crop_logits(head, encode, image, side):
    """Scale an image's short side to `side` and average the logits of windows: (H', W', K)."""
    scale = max(side / length for length in image.shape[-2:])
    size = [round(length * scale) for length in image.shape[-2:]]
    image = resize_image(image, size, antialias=True)
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
    """Yield (index, logits (h, w, K)) of whole images, or of windows of `crop` pixels."""
    if not crop:
        for index, image_features in features.stream(indices):
            yield index, head(image_features.float())
        return
    for index, image in zip(indices, prefetch(features.read, indices, features.workers)):
        if image is not None:
            yield index, crop_logits(head, features.encode, image, crop)


# ---- panoptic: true masks, named by their mean feature -------------------------------------------

def pool(features, segments, count):
    """Return the mean feature of each segment's pixels, and the areas: (h, w, D), (H, W) numbers
    below count (-1 for none) -> (count, D), (count,)."""
    (height, width), (rows, columns) = features.shape[:2], segments.shape
    patches = (torch.arange(rows) * height // rows)[:, None] * width
    patches = patches + torch.arange(columns) * width // columns  # of each pixel
    inside = segments >= 0
    pixels = torch.zeros(count * height * width)
    pixels.index_add_(0, segments[inside] * height * width + patches[inside],
                      torch.ones(int(inside.sum())))
    pixels = pixels.view(count, height * width).to(features.device)
    areas = pixels.sum(1)
    return pixels @ features.flatten(0, 1).float() / areas[:, None], areas.cpu()


def pooled_segments(features, indices):
    """Yield mean features (S, D), areas (S,) and classes (S,) of each image's true segments."""
    for index, image_features in features.stream(indices):
        labels = read_mask(features.dataset, index)
        segments, classes = true_segments(features.dataset, index, labels)
        yield *pool(image_features, segments, len(classes)), classes


def match_segments(true, predicted, areas, classes, stuff=()):
    """Count true positives, false positives, false negatives and the sum of IoU of each class,
    (4, classes), from an image's true masks: true and predicted classes and areas, (S,). Those
    that were predicted as the same class of `stuff` are merged first."""
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

def label_pixels(logits, size):
    """Return the largest of logits (h, w, K), enlarged bilinearly: (*size) int64."""
    classes = torch.arange(logits.shape[-1], device=logits.device)
    return label_map(bilinear_strips(logits, size), size, classes)


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
    titles = {"miou": "mIoU", "pq": "PQ", "sq": "SQ", "rq": "RQ", "pq_merged": "PQ, stuff merged"}
    print(f"\n{'probe':<10}{'method':<20}images  percent")
    for result in results:
        cells = [f"{title} {result[key]:.1f}" for key, title in titles.items() if key in result]
        if result["draws"] > 1:
            cells[0] += f" ± {result['deviation']:.1f}"
        print(f"{result['probe']:<10}{result['method']:<20}{result['images']:>6}  "
              + ", ".join(cells))
