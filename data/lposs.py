"""Label propagation: LPOSS (Stojnic et al., CVPR 2025), with the student in the places of its two
backbones (paper, supplement 9).

`lposs`, throughout, are settings as evaluate_ovs.py's Lposs has them.
"""
import warnings

import torch
import torch.nn.functional as F

from common import bilinear_strips


def conjugate_gradients(apply, targets, steps, tolerance=1e-6):
    """Solve apply(X) = targets from 0, one system a row, each with its own step sizes:
    targets (Q, ...) -> (Q, ...).

    A row that has come below tolerance times its target stays as it is; a row of zeros stays zero.
    """
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
    """LPOSS' normalised adjacency S = D^-1/2 (A + A^T) D^-1/2 of patches: (M, M) sparse float64,
    its entries computed in float32.

    features: (M, D), L2-normalised; centres: (M, 2) in pixels of the network's input. A joins each
    patch with its k nearest by features, weighted by cosine^gamma * exp(-sigma * distance^power);
    no patch with itself. values: floats held at a time.
    """
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
    """LPOSS: (M, D) L2-normalised features, (M, 2) centres, (M, N) cosine similarities ->
    propagated similarities (M, N) float32.

    (1 - alpha) (I - alpha S)^-1 applied to each name's column; the factor only keeps the range of a
    similarity.
    """
    graph = patch_graph(features, centres, lposs)
    solution = conjugate_gradients(lambda rows: rows - lposs.alpha * (graph @ rows.T).T,
                                   similarities.T.double(), lposs.steps)
    return (1 - lposs.alpha) * solution.T.float()


def rgb_to_lab(image):
    """sRGB (3, H, W) uint8 -> CIE L*a*b* for white D65, (3, H, W) float32."""
    rgb = image.float() / 255
    rgb = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = torch.tensor([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169],
                           [0.019334, 0.119193, 0.950227]], device=image.device)
    white = torch.tensor([0.95047, 1.0, 1.08883], device=image.device).view(3, 1, 1)
    xyz = (to_xyz @ rgb.flatten(1)).view_as(rgb) / white
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


class PixelGraph:
    """LPOSS+'s normalised adjacency of pixels: each joined with the square around it by
    exp(-colour difference / tau).

    image: (3, H, W) uint8. There is no matrix: one map of weights for each half of the offsets,
    (2 reach^2 + 2 reach) x H x W floats (84 for a reach of 6), and products of shifted maps.
    """

    def __init__(self, image, reach, tau):
        self.reach, self.size = reach, image.shape[-2:]
        (height, width), ranges = self.size, torch.tensor([100.0, 128.0, 128.0]).view(3, 1, 1)
        lab = rgb_to_lab(image) / ranges.to(image.device)
        self.offsets = [(dy, dx) for dy in range(reach + 1) for dx in range(-reach, reach + 1)
                        if (dy, dx) > (0, 0)]
        # weights[d, reach + y, reach + x] joins (y, x) with (y, x) + offset d; 0 where that lies
        # outside
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
        """(Q, H, W) -> the product with the adjacency, (Q, H, W)."""
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
    """LPOSS+: (3, H, W) uint8 and its similarities (h, w, N), stretched to (H, W) -> propagated
    similarities (H, W, N) float32.

    In float32: ten steps on so well conditioned a system lose no digit that a label depends on.
    values: floats of one map held at a time.
    """
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
