"""Bad input and bad luck: no foreign code runs, nothing is silently mixed up, what a user can cause
ends in one line that names the file or flag, and the same command goes on afterwards."""
import functools
import json
import os
import resource
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
from safetensors.torch import save_file

import common
import distill
import evaluate_ovs
import extract_teacher
import time_inference
from common import load_backbone
from data.files import RunError, UsageError, atomic_path, read_image, read_index, read_lines
from conftest import (MICRO, ROOT, SMALL, Malicious, changed_parameters, command, copy_files,
                      extract, files, finish, losses, refusal, run, weights)


@pytest.fixture
def images(photos, tmp_path):
    """Three small images of one's own: a folder."""
    return copy_files(photos, tmp_path / "images", "0.png", "1.png", "2.png")


@pytest.fixture
def own_teacher(micro, images, tmp_path):
    """The features of those images, to be changed."""
    extract(micro, images, tmp_path / "teacher")
    return tmp_path / "teacher"


def train(teacher, out, *flags):
    run(distill, "--teacher", teacher, "--out", out, "--epochs", 1, "--lr", 1e-3, *flags)


def error_line(process, code):
    """Return the one line with which a command fails; a progress bar may stand beside it."""
    output = finish(process, code)
    assert "error: " in output and "Traceback" not in output
    line, *more = output.partition("error: ")[2].splitlines()
    assert not any("error: " in text for text in more)
    return line


# ---- foreign code and foreign paths ----------------------------------------------------------

@pytest.mark.parametrize("place", [None, "tokenizer_kwargs", "text_cfg"])
def test_a_model_folder_runs_no_code_of_its_own(place, tmp_path, monkeypatch):
    """Whether its configuration asks for it, or transformers would ask the user."""
    config = json.loads(json.dumps(MICRO))
    text = config["model_cfg"]["text_cfg"]
    text["hf_tokenizer_name"] = str(tmp_path)
    if place:
        (text if place == "text_cfg" else text.setdefault(place, {}))["trust_remote_code"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    with pytest.raises(RunError, match="trust_remote_code" if place else "tokenizer"):
        _ = load_backbone(f"local-dir:{tmp_path}", random_init=True, text=True).tokenizer
    assert not (tmp_path / "executed").exists()


# ---- flags and calls that cannot work --------------------------------------------------------

@pytest.mark.parametrize("stage, flags", [
    (extract_teacher, "--limit -1"), (extract_teacher, "--limit 0"),
    (extract_teacher, "--versions 0"), (extract_teacher, "--batch-size 0"),
    (extract_teacher, "--crop-prob 7"), (extract_teacher, "--crop-prob nan"),
    (extract_teacher, "--flip-prob -1"), (extract_teacher, "--images="),
    (extract_teacher, "--ratio inf inf"), (extract_teacher, "--device meta"),
    (extract_teacher, "--min-side 0"), (extract_teacher, "--stride -1"),
    (extract_teacher, "--shard 3/2"), (extract_teacher, "--shard x"),
    (extract_teacher, "--stride 65 --backbone MICRO"),
    (extract_teacher, "--window 50 --backbone MICRO"), (extract_teacher, "--backbone none"),
    (extract_teacher, "--window 8 --stride 4 --backbone MICRO"),
    (distill, "--lr inf"), (distill, "--lr 0"), (distill, "--weight-decay inf"),
    (distill, "--save-every -1"), (distill, "--random-scale inf inf"),
    (distill, "--random-scale 1001 1002"), (distill, "--epochs 0"), (evaluate_ovs, "--checkpoint="),
    (evaluate_ovs, "--limit -1"), (evaluate_ovs, "--area 0"), (evaluate_ovs, "--logit-scale nan"),
    (evaluate_ovs, "--dataset nonsense"), (evaluate_ovs, "--stride 24 --checkpoint STUDENT"),
    (evaluate_ovs, "--stride 100 --checkpoint STUDENT --compare"),
    (evaluate_ovs, "--checkpoint STUDENT --backbone tiny"), (time_inference, "--repeats 0"),
    (time_inference, "--warmup -1"), (time_inference, "--sizes 64"),
    (time_inference, "--strides 100 --backbone MICRO"), (time_inference, "--plot x.txt"),
    (time_inference, "--device cuda:9")])
def test_a_flag_that_cannot_work_is_named(stage, flags, micro, student, images, tmp_path, capsys):
    flags = flags.replace("MICRO", micro).replace("STUDENT", str(student)).split()
    more = {extract_teacher: ["--out", tmp_path / "out", "--images", images],
            distill: ["--out", tmp_path / "out", "--teacher", student.parent / "teacher"]}
    if "--images=" in flags:
        del more[extract_teacher][2:]
    code, line = refusal(capsys, stage, *more.get(stage, []), *flags)
    flag = flags[0].rstrip("=")
    assert code == 2 and (flag in line or flag.strip("-").rstrip("s") in line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, code, named", [
    (["--images", "IMAGES"], 2, "--classes"),
    (["--classes", "cat, dog"], 2, "classes cat, dog"),
    (["--images", "IMAGES", "--classes", "cat, cat"], 2, "'cat'"),
    (["--images", "IMAGES", "--classes", "cat, dog", "--json", "x.json"], 2, "--masks"),
    (["--images", "IMAGES", "--classes", "cat, dog", "--masks", "/nowhere"], 1, "/nowhere"),
    (["--images", "/nowhere", "--classes", "cat, dog"], 1, "/nowhere"),
    (["--checkpoint", "/nowhere"], 1, "/nowhere")])
