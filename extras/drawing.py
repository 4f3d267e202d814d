"""Label maps and features as images, tables of class areas and of results, and a plot of these.

Images are (3, H, W) uint8, label maps (H, W) int64, feature maps (h, w, D).
"""
import contextlib
import csv
import functools
import hashlib
import math
import os
import textwrap

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageCms, ImageDraw, ImageFont

from data.files import atomic_path
from data.benchmarks import Size
from data.results import result_label

BACKGROUND, WHITE = np.array([(90, 90, 90), (255, 255, 255)], np.uint8)


# ---- one image -------------------------------------------------------------------------------

@functools.cache
def distinct_colours(count=255):
    """Return colours, each as far as possible in CIELAB from all earlier ones and from black
    (ignored pixels), white (the paper) and grey (background): (count, 3) uint8."""
    levels = np.linspace(0, 255, 11).round().astype(np.uint8)
    candidates = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    taken = np.array([(0, 0, 0), WHITE, BACKGROUND], np.uint8)
    to_lab = ImageCms.buildTransform(*map(ImageCms.createProfile, ("sRGB", "LAB")), "RGB", "LAB")
    image = Image.fromarray(np.concatenate([candidates, taken])[None])
    lab = np.asarray(ImageCms.applyTransform(image, to_lab))[0]
    lab = np.stack([lab[:, 0] / 2.55, *lab[:, 1:].view(np.int8).T], 1)  # L, a, b
    points, chosen = lab[:len(candidates)], []
    distance = np.linalg.norm(points[:, None] - lab[len(candidates):], axis=2).min(1)
    for _ in range(count):
        chosen.append(distance.argmax())
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return candidates[chosen]


