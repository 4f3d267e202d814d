"""Label propagation: LPOSS (Stojnic et al., CVPR 2025) with one backbone (supplement 9)."""
import argparse
import warnings
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from common import window_starts
from data.files import UsageError
from data.flags import bounded


@dataclass(frozen=True)
class Lposs:
    """Settings of label propagation, by default the published code's for patches of 16."""
    k: int = 400  # neighbours of a patch by its features, itself included
    gamma: float = 3.0  # power of a neighbour's cosine similarity
    sigma: float = 0.01  # decay per pixel of distance; a smaller one spreads labels further
    power: float = 1.0  # of the distance
    alpha: float = 0.95  # weight of the neighbours against the patch's own similarities, below 1
    steps: int = 10  # of conjugate gradients, which are not run to convergence


def read_settings(texts):
    """Return the Lposs of ["k=200", "sigma=0.02"]. Raise UsageError."""
    kinds, given = {field.name: field.type for field in fields(Lposs)}, {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in kinds:
            raise UsageError(f"--lposs {text}: give KEY=VALUE with a KEY of {', '.join(kinds)}")
        low = {"k": 1, "steps": 1, "alpha": 0}.get(name, -10 ** 9)
        number = bounded(kinds[name], low, 0.999999 if name == "alpha" else 10 ** 9)
        try:
            given[name] = number(value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UsageError(f"--lposs {text}: {error}") from None
    return Lposs(**given)


def propagated(method, prepared, texts):
    """Return a Method's similarities to texts (N, D) for a prepared image after propagation over
    the patches of a single pass, (h, w, N), or of all windows in one graph, (H, W, N)."""
    size, patch = prepared.shape[-2:], method.backbone.patch
    if method.stride:
        maps = torch.cat(list(method.window_maps(prepared)))  # (n, h, w, D)
    else:
        maps = method.features(prepared)[None]
    maps = F.normalize(maps, dim=-1)
    grid, stride = maps.shape[1:3], method.stride or max(size)
    starts = [window_starts(length, cells * patch, stride) for length, cells in zip(size, grid)]
    corners = torch.cartesian_prod(*map(torch.tensor, starts))  # (n, 2), (y, x) in pixels
    cells = torch.cartesian_prod(*map(torch.arange, grid))  # (h * w, 2)
    centres = (corners[:, None] + patch * cells + patch / 2).flatten(0, 1)  # (n * h * w, 2)
    flat = maps.flatten(0, 2)
    similarities = propagate_patches(flat, centres.to(flat), flat @ texts.T, method.lposs)
    similarities = similarities.unflatten(0, maps.shape[:3])  # (n, h, w, N)
    if not method.stride:
        return similarities[0]
    return method.stitch(prepared, [similarities]).strips(size)(0, size[0]).permute(1, 2, 0)


def best_synonyms(similarities, class_of_name):
    """Return the largest similarity among each class's names: (h, w, N) -> (h, w, K)."""
    count = int(class_of_name[-1]) + 1
    best = similarities.new_full((*similarities.shape[:2], count), -torch.inf)
    class_of_name = class_of_name.to(similarities.device).expand(similarities.shape)
    return best.scatter_reduce(2, class_of_name, similarities, "amax")


def conjugate_gradients(apply, targets, steps, tolerance=1e-6):
    """Solve apply(X) = targets (Q, M) from 0, each row with its own step sizes and end."""
    solution, residual, direction = torch.zeros_like(targets), targets.clone(), targets.clone()
    power = residual.square().sum(1, keepdim=True)  # (Q, 1)
    limit = tolerance ** 2 * power
    for _ in range(steps):
        active = power > limit
        applied = apply(direction)
        curvature = (direction * applied).sum(1, keepdim=True)
        step = torch.where(active, power / curvature, 0)
        solution += step * direction
        residual -= step * applied
        before, power = power, residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(active, power / before, 0) * direction
    return solution


def patch_graph(features, centres, lposs, values=2 ** 24):
    """Return LPOSS' normalised adjacency S = D^-1/2 (A + A^T) D^-1/2 of patches with features
    (M, D), L2-normalised, and centres (M, 2) in pixels: (M, M) sparse float64. A joins each patch
    with its k nearest by features, itself excluded, with a weight of cosine^gamma *
    exp(-sigma * distance^power). values: floats held at a time."""
    count, neighbours, weights = len(features), [], []
    k, part = min(lposs.k, count), max(1, values // count)
    for first in range(0, count, part):
        cosine, index = (features[first:first + part] @ features.T).topk(k)  # (part, k)
        distance = (centres[first:first + part, None] - centres[index]).norm(dim=-1)
        near = torch.exp(-lposs.sigma * distance ** lposs.power)
        neighbours.append(index)
        weights.append(cosine.clamp(min=0) ** lposs.gamma * near)
    neighbours, weights = torch.cat(neighbours).flatten(), torch.cat(weights).flatten()
    owners = torch.arange(count, device=features.device).repeat_interleave(k)
    weights[owners == neighbours] = 0
    edges = torch.stack([torch.cat([owners, neighbours]), torch.cat([neighbours, owners])])
    graph = torch.sparse_coo_tensor(edges, torch.cat([weights, weights]), (count, count),
                                    check_invariants=False)
    graph = graph.coalesce()  # mutual neighbours get the sum of both weights
    (rows, columns), weights = graph.indices(), graph.values()
    degrees = torch.zeros(count, device=features.device).index_add_(0, rows, weights)
    scale = torch.where(degrees > 0, degrees, 1).rsqrt()
    weights = (weights * scale[rows] * scale[columns]).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR tensors beta
        return torch.sparse_coo_tensor(graph.indices(), weights, (count, count),
                                       is_coalesced=True, check_invariants=False).to_sparse_csr()


def propagate_patches(features, centres, similarities, lposs):
    """Return (1 - alpha) (I - alpha S)^-1 similarities, (M, N) float32, for patches with features
    (M, D), L2-normalised, centres (M, 2) and cosine similarities (M, N)."""
    graph = patch_graph(features, centres, lposs)
    solution = conjugate_gradients(lambda rows: rows - lposs.alpha * (graph @ rows.T).T,
                                   similarities.T.double(), lposs.steps)
    return (1 - lposs.alpha) * solution.T.float()
