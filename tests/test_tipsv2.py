"""TIPSv2 against transformers' own modules, composed naively; its text, its students."""
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
import evaluate_ovs
import extract_teacher
from common import FrozenWindows, embed_texts, load_backbone
from data.files import RunError
from conftest import losses, needs_onnx, run, shaken
from extras.export_onnx import export

transformers = pytest.importorskip("transformers", "5.14", "TIPSv2 needs transformers 5.14")

WORDS = ["<pad>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz.", "ph", "pho", "phot", "photo"]
MERGES = [("p", "h"), ("ph", "o"), ("pho", "t"), ("phot", "o")]


def write_tipsv2(folder, **vision):
    """A small TIPSv2 with random weights, as save_pretrained writes it."""
    torch.manual_seed(0)
    towers = {"hidden_size": 32, "num_attention_heads": 2}
    config = transformers.Tipsv2Config(
        vision_config={**towers, "num_hidden_layers": 3, "image_size": 112, **vision},
        text_config={**towers, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 40,
                     "max_position_embeddings": 24})
    shaken(transformers.Tipsv2Model(config)).save_pretrained(folder)
    vocabulary = {word: k for k, word in enumerate(WORDS)}
    transformers.Tipsv2Tokenizer(vocab=vocabulary, merges=MERGES).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tipsv2(tmp_path_factory):
    return write_tipsv2(tmp_path_factory.mktemp("tipsv2"))


