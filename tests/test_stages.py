"""The commands: what they write, and that an interrupted one resumes to the same bytes."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import jaccard_score

import distill
import evaluate_ovs
import time_inference
from conftest import ROOT, SMALL, command, extract, files, finish, run
from data.files import UsageError, read_lines

STAGES = ("extract_teacher", "distill", "evaluate_ovs", "evaluate_probes", "time_inference")


# ---- what they write -------------------------------------------------------------------------

def test_extract_writes_a_feature_map_per_version(teacher, backbone):
    index = read_lines(teacher / "index.jsonl")
    images = [f"{k}.png" for k in range(8)] + ["sub/8.png", "sub/9.png"]
    assert ([(entry["image"], entry["version"]) for entry in index]
            == [(image, version) for image in images for version in (0, 1)])
    for entry in index:
        assert entry["file"] == f"features/{entry['image']}{'.1' if entry['version'] else ''}.npy"
        features = np.load(teacher / entry["file"], allow_pickle=False)
        assert features.dtype == np.float16 and features.shape == (*entry["grid"], backbone.dim)
        assert features.flags.c_contiguous
    settings = json.loads((teacher / "teacher.json").read_text())
    assert settings.keys() == {
        "backbone", "random_init", "hub_dir", "dinov3_weights", "weights", "stride", "window",
        "augment", "versions", "seed", "precision", "compile", "images", "patch", "dim", "maps",
        "torch", "open_clip"}
    assert settings["maps"] == 20 and not (teacher / "failures.jsonl").exists()


def changed_parameters(teacher, student):
    """Return the names of the parameters that distillation changed."""
    settings = json.loads((teacher / "teacher.json").read_text())
    folder = Path(settings["backbone"].removeprefix("local-dir:"))
    before, after = (load_file(path / "open_clip_model.safetensors") for path in (folder, student))
    return {key for key in before if not torch.equal(before[key], after[key])}, set(before)


def test_distill_learns_and_writes_a_student(student, teacher):
    log = read_lines(student / "log.jsonl")
    assert [entry["step"] for entry in log] == list(range(1, 61))
    assert {"step", "epoch", "loss", "lr", "seconds"} == log[0].keys()
    first, last = (np.mean([entry["loss"] for entry in log if entry["epoch"] == epoch])
                   for epoch in (0, 2))
    assert last < 0.9 * first
    assert {"open_clip_config.json", "open_clip_model.safetensors", "spar.json", "log.jsonl",
            "loss.png"} <= {path.name for path in student.iterdir()}
    changed, names = changed_parameters(teacher, student)
    last_blocks = ("visual.transformer.resblocks.1.", "visual.transformer.resblocks.2.")
    assert changed == {name for name in names if name.startswith(last_blocks)}


@pytest.mark.parametrize("blocks, frozen", [
    ("1", "visual.transformer.resblocks.1."), ("3", "visual.conv1."), ("all", "transformer.")])
def test_train_blocks(teacher, tmp_path, blocks, frozen):
    run(distill, "--teacher", teacher, "--out", tmp_path, "--epochs", 1, "--train-blocks", blocks,
        "--lr", 1e-3, "--cache-frozen", "off")
    changed, _ = changed_parameters(teacher, tmp_path)
    assert changed and not any(name.startswith(frozen) for name in changed)
    assert ("visual.conv1.weight" in changed) == (blocks == "all")


def test_evaluation_agrees_with_scikit_learn(student, photos, tmp_path):
    masks, rng = tmp_path / "masks", np.random.default_rng(0)
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    for name in names:
        mask = rng.choice(np.array([0, 1, 2, 255], np.uint8), Image.open(photos / name).size[::-1])
        (masks / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(masks / name)
    (tmp_path / "classes.txt").write_text("cat\ngrass, lawn\nsky\nnever there\n")
    run(evaluate_ovs, "--checkpoint", student, "--compare", "--stride", 32, 24, "--images", photos,
        "--masks", masks, "--classes", tmp_path / "classes.txt", "--json", tmp_path / "out.json",
        "--save-maps", tmp_path / "maps", "--state", tmp_path / "state")
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert ([row["method"] for row in rows]
            == ["single-pass", "sliding-window/32", "sliding-window/24", "spar"])

    def pixels(folder, suffix=""):
        return np.concatenate([np.asarray(Image.open(folder / f"{name}{suffix}")).ravel()
                               for name in names])
    labels = pixels(masks)
    kept = labels != 255
    for row in rows:
        predicted = pixels(tmp_path / "maps" / row["method"].replace("/", "-"), ".labels.png")
        present = sorted(set(labels[kept]) | set(predicted[kept]))
        assert row["miou"] == pytest.approx(100 * jaccard_score(
            labels[kept], predicted[kept], labels=present, average="macro"))
        assert row["images"] == 10 and row["seconds_per_image"] > 0
        assert list(row["per_class_iou"]) == ["cat", "grass", "sky", "never there"]
    assert len(list((tmp_path / "maps" / "spar").rglob("*.png"))) == 30


def test_own_images_with_free_names(student, photos, tmp_path, capsys):
    run(evaluate_ovs, "--checkpoint", student, "--images", photos / "3.png", "--state",
        tmp_path / "state", "--classes", "cat, grass | lawn, sky", "--save-maps", tmp_path / "maps")
    assert (sorted(path.name for path in (tmp_path / "maps").iterdir())
            == ["3.png.labels.png", "3.png.overlay.png", "3.png.pca.png", "shares.csv",
                "sheet.png"])
    labels = Image.open(tmp_path / "maps" / "3.png.labels.png")
    assert labels.mode == "P" and labels.size == Image.open(photos / "3.png").size
    assert np.asarray(labels).max() < 3
    shares = capsys.readouterr().out.split("3.png (spar): ")[1].splitlines()[0]
    total = sum(float(part.split()[-2]) for part in shares.split(", "))
    assert total == pytest.approx(100, abs=0.2)


@pytest.mark.slow
def test_timing_table(micro, tmp_path):
    run(time_inference, "--backbone", micro, "--sizes", "64x64", "130x90", "--strides", 0, 24,
        "--warmup", 1, "--repeats", 3, "--json", tmp_path / "t.json", "--plot", tmp_path / "t.png")
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [(row["method"], row["height"], row["width"], row["windows"]) for row in rows] == [
        ("single-pass", 64, 64, 1), ("sliding-window/24", 64, 64, 1),
        ("single-pass", 128, 96, 1), ("sliding-window/24", 128, 96, 12)]
    assert rows[3]["tflop"] == pytest.approx(12 * rows[0]["tflop"])
    assert all(row["ms"] > 0 and row["ms_median"] > 0 for row in rows)
    assert (tmp_path / "t.png").stat().st_size > 1000


def test_growth_is_the_exponent_of_a_power_law():
    rows = [{"method": "single-pass", "height": side, "width": 2 * side,
             "ms_median": 3 * (2 * side ** 2) ** 1.7} for side in (64, 128, 320)]
    assert (time_inference.growth([*rows, rows[0] | {"method": "measured once"}])
            == {"single-pass": pytest.approx(1.7)})


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")),
                    reason="torch.compile needs a C++ compiler")
def test_compiled_features_are_the_same(micro, photos, teacher, tmp_path):
    extract(micro, photos, tmp_path, "--compile", "--limit", 2, "--versions", 1)
    for name in ("0.png.npy", "1.png.npy"):
        compiled, expected = (np.load(out / "features" / name) for out in (tmp_path, teacher))
        assert np.allclose(compiled, expected, atol=2e-3)


def test_compile_without_a_compiler_is_refused(micro, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="--compile"):
        extract(micro, photos, tmp_path / "t", "--compile")


# ---- the command line ------------------------------------------------------------------------

@pytest.fixture
def without_torch(tmp_path):
    """The environment of a command that may not import torch."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    return os.environ | {"PYTHONPATH": str(tmp_path)}


