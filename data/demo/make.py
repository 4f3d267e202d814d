"""Draw images like the demo's: unlabelled ones to distil on, labelled ones to score.

    python data/demo/make.py --out runs/draw --seed 1                     # 10 seconds
    python data/demo/make.py --out runs/busy --layout busy --train 240 --test 0

In: a seed (0 is the demo's). Out: train/*.jpg, test/images/*.jpg, test/masks/*.png (palette PNG
with label ids in the order of classes.txt), and classes.txt.

The backbone `tiny` is open_clip's native CLIP: a ViT of 3 blocks, width 256 and patch 16, whose
first block does not attend. It was trained on crops of 128 x 128 pixels of busier scenes, by
data/make_demo.py of commit ca1bf33.
"""
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root of the repository
from data.demo.scenes import (BUSY, CALM, HELD_OUT, KINDS, NAMES, STUFF, THINGS, render_scene,
                              thing_label)
from data.flags import Parser, bounded

SIDE = 128  # native resolution, pixels
# In the images, balls have only these colours, and each is a class of its own. The backbone never
# meets "yellow ball", neither the words nor the thing.
COLOURED_CLASSES = {"ball": ["red", "blue", "yellow"]}


def evenly(coloured):
    """Return (kind, colour) pairs, all kinds equally often. coloured: colours of some kinds."""
    pairs = []
    for kind in KINDS:
        colours = coloured.get(kind) or [colour for other, colour in THINGS if other == kind]
        pairs += [(kind, colour) for colour in colours] * (6 // len(colours))
    return pairs


TRAINED_THINGS = [thing for thing in evenly({}) if thing not in HELD_OUT]
LAYOUTS = {"calm": (evenly(COLOURED_CLASSES), CALM), "busy": (TRAINED_THINGS, BUSY)}  # of images
STREAMS = {"train": 1, "test": 2}  # of random numbers


def generator(seed, stream, index):
    return np.random.default_rng((seed, STREAMS[stream], index))


def random_size(rng):
    """Return sides of 1.25 to 3.5 times the native one, mostly large, with ratios up to 2:1."""
    while True:
        height, width = (int(round(SIDE * 1.25 * 2.8 ** rng.uniform() ** 0.2)) for _ in range(2))
        if 0.5 <= height / width <= 2:
            return height, width


def class_list():
    """Return the names of each class of the masks and the class of each concept, (256,) uint8."""
    classes, ids = [], np.full(256, 255, np.uint8)
    for stuff in STUFF:
        ids[STUFF.index(stuff)] = len(classes)
        classes.append(NAMES[stuff])
    for kind, colour in THINGS:
        names = NAMES[kind]
        if kind in COLOURED_CLASSES:
            if colour not in COLOURED_CLASSES[kind]:
                continue
            names = [f"{colour} {name}" for name in names]
        if names not in classes:
            classes.append(names)
        ids[thing_label(kind, colour)] = classes.index(names)
    return classes, ids


def write_images(folder, seed, counts, layout):
    """Write images of both parts, masks of the test images, and classes.txt."""
    classes, ids = class_list()
    palette = np.random.default_rng(0).integers(40, 256, (256, 3), np.uint8).ravel().tolist()
    for part in counts:
        shutil.rmtree(folder / part, ignore_errors=True)
    for part in ("train", "test/images", "test/masks"):
        (folder / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("".join(", ".join(names) + "\n" for names in classes))
    for part, images in (("train", folder / "train"), ("test", folder / "test" / "images")):
        for index in tqdm(range(counts[part]), desc=f"{part} images"):
            rng = generator(seed, part, index)
            image, labels = render_scene(rng, *random_size(rng), *LAYOUTS[layout])
            Image.fromarray(image).save(images / f"{index:03d}.jpg", quality=90)
            if part == "test":
                mask = Image.fromarray(ids[labels])
                mask.putpalette(palette)
                mask.save(folder / "test" / "masks" / f"{index:03d}.png", optimize=True)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write")
    add("--seed", type=bounded(int, 0), default=0, help="of the images (%(default)s)")
    add("--train", type=bounded(int, 0), default=150, help="unlabelled images (%(default)s)")
    add("--test", type=bounded(int, 0), default=60, help="labelled images (%(default)s)")
    add("--layout", choices=list(LAYOUTS), default="calm",
        help="of the images: calm (the demo's), or busy, as tiny was trained on")
    args = parser.parse_args()
    write_images(args.out, args.seed, {"train": args.train, "test": args.test}, args.layout)


if __name__ == "__main__":
    main()
