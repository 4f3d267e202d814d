"""The commands: what they write, and that an interrupted one resumes to the same bytes."""
import csv
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image
from sklearn.metrics import jaccard_score

import evaluate_ovs
import time_inference
from conftest import (ROOT, SMALL, changed_parameters, command, extract, files, finish,
                      refusal, results, run, save_image, weights)
from data.benchmarks import Classes
from data.files import UsageError, read_lines
from extras import drawing

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
        "threads", "features", "augment", "versions", "seed", "precision", "compile", "images",
        "patch", "dim", "maps", "torch", "open_clip"}
    assert settings["maps"] == 20 and not (teacher / "failures.jsonl").exists()


def test_distill_learns_and_writes_a_student(student, micro):
    log = read_lines(student / "log.jsonl")
    assert [entry["step"] for entry in log] == list(range(1, 61))
    assert {"step", "epoch", "loss", "lr", "seconds", "skipped"} == log[0].keys()
    first, last = (np.mean([entry["loss"] for entry in log if entry["epoch"] == epoch])
                   for epoch in (0, 2))
    assert last < 0.9 * first
    assert {"open_clip_config.json", "open_clip_model.safetensors", "spar.json", "log.jsonl",
            "loss.png"} <= {path.name for path in student.iterdir()}
    last_blocks = ("visual.transformer.resblocks.1.", "visual.transformer.resblocks.2.")
    assert (changed_parameters(micro, student)
            == {name for name in weights(student) if name.startswith(last_blocks)})


def test_evaluation_agrees_with_scikit_learn(student, photos, masks, tmp_path):
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    student = shutil.copytree(student, tmp_path / "spar")  # gets the scores in its card
    (tmp_path / "classes.txt").write_text("cat\ngrass, lawn\nsky\nnever there\n")
    run(evaluate_ovs, "--checkpoint", student, "--compare", "--stride", 32, 24, "--images", photos,
        "--masks", masks, "--classes", tmp_path / "classes.txt",
        "--json", tmp_path / "out.json", "--save-maps", tmp_path / "maps",
        "--state", tmp_path / "state")
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


def test_own_images_are_segmented_by_free_names(student, photos, tmp_path, capsys):
    run(evaluate_ovs, "--checkpoint", student, "--images", photos / "3.png", "--state",
        tmp_path / "state", "--classes", "cat, grass | lawn, sky", "--save-maps", tmp_path / "maps")
    assert (sorted(path.name for path in (tmp_path / "maps").iterdir())
            == ["3.png.labels.png", "3.png.overlay.png", "3.png.pca.png", "classes.csv",
                "shares.csv"])
    labels = Image.open(tmp_path / "maps" / "3.png.labels.png")
    assert labels.mode == "P" and labels.size == Image.open(photos / "3.png").size
    with open(tmp_path / "maps" / "classes.csv", newline="") as file:
        for row, title in zip(csv.DictReader(file), ["cat", "grass", "sky"], strict=True):
            number = int(row["number"])
            colour = labels.getpalette()[3 * number:3 * number + 3]
            assert (row["class"], row["colour"]) == (title, "#" + bytes(colour).hex())
    assert np.asarray(labels).max() < 3
    shares = capsys.readouterr().out.split("3.png (spar): ")[1].splitlines()[0]
    total = sum(float(part.split()[-2]) for part in shares.split(", "))
    assert total == pytest.approx(100, abs=0.2)


@pytest.mark.slow
def test_several_images_are_segmented_and_the_model_is_named(student, photos, tmp_path, capsys):
    run(evaluate_ovs, "--checkpoint", f"local-dir:{student}", "--images", photos / "3.png",
        photos / "sub", "--classes", "cat, sky", "--state", tmp_path / "state", "--save-maps",
        tmp_path / "maps")
    output = capsys.readouterr().out
    assert f"student {student} (" in output and f"20 feature maps of {photos.name}" in output
    for name in ("3.png", "sub/8.png", "sub/9.png"):
        assert (tmp_path / "maps" / f"{name}.labels.png").is_file() and f"{name} (spar)" in output


