"""What the stages share, in the order in which data meets it: errors and files, device and ranks,
pictures, the backbones, windows and their stitching, class names, segmentation.

Shapes: images are (3, H, W), maps (h, w, C) with h = H / patch and w = W / patch; heights come
before widths everywhere.
"""
import collections
import concurrent.futures
import contextlib
import datetime
import errno
import functools
import hashlib
import importlib
import json
import math
import os
import pickle
import platform
import re
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

ROOT = Path(__file__).resolve().parent
DEMO = ROOT / "data" / "demo"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
IGNORE = 255  # the label that counts nowhere
UMASK = os.umask(0)
os.umask(UMASK)


# ---- errors and files ----------------------------------------------------------------------------

class WrongCall(Exception):
    """Values that cannot work; a command ends with exit code 2."""


class RunFailed(Exception):
    """The call is right but the run cannot go on (a bad file, a full disk); exit code 1."""


# lowest and highest value of flags, whichever stage has them; all numbers must be finite
RANGES = {
    **dict.fromkeys(["limit", "versions", "batch_size", "save_every", "window", "epochs",
                     "long_side", "min_side", "short_side", "area", "lposs_k", "lposs_steps",
                     "lposs_reach", "repeats", "k", "bank_size", "steps", "crop"], (1, 10 ** 9)),
    **dict.fromkeys(["stride", "strides", "warmup", "workers"], (0, 10 ** 9)),
    **dict.fromkeys(["crop_prob", "flip_prob"], (0, 1)),
    **dict.fromkeys(["ratio", "random_scale"], (1e-6, 1000)),
    **dict.fromkeys(["seed", "seeds"], (0, 2 ** 63 - 1)),
    **dict.fromkeys(["temperature", "train_share"], (1e-6, 1)),
    "lr": (1e-12, 1e30), "weight_decay": (0, 1000),
}


# of library code that are flags as well
PARAMETERS = ("backbone", "random_init", "hub_dir", "dinov3_weights", "window", "stride", "classes",
              "background", "device")


def check_values(args):
    """Raise WrongCall for an empty text, a number that is not finite, or one out of its range."""
    for name, value in vars(args).items():
        flag, (low, high) = "--" + name.replace("_", "-"), RANGES.get(name, (-math.inf, math.inf))
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(each, str) and not each.strip():
                raise WrongCall(f"{flag}: an empty text; give a value, or leave the flag out")
            if isinstance(each, bool) or not isinstance(each, (int, float)):
                continue
            if not math.isfinite(each):
                raise WrongCall(f"{flag} {each}: must be a finite number")
            if not low <= each <= high:
                bound = f"at least {low:g}" if each < low else f"at most {high:g}"
                raise WrongCall(f"{flag} {each}: must be {bound}")


def speaks_flags(main):
    """Decorator of a stage's main, which checks the flags' values; and what library code says of a
    parameter, `batch_size`, is said of the flag, --batch-size."""
    @functools.wraps(main)
    def stage(args):
        check_values(args)
        try:
            return main(args)
        except (WrongCall, RunFailed) as error:
            text = str(error)
            for name in PARAMETERS:
                text = text.replace(f"`{name}`", "--" + name.replace("_", "-"))
            raise type(error)(text) from error
    return stage


def command_line(main, *args):
    """Run a stage's main(*args) and exit: what a user can cause ends in one line on stderr."""
    # a batch system's SIGTERM ends a stage as Ctrl-C does; a shell's background job ignores SIGINT
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM)
               if signal.getsignal(number) != signal.SIG_IGN]
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        main(*args)
        code = 0
    except WrongCall as error:
        code = report(error, 2)
    except RunFailed as error:
        code = report(error, 1)
    except KeyboardInterrupt:
        code = 130
        if os.environ.get("RANK", "0") == "0":
            report(f"interrupted; continue with: {this_command()}", code)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        code = report(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code = report(f"out of memory ({first_line(error)[:120]}); a smaller --batch-size, smaller "
                      "pictures or --precision bf16 need less", 1)
    for number in numbers:  # all is said: another one, as torchrun sends, has no traceback
        signal.signal(number, signal.SIG_DFL)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(code)


def is_out_of_memory(error):
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or "can't allocate memory" in str(error))


def report(error, code):
    if os.environ.get("SPAR_TRACEBACK"):
        traceback.print_exc()
    print(f"error: {error}", file=sys.stderr)
    return code


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def this_command():
    """The command line of this process, as a user would type it again."""
    launcher = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        launcher = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    return shlex.join(launcher + sys.argv)


def short_name(name, most=255):
    """A file's name in so many bytes, as a file system takes them: with a digest in its middle
    where it is longer."""
    encoded = os.fsencode(name)
    if len(encoded) <= most:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:16].encode()
    return os.fsdecode(encoded[:most - 32] + digest + encoded[-16:])


def not_written(path, error):
    return RunFailed(f"{path} could not be written ({error.strerror or error}); what was finished "
                     "is kept, and the same command continues")


@contextlib.contextmanager
def atomic_path(path, writer=""):
    """A temporary path in path's folder, for the caller to write; on success it replaces path, on
    failure it is removed.

    writer: sets apart processes that may write the same path at once; the last to finish wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the same name each time, so that a killed run's remains are overwritten
    temporary = path.with_name(short_name(f".tmp-{writer}{path.name}"))
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(PermissionError):  # vfat has no modes
            temporary.chmod(0o666 & ~UMASK)  # safetensors would leave it to its owner alone
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk, mostly; at path still stands the old file
            raise not_written(path, error) from error
        raise


def this_process():
    """Whose temporary files are whose, in a folder that processes and machines share."""
    return f"{platform.node()}-{os.getpid()}-"


def remove_remains(folder):
    """Take away temporary files that killed processes of this machine left in such a folder."""
    name = re.compile(rf"(?:\.tmp-)+{re.escape(platform.node())}-(\d{{1,9}})-")
    for path in Path(folder).rglob(".tmp-*"):
        process = name.match(path.name)
        if process and not is_running(int(process[1])):
            path.unlink(missing_ok=True)


def is_running(pid):
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_json(path, value, writer=""):
    with atomic_path(path, writer) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


NUMBER = int | float


def fits(value, kinds):
    """Whether what JSON held is an object whose values at these keys are of these types, a missing
    one being None. Numbers are finite, and no bool is one."""
    def is_kind(each, kind):
        if isinstance(each, bool):
            return kind is bool
        return isinstance(each, kind) and (not isinstance(each, NUMBER) or abs(each) < 2 ** 63)
    return isinstance(value, dict) and all(is_kind(value.get(key), kind)
                                           for key, kind in dict(kinds).items())


def whole_numbers(values, low=0, high=2 ** 63):
    """Whether a list from JSON holds only these, from low to under high."""
    return all(type(value) is int and low <= value < high for value in values)


# of what stages read of each other
OF_BACKBONE = {"backbone": str, "random_init": bool, "hub_dir": str | None,
               "dinov3_weights": list | None}
FAILURE = {"image": str, "version": int, "error": str}


def read_json(path, made_by, kinds=()):
    """A JSON object that a stage wrote. Raises RunFailed, naming the command that makes it, also
    where it does not fit the kinds."""
    try:
        value = json.loads(Path(path).read_text())
        if not fits(value, kinds):
            raise ValueError(f"no object with {', '.join(kinds) or 'keys'} as it should be")
        return value
    except FileNotFoundError:
        raise RunFailed(f"{path} does not exist; {made_by} makes it") from None
    except (ValueError, RecursionError, IsADirectoryError, NotADirectoryError) as error:
        raise RunFailed(f"{path} is not readable JSON ({error}); {made_by} makes it anew") from None


def read_json_lines(path, kinds=()):
    """The objects in a .jsonl file that fit the kinds, without lines that an interruption cut
    short: a list (empty without the file)."""
    if not Path(path).exists():
        return []
    entries = []
    for line in Path(path).read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [each for each in entries if fits(each, kinds)]


def write_json_lines(path, entries, writer=""):
    with atomic_path(path, writer) as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def append_json_lines(path, *entries):
    """Add lines in a single write, so that processes sharing the file do not mix theirs."""
    lines = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
    try:
        with open(path, "ab", buffering=0) as file:
            if file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise not_written(path, error) from error


def read_index(folder):
    """What extract_teacher.py made: the entries of index.jsonl and of the index-*.jsonl of its
    separate writers, one a map, in order. Raises RunFailed for one that no stage wrote."""
    keys, entries = {"image", "version", "file", "resize", "crop", "flip", "grid"}, {}
    # the writers' own lines are newer than the merged ones
    for path in sorted(Path(folder).glob("index*.jsonl"),
                       key=lambda path: (path.name != "index.jsonl", path.name)):
        for entry in read_json_lines(path):
            if not keys <= entry.keys():  # rubbish; what it may have been is made anew
                continue
            if not is_index_entry(entry):
                raise RunFailed(f"{path}: the line {json.dumps(entry)[:200]} is none that "
                                "extract_teacher.py wrote; delete it, and run that again")
            entries[entry["image"], entry["version"]] = entry
    return [entries[key] for key in sorted(entries)]


def is_index_entry(entry):
    """Whether a line says how a picture was augmented, and names files below their folders."""
    kinds = {"image": str, "version": int, "file": str, "resize": list, "crop": list | None,
             "flip": bool, "grid": list}
    state = {"stat": list, "digest": str}  # older ones have none
    if not fits(entry, kinds | state if state.keys() & entry.keys() else kinds):
        return False
    resize, crop, names = entry["resize"], entry["crop"], [entry["image"], entry["file"]]
    sizes = [resize, entry["grid"], *([crop[2:]] if crop else [])]
    return (all(len(size) == 2 and whole_numbers(size, low=1) for size in sizes)
            and (crop is None or len(crop) == 4 and whole_numbers(crop[:2]) and all(
                start + part <= side for start, part, side in zip(crop, crop[2:], resize)))
            and not any(Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name
                        for name in names)
            and entry["file"].startswith("features/") and entry["version"] >= 0
            and whole_numbers(entry.get("stat", ())) and len(entry.get("stat", "ab")) == 2)


def file_stat(path):
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns]


def file_state(path):
    """By which a picture is known again: its size and date, and a digest of its bytes."""
    stat = file_stat(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return {"stat": stat, "digest": digest}


def is_unchanged(path, state):
    """Whether a file is still what file_state told; it is read only where its date has changed."""
    if not os.path.isfile(path):
        return False
    stat = file_stat(path)
    if "stat" not in state or stat == state["stat"]:
        return True
    return stat[0] == state["stat"][0] and file_state(path)["digest"] == state["digest"]


def free_bytes(folder):
    """Of the disk of a folder, which need not exist yet."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def require_room(folder, need, what):
    """Raise RunFailed unless the disk of a folder has room for `need` bytes more."""
    free = free_bytes(folder)
    if need > free:
        raise RunFailed(f"{what} need {need / 1e9:.2f} GB in {folder}, whose disk has "
                        f"{free / 1e9:.2f} GB free; give a folder on a larger disk")


