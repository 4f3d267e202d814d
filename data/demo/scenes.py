"""Draw labelled scenes for the demo: stuff and things, with exact label maps.

A scene has an upper and a lower background with a wavy horizon between them, regions of other
stuff, and things that overlap and may be cut off at the border. A label is a *concept*: one of
the `STUFF`, or one of the `THINGS`. Some stuff looks like another except for sparse marks
(`MARKED`), so that only a patch's surroundings tell what it is. Both are often near (`TWINS`).
"""
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

STUFF = ["sky", "grass", "water", "sand", "brick wall", "wood", "road", "snow",
         "flower field", "lily pond", "pebble beach", "parking lot", "ice rink"]
COLOURS = {"red": (205, 45, 40), "yellow": (235, 205, 50), "green": (50, 160, 60),
           "blue": (45, 85, 205), "purple": (135, 60, 170), "white": (235, 235, 235)}

# what captions and class lists call them: the class, then its synonyms
NAMES = {
    "sky": ["sky", "clouds"], "grass": ["grass", "lawn", "meadow"],
    "water": ["water", "sea", "lake"], "sand": ["sand", "beach"],
    "brick wall": ["brick wall", "bricks"], "wood": ["wood", "wooden fence", "planks"],
    "road": ["road", "street", "asphalt"], "snow": ["snow"],
    "flower field": ["flower field"], "lily pond": ["lily pond", "pond"],
    "pebble beach": ["pebble beach", "pebbles"], "parking lot": ["parking lot", "car park"],
    "ice rink": ["ice rink", "rink"],
    "ball": ["ball"], "car": ["car", "automobile"], "box": ["box", "crate", "parcel"],
    "tent": ["tent", "teepee"], "tree": ["tree", "bush"], "house": ["house", "cottage", "hut"],
    "mushroom": ["mushroom", "toadstool"], "fish": ["fish"],
}


class Marks(NamedTuple):
    """Marks that are scattered over stuff."""
    ground: str  # the stuff
    colour: tuple
    axes: tuple  # half the width and half the height of a mark, in pixels
    outline: str


MARKED = {
    "flower field": Marks("grass", (235, 90, 170), (5, 5), "ellipse"),
    "lily pond": Marks("water", (60, 150, 70), (8, 5), "ellipse"),
    "pebble beach": Marks("sand", (120, 120, 125), (6, 5), "ellipse"),
    "parking lot": Marks("road", (235, 200, 60), (2, 9), "rectangle"),
    "ice rink": Marks("snow", (70, 110, 215), (9, 2), "rectangle"),
}
TWINS = ({name: marks.ground for name, marks in MARKED.items()}
         | {marks.ground: name for name, marks in MARKED.items()})


def ellipse(cx, cy, rx, ry=None, start=0.0, stop=2 * np.pi):
    """Return corners of an ellipse or a slice in the square [-1, 1]^2: (n, 2), x before y."""
    t = np.linspace(start, stop, 30)
    return np.stack([cx + rx * np.cos(t), cy + (ry or rx) * np.sin(t)], 1)


def rectangle(x0, y0, x1, y1):
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], float)


GLASS, TYRE, DOT = (185, 215, 235), (30, 30, 32), (245, 240, 230)
# each kind's (corners, paint): RGB, or a factor on the thing's own colour
KINDS = {
    "ball": [(ellipse(0, 0, 1), 1)],
    "box": [(rectangle(-0.9, -0.8, 0.9, 0.8), 1),
            (rectangle(-0.9, -0.12, 0.9, 0.12), 0.6), (rectangle(-0.12, -0.8, 0.12, 0.8), 0.6)],
    "tent": [(np.array([(0, -1), (1, 0.8), (-1, 0.8)]), 1),
             (np.array([(0, -0.1), (0.3, 0.8), (-0.3, 0.8)]), (40, 35, 40))],
    "house": [(rectangle(-0.75, -0.2, 0.75, 1), 1),
              (np.array([(0, -1), (1, -0.15), (-1, -0.15)]), 0.55),
              (rectangle(-0.15, 0.35, 0.2, 1), (70, 45, 30)),
              (rectangle(-0.6, 0.05, -0.25, 0.4), (190, 220, 240)),
              (rectangle(0.3, 0.05, 0.6, 0.4), (190, 220, 240))],
    "tree": [(rectangle(-0.14, 0.2, 0.14, 1), (95, 65, 40)), (ellipse(0, -0.35, 0.65), 1),
             (ellipse(-0.5, 0.05, 0.42), 0.9), (ellipse(0.5, 0.05, 0.42), 0.85)],
    "car": [(rectangle(-1, -0.1, 1, 0.4), 1),
            (np.array([(-0.65, -0.1), (-0.4, -0.55), (0.4, -0.55), (0.7, -0.1)]), 1),
            (np.array([(-0.48, -0.12), (-0.32, -0.44), (0, -0.44), (0, -0.12)]), GLASS),
            (np.array([(0.1, -0.12), (0.1, -0.44), (0.34, -0.44), (0.52, -0.12)]), GLASS),
            (ellipse(-0.55, 0.4, 0.25), TYRE), (ellipse(0.55, 0.4, 0.25), TYRE)],
    "mushroom": [(rectangle(-0.25, 0, 0.25, 1), (225, 215, 195)),
                 (ellipse(0, 0.1, 1, 0.95, np.pi, 2 * np.pi), 1),
                 (ellipse(-0.4, -0.3, 0.15), DOT), (ellipse(0.3, -0.45, 0.17), DOT),
                 (ellipse(0.55, -0.08, 0.12), DOT)],
    "fish": [(ellipse(-0.15, 0, 0.75, 0.5), 1),
             (np.array([(0.4, 0), (1, -0.5), (1, 0.5)]), 0.75),
             (ellipse(-0.55, -0.12, 0.09), (15, 15, 15))],
}
OWN_COLOUR = {"tree": (45, 120, 45), "house": (190, 150, 105), "mushroom": (205, 45, 40),
              "fish": (240, 130, 30)}  # the other kinds come in all COLOURS

