"""AnyUp (Wimmer et al., 2025): its published network on class similarities, in tiles."""
import open_clip
import torch
import torch.nn.functional as F

from common import bilinear_strips, hub_clone, weights_hash
from data.files import RunError, first_line


class AnyUp(torch.nn.Module):
    """Guided upsampling of similarities by the published code and weights. Its attention masks a
    matrix of pixels x patches (17 GB at 1024 x 2048); here each tile of pixels meets only the
    patches that its mask lets through."""
    MODEL = "anyup_multi_backbone"  # the published weights that were trained on several backbones

    def __init__(self, hub_dir=None, random_init=False, device="cpu"):
        super().__init__()
        clone, checkpoint = hub_clone("anyup", hub_dir), f"{self.MODEL}.pth"
        local = None if random_init or clone is None else clone / checkpoint
        if local and not local.is_file():
            raise RunError(f"{local} does not exist; fetch it from the releases of "
                           "https://github.com/wimmerth/anyup")
        try:
            self.model = torch.hub.load(
                str(clone or "wimmerth/anyup"), self.MODEL, verbose=False, trust_repo=True,
                source="local" if clone else "github", pretrained=not (random_init or local),
                device=device)
            if local:
                state = torch.load(local, map_location=device, weights_only=True)
                self.model.load_state_dict(state)
        except Exception as error:  # torch.hub and the code it loads raise many types
            raise RunError(f"AnyUp cannot be loaded: {first_line(error)}. Without network, clone "
                           f"https://github.com/wimmerth/anyup elsewhere, put {checkpoint} of "
                           "its releases into the clone and give --hub-dir CLONE") from error
        self.digest = weights_hash(self.model)
        self.block, self.model.cross_decode = self.model.cross_decode, ReturnInputs()
        self.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def strips(self, image, similarities, size):
        """Enlarge (h, w, N) to `size` as bilinear_strips does, by an image (3, H, W) uint8."""
        if min(similarities.shape[:2]) < 2:
            return bilinear_strips(similarities, size)  # it needs two patches along each side
        constants = open_clip.constants
        mean, std = (torch.tensor(values, device=similarities.device).view(3, 1, 1)
                     for values in (constants.IMAGENET_MEAN, constants.IMAGENET_STD))
        guide = (image.to(similarities.device).float() / 255 - mean) / std
        low = similarities.permute(2, 0, 1)[None]  # (1, N, h, w)
        return TiledAttention(self.block, *self.model(guide[None], low, tuple(size))).strip


class TiledAttention:
    """AnyUp's cross-attention of pixels (1, C, H, W) to patches (1, C or N, h, w), in tiles."""

    def __init__(self, block, queries, keys, values, side=32):
        self.block, self.queries, self.side = block, queries, side
        self.attention, self.inner = block.cross_attn, block.cross_attn.attention
        (self.query_weight, weight, _), (self.query_bias, bias, _) = (
            joined.chunk(3) for joined in (self.inner.in_proj_weight, self.inner.in_proj_bias))
        keys = F.linear(self.attention.norm_k(keys[0].permute(1, 2, 0)), weight, bias)
        self.keys = keys.unflatten(-1, (self.inner.num_heads, -1))  # (h, w, heads, C')
        self.values = values[0].permute(1, 2, 0)  # (h, w, N)
        self.rows, self.columns = (
            self.attended_span(inputs, outputs)
            for inputs, outputs in zip(keys.shape[:2], queries.shape[-2:]))

    def attended_span(self, inputs, outputs):
        """Return the first and past-the-last patch of each pixel of an axis: (outputs, 2)."""
        centres = (torch.arange(outputs, dtype=torch.float32) + 0.5) / outputs  # as published
        low = (centres - self.block.window_ratio).clamp(0, 1)
        high = (centres + self.block.window_ratio).clamp(0, 1)
        return torch.stack([(low * inputs).floor().long(), (high * inputs).ceil().long()], 1)

    def tile(self, queries, top, left):
        """Return a tile's similarities: queries (rows, columns, C) -> (rows, columns, N)."""
        spans, allowed = [], []
        for near in (self.rows[top:top + queries.shape[0]],
                     self.columns[left:left + queries.shape[1]]):
            span = slice(int(near[:, 0].min()), int(near[:, 1].max()))
            patches = torch.arange(span.start, span.stop)
            spans.append(span)
            allowed.append((patches >= near[:, :1]) & (patches < near[:, 1:]))
        mask = allowed[0][:, None, :, None] & allowed[1][None, :, None, :]
        mask = mask.flatten(0, 1).flatten(1).to(queries.device)  # (pixels, patches)
        heads = self.inner.num_heads
        pixels = queries.flatten(0, 1).unflatten(-1, (heads, -1))  # (pixels, heads, C')
        keys, values = (of[spans[0], spans[1]].flatten(0, 1) for of in (self.keys, self.values))
        scores = torch.einsum("qhc,khc->hqk", pixels, keys) * pixels.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).mean(0)
        return (weights @ values).unflatten(0, queries.shape[:2])

    def strip(self, first, last):
        """Return rows first to last - 1: (N, rows, W)."""
        strips = []
        for top in range(first, last, self.side):
            bottom, above = min(top + self.side, last), max(top - 1, 0)  # one row of halo
            smooth = self.block.conv2d(self.queries[:, :, above:bottom + 1])[0]
            smooth = smooth[:, top - above:bottom - above].permute(1, 2, 0)
            queries = F.linear(self.attention.norm_q(smooth), self.query_weight, self.query_bias)
            tiles = [self.tile(queries[:, left:left + self.side], top, left)
                     for left in range(0, queries.shape[1], self.side)]
            strips.append(torch.cat(tiles, 1))
        return torch.cat(strips).permute(2, 0, 1)


class ReturnInputs(torch.nn.Module):
    """Stands in for AnyUp's attention and returns its inputs."""

    def forward(self, queries, keys, values, **_):
        return queries, keys, values
