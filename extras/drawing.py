"""Label maps and features as images, a contact sheet of methods, and a table of class areas.

Images are (3, H, W) uint8, label maps (H, W) int64, feature maps (h, w, D).
"""
import colorsys
import csv
import hashlib
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data.files import atomic_path
from data.benchmarks import label_table, load_sample, read_labels

# colours that go with a name, so that no image shows blue grass; others get a hue of their own
KNOWN_COLOURS = {
    "sky": (140, 200, 250), "grass": (110, 180, 70), "water": (40, 110, 190),
    "sand": (225, 200, 140), "brick wall": (170, 84, 66), "wood": (150, 110, 70),
    "road": (110, 110, 115), "snow": (238, 242, 250), "flower field": (226, 120, 180),
    "lily pond": (80, 150, 130), "pebble beach": (176, 164, 140), "parking lot": (70, 66, 96),
    "ice rink": (150, 190, 235), "red ball": (220, 40, 40), "yellow ball": (240, 220, 60),
    "blue ball": (40, 60, 220), "box": (90, 50, 110), "tent": (120, 70, 200),
    "house": (235, 185, 40), "tree": (30, 100, 45), "car": (90, 240, 220),
    "mushroom": (190, 50, 100), "fish": (245, 140, 40),
}


# ---- one image -------------------------------------------------------------------------------

def palette(classes):
    """Return each class's colour, black for ignored pixels: (256, 3) uint8."""
    colours = np.zeros((256, 3), np.uint8)
    for k, title in enumerate(classes.titles):  # hues by golden-ratio steps
        saturation, value = (0.85, 0.6, 0.45)[k % 3], (0.95, 0.75, 0.55)[k // 3 % 3]
        levels = colorsys.hsv_to_rgb(k * 0.618034 % 1, saturation, value)
        colours[k] = KNOWN_COLOURS.get(title, [round(255 * level) for level in levels])
    if classes.background:
        colours[0] = 90
    return colours




def draw_legend(draw, left, top, colour, text):
    draw.rectangle([left, top, left + 12, top + 12], fill=tuple(colour.tolist()))
    draw.text((left + 18, top - 2), text, fill="black", font=ImageFont.load_default(13))


def overlay_image(image, labels, classes):
    """Return the image under its class colours, with a legend of the classes and their areas."""
    colours, line = palette(classes), 18
    blend = 0.45 * image.permute(1, 2, 0).numpy() + 0.55 * colours[labels.numpy()]
    blend = blend.astype(np.uint8)
    areas = torch.bincount(labels.flatten(), minlength=len(classes)) / labels.numel()
    shown = [k for k in areas.argsort(descending=True).tolist() if areas[k] >= 0.001]
    height, width = max(blend.shape[0], line * len(shown) + 8), blend.shape[1]
    sheet = Image.new("RGB", (width + 190, height), "white")
    sheet.paste(Image.fromarray(blend))
    for row, k in enumerate(shown):
        draw_legend(ImageDraw.Draw(sheet), width + 10, 6 + row * line, colours[k],
                    f"{classes.titles[k]}  {100 * areas[k]:.1f} %")
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


def save_image(image, path):
    """Write a PIL image."""
    with atomic_path(path) as temporary:
        image.save(temporary)


MAP_KINDS = ("labels", "overlay", "pca")


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
    label_image = Image.fromarray(labels.numpy().astype(np.uint8))
    label_image.putpalette(palette(classes).ravel().tolist())
    images = (label_image, overlay_image(image, labels, classes),
              pca_image(features, labels.shape))
    for kind, drawn in zip(MAP_KINDS, images):
        save_image(drawn, map_path(folder, name, kind))


def has_maps(folder, name):
    """Return whether all maps of an image are there."""
    return all(map_path(folder, name, kind).is_file() for kind in MAP_KINDS)


# ---- what a table of evaluations compares ----------------------------------------------------

def summarise_maps(table):
    """Write a contact sheet of a table's maps, and without masks the areas of its classes."""
    folder = table[0].maps.parent if len(table) > 1 else table[0].maps
    if table[0].dataset.masks is None:
        write_shares(table, folder / "shares.csv")
    save_image(draw_sheet(table), folder / "sheet.png")
    print(f"maps in {folder}, some of them side by side in {folder / 'sheet.png'}")


def write_shares(table, path):
    """Print which share of each image every class takes, and write it as a CSV file."""
    titles, lines = table[0].dataset.classes.titles, []
    for evaluation in table:
        for name in sorted(evaluation.journal.done):
            areas = evaluation.confusion([name])[0]
            areas = (100 * areas / areas.sum().item()).tolist()
            lines.append([name, evaluation.method.label, *(f"{area:.2f}" for area in areas)])
            largest = sorted(zip(areas, titles), reverse=True)
            print(f"{name} ({evaluation.method.label}): " + ", ".join(
                f"{title} {area:.1f} %" for area, title in largest if area > 0))
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8",
                                              errors="surrogateescape") as file:
        csv.writer(file).writerows([["image", "method", *(f"{t} %" for t in titles)], *lines])