def test_what_makes_results_poor_or_slow_is_said(tmp_path, photos, capsys):
    """Words that the demo's small backbone does not know, and large images."""
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (100, 100)).save(images / "a.png")
    for name in ("large.png", "larger.png"):
        Image.new("RGB", (1600, 1300)).save(images / name)
    flags = ["--backbone", "tiny", "--state", tmp_path / "state", "--save-maps", tmp_path / "maps"]
    run(evaluate_ovs, *flags, "--images", photos / "3.png", "--classes", "sky, zebra crossing")
    captured = capsys.readouterr()
    assert "tiny never learnt crossing, zebra" in captured.out
    assert "--short-side" not in captured.out + captured.err
    assert "earlier runs" not in captured.out
    for words, other in (("sky, red ball", ", of other classes"), ("sky, red ball", "")):
        run(evaluate_ovs, *flags, "--images", images, "--classes", words)
        captured = capsys.readouterr()
        assert "never learnt" not in captured.out
        assert (captured.out + captured.err).count("8100 patches") == 1
        assert f"label maps of earlier runs in {tmp_path / 'maps'}: 1{other}\n" in captured.out


def test_a_long_name_takes_several_lines_of_the_legend():
    image, labels = torch.zeros(3, 40, 60, dtype=torch.uint8), torch.zeros(40, 60).long()
    labels[:, 30:] = 1
    short = drawing.overlay_image(image, labels, Classes([["sky"], ["cat"]]))
    long = drawing.overlay_image(image, labels, Classes([["sky"], ["a cat that sleeps " * 20]]))
    assert long.width < 400 and long.height > 10 * 18 > short.height
    fonts = drawing.font.cache_info().currsize
    drawing.overlay_image(image[..., 7:], labels[:, 7:], Classes([["sky"], ["cat"]]))
    assert drawing.font.cache_info().currsize == fonts  # no new ones for other areas


def test_a_legend_takes_a_font_that_has_the_letters(monkeypatch):
    """DejaVu Sans has no letter of the private use area, of which STIXNonUnicode has some."""
    folder = Path(matplotlib.get_data_path(), "fonts/ttf")
    monkeypatch.setattr(drawing, "findSystemFonts", lambda: [str(folder / "STIXNonUni.ttf")])
    usual, other = (set(FT2Font(folder / f"{name}.ttf").get_charmap())
                    for name in ("DejaVuSans", "STIXNonUni"))
    letter = chr(min(other - usual))
    assert drawing.font(12, "sky 1 %").getname() == ("DejaVu Sans", "Book")
    assert drawing.font(12, letter).getname()[0] == "STIXNonUnicode"
    assert drawing.font(12, "\U0010fffd").getname() == ("DejaVu Sans", "Book")


def test_a_class_that_no_mask_holds_is_left_out_of_a_second_mean(student, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for kind, pixels in (("images", np.full((64, 64, 3), 90, np.uint8)),
                         ("masks", np.zeros((64, 64), np.uint8))):
        save_image(pixels, tmp_path / kind / "a.png")
    run(evaluate_ovs, "--checkpoint", student, "--images", tmp_path / "images", "--masks",
        tmp_path / "masks", "--classes", "cat, dog, sky, grass, water", "--state", tmp_path / "s",
        "--json", tmp_path / "out.json")
    row, = results(tmp_path / "out.json")
    assert row["miou_labelled"] == row["per_class_iou"]["cat"]
    present = [value for value in row["per_class_iou"].values() if value is not None]
    assert row["miou"] == pytest.approx(np.mean(present))
    output = capsys.readouterr().out
    assert "in no mask of" in output and "dog, sky, grass, water" in output
    assert ("mIoU, labelled" in output) == (row["miou_labelled"] != row["miou"])


def test_timing_writes_a_table_and_a_plot(micro, tmp_path):
    run(time_inference, "--backbone", micro, "--sizes", "64x64", "130x90", "--strides", 0, 24,
        "--warmup", 1, "--repeats", 3, "--json", tmp_path / "t.json", "--plot", tmp_path / "t.png")
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [(row["method"], row["height"], row["width"], row["windows"]) for row in rows] == [
        ("single-pass", 64, 64, 1), ("sliding-window/24", 64, 64, 1),
        ("single-pass", 128, 96, 1), ("sliding-window/24", 128, 96, 12)]
    assert rows[3]["tflop"] == pytest.approx(12 * rows[0]["tflop"])
    assert all(row["ms"] > 0 and row["ms_median"] > 0 for row in rows)
    assert (tmp_path / "t.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")),
                    reason="torch.compile needs a C++ compiler")
