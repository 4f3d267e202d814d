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


def add_backbone_flags(group, default):
    """Add what chooses and loads a backbone. default: how --backbone's help describes its
    default."""
    add = group.add_argument
    add("--backbone", type=filled, help=f"{BACKBONE_NAMES} ({default})")
    add("--random-init", action="store_true",
        help="build the architecture without weights, for timing and tests")
    add("--hub-dir", type=filled, metavar="DIR", help="dinov3txt: a clone of "
        "github.com/facebookresearch/dinov3, in place of torch.hub's download")
    add("--dinov3-weights", type=filled, nargs=2, metavar=("BACKBONE", "TEXT"),
        help="dinov3txt: the two .pth files that Meta provides once its licence is accepted")


def add_device_flags(parser, seed):
    """Add where and how a stage computes. seed: what --seed is the seed of."""
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
    on doing so.
    """
    if argv is None and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return parser.parse_args(argv)