# all things as (kind, colour); the colour is None for a kind with its own
THINGS = [(kind, colour) for kind in KINDS
          for colour in ([None] if kind in OWN_COLOUR else COLOURS)]
# things that the backbone is never trained on, neither as pixels nor as words
HELD_OUT = {("ball", "yellow"), ("car", "green"), ("box", "purple"), ("tent", "blue")}


def thing_label(kind, colour):
    """Return the number of a thing's concept."""
    return len(STUFF) + THINGS.index((kind, colour))


def smooth_noise(rng, h, w, cell_h, cell_w=None):
    """Return noise in about [-1, 1] with grains of cell_h x cell_w pixels: (h, w) float32."""
    cell_w = cell_w or cell_h
    shape = max(2, int(h / cell_h) + 2), max(2, int(w / cell_w) + 2)
    coarse = rng.uniform(-1, 1, shape).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((w, h), Image.BICUBIC))


def brick_wall(rng, y, x, s):
    """Return bricks (h, w, 3). y, x: coordinates of the pixels (h, w); s: scale of the bricks."""
    bh, bw = 9 * s, 22 * s
    row = np.floor(y / bh)
    shifted = x + (row % 2) * bw / 2
    column = np.floor(shifted / bw)
    mortar = ((y % bh) < 1.6) | ((shifted % bw) < 1.6)
    shades = rng.uniform(-1, 1, (int(row.max()) + 1, int(column.max()) + 1))
    shade = shades[row.astype(int), column.astype(int)]
    base = np.array([(165, 80, 60), (150, 110, 85), (120, 95, 95)][rng.integers(3)])
    wall = base + (18 * shade + 8 * smooth_noise(rng, *x.shape, 4))[..., None]
    return np.where(mortar[..., None], np.array([195, 188, 178]), wall)


def planks(rng, x, s):
    """Return planks (h, w, 3). x: columns of the pixels (h, w); s: scale of the planks."""
    plank = np.floor(x / (17 * s))
    shade = rng.uniform(-1, 1, int(plank.max()) + 1)[plank.astype(int)]
    grain = np.sin(x * 0.9 + 4 * smooth_noise(rng, *x.shape, 40, 9))
    grain += smooth_noise(rng, *x.shape, 20, 3)
    wall = np.array([150, 105, 62]) + (20 * shade + 9 * grain)[..., None]
    return np.where(((x % (17 * s)) < 1.5)[..., None], 60, wall)