def answer(stage, *flags, env):
    """Return a command's exit code, output and errors."""
    process = subprocess.run([sys.executable, str(ROOT / f"{stage}.py"), *flags], env=env,
                             capture_output=True, text=True)
    return process.returncode, process.stdout, process.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_an_example_and_needs_no_torch(stage, without_torch):
    code, output, _ = answer(stage, "--help", env=without_torch)
    assert code == 0 and f"python {stage}.py" in output


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("flags", [
    ["--nonsense"], ["--seed", "-1"], ["--seed", str(2 ** 70)], ["--workers", "-1"],
    ["--precision", "fp8"], ["--device="]])
def test_a_wrong_flag_is_one_line_and_needs_no_torch(stage, flags, without_torch):
    code, output, errors = answer(stage, *flags, env=without_torch)
    (line,) = errors.splitlines()
    assert code == 2 and line.startswith("error: ") and flags[0].rstrip("=") in line
    assert output == ""


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("background", [False, True])
def test_ctrl_c_while_libraries_are_imported(stage, background, tmp_path):
    """It ends a command without a traceback; a background job of a shell ignores it."""
    (tmp_path / "torch.py").write_text(
        "import os, signal; os.kill(os.getpid(), signal.SIGINT); raise SystemExit(7)")
    handler = signal.SIG_IGN if background else signal.default_int_handler
    process = subprocess.run(
        [sys.executable, str(ROOT / f"{stage}.py")], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler))
    assert process.returncode == (7 if background else -signal.SIGINT) and process.stderr == ""


