"""Families of image towers beyond the paper's, towers that are refused, precision; checkpoints of
the method's authors."""
import concurrent.futures
import json
import os
import subprocess
import sys
import threading
import types

import open_clip
import pytest
import torch

import evaluate_ovs
from common import embed_texts, load_backbone, resize_positions
from data.files import RunError, UsageError
from conftest import Malicious, assert_equals_timm, run, shaken, write_folder
from extras.official import load_checkpoint


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["siglip2-naflex", "PE-Core-T-16-384", "EVA02-B-16"])
def test_towers_equal_timms_modules(name):
    assert_equals_timm(load_backbone(name, random_init=True))


@pytest.mark.slow
@torch.no_grad()
def test_threads_do_not_share_rotary_positions(monkeypatch):
    backbone = shaken(load_backbone("EVA02-B-16", random_init=True))
    del backbone.blocks[4:]
    batches = [torch.randn(1, 3, 16 * height, 16 * width) for height, width in ((2, 6), (6, 2))]
    expected = [backbone.encode_dense(images) for images in batches]
    meeting, get_embed = threading.Barrier(2, timeout=60), backbone.trunk.rope.get_embed

    def get_embed_together(*args):
        meeting.wait()  # until both threads ask for the positions of a block
        return get_embed(*args)
    monkeypatch.setattr(backbone.trunk.rope, "get_embed", get_embed_together)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        features = pool.map(torch.no_grad()(backbone.encode_dense), batches)
        assert all(torch.equal(*pair) for pair in zip(features, expected, strict=True))


@pytest.mark.slow
@torch.no_grad()
def test_naflex_positions_equal_transformers():
    """timm's tower and transformers' resize the same table to the same positions, at sizes that
    are not square too."""
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings
    embeds = load_backbone("siglip2-naflex", random_init=True).trunk.embeds
    for grid in ((16, 16), (8, 8), (20, 13), (5, 40)):
        theirs = Siglip2VisionEmbeddings.resize_positional_embeddings(
            embeds.pos_embed[0], torch.tensor([grid]), max_length=grid[0] * grid[1])
        tokens = torch.zeros(1, grid[0] * grid[1], embeds.pos_embed.shape[-1])
        embeds._apply_learned_pos_embed(tokens, grid_size=list(grid))
        assert torch.allclose(tokens, theirs, atol=1e-5)


@pytest.mark.slow
def test_every_plain_vit_of_open_clip_works_and_its_window_is_whole_patches():
    unsupported = ("convnext", "RN", "swin", "MobileCLIP-S", "MobileCLIP2-S", "vit_relpos")
    # one of several models whose image towers are the same
    towers = {json.dumps(open_clip.get_model_config(name)["vision_cfg"]): name
              for name in open_clip.list_models()}
    for name in towers.values():
        try:
            with torch.device("meta"):
                backbone = load_backbone(name, random_init=True, device="meta")
        except UsageError as error:
            assert name.startswith(unsupported), error
        else:
            assert not any(side % backbone.patch for side in backbone.window), name


@pytest.mark.parametrize("name, reason", [
    ("RN50", "ModifiedResNet"), ("convnext_base", "ConvNeXt"),
    ("vit_relpos_medium_patch16_cls_224", "VisionTransformerRelPos")])
def test_unsupported_towers_are_refused_with_the_reason(name, reason):
    with torch.device("meta"), pytest.raises(UsageError, match=f"{name}: .*{reason}"):
        load_backbone(name, random_init=True, device="meta")


@pytest.mark.parametrize("tower, naflex, reason", [
    ("vit_small_patch16_rope_mixed_224", "0", "differ from block to block"),
    ("vit_small_patch16_rope_224", "1", "NaFlexVit with rotary positions"),
])
def test_timm_towers_that_would_give_wrong_features_are_refused(tower, naflex, reason, tmp_path,
                                                                monkeypatch):
    monkeypatch.setenv("TIMM_USE_NAFLEX", naflex)
    config = {"timm_model_name": tower, "timm_proj": "linear", "image_size": 256}
    with pytest.raises(UsageError, match=reason):
        load_backbone(write_folder(tmp_path, config, custom_text=True))


