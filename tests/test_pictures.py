"""Reading pictures of every kind, resizing, and the augmentation's promises."""
import numpy as np
import pytest
import torch
from PIL import Image

from common import (RunFailed, apply_augmentation, list_images, planned_size, read_image,
                    resize_image)
from data.benchmarks import Size, picture_size
from extract_teacher import PRESETS, PUBLISHED, plan_augmentation


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def test_modes_are_read_right(rgb, tmp_path):
    picture = Image.fromarray(rgb)
    picture.save(tmp_path / "rgb.png")
    assert (read_image(tmp_path / "rgb.png").permute(1, 2, 0).numpy() == rgb).all()

    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(tmp_path / "16bit.png")
    assert (read_image(tmp_path / "16bit.png").numpy() == rgb[..., 0]).all()

    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    assert np.abs(read_image(tmp_path / "cmyk.jpg").permute(1, 2, 0).numpy().astype(int)
                  - rgb).mean() < 4

    palette = picture.quantize(16)
    palette.save(tmp_path / "palette.png")
    assert (read_image(tmp_path / "palette.png").permute(1, 2, 0).numpy()
            == np.asarray(palette.convert("RGB"))).all()

    alpha = np.full((20, 30, 1), 255, np.uint8)
    alpha[:, :10] = 0
    Image.fromarray(np.concatenate([rgb, alpha], 2)).save(tmp_path / "rgba.png")
    read = read_image(tmp_path / "rgba.png").permute(1, 2, 0).numpy()
    assert (read[:, :10] == 255).all() and (read[:, 10:] == rgb[:, 10:]).all()

    Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.png")
    assert (read_image(tmp_path / "grey.png").numpy() == rgb[..., 0]).all()