@pytest.mark.slow
def test_the_demo_works_without_extras(tmp_path):
    root = tmp_path / "spar"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(
        "extras", "tests", "runs", ".*", "__pycache__"))
    for flags in (["extract_teacher.py", "--limit", "3"], ["distill.py", "--epochs", "2"],
                  ["evaluate_ovs.py", "--limit", "3", "--json", "runs/out.json"]):
        finish(subprocess.Popen([sys.executable, *flags], cwd=root, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}))
    rows = json.loads((root / "runs" / "out.json").read_text())["results"]
    assert ([row["method"] for row in rows]
            == ["single-pass", "sliding-window/64", "sliding-window/24", "spar"])


# ---- resuming --------------------------------------------------------------------------------

@pytest.fixture
def whole(micro, photos, one_thread, tmp_path_factory):
    """A teacher folder that one process made without interruption, with one thread."""
    out = tmp_path_factory.mktemp("whole")
    extract(micro, photos, out)
    return out


@pytest.mark.slow
def test_extraction_killed_at_any_moment_resumes_to_the_same_bytes(micro, photos, whole, tmp_path):
    flags = ["--images", photos, "--backbone", micro, "--out", tmp_path, *SMALL]
    for kill_after, number in ((1, signal.SIGKILL), (8, signal.SIGTERM)):
        process = command("extract_teacher.py", *flags)
        deadline = time.time() + 120
        while (process.poll() is None and time.time() < deadline
               and len(list(tmp_path.rglob("*.npy"))) < kill_after):
            time.sleep(0.002)
        process.send_signal(number)
        output = process.communicate()[0]
        if process.returncode == 130:
            assert "continue with: python" in output.splitlines()[-1]
    # as an interrupted copy leaves it
    (tmp_path / "features" / "2.png.npy").write_bytes(b"cut short")
    finish(command("extract_teacher.py", *flags))
    assert files(tmp_path) == files(whole)


@pytest.mark.slow
def test_two_processes_extract_the_same_bytes(micro, photos, whole, tmp_path):
    finish(command("extract_teacher.py", "--images", photos, "--backbone", micro, "--out", tmp_path,
                   *SMALL, launcher=["-m", "torch.distributed.run", "--nproc-per-node", "2",
                                     "--master-port", "29511"]))
    assert files(tmp_path) == files(whole)
