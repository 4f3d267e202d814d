"""Dense features, positions and text embeddings against open_clip's own modules; students in plain
open_clip."""
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

from common import (RunFailed, WrongCall, dense_features, embed_texts, load_backbone,
                    resize_positions, segment)
from time_inference import count_flops


@pytest.fixture(scope="module")
def vit_b16():
    return load_backbone("openclip", random_init=True)


def maskclip(visual, images, positions):
    """Independent: open_clip's own blocks, the last one with an attention mask that lets each token
    see itself alone."""
    tokens = visual.conv1(images).flatten(2).transpose(1, 2)
    tokens = torch.cat([visual.class_embedding.expand(len(images), 1, -1), tokens], 1) + positions
    tokens = visual.ln_pre(tokens)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        tokens = block(tokens)
    alone = torch.full((tokens.shape[1],) * 2, float("-inf")).fill_diagonal_(0)
    return (visual.ln_post(last(tokens, attn_mask=alone)) @ visual.proj)[:, 1:]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("which", ["backbone", "vit_b16"])
@pytest.mark.parametrize("scale", [(1, 1), (0.75, 1.5), (2, 0.5)])
def test_dense_features_equal_open_clips_modules(which, scale, request):
    backbone = request.getfixturevalue(which)
    visual = backbone.visual
    grid = [max(1, int(s * side / 16)) for s, side in zip(scale, backbone.window)]
    images = torch.randn(2, 3, 16 * grid[0], 16 * grid[1])
    table = visual.positional_embedding
    patches = F.interpolate(table[1:].T.reshape(1, -1, *visual.grid_size), size=grid,
                            mode="bicubic", align_corners=False, antialias=False)
    positions = torch.cat([table[:1], patches.flatten(2)[0].T])
    features = backbone.encode_dense(images)
    assert features.shape == (2, *grid, backbone.dim)
    assert torch.allclose(features.flatten(1, 2), maskclip(visual, images, positions), atol=2e-5)


@torch.no_grad()
def test_at_the_native_size_tokens_are_open_clips_own(backbone):
    visual, images = backbone.visual, torch.randn(2, 3, 64, 64)
    ours = backbone.run_blocks(backbone.embed(images), (4, 4), stop=len(backbone.blocks) - 1)
    theirs = visual.forward_intermediates(images, indices=[1], output_fmt="NLC",
                                          output_extra_tokens=True)
    assert torch.allclose(ours[:, 1:], theirs["image_intermediates"][0], atol=2e-6)
    assert torch.allclose(ours[:, :1], theirs["image_intermediates_prefix"][0], atol=2e-6)


@pytest.mark.parametrize("grid", [(4, 9), (12, 3), (7, 13), (1, 1), (9, 4), (2, 18)])
def test_positions_are_interpolated_by_size(grid):
    table = torch.randn(36, 8)
    expected = F.interpolate(table.T.reshape(1, 8, 6, 6), size=grid, mode="bicubic",
                             align_corners=False, antialias=False)[0].flatten(1).T
    assert torch.equal(resize_positions(table, (6, 6), grid), expected)
    assert resize_positions(table, (6, 6), (6, 6)) is table


def test_frozen_blocks_can_be_continued(backbone):
    tokens, grid = backbone.embed(torch.randn(1, 3, 96, 48)), (6, 3)
    whole = backbone.run_blocks(tokens, grid)
    assert torch.equal(
        whole, backbone.run_blocks(backbone.run_blocks(tokens, grid, stop=1), grid, start=1))


def test_text_embeddings_equal_open_clips(micro, backbone):
    names = ["cat", "a longer name with more words", "sky"]
    theirs = open_clip.build_zero_shot_classifier(
        backbone.model, open_clip.get_tokenizer(micro), names,
        open_clip.OPENAI_IMAGENET_TEMPLATES)
    assert torch.allclose(embed_texts(backbone, names), theirs.T, atol=1e-6)


def test_flops_are_those_of_the_matrix_products(backbone):
    """Against the formula for a ViT whose last block keeps its value path only (width 32, 3 blocks,
    MLP ratio 4, D = 24)."""
    n, width = 6 * 10, 32
    attended = 24 * (n + 1) * width ** 2 + 4 * (n + 1) ** 2 * width
    value_path = 20 * n * width ** 2
    assert (count_flops(backbone, (96, 160))
            == 2 * attended + value_path + 2 * n * width * (3 * 16 ** 2 + 24))
    assert all(not parameter.is_meta for parameter in backbone.parameters())


@pytest.mark.parametrize("size", [(64, 64), (50, 130), (5, 7), (333, 90)])
def test_any_size_can_be_segmented(backbone, size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    features = dense_features(backbone, image)
    assert features.shape == (*(max(1, int(side / 16 + 0.5)) for side in size), backbone.dim)
    labels = segment(backbone, to_pil_image(image), ["cat", "sky"])
    assert labels.shape == size and set(labels.unique().tolist()) <= {0, 1}


def test_segment_is_the_best_name(backbone):
    image = to_pil_image(torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8))
    labels = segment(backbone, image, ["cat", ["grass", "lawn"], "sky"])
    features = F.normalize(dense_features(backbone, image), dim=-1)
    similarities = (
        features @ embed_texts(backbone, ["cat", "grass", "lawn", "sky"]).T
    ).permute(2, 0, 1)[None]
    pixels = F.interpolate(similarities, size=(64, 96), mode="bilinear")[0]
    expected = torch.stack([pixels[0], pixels[1:3].amax(0), pixels[3]]).argmax(0)
    assert torch.equal(labels, expected)


def test_unknown_and_unsuitable_backbones_are_refused(tmp_path):
    with pytest.raises(WrongCall, match="`backbone` no-such-model.*tiny, siglip2, openclip.*ARCH"):
        load_backbone("no-such-model")
    for name in ("ViT-B-32", "ViT-B-32/laion3b"):
        with pytest.raises(WrongCall, match="laion2b.*`random_init`"):
            load_backbone(name)
    with pytest.raises(WrongCall, match="ModifiedResNet"):
        load_backbone("RN50/openai", random_init=True)
    with pytest.raises(RunFailed, match="open_clip_config.json"):
        load_backbone(f"local-dir:{tmp_path}")


def test_without_network_the_way_out_is_said(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunFailed, match="huggingface.co/nobody/nothing"
                                        ".*`backbone` local-dir:FOLDER"):
        load_backbone("hf-hub:nobody/nothing")
    with pytest.raises(RunFailed, match="huggingface.co/laion/CLIP-ViT-B-16-laion2B-s34B-b88K"
                                        ".*`backbone` local-dir:FOLDER"):
        load_backbone("openclip")
