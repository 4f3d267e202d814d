"""Every family of image towers against the library's own modules; text, students, official
checkpoints, precision."""
import copy
import json
import os
import re
import subprocess
import sys
import types

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import common
import evaluate_ovs
from common import DinoTxt, RunFailed, WrongCall, embed_texts, load_backbone, segment
from conftest import MICRO
from data.students import load_checkpoint
from test_stages import run


def shaken(backbone):
    """Random initialisation leaves biases and class tokens near zero; larger values make mistakes
    visible. (open_clip leaves the last projection of a CoCa's decoder as memory was: NaN at times.)
    """
    torch.manual_seed(1)
    for parameter in backbone.parameters():
        parameter.data.nan_to_num_(0, 0, 0).clamp_(-9, 9).add_(0.02 * torch.randn_like(parameter))
    return backbone


def bicubic(table, grid, new_grid):
    image = table.T.reshape(1, -1, *grid)
    return F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False,
                         antialias=False).flatten(2)[0].T


def timm_reference(visual, images, grid):
    """timm's own forward at the picture's size, with each patch then pooled as if it were the only
    one: (B, n, D)."""
    visual = copy.deepcopy(visual)
    trunk, prefix = visual.trunk, visual.trunk.num_prefix_tokens
    if hasattr(trunk, "patch_embed"):  # NaFlex towers take any size as they are
        table, native = trunk.pos_embed, trunk.patch_embed.grid_size
        visual.set_input_size(tuple(images.shape[-2:]))
        if table is not None:
            own = 0 if trunk.no_embed_class else prefix
            trunk.pos_embed = nn.Parameter(torch.cat(
                [table[:, :own], bicubic(table[0, own:], native, grid)[None]], 1))
    if trunk.global_pool == "token":
        count = prefix + grid[0] * grid[1]
        alone = torch.full((count, count), float("-inf")).fill_diagonal_(0)
        trunk.blocks[-1].register_forward_pre_hook(
            lambda block, args, kwargs: (args, {**kwargs, "attn_mask": alone}), with_kwargs=True)
    tokens = trunk.forward_features(images)
    patches = tokens[:, prefix:].flatten(0, 1)[:, None]
    if trunk.global_pool == "avg" and prefix:
        patches = torch.cat([tokens[:, :prefix].repeat_interleave(grid[0] * grid[1], 0), patches],
                            1)
    return visual.head(trunk.forward_head(patches)).unflatten(0, (len(images), -1))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", [
    "siglip2",
    "siglip2-naflex",
    "ViT-B-16-SigLIP",
    "ViT-B-16-SigLIP-384",
    "ViT-B-32-SigLIP2-256",
    "PE-Core-T-16-384",
    "EVA02-B-16",
    "MobileCLIP2-B",
    "vit_medium_patch16_gap_256",
    "ViTamin-S",
])
def test_timm_towers_equal_timms_modules(name):
    backbone = shaken(load_backbone(name, random_init=True))
    native = ((8, 8) if backbone.window is None
              else tuple(side // backbone.patch for side in backbone.window))
    for grid in (native, (5, 9), (3, 2), (1, 1)):
        images = torch.randn(1, 3, *(backbone.patch * side for side in grid))
        features = backbone.encode_dense(images)
        assert features.shape == (1, *grid, backbone.dim)
        expected = timm_reference(backbone.visual, images, grid)
        assert torch.allclose(
            features.flatten(1, 2), expected, atol=2e-5 * expected.abs().max()
        ), (grid, (features.flatten(1, 2) - expected).abs().max())


def write_folder(folder, vision, **config):
    """An open_clip folder with random weights; vision overrides MICRO's tower, or replaces it by a
    timm one."""
    tower = vision if "timm_model_name" in vision else MICRO["model_cfg"]["vision_cfg"] | vision
    config = {"model_cfg": MICRO["model_cfg"] | {"vision_cfg": tower} | config,
              "preprocess_cfg": MICRO["preprocess_cfg"]}
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = shaken(open_clip.create_model(f"local-dir:{folder}", load_weights=False,
                                          pretrained_text=False))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


NATIVE = {
    "clipa": {"pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True},
    "avg": {"pool_type": "avg"},
    "coca": {"attentional_pool": True, "attn_pooler_heads": 2},
    "class token": {},
    "rectangle": {"image_size": [48, 96]},
    "patch 14": {"patch_size": 14, "image_size": 56},
    "layer scale": {"ls_init_value": 0.1},
}


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


@torch.no_grad()
@pytest.mark.parametrize("case", ["avg", "clipa"])
def test_patches_of_an_averaged_tower_are_what_its_embedding_is_the_mean_of(case, tmp_path):
    backbone = load_backbone(
        write_folder(tmp_path, NATIVE[case] | {"final_ln_after_pool": False}), text=True)
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(backbone.encode_dense(images).mean((1, 2)),
                          backbone.model.encode_image(images), atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_naflex_positions_equal_transformers():
    """timm's tower and transformers' interpolate the same table to the same positions, at sizes
    that are not square too."""
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings
    embeds = load_backbone("siglip2-naflex", random_init=True).trunk.embeds
    for grid in ((16, 16), (8, 8), (20, 13), (5, 40)):
        theirs = Siglip2VisionEmbeddings.resize_positional_embeddings(
            embeds.pos_embed[0], torch.tensor([grid]), max_length=grid[0] * grid[1])
        tokens = torch.zeros(1, grid[0] * grid[1], embeds.pos_embed.shape[-1])
        embeds._apply_learned_pos_embed(tokens, grid_size=list(grid))
        assert torch.allclose(tokens, theirs, atol=1e-5)


# ---- text, students, checkpoints -----------------------------------------------------------------

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
    return write_folder(
        folder,
        {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map",
         "timm_proj": "none"},
        embed_dim=96, text_cfg=text, custom_text=True)


@torch.no_grad()
def test_own_tokenizer_and_text_equal_open_clips(siglip):
    backbone = load_backbone(siglip, text=True)
    names = ["cat", "a photo of the dog"]
    theirs = open_clip.build_zero_shot_classifier(
        backbone.model, open_clip.get_tokenizer(siglip), names,
        open_clip.OPENAI_IMAGENET_TEMPLATES)
    assert torch.allclose(embed_texts(backbone, names), theirs.T, atol=1e-6)


def test_text_tower_is_loaded_where_text_is_needed_only(siglip, monkeypatch):
    lean, whole = load_backbone(siglip), load_backbone(siglip, text=True)
    assert (lean.model is None
            and sum(p.numel() for p in lean.parameters())
            == sum(p.numel() for p in whole.visual.parameters()))
    images = torch.randn(1, 3, 96, 160)
    assert torch.equal(lean.encode_dense(images), whole.encode_dense(images))


@torch.no_grad()
def test_a_tokenizer_without_an_end_token_is_fine(siglip, tmp_path):
    """As CLIPA's, which is BERT's."""
    import shutil
    shutil.copytree(siglip.removeprefix("local-dir:"), tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items()
                                if key != "eos_token"}))
    assert embed_texts(load_backbone(tmp_path / "model"), ["cat"]).shape == (1, 96)


@pytest.mark.parametrize("change", [{"padding_side": "left"}, {"eos": False}])
def test_a_tokenizer_that_would_feed_garbage_is_refused(siglip, tmp_path, change):
    import shutil
    source = siglip.removeprefix("local-dir:")
    shutil.copytree(source, tmp_path / "model")
    path = tmp_path / "model" / ("tokenizer_config.json" if "padding_side" in change
                                 else "tokenizer.json")
    config = json.loads(path.read_text())
    if "padding_side" in change:
        config["padding_side"] = "left"
    else:
        config["post_processor"] = None
    path.write_text(json.dumps(config))
    with pytest.raises(RunFailed, match="pads on the left or ends no text"):
        embed_texts(load_backbone(tmp_path / "model", text=True), ["cat"])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("tower", ["native", "timm"])
def test_student_folder_is_plain_open_clip(tower, micro, siglip, tmp_path):
    """A student that was loaded without text, in a process that does not know this repository:
    equal image and text features."""
    source = {"native": micro, "timm": siglip}[tower]
    student = shaken(load_backbone(source))
    student.save(tmp_path / "student")
    images = torch.randn(2, 3, *student.window)
    torch.save(images, tmp_path / "images.pt")
    script = ("import torch, open_clip; torch.set_grad_enabled(False); "
              "model, _, preprocess = "
              "open_clip.create_model_and_transforms('local-dir:student'); model.eval();"
              "tokens = open_clip.get_tokenizer('local-dir:student')(['a cat']); "
              "print(preprocess.transforms[-1].mean);"
              "torch.save((model.encode_image(torch.load('images.pt')), "
              "model.encode_text(tokens)), 'out.pt')")
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True,
                         capture_output=True, text=True,
                         env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    image_features, text_features = torch.load(tmp_path / "out.pt")
    teacher = load_backbone(source, text=True)
    teacher.visual.load_state_dict(student.visual.state_dict())
    assert torch.equal(image_features, teacher.model.encode_image(images))
    assert torch.equal(
        text_features, teacher.model.encode_text(open_clip.get_tokenizer(source)(["a cat"])))
    assert "0.5, 0.4, 0.3" in run.stdout  # the normalisation went with it
    again = load_backbone(tmp_path / "student", text=True)
    assert torch.equal(again.encode_dense(images), student.encode_dense(images))
    assert torch.equal(embed_texts(again, ["cat"]), embed_texts(teacher, ["cat"]))


@pytest.fixture(scope="module")
def two_text_towers(tmp_path_factory):
    """Folders of a CoCa, whose text tower is followed by a decoder, and of a model whose text tower
    is one of transformers: {name: (folder, what is asked of its text)}."""
    from transformers import BertConfig
    coca = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2,
            "layers": 1, "embed_cls": True, "output_tokens": True}
    decoder = {"context_length": 24, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1}
    bert = tmp_path_factory.mktemp("bert")
    BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
               intermediate_size=32).save_pretrained(bert)
    hugging = {"hf_model_name": str(bert), "hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp"}
    pooled = NATIVE["coca"] | {"output_tokens": True}
    return {"coca": write_folder(tmp_path_factory.mktemp("coca"), pooled, custom_text=True,
                                 text_cfg=coca, multimodal_cfg=decoder),
            "hugging face": write_folder(tmp_path_factory.mktemp("hf"), {}, text_cfg=hugging)}