def require_same_settings(path, settings, free=(), flag="--out"):
    """Keep a folder to one set of settings: write them on the first run, refuse others on the next.

    path: the JSON file of the settings. free: keys that may differ (library versions, say).
    flag: what names the folder. Raises WrongCall.
    """
    path = Path(path)
    if not path.exists():
        mine = path.with_name(f".tmp-{this_process()}{secrets.token_hex(8)}-{path.name}")
        write_json(mine, settings)
        try:
            os.link(mine, path)  # unlike a replacement, only one of several first runs succeeds
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(mine, path)
        mine.unlink(missing_ok=True)
    before = read_json(path, "an earlier run")
    changes = [f"{key} was {before.get(key)!r} and is now {settings[key]!r}"
               for key in settings if key not in free and before.get(key) != settings[key]]
    if changes:
        raise WrongCall(f"{path.parent} was made with other settings: {', '.join(changes)}. "
                        f"Give another {flag}, or delete that folder")


# ---- device, precision, ranks --------------------------------------------------------------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Runtime:
    """Where and how a stage computes. precision: a key of DTYPES; rank and world count torchrun's
    processes."""
    device: torch.device
    precision: str
    rank: int = 0
    world: int = 1

    def autocast(self):
        """The context for forward passes: matrix products in `precision`, while torch keeps
        normalisation and softmax in fp32."""
        return torch.autocast(self.device.type, DTYPES[self.precision],
                              enabled=self.precision != "fp32")

    @contextlib.contextmanager
    def together(self):
        """Around what needs all processes: raises RunFailed when one of them is gone."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1:
                raise
            raise RunFailed(f"process {self.rank} lost the others ({first_line(error)[:120]}); "
                            "their own lines say why. What was saved is kept, and the same "
                            "command continues from there") from None

    def add_up(self, tensor):
        """Sum a tensor over all processes, in place, and return it."""
        if self.world > 1:
            with self.together():
                torch.distributed.all_reduce(tensor)
        return tensor

    def total(self, value):
        """The sum of a number over all processes, which have all come here by then."""
        with self.together():
            return self.add_up(torch.tensor(float(value), device=self.device)).item()

    def barrier(self):
        self.total(0)


def start_runtime(device="auto", precision="auto", seed=0):
    """Choose the device and the precision, seed torch, join torchrun's processes.

    precision "auto" is fp16 on a GPU (half the time, as in the paper) and fp32 on a CPU. Raises
    WrongCall for what is not there.
    """
    rank, world, local = (int(os.environ.get(key, default)) for key, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        on_gpu = torch.cuda.is_available()
        device = f"cuda:{local % torch.cuda.device_count()}" if on_gpu else "cpu"
    try:
        device = torch.device(device)
        torch.empty(1, device=device).item()  # fails on meta, too
    except (RuntimeError, AssertionError) as error:
        raise WrongCall(f"`device` {device}: {first_line(error)}") from None
    if precision == "auto":
        precision = "fp16" if device.type == "cuda" else "fp32"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(seed)
    if world > 1:
        # one process may wait for another's last images for long; torchrun sees when one has died
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                             timeout=datetime.timedelta(days=1))
    if rank == 0:
        share = f"{world} processes" if world > 1 else f"{torch.get_num_threads()} threads"
        print(f"device {device}, precision {precision}, {share}")
    return Runtime(device, precision, rank, world)


def prefetch(function, items, workers=2):
    """function(item) for each item, in order, computed ahead by threads (decoding and resizing
    release the interpreter)."""
    with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
        waiting = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class WriteBehind:
    """Calls of a function by one thread, in order, while the computation goes on."""

    def __init__(self, function, pending=4):
        self.function, self.pending = function, pending
        self.thread, self.calls = concurrent.futures.ThreadPoolExecutor(1), collections.deque()

    def __call__(self, *args):
        self.calls.append(self.thread.submit(self.function, *args))
        self.wait(self.pending)

    def wait(self, pending=0):
        """Until no more than `pending` calls are under way. One that failed raises here, and those
        after it are not made."""
        try:
            while self.calls and (len(self.calls) > pending or self.calls[0].done()):
                self.calls.popleft().result()
        except BaseException:
            self.thread.shutdown(cancel_futures=True)
            raise


# ---- pictures ------------------------------------------------------------------------------------

def list_images(root):
    """The pictures under a folder (or the one that is given itself), as sorted paths relative to
    it. Raises RunFailed."""
    root, suffixes = Path(root), ", ".join(sorted(IMAGE_SUFFIXES))
    if root.is_file():
        return [root.name]
    if not root.is_dir():
        raise RunFailed(f"{root}: no such folder; give a folder of {suffixes} pictures")
    paths = sorted(str(path.relative_to(root)) for path in root.rglob("*")
                   if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise RunFailed(f"{root} holds no picture ({suffixes}), nor does any folder below it")
    return paths


def to_rgb(picture):
    """A PIL image of any mode as an upright RGB tensor (3, H, W) uint8; transparency over white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits a pixel, which PIL's own conversion clips at 255
        levels = np.asarray(picture, np.float64).clip(0, 65535) / 257 + 0.5
        picture = Image.fromarray(levels.astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def read_image(path):
    """A picture file as (3, H, W) uint8. Raises RunFailed, naming it, if it cannot be decoded."""
    try:
        with Image.open(path) as picture:
            return to_rgb(picture)
    except FileNotFoundError:
        raise RunFailed(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises many types for damaged pixels and metadata
        raise_unless_the_files_fault(error, path)
        raise RunFailed(f"{path} cannot be read as a picture: {error}") from None


def raise_unless_the_files_fault(error, path):
    """Raise an error again that a good file would have met as well."""
    if is_out_of_memory(error):
        raise error
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO):
        error.filename = str(path)
        raise error


def resize_image(image, size):
    """Bilinear without antialiasing, rounded to 8 bits as the published preprocessing does:
    (3, H, W) uint8 -> (3, *size)."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    resized = F.interpolate(image[None].float(), size=tuple(size), mode="bilinear",
                            align_corners=False)[0]
    return resized.round_().to(torch.uint8)


def nearest_multiple(length, patch):
    """The multiple of patch nearest to length, at least one patch."""
    return max(patch, int(length / patch + 0.5) * patch)


def fit_to_patches(image, patch):
    """Resample to sides that are multiples of the patch, so that cells and pixels stay aligned:
    (3, H, W) -> (3, H', W')."""
    return resize_image(image, [nearest_multiple(side, patch) for side in image.shape[-2:]])


def apply_augmentation(image, plan):
    """(3, H, W) uint8 -> the version that an entry of the index describes, (3, H', W') uint8.

    plan: {"resize": [H, W], "crop": [top, left, H', W'] or None, "flip": bool}.
    """
    image = resize_image(image, plan["resize"])
    if plan["crop"] is not None:
        top, left, height, width = plan["crop"]
        image = image[:, top:top + height, left:left + width]
    return image.flip(-1) if plan["flip"] else image


def planned_size(plan):
    """(H', W') of the image that apply_augmentation makes."""
    return tuple(plan["crop"][2:]) if plan["crop"] else tuple(plan["resize"])


# ---- backbones -----------------------------------------------------------------------------------

BACKBONES = {
    "tiny": f"local-dir:{DEMO / 'tiny'}",
    "siglip2": "ViT-B-16-SigLIP2-512/webli",
    "openclip": "ViT-B-16/laion2b_s34b_b88k",
    "dinov3txt": "torch.hub facebookresearch/dinov3 dinov3_vitl16_dinotxt_tet1280d20h24l",
    "siglip2-naflex": "hf-hub:timm/ViT-B-16-SigLIP2-naflex",
    "tipsv2": "hf-hub:google/tipsv2-l14",
    "tipsv2-b": "hf-hub:google/tipsv2-b14",
    "tipsv2-so": "hf-hub:google/tipsv2-so400m14",
    "tipsv2-g": "hf-hub:google/tipsv2-g14",
}
PREPROCESS = ("mean", "std", "interpolation", "resize_mode")  # what open_clip's folders say of it
DINOV3 = "dinov3txt_model.safetensors"  # what a folder with a student of DINOv3.txt holds
MODEL_FILES = ("open_clip_config.json", DINOV3, "config.json")  # by which a folder is a model


def resize_positions(table, grid, new_grid, rule="size"):
    """Learned positional embeddings for another grid (method.md, "Student"): bicubic, without
    antialiasing, by size; or by "scale", as the paper's authors trained their OpenCLIP students,
    with steps of h / (h' + 0.1) in the place of h / h'.

    table: (h * w, C) for grid (h, w). Returns (h' * w', C); the table itself for the same grid.
    """
    # a graph must not take the size that it is exported at for every size
    if tuple(grid) == tuple(new_grid) and not torch.compiler.is_exporting():
        return table
    image = table.float().reshape(1, *grid, -1).permute(0, 3, 1, 2)  # (1, C, h, w)
    how = {"size": {"size": tuple(new_grid)},
           "scale": {"scale_factor": [(new + 0.1) / old for new, old in zip(new_grid, grid)]}}
    image = F.interpolate(image, mode="bicubic", align_corners=False, antialias=False, **how[rule])
    return image.permute(0, 2, 3, 1).reshape(new_grid[0] * new_grid[1], -1).to(table.dtype)


def one_by_one(function, tokens, most=2 ** 15):
    """function on each token as a sequence of its own, where attention over the one key is its
    value, exactly: (B, n, C) -> (B, n, C').

    most: sequences at a time (CUDA's attention kernels take fewer than 2^16).
    """
    sequences = tokens.flatten(0, 1).unsqueeze(1)  # (B * n, 1, C)
    # how many parts there are is no part of an exported graph
    parts = [sequences] if torch.compiler.is_exporting() else sequences.split(most)
    return torch.cat([function(part) for part in parts]).view(*tokens.shape[:2], -1)


def self_attention(attention, tokens, values_only=False):
    """An nn.MultiheadAttention of tokens (B, n, C) with themselves, or the values alone, which is
    what each token sees of itself.

    The module itself puts n before B, and for that torch's matrix products in bf16 on a CPU copy
    the weights once per sequence.
    """
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    if values_only:
        width = tokens.shape[-1]
        return attention.out_proj(F.linear(tokens, weight[2 * width:], bias[2 * width:]))
    joined = F.linear(tokens, weight, bias).unflatten(-1, (3, attention.num_heads, -1))
    queries, keys, values = joined.permute(2, 0, 3, 1, 4)  # (B, heads, n, C / heads) each
    attended = F.scaled_dot_product_attention(queries, keys, values)
    return attention.out_proj(attended.transpose(1, 2).flatten(2))


class Backbone(nn.Module):
    """A vision-language ViT as a dense feature extractor for images of any size; one subclass per
    family of towers.

    The forward pass is embed -> run_blocks -> project. Tokens (B, n, C) that enter block k can be
    kept and continued from with run_blocks(tokens, grid, start=k), which is how frozen blocks are
    computed once.

    Dense features follow from how the tower pools its patches into an image embedding, which is
    what was aligned with text: by a class token, the last block's attention matrix becomes the
    identity (MaskCLIP); by attention, the pooling's value path is taken; by their mean, the patches
    themselves are what it is the mean of.

    Attributes: visual (the image tower), model (both towers, or None where the text tower was not
    loaded), blocks (its ViT blocks), patch (pixels), window (native H, W in pixels; None if there
    is no such size), dim (D, shared with the text), pooling ("class token", "attention" or "mean"),
    mean and std (of the normalisation), source (the arguments of load_backbone), config (the
    model_cfg of open_clip's models), positions and official_positions (the rule of
    resize_positions, here and in the authors' own students; None for a tower with one of its own).
    """
    visual_prefix = "visual."  # of the image tower's keys in the state dict of both towers
    source = config = positions = official_positions = None

    def __init__(self, model, preprocess):
        super().__init__()
        self.model = model
        self.visual = model.get_submodule(self.visual_prefix[:-1])
        for name in ("mean", "std"):
            values = torch.tensor(preprocess[name]).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def normalise(self, images):
        """(..., 3, H, W) uint8 -> float32 as the model was trained on."""
        return (images.to(self.mean.device, torch.float32) / 255 - self.mean) / self.std

    def embed(self, images):
        """Normalised images (B, 3, H, W) -> tokens (B, n, C) that enter the first block, with their
        positions added."""
        raise NotImplementedError

    def run_block(self, index, tokens, grid):
        """One block, on the tokens of an (h, w) grid: (B, n, C) -> (B, n, C)."""
        raise NotImplementedError

    def project(self, tokens, grid):
        """Tokens after the last block -> text-aligned patch features (B, h, w, D)."""
        raise NotImplementedError

    def run_blocks(self, tokens, grid, start=0, stop=None):
        """Blocks start..stop-1 (all by default): (B, n, C) -> (B, n, C)."""
        for index in range(start, len(self.blocks) if stop is None else stop):
            tokens = self.run_block(index, tokens, grid)
        return tokens

    def grid(self, images):
        """(h, w) of the patch grid of images (..., H, W), whose sides must be multiples of p."""
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"an image of {height} x {width} is not divisible by the patch of "
                             f"{self.patch}; use fit_to_patches")
        return height // self.patch, width // self.patch

    def encode_dense(self, images):
        """Text-aligned patch features in a single pass, not L2-normalised:
        normalised images (B, 3, H, W) -> (B, H/patch, W/patch, D)."""
        grid = self.grid(images)
        return self.project(self.run_blocks(self.embed(images), grid), grid)

    @property
    def has_own_tokenizer(self):
        return bool(self.config["text_cfg"].get("hf_tokenizer_name"))

    @functools.cached_property
    def tokenizer(self):
        """The tokenizer that the model was trained with. Raises RunFailed where its files are
        missing or do not fit."""
        import open_clip
        name = self.source["name"]
        architecture, tag = resolve_backbone(name)
        try:
            own = {"trust_remote_code": False} if self.has_own_tokenizer else {}
            with quiet_open_clip():
                tokenizer = open_clip.get_tokenizer(architecture, **own)
        except Exception as error:  # transformers raises many types here
            raise RunFailed(f"the tokenizer of `backbone` {name} cannot be loaded: "
                            f"{first_line(error)}. {offline_advice(architecture, tag)}") from error
        if isinstance(tokenizer, open_clip.tokenizer.HFTokenizer):
            ids, inner = tokenizer(["a"])[0], tokenizer.tokenizer
            endless = inner.eos_token_id is not None and inner.eos_token_id not in ids
            if ids[0] == inner.pad_token_id or endless:
                raise RunFailed(f"the tokenizer of `backbone` {name} pads on the left or ends no "
                                f"text with {inner.eos_token!r}: its tokenizer.json and tokenizer_"
                                "config.json are not the ones of this model; fetch them again")
        return tokenizer

    def encode_text(self, texts):
        """N strings -> (N, D) float32, not L2-normalised."""
        tokens = self.tokenizer(texts).to(self.mean.device)
        return self.both_towers().encode_text(tokens).float()

    def both_towers(self):
        """The model with its text tower, which is fetched from where the image tower came if it
        was not loaded."""
        if self.model is None:
            self.model = load_backbone(**self.source, text=True, device=self.mean.device).model
            setattr(self.model, self.visual_prefix[:-1], self.visual)
        return self.model

    def save(self, folder):
        """Write a folder that plain open_clip loads: configuration, weights, and the tokenizer
        where it is the model's own. Returns how to load it."""
        save_open_clip(self.both_towers(), self.config, folder, self.positions)
        if self.has_own_tokenizer:
            try:
                self.tokenizer.tokenizer.save_pretrained(folder)
            except RunFailed as error:
                print("warning: saved without a tokenizer, which open_clip needs beside it: "
                      + str(error).replace("`", ""), file=sys.stderr)
        return f"open_clip.create_model_and_transforms('local-dir:{folder}')"


class NativeViT(Backbone):
    """open_clip's own VisionTransformer (OpenCLIP, CLIPA, CoCa), pooled by class token, by mean or
    by attention."""
    positions, official_positions = "size", "scale"

    def __init__(self, model, preprocess):
        super().__init__(model, preprocess)
        visual = self.visual
        if visual.pool_type == "none" or visual.patch_size[0] != visual.patch_size[1]:
            raise WrongCall("its image tower pools twice, or has patches that are not square")
        self.blocks = visual.transformer.resblocks
        self.patch = visual.patch_size[0]
        # what it sees of its image size
        self.window = tuple(side * self.patch for side in visual.grid_size)
        self.dim = visual.output_dim
        self.pooling = {"tok": "class token", "avg": "mean"}[visual.pool_type]
        if visual.attn_pool is not None:
            self.pooling = "attention"

    def embed(self, images):
        visual, grid = self.visual, self.grid(images)
        patches = visual.conv1(images).flatten(2).transpose(1, 2)  # (B, h * w, C)
        positions = visual.positional_embedding
        places = resize_positions(positions[1:], visual.grid_size, grid, self.positions)
        patches = patches + places.to(patches.dtype)
        class_token = (visual.class_embedding + positions[0]).to(patches.dtype)
        return visual.ln_pre(torch.cat([class_token.expand(images.shape[0], 1, -1), patches], 1))

    def run_block(self, index, tokens, grid):
        block = self.blocks[index]
        # MaskCLIP
        values_only = index == len(self.blocks) - 1 and self.pooling == "class token"
        if values_only:
            tokens = tokens[:, 1:]  # the class token serves no patch from here on
        if not isinstance(block.attn, nn.MultiheadAttention):
            return one_by_one(block, tokens) if values_only else block(tokens)
        attended = self_attention(block.attn, block.ln_1(tokens), values_only)
        tokens = tokens + block.ls_1(attended)
        return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))

    def project(self, tokens, grid):
        visual = self.visual
        patches = tokens if self.pooling == "class token" else tokens[:, 1:]
        if self.pooling == "attention":  # of one key, any query gives the value
            pool = visual.attn_pool
            query = pool.ln_q(pool.query[:1])

            def pooled(keys):
                queries = query.expand(keys.shape[0], 1, -1)
                return pool.attn(queries, keys, keys, need_weights=False)[0]
            patches = one_by_one(pooled, pool.ln_k(patches))
        return (visual.ln_post(patches) @ visual.proj).unflatten(1, grid)


class TimmViT(Backbone):
    """timm's VisionTransformer in open_clip (SigLIP 1 and 2, MobileCLIP-B, ViTamin), pooled by
    class token, by mean or by attention."""
    positions = official_positions = "size"

    def __init__(self, model, preprocess):
        super().__init__(model, preprocess)
        trunk, head = self.visual.trunk, self.visual.head
        poolings = {"token": "class token", "avg": "mean", "map": "attention"}
        if trunk.global_pool not in poolings:
            raise WrongCall(f"its image tower pools its patches by {trunk.global_pool!r}; known "
                            "are token, avg and map")
        self.trunk, self.blocks, self.pooling = trunk, trunk.blocks, poolings[trunk.global_pool]
        self.dim = head[-1].out_features if len(head) else trunk.num_classes or trunk.embed_dim
        self.set_sizes()

    def set_sizes(self):
        embedding = self.trunk.patch_embed
        embedding.strict_img_size = False  # it would refuse every size but the native one
        self.patch = embedding.feat_ratio()
        # SO400M-14-SigLIP-384 sees 378 of its 384 pixels
        self.window = tuple(side * self.patch for side in embedding.grid_size)

    def embed(self, images):
        trunk, grid = self.trunk, self.grid(images)
        patches = trunk.patch_embed(images)  # (B, h * w, C)
        first = [token for token in (trunk.cls_token, trunk.reg_token) if token is not None]
        first = torch.cat(first, 1) if first else patches.new_empty(1, 0, patches.shape[-1])
        if trunk.pos_embed is not None:
            table, own = trunk.pos_embed[0], 0 if trunk.no_embed_class else trunk.num_prefix_tokens
            places = resize_positions(table[own:], trunk.patch_embed.grid_size, grid,
                                      self.positions)
            patches = patches + places.to(patches.dtype)
            first = first + table[:own] if own else first
        first = first.to(patches.dtype).expand(images.shape[0], -1, -1)  # class token, registers
        return trunk.norm_pre(torch.cat([first, patches], 1))

    def attend(self, block, tokens, grid):
        return block(tokens)

    def run_block(self, index, tokens, grid):
        if index < len(self.blocks) - 1 or self.pooling != "class token":
            return self.attend(self.blocks[index], tokens, grid)
        return one_by_one(self.blocks[index], tokens[:, self.trunk.num_prefix_tokens:])  # MaskCLIP

    def project(self, tokens, grid):
        trunk = self.trunk
        prefix = 0 if self.pooling == "class token" else trunk.num_prefix_tokens
        patches = trunk.norm(tokens[:, prefix:])
        if self.pooling == "attention":
            pool, width = trunk.attn_pool, patches.shape[-1]
            bias = None if pool.kv.bias is None else pool.kv.bias[width:]
            patches = pool.proj(F.linear(patches, pool.kv.weight[width:], bias))
            patches = patches + pool.mlp(pool.norm(patches))
        return self.visual.head(trunk.head(trunk.fc_norm(patches))).unflatten(1, grid)


class EvaViT(TimmViT):
    """timm's Eva in open_clip (EVA-01 and EVA-02, PE-Core), whose blocks take rotary positions.

    These are computed for the grid at hand, stretched over the native one's range as timm does.
    """

    def __init__(self, model, preprocess):
        super().__init__(model, preprocess)
        if self.trunk.rope_mixed:
            raise WrongCall("its rotary positions differ from block to block, which is not "
                            "supported")

    def attend(self, block, tokens, grid):
        rope = self.trunk.rope
        if rope is None:
            return block(tokens)
        if torch.compiler.is_exporting():  # any grid's, instead of timm's table of the last one
            rope._use_cached_embed = False  # without effect on get_embed() below
            return block(tokens, rope=rope.get_embed(list(grid)))
        rope.update_feat_shape(list(grid))
        return block(tokens, rope=rope.get_embed())


class NaFlexViT(TimmViT):
    """timm's NaFlexVit in open_clip (SigLIP2 NaFlex), which takes any grid and interpolates its
    positions itself, bilinearly."""
    positions = official_positions = None

    def set_sizes(self):
        self.window, self.patch = None, self.trunk.embeds.patch_size[0]

    def embed(self, images):
        return self.trunk.norm_pre(self.trunk.embeds(images)[0])


class DinoTxt(Backbone):
    """DINOv3.txt from its public code: the patch tokens after the vision head's two blocks, against
    the patch half of the text.

    `blocks` are the backbone's; the head's belong to project. Stays in eval mode, or its rotary
    positions would be random.
    """
    visual_prefix = "visual_model."
    window = (384, 384)  # of the teacher; its positions are rotary, so that no size is native
    pooling = "mean"

    def __init__(self, model, tokenizer):
        from open_clip import constants
        super().__init__(model, {"mean": constants.IMAGENET_MEAN, "std": constants.IMAGENET_STD})
        self.vit = self.visual.backbone
        assert not self.vit.untie_cls_and_patch_norms, "class token and patches share their norm"
        self.blocks, self.patch = self.vit.blocks, self.vit.patch_size
        self.dim = self.vit.embed_dim
        self.tokenizer = tokenizer

    def embed(self, images):
        return self.vit.prepare_tokens_with_masks(images)[0]

    def run_block(self, index, tokens, grid):
        return self.blocks[index](tokens, self.vit.rope_embed(H=grid[0], W=grid[1]))

    def project(self, tokens, grid):
        prefix = 1 + self.vit.n_storage_tokens
        return self.visual.head(self.vit.norm(tokens))[:, prefix:].unflatten(1, grid)

    def encode_text(self, texts):
        tokens = self.tokenizer.tokenize(texts).to(self.mean.device)
        # after the class token's half
        return self.both_towers().encode_text(tokens).float()[:, self.dim:]

    def save(self, folder):
        """One file, which the public code's model loads strictly with load_state_dict; it stays
        under the DINOv3 licence."""
        header = {"license": "DINOv3 License", "architecture": BACKBONES["dinov3txt"]}
        save_tensors(self.both_towers(), Path(folder) / DINOV3, header)
        return (f"load_state_dict(safetensors.torch.load_file('{folder}/{DINOV3}')) of the public "
                "code's model")


class Tipsv2(Backbone):
    """TIPSv2 by transformers' Tipsv2Model: a tower like DINOv2's with two class tokens, whose
    patches meet the text without a projection (MaskCLIP, as its authors do).

    Pixels stay in 0..1; its own embeddings resample positions to any grid, bilinearly and
    antialiased.
    """
    visual_prefix = "vision_model."
    pooling = "class token"

    def __init__(self, model, place):
        super().__init__(model, {"mean": [0.0] * 3, "std": [1.0] * 3})
        config = self.visual.config
        self.place, self.blocks = place, self.visual.encoder.layer
        self.patch, self.dim = config.patch_size, config.hidden_size
        self.window = (config.image_size // self.patch * self.patch,) * 2
        self.prefix = 1 + config.num_register_tokens  # the registers are the second class token

    def embed(self, images):
        return self.visual.embeddings(images)

    def run_block(self, index, tokens, grid):
        block = self.blocks[index]
        if index < len(self.blocks) - 1:
            return block(tokens)
        tokens, attention = tokens[:, self.prefix:], block.attention  # MaskCLIP
        values = attention.o_proj(attention.v_proj(block.norm1(tokens)))
        tokens = tokens + block.layer_scale1(values)
        return tokens + block.layer_scale2(block.mlp(block.norm2(tokens)))

    def project(self, tokens, grid):
        return self.visual.layernorm(tokens).unflatten(1, grid)

    @functools.cached_property
    def tokenizer(self):
        from transformers import Tipsv2Tokenizer
        try:
            with quiet_open_clip():
                tokenizer = Tipsv2Tokenizer.from_pretrained(self.place)
            if not set(tokenizer("photo").input_ids) - {tokenizer.unk_token_id}:
                raise FileNotFoundError("it knows no word")  # without files, transformers makes one
        except Exception as error:  # transformers raises many types here
            raise RunFailed(f"the tokenizer of `backbone` {self.place} cannot be loaded: "
                            f"{first_line(error)}. {tipsv2_advice(self.place)}; where there is a "
                            "tokenizer.model alone, pip install sentencepiece protobuf") from error
        return tokenizer

    def encode_text(self, texts):
        model = self.both_towers()
        length = model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, padding_side="right", truncation=True,
                                max_length=length, return_tensors="pt").to(self.mean.device)
        # the mask keeps padding out of attention and out of the mean over words
        return model.get_text_features(tokens.input_ids, tokens.attention_mask,
                                       return_dict=True).pooler_output.float()

    def save(self, folder):
        """Write a folder like the published ones, which transformers loads: weights, configuration,
        tokenizer and image processor. Returns how to load it."""
        from safetensors import SafetensorError
        from transformers import Tipsv2ImageProcessor
        size = dict(zip(("height", "width"), self.window))
        parts, staging = [Tipsv2ImageProcessor(size=size), self.both_towers()], Path(folder, "part")
        try:
            parts.append(self.tokenizer)
        except RunFailed as error:
            print(f"warning: saved without a tokenizer: {error}".replace("`", ""), file=sys.stderr)
        try:
            for part in parts:
                part.save_pretrained(staging)
            # configuration last, without which the folder is no model
            for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
                with atomic_path(Path(folder) / path.name) as temporary:
                    os.replace(path, temporary)
        except (OSError, SafetensorError) as error:  # a full disk, mostly
            raise not_written(folder, OSError(first_line(error))) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return f"transformers.AutoModel.from_pretrained('{folder}')"


def image_family(visual):
    """The Backbone class for open_clip's image tower. Raises WrongCall, saying why, for one that
    has none."""
    import open_clip
    from timm.models import eva, naflexvit, vision_transformer
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        return NativeViT
    if isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        raise WrongCall("its image tower is a ResNet (ModifiedResNet), which has neither patch "
                        "tokens nor blocks of a transformer")
    trunk = type(visual.trunk)
    families = {vision_transformer.VisionTransformer: TimmViT, eva.Eva: EvaViT,
                naflexvit.NaFlexVit: NaFlexViT}
    if trunk in families:
        return families[trunk]
    if trunk.__name__ == "VisionTransformerRelPos":
        raise WrongCall("its image tower has tables of relative positions, which belong to one "
                        "grid size")
    raise WrongCall(f"its image tower is a {trunk.__name__}, convolutional or hierarchical: it has "
                    "no one sequence of patch tokens")


# ---- loading and saving them ---------------------------------------------------------------------

def load_backbone(name, random_init=False, device="cpu", text=False, hub_dir=None,
                  dinov3_weights=None):
    """A pre-trained model, or a student's folder, frozen, in eval mode, on device.

    name: a --backbone value (a key of BACKBONES, hf-hub:ORG/NAME, local-dir:PATH or the path alone,
    ARCH/PRETRAINED_TAG, ARCH/FILE). random_init: the architecture without weights. text: load the
    text tower too, for encode_text. hub_dir: a clone of DINOv3's public code; dinov3_weights: its
    (backbone, head and text) files. Raises WrongCall for a name or tower that cannot work,
    RunFailed when weights cannot be had.
    """
    if name == "dinov3txt" or (Path(name) / DINOV3).is_file():
        backbone = load_dinotxt(name, random_init, hub_dir, dinov3_weights)
    elif is_tipsv2(name):
        backbone = load_tipsv2(str(name), random_init)
    else:
        backbone = load_open_clip(str(name), random_init, text, device)
    backbone.source = {"name": str(name), "random_init": random_init, "hub_dir": hub_dir,
                       "dinov3_weights": dinov3_weights}
    if not text:
        backbone.model = None
    return backbone.to(device).eval().requires_grad_(False)


def resolve_backbone(name):
    """A name of load_backbone as open_clip's (model name, pretrained tag). Raises WrongCall."""
    import open_clip
    name = str(name)
    if name not in BACKBONES and (Path(name) / "open_clip_config.json").is_file():
        name = f"local-dir:{name}"
    identifier = BACKBONES.get(name, name)
    if identifier.startswith(("hf-hub:", "local-dir:")):
        return identifier, None
    architecture, _, tag = identifier.partition("/")
    if architecture not in open_clip.list_models():
        raise WrongCall(f"`backbone` {name}: unknown. Known are {', '.join(BACKBONES)}, hf-hub:ORG/"
                        "NAME, local-dir:PATH and ARCH/PRETRAINED_TAG with an architecture of "
                        "open_clip.list_models()")
    return architecture, tag or None


def load_open_clip(name, random_init, text, device):
    """A Backbone around open_clip's model behind a name; without text its text tower is a stub."""
    import open_clip
    architecture, tag = resolve_backbone(name)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    has_weights = ":" in architecture or tag in tags or Path(tag or "").is_file()
    if not (random_init or has_weights):
        raise WrongCall(f"`backbone` {name}: give weights as {architecture}/TAG, where TAG is a "
                        f"file or one of {', '.join(tags) or '(none are published)'}; or "
                        "`random_init`")
    if tag and tag not in tags and any(uses_quick_gelu(architecture, each) for each in tags):
        print(f"{name}: taken as trained with GELU; if it was QuickGELU, as OpenAI's weights were, "
              f"give {architecture}-quickgelu/FILE", file=sys.stderr)
    try:
        with quiet_open_clip():
            config = model_config(name)
            path = None if random_init else weights_file(architecture, tag)
            model = create_open_clip(config, path, text, device)
        preprocess = open_clip.get_model_preprocess_cfg(model)
        backbone = image_family(model.visual)(model, preprocess)
    except WrongCall as error:
        raise WrongCall(f"`backbone` {name}: {error}") from None
    except RunFailed:
        raise
    except Exception as error:  # open_clip raises many types here, most from the libraries below it
        raise RunFailed(f"`backbone` {name} cannot be loaded: {first_line(error)}. "
                        f"{offline_advice(architecture, tag)}") from error
    backbone.config = config["model_cfg"]
    if "positions" in config:  # of an official student's folder
        backbone.positions = config["positions"]
        if backbone.positions not in ("size", "scale"):
            raise RunFailed(f"`backbone` {name}: its open_clip_config.json resamples positions by "
                            f"{backbone.positions!r}; known are size and scale")
        print(f"{name}: {said_positions(backbone)}", file=sys.stderr)
    return backbone


def said_positions(backbone):
    how = {"size": "size", "scale": "a scale factor of (grid + 0.1) / native grid"}
    return f"positional embeddings are resampled by {how[backbone.positions]}"


@contextlib.contextmanager
def quiet_open_clip():
    """open_clip and huggingface_hub log warnings where nothing is wrong, and errors that they then
    raise as well."""
    import logging
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def uses_quick_gelu(architecture, tag):
    import open_clip
    return bool(open_clip.get_pretrained_cfg(architecture, tag or "").get("quick_gelu"))


def model_config(name):
    """What an open_clip_config.json holds, of the model behind a name of load_backbone:
    {"model_cfg": ..., "preprocess_cfg": ...}."""
    import open_clip
    from open_clip.pretrained import download_pretrained_from_hf
    architecture, tag = resolve_backbone(name)
    place = architecture.partition(":")[2]
    if name == "siglip2-naflex":  # open_clip 3.3 lacks it; all but the trunk is its sibling's
        config = model_config("siglip2")
        config["model_cfg"]["vision_cfg"]["timm_model_name"] = "naflexvit_base_patch16_siglip"
        return config
    if place:
        path = Path(place) / "open_clip_config.json"
        if architecture.startswith("hf-hub:"):
            path = download_pretrained_from_hf(place, "open_clip_config.json")
        config = read_json(path, "open_clip", {"model_cfg": dict})
        # of NaFlex towers; newer than open_clip 3.3
        config["model_cfg"]["vision_cfg"].pop("image_seq_len", None)
        layers = [part.get("layers") for part in config["model_cfg"].values()
                  if isinstance(part, dict)]
        if any(isinstance(count, int) and count > 1000 for count in layers):
            raise RunFailed(f"{path} describes towers of {max(layers)} layers; over 1000 are "
                            "taken for a mistake")
        if "trust_remote_code" in json.dumps(config):
            raise RunFailed(f"{path} asks to run Python code of its own (trust_remote_code), which "
                            "is not done; take that out if the model works without")
        return config
    model = open_clip.get_model_config(architecture)
    if uses_quick_gelu(architecture, tag):
        model["quick_gelu"] = True  # as the weights were trained; open_clip only warns
    # a file of weights is taken to want the pictures that the published weights want
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    like = tag if tag in tags else next(iter(tags), "")
    published = open_clip.get_pretrained_cfg(architecture, like)
    return {"model_cfg": model, "preprocess_cfg": {
        key: published[key] for key in PREPROCESS if key in published}}


def weights_file(architecture, tag):
    """The path of a model's weights, downloaded into the cache of huggingface_hub or open_clip if
    need be. Raises many types."""
    import open_clip
    from open_clip.factory import _find_checkpoint_in_dir  # private; checked with open_clip 3.3
    from open_clip.pretrained import download_pretrained_from_hf
    kind, _, place = architecture.partition(":")
    if kind == "local-dir":
        path = _find_checkpoint_in_dir(Path(place))
        if path is None:
            raise FileNotFoundError(f"{place} holds no weights")
        return path
    if kind == "hf-hub":
        return download_pretrained_from_hf(place)
    if Path(tag).is_file():
        return tag
    return open_clip.download_pretrained(open_clip.get_pretrained_cfg(architecture, tag))


# stands in for a text tower that is not needed
STUB = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}


def create_open_clip(config, path, text, device):
    """open_clip's model of a configuration, with the weights of a file (none if it is None).

    Without text, the text tower is a stub and its weights are not even read (safetensors are
    memory-mapped).
    """
    import open_clip
    from open_clip.convert import convert_state_dict
    from open_clip.factory import load_state_dict
    whole = text or str(path).endswith(".npz")  # big_vision's files, which open_clip converts whole
    if not whole:
        stubs = {key: STUB for key in ("text_cfg", "multimodal_cfg") if key in config["model_cfg"]}
        config = config | {"model_cfg": config["model_cfg"] | stubs}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(config))
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False,
                                       pretrained_text=False, device=device)
    if path is not None and not str(path).endswith(".npz"):
        state = convert_state_dict(model, load_state_dict(str(path)))
        image = {key.removeprefix("visual."): value for key, value in state.items()
                 if key.startswith("visual.")}
        load_strictly(model.visual, image, path)
    if path is not None and whole:  # which would resize positions without a word
        open_clip.load_checkpoint(model, str(path))
    return model