def paint_stuff(name, rng, h, w):
    """Return a texture of h x w pixels: (h, w, 3) float in 0..255."""
    y, x = np.mgrid[:h, :w].astype(np.float32)
    if name in MARKED:
        return scatter_marks(rng, MARKED[name], h, w)
    s = rng.uniform(0.8, 1.5)
    if name == "sky":
        clouds = smooth_noise(rng, h, w, 34 * s, 60 * s)
        clouds = clouds + 0.5 * smooth_noise(rng, h, w, 14 * s, 22 * s)
        clouds = np.clip(clouds + rng.uniform(-0.6, 0.3), 0, 1)
        base = np.array([rng.uniform(90, 150), rng.uniform(150, 195), rng.uniform(215, 245)])
        return base * (1 - clouds[..., None]) + 240 * clouds[..., None]
    if name == "grass":
        blades = smooth_noise(rng, h, w, 7 * s, 2 * s) + 0.6 * smooth_noise(rng, h, w, 30)
        return np.array([75, 140, 55]) + blades[..., None] * np.array([28, 34, 20])
    if name == "water":
        ripples = np.sin(y / (2.2 * s) + 2.5 * smooth_noise(rng, h, w, 12 * s, 30 * s))
        ripples = ripples + smooth_noise(rng, h, w, 4, 16 * s)
        return np.array([45, 105, 150]) + ripples[..., None] * np.array([14, 18, 18])
    if name == "sand":
        grains = rng.normal(0, 1, (h, w)) * 0.6 + smooth_noise(rng, h, w, 16 * s, 40 * s)
        grains = grains + 0.6 * np.sin((y + 0.4 * x) / (6 * s) + 2 * smooth_noise(rng, h, w, 30))
        return np.array([212, 186, 130]) + grains[..., None] * np.array([13, 13, 12])
    if name == "brick wall":
        return brick_wall(rng, y, x, s)
    if name == "wood":
        return planks(rng, x, s)
    if name == "road":
        speckle = rng.normal(0, 1, (h, w)) * 9 + 10 * smooth_noise(rng, h, w, 24 * s)
        road = np.full((h, w, 3), 105.0) + speckle[..., None]
        line = (np.abs(y - rng.uniform(0.2, 0.9) * h - 0.1 * x) < 2.5) & ((x % 50) < 28)
        return np.where(line[..., None], 225, road)
    assert name == "snow"
    drifts = smooth_noise(rng, h, w, 26 * s, 50 * s) + 0.35 * rng.normal(0, 1, (h, w))
    return np.array([228, 233, 243]) + drifts[..., None] * np.array([13, 11, 7])


def scatter_marks(rng, marks, h, w):
    """Return stuff with marks on a jittered grid: (h, w, 3) float32."""
    image = Image.fromarray(paint_stuff(marks.ground, rng, h, w).clip(0, 255).astype(np.uint8))
    pen, spacing = ImageDraw.Draw(image), rng.uniform(34, 44)
    for y in np.arange(rng.uniform(0, spacing), h, spacing):
        for x in np.arange(rng.uniform(0, spacing), w, spacing):
            centre = np.array([x, y]) + rng.uniform(-0.2, 0.2, 2) * spacing
            fill = tuple(int(v) for v in marks.colour + rng.normal(0, 9, 3))
            box = [*(centre - marks.axes), *(centre + marks.axes)]
            getattr(pen, marks.outline)(box, fill=fill)
    return np.asarray(image, np.float32)


