"""Train every variant that the paper reports, over several seeds on the demo, and print the mean
and standard deviation of the mIoU.

    python tests/variants.py                        # all of them, three seeds, into runs/variants
    python tests/variants.py --variants "last 2 blocks" qkv --seeds 0   # some
    python tests/variants.py --epochs 1 --limit 10  # a quick look

Each run is the command that a user types (shown as it starts), in a folder of its own. The same
command continues after an interruption and only adds what is missing. The column "paper" is its
average over six datasets (supplement 7 and 11, SigLIP2).
"""
import argparse
import itertools
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ROOT / "data" / "demo" / "classes.txt"

# name: (flags of extract_teacher.py, flags of distill.py, the mIoU in the paper, where its text
# gives one). Its finer teacher stride is lost in the text; that pixels then miss "the context of
# different patches" fits 16, the patch.
VARIANTS = {
    "all": ("", "--train-blocks all", 42.3),
    "last block": ("", "--train-blocks 1", 43.2),
    "last 2 blocks": ("", "", 43.6),
    "last 3 blocks": ("", "--train-blocks 3", 43.1),
    "patch projection": ("", "--train-only patch-embed", 38.1),
    "positional embedding": ("", "--train-only pos-embed", 39.6),
    "mlp": ("", "--train-only mlp", 42.8),
    "qkv": ("", "--train-only qkv", 41.7),
    "large augmentation": ("--augment large", "", None),
    "teacher stride 16": ("--stride 16", "", 40.6),
    "class similarities": ("", f"--loss similarity --classes {shlex.quote(str(CLASSES))}", 42.1),
    "multi-resolution": ("--stride 0", "--random-scale 0.5 2", 36.0),
}


def run(script, *flags):
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    print("+", shlex.join(["python", script, *map(str, flags)]), flush=True)
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"error: {script} failed (its own line is above); "
                 "the same command continues from here")


def score(report, *flags):
    """Return the mIoU in a report of evaluate_ovs.py, which is made if it is not there."""
    if not report.exists():
        run("evaluate_ovs.py", "--dataset", "demo", "--no-compare", "--json", report, *flags)
    return json.loads(report.read_text())["results"][0]["miou"]


def student_score(out, name, seed, epochs, limit):
    extract, train, _ = VARIANTS[name]
    teacher = out / ("teacher" + extract.replace(" ", ""))
    student = out / f"{name.replace(' ', '-')}-seed{seed}"
    report = student.with_suffix(".json")
    if not report.exists():
        run("extract_teacher.py", "--out", teacher, *shlex.split(extract))
        run("distill.py", "--teacher", teacher, "--out", student, "--seed", seed,
            *shlex.split(train), *epochs)
    return score(report, "--checkpoint", student, *limit)


def print_table(table, before, window):
    """Print scores by variant and seed, {name: [mIoU]}, beside those without training."""
    print(f"\n{'trained':24}{'mIoU':>8}{'std':>8}{'paper':>8}\n"
          f"{'nothing':24}{before:8.2f}{'':8}{33.1:8.1f}\n{'sliding window, 24':24}{window:8.2f}")
    means = {name: statistics.mean(scores) for name, scores in table.items()}
    for name, scores in table.items():
        deviation = statistics.stdev(scores) if len(scores) > 1 else 0
        print(f"{name:24}{means[name]:8.2f}{deviation:8.2f}{VARIANTS[name][2] or '':8}")
    published = sorted((name for name in table if VARIANTS[name][2]),
                       key=lambda name: VARIANTS[name][2])
    pairs = list(itertools.combinations(published, 2))  # the lower one first
    other = [f"{low} over {high}" for low, high in pairs if means[low] > means[high]]
    print(f"\n{len(pairs) - len(other)} of {len(pairs)} pairs are in the paper's order"
          + (f"; the others: {'; '.join(other)}" if other else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS),
                        metavar="NAME", help=f"of {', '.join(VARIANTS)} (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2],
                        help="seeds of the order of the images (0 1 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/variants"), help="folder to write "
                        "(%(default)s); use a new one for other --epochs or --limit")
    parser.add_argument("--epochs", type=int, help="instead of the default")
    parser.add_argument("--limit", type=int, help="test images to evaluate on, instead of all")
    args = parser.parse_args()
    epochs = ["--epochs", args.epochs] if args.epochs else []
    limit = ["--limit", args.limit] if args.limit else []
    args.out.mkdir(parents=True, exist_ok=True)
    before = score(args.out / "pre-trained.json", "--backbone", "tiny", *limit)
    window = score(args.out / "sliding-window.json", "--backbone", "tiny",
                   "--inference", "sliding-window", "--stride", 24, *limit)
    print_table({name: [student_score(args.out, name, seed, epochs, limit) for seed in args.seeds]
                 for name in args.variants}, before, window)


if __name__ == "__main__":
    main()