@torch.no_grad()
@pytest.mark.parametrize("name", ["coca", "hugging face"])
def test_students_with_other_text_towers_come_back(name, two_text_towers, tmp_path):
    """Loaded without text, trained, saved and loaded by open_clip: both towers as they were."""
    source = two_text_towers[name]
    student = shaken(load_backbone(source))
    assert student.model is None
    student.save(tmp_path)
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    before = open_clip.create_model(source).eval()
    images, tokens = torch.randn(2, 3, 64, 64), torch.randint(1, 60, (2, 24))
    saved = model.state_dict()
    for key, value in student.visual.state_dict().items():
        assert torch.equal(saved[f"visual.{key}"], value), key
    texts = {key: value for key, value in before.state_dict().items()
             if not key.startswith("visual.")}
    assert texts and all(torch.equal(saved[key], value) for key, value in texts.items())
    assert torch.equal(model.encode_text(tokens), before.encode_text(tokens))
    assert not torch.equal(model.encode_image(images), before.encode_image(images))
    again = load_backbone(tmp_path)
    assert torch.equal(again.encode_dense(images), student.encode_dense(images))


def test_random_init_of_a_hub_model_fetches_its_configuration_alone(tmp_path, monkeypatch):
    """No weights are asked for, so none may be downloaded."""
    fetched = []

    def download(repository, filename=None, **_):
        fetched.append((repository, filename))
        (tmp_path / "open_clip_config.json").write_text(json.dumps(MICRO))
        return str(tmp_path / "open_clip_config.json")
    for module in (open_clip.pretrained, open_clip.factory):
        monkeypatch.setattr(module, "download_pretrained_from_hf", download)
    assert load_backbone("hf-hub:nobody/micro", random_init=True).dim == 24
    assert fetched == [("nobody/micro", "open_clip_config.json")]


