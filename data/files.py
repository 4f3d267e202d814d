"""Images and other files on a disk, and the errors that a user can cause.

Images are (3, H, W) uint8. Whatever is written stands under a temporary name until it is whole.
"""
import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError


class UsageError(Exception):
    """A flag or argument that cannot work; a stage ends with exit code 2."""


class RunError(Exception):
    """The call is right, but the run cannot go on (a bad file, a full disk); exit code 1."""


def is_out_of_memory(error):
    """Return whether an error says that memory ran out, on a CPU or a GPU."""
    texts = "can't allocate memory", "out of memory", "ALLOC_FAILED"
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or any(text in str(error) for text in texts))


def first_line(error):
    """Return the first line of an error's text, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def in_words(settings):
    """Return the fields of a dataclass in one line: "epochs 8, lr 0.0005"."""
    return ", ".join(f"{name.replace('_', ' ')} {value}"
                     for name, value in dataclasses.asdict(settings).items())


@contextlib.contextmanager
def reading(path, remedy):
    """Turn errors in parsing or first using a file into a RunError that names it and a remedy."""
    try:
        yield
    except (UsageError, RunError):
        raise
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; {remedy}") from None
    except Exception as error:  # decoders raise many types for a damaged file
        if is_out_of_memory(error):
            raise
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO):
            error.filename = str(path)  # the system's fault, not the file's
            raise
        reason = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise RunError(f"{path} cannot be read ({reason}); {remedy}") from error


@contextlib.contextmanager
def naming(what):
    """Put the name of an image or a backbone before the text of an error."""
    try:
        yield
    except (UsageError, RunError) as error:
        raise type(error)(f"{what}: {error}") from None


def not_written(path, error):
    """Return the RunError for a write that failed."""
    reason = getattr(error, "strerror", None) or first_line(error)
    return RunError(f"{path} could not be written ({reason}); what was finished is kept, and the "
                    "same command continues")


@contextlib.contextmanager
def atomic_path(path, durable=True):
    """Yield a temporary path, which replaces `path` on success. Raise RunError for what the disk
    refused. durable: even a power failure leaves no partial file."""
    path = Path(path)
    # each process has a name of its own; the last to finish wins
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # a full disk, mostly; the old file is still there
        raise not_written(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_stale_files(folder, age=0):
    """Remove what killed processes left below a folder, if older than `age` seconds."""
    ours_or_safetensors = re.compile(r"\.tmp(-[0-9a-f]{16}(\..*)?|\w{6})")
    for path in Path(folder).rglob(".tmp*"):
        if (ours_or_safetensors.fullmatch(path.name) and path.is_file()
                and time.time() - path.stat().st_mtime >= age):
            path.unlink(missing_ok=True)


def save_array(path, array):
    """Write an .npy file and return its CRC-32. Readers check it, so it need not be durable."""
    content = io.BytesIO()
    np.save(content, array)  # into a file, it would miss that a disk is full
    with atomic_path(path, durable=False) as temporary:
        temporary.write_bytes(content.getbuffer())
    return zlib.crc32(content.getbuffer())


def save_torch(path, value):
    """Write a value as torch.save does."""
    with atomic_path(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:  # how it reports a full disk
            raise OSError(first_line(error)) from error


def write_json(path, value):
    """Write a value as an indented JSON file."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path, remedy):
    """Return the object in a JSON file. Raise RunError, with the remedy, where there is none."""
    with reading(path, remedy):
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    return value


def read_lines(path):
    """Return a list of the objects in a .jsonl file, if any, without lines that were cut short."""
    entries = []
    for line in Path(path).read_bytes().splitlines() if Path(path).exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]