def draw_sheet(table, most=6):
    """Return a contact sheet of images, first where windows lead the first method in mIoU most."""
    from evaluate_ovs import scores
    dataset, first = table[0].dataset, table[0]
    names = [name for name in dataset.images
             if all(name in evaluation.journal.done for evaluation in table)]
    windows = [evaluation for evaluation in table[1:] if evaluation.method.stride]
    if windows and dataset.masks:
        def lead(name):
            ahead, behind = (scores(each.confusion([name]))[1] for each in (windows[-1], first))
            # nan where the mask ignores every pixel
            return -math.inf if math.isnan(ahead - behind) else ahead - behind
        names.sort(key=lead, reverse=True)
    rows = []
    for name in names[:most]:
        image, labels, _ = load_sample(dataset, dataset.images.index(name))
        maps = [read_labels(map_path(evaluation.maps, name, "labels"), image.shape[-2:],
                            label_table("plain", len(dataset.classes))) for evaluation in table]
        rows.append([image, *([] if labels is None else [labels]), *maps])
    titles = ["image", *["labels"] * bool(dataset.masks), *map(title_of, table)]
    return contact_sheet(rows, titles, dataset.classes)


def title_of(evaluation):
    """Return what a method is called on a contact sheet."""
    method = evaluation.method
    title = f"window, stride {method.stride}" if method.stride else "single pass"
    if method.name == "spar":
        windows = method.backbone.windows
        title = (f"SPAR, frozen blocks in windows of stride {windows.stride}" if windows else
                 "SPAR, single pass")
    return title + method.label.removeprefix(method.name)


def contact_sheet(rows, titles, classes, height=150):
    """Return rows of (image, then label maps) under column titles, with a legend below."""
    colours, gap = palette(classes), 4
    strips = []
    for image, *label_maps in rows:
        pixels = image.permute(1, 2, 0).numpy()
        cells = [pixels] + [(0.2 * pixels + 0.8 * colours[labels.numpy()]).astype(np.uint8)
                            for labels in label_maps]
        width = max(1, round(height * pixels.shape[1] / pixels.shape[0]))
        strips.append([Image.fromarray(cell).resize((width, height), Image.BILINEAR)
                       for cell in cells])
    width = max(150, *(strip[0].width for strip in strips)) + gap
    present = set().union(*(labels.unique().tolist() for _, *maps in rows for labels in maps))
    shown = sorted(k for k in present if k < len(classes))
    per_line = max(1, width * len(titles) // 130)
    bottom = 24 + (height + gap) * len(strips)
    size = width * len(titles), bottom + 18 * math.ceil(len(shown) / per_line) + 2
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((column * width + 2, 3), title, fill="black", font=ImageFont.load_default(13))
        for row, strip in enumerate(strips):
            sheet.paste(strip[column], (column * width, 22 + row * (height + gap)))
    for position, k in enumerate(shown):
        draw_legend(draw, position % per_line * 130 + 2, bottom + position // per_line * 18,
                    colours[k], classes.titles[k])
    return sheet