def naive_features(model, images):
    """MaskCLIP: in the last block, a mask that lets each token attend to itself alone."""
    visual, patch = model.vision_model, model.config.vision_config.patch_size
    tokens = visual.embeddings(images)
    *blocks, last = visual.encoder.layer
    for block in blocks:
        tokens = block(tokens)
    alone = torch.full((tokens.shape[1],) * 2, -torch.inf).fill_diagonal_(0)[None, None]
    tokens = visual.layernorm(last(tokens, attention_mask=alone))
    return tokens[:, 2:].unflatten(1, [side // patch for side in images.shape[-2:]])


@torch.no_grad()
@pytest.mark.parametrize("vision", [{}, {"use_swiglu_ffn": True, "patch_size": 16}])
def test_features_equal_transformers_modules(vision, tmp_path):
    backbone = load_backbone(write_tipsv2(tmp_path, **vision), text=True)
    patch = backbone.patch
    side = backbone.window[0] // patch
    assert backbone.pooling == "class token" and backbone.dim == 32
    for grid in [(side, side), (side // 2, 2 * side), (5, 9), (13, 3), (1, 1), (20, 20)]:
        images = torch.rand(2, 3, grid[0] * patch, grid[1] * patch)
        expected = naive_features(backbone.model, images)
        assert expected.shape == (2, *grid, 32)
        error = (backbone.encode_dense(images) - expected).abs().max() / expected.abs().max()
        assert error < 2e-5, (grid, error)


def test_pixels_stay_in_0_to_1(tipsv2):
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    assert torch.allclose(load_backbone(tipsv2).normalise(image).flatten(),
                          torch.tensor([0, 0.2, 1]))


@torch.no_grad()
def test_text_does_not_depend_on_the_batch(tipsv2):
    """Nor on how much padding it has, nor on capitals."""
    backbone = load_backbone(tipsv2, text=True)
    texts = ["a Photo of a cat.", "cat", "z" * 100]
    together = backbone.encode_text(texts)
    assert together.shape == (3, 32)
    for text, vector in zip(texts, together):
        assert torch.allclose(backbone.encode_text([text.lower()])[0], vector, atol=1e-6)
    ids = backbone.tokenizer("cat", return_tensors="pt").input_ids
    alone = backbone.model.text_model(ids).pooler_output[0]
    assert torch.allclose(together[1], alone, atol=1e-6)
    assert backbone.tokenizer(texts[2], truncation=True, max_length=24).input_ids[-1] != 0


@torch.no_grad()
def test_a_student_is_what_automodel_loads(tipsv2, tmp_path):
    """Loaded without text, trained, saved: both towers, words and images prepared as before."""
    student = shaken(load_backbone(tipsv2))
    assert student.model is None
    assert student.save(tmp_path) == f"transformers.AutoModel.from_pretrained('{tmp_path}')"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors", "preprocessor_config.json",
                     "tokenizer.json", "tokenizer_config.json"]
    model = transformers.AutoModel.from_pretrained(tmp_path)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)(["a cat"], return_tensors="pt")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pixels = processor(torch.full((3, 50, 70), 51, dtype=torch.uint8), return_tensors="pt")
    assert pixels.pixel_values.shape == (1, 3, 112, 112)
    assert torch.allclose(pixels.pixel_values, torch.tensor(0.2))
    images = torch.rand(1, 3, 112, 168)
    expected = student.encode_dense(images)
    assert torch.allclose(naive_features(model, images), expected, atol=1e-5)
    before, again = (load_backbone(place, text=True) for place in (tipsv2, tmp_path))
    assert torch.equal(model.get_text_features(**tokens).pooler_output,
                       before.encode_text(["a cat"]))
    assert torch.equal(again.encode_dense(images), expected)
    assert torch.equal(embed_texts(again, ["cat"]), embed_texts(before, ["cat"]))


def test_weights_load_strictly(tipsv2, tmp_path):
    tensors = load_file(Path(tipsv2) / "model.safetensors")
    (tmp_path / "config.json").write_text((Path(tipsv2) / "config.json").read_text())
    del tensors["vision_encoder.cls_token"]
    tensors |= {"vision_encoder.extra": torch.zeros(1), "vision_encoder.norm.bias": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match="missing .*cls_token.*unknown .*extra.*shape .*norm.bias"):
        load_backbone(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(RunError, match="The folder must hold all files") as error:
        load_backbone(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_vocabulary_is_refused(tipsv2, tmp_path):
    """transformers makes a tokenizer of two words for it."""
    load_backbone(tipsv2).save(tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(RunError, match="tokenizer"):
        load_backbone(tmp_path, text=True).encode_text(["cat"])


def test_a_full_disk_leaves_no_half_student(tipsv2, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    student = load_backbone(tipsv2, text=True)
    monkeypatch.setattr(transformers.Tipsv2Model, "save_pretrained", full)
    with pytest.raises(RunError, match="could not be written .*No space left"):
        student.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_older_transformers_is_named(tipsv2, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    for name in ("tipsv2", tipsv2):
        with pytest.raises(RunError, match="pip install 'transformers>=5.14'"):
            load_backbone(name)


@pytest.mark.parametrize("name, dim, image, text", [
    ("tipsv2-b", 768, 86, 110), ("tipsv2", 1024, 303, 184), ("tipsv2-so", 1152, 412, 448),
    ("tipsv2-g", 1536, 1100, 389)])
def test_models_have_the_published_sizes(name, dim, image, text):
    """Millions of parameters, as published; no file is needed."""
    with torch.device("meta"):
        backbone = load_backbone(name, random_init=True, device="meta", text=True)
    assert (backbone.dim, backbone.patch, backbone.window) == (dim, 14, (448, 448))
    count = {key: sum(p.numel() for p in getattr(backbone.model, key).parameters()) / 1e6
             for key in ("vision_model", "text_model")}
    assert count["vision_model"] == pytest.approx(image, rel=0.04)
    assert count["text_model"] == pytest.approx(text, rel=0.01)


# ---- the stages -----------------------------------------------------------------------------

@pytest.mark.slow
def test_two_blocks_are_distilled_and_evaluated(tipsv2, photos, tmp_path):
    """Extraction, training from stored tokens, evaluation of what AutoModel loads."""
    teacher, out = tmp_path / "teacher", tmp_path / "spar"
    run(extract_teacher, "--images", photos, "--out", teacher, "--backbone", tipsv2, "--long-side",
        168, "--short-side", 140, "--min-side", 112)
    settings = json.loads((teacher / "teacher.json").read_text())
    assert (settings["stride"], settings["patch"], settings["dim"]) == (21, 14, 32)
    run(distill, "--teacher", teacher, "--out", out, "--epochs", 4, "--lr", 2e-3)
    log = losses(out)
    assert len(log) == 40 and sum(log[-10:]) < 0.95 * sum(log[:10])
    before, after = load_backbone(tipsv2), load_backbone(out)
    changed = {name for (name, old), new in zip(before.visual.named_parameters(),
                                                after.visual.parameters())
               if not torch.equal(old, new)}
    assert all(name.startswith(("encoder.layer.1.", "encoder.layer.2.")) for name in changed)
    # MaskCLIP leaves the last block's queries and keys without a gradient
    assert len(changed) == 2 * 18 - 4
    run(evaluate_ovs, "--checkpoint", out, "--images", photos, "--classes", "cat, photo",
        "--compare", "--save-maps", tmp_path / "maps", "--limit", 2, "--state", tmp_path)
    assert {path.name for path in (tmp_path / "maps").iterdir() if path.is_dir()} == {
        "single-pass", "sliding-window-56", "sliding-window-21", "spar"}


@pytest.mark.parametrize("only, parameters", [
    ("qkv", 12), ("mlp", 8), ("patch-embed", 2), ("pos-embed", 1)])
def test_parts_can_be_trained_alone(only, parameters, tipsv2):
    student = load_backbone(tipsv2)
    first, chosen = distill.select_trained(student, None, only)
    assert len(chosen) == parameters and first == (None if "-" in only else 1)
    distill.distillation_loss(student.encode_dense(torch.rand(1, 3, 70, 42))[0],
                              torch.zeros(5, 3, 32)).backward()
    assert sum(each.grad is not None for each in chosen) == parameters - 4 * (only == "qkv")


@needs_onnx
@pytest.mark.slow
def test_an_export_is_refused_in_one_line(tipsv2, tmp_path):
    """transformers resamples positions to the one grid that it is traced at."""
    with pytest.raises(RunError, match="cannot be exported: 112 x 112"):
        export(load_backbone(tipsv2), tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_windows_of_frozen_blocks_are_remembered(tipsv2, tmp_path):
    student = load_backbone(tipsv2, text=True)
    student.windows = FrozenWindows(1, student.window, 2 * student.patch)
    student.save(tmp_path / "student")
    loaded = load_backbone(tmp_path / "student")
    assert loaded.windows == student.windows
    image = torch.randn(1, 3, 4 * student.patch, 5 * student.patch)
    with torch.no_grad():
        assert torch.equal(loaded.encode_dense(image), student.encode_dense(image))
    assert load_backbone(tipsv2).windows is None