def test_an_evaluation_that_cannot_work_is_named(student, images, capsys, flags, code, named):
    flags = [images if flag == "IMAGES" else flag for flag in flags]
    found, line = refusal(capsys, evaluate_ovs, "--checkpoint", student, *flags)
    assert found == code and named in line


def test_other_settings_are_refused_with_their_names(micro, photos, teacher, student, capsys):
    for flags, named in ((["--flip-prob", 0], "flip_prob"),
                         (["--stride", 32], "stride was 24 and is now 32")):
        with pytest.raises(UsageError, match=named):
            extract(micro, photos, teacher, *flags)
    code, line = refusal(capsys, distill, "--teacher", teacher, "--out", student, "--epochs", 5,
                         "--lr", 1e-3)
    assert code == 2 and "epochs was 3 and is now 5" in line


@pytest.mark.slow
def test_a_failing_command_ends_with_one_line_and_a_code(images, tmp_path):
    assert "stride 999" in error_line(command(
        "extract_teacher.py", "--images", images, "--out", tmp_path / "out", "--backbone", "tiny",
        "--stride", 999), code=2)


# ---- images ----------------------------------------------------------------------------------

def test_bad_images_are_noted_and_the_rest_is_done(micro, photos, tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    image = Image.open(photos / "0.png")
    for name in ("good.jpg", "good.png", "a.1.png"):  # of the same stem; like another's version
        image.save(folder / name)
    (folder / "truncated.jpg").write_bytes((folder / "good.jpg").read_bytes()[:300])
    (folder / "text.png").write_text("no image")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (2000, 20)).save(folder / "thread.png")
    flags = ["--images", folder, "--backbone", micro, *SMALL[:-2]]
    run(extract_teacher, "--out", out, *flags)
    assert "3 of 7 feature maps" in capsys.readouterr().out
    failures = {entry["image"]: entry["error"] for entry in read_lines(out / "failures.jsonl")}
    assert failures.keys() == {"truncated.jpg", "text.png", "dot.png", "thread.png"}
    assert "1 x 1" in failures["dot.png"] and "20 x 2000" in failures["thread.png"]
    assert ({entry["image"] for entry in read_index(out)} == {"good.jpg", "good.png", "a.1.png"})
    train(out, tmp_path / "spar")  # what failed is known to be missing
    with pytest.raises(RunError, match="dot.png.*--strict"):
        run(extract_teacher, "--out", tmp_path / "strict", *flags, "--strict")
    for name in ("good.jpg", "good.png", "a.1.png"):
        (folder / name).unlink()
    with pytest.raises(RunError):
        run(extract_teacher, "--out", tmp_path / "none", *flags)


