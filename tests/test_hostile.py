"""What an attack found: no foreign code runs, nothing is silently mixed up, every bad input ends in
one line."""
import errno
import functools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import distill
import evaluate_ovs
import extract_teacher
import time_inference
from common import RunFailed, WrongCall, load_backbone, read_index
from conftest import MICRO
from data.students import read_student
from test_stages import SMALL, command, files, finish, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pictures(photos, tmp_path):
    """Three small pictures of one's own: a folder."""
    (tmp_path / "pictures").mkdir()
    for k in range(3):
        shutil.copy(photos / f"{k}.png", tmp_path / "pictures")
    return tmp_path / "pictures"


def extract(micro, pictures, out, *flags):
    run(extract_teacher, "--images", pictures, "--out", out, "--backbone", micro, *SMALL, *flags)


def train(teacher, out, *flags):
    run(distill, "--teacher", teacher, "--out", out, "--epochs", 1, "--lr", 1e-3, *flags)


def losses(out):
    return [entry["loss"] for entry in common.read_json_lines(out / "log.jsonl")]


# ---- foreign code and foreign paths --------------------------------------------------------------

@pytest.mark.parametrize("place", ["tokenizer_kwargs", "text_cfg"])
def test_a_model_folder_runs_no_code_of_its_own(place, tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}))
    config = json.loads(json.dumps(MICRO))
    text = config["model_cfg"]["text_cfg"]
    text["hf_tokenizer_name"] = str(tmp_path)
    text[place] = {"trust_remote_code": True} if place == "tokenizer_kwargs" else True
    if place == "text_cfg":
        text |= {"trust_remote_code": True}
        del text["text_cfg"]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(RunFailed, match="Python code of its own"):
        load_backbone(f"local-dir:{tmp_path}", random_init=True, text=True)
    assert not (tmp_path / "executed").exists()


