"""The paper's backbones against the modules of the libraries that they come from; text, students,
segmentation. Needs no extras/."""
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import unittest.mock

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.functional import to_pil_image

import common
from common import (DINOV3, DinoTxt, FrozenWindows, dense_features, embed_texts, load_backbone,
                    resize_positions, segment)
from data.files import RunError, UsageError
from conftest import (MICRO, NATIVE, PREPROCESSING, ROOT, assert_equals_timm, bicubic, shaken,
                      write_folder)
from time_inference import count_flops


# ---- image towers ---------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("case", NATIVE)
def test_native_towers_equal_open_clips_modules(case, tmp_path):
    backbone = load_backbone(write_folder(tmp_path, NATIVE[case]))
    native = tuple(side // backbone.patch for side in backbone.window)
    for grid in (native, (5, 9), (2, 1), (1, 1)):
        images = torch.randn(2, 3, *(backbone.patch * side for side in grid))
        visual = copy.deepcopy(backbone.visual)
        table = visual.positional_embedding
        visual.positional_embedding = nn.Parameter(torch.cat(
            [table[:1], bicubic(table[1:], visual.grid_size, grid)]))
        *blocks, last = visual.transformer.resblocks
        tokens = visual._embeds(images)
        for block in blocks:
            tokens = block(tokens)
        by_class_token = visual.attn_pool is None and visual.pool_type == "tok"
        alone = torch.full((tokens.shape[1],) * 2, float("-inf")).fill_diagonal_(0)
        tokens = last(tokens, attn_mask=alone if by_class_token else None)
        patches = tokens[:, 1:].flatten(0, 1)[:, None]
        if visual.pool_type == "avg":
            patches = torch.cat([tokens[:, :1].repeat_interleave(grid[0] * grid[1], 0), patches], 1)
        # each patch pooled as if it were the only one
        expected = (visual._pool(patches)[0] @ visual.proj).unflatten(0, (2, -1))
        assert torch.allclose(backbone.encode_dense(images).flatten(1, 2), expected,
                              atol=2e-5 * expected.abs().max())


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", [
    "siglip2", "MobileCLIP2-B", "vit_medium_patch16_gap_256", "ViTamin-S"])
def test_timm_towers_equal_timms_modules(name):
    assert_equals_timm(load_backbone(name, random_init=True))


# ---- the small backbone ---------------------------------------------------------------------

@pytest.mark.parametrize("grid", [(4, 9), (12, 3), (7, 13), (1, 1), (9, 4), (2, 18)])
def test_positions_are_interpolated_by_size(grid):
    table = torch.randn(36, 8)
    assert torch.equal(resize_positions(table, (6, 6), grid), bicubic(table, (6, 6), grid))
    assert resize_positions(table, (6, 6), (6, 6)) is table


def test_flops_are_those_of_the_matrix_products(backbone):
    """Against the formula for a ViT whose last block keeps its value path only (width 32, 3 blocks,
    MLP ratio 4, D = 24)."""
    n, width = 6 * 10, 32
    attended = 24 * (n + 1) * width ** 2 + 4 * (n + 1) ** 2 * width
    value_path = 20 * n * width ** 2
    assert (count_flops(backbone, (96, 160))
            == 2 * attended + value_path + 2 * n * width * (3 * 16 ** 2 + 24))
    assert all(not parameter.is_meta for parameter in backbone.parameters())


