"""What tests share: stages run in this process or as commands, a small backbone and small images.

Nothing is downloaded.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from common import load_backbone

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
    """Start a stage as a user types it, with one thread. options: of subprocess.Popen."""
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / script), *map(str, flags)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def finish(process, code=0):
    """Wait for a command and return what it printed."""
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def files(folder):
    """Return {relative path: bytes} of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: over two seconds; -m \"not slow\" leaves these out")


@pytest.fixture(autouse=True)
def seed():
    """Random numbers that do not depend on which tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For comparisons to the last bit between processes: a resized image differs by a level here
    and there with the number of threads."""
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(threads)
    del os.environ["OMP_NUM_THREADS"]
    os.environ |= {"OMP_NUM_THREADS": variable} if variable else {}


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
