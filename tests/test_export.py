"""ONNX files against torch: labels and features at sizes that are neither square nor multiples of
the patch, from towers of every family; run in a process without torch and without this repository.
"""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

import evaluate_ovs
from common import dense_features, embed_texts, label_pixels, load_backbone, segment
from data.files import RunError, UsageError, nearest_multiple
from conftest import NATIVE, needs_onnx, run, shaken, write_folder
from extras import export_onnx

# smaller and larger than the native side, narrower than half a patch, native
SIZES = [(45, 71), (150, 230), (7, 100), (64, 64), (1, 1)]
WORDS = [["sky"], ["grass", "lawn"], ["red ball"], ["water"]]
ALONE = """
import json, sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
images = numpy.load("images.npz")
out = {name: session.run(None, {session.get_inputs()[0].name: images[name]})[0]
       for name in images}
out["metadata"] = json.dumps(session.get_modelmeta().custom_metadata_map)
assert not {"torch", "common", "open_clip"} & set(sys.modules)
numpy.savez("out.npz", **out)
"""


def smooth_image(size):
    """(H, W, 3) uint8, smooth, so that few similarities tie."""
    coarse = 255 * torch.rand(1, 3, 5, 6)
    image = F.interpolate(coarse, size=size, mode="bicubic")[0].clamp(0, 255).to(torch.uint8)
    return image.permute(1, 2, 0).numpy()


def run_alone(path, images):
    """What a file gives for {name: array}, in a process of its own: {name: array}, "metadata"."""
    np.savez(path.parent / "images.npz", **images)
    subprocess.run([sys.executable, "-c", ALONE, path.name], cwd=path.parent, check=True)
    return dict(np.load(path.parent / "out.npz"))


def as_pil(image):
    return to_pil_image(torch.from_numpy(image).permute(2, 0, 1))


# native by attention, mean and class token; timm by attention and class token, rotary, NaFlex
@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "coca", "clipa", "patch 14", "ViT-B-32-SigLIP2-256", "MobileCLIP2-B", "EVA02-B-16",
    "siglip2-naflex"])
def test_a_file_gives_the_features_of_torch(name, tmp_path):
    if name in NATIVE:
        backbone = load_backbone(write_folder(tmp_path / "model", NATIVE[name]))
    else:
        backbone = shaken(load_backbone(name, random_init=True))
        del backbone.blocks[2:]
    path, patch = tmp_path / "features.onnx", backbone.patch
    export_onnx.export(backbone, path)
    batches = {str(size): smooth_image(size)[None] for size in [*SIZES, (3 * patch, 5 * patch)]}
    batches["batch"] = np.stack([smooth_image((5 * patch, 2 * patch)) for _ in range(3)])
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in batches.values():
        (maps,) = session.run(None, {session.get_inputs()[0].name: batch})
        names = [value.shape[:len(batch.shape) - 1] for value in session.get_inputs()]
        assert names == [["batch", "height", "width"]]
        # a resampled pixel may be rounded to the next level
        exact = all(side == nearest_multiple(side, patch) for side in batch.shape[1:3])
        for features, image in zip(maps, batch, strict=True):
            expected = dense_features(backbone, as_pil(image)).numpy()
            assert features.shape == expected.shape
            error = np.linalg.norm(features - expected) / np.linalg.norm(expected)
            assert error < (1e-5 if exact else 1e-2)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--plain-onnx"]])
def test_a_file_gives_the_labels_of_torch_without_torch(flags, tmp_path):
    path = tmp_path / "segmenter.onnx"
    run(evaluate_ovs, "--backbone", "tiny", "--export", path, "--classes",
        ", ".join("|".join(names) for names in WORDS), *flags)
    images = {str(size): smooth_image(size) for size in SIZES}
    out = run_alone(path, images)
    backbone = load_backbone("tiny", text=True)
    for name, image in images.items():
        labels = segment(backbone, as_pil(image), WORDS).numpy()
        assert out[name].dtype == np.uint8 and out[name].shape == labels.shape
        assert (out[name] != labels).mean() < 1e-3
    metadata = json.loads(str(out["metadata"]))
    assert json.loads(metadata["classes"]) == [names[0] for names in WORDS]
    assert not [*tmp_path.glob(".tmp-*")]