def test_exif_rotation_is_undone(rgb, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    assert (read_image(tmp_path / "turned.png").permute(1, 2, 0).numpy() == np.rot90(rgb, -1)).all()
    assert picture_size(tmp_path / "turned.png") == (30, 20)  # by the header alone


def test_broken_files_are_named(rgb, tmp_path):
    Image.fromarray(rgb).save(tmp_path / "whole.jpg")
    (tmp_path / "short.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-60])
    (tmp_path / "text.png").write_text("this is no picture")
    for name in ("short.jpg", "text.png", "missing.png"):
        with pytest.raises(RunFailed, match=name):
            read_image(tmp_path / name)


def test_images_are_listed_recursively_and_sorted(photos, tmp_path):
    assert list_images(photos) == [f"{k}.png" for k in range(8)] + ["sub/8.png", "sub/9.png"]
    with pytest.raises(RunFailed, match="no picture"):
        list_images(tmp_path)
    with pytest.raises(RunFailed, match="no such folder"):
        list_images(tmp_path / "nowhere")


def test_resize_is_bilinear_between_pixel_centres():
    image = torch.randint(0, 256, (3, 17, 23), dtype=torch.uint8)
    size = (40, 11)

    def axis(length, outputs):  # weights of one axis, by hand
        matrix = np.zeros((outputs, length))
        for k in range(outputs):
            centre = min(max((k + 0.5) * length / outputs - 0.5, 0), length - 1)
            low = int(centre)
            matrix[k, low] += 1 - (centre - low)
            matrix[k, min(low + 1, length - 1)] += centre - low
        return matrix

    expected = np.einsum("ah,chw,bw->cab", axis(17, 40), image.numpy().astype(float), axis(23, 11))
    assert np.abs(resize_image(image, size).numpy() - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("size, picture, expected, bounded", [
    (Size(672), (500, 333), (1009, 672), False),
    (Size(672), (333, 500), (672, 1009), False),
    (Size(672), (100, 1000), (205, 2048), True),
    (Size(64), (1, 4000), (1, 2048), True),
    (Size(area=512), (100, 400), (256, 1024), False),
    (Size(area=512), (64, 4096), (64, 4096), False),  # an area bounds no side
    (Size(area=3), (1, 40), (1, 19), False),
    (Size(), (77, 99), (77, 99), False),
])
def test_sizes_that_are_asked_for(size, picture, expected, bounded):
    resized = size.resize(torch.zeros(3, *picture, dtype=torch.uint8))
    assert resized.shape == (3, *expected) and size.scale(*picture)[1] == bounded


def test_an_area_is_kept_within_rounding():
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = (int(side) for side in rng.integers(40, 900, 2))
        side = int(rng.integers(60, 700))
        resized = Size(area=side).resize(torch.zeros(3, height, width, dtype=torch.uint8))
        # sides of that area at the picture's ratio, each rounded by half a pixel at most
        exact = side * (height / width) ** 0.5, side * (width / height) ** 0.5
        assert all(abs(a - b) <= 0.5 + 1e-6 for a, b in zip(resized.shape[-2:], exact))
        assert abs(resized[0].numel() - side ** 2) <= sum(resized.shape[-2:]) / 2 + 0.25


@pytest.mark.parametrize("presets", [PUBLISHED, PRESETS["tiny"]], ids=["published", "tiny"])
@pytest.mark.parametrize("preset", ["paper", "large"])
def test_augmentation_keeps_its_promises(presets, preset):
    augmentation, seen = presets[preset], {"crop": 0, "flip": 0, "whole": 0}
    rng = np.random.default_rng(0)
    for k in range(400):
        size = tuple(int(side) for side in rng.integers(60, 3000, 2))
        plan = plan_augmentation(size, augmentation, 16, f"0/{k}")
        assert plan == plan_augmentation(size, augmentation, 16, f"0/{k}")
        height, width = planned_size(plan)
        assert height % 16 == 0 and width % 16 == 0 and min(height, width) >= augmentation.min_side
        long, short = max(plan["resize"]), min(plan["resize"])
        if short > augmentation.min_side + 16:  # not enlarged, so inside the box
            assert long <= augmentation.long_side + 1 and short <= augmentation.short_side + 1
        if plan["crop"]:
            top, left, height, width = plan["crop"]
            assert 0 <= top <= plan["resize"][0] - height and 0 <= left <= plan["resize"][1] - width
            assert height >= 0.4 * plan["resize"][0] - 16 and width >= 0.4 * plan["resize"][1] - 16
        seen["crop" if plan["crop"] else "whole"] += 1
        seen["flip"] += plan["flip"]
    assert 150 < seen["flip"] < 250 and seen["crop"] > 80 and seen["whole"] > 150


def test_crops_are_distributed_as_published():
    """Sides from [0.4 side, side], raised to 512. Of a 3:2 picture, resized to 1536 r x 1024 r with
    r uniform in [0.5, 1], a crop is then 512 high with probability 0.49, 512 wide with 0.12."""
    plans = [plan_augmentation((1000, 1500), PUBLISHED["paper"], 16, str(k)) for k in range(4000)]
    crops = np.array([plan["crop"][2:] for plan in plans if plan["crop"]])
    assert 1900 < len(crops) < 2100 and crops.min() == 512
    # 512 / 0.6 h - 2 / 3 of the draws for a height h, integrated over h; a side of less than 528
    # rounds down to 512 too, which adds 16 / 0.6 h
    assert np.allclose((crops == 512).mean(0), (0.52, 0.145), atol=0.03)


def test_augmentation_applies_the_plan():
    image = torch.randint(0, 256, (3, 90, 70), dtype=torch.uint8)
    plan = {"resize": [64, 48], "crop": [10, 5, 32, 16], "flip": True}
    assert torch.equal(apply_augmentation(image, plan),
                       resize_image(image, (64, 48))[:, 10:42, 5:21].flip(-1))
    assert (plan_augmentation((96, 64), None, 16, "0/a")
            == {"resize": [96, 64], "crop": None, "flip": False})
    assert torch.equal(apply_augmentation(image, plan_augmentation((90, 70), None, 16, "")),
                       resize_image(image, (96, 64)))
