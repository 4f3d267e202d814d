"""Dense features, positions and text embeddings against open_clip's own modules; students in plain open_clip."""
import os
import subprocess
import sys

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common import (RunFailed, WrongCall, dense_features, embed_texts, load_backbone, resize_positions, save_open_clip, segment,
                    single_pass_similarities)


@pytest.fixture(scope="module")
def vit_b16():
    return load_backbone("openclip", random_init=True)


def maskclip(visual, images, positions):
    """Independent: open_clip's own blocks, the last one with an attention mask that lets each token see itself alone."""
    tokens = visual.conv1(images).flatten(2).transpose(1, 2)
    tokens = torch.cat([visual.class_embedding.expand(len(images), 1, -1), tokens], 1) + positions
    tokens = visual.ln_pre(tokens)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        tokens = block(tokens)
    alone = torch.full((tokens.shape[1],) * 2, float("-inf")).fill_diagonal_(0)
    return (visual.ln_post(last(tokens, attn_mask=alone)) @ visual.proj)[:, 1:]


@torch.no_grad()
@pytest.mark.parametrize("which", ["backbone", "vit_b16"])
@pytest.mark.parametrize("scale", [(1, 1), (0.75, 1.5), (2, 0.5)])
def test_dense_features_equal_open_clips_modules(which, scale, request):
    backbone = request.getfixturevalue(which)
    visual = backbone.model.visual
    grid = [max(1, int(s * side / 16)) for s, side in zip(scale, backbone.window)]
    images = torch.randn(2, 3, 16 * grid[0], 16 * grid[1])
    table = visual.positional_embedding
    patches = F.interpolate(table[1:].T.reshape(1, -1, *visual.grid_size), size=grid, mode="bicubic", align_corners=False, antialias=False)
    positions = torch.cat([table[:1], patches.flatten(2)[0].T])
    features = backbone.encode_dense(images)
    assert features.shape == (2, *grid, backbone.dim)
    assert torch.allclose(features.flatten(1, 2), maskclip(visual, images, positions), atol=2e-5)


@torch.no_grad()
def test_at_the_native_size_tokens_are_open_clips_own(backbone):
    visual, images = backbone.model.visual, torch.randn(2, 3, 64, 64)
    ours = backbone.run_blocks(backbone.embed(images), (4, 4), stop=len(backbone.blocks) - 1)
    theirs = visual.forward_intermediates(images, indices=[1], output_fmt="NLC", output_extra_tokens=True)
    assert torch.equal(ours[:, 1:], theirs["image_intermediates"][0])
    assert torch.equal(ours[:, :1], theirs["image_intermediates_prefix"][0])


@pytest.mark.parametrize("grid", [(4, 9), (12, 3), (7, 13), (1, 1), (9, 4), (2, 18)])
def test_positions_are_interpolated_by_size(grid):
    table = torch.randn(36, 8)
    expected = F.interpolate(table.T.reshape(1, 8, 6, 6), size=grid, mode="bicubic", align_corners=False, antialias=False)[0].flatten(1).T
    assert torch.equal(resize_positions(table, (6, 6), grid), expected)
    assert resize_positions(table, (6, 6), (6, 6)) is table


def test_frozen_blocks_can_be_continued(backbone):
    tokens, grid = backbone.embed(torch.randn(1, 3, 96, 48)), (6, 3)
    whole = backbone.run_blocks(tokens, grid)
    assert torch.equal(whole, backbone.run_blocks(backbone.run_blocks(tokens, grid, stop=1), grid, start=1))


def test_text_embeddings_equal_open_clips(micro, backbone):
    names = ["cat", "a longer name with more words", "sky"]
    theirs = open_clip.build_zero_shot_classifier(backbone.model, open_clip.get_tokenizer(micro), names, open_clip.OPENAI_IMAGENET_TEMPLATES)
    assert torch.allclose(embed_texts(backbone, names), theirs.T, atol=1e-6)


def test_student_folder_is_plain_open_clip(backbone, tmp_path):
    """In a process that does not know this repository, the same weights give the same image and text features."""
    save_open_clip(backbone, tmp_path / "student")
    images = torch.randn(2, 3, 64, 64)
    torch.save(images, tmp_path / "images.pt")
    script = ("import torch, open_clip; torch.set_grad_enabled(False); model, _, _ = open_clip.create_model_and_transforms('local-dir:student'); model.eval();"
              "tokens = open_clip.get_tokenizer('local-dir:student')(['a cat']);"
              "torch.save((model.encode_image(torch.load('images.pt')), model.encode_text(tokens)), 'out.pt')")
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    image_features, text_features = torch.load(tmp_path / "out.pt")
    assert torch.equal(image_features, backbone.model.encode_image(images))
    assert torch.equal(text_features, backbone.model.encode_text(open_clip.get_tokenizer(backbone.name)(["a cat"])))
    assert torch.equal(load_backbone(tmp_path / "student").encode_dense(images), backbone.encode_dense(images))


def test_flops_are_those_of_the_matrix_products(backbone):
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            backbone.encode_dense(torch.randn(1, 3, 96, 160))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    assert backbone.flops((96, 160)) == counter.get_total_flops()


@pytest.mark.parametrize("size", [(64, 64), (50, 130), (5, 7), (333, 90)])
def test_any_size_can_be_segmented(backbone, size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    features = dense_features(backbone, image)
    assert features.shape == (*(max(1, int(side / 16 + 0.5)) for side in size), backbone.dim)
    assert single_pass_similarities(backbone, image, torch.randn(3, backbone.dim)).shape == (*features.shape[:2], 3)


def test_segment_is_the_best_name(backbone):
    from torchvision.transforms.functional import to_pil_image
    image = to_pil_image(torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8))
    labels = segment(backbone, image, ["cat", ["grass", "lawn"], "sky"])
    features = F.normalize(dense_features(backbone, image), dim=-1)
    similarities = (features @ embed_texts(backbone, ["cat", "grass", "lawn", "sky"]).T).permute(2, 0, 1)[None]
    pixels = F.interpolate(similarities, size=(64, 96), mode="bilinear")[0]
    expected = torch.stack([pixels[0], pixels[1:3].amax(0), pixels[3]]).argmax(0)
    assert torch.equal(labels, expected)


def test_unknown_and_unsuitable_backbones_are_refused(tmp_path):
    with pytest.raises(WrongCall, match="tiny, openclip.*ARCH"):
        load_backbone("no-such-model")
    with pytest.raises(WrongCall, match="laion2b"):
        load_backbone("ViT-B-32")
    with pytest.raises(WrongCall, match="ModifiedResNet"):
        load_backbone("RN50/openai", random_init=True)
    with pytest.raises(RunFailed, match="open_clip_config.json"):
        load_backbone(f"local-dir:{tmp_path}")


def test_without_network_the_way_out_is_said(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunFailed, match="huggingface.co/nobody/nothing.*local-dir:FOLDER"):
        load_backbone("hf-hub:nobody/nothing")
    with pytest.raises(RunFailed, match="huggingface.co/laion/CLIP-ViT-B-16-laion2B-s34B-b88K.*local-dir:FOLDER"):
        load_backbone("openclip")
