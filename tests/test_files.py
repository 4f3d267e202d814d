"""Files and images as data/files.py reads and writes them."""
import contextlib
import errno
import json
import os
import threading
import time

import numpy as np
import pytest
from PIL import Image, ImageOps

from data import files
from data.benchmarks import image_size
from data.files import RunError, UsageError

# ---- files -----------------------------------------------------------------------------------

def test_atomic_path_replaces_only_after_success(tmp_path):
    path = tmp_path / "sub" / ("x" * 250 + ".json")  # as long a name as a file system takes
    files.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    for error, raised in ((KeyError("mine"), KeyError), (OSError(28, "No space left"), RunError)):
        with pytest.raises(raised), files.atomic_path(path) as temporary:
            temporary.write_text("half a")
            raise error
    assert json.loads(path.read_text()) == {"a": 1} and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [
    MemoryError(), OSError(errno.EMFILE, "Too many open files"), OSError(errno.EIO, "I/O error"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"), RunError("x"), UsageError("x")])
def test_what_is_not_the_files_fault_is_passed_on(error):
    with pytest.raises(type(error)) as caught, files.reading("some.json", "try again"):
        raise error
    assert caught.value is error


def test_damaged_json_is_named_and_damaged_lines_are_left_out(tmp_path):
    path = tmp_path / "a.json"
    for content in (b"", b"[]", b"5", b"\xff", b"[" * 10 ** 5):
        path.write_bytes(content)
        with pytest.raises(RunError, match="a.json cannot be read.*; try again"):
            files.read_json(path, "try again")
    path.write_bytes(b'{"a": 1}\n5\n[]\n\xff\xfe\n' + b"[" * 10 ** 5 + b'\n{}\n{"cut": ')
    assert files.read_lines(path) == [{"a": 1}, {}]
    assert files.read_lines(tmp_path / "missing.jsonl") == []


def test_of_several_first_runs_one_makes_the_settings(tmp_path):
    outcomes, together = [], threading.Barrier(8)

    def first_run(stride):
        together.wait()
        with contextlib.suppress(UsageError):
            files.keep_settings(tmp_path / "a.json", {"stride": stride})
            outcomes.append(stride)
    threads = [threading.Thread(target=first_run, args=(k % 2,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = json.loads((tmp_path / "a.json").read_text())["stride"]
    assert outcomes == [made] * 4 and [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("links", [True, False])
def test_other_settings_are_refused(tmp_path, monkeypatch, links):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")
    if not links:  # as on some network file systems
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "out" / "a.json"
    files.keep_settings(path, {"stride": 1, "torch": "2.0", "more": 1}, free=["torch"])
    files.keep_settings(path, {"stride": 1, "torch": "2.1"}, free=["torch"])
    assert json.loads(path.read_text()) == {"stride": 1, "torch": "2.1", "more": 1}
    with pytest.raises(UsageError, match="stride was 1 and is now 2.*another folder"):
        files.keep_settings(path, {"stride": 2, "torch": "2.1"}, free=["torch"])
    assert json.loads(path.read_text())["stride"] == 1 and len(list(tmp_path.rglob("*"))) == 2


def test_stale_temporary_files_are_removed(tmp_path):
    for name in ("old.npy", "new.npy"):
        with files.atomic_path(tmp_path / "sub" / name) as temporary:
            temporary.write_text("")
        temporary.write_text("cut short")  # as a killed process leaves it
        if name == "old.npy":
            os.utime(temporary, (time.time() - 100,) * 2)
    (tmp_path / ".tmp-my-own").write_text("")
    files.remove_stale_files(tmp_path, age=50)
    assert temporary.exists() and len(list(tmp_path.rglob("*"))) == 5
    files.remove_stale_files(tmp_path)
    assert not temporary.exists() and len(list(tmp_path.rglob("*"))) == 4


ENTRY = {"image": "a.png", "version": 0, "file": "features/a.png.npy", "resize": [64, 64],
         "crop": None, "flip": False, "grid": [4, 4], "crc32": 7}


@pytest.mark.parametrize("key, value", [
    ("file", "/abs/x.npy"), ("file", "features/../../x.npy"), ("image", "/abs/x.png"),
    ("image", "../x.png"), ("image", "a\0"), ("image", 5), ("resize", [64]), ("resize", [0, 64]),
    ("crop", ["a"]), ("crop", [0, 0, 64]), ("crop", [0, 0, 64, -9]), ("flip", 5), ("grid", None),
    ("grid", [4.0, 4]), ("version", "1"), ("version", True), ("version", float("inf"))])
def test_an_index_entry_that_no_stage_wrote_is_refused(tmp_path, key, value):
    files.write_lines(tmp_path / "index.jsonl", [ENTRY])
    assert files.read_index(tmp_path) == [ENTRY]
    files.write_lines(tmp_path / "index.jsonl", [ENTRY | {key: value}])
    with pytest.raises(RunError, match="index.jsonl"):
        files.read_index(tmp_path)


def test_lines_of_separate_writers_are_newer(tmp_path):
    files.write_lines(tmp_path / "index.jsonl", [ENTRY | {"version": 1}, ENTRY])
    files.write_lines(tmp_path / "index-1of2.jsonl", [ENTRY | {"grid": [5, 4]}])
    assert files.read_index(tmp_path) == [ENTRY | {"grid": [5, 4]}, ENTRY | {"version": 1}]


# ---- images ----------------------------------------------------------------------------------

def test_links_to_folders_are_followed_and_loops_end(tmp_path, photos, capsys):
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.JPG").write_text("")
    for name in ("a.txt", "b.HEIC", "c.tif"):
        (root / name).write_text("")
    (root / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (root / "folder.png").mkdir()
    (root / "link").symlink_to(photos / "sub")
    (root / "loop").symlink_to(root)
    assert files.list_images(root) == ["a.JPG", "link/8.png", "link/9.png"]
    assert f"{root}: 2 files such as " in capsys.readouterr().err
    assert files.list_images(root / "a.JPG") == ["a.JPG"]


def test_folders_without_images_are_named(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RunError, match=str(folder)):
            files.list_images(folder)


def test_unreadable_folders_are_named(photos, capsys, monkeypatch):
    scan = os.scandir

    def refuse(folder):
        if os.fspath(folder).endswith("sub"):
            raise PermissionError(13, "Permission denied", os.fspath(folder))
        return scan(folder)
    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    assert len(files.list_images(photos)) == 8
    (line,) = capsys.readouterr().err.splitlines()
    assert str(photos / "sub") in line
    with pytest.raises(RunError, match="sub"):
        files.list_images(photos / "sub")


@pytest.mark.parametrize("orientation", [*range(10), 50])
def test_every_exif_orientation_is_undone(tmp_path, orientation):
    path, exif = tmp_path / "0.png", Image.Exif()
    exif[274] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    image = files.read_image(path)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert (image.permute(1, 2, 0).numpy() == expected).all()
    assert tuple(image_size(path)) == expected.shape[:2]  # by the header alone


@pytest.mark.parametrize("exif", [
    b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",  # a text
    b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0nothing", b"\0"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_turns_nothing(tmp_path, exif):
    path = tmp_path / "0.jpg"
    Image.new("RGB", (80, 70)).save(path, exif=exif)
    assert files.read_image(path).shape == (3, 70, 80) and tuple(image_size(path)) == (70, 80)


def test_16_bit_images_become_8_bit(tmp_path):
    levels = np.arange(600).reshape(20, 30) % 256
    Image.fromarray((levels * 257).astype(np.uint16)).save(tmp_path / "16.png")
    assert (files.read_image(tmp_path / "16.png").numpy() == levels).all()


def test_lines_after_one_that_was_cut_short_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    files.append_lines(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"b": 2, "c')  # as a killed process leaves it
    files.append_lines(path, {"d": 4}, {"e": 5})
    files.append_lines(path, {"f": 6})
    assert files.read_lines(path) == [{"a": 1}, {"d": 4}, {"e": 5}, {"f": 6}]