SIGLIP, CLIP = (0.5, 0.5, 0.5), (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.parametrize("name, mean", [
    ("siglip2", SIGLIP), ("siglip2-naflex", SIGLIP), ("openclip", CLIP),
    ("PE-Core-T-16-384", SIGLIP), ("ViT-B-32/openai", CLIP)])
def test_images_are_normalised_as_the_weights_were_trained(name, mean):
    assert torch.allclose(load_backbone(name, random_init=True).mean.flatten(), torch.tensor(mean),
                          atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["openclip", "siglip2", "EVA02-B-16"])
def test_half_precision_stays_within_bounds(name):
    """The features' relative error (norm of the difference by the norm), of an image that is not
    square, through twelve blocks."""
    backbone = load_backbone(name, random_init=True)
    images = torch.randn(1, 3, 96, 160)
    exact = backbone.encode_dense(images)
    for dtype, bound in ((torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        with torch.autocast("cpu", dtype):
            half = backbone.encode_dense(images).float()
        assert 0 < (half - exact).norm() / exact.norm() < bound


# ---- official checkpoints -------------------------------------------------------------------

@pytest.mark.parametrize("function, argument", [
    (os.system, "touch executed"), (subprocess.call, ["touch", "executed"]),
    (eval, "open('executed', 'w')")])
def test_nothing_in_a_checkpoint_is_executed(function, argument, backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "callbacks": Malicious(function, argument)}, "evil.ckpt")
    with pytest.raises(RunError):  # refused, or read as holding no weights
        load_checkpoint(backbone, "evil.ckpt")
    assert not (tmp_path / "executed").exists()


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["segmentor.net.model.", "model."])
@pytest.mark.parametrize("towers", ["both", "image"])
def test_official_checkpoints_load_strictly(prefix, towers, micro, tmp_path, monkeypatch):
    """Beside the tensors, Lightning saves objects whose classes are not there when the file is
    read."""
    monkeypatch.chdir(tmp_path)
    teacher = shaken(load_backbone(micro, text=True))
    state = {prefix + key: value for key, value in teacher.model.state_dict().items()
             if towers == "both" or key.startswith("visual.")}
    lightning = types.ModuleType("old_lightning")
    lightning.Settings = type("Settings", (), {"__module__": "old_lightning", "lr": 2e-5})
    wrapped = state
    if prefix.startswith("segmentor"):
        wrapped = {"state_dict": state, "hyper_parameters": lightning.Settings(), "epoch": 9}
    with monkeypatch.context() as installed:
        installed.setitem(sys.modules, "old_lightning", lightning)
        torch.save(wrapped, "spar.ckpt")
    images = torch.randn(1, 3, 96, 64)
    for student in (load_backbone(micro, text=True), load_backbone(micro)):
        load_checkpoint(student, "spar.ckpt")
        assert torch.equal(student.encode_dense(images), teacher.encode_dense(images))
        origin = teacher if student.model and towers == "both" else load_backbone(micro, text=True)
        assert torch.equal(embed_texts(student, ["cat"]), embed_texts(origin, ["cat"]))

    name = prefix + "visual.conv1.weight"
    torch.save({key: value for key, value in state.items() if key != name}
               | {prefix + "visual.extra": torch.zeros(1), prefix + "visual.proj": torch.zeros(2)},
               "bad.ckpt")
    with pytest.raises(RunError, match="missing .*conv1.weight.*unknown .*extra.*shape .*proj"):
        load_checkpoint(load_backbone(micro, text=True), "bad.ckpt")


def test_damaged_checkpoints_are_named(backbone, tmp_path):
    path = tmp_path / "some.ckpt"
    for value in (["no state dict"], {"epoch": 1}, {"state_dict": [1]}):
        torch.save(value, path)
        with pytest.raises(RunError, match="some.ckpt holds no state dict"):
            load_checkpoint(backbone, path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RunError, match="some.ckpt cannot be read"):
        load_checkpoint(backbone, path)


def bicubic_by_scale(table, old, new):
    """A table (old, C) sampled along its axis at steps of old / (new + 0.1), by Keys' kernel of
    -0.75: the published interpolation, written out."""
    positions = (torch.arange(new, dtype=torch.float64) + 0.5) * old / (new + 0.1) - 0.5
    sampled = torch.zeros(new, table.shape[1], dtype=torch.float64)
    for near in range(-1, 3):
        neighbour = positions.floor() + near
        d = (positions - neighbour).abs()
        weight = torch.where(d <= 1, 1.25 * d ** 3 - 2.25 * d ** 2 + 1,
                             -0.75 * (d ** 3 - 5 * d ** 2 + 8 * d - 4))
        sampled += weight[:, None] * table[neighbour.clamp(0, old - 1).long()]
    return sampled


@pytest.mark.parametrize("grid", [(14, 28), (42, 63), (5, 9), (1, 1)])
def test_positions_of_the_authors_openclip_students_are_resized_by_scale(grid):
    table = torch.randn(14 * 14, 8, dtype=torch.float64)
    rows = bicubic_by_scale(table.view(14, -1), 14, grid[0])
    columns = rows.view(grid[0], 14, 8).transpose(0, 1).reshape(14, -1)
    expected = bicubic_by_scale(columns, 14, grid[1]).view(grid[1], grid[0], 8).transpose(0, 1)
    scaled = resize_positions(table, (14, 14), grid, "scale")
    assert torch.allclose(scaled, expected.reshape(-1, 8), atol=1e-5)
    assert not torch.equal(scaled, resize_positions(table, (14, 14), grid))
    assert resize_positions(table, (14, 14), (14, 14), "scale") is table


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("tower, positions", [
    ({}, "scale"),
    ({"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "linear"}, "size")])
def test_an_official_checkpoint_becomes_a_folder(tower, positions, photos, tmp_path, capsys):
    """Evaluated, converted, loaded by plain open_clip and as --backbone: equal features, and
    positions by the rule that it was trained with."""
    source, checkpoint = write_folder(tmp_path / "source", tower), tmp_path / "spar.ckpt"
    student = shaken(load_backbone(source, text=True))
    torch.save({"state_dict": {f"segmentor.net.model.{key}": value
                               for key, value in student.model.state_dict().items()}}, checkpoint)
    student.positions = positions
    folder, own = tmp_path / "converted", ["--images", photos / "1.png", "--classes", "cat, dog",
                                           "--state", tmp_path / "state", "--save-maps"]
    flags = ["--backbone", source, "--checkpoint", checkpoint]
    run(evaluate_ovs, *flags, "--save-student", folder, *own, tmp_path / "maps")
    out = capsys.readouterr().out
    assert f"student in {folder}: open_clip.create_model_and_transforms" in out
    run(evaluate_ovs, *flags, "--save-student", folder)  # again, and nothing else
    assert "1.png" not in capsys.readouterr().out

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    images, wide = torch.randn(2, 3, *student.window), torch.randn(1, 3, 96, 208)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a cat"])
    assert torch.equal(model.encode_image(images), student.model.encode_image(images))
    assert torch.equal(model.encode_text(tokens), student.model.encode_text(tokens))
    again = load_backbone(folder)
    assert again.positions == positions
    for batch in (images, wide):
        assert torch.equal(again.encode_dense(batch), student.encode_dense(batch))

    for name, given in (("file", flags), ("student", ["--checkpoint", folder]),
                        ("backbone", ["--backbone", folder])):
        run(evaluate_ovs, *given, *own, tmp_path / name)
        assert ((tmp_path / name / "1.png.labels.png").read_bytes()
                == (tmp_path / "maps" / "1.png.labels.png").read_bytes())
    run(evaluate_ovs, "--checkpoint", folder, "--compare", *own, tmp_path / "compared")


def test_only_official_checkpoints_are_converted(micro, tmp_path):
    """Nor is a student that was trained here overwritten."""
    for flags in (["--backbone", micro], ["--checkpoint", tmp_path],
                  ["--backbone", micro, "--checkpoint", tmp_path]):
        with pytest.raises(UsageError, match="--save-student goes with"):
            run(evaluate_ovs, *flags, "--save-student", tmp_path)
    model = load_backbone(micro, text=True).model
    torch.save({f"model.{key}": value for key, value in model.state_dict().items()},
               tmp_path / "spar.ckpt")
    (tmp_path / "spar.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a student that distill.py trained"):
        run(evaluate_ovs, "--backbone", micro, "--checkpoint", tmp_path / "spar.ckpt",
            "--save-student", tmp_path)
