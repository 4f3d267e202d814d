"""Stage 4: time single-pass and sliding-window inference as the paper does (supplement, section 8).

In: a backbone's name. Out: a table, and with --json and --plot the same as a file and as a curve.
Only forward passes are timed, on random pixels: for a sliding window their sum over sub-batches of
60 windows; each is run 10 times to warm up, and the 11th is measured ("ms"); the median of
--repeats such measurements stands beside it.

    python time_inference.py                             # tiny, CPU, under a minute
    python time_inference.py --backbone openclip --random-init --sizes 448x448 672x896   # a GPU
"""
import argparse
import signal


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", default="tiny", help="tiny, siglip2, openclip, dinov3txt, siglip2-naflex, "
        "tipsv2 (-b, -so, -g), or what open_clip takes: hf-hub:ORG/NAME, local-dir:PATH, ARCH/TAG "
        "(%(default)s)")
    add("--hub-dir", metavar="DIR", help="dinov3txt: a clone of github.com/facebookresearch/dinov3 "
        "in the place of torch.hub's download")
    add("--dinov3-weights", nargs=2, metavar=("BACKBONE", "TEXT"),
        help="dinov3txt: its two .pth files; not needed with --random-init")
    add("--random-init", action="store_true",
        help="the architecture without weights, which take as long")
    add("--sizes", nargs="+", metavar="HxW", help="image sizes in pixels, resampled to multiples "
        "of the patch (default: 1, 2 and 3 times the native side)")
    add("--strides", type=int, nargs="+", metavar="N", help="strides of the sliding window; 0 is "
        "the single pass (default: 0, half the window, 1.5 patches)")
    add("--window", type=int, metavar="N", help="side of the window in pixels (default: the size "
        "that the backbone was trained on)")
    add("--batch-size", type=int, default=60,
        help="windows per sub-batch (%(default)s, the paper's)")
    add("--warmup", type=int, default=10,
        help="passes before the measured one (%(default)s, the paper's)")
    add("--repeats", type=int, default=5,
        help="measured passes, of which the first is the paper's measure (%(default)s)")
    add("--json", metavar="FILE", help="write the table to FILE")
    add("--plot", metavar="FILE", help="draw milliseconds against pixels to FILE (png, pdf or svg)")
    add("--device", default="auto",
        help="auto, cpu, cuda, cuda:1 ... (%(default)s: a GPU if there is one)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="of the matrix products (%(default)s: fp16 on a GPU, fp32 on a CPU)")
    add("--seed", type=int, default=0, help="of the pixels, and of random weights (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":  # before torch's import, so that --help and a wrong flag answer at once
    ARGS = parse_args()
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell's background job has it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until command_line: no import's traceback

import copy
import math
import platform
import statistics
import time
from pathlib import Path

import open_clip
import torch

from common import (DTYPES, WrongCall, atomic_path, chosen_window, command_line, cut_windows,
                    default_stride, load_backbone, nearest_multiple, speaks_flags, start_runtime,
                    write_json)

# ---- measures ------------------------------------------------------------------------------------


def synchronised_time(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed_passes(forward, batch, warmup, repeats, runtime):
    """Seconds of each of `repeats` passes over a batch, after `warmup` passes on the same data."""
    seconds = []
    for index in range(warmup + repeats):
        started = synchronised_time(runtime.device)
        with runtime.autocast():
            forward(batch)
        if index >= warmup:
            # a clock may be too coarse to move
            seconds.append(max(1e-9, synchronised_time(runtime.device) - started))
    return seconds


def matrix_product_rate(runtime, side=None):
    """This machine's rate on square matrix products in the run's precision: FLOP/s, best of ten."""
    side = side or (8192 if runtime.device.type == "cuda" else 2048)
    a, b = torch.randn(2, side, side, device=runtime.device).to(DTYPES[runtime.precision])
    return 2 * side ** 3 / min(timed_passes(lambda _: a @ b, None, 3, 10, runtime))


def count_flops(backbone, size):
    """FLOP of the matrix products and convolutions of encode_dense on one image of (H, W) pixels; a
    multiply-add counts as two.

    Counted by torch on a copy without data. Gradients are on because torch's fused inference kernel
    hides its products.
    """
    from torch.utils.flop_counter import FlopCounterMode
    empty = {id(each): torch.nn.Parameter(each.detach().to("meta"))
             for each in backbone.parameters()}
    empty |= {id(each): each.detach().to("meta") for each in backbone.buffers()}
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        image = torch.empty(1, 3, *size, device="meta")
        copy.deepcopy(backbone, empty).encode_dense(image)
    return counter.get_total_flops()


def machine_and_versions(runtime):
    """What a measurement depends on besides its flags."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if runtime.device.type == "cuda":
        machine = torch.cuda.get_device_name(runtime.device)
    return {"device": str(runtime.device), "precision": runtime.precision, "machine": machine,
            "torch": torch.__version__, "open_clip": open_clip.__version__}


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():  # Linux: set the peak back to what is used now
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Bytes since the reset: of the device's allocator on a GPU, else of the whole process (nan
    where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else math.nan


# ---- the loop ------------------------------------------------------------------------------------

@torch.inference_mode()
def measure(backbone, views, passes, batch_size, runtime):
    """One row, of an image's views (3, h, w): a dict of windows, ms, ms_median, tflop, tflops (per
    second), peak_gb. passes: (warmup, repeats)."""
    reset_peak_memory(runtime.device)
    first, median = 0.0, 0.0
    for start in range(0, len(views), batch_size):
        batch = torch.stack(views[start:start + batch_size])
        seconds = timed_passes(backbone.encode_dense, batch, *passes, runtime)
        first += seconds[0]
        median += statistics.median(seconds)
    tflop = len(views) * count_flops(backbone, views[0].shape[-2:]) / 1e12
    return {"windows": len(views), "ms": 1e3 * first, "ms_median": 1e3 * median, "tflop": tflop,
            "tflops": tflop / median, "peak_gb": peak_memory(runtime.device) / 1e9}


def time_all(backbone, sizes, strides, window, measure_views, rate):
    """The rows of the table, one a size and stride, printed as they come: a list."""
    print(f"{'size':>11} {'method':>19} {'windows':>8} {'ms':>10} {'median ms':>10} {'TFLOP':>9} "
          f"{'TFLOP/s':>8} {'of peak':>8} {'peak GB':>8} {'x single':>9}")
    rows, single = [], {}  # median milliseconds of a size's single pass
    for height, width in sizes:
        for stride in strides:
            image = torch.randn(3, height, width, device=backbone.mean.device)
            views = cut_windows(image, window, stride) if stride else [image]
            method = f"sliding-window/{stride}" if stride else "single-pass"
            row = {"method": method, "height": height, "width": width, "stride": stride}
            row |= measure_views(views)
            row["share_of_matrix_rate"] = row["tflops"] * 1e12 / rate
            if not stride:
                single[height, width] = row["ms_median"]
            base = single.get((height, width))
            row["ratio_to_single_pass"] = row["ms_median"] / base if base else None
            rows.append(row)
            print_row(row)
    return rows


def print_row(row):
    ratio = row["ratio_to_single_pass"]
    print("{height:>5}x{width:<5} {method:>19} {windows:>8} {ms:>10.1f} {ms_median:>10.1f} "
          "{tflop:>9.4f} {tflops:>8.3f} {share_of_matrix_rate:>8.1%} {peak_gb:>8.2f} ".format(**row)
          + f"{'-' if ratio is None else f'{ratio:.1f}':>9}", flush=True)


def growth(rows):
    """{method: exponent} of a power law through its median times against pixels, for methods that
    were timed at several sizes."""
    points = {}
    for row in rows:
        pixels, milliseconds = row["height"] * row["width"], row["ms_median"]
        points.setdefault(row["method"], {})[math.log(pixels)] = math.log(milliseconds)
    return {method: statistics.linear_regression(list(each), list(each.values())).slope
            for method, each in points.items() if len(each) > 1}


def plot(rows, path):
    """Milliseconds (median) against pixels, a line for each method, on logarithmic axes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        points = sorted((row["height"] * row["width"], row["ms_median"])
                        for row in rows if row["method"] == method)
        axes.plot(*zip(*points), marker="o", label=method)
    axes.set(xscale="log", yscale="log", xlabel="pixels", ylabel="milliseconds per image")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


# ---- main ----------------------------------------------------------------------------------------

def parse_size(text, patch):
    """"672x896" -> (672, 896), each side the nearest multiple of the patch. Raises WrongCall."""
    try:
        height, width = (int(side) for side in text.lower().split("x"))
        if min(height, width) < 1:
            raise ValueError
    except ValueError:
        raise WrongCall(f"--sizes {text}: give height x width in pixels, like 672x896") from None
    return nearest_multiple(height, patch), nearest_multiple(width, patch)


@speaks_flags
def main(args):
    if args.plot and Path(args.plot).suffix not in (".png", ".pdf", ".svg"):
        raise WrongCall(f"--plot {args.plot}: must end in .png, .pdf or .svg")
    runtime = start_runtime(args.device, args.precision, args.seed)
    backbone = load_backbone(args.backbone, args.random_init, runtime.device, hub_dir=args.hub_dir,
                             dinov3_weights=args.dinov3_weights)
    window = chosen_window(backbone, args.window, 0)
    finest = default_stride(backbone.patch)
    strides = args.strides or ([0, min(window) // 2, finest] if window else [0])
    strides = list(dict.fromkeys(strides))
    for stride in strides:
        chosen_window(backbone, args.window, stride)
    native = backbone.window or (512, 512)
    sizes = [tuple(k * side for side in native) for k in (1, 2, 3)]
    if args.sizes:
        sizes = [parse_size(text, backbone.patch) for text in args.sizes]

    rate = matrix_product_rate(runtime)
    size = f"window {window[0]} x {window[1]}" if window else "no native size"
    print(f"{args.backbone}{' with RANDOM weights' if args.random_init else ''}, patch "
          f"{backbone.patch}, {size}; matrix products of this machine in {runtime.precision}: "
          f"{rate / 1e12:.3f} TFLOP/s")
    passes = args.warmup, args.repeats
    rows = time_all(backbone, sizes, strides, window,
                    lambda views: measure(backbone, views, passes, args.batch_size, runtime), rate)
    exponents = growth(rows)
    if exponents:
        each = ", ".join(f"{power:.2f} ({method})" for method, power in exponents.items())
        print(f"time grows with the number of pixels to the power of {each}")
    if args.json:
        settings = {"backbone": args.backbone, "random_init": args.random_init,
                    "window": window and list(window), "patch": backbone.patch,
                    "batch_size": args.batch_size, "warmup": args.warmup, "repeats": args.repeats,
                    "matrix_tflops": rate / 1e12, **machine_and_versions(runtime)}
        write_json(args.json, {"rows": rows, "growth": exponents, "settings": settings})
        print(f"table in {args.json}")
    if args.plot:
        plot(rows, args.plot)
        print(f"plot in {args.plot}")


if __name__ == "__main__":
    command_line(main, ARGS)
