"""Colour modes, resizing and augmentation. Files of images are tested in test_files.py."""
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import extract_teacher
from data.files import UsageError, apply_augmentation, planned_size, read_image, resize_image
from data.benchmarks import Size
from extract_teacher import PRESETS, PUBLISHED, Augmentation, plan_augmentation

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def pixels_of(path):
    """Return the pixels that read_image reads: (H, W, 3) int."""
    return read_image(path).permute(1, 2, 0).numpy().astype(int)


# ---- reading and resizing --------------------------------------------------------------------

def test_colour_modes_become_rgb(tmp_path):
    image = Image.fromarray(RGB)
    image.save(tmp_path / "rgb.png")
    assert (pixels_of(tmp_path / "rgb.png") == RGB).all()

    Image.fromarray(RGB[..., 0]).save(tmp_path / "grey.png")
    assert (pixels_of(tmp_path / "grey.png") == RGB[..., :1]).all()

    palette = image.quantize(16)
    palette.save(tmp_path / "palette.png")
    assert (pixels_of(tmp_path / "palette.png") == np.asarray(palette.convert("RGB"))).all()

    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    assert np.abs(pixels_of(tmp_path / "cmyk.jpg") - RGB).mean() < 4


def test_transparency_is_blended_with_white(tmp_path):
    alpha = np.full((20, 30, 1), 255, np.uint8)
    alpha[:, :10] = 0
    Image.fromarray(np.concatenate([RGB, alpha], 2)).save(tmp_path / "rgba.png")
    pixels = pixels_of(tmp_path / "rgba.png")
    assert (pixels[:, :10] == 255).all() and (pixels[:, 10:] == RGB[:, 10:]).all()


