"""Distillation: what each variant trains, its losses, frozen blocks computed once, several
processes, interruptions."""
import functools
import json
import random
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import distill
import extract_teacher
import time_inference
from common import as_int8, load_backbone, open_features, start_runtime
from data.files import RunError, UsageError, read_index, read_lines
from conftest import SMALL, changed_parameters, extract, files, losses, run, weights

RECIPE = ["--epochs", "4", "--lr", "1e-3", "--save-every", "0"]


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """A student of 4 epochs, trained without an interruption, and its frozen tokens in a folder
    beside it."""
    out = tmp_path_factory.mktemp("distillation") / "whole"
    run(distill, "--teacher", teacher, "--out", out, *RECIPE,
        "--cache-frozen", out.parent / "tokens")
    return out


@pytest.fixture
def tokens(whole):
    """The flags that make a run use these tokens."""
    return ["--cache-frozen", whole.parent / "tokens"]


def saved_step(folder):
    return torch.load(folder / "training_state.pt", weights_only=True)["step"]


def assert_same_training(one, other):
    for kind in ("step", "epoch", "loss", "lr"):
        assert ([entry[kind] for entry in read_lines(one / "log.jsonl")]
                == [entry[kind] for entry in read_lines(other / "log.jsonl")])
    assert ((one / "open_clip_model.safetensors").read_bytes()
            == (other / "open_clip_model.safetensors").read_bytes())


# ---- what is trained, and how ----------------------------------------------------------------

