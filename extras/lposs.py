"""Label propagation: LPOSS (Stojnic et al., CVPR 2025) with one backbone (supplement 9)."""
import argparse
import warnings
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from common import bilinear_strips, window_starts
from data.files import UsageError, fit_to_patches
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
    tau: float = 0.01  # lposs+: scale of colour differences, Lab / (100, 128, 128)
    reach: int = 6  # lposs+: pixels to each side that a pixel is joined with


def read_settings(texts):
    """Return the Lposs of ["k=200", "sigma=0.02"]. Raise UsageError."""
    kinds, given = {field.name: field.type for field in fields(Lposs)}, {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in kinds:
            raise UsageError(f"--lposs {text}: give KEY=VALUE with a KEY of {', '.join(kinds)}")
        low = {"k": 1, "steps": 1, "reach": 1, "alpha": 0, "tau": 1e-12}.get(name, -10 ** 9)
        number = bounded(kinds[name], low, 0.999999 if name == "alpha" else 10 ** 9)
        try:
            given[name] = number(value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UsageError(f"--lposs {text}: {error}") from None
    return Lposs(**given)


def propagated(method, image, prepared, texts):
    """Return a Method's similarities to texts (N, D) for an image (3, H, W) uint8 after propagation
    over the patches of a single pass, (h, w, N), or of all windows in one graph, (H, W, N). LPOSS+
    continues over the pixels. prepared: the image for the backbone."""
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
    if method.stride:
        strips = method.stitch(prepared, [similarities]).strips(size)
        similarities = strips(0, size[0]).permute(1, 2, 0)
    else:
        similarities = similarities[0]
    if method.refine == "lposs":
        return similarities
    pixels = fit_to_patches(image, patch).to(prepared.device)
    return propagate_pixels(pixels, similarities, method.lposs)


def best_synonyms(similarities, class_of_name):
    """Return the largest similarity among each class's names: (h, w, N) -> (h, w, K)."""
    count = int(class_of_name[-1]) + 1
    best = similarities.new_full((*similarities.shape[:2], count), -torch.inf)
    class_of_name = class_of_name.to(similarities.device).expand(similarities.shape)
    return best.scatter_reduce(2, class_of_name, similarities, "amax")


def conjugate_gradients(apply, targets, steps, tolerance=1e-6):
    """Solve apply(X) = targets (Q, ...) from 0, each row with its own step sizes and end."""
    def dot(a, b):
        return (a * b).flatten(1).sum(1, dtype=torch.float64)

    def times(scales, rows):
        return scales.to(rows.dtype).view(-1, *[1] * (rows.ndim - 1)) * rows

    solution, residual, direction = torch.zeros_like(targets), targets.clone(), targets.clone()
    power = dot(residual, residual)
    limit = tolerance ** 2 * power
    for _ in range(steps):
        active = power > limit
        applied = apply(direction)
        step = torch.where(active, power / dot(direction, applied), 0)
        solution += times(step, direction)
        residual -= times(step, applied)
        before, power = power, dot(residual, residual)
        direction = residual + times(torch.where(active, power / before, 0), direction)
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


def rgb_to_lab(image):
    """Convert sRGB (3, H, W) uint8 to CIE L*a*b* for white D65, (3, H, W) float32."""
    rgb = image.float() / 255
    rgb = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = torch.tensor([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169],
                           [0.019334, 0.119193, 0.950227]], device=image.device)
    white = torch.tensor([0.95047, 1.0, 1.08883], device=image.device).view(3, 1, 1)
    xyz = (to_xyz @ rgb.flatten(1)).view_as(rgb) / white
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


class PixelGraph:
    """LPOSS+'s normalised adjacency of the pixels of an image (3, H, W) uint8: each is joined with
    the square around it by exp(-colour difference / tau). Instead of a matrix there are maps of
    weights, one for half of the offsets, and products of shifted maps."""

    def __init__(self, image, reach, tau):
        self.reach, self.size = reach, image.shape[-2:]
        (height, width), ranges = self.size, torch.tensor([100.0, 128.0, 128.0]).view(3, 1, 1)
        lab = rgb_to_lab(image) / ranges.to(image.device)
        self.offsets = [(dy, dx) for dy in range(reach + 1) for dx in range(-reach, reach + 1)
                        if (dy, dx) > (0, 0)]
        # weights[d, reach + y, reach + x] joins (y, x) with (y, x) + offset d; 0 if it is outside
        self.weights = lab.new_zeros(len(self.offsets), height + 2 * reach, width + 2 * reach)
        for weights, (dy, dx) in zip(self.weights, self.offsets):
            if dy < height and abs(dx) < width:
                left, right = max(0, -dx), width - max(0, dx)  # of the pixels that have a partner
                here = lab[:, :height - dy, left:right]
                there = lab[:, dy:, left + dx:right + dx]
                inside = weights[reach:reach + height - dy, reach + left:reach + right]
                inside.copy_(torch.exp(-(here - there).norm(dim=0) / tau))
        degrees = self.apply(torch.ones(1, height, width, device=image.device))[0]
        scale = F.pad(torch.where(degrees > 0, degrees, 1).rsqrt(), (reach,) * 4)
        for weights, (dy, dx) in zip(self.weights, self.offsets):
            weights *= scale * scale.roll((-dy, -dx), (0, 1))

    def apply(self, maps):
        """Return the product of (Q, H, W) with the adjacency, (Q, H, W)."""
        (height, width), reach = self.size, self.reach
        padded, products = F.pad(maps, (reach,) * 4), torch.zeros_like(maps)
        rows = 64 if maps.device.type == "cpu" else height  # strips that stay in a CPU's cache
        for first in range(0, height, rows):
            out = products[:, first:first + rows]

            def shifted(values, dy, dx):
                top, left = reach + first + dy, reach + dx
                return values[..., top:top + out.shape[1], left:left + width]

            for weights, (dy, dx) in zip(self.weights, self.offsets):
                out.addcmul_(shifted(weights, 0, 0), shifted(padded, dy, dx))
                out.addcmul_(shifted(weights, -dy, -dx), shifted(padded, -dy, -dx))
        return products


def propagate_pixels(image, similarities, lposs, values=2 ** 24):
    """Return the similarities (H, W, N) float32 that LPOSS+ propagates over an image (3, H, W)
    uint8, from (h, w, N). values: floats of one map held at a time."""
    height, width = image.shape[-2:]
    graph = PixelGraph(image, lposs.reach, lposs.tau)
    propagated = similarities.new_empty(similarities.shape[2], height, width)
    part = max(1, values // (height * width))
    for first in range(0, len(propagated), part):
        some = similarities[..., first:first + part]
        maps = bilinear_strips(some, (height, width))(0, height).contiguous()
        propagated[first:first + part] = conjugate_gradients(
            lambda rows: rows - lposs.alpha * graph.apply(rows), maps, lposs.steps)
    return (1 - lposs.alpha) * propagated.permute(1, 2, 0)