def test_compiled_features_are_the_same(micro, photos, teacher, tmp_path):
    extract(micro, photos, tmp_path, "--compile", "--limit", 1, "--versions", 1)
    compiled, expected = (np.load(out / "features" / "0.png.npy") for out in (tmp_path, teacher))
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
def test_help_and_wrong_flags_need_no_torch(stage, without_torch):
    code, output, _ = answer(stage, "--help", env=without_torch)
    assert code == 0 and f"python {stage}.py" in output
    code, output, errors = answer(stage, "--nonsense", env=without_torch)
    (line,) = errors.splitlines()
    assert code == 2 and line.startswith("error: ") and "--nonsense" in line and output == ""


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("flags", [
    ["--seed", -1], ["--seed", 2 ** 70], ["--workers", -1], ["--precision", "fp8"], ["--device="]])
def test_values_that_no_stage_takes_are_named(stage, flags, capsys):
    code, line = refusal(capsys, importlib.import_module(stage), *flags)
    assert code == 2 and line.startswith("error: ") and flags[0].rstrip("=") in line


@pytest.mark.parametrize("stage, background", [
    *((stage, False) for stage in STAGES), (STAGES[0], True)])
def test_ctrl_c_while_libraries_are_imported_prints_nothing(stage, background, tmp_path):
    """It ends a command without a traceback; a background job of a shell ignores it."""
    (tmp_path / "torch.py").write_text(
        "import os, signal; os.kill(os.getpid(), signal.SIGINT); raise SystemExit(7)")
    handler = signal.SIG_IGN if background else signal.SIG_DFL
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
        finish(command(root / flags[0], *flags[1:], cwd=root))
    rows = json.loads((root / "runs" / "out.json").read_text())["results"]
    assert ([row["method"] for row in rows]
            == ["single-pass", "sliding-window/64", "sliding-window/24", "spar"])


# ---- resuming --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(micro, photos, tmp_path_factory):
    """A teacher folder that one process made without interruption."""
    out = tmp_path_factory.mktemp("whole")
    extract(micro, photos, out)
    return out


@pytest.mark.slow
def test_an_interrupted_extraction_resumes_to_the_same_bytes(fork, micro, photos, whole, tmp_path):
    flags = ["--images", photos, "--backbone", micro, "--out", tmp_path, *SMALL]
    for number, count, code in ((signal.SIGKILL, 1, -9), (signal.SIGTERM, 8, 130)):
        codes, (output,) = fork("extract_teacher", flags, number=number, count=count,
                                watched=tmp_path / "index.jsonl")
        assert codes == [code]
    assert "continue with: python" in output.splitlines()[-1]
    # as an interrupted copy leaves it
    (tmp_path / "features" / "2.png.npy").write_bytes(b"cut short")
    assert fork("extract_teacher", flags)[0] == [0]
    assert files(tmp_path) == files(whole)


@pytest.mark.slow
def test_two_processes_extract_the_same_bytes(micro, photos, whole, tmp_path):
    finish(command("extract_teacher.py", "--images", photos, "--backbone", micro, "--out", tmp_path,
                   *SMALL, launcher=["-m", "torch.distributed.run", "--nproc-per-node", "2",
                                     "--master-port", "29511"]))
    assert files(tmp_path) == files(whole)
