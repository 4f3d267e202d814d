"""Windows and stitching against a window-by-window loop in float64."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from common import (Stitcher, cut_windows, encode_windows, stitched_features,
                    window_starts)
from conftest import stitch_by_definition
from evaluate_ovs import PixelStitcher


def random_maps(size, window, stride, patch, channels=5):
    shape = [min(side, length) // patch for side, length in zip(window, size)]
    count = math.prod(len(window_starts(length, side, stride))
                      for length, side in zip(size, window))
    return torch.randn(count, *shape, channels, dtype=torch.float64)


# square, wide, tall, one side or both under the window
@pytest.mark.parametrize("size", [(128, 128), (208, 304), (336, 144), (96, 240), (64, 80)])
@pytest.mark.parametrize("stride", [8, 16, 17, 20, 24, 64, 128])
@pytest.mark.parametrize("window", [(128, 128), (128, 192)])
def test_features_equal_the_loop(size, stride, window):
    maps = random_maps(size, window, stride, 16)
    expected = stitch_by_definition(maps, size, window, stride, math.gcd(stride, 16),
                    [side // 16 for side in size])
    for together in (1, 3, 99):  # windows of a row in one product, as on a GPU
        stitcher = Stitcher.of_features(size, window, stride, 16)
        stitcher.together = together
        for part in maps.float().split(7):  # batches that end in the middle of a row of windows
            stitcher.add(part)
        assert stitcher.result().shape == expected.shape
        assert (stitcher.result() - expected).abs().max() < 1e-5


def in_strips(strip, height, ends):
    """Join (N, rows, W) of several strips that end at these rows: (height, W, N)."""
    ends = [0, *sorted(ends), height]
    parts = [strip(first, last) for first, last in zip(ends, ends[1:])]
    assert [part.shape[1] for part in parts] == [b - a for a, b in zip(ends, ends[1:])]
    return torch.cat(parts, 1).permute(1, 2, 0)


# patch and window; stride; sides in patches, of which one or both may be under the window's, and
# pixels of the output, None for as many as the input's
PIXELS = [*itertools.product(
    [(16, (128, 128)), (16, (64, 96)), (14, (140, 140))],
    [8, 12, 17, 20, 24, 56, 128],
    [((13, 19), (None, None)), ((13, 19), (150, 333)), ((6, 15), (100, None)),
     ((4, 5), (None, None))])]
PUBLISHED = [
    ((16, (512, 512)), 24, ((34, 37), (408, 445))), ((16, (224, 224)), 112, ((21, 25), (252, 301))),
    ((16, (512, 512)), 112, ((20, 38), (240, 457))), ((16, (512, 512)), 24, ((10, 13), (120, 157)))]


@pytest.mark.parametrize("sizes, stride, image", PIXELS + PUBLISHED)
def test_similarities_at_pixel_resolution_equal_the_loop(sizes, stride, image):
    (patch, window), (grid, outputs) = sizes, image
    stride = min(stride, *window)
    size = tuple(patch * cells for cells in grid)
    outputs = tuple(given or own for given, own in zip(outputs, size))
    maps = random_maps(size, window, stride, patch, 3)
    stitcher = PixelStitcher(size, window, stride, patch)
    for part in maps.float().split(7):
        stitcher.add(part)
    strip = stitcher.strips(outputs)
    whole = strip(0, outputs[0]).permute(1, 2, 0)
    assert whole.shape == (*outputs, maps.shape[-1])
    assert (whole - stitch_by_definition(maps, size, window, stride, 1, outputs)).abs().max() < 1e-5
    anywhere = torch.randperm(outputs[0] - 1)[:5] + 1
    for ends in ([1, outputs[0] - 1], anywhere.tolist(), range(1, outputs[0])):
        assert (in_strips(strip, outputs[0], ends) - whole).abs().max() < 2e-6


def test_windows_cover_every_pixel_and_end_at_the_border():
    for length in range(64, 200, 16):
        for stride in (1, 7, 24, 64):
            starts = window_starts(length, 64, stride)
            covered = torch.zeros(length)
            for start in starts:
                covered[start:start + 64] += 1
            assert covered.min() >= 1 and starts[0] == 0 and starts[-1] == length - 64
            assert starts == sorted(set(starts))
    assert window_starts(48, 64, 24) == [0]


@torch.no_grad()
def test_one_window_equals_a_plain_forward_pass(backbone):
    image = torch.randn(3, 64, 64)
    plain = backbone.encode_dense(image[None])[0]
    for stride in (64, 0):  # 0 is the single pass
        assert torch.equal(stitched_features(backbone, image, (64, 64), stride), plain)


@torch.no_grad()
def test_one_window_at_stride_24_is_a_known_filter(backbone):
    """Up by two and down by two again is [1/8, 3/4, 1/8] along each axis, with the border
    repeated."""
    image = torch.randn(3, 64, 64)
    plain = backbone.encode_dense(image[None])[0].permute(2, 0, 1)[None]  # (1, D, 4, 4)
    taps = torch.tensor([1 / 8, 3 / 4, 1 / 8])
    kernel = (taps[:, None] * taps).expand(plain.shape[1], 1, 3, 3)
    expected = F.conv2d(F.pad(plain, (1, 1, 1, 1), mode="replicate"), kernel,
                        groups=plain.shape[1])[0].permute(1, 2, 0)
    assert torch.allclose(stitched_features(backbone, image, (64, 64), 24), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 128), (64, 64), (48, 160)])
def test_batches_change_nothing(backbone, size):
    image = torch.randn(3, *size)
    windows = cut_windows(image, (64, 64), 24)
    single = torch.stack([backbone.encode_dense(view[None])[0] for view in windows])
    expected = stitch_by_definition(single.double(), size, (64, 64), 24, 8, backbone.grid(image))
    for most in (1, 5, 60):
        batches = list(encode_windows(backbone, image, (64, 64), 24, batch_size=most))
        assert (torch.cat(batches) - single).abs().max() < 1e-5
        assert max(map(len, batches)) <= most and len(batches) == math.ceil(len(windows) / most)
        features = stitched_features(backbone, image, (64, 64), 24, batch_size=most)
        assert (features - expected).abs().max() < 1e-5
