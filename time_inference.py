"""Stage 4: time single-pass and sliding-window inference as in the paper (supplement, section 8).

In: the name of a backbone. Out: a table; with --json and --plot also a file and a figure. Only
forward passes are timed, on random pixels. After 10 passes to warm up, the next one is the paper's
measure ("ms"), beside the median of --repeats passes, each summed over the sub-batches of windows.

    python time_inference.py                             # tiny, on a CPU, under a minute
    python time_inference.py --backbone openclip --random-init --sizes 448x448 672x896   # a GPU
"""
from data.flags import Parser, add_backbone_flags, add_device_flags, bounded, ending, parse


def height_x_width(text):
    """Return "672x896" as (672, 896), as an argparse type."""
    height, width = (bounded(int, 1)(side) for side in text.lower().split("x"))
    return height, width


height_x_width.__name__ = "HEIGHTxWIDTH"


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_backbone_flags(parser.add_argument_group("backbone"), default="tiny")
    parser.set_defaults(backbone="tiny")
    add = parser.add_argument_group("what to time").add_argument
    add("--sizes", type=height_x_width, nargs="+", metavar="HxW", help="image sizes in pixels, "
        "rounded to multiples of the patch (default: 1, 2 and 3 times the native side)")
    add("--strides", type=bounded(int, 0), nargs="+", metavar="N", help="strides of the sliding "
        "window; 0 is the single pass (default: 0, half the window, 1.5 patches)")
    add("--window", type=bounded(int, 1), metavar="N", help="side in pixels (default: native)")
    add("--batch-size", type=bounded(int, 1), default=60, metavar="N",
        help="windows per sub-batch (%(default)s, as in the paper); fewer need less memory")
    add("--warmup", type=bounded(int, 0), default=10, metavar="N",
        help="passes before the first measured one (%(default)s, as in the paper)")
    add("--repeats", type=bounded(int, 1), default=5, metavar="N",
        help="measured passes; the first one is the paper's measure (%(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--json", type=ending(".json"), metavar="FILE", help="write the table to FILE")
    add("--plot", type=ending(".png", ".pdf", ".svg"), metavar="FILE", help="plot the times")
    add_device_flags(parser, seed="seed of the pixels and of random weights")
    return parse(parser, argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports, so that --help and a wrong flag answer at once

import copy
import platform
import re
import statistics
from pathlib import Path

import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode

from common import (DTYPES, choose_window, convert_weights, cut_windows, default_stride,
                    load_backbone, run_stage, start_runtime, synchronised_time)
from data.files import atomic_path, nearest_multiple, write_json


def timed_passes(forward, batch, warmup, repeats, runtime):
    """Return the seconds of `repeats` passes on one batch, after `warmup` passes."""
    seconds = []
    for _ in range(warmup + repeats):
        started = synchronised_time(runtime.device)
        with runtime.autocast():
            forward(batch)
        passed = synchronised_time(runtime.device) - started
        seconds.append(max(1e-9, passed))  # a coarse clock may not have moved
    return seconds[warmup:]


def matrix_product_rate(runtime, side=None):
    """Return the measured peak of matrix products in the run's precision, in FLOP/s."""
    side = side or (8192 if runtime.device.type == "cuda" else 2048)
    matrix = torch.randn(side, side, device=runtime.device).to(DTYPES[runtime.precision])
    seconds = timed_passes(matrix.matmul, matrix, 3, 10, runtime)
    return 2 * side ** 3 / min(seconds)


def count_flops(backbone, size):
    """Return the FLOP of encode_dense on one image of (H, W) pixels, two for a multiply-add."""
    empty = {}  # torch counts matrix products and convolutions on a copy without data
    for tensor in (*backbone.parameters(), *backbone.buffers()):
        real = tensor.is_floating_point()
        empty[id(tensor)] = torch.empty_like(tensor, device="meta", requires_grad=real,
                                             dtype=torch.float32 if real else None)
    image = torch.empty(1, 3, *size, device="meta")
    # with gradients, as torch's fused kernel for inference hides its products
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        copy.deepcopy(backbone, empty).encode_dense(image)
    return counter.get_total_flops()


def machine_and_versions(runtime):
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if runtime.device.type == "cuda":
        machine = torch.cuda.get_device_name(runtime.device)
    return {"device": str(runtime.device), "precision": runtime.precision, "machine": machine,
            "torch": torch.__version__, "open_clip": open_clip.__version__}


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():  # Linux sets the peak to what is in use now
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Return the peak in bytes: allocated on a GPU, or of the process; nan where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    return 1024 * int(peak[1]) if peak else float("nan")


@torch.inference_mode()
def measure(backbone, image, window, stride, passes, runtime):
    """Return a row of the table for an image (3, H, W); a stride of 0 is the single pass."""
    batch_size, warmup, repeats = passes
    views = cut_windows(image, window, stride) if stride else [image]
    reset_peak_memory(runtime.device)
    seconds = []  # of each sub-batch: (repeats,)
    for start in range(0, len(views), batch_size):
        batch = torch.stack(views[start:start + batch_size])  # (n, 3, h, w)
        seconds.append(timed_passes(backbone.encode_dense, batch, warmup, repeats, runtime))
    median = sum(statistics.median(times) for times in seconds)
    tflop = len(views) * count_flops(backbone, batch.shape[-2:]) / 1e12
    return {"method": f"sliding-window/{stride}" if stride else "single-pass",
            "height": image.shape[1], "width": image.shape[2], "stride": stride,
            "windows": len(views), "ms": 1000 * sum(times[0] for times in seconds),
            "ms_median": 1000 * median, "tflop": tflop, "tflops": tflop / median,
            "peak_gb": peak_memory(runtime.device) / 1e9}


HEADER = ("       size              method  windows         ms  median ms     TFLOP  TFLOP/s "
          " of peak  peak GB  x single")
ROW = ("{height:>5}x{width:<5} {method:>19} {windows:>8} {ms:>10.1f} {ms_median:>10.1f} "
       "{tflop:>9.4f} {tflops:>8.3f} {share_of_matrix_rate:>8.1%} {peak_gb:>8.2f} {ratio:>9}")


def plot(rows, path):
    """Plot milliseconds against pixels, a line per method, on logarithmic axes."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in rows):
        points = sorted((row["height"] * row["width"], row["ms_median"])
                        for row in rows if row["method"] == method)
        axes.loglog(*zip(*points), marker="o", label=method)
    axes.set(xlabel="pixels", ylabel="milliseconds per image")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


def choose_sizes(args, backbone):
    """Return the sizes (H, W) and the strides to time, in order."""
    height, width = backbone.window or (512, 512)
    sizes = args.sizes or [(scale * height, scale * width) for scale in (1, 2, 3)]
    strides = args.strides or [0]
    if args.strides is None and (args.window or backbone.window):
        strides += [(args.window or min(height, width)) // 2, default_stride(backbone.patch)]
    sizes = [[nearest_multiple(side, backbone.patch) for side in size] for size in sizes]
    return sizes, list(dict.fromkeys(strides))


def main(args):
    runtime = start_runtime(args.device, args.precision, args.seed)
    backbone = load_backbone(args.backbone, args.random_init, runtime.device,
                             hub_dir=args.hub_dir, dinov3_weights=args.dinov3_weights)
    convert_weights(backbone.visual, DTYPES[runtime.precision])
    sizes, strides = choose_sizes(args, backbone)
    for stride in strides:
        window = choose_window(backbone, args.window, stride)
    rate = matrix_product_rate(runtime)  # to compare with
    settings = {"backbone": args.backbone, "random_init": args.random_init, "window": window,
                "patch": backbone.patch, "batch_size": args.batch_size, "warmup": args.warmup,
                "repeats": args.repeats, "matrix_tflops": round(rate / 1e12, 4),
                **machine_and_versions(runtime)}
    if args.random_init:
        print("RANDOM weights (--random-init): times mean something, outputs do not")
    print(", ".join(f"{key} {value}" for key, value in settings.items()), HEADER, sep="\n")

    rows, passes = [], (args.batch_size, args.warmup, args.repeats)
    for size in sizes:
        image = torch.randn(3, *size, device=runtime.device)
        single = None  # median milliseconds of the single pass
        for stride in strides:
            row = measure(backbone, image, window, stride, passes, runtime)
            single = single if stride else row["ms_median"]
            row["share_of_matrix_rate"] = 1e12 * row["tflops"] / rate
            row["ratio_to_single_pass"] = ratio = single and row["ms_median"] / single
            rows.append(row)
            print(ROW.format(**row, ratio=f"{ratio:.1f}" if ratio else "-"), flush=True)
    if args.json:
        write_json(args.json, {"rows": rows, "settings": settings})
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    run_stage(main, ARGS)