def write_lines(path, entries):
    """Write objects as a .jsonl file."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def append_lines(path, *entries):
    """Append objects to a .jsonl file in one write, so that processes do not mix their lines. Where
    the last line was cut short, they begin on a new one."""
    lines = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
    try:
        with open(path, "a+b", buffering=0) as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                lines = b"\n" + lines
            if file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise not_written(path, error) from error


def read_index(folder):
    """Return extract_teacher.py's index entries, sorted. Raise RunError for a damaged one."""
    entries = {}
    # index.jsonl first: the lines of separate writers, index-*.jsonl, are newer
    for path in sorted(Path(folder).glob("index*.jsonl"), reverse=True):
        with reading(path, "delete that line and run extract_teacher.py again"):
            for entry in read_lines(path):
                check_index_entry(entry)
                entries[entry["image"], entry["version"]] = entry
    return [entries[key] for key in sorted(entries)]


def check_index_entry(entry):
    """Raise an error for an index entry of no augmented image, or of files outside the folder."""
    size, grid = planned_size(entry), entry["grid"]
    whole = [*size, *grid, *entry["resize"], *(entry["crop"] or ()), entry["version"],
             entry.get("crc32", 0)]
    if (len(size) != 2 or len(grid) != 2 or any(type(number) is not int for number in whole)
            or min(*size, *grid) < 1 or not isinstance(entry["flip"], bool)):
        raise ValueError(f"no augmented image in {json.dumps(entry)[:200]}")
    for name in (entry["image"], entry["file"]):
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise ValueError(f"{name!r} is not below its folder")


def file_state(path):
    """Return what identifies a file: its size, its date and a digest of its bytes."""
    stat = os.stat(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return {"stat": [stat.st_size, stat.st_mtime_ns], "digest": digest}


def is_unchanged(path, state):
    """Return whether a file is what file_state described. Its bytes are compared only if its size
    or its date changed."""
    if not os.path.isfile(path):
        return False
    stat = os.stat(path)
    if [stat.st_size, stat.st_mtime_ns] == state.get("stat"):
        return True
    return file_state(path)["digest"] == state.get("digest")


def same_threads(path):
    """Use as many threads as the run that wrote the settings at `path`, if any: the last bits of
    results depend on it."""
    if Path(path).exists():
        with reading(path, "delete that folder"):
            threads = read_json(path, "delete that folder").get("threads")
            torch.set_num_threads(threads or torch.get_num_threads())


def free_bytes(folder):
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def require_room(folder, need, what):
    """Raise RunError unless the disk of a folder has room for `need` more bytes."""
    free = free_bytes(folder)
    if need > free:
        raise RunError(f"{what} need {need / 1e9:.2f} GB in {folder}, whose disk has "
                       f"{free / 1e9:.2f} GB free; give a folder on a larger disk")


def keep_settings(path, settings, free=()):
    """Write a folder's settings at `path` on the first run. Raise UsageError for others later,
    except in keys that are `free`."""
    path = Path(path)
    if not path.exists():
        mine = path.with_name(f".tmp-{secrets.token_hex(8)}")
        write_json(mine, settings)
        with contextlib.suppress(OSError):  # another first run was earlier, or there are no links
            os.link(mine, path)
        if not path.exists():
            os.replace(mine, path)
        mine.unlink(missing_ok=True)
    before = read_json(path, "delete that folder")
    changes = [f"{key} was {before.get(key)!r} and is now {value!r}"
               for key, value in settings.items() if key not in free and before.get(key) != value]
    if changes:
        raise UsageError(f"{path.parent} was made with other settings: {', '.join(changes)}. Write "
                         "to another folder, or delete that one")
    kept = before | {key: settings[key] for key in free}
    if kept != before:
        write_json(path, kept)


# ---- images ----------------------------------------------------------------------------------

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
OTHER_SUFFIXES = {".avif", ".bmp", ".gif", ".heic", ".heif", ".jxl", ".tif", ".tiff"}


def list_images(root):
    """Return the sorted relative paths of a folder's images, or of one image. Raise RunError."""
    root, suffixes, unreadable = Path(root), ", ".join(sorted(IMAGE_SUFFIXES)), []
    if root.is_file():
        return [root.name]
    if not root.is_dir():
        raise RunError(f"{root}: no such folder; give a folder of {suffixes} images")
    paths, visited, others = [], set(), []
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=unreadable.append):
        subfolders.sort()
        if os.path.realpath(folder) in visited:  # a link that leads back
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        paths += [os.path.relpath(os.path.join(folder, name), root) for name in files
                  if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
                  and os.path.isfile(os.path.join(folder, name))]
        others += [name for name in files if os.path.splitext(name)[1].lower() in OTHER_SUFFIXES]
    if others:
        print(f"warning: {root}: {len(others)} files such as {others[0]} are left out; convert "
              f"them to {suffixes}", file=sys.stderr)
    for error in unreadable:
        print(f"warning: {error.filename}: {error.strerror}; its images are left out",
              file=sys.stderr)
    if not paths:
        raise RunError(f"{root}: {unreadable[0].strerror}" if unreadable else
                       f"{root} holds no image ({suffixes}), nor does any folder below it")
    return sorted(paths)