def offline_advice(architecture, tag):
    """Where a model's files can be had by hand, and where to put them."""
    import open_clip
    kind, _, place = architecture.partition(":")
    if kind == "local-dir":
        return ("The folder must hold open_clip_config.json, the weights it describes and any "
                "tokenizer files, as open_clip saves them")
    source = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    repository = place if kind == "hf-hub" else source.get("hf_hub", "").rstrip("/")
    if repository:
        return ("Without network, fetch open_clip_config.json, the weights and any tokenizer files "
                f"of https://huggingface.co/{repository} elsewhere, put them into one folder and "
                "give `backbone` local-dir:FOLDER; where it is gated, accept its licence there and "
                "run: hf auth login")
    if tag and not source:
        return ("The file must hold this architecture's weights; with a tokenizer of its own, it "
                "belongs into a folder for `backbone` local-dir:FOLDER")
    return (f"Without network, fetch {source.get('url', 'the weights')} elsewhere and give "
            f"`backbone` {architecture}/FILE")


def hub_clone(name, hub_dir):
    """The clone of a public repository that hub_dir gives: the folder itself, or the one in it of
    that name; None without hub_dir. Raises WrongCall."""
    if hub_dir is None:
        return None
    for folder in (Path(hub_dir) / name, Path(hub_dir)):
        if (folder / "hubconf.py").is_file():
            return folder
    raise WrongCall(f"`hub_dir` {hub_dir} holds no hubconf.py, nor does a folder {name} in it; "
                    "give a clone of the repository that --help names")