def test_a_student_is_saved_with_its_preprocessing(tmp_path):
    """SigLIP's pictures are squashed to a square, not cropped, when plain open_clip embeds them."""
    published = common.model_config("siglip2")["preprocess_cfg"]
    assert published["resize_mode"] == "squash" and set(published) <= set(common.PREPROCESS)
    source = write_folder(tmp_path / "source", {})
    path = tmp_path / "source" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["preprocess_cfg"] |= {"resize_mode": "squash", "interpolation": "bilinear"}
    path.write_text(json.dumps(config))
    load_backbone(source).save(tmp_path / "student")
    saved = json.loads((tmp_path / "student" / "open_clip_config.json").read_text())
    assert saved["preprocess_cfg"] == config["preprocess_cfg"]


def test_library_code_speaks_python_and_a_stage_flags(capsys):
    import time_inference
    with pytest.raises(WrongCall, match="^`backbone` no-such-model: unknown"):
        load_backbone("no-such-model")
    with pytest.raises(WrongCall, match="^--backbone no-such-model: unknown"):
        time_inference.main(time_inference.parse_args(["--backbone", "no-such-model"]))


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, subprocess.call, eval])
def test_nothing_in_a_checkpoint_is_executed(function, backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("open('executed', 'w')" if function is eval
               else ["touch", "executed"] if function is subprocess.call else "touch executed")
    torch.save({"state_dict": {}, "callbacks": Malicious(function, command)}, "evil.ckpt")
    with pytest.raises(RunFailed):  # refused, or read as holding no weights
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
    elsewhere = types.ModuleType("lightning_of_yesterday")
    elsewhere.Hyper = type("Hyper", (), {"__module__": "lightning_of_yesterday"})
    monkeypatch.setitem(sys.modules, "lightning_of_yesterday", elsewhere)
    hyper = elsewhere.Hyper()
    hyper.lr = 2e-5
    wrapped = ({"state_dict": state, "hyper_parameters": hyper, "epoch": 9}
               if prefix.startswith("segmentor") else state)
    torch.save(wrapped, "spar.ckpt")
    monkeypatch.delitem(sys.modules, "lightning_of_yesterday")
    student = load_backbone(micro, text=True)
    load_checkpoint(student, "spar.ckpt")
    images = torch.randn(1, 3, 96, 64)
    assert torch.equal(student.encode_dense(images), teacher.encode_dense(images))
    assert torch.equal(
        embed_texts(student, ["cat"]),
        embed_texts(teacher if towers == "both" else load_backbone(micro, text=True), ["cat"]))

    name = prefix + "visual.conv1.weight"
    torch.save({key: value for key, value in state.items() if key != name}
               | {prefix + "visual.extra": torch.zeros(1), prefix + "visual.proj": torch.zeros(2)},
               "bad.ckpt")
    with pytest.raises(RunFailed, match="1 missing .*conv1.weight.*1 unknown .*extra"
                                        ".*1 of another shape .*proj"):
        load_checkpoint(student, "bad.ckpt")
    lean = load_backbone(micro)
    load_checkpoint(lean, "spar.ckpt")
    assert torch.equal(lean.encode_dense(images), teacher.encode_dense(images))
    for value in (["no state dict"], {"epoch": 1}, {"state_dict": [1]}):
        torch.save(value, "other.ckpt")
        with pytest.raises(RunFailed, match="other.ckpt holds no state dict"):
            load_checkpoint(student, "other.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "spar.ckpt").read_bytes()[:2000])
    with pytest.raises(RunFailed, match="cut.ckpt cannot be read as weights"):
        load_checkpoint(student, "cut.ckpt")


def bicubic_by_scale(table, old, new):
    """A table (old, C) sampled along its axis at steps of old / (new + 0.1), by Keys' kernel of
    -0.75: the published interpolation, written out."""
    places = (torch.arange(new, dtype=torch.float64) + 0.5) * old / (new + 0.1) - 0.5
    sampled = torch.zeros(new, table.shape[1], dtype=torch.float64)
    for near in range(-1, 3):
        neighbour = places.floor() + near
        d = (places - neighbour).abs()
        weight = torch.where(d <= 1, 1.25 * d ** 3 - 2.25 * d ** 2 + 1,
                             -0.75 * (d ** 3 - 5 * d ** 2 + 8 * d - 4))
        sampled += weight[:, None] * table[neighbour.clamp(0, old - 1).long()]
    return sampled


@pytest.mark.parametrize("grid", [(14, 28), (42, 63), (5, 9), (1, 1), (14, 14)])
def test_positions_of_the_authors_openclip_students(grid):
    table = torch.randn(14 * 14, 8, dtype=torch.float64)
    rows = bicubic_by_scale(table.view(14, -1), 14, grid[0])
    columns = rows.view(grid[0], 14, 8).transpose(0, 1).reshape(14, -1)
    expected = bicubic_by_scale(columns, 14, grid[1]).view(grid[1], grid[0], 8).transpose(0, 1)
    if grid == (14, 14):
        expected = table
    scaled = common.resize_positions(table, (14, 14), grid, "scale")
    assert torch.allclose(scaled, expected.reshape(-1, 8), atol=1e-5)
    by_size = common.resize_positions(table, (14, 14), grid)
    assert torch.equal(by_size, scaled) == (grid == (14, 14))


@pytest.fixture
def official(request, micro, tmp_path):
    """A student in the authors' layout, from random weights, of a native tower or of SigLIP's:
    (the backbone's name, the checkpoint, the student)."""
    source = micro if request.param == "native" else request.getfixturevalue("siglip")
    student = shaken(load_backbone(source, text=True))
    torch.save({"state_dict": {f"segmentor.net.model.{key}": value
                               for key, value in student.model.state_dict().items()}},
               tmp_path / "spar.ckpt")
    return source, tmp_path / "spar.ckpt", student


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("official, rule, positions", [
    ("native", [], "scale"), ("native", ["--positions", "size"], "size"), ("timm", [], "size"),
], indirect=["official"])
def test_an_official_checkpoint_becomes_a_folder(official, rule, positions, photos, tmp_path,
                                                 capsys):
    """Evaluated, converted, loaded by plain open_clip and as --backbone: equal features, and
    positions by the rule that it was trained with, which is said."""
    source, checkpoint, student = official
    student.positions = positions
    folder, own = tmp_path / "converted", ["--images", photos / "1.png", "--classes", "cat, dog",
                                           "--state", tmp_path / "state", "--save-maps"]
    flags = ["--backbone", source, "--checkpoint", checkpoint, *rule]
    run(evaluate_ovs, *flags, "--save-student", folder, *own, tmp_path / "maps")
    out = capsys.readouterr().out
    how = "by size" if positions == "size" else "by a scale factor of (grid + 0.1)"
    assert how in out and f"student in {folder}: open_clip.create_model_and_transforms" in out
    run(evaluate_ovs, *flags, "--save-student", folder)  # again, and nothing else
    assert "1.png" not in capsys.readouterr().out
    config = json.loads((folder / "open_clip_config.json").read_text())
    assert config.get("positions", "size") == positions

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    images = torch.randn(2, 3, *student.window)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a cat"])
    assert torch.equal(model.encode_image(images), student.model.encode_image(images))
    assert torch.equal(model.encode_text(tokens), student.model.encode_text(tokens))
    again = load_backbone(folder)
    assert (how in capsys.readouterr().err) == (positions == "scale")
    wide = torch.randn(1, 3, 96, 208)
    for each in (images, wide):
        assert torch.equal(again.encode_dense(each), student.encode_dense(each))
    again.positions = "size"
    assert torch.equal(again.encode_dense(wide), student.encode_dense(wide)) == (
        positions == "size")

    for name, given in (("file", flags), ("student", ["--checkpoint", folder]),
                        ("backbone", ["--backbone", folder])):
        run(evaluate_ovs, *given, *own, tmp_path / name)
        assert ((tmp_path / name / "1.png.labels.png").read_bytes()
                == (tmp_path / "maps" / "1.png.labels.png").read_bytes())
    run(evaluate_ovs, "--checkpoint", folder, "--compare", *own, tmp_path / "compared")


def test_only_official_checkpoints_are_converted(micro, siglip, tmp_path):
    """Nor is a student that was trained here overwritten."""
    for flags in (["--backbone", micro], ["--checkpoint", tmp_path],
                  ["--backbone", micro, "--checkpoint", tmp_path]):
        for flag in (["--save-student", tmp_path], ["--positions", "size"]):
            with pytest.raises(WrongCall, match=f"{flag[0]} goes with an official checkpoint"):
                run(evaluate_ovs, *flags, *flag)
    model = load_backbone(micro, text=True).model
    torch.save({f"model.{key}": value for key, value in model.state_dict().items()},
               tmp_path / "spar.ckpt")
    (tmp_path / "spar.json").write_text("{}")
    with pytest.raises(WrongCall, match="holds a student that distill.py trained"):
        run(evaluate_ovs, "--backbone", micro, "--checkpoint", tmp_path / "spar.ckpt",
            "--save-student", tmp_path)
    path = tmp_path / "model" / "open_clip_config.json"
    load_backbone(micro).save(path.parent)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"positions": "by magic"}))
    with pytest.raises(RunFailed, match="'by magic'; known are size and scale"):
        load_backbone(path.parent)