def palette(classes):
    """Return each class's colour, its data set's if that has some, and black for ignored pixels:
    (256, 3) uint8."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:len(classes)] = distinct_colours()[:len(classes)]
    if classes.background:
        colours[0] = BACKGROUND
    if classes.colours is not None:
        colours[:len(classes)] = classes.colours
    return colours


@functools.cache
def font(size, text):
    """Return a font with the letters of a text: matplotlib's DejaVu Sans, or one of the system's
    if only that has them."""
    usual = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    letters = set(map(ord, text))
    fonts = [usual] if letters <= FT2Font(usual).get_charmap().keys() else findSystemFonts()
    for path in sorted(fonts):
        with contextlib.suppress(RuntimeError, OSError):  # a format that one of the two lacks
            if letters <= FT2Font(path).get_charmap().keys():
                return ImageFont.truetype(path, size)
    return ImageFont.truetype(usual, size)


def overlay_image(image, labels, classes):
    """Return the image under its class colours, with a legend of the classes and their areas."""
    colours = palette(classes)
    blend = 0.45 * image.permute(1, 2, 0).numpy() + 0.55 * colours[labels.numpy()]
    blend = Image.fromarray(blend.astype(np.uint8))
    areas = torch.bincount(labels.flatten(), minlength=len(classes)) / labels.numel()
    size = max(12, max(blend.size) // 60)  # of the letters, in pixels
    lines = []  # a colour, a text and its font each; long names take several
    for k in areas.argsort(descending=True).tolist():
        texts = textwrap.wrap(f"{classes.titles[k]}  {100 * areas[k]:.1f}\xa0%", width=36)
        if areas[k] >= 0.001:
            face = font(size, f"{classes.titles[k]} 0123456789.%")  # one for all areas
            lines += ((WHITE if row else colours[k], text, face) for row, text in enumerate(texts))
    margin, line = size // 2, 3 * size // 2
    width = int(max(face.getlength(text) for _, text, face in lines)) + 2 * line
    sheet = Image.new("RGB", (blend.width + width + margin,
                              max(blend.height, line * len(lines) + margin)), "white")
    sheet.paste(blend)
    draw = ImageDraw.Draw(sheet)
    for row, (colour, text, face) in enumerate(lines):
        left, top = blend.width + margin, margin + row * line
        draw.rectangle([left, top, left + size, top + size], fill=tuple(colour.tolist()))
        draw.text((left + line, top - size // 6), text, fill="black", font=face)
    return sheet


def pca_image(features, size):
    """Return the three principal components of unit features (h, w, D) as RGB of size (H, W)."""
    flat = F.normalize(features.flatten(0, 1).float().cpu(), dim=-1)
    flat = flat - flat.mean(0)
    # (D, 3), the largest first
    components = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(1)
    scores = flat @ (components * torch.sign(components.sum(0)))  # (h * w, 3)
    low, high = scores.quantile(0.02, 0), scores.quantile(0.98, 0)
    pixels = ((scores - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    pixels = (255 * pixels.view(*features.shape[:2], -1)).byte().numpy()
    return Image.fromarray(pixels).resize((size[1], size[0]), Image.BILINEAR)


def map_path(folder, name, kind):
    """Return folder/NAME.KIND.png, shortened where a file system could not take it."""
    path = folder / f"{name}.{kind}.png"
    encoded = os.fsencode(path.name)
    if len(encoded) > 255:
        digest = hashlib.sha256(encoded).hexdigest()[:16].encode()
        path = path.with_name(os.fsdecode(encoded[:223] + digest + encoded[-16:]))
    return path


def save_maps(folder, name, image, labels, features, classes):
    """Write NAME.labels.png (a palette PNG of class numbers), NAME.overlay.png, NAME.pca.png."""
    labels = labels.cpu()
    label_image = Image.fromarray(labels.numpy().astype(np.uint8))
    label_image.putpalette(palette(classes).ravel().tolist())
    images = {"labels": label_image, "overlay": overlay_image(image, labels, classes),
              "pca": pca_image(features, labels.shape)}
    for kind, drawn in images.items():
        with atomic_path(map_path(folder, name, kind), durable=False) as temporary:
            drawn.save(temporary)


# ---- what a table of evaluations counted -----------------------------------------------------

def write_csv(path, rows):
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8",
                                              errors="surrogateescape") as file:
        csv.writer(file).writerows(rows)


def write_shares(table):
    """Write beside a table's maps which share of each image every class takes (shares.csv) and
    which number and colour it has (classes.csv). Print shares where there is no score to print."""
    folder = table[0].maps.parent if len(table) > 1 else table[0].maps
    classes, lines = table[0].dataset.classes, []
    for evaluation in table:
        for name in sorted(evaluation.journal.done):
            areas = evaluation.confusion([name]).sum(0)  # of the predictions
            areas = (100 * areas / areas.sum()).tolist()
            lines.append([name, evaluation.method.label, *(f"{area:.2f}" for area in areas)])
            if table[0].dataset.masks is None:
                largest = sorted(zip(areas, classes.titles), reverse=True)
                print(f"{name} ({evaluation.method.label}): " + ", ".join(
                    f"{title} {area:.1f} %" for area, title in largest if area > 0))
    path = folder / "shares.csv"
    write_csv(path, [["image", "method", *(f"{title} %" for title in classes.titles)],
                     *lines])
    legend = folder / "classes.csv"
    before = legend.read_bytes() if legend.is_file() else None
    write_csv(legend, [["number", "class", "colour"], *(
        [number, title, "#" + colour.tobytes().hex()]
        for number, (title, colour) in enumerate(zip(classes.titles, palette(classes))))])
    other = ", of other classes" if before not in (None, legend.read_bytes()) else ""
    print(f"maps in {folder}, the share of each class in {path}")
    now = {map_path(evaluation.maps, name, "labels")
           for evaluation in table for name in evaluation.journal.done}
    if earlier := set(folder.rglob("*.labels.png")) - now:
        print(f"label maps of earlier runs in {folder}: {len(earlier)}{other}")


# ---- results over several data sets and sizes ------------------------------------------------

def result_size(result):
    return Size(result["short_side"], result["area"])


def print_summary(results):
    """Print the mIoU of every method by data set and size, and its average over the data sets."""
    columns = list(dict.fromkeys((result["dataset"], result_size(result)) for result in results))
    datasets, sizes = (list(dict.fromkeys(axis)) for axis in zip(*columns))
    labels = list(dict.fromkeys(map(result_label, results)))
    cells = {(result_label(result), result["dataset"], result_size(result)): result["miou"]
             for result in results}
    by_size = len(sizes) > 1 and len(datasets) < len(columns)
    titles = [" ".join([name] * (len(datasets) > 1)
                       + [str(size.requested or "own size")] * by_size) for name, size in columns]
    averaged = len(datasets) > 1 and len(datasets) == len(columns)
    titles += ["average"] * averaged
    width, cell = max(map(len, labels)) + 2, max(10, *(len(title) + 2 for title in titles))
    print("\n" + f"{'mIoU':<{width}}" + "".join(f"{title:>{cell}}" for title in titles))
    for label in labels:
        line = [cells.get((label, *column), math.nan) for column in columns]
        line += [float(np.mean(line))] * averaged
        values = ("-" if math.isnan(value) else f"{value:.1f}" for value in line)
        print(f"{label:<{width}}" + "".join(f"{value:>{cell}}" for value in values))


def plot(results, path):
    """Plot mIoU against time, and resolution if it varies, averaged over a method's data sets."""
    from matplotlib.figure import Figure
    sweep = len({result_size(result).requested for result in results} - {None}) > 1
    points = {}  # method -> requested number of pixels, or stride -> its results
    for result in results:
        label, point = result_label(result), result_size(result).requested
        if not sweep:  # one line through all strides
            label, point = label.replace(f"/{result['stride']}", ""), result["stride"]
        points.setdefault(label, {}).setdefault(point, []).append(result)
    figure = Figure(figsize=(6 + 5 * sweep, 4), layout="constrained")
    panels = figure.subplots(1, 1 + sweep, squeeze=False)
    for position, (label, by_size) in enumerate(points.items()):
        marks = sorted(by_size.items(), key=lambda item: item[0] or 0)
        miou, milliseconds = ([factor * np.mean([result[key] for result in group])
                               for _, group in marks]
                              for key, factor in (("miou", 1), ("seconds_per_image", 1e3)))
        style = {"marker": "os^Dv*PX"[position % 8], "label": as_text(label)}
        panels[0, -1].plot(milliseconds, miou, **style)
        if sweep:
            pairs = [(side, value) for (side, _), value in zip(marks, miou) if side]
            panels[0, 0].plot(*zip(*pairs), **style)
    if sweep:
        by_area = any(result["area"] for result in results)
        panels[0, 0].set(ylabel="mIoU", xlabel="side of the square of the image's area in pixels"
                         if by_area else "short side of the image in pixels")
    panels[0, -1].set(xscale="log", xlabel="milliseconds per image", ylabel="mIoU")
    panels[0, -1].tick_params(axis="x", which="both", labelsize=7, labelrotation=45)
    for panel in panels.flat:
        panel.grid(alpha=0.3, which="both")
    panels[0, -1].legend(fontsize=8)
    names = ", ".join(dict.fromkeys(result["dataset"] for result in results))
    figure.suptitle(as_text(names), fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


def as_text(name):
    """Return a name, which may be a path, as matplotlib can draw it."""
    return name.encode(errors="backslashreplace").decode().replace("$", r"\$")