DINOV3_ADVICE = (
    "DINOv3.txt needs its public code and two weight files: ask for these at https://ai.meta.com/"
    "resources/models-and-libraries/dinov3-downloads, then give `dinov3_weights` "
    "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth "
    "dinov3_vitl16_dinotxt_vision_head_and_text_encoder-a442d8f5.pth, and, without network, "
    "`hub_dir` FOLDER, a clone of https://github.com/facebookresearch/dinov3")


def load_dinotxt(name, random_init, hub_dir, weights):
    """DINOv3.txt by its public code, or a student of it from the folder `name`."""
    student = None if name == "dinov3txt" else Path(name) / DINOV3
    clone = hub_clone("dinov3", hub_dir)
    if not (random_init or student or weights):
        raise WrongCall(DINOV3_ADVICE)
    for path in weights or ():
        if not Path(path).is_file():
            raise WrongCall(f"`dinov3_weights` {path}: no such file. {DINOV3_ADVICE}")
    try:
        # 0.9 G parameters need no values before the file's
        with warnings.catch_warnings(), torch.device("cpu" if random_init else "meta"):
            warnings.simplefilter("ignore")
            model, tokenizer = build_dinotxt(clone)
    except Exception as error:  # no network, no such clone, a package that is missing
        raise RunFailed(f"DINOv3's public code cannot be used: {first_line(error)}. "
                        f"{DINOV3_ADVICE}") from error
    if student:
        load_strictly(model, read_tensors(student), student)
    elif not random_init:
        # the second file lacks the backbone, and nothing else
        backbone = {f"visual_model.backbone.{key}": value
                    for key, value in read_tensors(weights[0]).items()}
        load_strictly(model, backbone | read_tensors(weights[1]), " with ".join(map(str, weights)))
    return DinoTxt(model, tokenizer)