def test_a_tokenizer_with_a_map_to_code_is_not_loaded(micro, tmp_path, monkeypatch):
    """Without being asked to trust it, transformers would ask the user; here it may not."""
    shutil.copytree(micro.removeprefix("local-dir:"), tmp_path / "model")
    path = tmp_path / "model" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "any"
    path.write_text(json.dumps(config))
    (tmp_path / "model" / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(
        {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    with pytest.raises(RunFailed, match="tokenizer.*cannot be loaded"):
        _ = load_backbone(tmp_path / "model").tokenizer
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("key, value", [
    ("file", "/abs/x.npy"), ("file", "features/../../x.npy"), ("file", "x.npy"),
    ("image", "/abs/x.png"), ("image", "../x.png"), ("image", 5), ("resize", [64]),
    ("crop", ["a"]), ("grid", None), ("version", "x")])
def test_an_index_line_that_no_stage_wrote(micro, pictures, tmp_path, key, value):
    extract(micro, pictures, tmp_path / "teacher")
    path = tmp_path / "teacher" / "index.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {key: value}), *others]))
    before = files(tmp_path)
    with pytest.raises(RunFailed, match="index.jsonl: the line .*delete it"):
        train(tmp_path / "teacher", tmp_path / "spar", "--cache-frozen", tmp_path / "tokens")
    assert files(tmp_path) == before


ENTRY = {"image": "a.png", "version": 0, "file": "features/a.png.npy", "resize": [64, 64],
         "crop": None, "flip": False, "grid": [4, 4]}


@pytest.mark.parametrize("key, value", [
    ("version", "1"), ("version", float("inf")), ("version", True), ("image", "a\0"),
    ("resize", [0, 64]), ("crop", [0, 0, 64, 9999]), ("crop", [0, 0, 64]), ("flip", 5),
    ("grid", [4.0, 4]), ("stat", [1, 1]), ("digest", "a")])
def test_the_types_of_an_index_line(tmp_path, key, value):
    common.write_json_lines(tmp_path / "index.jsonl", [ENTRY])
    assert read_index(tmp_path) == [ENTRY]
    common.write_json_lines(tmp_path / "index.jsonl", [ENTRY | {key: value}])
    with pytest.raises(RunFailed, match="index.jsonl: the line .*delete it"):
        read_index(tmp_path)


def test_json_that_is_too_deep(tmp_path):
    (tmp_path / "a.json").write_text("[" * 10 ** 5 + "\n{}")
    with pytest.raises(RunFailed, match="not readable JSON"):
        common.read_json(tmp_path / "a.json", "nobody")
    assert common.read_json_lines(tmp_path / "a.json") == [{}]


@pytest.mark.parametrize("rubbish", [b"5\n", b"{}\n", b"\xff\xfe\n", b'{"image": "0.png"}\n'])
def test_rubbish_in_an_index_is_made_anew(micro, pictures, tmp_path, rubbish):
    extract(micro, pictures, tmp_path / "teacher")
    before = read_index(tmp_path / "teacher")
    path = tmp_path / "teacher" / "index.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([rubbish, *lines[1:]]))
    with pytest.raises(RunFailed, match="has 5 of 6 maps"):
        train(tmp_path / "teacher", tmp_path / "spar")
    extract(micro, pictures, tmp_path / "teacher")
    assert read_index(tmp_path / "teacher") == before


# ---- nothing silently wrong ----------------------------------------------------------------------

def test_frozen_tokens_are_of_one_set_of_pictures(micro, pictures, tmp_path):
    """Two teachers whose pictures have the same names and sizes."""
    other = tmp_path / "other"
    other.mkdir()
    for path in pictures.iterdir():
        pixels = np.asarray(Image.open(path))
        Image.fromarray(255 - pixels).save(other / path.name)
    for name in ("pictures", "other"):
        extract(micro, tmp_path / name, tmp_path / f"teacher-{name}")
    kept = ["--cache-frozen", tmp_path / "tokens"]
    train(tmp_path / "teacher-pictures", tmp_path / "a", *kept)
    with pytest.raises(WrongCall, match="images was .*--cache-frozen"):
        train(tmp_path / "teacher-other", tmp_path / "b", *kept)
    (tmp_path / "tokens" / "frozen.json").unlink()
    with pytest.raises(RunFailed, match="no frozen.json"):
        train(tmp_path / "teacher-pictures", tmp_path / "c", *kept)


def test_a_picture_that_changed_is_noticed(micro, pictures, tmp_path):
    teacher = tmp_path / "teacher"
    extract(micro, pictures, teacher)
    old = files(teacher / "features")
    pixels = np.asarray(Image.open(pictures / "1.png"))
    Image.fromarray(255 - pixels).save(pictures / "1.png")
    with pytest.raises(RunFailed, match="1.png: has changed .*extract_teacher.py again"):
        train(teacher, tmp_path / "spar", "--cache-frozen", "off")
    extract(micro, pictures, teacher)
    new = files(teacher / "features")
    assert ({name for name in new if new[name] != old[name]}
            == {"1.png.npy", "1.png.1.npy"})
    train(teacher, tmp_path / "spar")


def test_a_copied_picture_is_the_same(micro, pictures, tmp_path, monkeypatch):
    """Another date alone makes nothing anew; once noted, the picture is not read for it again."""
    extract(micro, pictures, tmp_path / "teacher")
    before = read_index(tmp_path / "teacher")
    for path in pictures.iterdir():
        os.utime(path, (1, 1))
    monkeypatch.setattr(extract_teacher, "read_image", lambda _: pytest.fail("made anew"))
    extract(micro, pictures, tmp_path / "teacher")
    monkeypatch.setattr(common, "file_state", lambda _: pytest.fail("read again"))
    extract(micro, pictures, tmp_path / "teacher")
    after = read_index(tmp_path / "teacher")
    assert after == [entry | {"stat": [entry["stat"][0], 10 ** 9]} for entry in before]
    train(tmp_path / "teacher", tmp_path / "spar")


def test_an_unfinished_extraction_is_not_trained_on(micro, pictures, tmp_path):
    extract(micro, pictures, tmp_path / "teacher")
    path = tmp_path / "teacher" / "index.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n")
    with pytest.raises(RunFailed, match="has 3 of 6 maps.*--partial"):
        train(tmp_path / "teacher", tmp_path / "spar")
    train(tmp_path / "teacher", tmp_path / "spar", "--partial")
    (pictures / "bad.png").write_text("no picture")
    extract(micro, pictures, tmp_path / "teacher")
    train(tmp_path / "teacher", tmp_path / "whole")  # what failed is known to be missing


def test_of_two_first_runs_one_makes_the_settings(tmp_path):
    outcomes, together = [], threading.Barrier(8)

    def start(stride):
        together.wait()
        try:
            common.require_same_settings(tmp_path / "teacher.json", {"stride": stride})
            outcomes.append(stride)
        except (WrongCall, RunFailed):
            pass
    threads = [threading.Thread(target=start, args=(k % 2,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = json.loads((tmp_path / "teacher.json").read_text())["stride"]
    assert outcomes and set(outcomes) == {made} and not list(tmp_path.glob(".tmp*"))


def test_a_spoilt_student_is_not_saved(micro, pictures, tmp_path, monkeypatch):
    extract(micro, pictures, tmp_path / "teacher")
    update = distill.Trainer.update

    def spoil(trainer, *args):
        values = update(trainer, *args)
        if trainer.step == 6:  # the last one, whose loss was still fine
            trainer.parameters[0].data[0] = float("nan")
        return values
    monkeypatch.setattr(distill.Trainer, "update", spoil)
    with pytest.raises(RunFailed, match="not finite after step 6.*--lr"):
        train(tmp_path / "teacher", tmp_path / "spar", "--save-every", 2)
    assert not (tmp_path / "spar" / "open_clip_model.safetensors").exists()
    assert torch.load(tmp_path / "spar" / "training_state.pt", weights_only=True)["step"] == 4


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files"),
                                   OSError(errno.EIO, "Input/output error"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_what_is_not_the_pictures_fault(photos, monkeypatch, error):
    def fail(*_):
        raise error
    monkeypatch.setattr(Image, "open", fail)
    for read in (common.read_image, evaluate_ovs.picture_size):
        with pytest.raises(type(error)):
            read(photos / "0.png")


STAGES = {stage.__name__: stage for stage in (extract_teacher, distill, evaluate_ovs,
                                              time_inference)}


@pytest.mark.parametrize("stage, flags", [
    ("extract_teacher", "--limit -1"), ("extract_teacher", "--limit 0"),
    ("extract_teacher", "--versions 0"), ("extract_teacher", "--versions -1"),
    ("extract_teacher", "--batch-size 0"), ("extract_teacher", "--crop-prob 7"),
    ("extract_teacher", "--crop-prob -1"), ("extract_teacher", "--crop-prob nan"),
    ("extract_teacher", "--flip-prob 2"), ("extract_teacher", "--images="),
    ("extract_teacher", "--ratio inf inf"), ("extract_teacher", "--seed -1"),
    ("extract_teacher", f"--seed {2 ** 70}"), ("extract_teacher", "--device meta"),
    ("extract_teacher", "--workers -1"), ("extract_teacher", "--min-side 0"),
    ("distill", "--lr inf"), ("distill", "--lr 1e38"), ("distill", "--lr 0"),
    ("distill", "--weight-decay inf"), ("distill", "--save-every -1"),
    ("distill", "--save-every 0"), ("distill", "--random-scale inf inf"),
    ("distill", "--random-scale 1000 1001"), ("distill", "--epochs 0"),
    ("evaluate_ovs", "--checkpoint="), ("evaluate_ovs", "--lposs-tau nan"),
    ("evaluate_ovs", "--limit -1"), ("evaluate_ovs", "--area 0"),
    ("evaluate_ovs", "--logit-scale nan"), ("time_inference", "--repeats 0"),
    ("time_inference", "--device meta"), ("time_inference", "--warmup -1")])
def test_absurd_values(stage, flags, tmp_path, micro, pictures):
    name, *values = flags.split()
    more = []
    if stage == "distill":
        extract(micro, pictures, tmp_path / "teacher")
        more = ["--teacher", tmp_path / "teacher", "--out", tmp_path / "out"]
    with pytest.raises(WrongCall, match=name.rstrip("=")):
        run(STAGES[stage], name, *values, *more)


def test_an_empty_first_line_shifts_no_label(tmp_path):
    (tmp_path / "classes.txt").write_text("\ncat\ndog\n")
    with pytest.raises(WrongCall, match="class 1 has an empty name"):
        evaluate_ovs.read_classes(tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_text("cat\ndog\n\n")
    assert len(evaluate_ovs.read_classes(tmp_path / "classes.txt")) == 2


# ---- runs that can go on -------------------------------------------------------------------------

def test_a_deleted_picture_is_no_dead_end(micro, pictures, tmp_path):
    extract(micro, pictures, tmp_path / "teacher")
    (pictures / "1.png").unlink()
    with pytest.raises(RunFailed, match="1.png: no such file; run extract_teacher.py again"):
        train(tmp_path / "teacher", tmp_path / "stopped", "--cache-frozen", "off")
    extract(micro, pictures, tmp_path / "teacher")
    train(tmp_path / "teacher", tmp_path / "spar")
    assert len(losses(tmp_path / "spar")) == 4


@pytest.mark.slow
def test_names_that_files_may_have(micro, photos, tmp_path):
    """Too long for a file beside it, not UTF-8, mathematics to matplotlib."""
    folder = tmp_path / "$a$ $b"
    folder.mkdir()
    names = ["x" * 250 + ".png", os.fsdecode(b"not-utf8-\xff.png"), "$x_{$.png", "y" * 245 + ".png"]
    for name in names:
        shutil.copy(photos / "0.png", folder / name)
    out = folder / "teacher"
    flags = ["--images", folder, "--backbone", micro, "--out", out, *SMALL[:-2]]
    output = finish(command("extract_teacher.py", *flags))
    assert "3 of 4 feature maps" in output and "too long" in output
    spar = tmp_path / "spar $"
    finish(command("distill.py", "--teacher", out, "--out", spar, "--epochs", 1))
    assert (spar / "loss.png").exists()
    output = finish(command("evaluate_ovs.py", "--checkpoint", spar, "--images", folder,
                            "--classes", "cat, sky", "--save-maps", tmp_path / "maps",
                            "--state", tmp_path / "state"))
    assert "maps in" in output and len(list((tmp_path / "maps").rglob("*.png"))) == 3 * 4 + 1


def test_a_file_system_without_modes(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(Path, "chmod", refuse)
    common.write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").exists()


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(os, "link", refuse)
    common.require_same_settings(tmp_path / "a.json", {"a": 1})
    with pytest.raises(WrongCall, match="a was 1 and is now 2"):
        common.require_same_settings(tmp_path / "a.json", {"a": 2})


def test_a_picture_like_a_thread_is_noted(micro, pictures, tmp_path):
    Image.new("RGB", (2000, 20)).save(pictures / "thread.png")
    extract(micro, pictures, tmp_path / "teacher")
    failed = (tmp_path / "teacher" / "failures.jsonl").read_text()
    assert "thread.png: 20 x 2000 pixels are beyond 16 to 1" in failed


def test_anyup_on_a_picture_of_one_patch(backbone, capsys, monkeypatch):
    class Refuses:
        def strips(self, *_):
            pytest.fail("AnyUp cannot")
    monkeypatch.setattr(evaluate_ovs.Method, "upsampler", "anyup")
    method = evaluate_ovs.Method("single-pass", "", backbone, "", anyup=Refuses())
    texts = torch.nn.functional.normalize(torch.randn(2, backbone.dim), dim=-1)
    classes = evaluate_ovs.read_classes("cat, dog")
    evaluate_ovs.say_once.cache_clear()
    for _ in range(2):
        image = torch.zeros(3, 20, 70, dtype=torch.uint8)
        assert method.predict(image, (20, 70), classes, texts).shape == (20, 70)
    assert capsys.readouterr().out.count("AnyUp needs two patches") == 1


# ---- one line instead of a traceback -------------------------------------------------------------

def test_a_disk_that_fills_while_the_student_is_saved(backbone, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("No space left on device (os error 28)")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(RunFailed, match="model.safetensors could not be written.*No space left"):
        backbone.save(tmp_path)


@pytest.fixture
def own_signals():
    """Of this process, which command_line would change."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("error", [MemoryError(), BrokenPipeError(), RuntimeError(
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")])
def test_errors_that_end_in_one_line(error, capfd, monkeypatch, own_signals):
    def main():
        raise error
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    with pytest.raises(SystemExit) as leaving:
        common.command_line(main)
    lines = capfd.readouterr().err.splitlines()
    assert leaving.value.code == 1 and len(lines) <= 1
    assert not lines or "memory" in lines[0]


def test_a_defect_keeps_its_traceback(own_signals):
    def main():
        raise RuntimeError("something else")
    with pytest.raises(RuntimeError):
        common.command_line(main)


def test_an_orientation_that_is_no_number(micro, tmp_path):
    exif = (b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (80, 70)).save(tmp_path / "images" / "0.jpg", exif=exif)
    (tmp_path / "masks").mkdir()
    Image.new("L", (80, 70)).save(tmp_path / "masks" / "0.png")
    flags = ["--images", tmp_path / "images", "--masks", tmp_path / "masks", "--classes", "a, b",
             "--backbone", micro, "--state", tmp_path / "state"]
    run(evaluate_ovs, *flags, "--json", tmp_path / "out.json")
    (row,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert row["images"] == 1 and row["unreadable"] == []


@pytest.mark.parametrize("orientation", [0, 1, 4, 5, 8, 9, 50])
def test_the_size_of_a_picture_with_any_orientation(tmp_path, orientation):
    path, exif = tmp_path / "0.png", Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (80, 70)).save(path, exif=exif)
    assert tuple(evaluate_ovs.picture_size(path)) == common.read_image(path).shape[-2:]


@pytest.mark.slow
def test_ctrl_c_while_libraries_are_imported(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    for script in STAGES:
        process = subprocess.run(
            [sys.executable, str(common.ROOT / f"{script}.py")], capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert process.returncode and process.stderr == ""


def test_a_background_job_goes_on_ignoring_ctrl_c(monkeypatch):
    """As a shell starts it; a Ctrl-C that is meant for another job reaches it, too."""
    handlers = {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL}
    monkeypatch.setattr(signal, "getsignal", handlers.get)
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.update(
        {number: handler}) or signal.SIG_DFL)

    def main():
        assert handlers == {signal.SIGINT: signal.SIG_IGN,
                            signal.SIGTERM: signal.default_int_handler}
        with distill.noted_signals():
            assert handlers[signal.SIGINT] == signal.SIG_IGN
            assert handlers[signal.SIGTERM] != signal.default_int_handler
    with pytest.raises(SystemExit) as leaving:
        common.command_line(main)
    assert leaving.value.code == 0  # and a SIGTERM from here on ends it without a word
    assert handlers == {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL}


@pytest.mark.slow
def test_ctrl_c_for_another_job_while_libraries_are_imported(tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os, signal; os.kill(os.getpid(), signal.SIGINT); raise SystemExit(7)")
    for script in STAGES:
        process = subprocess.run(
            [sys.executable, str(common.ROOT / f"{script}.py")], capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
        assert process.returncode == 7


@pytest.mark.slow
def test_a_clock_that_stands_still(micro, pictures, tmp_path, monkeypatch):
    for name in ("time", "perf_counter", "monotonic"):
        monkeypatch.setattr(time, name, lambda: 1000.0)
    extract(micro, pictures, tmp_path / "teacher")
    train(tmp_path / "teacher", tmp_path / "spar")
    run(evaluate_ovs, "--checkpoint", tmp_path / "spar", "--images", pictures, "--classes", "a, b",
        "--save-maps", tmp_path / "maps", "--state", tmp_path / "state")
    monkeypatch.setattr(time_inference, "matrix_product_rate", functools.partial(
        time_inference.matrix_product_rate, side=16))
    run(time_inference, "--backbone", micro, "--sizes", "64x64", "96x96", "--strides", 0, 32,
        "--warmup", 0, "--repeats", 1, "--plot", tmp_path / "times.png")


def damage(path, how):
    if how == "zip":
        with open(path, "wb") as file:
            np.savez(file, np.zeros(3))
    elif how == "header":
        path.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': '<f2', 'fortran_order': Fal" + b" " * 99)
    elif how == "negative":
        content = path.read_bytes()
        path.write_bytes(content.replace(b"'shape': (", b"'shape': (-", 1))


@pytest.mark.parametrize("how", ["zip", "header", "negative"])
def test_damaged_maps_are_named_and_made_anew(micro, pictures, tmp_path, how):
    extract(micro, pictures, tmp_path / "teacher")
    path = tmp_path / "teacher" / "features" / "1.png.npy"
    before = path.read_bytes()
    damage(path, how)
    with pytest.raises(RunFailed, match="1.png.npy.*extract_teacher.py again"):
        train(tmp_path / "teacher", tmp_path / "spar")
    extract(micro, pictures, tmp_path / "teacher")
    assert path.read_bytes() == before


@pytest.mark.parametrize("value", ["[]", "5", "{}", '{"patch": 0}', "\xff", ""])
@pytest.mark.parametrize("name", ["teacher/teacher.json", "spar/spar.json", "tokens/frozen.json"])
def test_damaged_settings_are_named(micro, pictures, tmp_path, name, value):
    extract(micro, pictures, tmp_path / "teacher")
    kept = ["--cache-frozen", tmp_path / "tokens"]
    train(tmp_path / "teacher", tmp_path / "spar", *kept)
    path = tmp_path / name
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"patch": 0}) if "patch" in value else value)
    if name != "teacher/teacher.json" and value.startswith("{"):
        error, message = WrongCall, "other settings"
        if "patch" in value:
            return  # a key that nobody reads there
    else:
        error, message = RunFailed, Path(name).name
    with pytest.raises(error, match=message):
        train(tmp_path / "teacher", tmp_path / "spar", *kept)


def test_an_entry_of_another_size_than_its_map(tmp_path):
    common.write_json_lines(tmp_path / "index.jsonl", [ENTRY | {"resize": [64, 1], "crop": None}])
    common.write_json(tmp_path / "teacher.json", TEACHER)
    with pytest.raises(RunFailed, match="different sizes"):
        distill.Teacher(tmp_path)


TEACHER = {"backbone": "tiny", "random_init": False, "weights": "", "images": "", "patch": 16,
           "dim": 24}


@pytest.mark.parametrize("key, value", [("backbone", []), ("images", 5), ("patch", True),
                                        ("patch", 0), ("hub_dir", 5), ("dim", 10 ** 30)])
def test_a_teacher_of_wrong_types(tmp_path, key, value):
    common.write_json_lines(tmp_path / "index.jsonl", [ENTRY])
    common.write_json(tmp_path / "teacher.json", TEACHER)
    common.write_json(tmp_path / "planned.json", {"maps": "many"})
    with pytest.raises(RunFailed, match="planned.json"):
        distill.Teacher(tmp_path).require_whole()
    common.write_json(tmp_path / "teacher.json", TEACHER | {key: value})
    with pytest.raises(RunFailed, match="teacher.json"):
        distill.Teacher(tmp_path)


@pytest.mark.parametrize("teacher", [None, 5, {}, {"backbone": 5}, {"backbone": "a", "hub_dir": 5}])
def test_a_student_of_no_teacher(tmp_path, teacher):
    (tmp_path / "spar.json").write_text(json.dumps({"teacher": teacher}))
    with pytest.raises(RunFailed, match="spar.json"):
        read_student(tmp_path, needs_teacher=False)


def test_a_state_that_would_fail_at_its_first_step(micro, pictures, tmp_path):
    extract(micro, pictures, tmp_path / "teacher")
    train(tmp_path / "teacher", tmp_path / "spar")
    path = tmp_path / "spar" / "training_state.pt"
    for spoil in (lambda state: state.update(step=-1),
                  lambda state: state["optimizer"]["state"][0].update(exp_avg=5),
                  lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.ones(1))):
        state = torch.load(path, weights_only=True)
        spoil(state)
        torch.save(state, tmp_path / "spoilt.pt")
        before, _ = path.read_bytes(), shutil.copy(tmp_path / "spoilt.pt", path)
        with pytest.raises(RunFailed, match="training_state.pt cannot be read.*delete it"):
            train(tmp_path / "teacher", tmp_path / "spar")
        path.write_bytes(before)


@pytest.mark.parametrize("state", ["shapes", "keys"])
def test_a_state_of_something_else(micro, pictures, tmp_path, state):
    extract(micro, pictures, tmp_path / "teacher")
    train(tmp_path / "teacher", tmp_path / "spar")
    path = tmp_path / "spar" / "training_state.pt"
    content = torch.load(path, weights_only=True)
    if state == "keys":
        del content["scaler"]
    else:
        content["parameters"][0] = torch.zeros(1)
    torch.save(content, path)
    with pytest.raises(RunFailed, match="training_state.pt cannot be read.*delete it"):
        train(tmp_path / "teacher", tmp_path / "spar")


@pytest.mark.parametrize("log", [None, b"5\n{}\n\xff\n{\"step\": 1}\n"])
def test_a_log_that_was_taken_away(micro, pictures, tmp_path, log):
    extract(micro, pictures, tmp_path / "teacher")
    train(tmp_path / "teacher", tmp_path / "spar")
    path = tmp_path / "spar" / "log.jsonl"
    path.unlink()
    if log:
        path.write_bytes(log)
    train(tmp_path / "teacher", tmp_path / "spar")
    assert json.loads((tmp_path / "spar" / "spar.json").read_text())["loss"] is None


@pytest.mark.parametrize("spoil", [np.transpose, np.ravel, lambda tokens: tokens * np.nan])
def test_spoilt_tokens_are_made_anew(micro, pictures, tmp_path, spoil):
    extract(micro, pictures, tmp_path / "teacher")
    kept = ["--cache-frozen", tmp_path / "tokens"]
    train(tmp_path / "teacher", tmp_path / "a", *kept)
    before = files(tmp_path / "tokens")
    path = tmp_path / "tokens" / "tokens" / "1.png.npy"
    np.save(path, spoil(np.load(path)))
    train(tmp_path / "teacher", tmp_path / "b", *kept)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and files(tmp_path / "tokens") == before


RESULT = {"method": "a", "dataset": "b", "refine": "none", "upsampler": "bilinear",
          "short_side": None, "miou": 1, "pixel_accuracy": 1, "seconds_per_image": 1,
          "per_class_iou": {"a": 1, "b": None}}


@pytest.mark.parametrize("results", [[5], [{"miou": "x"}], 5, None, [
    RESULT | {"miou": "x"}], [RESULT | {"method": 5}], [RESULT | {"short_side": "x"}],
    [RESULT | {"per_class_iou": {"a": []}}], [RESULT | {"pixel_accuracy": float("nan")}],
    [{key: value for key, value in RESULT.items() if key != "per_class_iou"}]])
def test_results_of_wrong_types(tmp_path, results):
    (tmp_path / "out.json").write_text(json.dumps({"results": results}))
    with pytest.raises(RunFailed, match="out.json holds no results"):
        run(evaluate_ovs, "--results", tmp_path / "out.json")


@pytest.fixture
def unfinished(micro, pictures, tmp_path, monkeypatch):
    """Flags of an evaluation that was killed after its JSON was written."""
    (tmp_path / "masks").mkdir()
    for path in pictures.iterdir():
        mask = np.arange(np.prod(Image.open(path).size), dtype=np.uint8) % 2
        Image.fromarray(mask.reshape(Image.open(path).size[::-1])).save(
            tmp_path / "masks" / path.name)
    flags = ["--images", pictures, "--masks", tmp_path / "masks", "--classes", "a, b",
             "--backbone", micro, "--state", tmp_path / "state", "--json", tmp_path / "out.json",
             "--save-maps", tmp_path / "maps"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_ovs, "show", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(evaluate_ovs, *flags)
    return flags


def test_a_spoilt_line_of_a_journal_is_counted_again(unfinished, tmp_path):
    (before,) = json.loads((tmp_path / "out.json").read_text())["results"]
    (journal,) = (tmp_path / "state").iterdir()
    first, *others = common.read_json_lines(journal)
    first |= {"cells": [0], "counts": [5]}
    spoilt = [first | each for each in (
        {"cells": [4]}, {"cells": ["x"]}, {"cells": [[0]]}, {"cells": [0, 1]}, {"counts": [-1]},
        {"counts": [1.5]}, {"seconds": "x"}, {"seconds": float("inf")}, {"image": 5})]
    common.write_json_lines(journal, spoilt + others)
    run(evaluate_ovs, *unfinished)
    (after,) = json.loads((tmp_path / "out.json").read_text())["results"]
    times = {"seconds_per_image": None}
    assert after | times == before | times


def test_label_maps_that_are_missing_or_damaged(unfinished, tmp_path):
    before = files(tmp_path / "maps")
    path = tmp_path / "maps" / "1.png.labels.png"
    path.write_text("no picture")
    with pytest.raises(RunFailed, match="1.png.labels.png cannot be read"):
        run(evaluate_ovs, *unfinished)
    path.unlink()
    run(evaluate_ovs, *unfinished)
    assert files(tmp_path / "maps") == before


def test_results_without_a_size(tmp_path, capsys):
    results = [{key: value for key, value in RESULT.items() if key != "short_side"}]
    (tmp_path / "out.json").write_text(json.dumps({"results": results}))
    run(evaluate_ovs, "--results", tmp_path / "out.json")
    assert "b, own size" in capsys.readouterr().out


# ---- order ---------------------------------------------------------------------------------------

def test_one_training_a_folder(micro, pictures, tmp_path):
    extract(micro, pictures, tmp_path / "teacher")
    train(tmp_path / "teacher", tmp_path / "spar")
    with distill.hold(tmp_path / "spar"):
        with pytest.raises(RunFailed, match="another distill.py is training in .*spar"):
            train(tmp_path / "teacher", tmp_path / "spar")
    train(tmp_path / "teacher", tmp_path / "spar")


def test_a_full_disk_while_a_line_is_written(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, lines):
            return len(lines) - 1
    monkeypatch.setattr("builtins.open", lambda *_, **__: Full())
    with pytest.raises(RunFailed, match="log.jsonl could not be written.*No space left"):
        common.append_json_lines(tmp_path / "log.jsonl", {"step": 1})


def test_remains_of_a_killed_run_are_cleaned(micro, pictures, tmp_path):
    extract(micro, pictures, tmp_path / "teacher")
    for name in ("teacher/.tmp-teacher.json", "teacher/features/.tmp-0.png.npy"):
        (tmp_path / name).write_text("cut short")
    extract(micro, pictures, tmp_path / "teacher")
    train(tmp_path / "teacher", tmp_path / "spar")
    for name in (".tmp-x", ".tmpewMpfj"):  # the second is safetensors'
        (tmp_path / "spar" / name).write_text("cut short")
    train(tmp_path / "teacher", tmp_path / "spar")
    assert not list(tmp_path.rglob(".tmp*"))


def test_remains_among_frozen_tokens_are_cleaned(micro, pictures, tmp_path):
    """Those of processes that are no more: others may be writing into the same folder."""
    extract(micro, pictures, tmp_path / "teacher")
    kept = ["--cache-frozen", tmp_path / "tokens"]
    train(tmp_path / "teacher", tmp_path / "a", *kept)
    before = files(tmp_path / "tokens")
    gone = subprocess.Popen(["true"])
    gone.wait()
    node, mine = platform.node(), f".tmp-{common.this_process()}1.png.npy"
    for name in (f".tmp-.tmp-{node}-{gone.pid}-0123-frozen.json", mine,
                 f"tokens/.tmp-{node}-{gone.pid}-0.png.npy", f"tokens/.tmp-else-{gone.pid}-x.npy"):
        (tmp_path / "tokens" / name).write_text("cut short")
    train(tmp_path / "teacher", tmp_path / "b", *kept)
    assert (files(tmp_path / "tokens").keys() - before.keys()
            == {mine, f"tokens/.tmp-else-{gone.pid}-x.npy"})


def test_a_picture_that_was_spoilt_is_noted(micro, pictures, tmp_path):
    """Its map is of a picture that is no more: neither counted nor trained on."""
    extract(micro, pictures, tmp_path / "teacher")
    (pictures / "1.png").write_text("no picture")
    extract(micro, pictures, tmp_path / "teacher")
    assert [entry["image"] for entry in read_index(tmp_path / "teacher")] == ["0.png"] * 2 + [
        "2.png"] * 2
    assert "1.png cannot be read" in (tmp_path / "teacher" / "failures.jsonl").read_text()
    train(tmp_path / "teacher", tmp_path / "spar")


def test_lines_of_separate_writers_are_newer(tmp_path):
    common.write_json_lines(tmp_path / "index.jsonl", [ENTRY])
    common.write_json_lines(tmp_path / "index-1of2.jsonl", [ENTRY | {"grid": [5, 4]}])
    assert read_index(tmp_path) == [ENTRY | {"grid": [5, 4]}]


def test_a_configuration_of_a_million_layers(tmp_path):
    config = json.loads(json.dumps(MICRO))
    config["model_cfg"]["vision_cfg"]["layers"] = 10 ** 6
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(RunFailed, match="1000000 layers"):
        load_backbone(f"local-dir:{tmp_path}", random_init=True)