@pytest.mark.parametrize("what", ["changed", "deleted", "spoilt"])
def test_an_image_that_changed_is_extracted_again(micro, images, own_teacher, tmp_path, what):
    before = files(own_teacher / "features")
    pixels = np.asarray(Image.open(images / "1.png"))
    (images / "1.png").unlink()
    if what == "changed":
        Image.fromarray(255 - pixels).save(images / "1.png")
    elif what == "spoilt":
        (images / "1.png").write_text("no image")
    with pytest.raises(RunError, match="1.png.*extract_teacher.py again"):
        train(own_teacher, tmp_path / "stopped", "--cache-frozen", "off")
    extract(micro, images, own_teacher)
    after = files(own_teacher / "features")
    assert all(after[name] == before[name] for name in after if not name.startswith("1.png"))
    train(own_teacher, tmp_path / "spar")
    assert len(losses(tmp_path / "spar")) == (6 if what == "changed" else 4)
    if what == "changed":
        assert all(after[name] != before[name] for name in ("1.png.npy", "1.png.1.npy"))
    if what == "spoilt":
        assert "1.png" in (own_teacher / "failures.jsonl").read_text()


def test_a_copied_image_is_not_extracted_again(micro, images, own_teacher, tmp_path):
    """Another date alone makes nothing anew."""
    path = own_teacher / "features" / "0.png.npy"
    before = path.stat().st_mtime_ns
    for image in images.iterdir():
        os.utime(image, (1, 1))
    extract(micro, images, own_teacher)
    assert path.stat().st_mtime_ns == before
    train(own_teacher, tmp_path / "spar")


@pytest.mark.slow
def test_unusual_file_names_go_through_all_stages(micro, photos, tmp_path, capsys):
    """Too long for a file beside it, not UTF-8, mathematics to matplotlib."""
    folder, spar = tmp_path / "$a$ $b", tmp_path / "spar $"
    folder.mkdir()
    for name in ("x" * 250 + ".png", os.fsdecode(b"not-utf8-\xff.png"), "$x_{$.png",
                 "y" * 245 + ".png"):
        shutil.copy(photos / "0.png", folder / name)
    run(extract_teacher, "--images", folder, "--backbone", micro, "--out", tmp_path / "$t",
        *SMALL[:-2])
    assert "3 of 4 feature maps" in capsys.readouterr().out
    train(tmp_path / "$t", spar)
    assert (spar / "loss.png").exists()
    finish(command("evaluate_ovs.py", "--checkpoint", spar, "--images", folder, "--classes",
                   "cat, sky", "--save-maps", tmp_path / "maps", "--state", tmp_path / "state"))
    assert len(list((tmp_path / "maps").rglob("*.png"))) == 3 * 4


# ---- damaged files of earlier stages ---------------------------------------------------------

def save_zip(path, features):
    with open(path, "wb") as file:
        np.savez(file, features)