def build_dinotxt(clone):
    """The public code's (model, tokenizer) without weights, from a clone or torch.hub's own."""
    import open_clip
    if clone is None:
        # its hubconf.py imports packages that this model does not need; the download is what counts
        with contextlib.suppress(ModuleNotFoundError):
            torch.hub.list("facebookresearch/dinov3", trust_repo=True, verbose=False)
        clone = Path(torch.hub.get_dir()) / "facebookresearch_dinov3_main"
    vocabulary = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")  # the same
    sys.path.insert(0, str(clone))
    try:
        entries = importlib.import_module("dinov3.hub.dinotxt")
        return entries.dinov3_vitl16_dinotxt_tet1280d20h24l(pretrained=False,
                                                            bpe_path_or_url=str(vocabulary))
    finally:
        sys.path.remove(str(clone))


# width, blocks and heads of the image tower, hidden width of the MLPs, blocks of the text tower,
# SwiGLU (which takes two thirds of that hidden width) in the place of the image tower's MLPs
TIPSV2 = {
    "google/tipsv2-b14": (768, 12, 12, 3072, 12),
    "google/tipsv2-l14": (1024, 24, 16, 4096, 12),
    "google/tipsv2-so400m14": (1152, 27, 16, 4304, 27),
    "google/tipsv2-g14": (1536, 40, 24, 6144, 12, True),
}