@torch.no_grad()
def test_names_are_enlarged_in_chunks(backbone):
    texts = F.normalize(torch.randn(7, backbone.dim), dim=-1)
    segmenter = export_onnx.Segmenter(backbone, texts, torch.tensor([0, 0, 1, 2, 3, 3, 4]))
    image = torch.from_numpy(smooth_image((90, 75)))
    assert torch.equal(segmenter(image), segmenter(image, chunk=3))
    expected = label_pixels(backbone, image.permute(2, 0, 1), texts, segmenter.class_of_name)
    assert (segmenter(image) == expected).float().mean() > 0.999


@pytest.mark.parametrize("flags, named", [
    (["--refine", "lposs"], "--refine"),
    (["--inference", "sliding-window", "--stride", 24], "--inference, --stride"),
    (["--prob-threshold", 0.3, "--upsampler", "anyup"], "--upsampler, --prob-threshold"),
    (["--background", "wall"], "--background"),
])
def test_flags_that_a_file_would_not_follow_are_refused(flags, named, micro, tmp_path):
    with pytest.raises(UsageError, match=named):
        run(evaluate_ovs, "--backbone", micro, "--export", tmp_path / "out.onnx", *flags)
    with pytest.raises(SystemExit):
        run(evaluate_ovs, "--backbone", micro, "--export", tmp_path / "out.pt")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_named(backbone, monkeypatch, tmp_path):
    def refusal(error):
        with pytest.raises(error) as raised:
            export_onnx.export(backbone, tmp_path / "out.onnx")
        assert not list(tmp_path.iterdir())
        return str(raised.value)
    monkeypatch.setattr(export_onnx, "PACKAGES", ("onnx", "not_installed_here"))
    assert "not_installed_here: pip install" in refusal(RunError)
    monkeypatch.setattr(export_onnx, "PACKAGES", ())
    monkeypatch.setattr(export_onnx, "MAX_BYTES", 1000)
    assert "ends at 2 GB" in refusal(UsageError)
    monkeypatch.setattr(export_onnx, "MAX_BYTES", 10 ** 9)
    monkeypatch.setattr(backbone, "embed", lambda images: images[:int(images.sum())])
    assert "cannot be exported" in refusal(UsageError)


@needs_onnx
@pytest.mark.slow
def test_a_file_that_gives_something_else_is_not_kept(backbone, monkeypatch, tmp_path):
    monkeypatch.setattr(export_onnx, "dense_features", lambda *args: 1 + dense_features(*args))
    with pytest.raises(RunError, match="the file was not kept"):
        export_onnx.export(backbone, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


@needs_onnx
@pytest.mark.slow
def test_words_can_change_after_the_export(micro, backbone, tmp_path):
    """The example of extras/export_onnx.py, in numpy and onnxruntime alone."""
    import onnxruntime
    words, classes = tmp_path / "words.npz", "sky, grass | lawn, cat"
    run(evaluate_ovs, "--backbone", micro, "--classes", classes, "--export",
        tmp_path / "features.onnx", "--export-texts", words)
    session = onnxruntime.InferenceSession((tmp_path / "features.onnx").read_bytes())
    words, image = np.load(words, allow_pickle=False), smooth_image((96, 128))
    features, = session.run(None, {"images": np.asarray(as_pil(image))[None]})
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    labels = words["class_of_name"][(features[0] @ words["texts"].T).argmax(-1)]
    assert words["titles"].tolist() == ["sky", "grass", "cat"] and words["texts"].shape == (4, 24)
    texts = embed_texts(backbone, ["sky", "grass", "lawn", "cat"])
    ours = F.normalize(dense_features(backbone, image), dim=-1) @ texts.T
    expected = torch.tensor([0, 1, 1, 2])[ours.argmax(-1)]
    assert (labels == expected.numpy()).mean() > 0.9
    with pytest.raises(UsageError, match="--export-texts goes with --classes"):
        run(evaluate_ovs, "--backbone", micro, "--export-texts", tmp_path / "other.npz")
