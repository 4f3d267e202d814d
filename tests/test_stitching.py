"""Windows and stitching against a window-by-window loop in float64 (method.md, "Teacher")."""
import math

import pytest
import torch
import torch.nn.functional as F

from common import Stitcher, WrongCall, check_window, cut_windows, stitched_features, window_starts


def loop(maps, size, window, stride, cell, outputs):
    """The definition: upsample each window's map, add it in place, divide by the counts, resize.
    maps: (n, i, j, C) float64."""
    window = [min(side, length) for side, length in zip(window, size)]
    total = torch.zeros(maps.shape[-1], size[0] // cell, size[1] // cell, dtype=torch.float64)
    counts = torch.zeros_like(total[0])
    starts = [(top, left) for top in window_starts(size[0], window[0], stride)
              for left in window_starts(size[1], window[1], stride)]
    for (top, left), features in zip(starts, maps, strict=True):
        up = F.interpolate(features.permute(2, 0, 1)[None], size=[side // cell for side in window],
                           mode="bilinear", align_corners=False)[0]
        place = (slice(top // cell, top // cell + up.shape[1]),
                 slice(left // cell, left // cell + up.shape[2]))
        total[:, *place] += up
        counts[place] += 1
    joined = (total / counts)[None]
    return F.interpolate(joined, size=outputs, mode="bilinear",
                         align_corners=False)[0].permute(1, 2, 0)


def random_maps(size, window, stride, patch, channels=5):
    shape = [min(side, length) // patch for side, length in zip(window, size)]
    count = math.prod(len(window_starts(length, side, stride))
                      for length, side in zip(size, window))
    return torch.randn(count, *shape, channels, dtype=torch.float64)


# square, wide, tall, one side or both under the window
SIZES = [(128, 128), (208, 304), (336, 144), (96, 240), (64, 80)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [8, 16, 17, 20, 24, 64, 128])
def test_features_equal_the_loop(size, stride):
    window, patch = (128, 128), 16
    cell = math.gcd(stride, patch)
    maps = random_maps(size, window, stride, patch)
    outputs = [side // patch for side in size]
    stitcher = Stitcher(size, window, stride, patch, cell, outputs)
    for part in maps.float().split(7):  # batches that end in the middle of a row of windows
        stitcher.add(part)
    expected = loop(maps, size, window, stride, cell, outputs)
    assert stitcher.result().shape == expected.shape
    assert (stitcher.result() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("size, outputs", [
    ((208, 304), (208, 304)),
    ((208, 304), (150, 333)),
    ((96, 240), (100, 251)),
    ((64, 80), (64, 80)),
])
@pytest.mark.parametrize("stride", [24, 56, 128])
def test_similarities_at_pixel_resolution_equal_the_loop(size, outputs, stride):
    maps = random_maps(size, (128, 128), stride, 16)
    stitcher = Stitcher(size, (128, 128), stride, 16, 1, outputs)
    stitcher.add(maps.float())
    assert (stitcher.result() - loop(maps, size, (128, 128), stride, 1, outputs)).abs().max() < 1e-5


@pytest.mark.parametrize("size, window, stride", [
    ((544, 592), 512, 24),
    ((560, 768), 512, 256),
    ((336, 400), 224, 112),
    ((336, 400), 224, 24),
    ((320, 608), 512, 256),
    ((320, 608), 512, 112),
    ((160, 208), 512, 24),
])
def test_similarities_of_the_published_windows_equal_the_loop(size, window, stride):
    maps, outputs = (random_maps(size, (window, window), stride, 16, 2),
                     (size[0] * 3 // 4, size[1] * 3 // 4 + 1))
    stitcher = Stitcher(size, (window, window), stride, 16, 1, outputs)
    stitcher.add(maps.float())
    assert (stitcher.result()
            - loop(maps, size, (window, window), stride, 1, outputs)).abs().max() < 1e-5


def test_rectangular_window():
    maps = random_maps((208, 304), (64, 96), 24, 16)
    stitcher = Stitcher((208, 304), (64, 96), 24, 16, 8, (13, 19))
    stitcher.add(maps.float())
    assert (stitcher.result()
            - loop(maps, (208, 304), (64, 96), 24, 8, (13, 19))).abs().max() < 1e-5


@pytest.mark.parametrize("stride", [8, 17, 24, 64])
@pytest.mark.parametrize("size", SIZES)
def test_a_constant_map_stays_constant(size, stride):
    maps = torch.ones_like(random_maps(size, (128, 128), stride, 16, 1))
    for cell, outputs in ((math.gcd(stride, 16), [side // 16 for side in size]), (1, size)):
        stitcher = Stitcher(size, (128, 128), stride, 16, cell, outputs)
        stitcher.add(maps.float())
        assert (stitcher.result() - 1).abs().max() < 1e-6


def test_windows_cover_every_pixel_and_end_at_the_border():
    for length in range(64, 200, 16):
        for stride in (1, 7, 24, 64):
            starts = window_starts(length, 64, stride)
            covered = torch.zeros(length)
            for start in starts:
                covered[start:start + 64] += 1
            assert (covered.min() >= 1 and starts[0] == 0 and starts[-1] == length - 64
                    and starts == sorted(set(starts)))
    assert window_starts(48, 64, 24) == [0]


def test_windows_are_views():
    image = torch.rand(3, 100, 120)
    assert all(view.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()
               for view in cut_windows(image, (64, 64), 24))


@torch.no_grad()
def test_one_window_equals_a_plain_forward_pass(backbone):
    image = torch.randn(3, 64, 64)
    assert torch.equal(stitched_features(backbone, [image], (64, 64), 64)[0],
                       backbone.encode_dense(image[None])[0])


@torch.no_grad()
def test_one_window_at_stride_24_is_the_known_filter(backbone):
    """Up by two and down by two again is [1/8, 3/4, 1/8] along each axis, with the border
    repeated."""
    image = torch.randn(3, 64, 64)
    plain = backbone.encode_dense(image[None])[0].permute(2, 0, 1)[None]  # (1, D, 4, 4)
    taps = torch.tensor([1 / 8, 3 / 4, 1 / 8])
    kernel = (taps[:, None] * taps).expand(plain.shape[1], 1, 3, 3)
    expected = F.conv2d(F.pad(plain, (1, 1, 1, 1), mode="replicate"), kernel,
                        groups=plain.shape[1])[0].permute(1, 2, 0)
    assert torch.allclose(stitched_features(backbone, [image], (64, 64), 24)[0], expected,
                          atol=1e-5)


@torch.no_grad()
def test_batches_across_images_change_nothing(backbone):
    images = [torch.randn(3, *size) for size in ((96, 128), (64, 64), (48, 160), (112, 80))]
    together = stitched_features(backbone, images, (64, 64), 24, batch_size=5)
    for image, features in zip(images, together):
        alone = torch.stack([backbone.encode_dense(view[None])[0]
                             for view in cut_windows(image, (64, 64), 24)]).double()
        expected = loop(alone, image.shape[-2:], (64, 64), 24, 8, backbone.grid(image))
        assert (features - expected).abs().max() < 1e-5


@pytest.mark.parametrize("window, stride", [
    ((100, 100), 24),
    ((8, 8), 4),
    ((64, 64), 65),
    ((64, 64), -3),
])
def test_impossible_windows_are_refused(window, stride):
    with pytest.raises(WrongCall, match="--window|--stride"):
        check_window(window, stride, 16)