def tipsv2_place(name):
    """What transformers is to load for a name: a repository, or a folder."""
    return BACKBONES.get(name, str(name)).removeprefix("hf-hub:").removeprefix("local-dir:")


def is_tipsv2(name):
    place = tipsv2_place(name)
    path = Path(place) / "config.json"
    return place in TIPSV2 or (path.is_file()
                               and read_json(path, "transformers").get("model_type") == "tipsv2")


def tipsv2_advice(place):
    if place not in TIPSV2:
        return "The folder must hold all files that save_pretrained of transformers writes"
    return (f"Without network, fetch all files of https://huggingface.co/{place} elsewhere, put "
            "them into one folder and give `backbone` FOLDER")


def load_tipsv2(name, random_init):
    """TIPSv2 from its repository or a folder, or its architecture alone."""
    place = tipsv2_place(name)
    try:
        from transformers import Tipsv2Config, Tipsv2Model
    except ImportError:
        raise RunFailed(f"`backbone` {name} needs transformers 5.14 or newer: pip install "
                        "'transformers>=5.14'") from None
    try:
        with quiet_open_clip():
            if random_init:
                config = (tipsv2_config(*TIPSV2[place]) if place in TIPSV2
                          else Tipsv2Config.from_pretrained(place))
                return Tipsv2(Tipsv2Model(config), place)
            model, found = Tipsv2Model.from_pretrained(
                place, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True)  # which are refused below
            backbone = Tipsv2(model, place)
    except Exception as error:  # transformers raises many types here
        raise RunFailed(f"`backbone` {name} cannot be loaded: {first_line(error)}. "
                        f"{tipsv2_advice(place)}") from error
    refuse_misfits({"missing": found["missing_keys"], "unknown": found["unexpected_keys"],
                    "of another shape": [key for key, *_ in found["mismatched_keys"]]}, place)
    return backbone