def towers():
    """Small towers with timm's names of parameters, for SigLIP2, EVA02-CLIP and DINOv3."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer
    size = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2,
            "num_classes": 0}
    siglip = VisionTransformer(**size, global_pool="map", class_token=False)
    eva = Eva(**size, qkv_fused=False, swiglu_mlp=True, use_rot_pos_emb=True)
    rotary = Eva(**size, qkv_fused=True, use_abs_pos_emb=False, use_rot_pos_emb=True)
    return {"siglip": siglip, "eva": eva, "rotary": rotary}


EXPECTED = {  # of the last block, and of the tower
    ("siglip", "qkv"): {"attn.qkv.weight", "attn.qkv.bias"},
    ("siglip", "mlp"): {f"mlp.fc{k}.{kind}" for k in (1, 2) for kind in ("weight", "bias")},
    ("siglip", "pos-embed"): {"pos_embed"},
    ("siglip", "patch-embed"): {"patch_embed.proj.weight", "patch_embed.proj.bias"},
    ("eva", "qkv"): {"attn.q_proj.weight", "attn.q_proj.bias", "attn.k_proj.weight",
                     "attn.v_proj.weight", "attn.v_proj.bias"},
    ("eva", "mlp"): {f"mlp.{part}.{kind}"
                     for part in ("fc1", "fc2") for kind in ("weight", "bias")},
    ("eva", "pos-embed"): {"pos_embed"},
    ("rotary", "qkv"): {"attn.qkv.weight", "attn.q_bias", "attn.v_bias"},
    ("rotary", "patch-embed"): {"patch_embed.proj.weight", "patch_embed.proj.bias"},
}


@pytest.mark.parametrize("family, only", EXPECTED)
def test_parts_of_timm_towers_that_are_trained(family, only):
    trunk = towers()[family].requires_grad_(False)
    backbone = SimpleNamespace(blocks=trunk.blocks, visual=torch.nn.ModuleDict({"trunk": trunk}))
    in_blocks = only in ("qkv", "mlp")
    first, parameters = distill.select_trained(backbone, "1" if in_blocks else None, only)
    prefix = "blocks.2." if in_blocks else ""
    assert ({name for name, parameter in trunk.named_parameters() if parameter.requires_grad}
            == {prefix + name for name in EXPECTED[family, only]})
    assert len(parameters) == len(EXPECTED[family, only])
    assert first == (2 if in_blocks else None)


def test_a_part_that_is_not_there_is_refused():
    trunk = towers()["rotary"]
    with pytest.raises(UsageError, match="pos-embed"):
        distill.select_trained(SimpleNamespace(blocks=trunk.blocks, visual=trunk), None,
                               "pos-embed")


@pytest.mark.parametrize("flags, changed", [
    (["--train-only", "qkv"],
     {f"transformer.resblocks.{k}.attn.in_proj_{kind}"
      for k in (1, 2) for kind in ("weight", "bias")}),
    (["--train-only", "mlp", "--train-blocks", 1],
     {f"transformer.resblocks.2.mlp.{part}.{kind}"
      for part in ("c_fc", "c_proj") for kind in ("weight", "bias")}),
    (["--train-only", "patch-embed"], {"conv1.weight"}),
    (["--train-only", "pos-embed"], {"positional_embedding"}),
    (["--train-blocks", 1], "transformer.resblocks.2"),
    (["--train-blocks", 3], "transformer"),
    (["--train-blocks", "all"], ""),
])
def test_only_the_chosen_parameters_are_trained(teacher, micro, tmp_path, flags, changed):
    """changed: their names in the image tower, or what these begin with."""
    run(distill, "--teacher", teacher, "--out", tmp_path, "--epochs", 1, "--lr", 1e-3,
        "--cache-frozen", "off", *flags)
    if isinstance(changed, str):
        expected = {name for name in weights(micro) if name.startswith(f"visual.{changed}")}
    else:
        expected = {f"visual.{name}" for name in changed}
    assert changed_parameters(micro, tmp_path) == expected


def test_the_default_recipe_is_the_papers():
    recipe = distill.Recipe()
    assert (recipe.epochs, recipe.lr, recipe.schedule, recipe.weight_decay, recipe.batch_size,
            recipe.loss_of) == (10, 2e-5, "constant", 1e-4, 1, "feature")
    args = distill.parse_args(["--epochs", "3"])
    assert distill.choose_recipe(args, "siglip2", 1000, 2) == distill.Recipe(3, batch_size=2)
    small = distill.choose_recipe(args, "siglip2", 999, 1)  # a higher rate for few images
    assert small == distill.Recipe(3, 2e-4, "cosine")


def test_training_is_a_plain_loop(teacher, micro, tmp_path):
    """AdamW on the mean squared error of the last two blocks' features, image by image."""
    run(distill, "--teacher", teacher, "--out", tmp_path, "--epochs", 2, "--lr", 1e-3,
        "--schedule", "cosine", "--cache-frozen", "off", "--batch-size", 2)
    backbone, folder = load_backbone(micro), distill.Teacher(teacher)
    parameters = list(backbone.blocks[1:].requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-4, fused=True)
    for epoch in range(2):
        for step, pair in enumerate(distill.epoch_order(20, 2, 0, epoch), 10 * epoch):
            optimizer.zero_grad()
            for entry in (folder.entries[index] for index in pair):
                image = backbone.normalise(folder.image(entry))[None]
                target = torch.from_numpy(np.load(teacher / entry["file"])).float()
                (F.mse_loss(backbone.encode_dense(image)[0], target) / 2).backward()
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 + np.cos(np.pi * step / 20)) / 2
            optimizer.step()
    student = weights(tmp_path)
    for name, parameter in backbone.visual.named_parameters():
        assert torch.equal(student[f"visual.{name}"], parameter), name


def test_similarities_to_class_names_can_be_distilled(teacher, tmp_path):
    rng = torch.Generator().manual_seed(0)
    features, target, texts = (torch.randn(*shape, generator=rng)
                               for shape in ((3, 5, 24), (3, 5, 24), (7, 24)))
    naive = sum((F.cosine_similarity(features[i, j], texts[n], dim=0)
                 - F.cosine_similarity(target[i, j], texts[n], dim=0)) ** 2
                for i in range(3) for j in range(5) for n in range(7)) / 105
    loss = distill.distillation_loss(features, target, F.normalize(texts, dim=-1))
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    (tmp_path / "classes.txt").write_text("cat\ngrass, lawn\nsky\n")
    run(distill, "--teacher", teacher, "--out", tmp_path / "spar", "--epochs", 3, "--lr", 1e-3,
        "--loss", "similarity", "--classes", tmp_path / "classes.txt", "--cache-frozen", "off")
    log = losses(tmp_path / "spar")
    assert np.mean(log[-20:]) < 0.9 * np.mean(log[:20])