def surface(kind, x, y, radius, rng):
    """Return the pattern of a kind: factors on its colour (n, n). x, y: from -1 to 1, (n, n)."""
    u, v = x * radius, y * radius  # in pixels, so that patterns do not grow with the thing
    return {
        "ball": lambda: np.where(np.hypot(u, v) % 20 < 10, 1.2, 0.6),
        "box": lambda: np.where((u % 5 < 2) | (v % 5 < 2), 0.5, 1.1),
        "tent": lambda: np.where(u % 8 < 4, 1.15, 0.55),
        "house": lambda: np.where((v % 6 < 1.5) | ((u + (v // 6 % 2) * 5) % 10 < 1.5),
                                  0.78, 1.05),
        "tree": lambda: 1 + 0.5 * smooth_noise(rng, *x.shape, 4),
        "car": lambda: 1.1 - 0.25 * y,
        "mushroom": lambda: np.where((u % 11 - 5) ** 2 + (v % 11 - 5) ** 2 < 9, 1.6, 0.95),
        "fish": lambda: np.where((u % 6 - 3) ** 2 + ((v + 3 * (u // 6 % 2)) % 6 - 3) ** 2 < 6,
                                 1.15, 0.75),
    }[kind]()


def paint_thing(kind, colour, radius, rng):
    """Return a thing's colours (n, n, 3) and coverage (n, n) in [0, 1]; n = 2 * radius + 3."""
    side, scale = 2 * radius + 3, 3
    upright = kind in ("house", "tree", "car", "tent", "mushroom")
    angle = (rng.uniform(-np.pi, np.pi) if kind == "box" else
             rng.normal(0, 0.2 if upright else 0.5))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    flip = np.array([rng.choice([-1, 1]), 1.0]) * np.array([1, rng.uniform(0.8, 1)])
    y, x = np.mgrid[:side, :side].astype(np.float32)

    local = np.stack([x - side / 2, y - side / 2], 2) @ rotation / radius  # (n, n, 2), as KINDS
    main = np.array(OWN_COLOUR.get(kind) or COLOURS[colour], np.float32)
    main = main * rng.uniform(0.85, 1.05) + rng.normal(0, 7, 3)
    main = main * surface(kind, local[..., 0], local[..., 1], radius, rng)[..., None]

    colours = np.zeros((side, side, 3), np.float32)
    coverage = np.zeros((side, side), np.float32)
    for corners, paint in KINDS[kind]:
        placed = ((corners * flip) @ rotation.T * radius + side / 2) * scale
        mask = Image.new("L", (side * scale, side * scale))
        ImageDraw.Draw(mask).polygon([tuple(p) for p in placed], fill=255)
        alpha = np.asarray(mask.reduce(scale), np.float32) / 255
        fill = np.array(paint, np.float32) if isinstance(paint, tuple) else main * paint
        colours = colours * (1 - alpha[..., None]) + fill * alpha[..., None]
        coverage = np.maximum(coverage, alpha)
    direction = rng.uniform(0, 2 * np.pi)
    slope = np.cos(direction) * (x / side - 0.5) + np.sin(direction) * (y / side - 0.5)
    shade = 1 + rng.uniform(0.05, 0.25) * slope * 2
    # spread the colour of partly covered pixels, so that edges are not dark
    spread = colours / np.maximum(coverage, 0.3)[..., None]
    colours = np.where(coverage[..., None] > 0, spread, colours) * shade[..., None]
    return colours, coverage


def blob(rng, h, w, size):
    """Return a region of about size x 2 size pixels somewhere in the image: (h, w) bool."""
    y, x = np.mgrid[:h, :w].astype(np.float32)
    cy, cx, r = rng.uniform(0, h), rng.uniform(0, w), rng.uniform(0.6, 1.4) * size
    distance = ((y - cy) / r) ** 2 + ((x - cx) / (1.8 * r)) ** 2
    return distance + 0.35 * smooth_noise(rng, h, w, 50) < 1


class Layout(NamedTuple):
    """How much there is in a scene, and how large."""
    regions: float  # mean number of regions after the first
    sizes: tuple  # of regions, as fractions of the scene's short side
    twins: float  # how often a region is the twin of the lower background
    things: float  # mean number of things after the first
    smallness: float  # of things: exponent of a uniform draw from 0.4 short sides to 10 pixels


BUSY = Layout(0.8, (0.25, 0.45), 0.5, 2, 0.3)  # what the backbone learns from
CALM = Layout(0.9, (0.45, 0.7), 0.9, 0.8, 0.12)  # few pixels near edges, where patches are coarse


def render_scene(rng, height, width, things, layout):
    """Return an image (H, W, 3) uint8 with some of the things and its labels (H, W) uint8."""
    upper = rng.choice(["sky", "sky", "sky", "sky", "brick wall", "wood"])
    lower = rng.choice([name for name in STUFF if name not in ("sky", "brick wall", "wood")])
    x = np.arange(width)
    waves = 2 if upper != "sky" else 10
    horizon = rng.uniform(0.2, 0.6) * height + smooth_noise(rng, 2, width, 2, 60)[0] * waves
    horizon = horizon + rng.normal(0, 0.06) * (x - width / 2)
    below = np.arange(height)[:, None] >= horizon[None]
    labels = np.where(below, STUFF.index(lower), STUFF.index(upper)).astype(np.uint8)
    image = np.where(below[..., None], paint_stuff(lower, rng, height, width),
                     paint_stuff(upper, rng, height, width))
    for _ in range(1 + rng.poisson(layout.regions)):
        twin = lower in TWINS and rng.uniform() < layout.twins
        other = TWINS[lower] if twin else rng.choice(STUFF)
        region = blob(rng, height, width, rng.uniform(*layout.sizes) * min(height, width))
        image = np.where(region[..., None], paint_stuff(other, rng, height, width), image)
        labels[region] = STUFF.index(other)

    for _ in range(rng.poisson(layout.things) + 1):
        kind, colour = things[rng.integers(len(things))]
        radius = int(10 * (0.4 * min(height, width) / 10) ** rng.uniform() ** layout.smallness)
        colours, coverage = paint_thing(kind, colour, radius, rng)
        side = len(coverage)
        top = rng.integers(-side // 3, height - 2 * side // 3)
        left = rng.integers(-side // 3, width - 2 * side // 3)
        y0, y1 = max(top, 0), min(top + side, height)
        x0, x1 = max(left, 0), min(left + side, width)
        part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        alpha = coverage[part][..., None]
        image[y0:y1, x0:x1] = image[y0:y1, x0:x1] * (1 - alpha) + colours[part] * alpha
        labels[y0:y1, x0:x1][coverage[part] > 0.5] = thing_label(kind, colour)

    light = 1 + rng.uniform(-0.16, 0.16)
    light = light + 0.16 * smooth_noise(rng, height, width, max(height, width))
    image = image * light[..., None] * rng.uniform(0.94, 1.06, 3)
    image = image + rng.normal(0, rng.uniform(1.5, 5), (height, width, 1))
    return np.clip(image, 0, 255).astype(np.uint8), labels
