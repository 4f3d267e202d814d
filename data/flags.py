"""Flags that several stages share.

Nothing here imports torch, so that --help and a wrong flag answer at once.
"""
import argparse
import os
import signal
import sys

BACKBONE_NAMES = ("tiny, siglip2, openclip, dinov3txt, siglip2-naflex, tipsv2 (-b, -so, -g), or "
                  "what open_clip takes: hf-hub:ORG/NAME, local-dir:PATH, ARCH/TAG")


class Parser(argparse.ArgumentParser):
    """An argument parser that shows descriptions as written and errors as one line."""

    def __init__(self, description):
        super().__init__(description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        print(f"error: {message.removeprefix('argument ')}", file=sys.stderr)
        sys.exit(2)


def bounded(kind, low, high=10 ** 9):
    """Return an argparse type: an int or float from low to high."""
    def parse_number(text):
        value = kind(text)
        if value != value or not low <= value <= high:  # NaN, too
            wanted = f"at most {high:g}" if value > high else f"at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text}: must be {wanted}")
        return value
    parse_number.__name__ = {int: "whole number", float: "number"}[kind]
    return parse_number


def filled(text):
    """Return a text as an argparse type that refuses an empty one."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty text; give a value, or leave the flag out")
    return text


def ending(*suffixes):
    """Return an argparse type: a path that ends in one of the suffixes."""
    def parse_path(text):
        if os.path.splitext(text)[1] not in suffixes:
            raise argparse.ArgumentTypeError(f"{text}: must end in {' or '.join(suffixes)}")
        return text
    return parse_path


def add_backbone_flags(group, default):
    """Add the flags that choose and load a backbone. default: how --backbone's help describes its
    default."""
    add = group.add_argument
    add("--backbone", type=filled, help=f"{BACKBONE_NAMES} ({default})")
    add("--random-init", action="store_true",
        help="build the architecture without weights, for timing and tests")
    add("--hub-dir", type=filled, metavar="DIR", help="dinov3txt: a clone of "
        "github.com/facebookresearch/dinov3, in place of torch.hub's download")
    add("--dinov3-weights", type=filled, nargs=2, metavar=("BACKBONE", "TEXT"),
        help="dinov3txt: the two .pth files that Meta provides once its licence is accepted")


def add_selection_flags(parser):
    """Add the flags of a Selection."""
    group, positive = parser.add_argument_group("what to evaluate"), bounded(int, 1)
    add = group.add_argument
    add("--checkpoint", type=filled, help="a student: a folder that distill.py wrote, or "
        "hf-hub:ORG/NAME (default: runs/spar); with --backbone, a file with a SPAR state dict of "
        "the authors")
    add_backbone_flags(group, "to evaluate a pre-trained model; default: none, but the student")
    add("--inference", choices=["single-pass", "sliding-window"], help="(default: single-pass)")
    add("--stride", "--strides", type=positive, nargs="+", metavar="N", help="pixels between "
        "windows; several give a row each (default: 1.5 patches, in evaluate_ovs.py also half a "
        "window)")
    add("--window", type=positive, metavar="N", help="side of the sliding window in pixels "
        "(default: the image size that the backbone was trained on)")
    add("--compare", action=argparse.BooleanOptionalAction, help="pre-trained single pass, "
        "pre-trained sliding window and student in one table (default: on for the demo "
        "without other flags)")
    add("--batch-size", type=positive, default=60, help="most windows per forward pass "
        "(%(default)s); a CPU takes as many as its caches hold")


def add_data_flags(parser):
    """Add the flags of find_datasets."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", type=filled, metavar="NAME", help="demo (default, unless --images is given),"
        " voc21, voc20, cityscapes, ade20k, context60, context59, or all of these six; coco-object,"
        " coco-stuff, or all8")
    add("--data-root", type=filled, default="data", metavar="DIR", help="the folder of the "
        "benchmarks: DIR/VOCdevkit/VOC2012, DIR/cityscapes ... (%(default)s)")
    add("--check-data", action="store_true", help="only check counts, pairs, sizes and label ids")
    add("--images", type=filled, metavar="PATH", nargs="+", help="your own images: folders, files")
    add("--masks", type=filled, metavar="DIR", help="label masks of --images: PNG files of the "
        "same relative names, one channel of class numbers, 255 for no label. Masks of colours: "
        "numpy.asarray(Image.open(mask).convert('RGB')), compare with each class's colour over the "
        "last axis, and save the class numbers as uint8")
    add("--classes", metavar="FILE|NAMES", help="a file with one class a line and commas between "
        "synonyms, the first line is label 0; or \"cat, grass | lawn, sky\"; with --dataset: "
        "other names for its classes")
    add("--background", metavar="WORDS", help="with --images: add a class 0 for everything "
        "else, described by these words: \"wall, floor, road\"; in --masks, too, the classes then "
        "start at 1")
    add("--limit", type=bounded(int, 1), metavar="N", help="use only the first N images")


def add_device_flags(parser, seed):
    """Add the flags of start_runtime. seed: the help of --seed."""
    add = parser.add_argument_group("device").add_argument
    add("--device", type=filled, default="auto",
        help="auto, cpu, cuda, cuda:1 ... (%(default)s: a GPU if there is one)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="precision of matrix products (%(default)s: fp16 on a GPU, fp32 on a CPU)")
    add("--seed", type=bounded(int, 0, 2 ** 63 - 1), default=0, help=f"{seed} (%(default)s)")
    add("--workers", type=bounded(int, 0, 1000), default=min(8, os.cpu_count() or 1),
        help="threads that read files ahead (default: one per core, at most 8)")


def parse(parser, argv=None):
    """Parse flags: argv, or the command line's.

    On a command line, Ctrl-C ends the process without a traceback until run_stage takes over,
    since the imports that follow take seconds. A shell's background job ignores Ctrl-C and goes
    on doing so. Where no terminal shows them, progress bars are written rarely.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "20")
    if argv is None and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return parser.parse_args(argv)