def test_images_are_rescaled_anew_in_each_epoch(micro, photos, tmp_path):
    """Every image is rescaled anew in each epoch, and maps are compared on the teacher's grid."""
    run(extract_teacher, "--images", photos, "--out", tmp_path / "single", "--backbone", micro,
        *SMALL, "--stride", 0)
    flags = ["--teacher", tmp_path / "single", "--epochs", 2, "--lr", 1e-3,
             "--random-scale", 0.5, 2]
    run(distill, "--out", tmp_path / "a", *flags)
    run(distill, "--out", tmp_path / "b", *flags)
    assert_same_training(tmp_path / "a", tmp_path / "b")
    assert not list((tmp_path / "single").glob("frozen*"))
    features, target = torch.randn(6, 2, 24), torch.randn(3, 5, 24)
    resized = torch.stack([F.interpolate(features[None, :, :, c][None], size=(3, 5),
                                         mode="bilinear")[0, 0] for c in range(24)], -1)
    assert (distill.distillation_loss(features, target).item()
            == pytest.approx(((resized - target) ** 2).mean().item(), rel=1e-5))


def test_random_scales_cover_their_range(teacher):
    recipe = distill.Recipe(epochs=8, random_scale=[0.5, 2])
    folder, areas = distill.Teacher(teacher), {}
    for batch in distill.batches(folder, None, recipe, start_runtime("cpu"), 0, workers=2):
        for entry, image, _, target in batch:
            assert all(side % 16 == 0 for side in image.shape[1:])
            area = image.shape[1] * image.shape[2] / (256 * target.shape[0] * target.shape[1])
            areas.setdefault(entry["file"], []).append(area)
    assert all(len(of_epochs) == 8 and len(set(of_epochs)) > 3 for of_epochs in areas.values())
    all_areas = np.concatenate(list(areas.values()))
    assert 0.2 < all_areas.min() < 0.4 and 3 < all_areas.max() < 5