@pytest.mark.parametrize("error, said", [
    ("401 Client Error. Cannot access gated repo for url", "accept its licence"),
    ("Model has been downloaded but the SHA256 checksum does not not match", "checksum"),
    (OSError(28, "No space left on device"), "No space left"),
])
def test_failed_downloads_end_in_one_line(monkeypatch, error, said):
    def download(*args, **kwargs):
        raise error if isinstance(error, OSError) else RuntimeError(error)
    monkeypatch.setattr("open_clip.download_pretrained", download)
    with pytest.raises(RunFailed, match=said) as caught:
        load_backbone("siglip2")
    assert "\n" not in str(caught.value) and "local-dir:FOLDER" in str(caught.value)


SIGLIP, CLIP = (0.5, 0.5, 0.5), (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.parametrize("name, mean", [
    ("siglip2", SIGLIP),
    ("siglip2-naflex", SIGLIP),
    ("openclip", CLIP),
    ("PE-Core-T-16-384", SIGLIP),
    ("ViT-B-32/openai", CLIP),
])
def test_pictures_are_normalised_as_the_weights_were_trained(name, mean):
    assert torch.allclose(load_backbone(name, random_init=True).mean.flatten(), torch.tensor(mean),
                          atol=1e-6)


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


@pytest.mark.slow
def test_every_plain_vit_of_open_clip_works_and_its_window_is_whole_patches(capsys):
    from extract_teacher import list_backbones
    list_backbones()
    lines = capsys.readouterr().out.splitlines()
    refused = [line.split()[0] for line in lines if " no: " in line]
    assert all(name.startswith(("convnext", "RN", "swin", "MobileCLIP-S", "MobileCLIP2-S",
                                "vit_relpos")) for name in refused), refused
    for line in lines[:-1]:
        if " no: " not in line:
            patch, height, width = (
                int(number)
                for number in re.search(r"patch (\d+), (\d+) x (\d+)", line).groups())
            assert height % patch == width % patch == 0, line
    assert lines[-1].startswith(
        f"{len(open_clip.list_models()) - len(refused)} of {len(open_clip.list_models())} ")


def test_readme_snippet_runs(monkeypatch):
    from pathlib import Path
    root = Path(__file__).resolve().parent.parent
    snippet = re.search(r"## From Python\n\n```python\n(.*?)```", (root / "README.md").read_text(),
                        re.S).group(1)
    monkeypatch.chdir(root)
    names = {}
    exec(snippet.replace('"runs/spar"', '"tiny"'), names)
    height, width = names["image"].size[::-1]
    assert (names["labels"].shape == (height, width)
            and names["features"].shape[:2] == (round(height / 16), round(width / 16)))


def test_what_cannot_work_is_refused_with_its_reason():
    for name, reason in (("RN50", "ResNet"),
                         ("convnext_base", "hierarchical"),
                         ("swin_base_patch4_window7_224", "hierarchical"),
                         ("MobileCLIP-S1", "hierarchical"),
                         ("vit_relpos_medium_patch16_cls_224", "relative positions")):
        with torch.device("meta"), pytest.raises(WrongCall, match=f"`backbone` {name}: .*{reason}"):
            load_backbone(name, random_init=True, device="meta")


# ---- precision -----------------------------------------------------------------------------------

@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["openclip", "siglip2", "EVA02-B-16"])
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_stays_within_bounds(name, dtype, bound):
    """Relative error of the features (norm of the difference by the norm), non-square, through
    twelve blocks."""
    backbone = load_backbone(name, random_init=True)
    images = torch.randn(1, 3, 96, 160)
    exact = backbone.encode_dense(images)
    with torch.autocast("cpu", dtype):
        half = backbone.encode_dense(images).float()
    error = ((half - exact).norm() / exact.norm()).item()
    assert 0 < error < bound, error