@pytest.mark.parametrize("size", [(64, 96), (50, 130), (5, 7), (333, 90)])
def test_segment_gives_the_best_name_at_any_size(backbone, size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    features = dense_features(backbone, image)
    assert features.shape == (*(max(1, int(side / 16 + 0.5)) for side in size), backbone.dim)
    texts = embed_texts(backbone, ["cat", "grass", "lawn", "sky"])
    similarities = (F.normalize(features, dim=-1) @ texts.T).permute(2, 0, 1)[None]
    pixels = F.interpolate(similarities, size=size, mode="bilinear")[0]
    expected = torch.stack([pixels[0], pixels[1:3].amax(0), pixels[3]]).argmax(0)
    labels = segment(backbone, to_pil_image(image), ["cat", ["grass", "lawn"], "sky"])
    assert labels.shape == size and (labels == expected).float().mean() > 0.999
    for classes in ("cat, sky", [], ["cat", ""], ["cat", []]):
        with pytest.raises(TypeError, match="give a list of names"):
            segment(backbone, image, classes)


# ---- text, students, loading ----------------------------------------------------------------

@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A folder like SigLIP2's: a timm tower pooled by attention (with a register token), a text
    tower with a tokenizer of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp("siglip")
    words = ["<pad>", "<eos>", "<unk>", "cat", "dog", "a", "photo", "of", "the"]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)},
                                           unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>",
                                                             special_tokens=[("<eos>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="right").save_pretrained(folder)
    text = {"context_length": 12, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1,
            "hf_tokenizer_name": "nobody/nothing", "pool_type": "last",
            "tokenizer_kwargs": {"clean": "canonicalize"}, "no_causal_mask": True,
            "proj_bias": True}
    tower = {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map",
             "timm_proj": "none"}
    return write_folder(folder, tower, embed_dim=96, text_cfg=text, custom_text=True)


@torch.no_grad()
@pytest.mark.parametrize("tokenizer", ["open_clip's", "its own"])
def test_text_embeddings_equal_open_clips(tokenizer, micro, siglip):
    source = {"open_clip's": micro, "its own": siglip}[tokenizer]
    backbone, lean = load_backbone(source, text=True), load_backbone(source)
    images = torch.randn(1, 3, 96, 160)
    assert lean.model is None and len([*lean.parameters()]) < len([*backbone.parameters()])
    assert torch.equal(lean.encode_dense(images), backbone.encode_dense(images))
    names = ["cat", "a photo of the dog"]
    theirs = open_clip.build_zero_shot_classifier(
        backbone.model, open_clip.get_tokenizer(source), names,
        open_clip.OPENAI_IMAGENET_TEMPLATES)
    assert torch.allclose(embed_texts(backbone, names), theirs.T, atol=1e-6)


@pytest.mark.parametrize("file, change, is_fine", [
    ("tokenizer_config.json", {"eos_token": None}, True),  # as CLIPA's, which is BERT's
    ("tokenizer_config.json", {"padding_side": "left"}, False),
    ("tokenizer.json", {"post_processor": None}, False),  # ends no text
])
def test_tokenizers_that_would_feed_garbage_are_refused(file, change, is_fine, siglip, tmp_path):
    folder = shutil.copytree(siglip.removeprefix("local-dir:"), tmp_path / "model")
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    backbone = load_backbone(folder, text=True)
    if is_fine:
        assert embed_texts(backbone, ["cat"]).shape == (1, 96)
    else:
        with pytest.raises(RunError, match="tokenizer"):
            embed_texts(backbone, ["cat"])


@pytest.mark.slow
@torch.no_grad()
def test_student_folders_are_plain_open_clip(micro, siglip, tmp_path):
    """Students that were loaded without text, in a process that does not know this repository:
    equal image and text features, and the same preprocessing."""
    script = """
import torch, open_clip
for name in ('native', 'timm'):
    model = open_clip.create_model(f'local-dir:{name}').eval()
    tokens = open_clip.get_tokenizer(f'local-dir:{name}')(['a cat'])
    with torch.no_grad():
        out = model.encode_image(torch.load(f'{name}.pt')), model.encode_text(tokens)
    torch.save(out, f'{name}-out.pt')
"""
    sources, students = {"native": micro, "timm": siglip}, {}
    for name, source in sources.items():
        students[name] = shaken(load_backbone(source))
        students[name].save(tmp_path / name)
        torch.save(torch.randn(2, 3, *students[name].window), tmp_path / f"{name}.pt")
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
    for name, source in sources.items():
        saved = json.loads((tmp_path / name / "open_clip_config.json").read_text())
        expected = MICRO["preprocess_cfg"] | (PREPROCESSING if name == "timm" else {})
        assert expected.items() <= saved["preprocess_cfg"].items()
        image_features, text_features = torch.load(tmp_path / f"{name}-out.pt")
        images, tokens = torch.load(tmp_path / f"{name}.pt"), open_clip.get_tokenizer(source)
        teacher = load_backbone(source, text=True)
        teacher.visual.load_state_dict(students[name].visual.state_dict())
        assert torch.equal(image_features, teacher.model.encode_image(images))
        assert torch.equal(text_features, teacher.model.encode_text(tokens(["a cat"])))
        again = load_backbone(tmp_path / name, text=True)
        assert torch.equal(again.encode_dense(images), students[name].encode_dense(images))
        assert torch.equal(embed_texts(again, ["cat"]), embed_texts(teacher, ["cat"]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["coca", "hugging face"])
def test_students_with_other_text_towers_come_back(name, tmp_path):
    """A CoCa, whose text tower is followed by a decoder, and a model whose text tower is one of
    transformers: loaded without text, trained, saved and loaded by open_clip."""
    if name == "coca":
        decoder = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        source = write_folder(
            tmp_path / "coca", NATIVE["coca"] | {"output_tokens": True}, custom_text=True,
            text_cfg=decoder | {"embed_cls": True, "output_tokens": True}, multimodal_cfg=decoder)
    else:
        from transformers import BertConfig
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                   intermediate_size=32).save_pretrained(tmp_path / "bert")
        source = write_folder(tmp_path / "hugging", {}, text_cfg={
            "hf_model_name": str(tmp_path / "bert"), "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "mlp"})
    student = shaken(load_backbone(source))
    student.save(tmp_path / "student")
    model = open_clip.create_model(f"local-dir:{tmp_path / 'student'}").eval()
    saved, before = model.state_dict(), open_clip.create_model(source).eval()
    for key, value in before.state_dict().items():
        image_key = key.removeprefix("visual.")
        expected = value if image_key == key else student.visual.state_dict()[image_key]
        assert torch.equal(saved[key], expected), key
    images, tokens = torch.randn(2, 3, 64, 64), torch.randint(1, 60, (2, 24))
    assert torch.equal(model.encode_text(tokens), before.encode_text(tokens))
    assert not torch.equal(model.encode_image(images), before.encode_image(images))


@pytest.mark.slow
@torch.no_grad()
def test_quick_gelu_follows_the_tag_and_goes_with_the_student(tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-S-32-alt",
                        {"quick": {"url": "", "quick_gelu": True}, "plain": {"url": ""}})
    for tag, activation in (("quick", "QuickGELU"), ("plain", "GELU")):
        backbone = load_backbone(f"ViT-S-32-alt/{tag}", random_init=True)
        assert type(backbone.blocks[0].mlp.gelu).__name__ == activation
        backbone.save(tmp_path / tag)
        model = open_clip.create_model(f"local-dir:{tmp_path / tag}")
        assert type(model.visual.transformer.resblocks[0].mlp.gelu).__name__ == activation


def test_random_init_of_a_hub_model_fetches_its_configuration_alone(tmp_path, monkeypatch):
    fetched = []

    def download(repository, filename=None, **_):
        fetched.append((repository, filename))
        (tmp_path / "open_clip_config.json").write_text(json.dumps(MICRO))
        return str(tmp_path / "open_clip_config.json")
    for module in (open_clip.pretrained, open_clip.factory):
        monkeypatch.setattr(module, "download_pretrained_from_hf", download)
    assert load_backbone("hf-hub:nobody/micro", random_init=True).dim == 24
    assert fetched == [("nobody/micro", "open_clip_config.json")]


@pytest.mark.parametrize("name, repository", [
    ("hf-hub:nobody/nothing", "nobody/nothing"),
    ("openclip", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K")])
def test_without_network_the_way_out_is_named(name, repository, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match=f"huggingface.co/{repository}.*local-dir:FOLDER"):
        load_backbone(name)


@pytest.mark.parametrize("error, reason", [
    (RuntimeError("401 Client Error. Cannot access gated repo for url"), "accept its licence"),
    (OSError(28, "No space left on device"), "No space left")])
def test_failed_downloads_end_in_one_line(error, reason, monkeypatch):
    monkeypatch.setattr("open_clip.download_pretrained", unittest.mock.Mock(side_effect=error))
    with pytest.raises(RunError, match=reason) as caught:
        load_backbone("siglip2")
    assert "\n" not in str(caught.value) and "local-dir:FOLDER" in str(caught.value)


def test_readme_snippet_runs(monkeypatch):
    snippet = re.search(r"## From Python\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(),
                        re.S).group(1)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(snippet.replace('"runs/spar"', '"tiny"'), names)
    height, width = names["image"].size[::-1]
    assert (names["labels"].shape == (height, width)
            and names["features"].shape[:2] == (round(height / 16), round(width / 16)))


def test_unknown_and_unsuitable_backbones_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no-such-model.*tiny, siglip2, openclip.*ARCH"):
        load_backbone("no-such-model")
    for name in ("ViT-B-32", "ViT-B-32/laion3b"):
        with pytest.raises(UsageError, match="laion2b.*random-init"):
            load_backbone(name)
    with pytest.raises(RunError, match="open_clip_config.json"):
        load_backbone(f"local-dir:{tmp_path}")


# ---- DINOv3.txt -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def dinov3(tmp_path_factory):
    """DINOv3.txt, small, built from its public code."""
    clone = os.environ.get("SPAR_DINOV3_DIR")
    if not clone:
        pytest.skip("SPAR_DINOV3_DIR names no clone of github.com/facebookresearch/dinov3")
    sys.path.append(clone)
    from dinov3.eval.text.dinotxt_model import DINOTxt, DINOTxtConfig
    from dinov3.eval.text.text_transformer import TextTransformer
    from dinov3.eval.text.tokenizer import get_tokenizer
    from dinov3.models.vision_transformer import DinoVisionTransformer
    config = DINOTxtConfig(embed_dim=128, vision_model_use_patch_tokens=True,
                           vision_model_num_head_blocks=2, text_model_tokens_pooler_type="argmax",
                           text_model_use_linear_projection=True)
    vision = DinoVisionTransformer(embed_dim=64, depth=3, num_heads=2, n_storage_tokens=4,
                                   layerscale_init=0.1, mask_k_bias=True,
                                   pos_embed_rope_rescale_coords=2, pos_embed_rope_dtype="fp32")
    text = TextTransformer(context_length=77, vocab_size=49408, dim=32, num_heads=2, num_layers=2,
                           ffn_ratio=4, is_causal=True, ls_init_value=None, dropout_prob=0.0)
    model = DINOTxt(config, vision_backbone=vision, text_backbone=text)
    model.init_weights()
    bpe = os.path.join(os.path.dirname(open_clip.__file__), "bpe_simple_vocab_16e6.txt.gz")
    return shaken(DinoTxt(model, get_tokenizer(bpe))).eval().requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("size", [(384, 384), (224, 224), (160, 416), (16, 48)])
def test_dinov3txt_equals_its_public_code(dinov3, size):
    images = torch.randn(2, 3, *size)
    assert torch.allclose(dinov3.encode_dense(images).flatten(1, 2),
                          dinov3.model.visual_model.get_class_and_patch_tokens(images)[1],
                          atol=1e-6)
    texts = dinov3.model.encode_text(dinov3.tokenizer.tokenize(["a cat"]))
    assert torch.equal(dinov3.encode_text(["a cat"]), texts[:, 64:]) and texts.shape == (1, 128)


def test_dinov3txt_segments_and_is_saved_as_its_public_code_loads_it(dinov3, tmp_path):
    assert segment(dinov3, Image.new("RGB", (100, 70)), ["cat", "sky"]).shape == (70, 100)
    dinov3.save(tmp_path)
    dinov3.model.load_state_dict(load_file(tmp_path / DINOV3), strict=True)


@torch.no_grad()
def test_dinov3txt_remembers_windows_in_its_file(dinov3, tmp_path, monkeypatch):
    image = torch.randn(1, 3, 64, 96)
    plain = dinov3.encode_dense(image)
    monkeypatch.setattr(dinov3, "windows", FrozenWindows(2, (64, 96), 32))
    assert torch.allclose(dinov3.encode_dense(image), plain, atol=1e-5)  # one window
    monkeypatch.setattr(dinov3, "windows", FrozenWindows(2, (64, 64), 32))
    windowed = dinov3.encode_dense(image)
    assert not torch.allclose(windowed, plain, atol=1e-3)
    dinov3.save(tmp_path)
    monkeypatch.setattr(common, "build_dinotxt",
                        lambda clone: (copy.deepcopy(dinov3.model), dinov3.tokenizer))
    student = load_backbone(tmp_path)
    assert student.windows == dinov3.windows
    assert torch.equal(student.encode_dense(image), windowed)


def test_dinov3txt_says_what_it_needs(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="dinov3-weights .*hub-dir"):
        load_backbone("dinov3txt")
    with pytest.raises(UsageError, match="no such file"):
        load_backbone("dinov3txt", dinov3_weights=(tmp_path / "a.pth", tmp_path / "b.pth"))
    for module in [module for module in sys.modules if module.startswith("dinov3")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(
        sys, "path", [path for path in sys.path if path != os.environ.get("SPAR_DINOV3_DIR")])
    with pytest.raises(UsageError, match="holds no hubconf.py"):
        load_backbone("dinov3txt", random_init=True, hub_dir=tmp_path)
    (tmp_path / "dinov3").mkdir()
    (tmp_path / "dinov3" / "hubconf.py").touch()
    with pytest.raises(RunError, match="public code cannot be .*hub-dir"):
        load_backbone("dinov3txt", random_init=True, hub_dir=tmp_path)
