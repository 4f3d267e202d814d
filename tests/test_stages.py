"""The four commands: what they write, that they resume exactly, and what they say to bad input."""
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

import distill
import evaluate_ovs
import extract_teacher
import time_inference
from common import RunFailed, WrongCall, read_json_lines

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--long-side", "160", "--short-side", "128", "--min-side", "64", "--stride", "24",
         "--versions", "2"]


def run(stage, *flags):
    """A stage in this process: an error is the exception that the command line turns into an exit
    code."""
    stage.main(stage.parse_args([str(flag) for flag in flags]))


def command(script, *flags, launcher=()):
    """A stage as a user types it."""
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / script), *map(str, flags)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process, code=0):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def extract(micro, photos, out, *flags):
    run(extract_teacher, "--images", photos, "--out", out, "--backbone", micro, *SMALL, *flags)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def teacher(micro, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("stages") / "teacher"
    extract(micro, photos, out)
    return out


@pytest.fixture(scope="module")
def student(teacher):
    out = teacher.parent / "spar"
    run(distill, "--teacher", teacher, "--out", out, "--epochs", 3, "--lr", 1e-3)
    return out


# ---- what they write -----------------------------------------------------------------------------

def test_extract_writes_what_the_interface_says(teacher, backbone):
    index = read_json_lines(teacher / "index.jsonl")
    assert ([(entry["image"], entry["version"]) for entry in index]
            == sorted((image, v)
                      for image in [f"{k}.png" for k in range(8)] + ["sub/8.png", "sub/9.png"]
                      for v in (0, 1)))
    for entry in index:
        assert entry["file"] == f"features/{entry['image']}{'.1' if entry['version'] else ''}.npy"
        features = np.load(teacher / entry["file"], allow_pickle=False)
        assert (features.dtype == np.float16
                and features.shape == (*entry["grid"], backbone.dim)
                and features.flags.c_contiguous)
    settings = json.loads((teacher / "teacher.json").read_text())
    assert {"backbone", "stride", "window", "augment", "seed", "precision", "images", "torch",
            "open_clip"} <= settings.keys()
    assert not (teacher / "failures.jsonl").exists()


def test_distill_learns_and_writes_a_student(student, teacher):
    log = read_json_lines(student / "log.jsonl")
    assert ([entry["step"] for entry in log] == list(range(1, 61))
            and {"step", "epoch", "loss", "lr", "seconds"} == log[0].keys())
    first, last = (np.mean([entry["loss"] for entry in log if entry["epoch"] == epoch])
                   for epoch in (0, 2))
    assert last < 0.9 * first
    assert {"open_clip_config.json", "open_clip_model.safetensors", "spar.json", "log.jsonl",
            "loss.png"} <= {path.name for path in student.iterdir()}
    before, after = (
        load_file(Path(json.loads((teacher / "teacher.json").read_text())["backbone"][10:])
                  / "open_clip_model.safetensors"),
        load_file(student / "open_clip_model.safetensors"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before
                       if key.startswith(("visual.transformer.resblocks.1.",
                                          "visual.transformer.resblocks.2."))}


@pytest.mark.parametrize("blocks, frozen", [
    ("1", "visual.transformer.resblocks.1."),
    ("3", "visual.conv1."),
    ("all", "transformer."),
])
def test_train_blocks(teacher, tmp_path, blocks, frozen):
    run(distill, "--teacher", teacher, "--out", tmp_path, "--epochs", 1, "--train-blocks", blocks,
        "--lr", 1e-3)
    before, after = (
        load_file(Path(json.loads((teacher / "teacher.json").read_text())["backbone"][10:])
                  / "open_clip_model.safetensors"),
        load_file(tmp_path / "open_clip_model.safetensors"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and not any(key.startswith(frozen) for key in changed)
    assert ("visual.conv1.weight" in changed) == (blocks == "all")


def test_evaluate_compares_and_agrees_with_scikit_learn(student, photos, tmp_path):
    from sklearn.metrics import jaccard_score
    masks, rng = tmp_path / "masks", np.random.default_rng(0)
    for image in photos.rglob("*.png"):
        mask = masks / image.relative_to(photos)
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.choice(np.array([0, 1, 2, 255], np.uint8),
                                   Image.open(image).size[::-1])).save(mask)
    (tmp_path / "classes.txt").write_text("cat\ngrass, lawn\nsky\nnever there\n")
    run(evaluate_ovs, "--checkpoint", student, "--compare", "--stride", 32, 24,
        "--images", photos, "--masks", masks, "--classes", tmp_path / "classes.txt",
        "--json", tmp_path / "out.json", "--save-maps", tmp_path / "maps")
    report = json.loads((tmp_path / "out.json").read_text())
    assert ([row["method"] for row in report["results"]]
            == ["single-pass", "sliding-window/32", "sliding-window/24", "spar"])
    for row in report["results"]:
        folder = tmp_path / "maps" / row["method"].replace("/", "-")
        labels = np.concatenate([
            np.asarray(Image.open(masks / name)).ravel()
            for name in map(str, sorted(p.relative_to(masks) for p in masks.rglob("*.png")))])
        predicted = np.concatenate([
            np.asarray(Image.open(folder / f"{name}.labels.png")).ravel()
            for name in map(str, sorted(p.relative_to(masks) for p in masks.rglob("*.png")))])
        kept = labels != 255
        present = sorted(set(labels[kept]) | set(predicted[kept]))
        assert row["miou"] == pytest.approx(100 * jaccard_score(
            labels[kept], predicted[kept], labels=present, average="macro"))
        assert (row["images"] == 10 and row["seconds_per_image"] > 0
                and list(row["per_class_iou"]) == ["cat", "grass", "sky", "never there"])
    assert len(list((tmp_path / "maps" / "spar").rglob("*.png"))) == 30


def test_own_pictures_with_free_names(student, photos, tmp_path, capsys):
    run(evaluate_ovs, "--checkpoint", student, "--images", photos / "3.png",
        "--classes", "cat, grass | lawn, sky", "--save-maps", tmp_path)
    assert (sorted(path.name for path in tmp_path.iterdir())
            == ["3.png.labels.png", "3.png.overlay.png", "3.png.pca.png", "shares.csv",
                "sheet.png"])
    labels = Image.open(tmp_path / "3.png.labels.png")
    assert (labels.mode == "P" and labels.size == Image.open(photos / "3.png").size
            and np.asarray(labels).max() < 3)
    shares = capsys.readouterr().out.split("3.png (spar): ")[1].splitlines()[0]
    assert (sum(float(part.split()[-2]) for part in shares.split(", "))
            == pytest.approx(100, abs=0.2))


@pytest.mark.slow
def test_timing_table(micro, tmp_path):
    run(time_inference, "--backbone", micro, "--sizes", "64x64", "130x90", "--strides", 0, 24,
        "--warmup", 1, "--repeats", 3, "--json", tmp_path / "t.json", "--plot", tmp_path / "t.png")
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [(row["method"], row["height"], row["width"], row["windows"]) for row in rows] == [
        ("single-pass", 64, 64, 1), ("sliding-window/24", 64, 64, 1),
        ("single-pass", 128, 96, 1), ("sliding-window/24", 128, 96, 12)]
    assert (rows[3]["tflop"] == pytest.approx(12 * rows[0]["tflop"])
            and all(row["ms"] > 0 and row["ms_median"] > 0 for row in rows))
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
    extract(micro, photos, tmp_path / "compiled", "--compile")
    for path in (teacher / "features").rglob("*.npy"):
        compiled = np.load(tmp_path / "compiled" / path.relative_to(teacher))
        assert np.allclose(compiled, np.load(path), atol=2e-3)


def test_compile_without_a_compiler(micro, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(WrongCall, match="--compile"):
        extract(micro, photos, tmp_path / "t", "--compile")


@pytest.mark.parametrize("script", [
    "extract_teacher.py",
    "distill.py",
    "evaluate_ovs.py",
    "time_inference.py",
])
def test_help_shows_an_example_and_needs_no_torch(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('--help must not import torch')")
    process = subprocess.run([sys.executable, str(ROOT / script), "--help"],
                             env=os.environ | {"PYTHONPATH": str(tmp_path)},
                             capture_output=True, text=True)
    assert process.returncode == 0 and f"python {script}" in process.stdout


# ---- resuming ------------------------------------------------------------------------------------

@pytest.mark.slow
def test_extraction_killed_at_any_moment_resumes_to_the_same_bytes(micro, photos, tmp_path):
    flags = ["--images", photos, "--backbone", micro, *SMALL]
    finish(command("extract_teacher.py", "--out", tmp_path / "whole", *flags))
    for kill_after in (1, 6, 11):
        process = command("extract_teacher.py", "--out", tmp_path / "killed", *flags)
        deadline = time.time() + 120
        while (process.poll() is None
               and len(list((tmp_path / "killed").rglob("*.npy"))) < kill_after
               and time.time() < deadline):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    # as an interrupted copy leaves it
    (tmp_path / "killed" / "features" / "2.png.npy").write_bytes(b"cut short")
    assert "feature maps are there" in finish(
        command("extract_teacher.py", "--out", tmp_path / "killed", *flags))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.slow
def test_distillation_killed_at_any_moment_resumes_to_the_same_weights(teacher, tmp_path):
    flags = ["--teacher", teacher, "--epochs", 4, "--save-every", 7, "--lr", "1e-3",
             "--schedule", "cosine"]
    finish(command("distill.py", "--out", tmp_path / "whole", *flags))
    for kill_after in (3, 30, 52):
        process = command("distill.py", "--out", tmp_path / "killed", *flags)
        deadline = time.time() + 120
        while (process.poll() is None
               and len(read_json_lines(tmp_path / "killed" / "log.jsonl")) < kill_after
               and time.time() < deadline):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "continuing after step" in finish(
        command("distill.py", "--out", tmp_path / "killed", *flags))
    assert ((tmp_path / "killed" / "open_clip_model.safetensors").read_bytes()
            == (tmp_path / "whole" / "open_clip_model.safetensors").read_bytes())
    steps = [[(entry["step"], entry["epoch"], entry["loss"], entry["lr"])
              for entry in read_json_lines(tmp_path / name / "log.jsonl")]
             for name in ("killed", "whole")]
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_two_processes_share_the_work(micro, photos, teacher, tmp_path):
    """Under torchrun: the same features, byte for byte, and a student from averaged gradients."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29511"]
    flags = ["--images", photos, "--backbone", micro, *SMALL]
    finish(command("extract_teacher.py", "--out", tmp_path / "one", *flags))
    finish(command("extract_teacher.py", "--out", tmp_path / "two", *flags, launcher=launcher))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    finish(command("distill.py", "--teacher", teacher, "--out", tmp_path / "spar", "--epochs", 1,
                   launcher=launcher))
    assert len(read_json_lines(tmp_path / "spar" / "log.jsonl")) == 10


def test_other_settings_are_refused_with_their_names(micro, photos, teacher, student):
    with pytest.raises(WrongCall, match="flip_prob|augment was"):
        extract(micro, photos, teacher, "--flip-prob", 0)
    with pytest.raises(WrongCall, match="stride was 24 and is now 32"):
        run(extract_teacher, "--images", photos, "--out", teacher, "--backbone", micro, *SMALL,
            "--stride", 32)
    with pytest.raises(WrongCall, match="epochs was 3 and is now 5"):
        run(distill, "--teacher", teacher, "--out", student, "--epochs", 5, "--lr", 1e-3)


# ---- bad input -----------------------------------------------------------------------------------

@pytest.mark.slow
def test_bad_pictures_are_noted_and_the_rest_is_done(micro, photos, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    picture = Image.open(photos / "0.png")
    picture.save(images / "good.jpg")
    picture.save(images / "good.png")  # the same stem: both are kept apart
    picture.save(images / "a.1.png")
    (images / "truncated.jpg").write_bytes((images / "good.jpg").read_bytes()[:300])
    (images / "text.png").write_text("no picture")
    Image.new("RGB", (1, 1)).save(images / "dot.png")
    flags = ["--images", images, "--out", tmp_path / "out", "--backbone", micro, *SMALL[:-2]]
    output = finish(command("extract_teacher.py", *flags))
    assert "3 of 6 feature maps" in output and "3 could not be made" in output
    failures = {entry["image"]: entry["error"]
                for entry in read_json_lines(tmp_path / "out" / "failures.jsonl")}
    assert (failures.keys() == {"truncated.jpg", "text.png", "dot.png"}
            and "1 x 1" in failures["dot.png"])
    assert ({entry["image"] for entry in read_json_lines(tmp_path / "out" / "index.jsonl")}
            == {"good.jpg", "good.png", "a.1.png"})
    with pytest.raises(RunFailed, match="dot.png.*--strict"):
        extract(micro, images, tmp_path / "strict", "--strict")


@pytest.mark.slow
def test_no_picture_at_all(micro, tmp_path):
    (tmp_path / "empty").mkdir()
    output = finish(command("extract_teacher.py", "--images", tmp_path / "empty",
                            "--out", tmp_path / "out", "--backbone", micro), code=1)
    assert (output.strip().splitlines()[-1].startswith("error:") and "empty" in output
            and "Traceback" not in output)
    with pytest.raises(RunFailed, match="no such folder"):
        run(extract_teacher, "--images", tmp_path / "missing", "--out", tmp_path / "out")
    (tmp_path / "empty" / "text.png").write_text("no picture")
    with pytest.raises(RunFailed, match="none of the pictures"):
        run(extract_teacher, "--images", tmp_path / "empty", "--out", tmp_path / "out",
            "--backbone", micro)


@pytest.mark.parametrize("flags, message", [
    (["--stride", 65], "--stride 65"),
    (["--window", 50], "--window 50"),
    (["--ratio", 0.9, 0.5], "LO <= HI"),
    (["--augment", "none", "--flip-prob", 0.5], "--augment none"),
    (["--backbone", "nothing"], "unknown"),
])
def test_wrong_calls_of_extract(micro, photos, tmp_path, flags, message):
    with pytest.raises(WrongCall, match=message):
        run(extract_teacher, "--images", photos, "--out", tmp_path / "out", "--backbone", micro,
            *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_wrong_call_ends_with_code_2(micro, photos, tmp_path):
    output = finish(command("extract_teacher.py", "--images", photos, "--backbone", micro,
                            "--stride", 999, "--out", tmp_path), code=2)
    assert "error: --stride 999" in output and "Traceback" not in output
    finish(command("evaluate_ovs.py", "--dataset", "nonsense"), code=2)


def test_a_full_disk_loses_nothing(micro, photos, tmp_path, monkeypatch):
    real, count = np.save, []

    def save(file, array):
        count.append(1)
        if len(count) == 8:
            raise OSError(28, "No space left on device")
        real(file, array)

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(RunFailed, match="No space left on device.*continues"):
        extract(micro, photos, tmp_path / "out")
    assert not list((tmp_path / "out").rglob(".tmp*"))
    monkeypatch.undo()
    done = len(read_json_lines(tmp_path / "out" / "index.jsonl"))
    assert done >= 7
    extract(micro, photos, tmp_path / "out")
    assert len(read_json_lines(tmp_path / "out" / "index.jsonl")) == 20


@pytest.fixture
def broken_teacher(micro, photos, tmp_path):
    """A teacher folder of one's own to break, and the feature file that is read first."""
    extract(micro, photos, tmp_path / "teacher")
    return tmp_path / "teacher"


def distil_from(folder, *flags):
    run(distill, "--teacher", folder, "--out", folder.parent / "spar", "--epochs", 1, *flags)


@pytest.mark.parametrize("content, message", [
    (lambda good: good.tobytes()[:100], "no whole .npy file"),
    (lambda good: good[:-1], "where its picture needs"),
    (lambda good: good.astype(np.float32), "float32"),
    (lambda good: np.where(good == good.max(), np.float16("nan"), good), "not finite"),
    (None, "does not exist"),
])
def test_bad_features_are_named(broken_teacher, content, message):
    path = broken_teacher / "features" / "sub" / "8.png.npy"
    good = np.load(path)
    path.unlink()
    if content is not None:
        content = content(good)
        path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(RunFailed, match=f"8.png.npy.*{message}.*extract_teacher.py again"):
        distil_from(broken_teacher)


def test_a_missing_picture_behind_an_index_line(broken_teacher, photos, tmp_path):
    settings = json.loads((broken_teacher / "teacher.json").read_text())
    (broken_teacher / "teacher.json").write_text(
        json.dumps(settings | {"images": str(tmp_path / "moved")}))
    with pytest.raises(RunFailed, match="moved.*no such file"):
        distil_from(broken_teacher)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_state(broken_teacher):
    with pytest.raises(RunFailed, match=r"loss is (nan|inf) at step \d+.*last good state"):
        distil_from(broken_teacher, "--lr", 1e30, "--save-every", 1)
    state = torch.load(broken_teacher.parent / "spar" / "training_state.pt", weights_only=True)
    assert state["step"] == len(read_json_lines(broken_teacher.parent / "spar" / "log.jsonl"))


def test_distill_without_features(tmp_path):
    with pytest.raises(RunFailed, match="extract_teacher.py makes it"):
        run(distill, "--teacher", tmp_path / "nothing", "--out", tmp_path / "out")


@pytest.mark.parametrize("flags, error, message", [
    (["--images", "PHOTOS"], WrongCall, "--classes"),
    (["--classes", "cat"], WrongCall, "--images"),
    (["--images", "PHOTOS", "--classes", "cat, cat"], WrongCall, "'cat'"),
    (["--backbone", "tiny", "--images", "PHOTOS", "--classes", "cat", "--masks", "/nowhere"],
     RunFailed, "no mask"),
    (["--images", "PHOTOS", "--classes", "cat", "--json", "x.json"], WrongCall, "--masks"),
    (["--checkpoint", "STUDENT", "--backbone", "tiny"], WrongCall, "must be a file"),
    (["--checkpoint", "/nowhere"], RunFailed, "distill.py"),
    (["--checkpoint", "STUDENT", "--stride", "24"], WrongCall, "--stride goes with"),
    (["--checkpoint", "STUDENT", "--compare", "--stride", "100"], WrongCall, "--stride 100"),
])
def test_wrong_calls_of_evaluate(student, photos, flags, error, message):
    with pytest.raises(error, match=message):
        run(evaluate_ovs,
            *[{"PHOTOS": photos, "STUDENT": student}.get(flag, flag) for flag in flags])


@pytest.mark.parametrize("flags, message", [
    (["--sizes", "64"], "--sizes 64"),
    (["--strides", 100], "--stride 100"),
    (["--plot", "x.txt"], "--plot"),
    (["--device", "cuda:9"], "--device"),
])
def test_wrong_calls_of_time(micro, flags, message):
    with pytest.raises(WrongCall, match=message):
        run(time_inference, "--backbone", micro, *flags)