@pytest.mark.parametrize("damage", [
    lambda path, features: path.write_bytes(path.read_bytes()[:100]),
    lambda path, features: path.write_bytes(path.read_bytes()[:-2]),
    lambda path, features: path.write_bytes(
        path.read_bytes().replace(b"'shape': (", b"'shape': (-", 1)),
    lambda path, features: path.write_bytes(
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f2', 'fortran_order': Fal" + b" " * 99),
    save_zip,
    lambda path, features: np.save(path, features[:-1]),
    lambda path, features: np.save(path, features.astype(np.float32)),
    lambda path, features: np.save(path, features * np.float16("nan")),
    lambda path, features: np.save(path, [{}], allow_pickle=True),
    lambda path, features: path.unlink(),
], ids=["short", "shorter", "negative", "header", "zip", "shape", "type", "nan", "objects", "none"])
def test_a_damaged_feature_map_is_named_and_made_anew(micro, images, own_teacher, tmp_path, damage):
    path = own_teacher / "features" / "1.png.npy"
    before = path.read_bytes()
    damage(path, np.load(path))
    with pytest.raises(RunError, match="1.png.npy.*extract_teacher.py again"):
        train(own_teacher, tmp_path / "spar")
    extract(micro, images, own_teacher)
    if np.isnan(np.load(path)).any():  # it is whole, so it must be deleted, as the message says
        path.unlink()
        extract(micro, images, own_teacher)
    assert path.read_bytes() == before


@pytest.mark.parametrize("rubbish", [b"\xff\xfe\n", b'{"image": "0.p'])
def test_a_line_of_the_index_that_was_lost_is_made_anew(micro, images, own_teacher, tmp_path,
                                                        rubbish):
    before, path = read_index(own_teacher), own_teacher / "index.jsonl"
    path.write_bytes(b"".join([*path.read_bytes().splitlines(keepends=True)[:-1], rubbish]))
    with pytest.raises(RunError, match="--partial"):
        train(own_teacher, tmp_path / "spar")
    train(own_teacher, tmp_path / "spar", "--partial")
    extract(micro, images, own_teacher)
    assert read_index(own_teacher) == before


@pytest.mark.parametrize("change", [
    None, "[]", "{}", b"\xff", {"dim": 10 ** 30}, {"maps": "many"},
    {"weights": None}])
def test_a_damaged_teacher_is_named(own_teacher, tmp_path, capsys, change):
    path = own_teacher / "teacher.json"
    settings = json.loads(path.read_text())
    path.unlink()
    if isinstance(change, dict):
        path.write_text(json.dumps(settings | change))
    elif change is not None:
        path.write_bytes(change if isinstance(change, bytes) else change.encode())
    refusal(capsys, distill, "--teacher", own_teacher, "--out", tmp_path / "spar")
    assert not (tmp_path / "spar" / "open_clip_model.safetensors").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"teacher": 5}', '{"teacher": {}}'])
def test_a_damaged_student_is_named(student, images, tmp_path, capsys, content):
    spar = shutil.copytree(student, tmp_path / "spar")
    (spar / "spar.json").write_text(content)
    _, line = refusal(capsys, evaluate_ovs, "--checkpoint", spar, "--compare",
                      "--images", images, "--classes", "cat, dog", "--state", tmp_path / "state")
    assert "spar.json" in line


@pytest.mark.parametrize("damage", [
    lambda state: {key: value for key, value in state.items() if key != "scaler"},
    lambda state: state | {"parameters": [torch.zeros(2), *state["parameters"][1:]]},
    lambda state: state | {"parameters": state["parameters"][1:]},
    lambda state: state | {"step": Malicious(pytest.fail, "code of a file was executed")},
    lambda state: None,
], ids=["key", "shape", "count", "code", "short"])
def test_a_damaged_state_is_named(own_teacher, tmp_path, damage):
    spar = tmp_path / "spar"
    train(own_teacher, spar)
    path, before = spar / "training_state.pt", losses(spar)
    state = damage(torch.load(path))
    torch.save(state, path) if state else path.write_bytes(path.read_bytes()[:-99])
    with pytest.raises(RunError, match="training_state.pt.*delete it"):
        train(own_teacher, spar)
    path.unlink()
    train(own_teacher, spar)
    assert losses(spar) == before


@pytest.mark.parametrize("damage", [
    np.transpose, lambda tokens: tokens * np.float16("nan"), lambda tokens: None])
def test_damaged_tokens_are_made_anew(own_teacher, tmp_path, damage):
    kept = ["--cache-frozen", tmp_path / "tokens"]
    train(own_teacher, tmp_path / "a", *kept, "--epochs", 2)
    before = files(tmp_path / "tokens")
    (path,) = (tmp_path / "tokens").rglob("1.png.npy")
    tokens = damage(np.load(path))
    path.write_bytes(b"cut short") if tokens is None else np.save(path, tokens)
    train(own_teacher, tmp_path / "b", *kept, "--epochs", 2)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert files(tmp_path / "tokens") == before


def test_tokens_of_other_images_are_not_used(micro, images, own_teacher, tmp_path):
    """Two teachers whose images have the same names and sizes share a folder of tokens."""
    (tmp_path / "other").mkdir()
    for path in images.iterdir():
        Image.fromarray(255 - np.asarray(Image.open(path))).save(tmp_path / "other" / path.name)
    extract(micro, tmp_path / "other", tmp_path / "teacher-other")
    kept = ["--epochs", 2, "--cache-frozen"]
    train(own_teacher, tmp_path / "a", *kept, tmp_path / "tokens")
    train(tmp_path / "teacher-other", tmp_path / "b", *kept, tmp_path / "tokens")
    train(tmp_path / "teacher-other", tmp_path / "c", *kept, tmp_path / "tokens-of-its-own")
    assert losses(tmp_path / "a") != losses(tmp_path / "b") == losses(tmp_path / "c")


