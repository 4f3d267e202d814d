"""ONNX files against torch: labels and features at sizes that are neither square nor multiples of
the patch, from towers of every family; run in a process without torch and without this repository.
"""
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

import evaluate_ovs
from data import export_onnx
from common import RunFailed, WrongCall, dense_features, label_pixels, load_backbone, segment
from test_families import NATIVE, shaken, write_folder
from test_stages import run

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in export_onnx.PACKAGES),
    reason=f"needs pip install {' '.join(export_onnx.PACKAGES)}")
# smaller and larger than the native side, narrower than half a patch, native
SIZES = [(45, 71), (150, 230), (7, 100), (64, 64), (1, 1)]
WORDS = [["sky"], ["grass", "lawn"], ["red ball"], ["water"]]
ALONE = """
import json, sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
pictures = numpy.load("pictures.npz")
out = {name: session.run(None, {session.get_inputs()[0].name: pictures[name]})[0]
       for name in pictures}
out["metadata"] = json.dumps(session.get_modelmeta().custom_metadata_map)
assert not {"torch", "common", "open_clip"} & set(sys.modules)
numpy.savez("out.npz", **out)
"""


def picture(size):
    """(H, W, 3) uint8, smooth, so that no two levels tie by the thousand."""
    coarse = 255 * torch.rand(1, 3, 5, 6)
    image = F.interpolate(coarse, size=size, mode="bicubic")[0].clamp(0, 255).to(torch.uint8)
    return image.permute(1, 2, 0).numpy()


def alone(path, pictures):
    """What a file gives of {name: array}, in a process of its own: {name: array} and "metadata"."""
    np.savez(path.parent / "pictures.npz", **pictures)
    subprocess.run([sys.executable, "-c", ALONE, path.name], cwd=path.parent, check=True)
    return dict(np.load(path.parent / "out.npz"))


def as_pil(array):
    return to_pil_image(torch.from_numpy(array).permute(2, 0, 1))


def difference(features, expected):
    """Of the expected features' length."""
    assert features.shape == expected.shape
    return np.linalg.norm(features - expected) / np.linalg.norm(expected)


# native by class token, attention and mean; timm by attention and class token, rotary, NaFlex
NAMES = ["class token", "coca", "clipa", "patch 14", "ViT-B-32-SigLIP2-256", "MobileCLIP2-B",
         "EVA02-B-16", "siglip2-naflex"]


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_features_of_every_family(name, tmp_path):
    if name in NATIVE:
        backbone = load_backbone(write_folder(tmp_path / "model", NATIVE[name]))
    else:
        backbone = shaken(load_backbone(name, random_init=True))
        del backbone.blocks[2:]
    path = tmp_path / "features.onnx"
    export_onnx.export(backbone, path)
    patch = backbone.patch
    sizes = [*SIZES, (3 * patch, 5 * patch)]
    pictures = {str(size): picture(size) for size in sizes}
    batch = np.stack([picture((5 * patch, 2 * patch)) for _ in range(3)])
    out = alone(path, {name: image[None] for name, image in pictures.items()} | {"batch": batch})
    for name, image in pictures.items():
        # a resampled pixel may be rounded to the next level
        most = 1e-2 if any(side % patch for side in image.shape[:2]) else 1e-5
        assert difference(out[name][0], dense_features(backbone, as_pil(image)).numpy()) < most
    for features, image in zip(out["batch"], batch, strict=True):
        assert difference(features, dense_features(backbone, as_pil(image)).numpy()) < 1e-5


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--plain-onnx"]])
def test_segmenter(flags, tmp_path):
    """By the command, of the demo's backbone."""
    path = tmp_path / "segmenter.onnx"
    run(evaluate_ovs, "--backbone", "tiny", "--export", path, "--classes",
        ", ".join("|".join(names) for names in WORDS), *flags)
    pictures = {str(size): picture(size) for size in SIZES}
    out = alone(path, pictures)
    backbone = load_backbone("tiny", text=True)
    for name, image in pictures.items():
        labels = segment(backbone, as_pil(image), WORDS).numpy()
        assert out[name].dtype == np.uint8 and out[name].shape == labels.shape
        assert (out[name] != labels).mean() < 1e-3
    metadata = json.loads(str(out["metadata"]))
    assert json.loads(metadata["classes"]) == [names[0] for names in WORDS]
    assert not {path.name for path in tmp_path.glob(".tmp-*")}


@torch.no_grad()
def test_names_that_are_enlarged_part_by_part(backbone):
    texts = F.normalize(torch.randn(7, backbone.dim), dim=-1)
    segmenter = export_onnx.Segmenter(backbone, texts, torch.tensor([0, 0, 1, 2, 3, 3, 4]))
    image = torch.from_numpy(picture((90, 75)))
    assert torch.equal(segmenter(image), segmenter(image, at_once=3))
    expected = label_pixels(backbone, image.permute(2, 0, 1), texts, segmenter.owner)
    assert (segmenter(image) == expected).float().mean() > 0.999


@pytest.mark.parametrize("flags, message", [
    (["--export", "out.pt"], "must end in .onnx"),
    (["--refine", "lposs"], "leave away --refine"),
    (["--inference", "sliding-window", "--stride", 24], "leave away --inference, --stride"),
    (["--prob-threshold", 0.3, "--upsampler", "anyup"], "--upsampler, --prob-threshold"),
    (["--background", "wall"], "--background goes with --classes"),
])
def test_what_an_export_does_not_follow(flags, message, micro, tmp_path):
    with pytest.raises(WrongCall, match=message):
        run(evaluate_ovs, "--backbone", micro, "--export", tmp_path / "out.onnx", *flags)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported(backbone, monkeypatch, tmp_path):
    monkeypatch.setattr(export_onnx, "PACKAGES", ("onnx", "not_installed_here"))
    with pytest.raises(RunFailed, match="need .*not_installed_here: pip install"):
        export_onnx.export(backbone, tmp_path / "out.onnx")
    monkeypatch.setattr(export_onnx, "PACKAGES", ())
    monkeypatch.setattr(export_onnx, "LARGEST", 1000)
    with pytest.raises(WrongCall, match="ends at 2 GB"):
        export_onnx.export(backbone, tmp_path / "out.onnx")
    monkeypatch.setattr(export_onnx, "LARGEST", 10 ** 9)
    monkeypatch.setattr(backbone, "embed", lambda images: images[:int(images.sum())])
    with pytest.raises(WrongCall, match="cannot be exported: "):
        export_onnx.export(backbone, tmp_path / "out.onnx")


@needs_onnx
@pytest.mark.slow
def test_a_file_that_gives_something_else_is_not_kept(backbone, monkeypatch, tmp_path):
    monkeypatch.setattr(export_onnx, "dense_features", lambda *args: 1 + dense_features(*args))
    with pytest.raises(RunFailed, match="the file was not kept"):
        export_onnx.export(backbone, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())
