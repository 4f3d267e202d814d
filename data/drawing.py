"""Label maps and features as pictures: palette PNGs, overlays with a legend, principal components,
and several methods side by side.

Pictures are (3, H, W) uint8, label maps (H, W) int64, features (h, w, D).
"""
import colorsys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from common import atomic_path, short_name

# names that a colour belongs to, so that no picture shows blue grass; others get a hue of their own
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


def palette(classes):
    """A colour for each class: the one that its name is known for, or distinct ones by golden-ratio
    steps around the hue circle; grey for a background, black for what is ignored. (256, 3) uint8.
    """
    colours = np.zeros((256, 3), np.uint8)
    for k, title in enumerate(classes.titles):
        saturation, value = (0.85, 0.6, 0.45)[k % 3], (0.95, 0.75, 0.55)[k // 3 % 3]
        spread = colorsys.hsv_to_rgb(k * 0.618034 % 1, saturation, value)
        colours[k] = KNOWN_COLOURS.get(title, [round(255 * level) for level in spread])
    if classes.background:
        colours[0] = 90
    return colours


def palette_picture(labels, classes):
    picture = Image.fromarray(labels.numpy().astype(np.uint8))
    picture.putpalette(palette(classes).ravel().tolist())
    return picture


def legend(draw, corner, colour, text):
    left, top = corner
    draw.rectangle([left, top, left + 12, top + 12], fill=tuple(colour.tolist()))
    draw.text((left + 18, top - 2), text, fill="black", font=ImageFont.load_default(13))


def overlay_picture(image, labels, classes):
    """The picture under its class colours, with a legend of the classes and their share of it."""
    colours, line = palette(classes), 18
    blend = 0.45 * image.permute(1, 2, 0).numpy() + 0.55 * colours[labels.numpy()]
    blend = blend.astype(np.uint8)
    shares = torch.bincount(labels.flatten(), minlength=len(classes)) / labels.numel()
    shown = [k for k in shares.argsort(descending=True).tolist() if shares[k] >= 0.001]
    height, width = max(blend.shape[0], line * len(shown) + 8), blend.shape[1]
    sheet = Image.new("RGB", (width + 190, height), "white")
    sheet.paste(Image.fromarray(blend))
    for row, k in enumerate(shown):
        legend(ImageDraw.Draw(sheet), (width + 10, 6 + row * line), colours[k],
               f"{classes.titles[k]}  {100 * shares[k]:.1f} %")
    return sheet


def pca_picture(features, size):
    """The first three principal components of L2-normalised features (h, w, D) as red, green and
    blue: a picture of size (H, W)."""
    flat = F.normalize(features.flatten(0, 1).float().cpu(), dim=-1)
    flat = flat - flat.mean(0)
    # (D, 3), the largest first
    components = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(1)
    scores = flat @ (components * torch.sign(components.sum(0)))  # (h * w, 3)
    low, high = scores.quantile(0.02, 0), scores.quantile(0.98, 0)
    pixels = ((scores - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    pixels = (255 * pixels.view(*features.shape[:2], -1)).byte().numpy()
    return Image.fromarray(pixels).resize((size[1], size[0]), Image.BILINEAR)


def contact_sheet(rows, titles, classes, height=150):
    """Pictures side by side: rows of (picture, then label maps) under column titles, with a legend
    below."""
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
    sheet = Image.new("RGB", (width * len(titles), bottom + 18 * -(-len(shown) // per_line) + 2),
                      "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((column * width + 2, 3), title, fill="black", font=ImageFont.load_default(13))
        for row, strip in enumerate(strips):
            sheet.paste(strip[column], (column * width, 22 + row * (height + gap)))
    for position, k in enumerate(shown):
        corner = position % per_line * 130 + 2, bottom + position // per_line * 18
        legend(draw, corner, colours[k], classes.titles[k])
    return sheet


def save_picture(picture, path):
    with atomic_path(path) as temporary:
        picture.save(temporary)


MAP_KINDS = ("labels", "overlay", "pca")


def map_path(folder, name, kind):
    """folder/NAME.KIND.png for a picture of that name."""
    path = folder / f"{name}.{kind}.png"
    return path.with_name(short_name(path.name))


def save_maps(folder, name, image, labels, features, classes):
    """NAME.labels.png (palette PNG of class numbers), NAME.overlay.png and NAME.pca.png."""
    pictures = (palette_picture(labels, classes), overlay_picture(image, labels, classes),
                pca_picture(features, labels.shape))
    for kind, picture in zip(MAP_KINDS, pictures):
        save_picture(picture, map_path(folder, name, kind))