# ---- training that fails or is stopped -------------------------------------------------------

@pytest.mark.parametrize("flags, last_good", [
    (["--lr", 1e30, "--save-every", 0], 1),  # the loss of the second step
    (["--lr", 1e39, "--batch-size", 6], 0)])  # the student after the last step, no loss
def test_values_that_are_not_finite_keep_the_last_good_state(own_teacher, tmp_path, flags,
                                                             last_good):
    spar = tmp_path / "spar"
    with pytest.raises(RunError, match="--lr"):
        train(own_teacher, spar, *flags)
    state = spar / "training_state.pt"
    assert (torch.load(state)["step"] if state.exists() else 0) >= last_good
    assert not (spar / "open_clip_model.safetensors").exists()


def test_a_finished_student_survives_a_deleted_log(student, teacher, tmp_path):
    spar = shutil.copytree(student, tmp_path / "spar")
    (spar / "log.jsonl").unlink()
    run(distill, "--teacher", teacher, "--out", spar, "--epochs", 3, "--lr", 1e-3)
    assert not changed_parameters(spar, student)


def test_temporary_files_of_a_killed_run_are_removed(micro, images, own_teacher, tmp_path):
    with atomic_path(own_teacher / "features" / "x.npy") as temporary:
        temporary.write_text("")
    temporary.write_text("cut short")  # as a killed process leaves it
    extract(micro, images, own_teacher)
    train(own_teacher, tmp_path / "spar")
    (tmp_path / "spar" / ".tmpewMpfj").write_text("cut short")  # safetensors' own name
    train(own_teacher, tmp_path / "spar")
    assert not list(tmp_path.rglob(".tmp*"))


def wait_for(path, lines, process):
    deadline = time.time() + 120
    while len(read_lines(path)) < lines:
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.005)


@pytest.mark.slow
def test_a_second_training_in_a_folder_is_refused(teacher, tmp_path):
    """A second one is refused. As a background job of a shell, it ignores Ctrl-C, not SIGTERM."""
    log, flags = tmp_path / "log.jsonl", ["--teacher", teacher, "--out", tmp_path, "--epochs", 99]
    process = command("distill.py", *flags, preexec_fn=functools.partial(
        signal.signal, signal.SIGINT, signal.SIG_IGN))
    wait_for(log, 10, process)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(RunError, match=str(tmp_path)):
        run(distill, *flags)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    wait_for(log, 2 * len(read_lines(log)), process)
    process.send_signal(signal.SIGTERM)
    line = error_line(process, 130)
    assert "continue with: python" in line and str(tmp_path) in line


# ---- a full disk, a full memory, and other people's machines ---------------------------------

@pytest.mark.parametrize("stage, limit", [
    (extract_teacher, 1200), (distill, 100_000), (distill, 1_000_000)])