# ---- DINOv3.txt ----------------------------------------------------------------------------------

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
    from PIL import Image
    from safetensors.torch import load_file
    assert segment(dinov3, Image.new("RGB", (100, 70)), ["cat", "sky"]).shape == (70, 100)
    dinov3.save(tmp_path)
    dinov3.model.load_state_dict(load_file(tmp_path / common.DINOV3), strict=True)


def test_dinov3txt_says_what_it_needs(tmp_path, monkeypatch):
    with pytest.raises(WrongCall, match="`dinov3_weights` .*`hub_dir`"):
        load_backbone("dinov3txt")
    with pytest.raises(WrongCall, match="no such file"):
        load_backbone("dinov3txt", dinov3_weights=(tmp_path / "a.pth", tmp_path / "b.pth"))
    for module in [module for module in sys.modules if module.startswith("dinov3")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(
        sys, "path", [path for path in sys.path if path != os.environ.get("SPAR_DINOV3_DIR")])
    with pytest.raises(WrongCall, match="holds no hubconf.py"):
        load_backbone("dinov3txt", random_init=True, hub_dir=tmp_path)
    (tmp_path / "dinov3").mkdir()
    (tmp_path / "dinov3" / "hubconf.py").touch()
    with pytest.raises(RunFailed, match="public code cannot be used.*`hub_dir`"):
        load_backbone("dinov3txt", random_init=True, hub_dir=tmp_path)
