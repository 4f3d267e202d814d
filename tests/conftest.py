"""What tests share: stages run in this process or as commands, small backbones and images,
definitions that are computed step by step.

Nothing is downloaded. No extras/ are needed.
"""
import copy
import functools
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from common import load_backbone, window_starts
from data.files import RunError, UsageError, read_lines

# Of this process and of those that it starts: two threads spin longer than these small tensors
# take, and a resized image differs by a level here and there with their number.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent
MICRO = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": 3, "width": 32, "head_width": 16,
                       "patch_size": 16},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2,
                     "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]},
}

# flags of a small extraction
SMALL = ["--long-side", "160", "--short-side", "128", "--min-side", "64", "--stride", "24",
         "--versions", "2"]


def run(stage, *flags):
    """Run a stage in this process; what a command line turns into an exit code is an exception."""
    stage.main(stage.parse_args([str(flag) for flag in flags]))


def command(script, *flags, launcher=(), **options):
    """Start a stage as a user types it, to be stopped by Ctrl-C even if the tests run in the
    background of a shell. options: of subprocess.Popen."""
    usual = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True,
             "preexec_fn": functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / script), *map(str, flags)],
                            **(usual | options))


@pytest.fixture(scope="session")
def fork(tmp_path_factory):
    """A function that runs a stage in `world` new processes, and returns their exit codes and
    outputs. The last process gets a signal `after` seconds after `watched` holds `count` lines, or
    files if it is a folder."""
    log = tmp_path_factory.mktemp("forks") / "output"
    server = subprocess.Popen([sys.executable, ROOT / "tests" / "fork_server.py"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert server.stdout.readline() == "ready\n"

    def fork(stage, flags, world=1, number=0, after=0.0, watched=None, count=3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"stage": stage, "flags": [str(flag) for flag in flags], "folder": os.getcwd(),
               "world": world, "signal": number, "after": after, "watched": str(watched),
               "count": count, "log": str(log), "port": port}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        return codes, [Path(f"{log}.{rank}").read_text() for rank in range(world)]

    yield fork
    server.stdin.close()
    server.wait(timeout=60)


def finish(process, code=0):
    """Wait for a command and return what it printed."""
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def refusal(capsys, stage, *flags):
    """Return the exit code and the one line with which a stage ends."""
    try:
        run(stage, *flags)
    except UsageError as error:
        code, line = 2, str(error)
    except RunError as error:
        code, line = 1, str(error)
    except SystemExit as leaving:
        code, line = leaving.code, capsys.readouterr().err.rstrip("\n")
    else:
        pytest.fail("it was not refused")
    assert "\n" not in line
    return code, line


def files(folder):
    """Return {relative path: bytes} of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(folder):
    """Return the tensors of an open_clip folder, which may be a --backbone value."""
    folder = Path(str(folder).removeprefix("local-dir:"))
    return load_file(folder / "open_clip_model.safetensors")


def changed_parameters(before, after):
    """Return the names of the parameters that differ between two folders."""
    before, after = weights(before), weights(after)
    return {key for key in before if not torch.equal(before[key], after[key])}


def losses(folder):
    """Return the losses in a training's log."""
    return [entry["loss"] for entry in read_lines(folder / "log.jsonl")]


def results(path):
    """Return the results in a JSON file without what differs from run to run."""
    rows = json.loads(Path(path).read_text())["results"]
    return [{key: value for key, value in row.items() if key != "seconds_per_image"}
            for row in rows]


class Malicious:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pytest_configure(config):
    # on a CPU, also where there is a GPU; tests/gpu_check.py is for that
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    config.addinivalue_line("markers", "slow: over a second; -m \"not slow\" leaves these out")


@pytest.fixture(autouse=True)
def seed():
    """Random numbers that do not depend on which tests ran before."""
    torch.manual_seed(0)


# ---- models ----------------------------------------------------------------------------------

# SigLIP's images are squashed to a square, not cropped, when plain open_clip embeds them
PREPROCESSING = {"resize_mode": "squash", "interpolation": "bilinear"}

NATIVE = {
    "clipa": {"pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True},
    "avg": {"pool_type": "avg"},
    "coca": {"attentional_pool": True, "attn_pooler_heads": 2},
    "class token": {},
    "rectangle": {"image_size": [48, 96]},
    "patch 14": {"patch_size": 14, "image_size": 56},
    "layer scale": {"ls_init_value": 0.1},
}

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs pip install onnx onnxscript onnxruntime")


def shaken(backbone):
    """Random initialisation leaves biases and class tokens near zero; larger values make mistakes
    visible. (open_clip leaves the last projection of a CoCa's decoder uninitialised: NaN at times.)
    """
    torch.manual_seed(1)
    for parameter in backbone.parameters():
        parameter.data.nan_to_num_(0, 0, 0).clamp_(-9, 9).add_(0.02 * torch.randn_like(parameter))
    return backbone


def write_folder(folder, vision, **config):
    """Write an open_clip folder with random weights. vision overrides MICRO's tower, or replaces
    it by a timm one."""
    tower = vision if "timm_model_name" in vision else MICRO["model_cfg"]["vision_cfg"] | vision
    config = {"model_cfg": MICRO["model_cfg"] | {"vision_cfg": tower} | config,
              "preprocess_cfg": MICRO["preprocess_cfg"] | PREPROCESSING}
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = shaken(open_clip.create_model(f"local-dir:{folder}", load_weights=False,
                                          pretrained_text=False))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    """An open_clip folder with a native ViT of 3 blocks, patch 16, window 64, random weights: its
    --backbone value."""
    folder = tmp_path_factory.mktemp("micro")
    (folder / "open_clip_config.json").write_text(json.dumps(MICRO))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    # random initialisation leaves most positions and biases near zero; larger ones make
    # mistakes visible
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def backbone(micro):
    return load_backbone(micro, text=True)


# ---- images and stages -----------------------------------------------------------------------

@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Ten images of different sizes, two of them in a subfolder: a folder."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    rng = np.random.default_rng(1)
    for k in range(10):
        height, width = (int(side) for side in rng.integers(70, 170, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), np.uint8))
        coarse.resize((width, height), Image.BICUBIC).save(
            folder / ("sub" if k > 7 else "") / f"{k}.png")
    return folder


@pytest.fixture(scope="session")
def masks(photos, tmp_path_factory):
    """Masks for the photos, of three classes and pixels that are ignored: a folder."""
    folder, rng = tmp_path_factory.mktemp("masks"), np.random.default_rng(0)
    for path in sorted(photos.rglob("*.png")):
        mask = rng.choice(np.array([0, 1, 2, 255], np.uint8), Image.open(path).size[::-1])
        save_image(mask, folder / path.relative_to(photos))
    return folder


def save_image(array, path, mode=None, **options):
    """Save an array, with a palette if mode is "P", as VOC stores its labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tolist())
    image.save(path, **options)


def copy_files(source, folder, *names):
    """Copy some files of a folder to another one, and return that."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(source / name, folder)
    return folder


def extract(micro, photos, out, *flags):
    """Extract features of the photos with the small backbone."""
    import extract_teacher
    run(extract_teacher, "--images", photos, "--out", out, "--backbone", micro, *SMALL, *flags)


@pytest.fixture(scope="session")
def teacher(micro, photos, tmp_path_factory):
    """A folder of teacher features, which tests must not change."""
    out = tmp_path_factory.mktemp("stages") / "teacher"
    extract(micro, photos, out)
    return out


@pytest.fixture(scope="session")
def student(teacher):
    """The folder of a student of 3 epochs, which tests must not change."""
    import distill
    out = teacher.parent / "spar"
    run(distill, "--teacher", teacher, "--out", out, "--epochs", 3, "--lr", 1e-3)
    return out


# ---- definitions, step by step ----------------------------------------------------------------

def stitch_by_definition(maps, size, window, stride, cell, outputs):
    """Upsample each window's map, add it in place, divide by the counts, resize.
    maps: (n, i, j, C) float64."""
    window = [min(side, length) for side, length in zip(window, size)]
    total = torch.zeros(maps.shape[-1], size[0] // cell, size[1] // cell, dtype=torch.float64)
    counts = torch.zeros_like(total[0])
    starts = [(top, left) for top in window_starts(size[0], window[0], stride)
              for left in window_starts(size[1], window[1], stride)]
    for (top, left), features in zip(starts, maps, strict=True):
        up = F.interpolate(features.permute(2, 0, 1)[None], size=[side // cell for side in window],
                           mode="bilinear", align_corners=False)[0]
        place = (slice(top // cell, top // cell + up.shape[1]),
                 slice(left // cell, left // cell + up.shape[2]))
        total[:, *place] += up
        counts[place] += 1
    joined = (total / counts)[None]
    return F.interpolate(joined, size=outputs, mode="bilinear",
                         align_corners=False)[0].permute(1, 2, 0)


def bicubic(table, grid, new_grid):
    image = table.T.reshape(1, -1, *grid)
    return F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False,
                         antialias=False).flatten(2)[0].T


def timm_reference(visual, images, grid):
    """timm's own forward pass at the size of the images, with each patch then pooled as if it were
    the only one: (B, n, D)."""
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


def assert_equals_timm(backbone):
    """Compare the first blocks' features with timm's at the native grid and at others."""
    shaken(backbone)
    del backbone.blocks[4:]
    native = tuple(side // backbone.patch for side in backbone.window or (128, 128))
    for grid in (native, (5, 9), (3, 2), (1, 1)):
        images = torch.randn(1, 3, *(backbone.patch * side for side in grid))
        features = backbone.encode_dense(images)
        assert features.shape == (1, *grid, backbone.dim)
        expected = timm_reference(backbone.visual, images, grid)
        assert torch.allclose(features.flatten(1, 2), expected, atol=2e-5 * expected.abs().max())