def test_a_full_disk_loses_nothing(micro, images, own_teacher, tmp_path, stage, limit):
    """Files cannot grow beyond a limit (for a feature map, a state, a student), which the system
    reports as it does a full disk."""
    out, before = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    flags = ["--teacher", own_teacher, "--epochs", 1, "--out", out]
    if stage is extract_teacher:
        flags = ["--images", images, "--backbone", micro, *SMALL, "--out", out]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(RunError, match=f"{out}.*could not be written"):
            run(stage, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(out.rglob(".tmp*"))
    done = {path: path.stat().st_mtime_ns
            for path in (out / entry["file"] for entry in read_index(out))}
    run(stage, *flags)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert len(done) < len(read_index(out) if stage is extract_teacher else losses(out)) == 6


@pytest.mark.parametrize("what, stage, flags", [
    ("missing feature maps", extract_teacher, []),
    ("frozen tokens", distill, ["--cache-frozen", "tokens"]),
    ("training states", distill, ["--cache-frozen", "off"])])
def test_a_disk_that_is_too_small_is_noticed_before(micro, images, teacher, tmp_path, monkeypatch,
                                                    what, stage, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    source = ["--teacher", teacher]
    if stage is extract_teacher:
        source = ["--images", images, "--backbone", micro]
    with pytest.raises(RunError, match=f"{what} need .*larger disk"):
        run(stage, *source, "--out", "out", *flags)
    assert not list(tmp_path.rglob("*.npy")) and not list(tmp_path.rglob("*.pt"))


def test_a_file_system_without_modes_takes_a_student(backbone, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "chmod", refuse)
    backbone.save(tmp_path)
    assert (tmp_path / "open_clip_model.safetensors").exists()


@pytest.fixture
def own_signals():
    """Restore the signal handlers of this process, which run_stage changes."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("error, code, named", [
    (UsageError("--flag 5"), 2, "--flag 5"), (RunError("some.json"), 1, "some.json"),
    (MemoryError(), 1, "memory"), (RuntimeError("can't allocate memory\nmore"), 1, "memory"),
    (OSError(5, "Input/output error", "some.png"), 1, "some.png"), (BrokenPipeError(), 1, ""),
    (KeyboardInterrupt(), 130, "continue with: python")])
def test_what_a_user_can_cause_ends_in_one_line(error, code, named, capfd, monkeypatch,
                                                own_signals):
    def main(args):
        raise error
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as leaving:
        common.run_stage(main, None)
    text = capfd.readouterr().err
    assert leaving.value.code == code and named in text and text.count("\n") <= 1


@pytest.mark.slow
def test_ctrl_c_ends_a_stage_whose_threads_wait_for_ever():
    """As they do if the signal came while the main thread held a lock that they need."""
    text = ("import threading, common\n"
            "lock = threading.Lock()\n"
            "lock.acquire()\n"
            "def main(args):\n"
            "    for _ in common.prefetch(lambda item: item and lock.acquire(), range(3)):\n"
            "        raise KeyboardInterrupt\n"
            "common.run_stage(main, None)\n")
    ended = subprocess.run([sys.executable, "-c", text], cwd=ROOT, timeout=100,
                           capture_output=True, text=True)
    assert ended.returncode == 130 and "continue with" in ended.stderr


def test_a_defect_keeps_its_traceback(own_signals):
    def main(args):
        raise RuntimeError("something else")
    with pytest.raises(RuntimeError):
        common.run_stage(main, None)


@pytest.mark.slow
def test_a_clock_that_stands_still_is_survived(micro, tmp_path, monkeypatch):
    for name in ("time", "perf_counter", "monotonic"):
        monkeypatch.setattr(time, name, lambda: 1000.0)
    run(time_inference, "--backbone", micro, "--sizes", "64x64", "96x96", "--strides", 0, 32,
        "--warmup", 0, "--repeats", 1, "--plot", tmp_path / "times.png")


@pytest.mark.parametrize("kind, remedy", [("pointer", "git lfs pull"), ("shard", "as one file"),
                                          ("compiled", "_orig_mod")])
def test_files_that_only_stand_for_weights_are_named(micro, tmp_path, kind, remedy):
    tensors, name = weights(micro), "open_clip_model.safetensors"
    copy_files(Path(micro.removeprefix("local-dir:")), tmp_path / "model", "open_clip_config.json")
    if kind == "shard":
        name = "model-00001-of-00002.safetensors"
    if kind == "compiled":
        tensors = {f"_orig_mod.{key}": value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "model" / name)
    if kind == "pointer":
        (tmp_path / "model" / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(RunError, match=remedy):
        load_backbone(tmp_path / "model")


def test_an_image_of_few_of_16_bits_is_said_to_be_dark(tmp_path, capsys):
    levels = np.random.default_rng(0).integers(0, 4096, (20, 30)).astype(np.uint16)
    for factor, warned in ((1, True), (16, False)):
        Image.fromarray(levels * factor).save(tmp_path / "a.png")
        read_image(tmp_path / "a.png")
        assert ("a.png uses at most 14" in capsys.readouterr().err) == warned