def tipsv2_config(width, blocks, heads, hidden, text_blocks, swiglu=False):
    """transformers' configuration of a line of TIPSV2."""
    from transformers import Tipsv2Config
    both = {"hidden_size": width, "num_attention_heads": heads}
    return Tipsv2Config(
        vision_config=both | {"num_hidden_layers": blocks, "mlp_ratio": hidden / width,
                              "use_swiglu_ffn": swiglu},
        text_config=both | {"num_hidden_layers": text_blocks, "intermediate_size": hidden})


class Unread:
    """Stands for an object in a checkpoint whose class is not loaded: settings and the like, beside
    the tensors."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass


def read_tensors(path):
    """The tensors of a .safetensors or torch file by name, whatever wraps them as "state_dict".
    Nothing in it is executed. Raises RunFailed."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Unread, name) for name in unknown]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise RunFailed(f"{path} holds objects that cannot be passed over without running code of "
                        "theirs; save its state dict alone, as safetensors") from None
    except Exception as error:  # torch and safetensors raise many types for a damaged file
        raise RunFailed(f"{path} cannot be read as weights: {first_line(error)}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    tensors = {}
    if isinstance(state, dict):
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise RunFailed(f"{path} holds no state dict (tensors by name), neither itself nor as "
                        "\"state_dict\"")
    return tensors


def load_strictly(module, tensors, source):
    """module.load_state_dict with an error that names keys. Raises RunFailed for any that is
    missing, too many or of another shape."""
    expected = module.state_dict()
    wrong = {
        "missing": [key for key in expected if key not in tensors],
        "unknown": [key for key in tensors if key not in expected],
        "of another shape": [key for key in tensors
                             if key in expected and tensors[key].shape != expected[key].shape],
    }
    refuse_misfits(wrong, source)
    module.load_state_dict(tensors, assign=any(tensor.is_meta for tensor in expected.values()))


def refuse_misfits(wrong, source):
    """Raise RunFailed if there are any: {what is wrong with them: names of weights}."""
    complaints = [f"{len(keys)} {what} ({', '.join([*keys][:3])}{', ...' if len(keys) > 3 else ''})"
                  for what, keys in wrong.items() if keys]
    if complaints:
        raise RunFailed(f"{source} does not fit this architecture: of its weights, "
                        f"{'; '.join(complaints)}")


def save_tensors(model, path, header=None):
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=header)
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(first_line(error)) from error


def save_open_clip(model, config, folder, positions="size"):
    """Write an open_clip model as a folder that open_clip loads as local-dir:FOLDER, with nothing
    of this repository in it but, where it is not the usual one, the rule of resize_positions.

    config: its model_cfg.
    """
    import open_clip
    preprocess = open_clip.get_model_preprocess_cfg(model)
    preprocess = {key: preprocess[key] for key in PREPROCESS}
    save_tensors(model, Path(folder) / "open_clip_model.safetensors")
    rule = {"positions": positions} if positions == "scale" else {}
    write_json(Path(folder) / "open_clip_config.json",
               {"model_cfg": config, "preprocess_cfg": preprocess, **rule})


def weights_hash(backbone):
    """sha256 of the image tower's parameters, by which later stages know that they continue from
    the same weights."""
    return parameters_hash(backbone.visual)


def parameters_hash(module):
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


# ---- windows, stitching and stored features (method.md, "Teacher") -------------------------------

def window_starts(length, window, stride):
    """Starts along an axis: 0, s, 2s, ... and one flush with the border; an axis no longer than the
    window has the one 0."""
    starts = list(range(0, max(length - window, 0) + 1, stride))
    if starts[-1] + window < length:
        starts.append(length - window)
    return starts


def default_stride(patch):
    """Pixels between a teacher's windows: 1.5 patches, the paper's 24 for patches of 16."""
    return 3 * patch // 2


def check_window(window, stride, patch):
    """Raise WrongCall unless windows (H, W) divide into patches and cover every pixel."""
    if any(side % patch or side < patch for side in window):
        raise WrongCall(f"`window` {window[0]}: must be a multiple of the patch, {patch}")
    if not 1 <= stride <= min(window):
        raise WrongCall(f"`stride` {stride}: must be from 1 to the window's side, {min(window)}, "
                        "or pixels would be left uncovered (0 is the single pass)")


def chosen_window(backbone, side, stride):
    """(H, W) of the window, of the given side or the native one; checked unless the stride is 0.
    None for a backbone without either."""
    window = (side, side) if side else backbone.window
    if stride and window is None:
        raise WrongCall(f"`backbone` {backbone.source['name']} has no native size to slide over a "
                        "picture: only the single pass (`stride` 0), or give `window`")
    if stride:
        check_window(window, stride, backbone.patch)
    return window


def cut_windows(image, window, stride):
    """All windows of an image (3, H, W) in reading order, as views: a list of (3, h, w)."""
    height, width = image.shape[-2:]
    return [image[:, top:top + window[0], left:left + window[1]]
            for top in window_starts(height, window[0], stride)
            for left in window_starts(width, window[1], stride)]


# features of the windows of one forward pass: with more, a CPU's caches overflow (ViT-B/16: 54
# windows are a tenth slower than 6)
CPU_VALUES = 600_000