# the turn that each value of EXIF's orientation (tag 274) asks for
EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}


def exif_orientation(image):
    """Return the orientation of a PIL image, 1 to 8, of which 5 and more are sideways."""
    try:
        return image.getexif().get(274)
    except Exception:  # Pillow raises many types for damaged metadata
        return None


def upright(image):
    """Return a PIL image turned as its EXIF data ask."""
    turn = EXIF_TURNS.get(exif_orientation(image))
    return image if turn is None else image.transpose(turn)


def to_rgb(image):
    """Return a PIL image of any mode, on white and upright, as an RGB tensor (3, H, W) uint8."""
    image = upright(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion clips at 255
        levels = np.asarray(image, np.float64).clip(0, 65535) / 257 + 0.5
        if levels.max() < 64:
            print(f"warning: {getattr(image, 'filename', 'an image')} uses at most 14 of its 16 "
                  "bits and is nearly black; stretch its levels", file=sys.stderr)
        image = Image.fromarray(levels.astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def as_tensor(image):
    """Return an image of any kind as (3, H, W) uint8. Raise TypeError for anything else."""
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if torch.is_tensor(image) and image.dtype == torch.uint8 and len(image) == image.ndim == 3:
        return image
    kind = f"{getattr(image, 'dtype', type(image).__name__)} {tuple(getattr(image, 'shape', ()))}"
    raise TypeError(f"image: {kind} is not supported; give a path, a PIL image, an array (H, W, 3) "
                    "of uint8 or a tensor (3, H, W) of uint8")


def read_image(path):
    """Return an image file as (3, H, W) uint8. Raise RunError if it cannot be decoded."""
    with reading(path, "replace or remove it"), Image.open(path) as image:
        return to_rgb(image)


def resize_image(image, size, antialias=False):
    """Resize (3, H, W) uint8 bilinearly, rounded to 8 bits; published evaluations do so without
    antialiasing."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    resized = F.interpolate(image[None].float(), size=tuple(size), mode="bilinear",
                            align_corners=False, antialias=antialias)[0]
    return resized.round_().to(torch.uint8)


def nearest_multiple(length, patch):
    """Return the multiple of patch nearest to length, at least one patch."""
    return max(patch, int(length / patch + 0.5) * patch)


def fit_to_patches(image, patch):
    """Resize (3, H, W) uint8 to multiples of the patch, so that its grid covers all pixels."""
    return resize_image(image, [nearest_multiple(side, patch) for side in image.shape[-2:]])


def apply_augmentation(image, plan):
    """Return an image (3, H, W) uint8 resized, cropped and flipped as a plan says:
    {"resize": [H, W], "crop": [top, left, H', W'] or None, "flip": bool}."""
    image = resize_image(image, plan["resize"])
    if plan["crop"] is not None:
        top, left, height, width = plan["crop"]
        image = image[:, top:top + height, left:left + width]
    return image.flip(-1) if plan["flip"] else image


def planned_size(plan):
    """Return (H', W') of the image that apply_augmentation makes."""
    return tuple(plan["crop"][2:]) if plan["crop"] else tuple(plan["resize"])