@pytest.mark.parametrize("flags, message", [
    (["--train-blocks", 4], "from 1 to 3"),
    (["--train-only", "pos-embed", "--train-blocks", 2], "--train-blocks"),
    (["--loss", "similarity"], "--classes"),
    (["--classes", "cat, dog"], "--loss similarity"),
    (["--random-scale", 2, 1], "LO <= HI"),
])
def test_a_flag_that_cannot_work_is_named(teacher, tmp_path, flags, message):
    with pytest.raises(UsageError, match=message):
        run(distill, "--teacher", teacher, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_an_epoch_is_shared_out_whole():
    for count, batch, world in ((20, 2, 2), (21, 4, 2), (3, 6, 3)):
        alone = distill.epoch_order(count, batch, 5, 1)
        shares = [distill.epoch_order(count, batch, 5, 1, rank, world) for rank in range(world)]
        assert set(alone.flatten()) == set(range(count)) and len(alone) == -(-count // batch)
        assert np.array_equal(np.stack(shares, -1).reshape(alone.shape), alone)
        assert not np.array_equal(alone, distill.epoch_order(count, batch, 6, 1))


# ---- frozen blocks, computed once ------------------------------------------------------------

def test_stored_tokens_change_nothing_but_their_rounding(whole, teacher, micro, tmp_path):
    """float16 keeps 11 bits: the first loss is the same to 1e-4 of itself, all 80 to 1e-3, and
    the weights to 2 % of the way they moved."""
    run(distill, "--teacher", teacher, "--out", tmp_path, *RECIPE, "--cache-frozen", "off")
    stored, computed = (np.array(losses(folder)) for folder in (whole, tmp_path))
    difference = np.abs(stored / computed - 1)
    assert len(stored) == 80 and 0 < difference[0] < 1e-4 and difference.max() < 1e-3
    start, stored, computed = weights(micro), weights(whole), weights(tmp_path)
    moved = sum((computed[key] - start[key]).square().sum() for key in start).sqrt()
    apart = sum((computed[key] - stored[key]).square().sum() for key in start).sqrt()
    assert 0 < apart < 0.02 * moved


def test_later_runs_read_the_tokens_instead_of_images(whole, teacher, tokens, tmp_path,
                                                      monkeypatch):
    """And a training that is finished is not begun again."""
    assert len(list(tokens[1].rglob("*.npy"))) == 20 and not list(tokens[1].rglob(".tmp*"))
    decoded, image = [], distill.Teacher.image
    monkeypatch.setattr(distill.Teacher, "image", lambda *args: decoded.append(1) or image(*args))
    flags = ["--teacher", teacher, "--out", tmp_path, *RECIPE, *tokens]
    run(distill, *flags)
    assert len(decoded) == 1  # to learn how many tokens there are
    assert_same_training(whole, tmp_path)
    before = files(tmp_path)
    run(distill, *flags)
    assert files(tmp_path) == before


def test_tokens_of_other_settings_lie_apart(whole, teacher, tokens, tmp_path):
    (folder,) = tokens[1].iterdir()
    before = files(folder)
    run(distill, "--teacher", teacher, "--out", tmp_path, "--train-blocks", 1, "--epochs", 2,
        *tokens)
    assert len(list(tokens[1].iterdir())) == 2 and files(folder) == before
    with pytest.raises(UsageError, match="cache_frozen was True and is now False"):
        run(distill, "--teacher", teacher, "--out", whole, *RECIPE, "--cache-frozen", "off")


def test_the_reason_why_tokens_are_not_stored_is_printed(teacher, tmp_path, monkeypatch, capsys):
    def reason(*flags):
        run(distill, "--teacher", teacher, "--out", tmp_path / str(len(flags)), *flags)
        (line,) = [line for line in capsys.readouterr().out.splitlines()
                   if line.startswith("frozen tokens are not stored")]
        return line
    assert "once" in reason("--epochs", 1)
    assert "no block" in reason("--epochs", 1, "--train-blocks", "all")
    assert "--random-scale" in reason("--epochs", 1, "--random-scale", 1, 2)
    monkeypatch.setattr(distill, "free_bytes", lambda folder: 0)
    flags = ["--epochs", 2, "--batch-size", 20, "--train-blocks", 1]
    assert " GB" in reason(*flags)
    tokens = distill.frozen_tokens
    monkeypatch.setattr(distill, "frozen_tokens", lambda *args: 1e6 * tokens(*args))
    assert "too close to the largest float16" in reason(*flags, "--seed", 1)
    assert not list(tmp_path.rglob("*.npy"))
    with pytest.raises(RunError, match="--cache-frozen off"):  # where a folder is given
        reason(*flags, "--cache-frozen", tmp_path / "tokens", "--seed", 1, "--lr", 1e-3)


# ---- several processes, interruptions --------------------------------------------------------

@pytest.mark.slow
def test_a_training_interrupted_at_random_moments_ends_the_same(fork, whole, teacher, tmp_path):
    """SIGKILL, SIGTERM and SIGINT, each time the same command again: the weights and the log of
    the uninterrupted run, bit for bit. Tokens are stored meanwhile."""
    out = tmp_path / "spar"
    flags = ["--teacher", teacher, "--out", out, *RECIPE, "--cache-frozen", tmp_path / "tokens"]
    rng, log = random.Random(0), out / "log.jsonl"
    for _ in range(6):
        # at once, if the process before got there
        count = len(read_lines(log)) + rng.randrange(-2, 9)
        fork("distill", flags, number=signal.SIGKILL, after=rng.uniform(0, 0.03), watched=log,
             count=count)
    for number in (signal.SIGTERM, signal.SIGINT):
        codes, (output,) = fork("distill", flags, number=number, watched=log,
                                count=len(read_lines(log)) + 5)
        assert codes == [130] and "Traceback" not in output
        assert f"continue with: python distill.py --teacher {teacher} --out {out}" in output
    done = saved_step(out)
    codes, (output,) = fork("distill", flags)
    assert codes == [0] and f"continuing after step {done}" in output
    assert_same_training(whole, out)


@pytest.mark.slow
def test_two_processes_train_as_one_does_on_batches_of_two(fork, teacher, tokens, tmp_path):
    """Bit for bit; so does a run of which one process was killed or stopped, the other left with
    one line, and both started again."""
    flags = ["--teacher", teacher, *RECIPE, *tokens]
    assert fork("distill", [*flags, "--out", tmp_path / "one", "--batch-size", 2])[0] == [0]
    codes, outputs = fork("distill", [*flags, "--out", tmp_path / "two"], world=2)
    assert codes == [0, 0], outputs
    assert len(losses(tmp_path / "two")) == 40
    assert_same_training(tmp_path / "one", tmp_path / "two")
    for name, number, code in (("killed", signal.SIGKILL, -9), ("stopped", signal.SIGTERM, 130)):
        again = [*flags, "--out", tmp_path / name]
        codes, outputs = fork("distill", again, world=2, number=number,
                              watched=tmp_path / name / "log.jsonl")
        assert codes == [1, code] and "Traceback" not in outputs[0]
        assert outputs[0].count("error: ") == 1
        assert fork("distill", again, world=2)[0] == [0, 0]
        assert_same_training(tmp_path / "two", tmp_path / name)


@pytest.mark.slow
def test_shards_make_what_one_run_makes(fork, micro, photos, tmp_path):
    """Three machines on one disk, the second interrupted, begun at different times: each map has
    one writer."""
    flags = ["--images", photos, "--backbone", micro, *SMALL, "--out"]
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    run(extract_teacher, *flags, whole)
    run(extract_teacher, *flags, shared, "--shard", "2/3", "--limit", 10)
    (first, *_) = read_lines(shared / "index-2of3.jsonl")
    (shared / first["file"]).write_bytes(b"cut short")
    for shard in ("3/3", "1/3", "2/3"):
        codes, (output,) = fork("extract_teacher", [*flags, shared, "--shard", shard])
        assert codes == [0], output
    parts = [{entry["file"] for entry in read_lines(shared / f"index-{k}of3.jsonl")}
             for k in (1, 2, 3)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 20
    assert read_index(shared) == read_index(whole)
    assert files(shared / "features") == files(whole / "features")
    run(extract_teacher, *flags, shared)  # a run without --shard tidies up
    assert files(shared) == files(whole)


# ---- half precision ----------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_trains_and_resumes_to_the_same_bits(fork, teacher, tmp_path, precision):
    flags = ["--teacher", teacher, *RECIPE, "--precision", precision]
    assert fork("distill", [*flags, "--out", tmp_path / "whole"])[0] == [0]
    curve = losses(tmp_path / "whole")
    assert np.mean(curve[-20:]) < 0.9 * np.mean(curve[:20])
    again = [*flags, "--out", tmp_path / "killed"]
    codes, _ = fork("distill", again, number=signal.SIGKILL,
                    watched=tmp_path / "killed" / "log.jsonl", count=30)
    assert codes == [-signal.SIGKILL]
    codes, (output,) = fork("distill", again)
    assert codes == [0] and "continuing after step" in output
    assert_same_training(tmp_path / "whole", tmp_path / "killed")


def test_steps_whose_gradients_overflow_are_skipped_and_counted(teacher, micro, tmp_path,
                                                                monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0 ** 24)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    run(distill, "--teacher", teacher, "--out", tmp_path, "--epochs", 1, "--lr", 1e-3,
        "--precision", "fp16")
    log = read_lines(tmp_path / "log.jsonl")
    skipped = [entry["skipped"] for entry in log]
    assert skipped[0] == 1 and skipped[-1] == max(skipped) < 20  # the scale is halved each time
    assert np.isfinite([entry["loss"] for entry in log]).all()
    assert changed_parameters(micro, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_change_no_bit(micro, dtype):
    images = torch.randn(2, 3, 80, 64)
    with torch.autocast("cpu", dtype):
        expected = load_backbone(micro).encode_dense(images)
    backbone = load_backbone(micro)
    common.convert_weights(backbone.visual, dtype)
    assert backbone.blocks[0].mlp.c_fc.weight.dtype == dtype
    with torch.autocast("cpu", dtype):
        assert torch.equal(backbone.encode_dense(images), expected)
    assert time_inference.count_flops(backbone, (80, 64)) > 0
    common.convert_weights(torch.nn.MultiheadAttention(8, 2, kdim=12, vdim=12), dtype)  # CoCa's


# ---- from images, and smaller feature maps -----------------------------------------------------

def test_one_command_extracts_and_trains(micro, photos, tmp_path):
    run(extract_teacher, "--images", photos, "--backbone", micro, "--out", tmp_path / "a")
    run(distill, "--teacher", tmp_path / "a", "--out", tmp_path / "b", "--epochs", 1)
    run(distill, "--images", photos, "--backbone", micro, "--teacher", tmp_path / "c",
        "--out", tmp_path / "d", "--epochs", 1)
    assert_same_training(tmp_path / "b", tmp_path / "d")
    with pytest.raises(UsageError, match="--images"):
        run(distill, "--backbone", micro, "--teacher", tmp_path / "a")


def test_int8_feature_maps_are_close_and_teach_the_same(micro, photos, teacher, tmp_path):
    features = 3 * torch.randn(5, 7, 24)
    features[0, 0], features[1, 1] = 0, 1e-6 * features[1, 1]
    np.save(tmp_path / "a.npy", as_int8(features).numpy())
    restored = torch.from_numpy(open_features(tmp_path / "a.npy")).float()
    step = features.abs().amax(-1, keepdim=True) / 127
    assert ((restored - features).abs() <= 0.6 * step + 1e-7).all()

    run(extract_teacher, "--images", photos, "--backbone", micro, *SMALL, "--features", "int8",
        "--out", tmp_path / "int8")
    entries = read_index(tmp_path / "int8")
    for entry in entries:
        stored = np.load(tmp_path / "int8" / entry["file"])
        assert stored.dtype == np.int8 and stored.shape == (*entry["grid"], 24 + 2)
        small, large = (open_features(folder / entry["file"]).astype(float)
                        for folder in (tmp_path / "int8", teacher))
        assert np.linalg.norm(small - large) < 0.01 * np.linalg.norm(large)
    for name, folder in (("a", teacher), ("b", tmp_path / "int8")):
        run(distill, "--teacher", folder, "--out", tmp_path / name, "--epochs", 2, "--lr", 1e-3)
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=0.01)
    with pytest.raises(UsageError, match="features was 'int8'"):
        run(extract_teacher, "--images", photos, "--backbone", micro, *SMALL,
            "--out", tmp_path / "int8")


def test_a_bit_that_flipped_on_the_disk_is_noticed(teacher, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("frozen*"))
    path = folder / read_index(folder)[3]["file"]
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=path.name):
        run(distill, "--teacher", folder, "--out", tmp_path / "spar", "--epochs", 1)


def test_a_continued_run_has_the_threads_of_its_beginning(micro, photos, teacher, tmp_path):
    settings = json.loads((teacher / "teacher.json").read_text())
    assert settings["threads"] == 1
    shutil.copytree(teacher, tmp_path / "teacher")
    torch.set_num_threads(2)
    try:
        extract(micro, photos, tmp_path / "teacher")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