def test_resizing_is_bilinear_between_pixel_centres():
    image = torch.randint(0, 256, (3, 17, 23), dtype=torch.uint8)

    def axis(length, outputs):  # the weights of one axis, by hand
        matrix = np.zeros((outputs, length))
        for k in range(outputs):
            centre = min(max((k + 0.5) * length / outputs - 0.5, 0), length - 1)
            low = int(centre)
            matrix[k, low] += 1 - (centre - low)
            matrix[k, min(low + 1, length - 1)] += centre - low
        return matrix

    pixels = image.numpy().astype(float)
    expected = np.einsum("ah,chw,bw->cab", axis(17, 40), pixels, axis(23, 11))
    assert np.abs(resize_image(image, (40, 11)).numpy() - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("size, image, expected", [
    (Size(672), (500, 333), (1009, 672)),
    (Size(672), (333, 500), (672, 1009)),
    (Size(672), (100, 1000), (205, 2048)),  # the long side is limited
    (Size(64), (1, 4000), (1, 2048)),
    (Size(area=512), (100, 400), (256, 1024)),
    (Size(area=512), (64, 4096), (64, 4096)),  # an area limits no side
    (Size(area=3), (1, 40), (1, 19)),
    (Size(), (77, 99), (77, 99)),
])
def test_short_sides_and_areas_give_sizes(size, image, expected):
    assert size.resize(torch.zeros(3, *image, dtype=torch.uint8)).shape == (3, *expected)


def test_evaluation_area_is_kept_within_rounding():
    rng = np.random.default_rng(0)
    for _ in range(15):
        height, width = (int(side) for side in rng.integers(40, 900, 2))
        side = int(rng.integers(60, 700))
        resized = Size(area=side).resize(torch.zeros(3, height, width, dtype=torch.uint8))
        # sides of that area in the image's ratio, each rounded by half a pixel at most
        exact = side * (height / width) ** 0.5, side * (width / height) ** 0.5
        assert all(abs(a - b) <= 0.5 + 1e-6 for a, b in zip(resized.shape[-2:], exact))


# ---- augmentation ----------------------------------------------------------------------------

@pytest.mark.parametrize("presets", [PUBLISHED, PRESETS["tiny"]], ids=["published", "tiny"])
@pytest.mark.parametrize("preset", ["paper", "large"])
def test_augmentation_stays_in_its_ranges(presets, preset):
    augmentation, seen = presets[preset], {"crop": 0, "flip": 0, "whole": 0}
    rng = np.random.default_rng(0)
    for k in range(400):
        size = tuple(int(side) for side in rng.integers(60, 3000, 2))
        plan = plan_augmentation(size, augmentation, 16, f"0/{k}")
        assert plan == plan_augmentation(size, augmentation, 16, f"0/{k}")
        height, width = planned_size(plan)
        assert height % 16 == width % 16 == 0 and min(height, width) >= augmentation.min_side
        long, short = max(plan["resize"]), min(plan["resize"])
        if short > augmentation.min_side + 16:  # not enlarged, so inside the box
            assert long <= augmentation.long_side + 1 and short <= augmentation.short_side + 1
        if plan["crop"]:
            for start, part, side in zip(plan["crop"][:2], plan["crop"][2:], plan["resize"]):
                assert 0 <= start <= side - part and part >= 0.4 * side - 16
        seen["crop" if plan["crop"] else "whole"] += 1
        seen["flip"] += plan["flip"]
    assert 150 < seen["flip"] < 250 and seen["crop"] > 80 and seen["whole"] > 150


def test_crop_sides_are_distributed_as_in_the_paper():
    """Sides are drawn from [0.4 side, side] and raised to 512. Of a 3:2 image, resized to
    1536 r x 1024 r with r uniform in [0.5, 1], a crop is then 512 high with probability 0.49, and
    512 wide with 0.12."""
    plans = [plan_augmentation((1000, 1500), PUBLISHED["paper"], 16, str(k)) for k in range(4000)]
    crops = np.array([plan["crop"][2:] for plan in plans if plan["crop"]])
    assert 1900 < len(crops) < 2100 and crops.min() == 512
    # 512 / 0.6 h - 2 / 3 of the draws for a height h, integrated over h; a side of less than 528
    # rounds down to 512 too, which adds 16 / 0.6 h
    assert np.allclose((crops == 512).mean(0), (0.52, 0.145), atol=0.03)


@pytest.mark.parametrize("preset, version, plan", [
    ("paper", 0, {"resize": [732, 1100], "crop": [213, 7, 512, 1024], "flip": False}),
    ("paper", 1, {"resize": [704, 1056], "crop": None, "flip": True}),
    ("large", 0, {"resize": [928, 1394], "crop": [402, 9, 512, 1296], "flip": False})])
def test_a_seed_draws_the_same_plan_in_every_release(preset, version, plan):
    """Folders of features can be continued only then."""
    assert plan_augmentation((333, 500), PUBLISHED[preset], 16, f"0/{version}/a.jpg") == plan


def test_augmentation_applies_the_plan():
    image = torch.randint(0, 256, (3, 90, 70), dtype=torch.uint8)
    plan = {"resize": [64, 48], "crop": [10, 5, 32, 16], "flip": True}
    assert torch.equal(apply_augmentation(image, plan),
                       resize_image(image, (64, 48))[:, 10:42, 5:21].flip(-1))


def test_no_augmentation_only_rounds_to_patches():
    for size, resized in (((96, 64), [96, 64]), ((90, 70), [96, 64]), ((3, 24), [16, 32])):
        assert (plan_augmentation(size, None, 16, "")
                == {"resize": resized, "crop": None, "flip": False})


def choose(*flags):
    return extract_teacher.choose_augmentation(extract_teacher.parse_args(flags))


def test_flags_override_single_values_of_a_preset():
    assert choose() == PRESETS["tiny"]["paper"] and choose("--augment", "none") is None
    augmentation = choose("--images", "photos", "--augment", "large", "--ratio", "0.3", "0.4")
    assert (augmentation.ratio == [0.3, 0.4]
            and augmentation.long_side == PUBLISHED["large"].long_side)


@pytest.mark.parametrize("flags, message", [
    ("--augment none --min-side 64", "--augment none.*--min-side"),
    ("--augment none --versions 3", "--augment none.*--versions"),  # three equal maps
    ("--ratio 0.9 0.5", "--ratio")])
def test_contradictory_augmentation_is_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        choose(*flags.split())


def test_the_number_of_versions_follows_the_images(tmp_path):
    for flags, versions in (([], 3), (["--augment", "none"], 1), (["--images", "x"], 1),
                            (["--versions", "2"], 2)):
        args = extract_teacher.parse_args([*flags, "--out", str(tmp_path)])
        fitted = extract_teacher.fit_to_images(args, PUBLISHED["paper"], (9, 9), (512, 512))
        assert fitted[1] == versions


@pytest.mark.parametrize("size, window, lengths", [
    ((480, 360), 112, (480, 360, 112, [0.7, 1.0])),  # smaller than in the paper: its own size
    ((360, 480), 512, (480, 360, 360, [0.7, 1.0])),  # and never enlarged
    ((4000, 3000), 512, (2048, 1024, 512, [0.5, 1.0]))])
def test_the_augmentation_follows_the_size_of_the_images(tmp_path, size, window, lengths):
    Image.new("RGB", size).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")

    def fit(*flags):
        args = extract_teacher.parse_args(["--images", "x", "--out", str(tmp_path), *flags])
        augmentation = extract_teacher.choose_augmentation(args)
        sides, _ = extract_teacher.typical_sides(tmp_path, ["a.png", "b.png"])
        return extract_teacher.fit_to_images(args, augmentation, sides, (window, window))
    long, short, least, ratio = lengths
    expected = Augmentation(long, short, ratio, least)
    assert fit() == (expected, 1)
    assert fit("--min-side", "99")[0].min_side == 99
    assert fit("--augment", "paper")[0] == PUBLISHED["paper"]
    # an earlier run in the same folder is continued as it began
    (tmp_path / "teacher.json").write_text(json.dumps(
        {"augment": dataclasses.asdict(expected), "versions": 5}))
    Image.new("RGB", (600, 600)).save(tmp_path / "a.png")
    assert fit() == (expected, 5)
