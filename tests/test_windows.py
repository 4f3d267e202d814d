"""Students whose frozen blocks see native windows: the tokens, the gradients, what a folder
remembers."""

import json
import shutil
import signal

import numpy as np
import open_clip
import pytest
import torch

import distill
import evaluate_ovs
import evaluate_probes
import extract_teacher
import time_inference
from common import FrozenWindows, Stitcher, dense_features, load_backbone, window_starts
from conftest import files, losses, run, shaken
from data.files import RunError, UsageError


def naive_tokens(backbone, image, block):
    """Return the tokens of windows one by one, summed and divided in float64: (n, C)."""
    (height, width), patch = image.shape[-2:], backbone.patch
    size, stride = backbone.windows.size, backbone.windows.stride
    patches, counts, prefixes = None, torch.zeros(height // patch, width // patch, 1), []
    for top in window_starts(height, size[0], stride):
        for left in window_starts(width, size[1], stride):
            window = image[:, top:top + size[0], left:left + size[1]]
            grid = window.shape[1] // patch, window.shape[2] // patch
            tokens = backbone.run_blocks(backbone.embed(window[None]), grid, stop=block)[0]
            prefix = len(tokens) - grid[0] * grid[1]
            prefixes.append(tokens[:prefix].double())
            if patches is None:
                patches = torch.zeros(height // patch, width // patch, tokens.shape[1]).double()
            place = (slice(top // patch, top // patch + grid[0]),
                     slice(left // patch, left // patch + grid[1]))
            patches[place] += tokens[prefix:].unflatten(0, grid).double()
            counts[place] += 1
    return torch.cat([torch.stack(prefixes).mean(0), (patches / counts).flatten(0, 1)])


@pytest.mark.parametrize("size", [(64, 64), (112, 80), (48, 144), (80, 32), (160, 208)])
@pytest.mark.parametrize("stride", [16, 32, 48, 64])
@torch.no_grad()
def test_joined_tokens_are_the_mean_over_windows(micro, size, stride):
    backbone = load_backbone(micro)
    backbone.windows = FrozenWindows(1, (64, 64), stride)
    image = torch.randn(3, *size)
    expected = naive_tokens(backbone, image, 1)
    tokens = backbone.tokens_before(1, image[None])[0]
    assert torch.allclose(tokens.double(), expected, atol=1e-5)
    # and the other blocks see all of them at once
    grid = backbone.grid(image)
    features = backbone.project(backbone.run_blocks(tokens[None], grid, start=1), grid)
    assert torch.equal(backbone.encode_dense(image[None]), features)


@torch.no_grad()
def test_one_window_that_is_the_whole_image_is_the_plain_student(micro):
    plain, windowed = load_backbone(micro), load_backbone(micro)
    windowed.windows = FrozenWindows(2, (64, 64), 64)
    for size in ((64, 64), (32, 48)):
        image = torch.randn(1, 3, *size)
        assert torch.allclose(windowed.encode_dense(image), plain.encode_dense(image), atol=1e-6)


@torch.no_grad()
def test_a_batch_is_its_images_one_by_one(micro):
    backbone = load_backbone(micro)
    backbone.windows = FrozenWindows(1, (64, 64), 32)
    images = torch.randn(3, 3, 96, 128)
    single = torch.cat([backbone.encode_dense(image[None]) for image in images])
    assert torch.allclose(backbone.encode_dense(images), single, atol=1e-6)


def test_windows_are_joined_in_float32_under_autocast(micro, monkeypatch):
    backbone, maps, add = load_backbone(micro), [], Stitcher.add
    backbone.windows = FrozenWindows(1, (64, 64), 16)
    monkeypatch.setattr(Stitcher, "add", lambda self, part: maps.append(part) or add(self, part))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokens = backbone.tokens_before(1, torch.randn(1, 3, 96, 128))
    expected = Stitcher.of_features((96, 128), (64, 64), 16, 16)
    add(expected, torch.cat(maps).float())
    assert torch.equal(tokens[0, -48:], expected.result().flatten(0, 1))


def test_gradients_reach_trained_blocks_only_and_equal_autograd_through_the_loop(micro):
    backbone = load_backbone(micro)
    backbone.windows = FrozenWindows(2, (64, 64), 32)
    trained = list(backbone.blocks[2].parameters())
    for parameter in trained:
        parameter.requires_grad_(True)
    image = torch.randn(3, 96, 80)
    grid = backbone.grid(image)
    gradients = []
    for tokens in (backbone.tokens_before(2, image[None]),
                   naive_tokens(backbone, image, 2)[None].float()):
        features = backbone.project(backbone.run_blocks(tokens, grid, start=2), grid)
        gradients.append(torch.autograd.grad(features.square().mean(), trained))
    for ours, naive in zip(*gradients):
        assert torch.allclose(ours, naive, atol=1e-6)
    backbone.encode_dense(image[None]).sum().backward()
    changed = {id(parameter) for parameter in backbone.parameters() if parameter.grad is not None}
    assert changed == {id(parameter) for parameter in trained}


@pytest.fixture(scope="module")
def windowed(teacher):
    """The folder of a student whose first block sees windows."""
    out = teacher.parent / "windowed"
    run(distill, "--teacher", teacher, "--out", out, "--epochs", 2, "--lr", 1e-3,
        "--frozen-stride", 32)
    return out


def test_a_student_remembers_its_windows(windowed, student, photos, tmp_path):
    config = json.loads((windowed / "open_clip_config.json").read_text())
    assert config["windows"] == {"blocks": 1, "size": [64, 64], "stride": 32}
    assert json.loads((windowed / "spar.json").read_text())["frozen_stride"] == 32
    assert "windows" not in json.loads((student / "open_clip_config.json").read_text())
    loaded = load_backbone(windowed)
    assert loaded.windows == FrozenWindows(1, (64, 64), 32)
    image = photos / "3.png"
    features = dense_features(loaded, image)
    loaded.windows = None
    assert not torch.allclose(features, dense_features(loaded, image), atol=1e-3)
    model = open_clip.create_model(f"local-dir:{windowed}")  # plain open_clip
    assert all(torch.equal(a, b) for a, b in zip(model.visual.parameters(),
                                                 loaded.visual.parameters()))


def test_flops_of_windows_are_counted(windowed):
    """9 windows of 16 patches and a class token enter one of 3 blocks of width 32, and 65 tokens
    the others, the last of which keeps its value path. Their joining costs a little more."""
    def block(tokens):
        return 24 * tokens * 32 ** 2 + 4 * tokens ** 2 * 32
    ends = 2 * 3 * 16 ** 2 * 32 * 9 * 16 + 2 * 64 * 32 * 24
    expected = ends + 9 * block(17) + block(65) + 20 * 64 * 32 ** 2
    counted = time_inference.count_flops(load_backbone(windowed), (128, 128))
    assert expected < counted < 1.1 * expected


@pytest.mark.slow
def test_every_stage_follows_without_a_flag(windowed, photos, masks, tmp_path):
    data = ["--images", photos, "--masks", masks, "--classes", "cat, dog, sky", "--limit", 2]
    run(evaluate_ovs, "--checkpoint", windowed, "--compare", "--stride", 32, *data,
        "--json", tmp_path / "out.json", "--state", tmp_path / "state")
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(row["method"], row["frozen_stride"]) for row in rows] == [
        ("single-pass", 0), ("sliding-window/32", 0), ("spar", 32)]
    run(evaluate_probes, "--checkpoint", windowed, "--probe", "knn", *data,
        "--state", tmp_path / "probes", "--heads", tmp_path / "heads")
    run(time_inference, "--backbone", windowed, "--sizes", "128x128", "--strides", 0,
        "--warmup", 0, "--repeats", 1, "--json", tmp_path / "time.json")
    row, = json.loads((tmp_path / "time.json").read_text())["rows"]
    assert row["tflop"] == time_inference.count_flops(load_backbone(windowed), (128, 128)) / 1e12
    run(extract_teacher, "--backbone", windowed, "--images", photos, "--stride", 0,
        "--augment", "none", "--out", tmp_path / "features", "--limit", 1)
    stored = torch.from_numpy(np.load(tmp_path / "features" / "features" / "0.png.npy"))
    features = dense_features(load_backbone(windowed), photos / "0.png")
    assert torch.allclose(stored.float(), features, atol=2e-3)


def test_stored_tokens_of_windows_change_no_bit(teacher, windowed, tmp_path):
    flags = ["--teacher", teacher, "--epochs", 2, "--lr", 1e-3, "--frozen-stride", 32]
    run(distill, *flags, "--out", tmp_path / "again", "--cache-frozen", tmp_path / "tokens")
    expected = (windowed / "open_clip_model.safetensors").read_bytes()
    assert (tmp_path / "again" / "open_clip_model.safetensors").read_bytes() == expected
    # the tokens of another stride are others
    run(distill, *flags[:-1], 48, "--out", tmp_path / "other", "--cache-frozen",
        tmp_path / "tokens")
    assert (tmp_path / "other" / "open_clip_model.safetensors").read_bytes() != expected
    assert len(list((tmp_path / "tokens").iterdir())) == 2


@pytest.mark.parametrize("flags", [["--frozen-stride", 24], ["--frozen-stride", 80],
                                   ["--frozen-stride", 32, "--train-blocks", "all"],
                                   ["--frozen-stride", 32, "--train-blocks", 3],
                                   ["--frozen-stride", 32, "--train-only", "patch-embed"]])
def test_impossible_windows_are_refused(teacher, tmp_path, flags):
    with pytest.raises(UsageError, match="stride"):
        run(distill, "--teacher", teacher, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("windows", [5, {}, {"blocks": 3, "size": [64, 64], "stride": 32},
                                     {"blocks": 1, "size": [64], "stride": 32},
                                     {"blocks": 1, "size": [64, 64], "stride": 24},
                                     {"blocks": 1, "size": [64, 64], "stride": 0}])
def test_damaged_windows_are_named(windowed, tmp_path, windows):
    shutil.copytree(windowed, tmp_path / "spar")
    path = tmp_path / "spar" / "open_clip_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"windows": windows}))
    with pytest.raises(RunError, match="open_clip_config.json"):
        load_backbone(tmp_path / "spar")


def test_an_export_is_refused(windowed, tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(UsageError, match="windows"):
        run(evaluate_ovs, "--checkpoint", windowed, "--export", tmp_path / "student.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EVA02-B-16", "PE-Core-T-16-384", "ViT-B-16-SigLIP2-256"])
@torch.no_grad()
def test_other_families_join_windows(name):
    """Rotary positions, which each window has from its own corner; no class token."""
    backbone = shaken(load_backbone(name, random_init=True))
    del backbone.blocks[3:]
    height, width = backbone.window
    backbone.windows = FrozenWindows(2, (height, width), height // 2)
    image = torch.randn(3, height, width + 2 * backbone.patch)
    tokens = backbone.tokens_before(2, image[None])[0]
    assert torch.allclose(tokens.double(), naive_tokens(backbone, image, 2), atol=1e-4)


@pytest.mark.slow
def test_interrupted_trainings_with_windows_end_the_same(fork, teacher, tmp_path):
    """Killed and continued, and in two processes, one of which was killed: bit for bit."""
    flags = ["--teacher", teacher, "--epochs", 2, "--lr", 1e-3, "--frozen-stride", 32,
             "--save-every", 0, "--batch-size", 2, "--cache-frozen", "off"]

    def student(name):
        return {file: data for file, data in files(tmp_path / name).items()
                if file in ("open_clip_model.safetensors", "open_clip_config.json")}
    assert fork("distill", [*flags, "--out", tmp_path / "whole"])[0] == [0]
    for name, world in (("one", 1), ("two", 2)):
        again = [*flags, "--out", tmp_path / name]
        codes, _ = fork("distill", again, world=world, number=signal.SIGKILL,
                        watched=tmp_path / name / "log.jsonl", count=4)
        assert codes[-1] == -signal.SIGKILL
        codes, outputs = fork("distill", again, world=world)
        assert codes == [0] * world and "continuing after step" in outputs[0]
        assert student(name) == student("whole")


@pytest.mark.parametrize("flags", [["--random-scale", 0.5, 2], ["--precision", "bf16"],
                                   ["--precision", "fp16"]])
def test_windows_go_with_other_settings(teacher, tmp_path, flags):
    run(distill, "--teacher", teacher, "--out", tmp_path, "--epochs", 2, "--lr", 1e-3,
        "--frozen-stride", 32, *flags)
    curve = np.array(losses(tmp_path))
    assert np.isfinite(curve).all() and curve[20:].mean() < curve[:20].mean()