def windows_a_pass(backbone, window, batch_size):
    """How many windows (H, W) go through the backbone at once: batch_size, or on a CPU fewer."""
    if backbone.mean.device.type != "cpu":
        return batch_size
    values = math.prod(side // backbone.patch for side in window) * backbone.dim
    return max(1, min(batch_size, CPU_VALUES // values))


@torch.no_grad()
def encode_windows(backbone, image, window, stride, batch_size=60, autocast=contextlib.nullcontext):
    """The maps of an image's windows, in reading order, as they are computed.

    image: normalised (3, H, W). Yields (n, h, w, D) float32, batch by batch.
    """
    views = cut_windows(image, window, stride)
    passes = math.ceil(len(views) / windows_a_pass(backbone, views[0].shape[-2:], batch_size))
    size = math.ceil(len(views) / passes)  # even batches, instead of a small last one
    for first in range(0, len(views), size):
        with autocast():
            maps = backbone.encode_dense(torch.stack(views[first:first + size]))
        yield maps.float()


def linear_matrix(inputs, outputs):
    """One axis of bilinear resizing (align_corners=False, no antialiasing) as a matrix
    (outputs, inputs) float64."""
    one_each = torch.eye(inputs, dtype=torch.float64)[None]
    resized = F.interpolate(one_each, size=outputs, mode="linear", align_corners=False)
    return resized[0].T.contiguous()


def stitch_axis(length, window, stride, patch, cell):
    """One axis of the stitching as a matrix per window: (n, length / cell, window / patch) float64.

    Upsamples a window's features to cells of `cell` pixels, places them, and divides by how many
    windows cover a cell. Rows sum to one over all windows and features.
    """
    starts, window = window_starts(length, window, stride), min(window, length)
    up = linear_matrix(window // patch, window // cell)  # (cells of a window, its features)
    placed = torch.zeros(len(starts), length // cell, window // patch, dtype=torch.float64)
    counts = torch.zeros(length // cell, dtype=torch.float64)
    for index, start in enumerate(starts):
        cells = slice(start // cell, (start + window) // cell)
        placed[index, cells] = up
        counts[cells] += 1
    assert counts.min() > 0, "windows must cover every cell"
    return placed / counts[:, None]


class Stitcher:
    """Joins maps of overlapping windows into one, without upsampled maps and without an accumulator
    of cells.

    Upsampling, averaging over the overlaps and downsampling are linear and separable (the windows
    lie on a product grid), so out[c] = sum over a, b of R_a F_ab[c] C_b^T, with one matrix per row
    and per column of windows.

    rows: (A, H', i) for outputs of H' rows, columns: (B, W', j).
    """

    def __init__(self, rows, columns, device="cpu"):
        self.row_spans, self.column_spans = ([self.span(weights) for weights in axis]
                                             for axis in (rows, columns))
        self.rows, self.columns = (axis.to(device, torch.float32) for axis in (rows, columns))
        self.row_sum = self.out = None
        self.next = 0

    @classmethod
    def of_features(cls, size, window, stride, patch, device="cpu"):
        """For maps of windows (H, W) of an image of `size`, joined to (H / patch, W / patch)."""
        cell = math.gcd(stride, patch)  # patch / u
        return cls(*(linear_matrix(length // cell, length // patch)
                     @ stitch_axis(length, side, stride, patch, cell)
                     for length, side in zip(size, window)), device)

    @staticmethod
    def span(weights):
        """The outputs that a window touches, as a slice, from its matrix (outputs, features)."""
        used = weights.any(1).nonzero()
        return slice(int(used[0]), int(used[-1]) + 1)

    def add(self, maps):
        """The next windows in reading order: (n, i, j, C), summed in float32."""
        for features in maps:
            row, column = divmod(self.next, len(self.columns))
            if column == 0:
                self.row_sum = features.new_zeros(features.shape[0], self.columns.shape[1],
                                                  features.shape[2], dtype=torch.float32)
            span = self.column_spans[column]
            joined = self.columns[column, span] @ features.float()  # (i, W'', C)
            self.row_sum[:, span] += joined
            if column == len(self.columns) - 1:
                self.add_row(row)
            self.next += 1

    def add_row(self, row):
        """A row of windows whose columns are joined."""
        if self.out is None:
            self.out = self.row_sum.new_zeros(self.rows.shape[1], *self.row_sum.shape[1:])
        span = self.row_spans[row]
        self.out[span].flatten(1).addmm_(self.rows[row, span], self.row_sum.flatten(1))

    def result(self):
        """(H', W', C) float32, once every window was added."""
        assert self.next == len(self.rows) * len(self.columns), "windows are missing"
        return self.out


@torch.no_grad()
def stitched_features(backbone, image, window, stride, batch_size=60,
                      autocast=contextlib.nullcontext):
    """The teacher's map (paper, section 3.4): normalised image (3, H, W) of any size ->
    (H/patch, W/patch, D) float32. Stride 0 is a single pass over the image."""
    if stride == 0:
        with autocast():
            return backbone.encode_dense(image[None])[0].float()
    stitcher = Stitcher.of_features(image.shape[-2:], window, stride, backbone.patch, image.device)
    for maps in encode_windows(backbone, image, window, stride, batch_size, autocast):
        stitcher.add(maps)
    return stitcher.result()


def open_features(path):
    """A stored teacher map, memory-mapped: (h, w, D) float16. Raises RunFailed if the file is
    missing, truncated or no such map."""
    remake = "delete the file and run extract_teacher.py again"
    try:
        features = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise RunFailed(f"{path} does not exist; run extract_teacher.py again") from None
    except Exception as error:  # numpy raises many types for a damaged header
        raise_unless_the_files_fault(error, path)
        raise RunFailed(f"{path} is no whole .npy file ({error}); {remake}") from None
    if not isinstance(features, np.ndarray):
        raise RunFailed(f"{path} is a zip file, no .npy file; {remake}")
    if features.ndim != 3 or features.dtype != np.float16:
        raise RunFailed(f"{path} holds {features.dtype} of shape {features.shape} instead of "
                        f"float16 (h, w, D); {remake}")
    return features


# ---- names, features and segmentation of one picture ---------------------------------------------

@torch.no_grad()
def embed_texts(backbone, names, templates=None, chunk=256):
    """One unit vector a name from templates (functions of it; open_clip's 80 by default): each text
    normalised, averaged, normalised again. (N, D) float32."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES
    templates = templates or OPENAI_IMAGENET_TEMPLATES
    texts = [template(name) for name in names for template in templates]
    embeddings = torch.cat([backbone.encode_text(texts[first:first + chunk])
                            for first in range(0, len(texts), chunk)])
    embeddings = F.normalize(embeddings, dim=-1)
    embeddings = embeddings.unflatten(0, (len(names), len(templates)))  # (N, T, D)
    return F.normalize(embeddings.mean(1), dim=-1)


def prepare(backbone, image):
    """A PIL image or (3, H, W) uint8 -> normalised (3, H', W'), sides resampled to the nearest
    multiples of the patch."""
    image = to_rgb(image) if isinstance(image, Image.Image) else image
    return backbone.normalise(fit_to_patches(image, backbone.patch))


@torch.no_grad()
def dense_features(backbone, image, autocast=contextlib.nullcontext):
    """Single-pass features of one picture of any size: PIL image or (3, H, W) uint8 ->
    (H/patch, W/patch, D) float32."""
    with autocast():
        return backbone.encode_dense(prepare(backbone, image)[None])[0].float()


def bilinear_strips(similarities, size):
    """(h, w, N) -> a function of (first, last) that gives these rows of the bilinear enlargement to
    `size`: (N, rows, W). So a map of 150 classes at full size is never held as a whole."""
    height, width, count = similarities.shape
    if (height, width) == tuple(size):
        return lambda first, last: similarities[first:last].permute(2, 0, 1)
    weights = linear_matrix(height, size[0]).to(similarities)

    def strip(first, last):
        rows = (weights[first:last] @ similarities.flatten(1)).view(last - first, width, count)
        rows = rows.permute(2, 0, 1)[None].contiguous()
        return F.interpolate(rows, size=(last - first, size[1]), mode="bilinear",
                             align_corners=False)[0]
    return strip


def label_strips(assign, strip, size, names, values=2 ** 21):
    """assign(similarities (N, rows, W)) -> labels (rows, W), over all strips: (H, W) int64.

    strip: as bilinear_strips gives them; values: floats that one of them may hold.
    """
    rows = max(1, values // (names * size[1]))
    return torch.cat([assign(strip(first, min(first + rows, size[0])))
                      for first in range(0, size[0], rows)])


def segment(backbone, image, classes):
    """Open-vocabulary segmentation in a single pass: a PIL image and class names, each with any
    synonyms -> (H, W) int64.

    classes: a list of names, or of lists of synonyms.
    """
    classes = [[names] if isinstance(names, str) else names for names in classes]
    owner = torch.tensor([k for k, names in enumerate(classes) for _ in names])  # (N,)
    texts = embed_texts(backbone, [name for names in classes for name in names])
    return label_pixels(backbone, to_rgb(image), texts, owner)


def label_pixels(backbone, image, texts, owner):
    """The class of the most similar name at each pixel: (3, H, W) uint8 -> (H, W) int64.

    texts: unit vectors of N names (N, D); owner: the class of each (N,) int64.
    """
    size = image.shape[-2:]
    similarities = F.normalize(dense_features(backbone, image), dim=-1) @ texts.T  # (h, w, N)
    return label_strips(lambda strip: owner[strip.argmax(0).cpu()],
                        bilinear_strips(similarities, size), size, len(owner))
