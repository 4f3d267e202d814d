"""Make the demo: train the small backbone `tiny` from scratch on captioned scenes, and write the
pictures.

    python data/make_demo.py                  # all of data/demo/; about 15 minutes on a CPU core
    python data/make_demo.py --only pictures  # the pictures alone, 10 seconds

In: nothing but a seed. Out, in data/demo/: tiny/ (an open_clip folder), train/*.jpg (unlabelled),
test/images/*.jpg, test/masks/*.png (palette PNG, label ids in the order of classes.txt),
classes.txt.

tiny is open_clip's native CLIP with a ViT of 3 blocks and width 256, patch 16, at 128 x 128 pixels,
and a text tower of 2 layers. It sees crops at that resolution only, of scenes that are busier than
the pictures. Its loss is a dense term, patch features (MaskCLIP's value path, as the stages use
them) against the embeddings of the class names, and a tenth of an image-level one, SigLIP's sigmoid
loss between class token and caption. The first block does not attend: the output projection of its
attention is zero and stays so. What surrounds a patch thus enters where distilling the last two
blocks can reach it. Scenes, train and test pictures come from separate streams of random numbers.
"""
import argparse
import math
import multiprocessing
import shutil
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import DEMO, NativeViT, save_open_clip, write_json
from data.scenes import (BUSY, CALM, HELD_OUT, KINDS, NAMES, OWN_COLOUR, STUFF, THINGS, concept,
                         render_scene, thing_label)

SIDE = 128  # native resolution, pixels
CONFIG = {
    "model_cfg": {
        "embed_dim": 48,
        "vision_cfg": {"image_size": SIDE, "layers": 3, "width": 256, "head_width": 32,
                       "patch_size": 16},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 48, "heads": 4,
                     "layers": 2},
    },
    "preprocess_cfg": {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD,
                       "interpolation": "bicubic", "resize_mode": "shortest"},
}
CONCEPTS = len(STUFF) + len(THINGS)

# In the pictures balls come in these colours only, each a class of its own; "yellow ball" is a pair
# of words, and of sights, that the backbone never met.
COLOURED_CLASSES = {"ball": ["red", "blue", "yellow"]}


def evenly(coloured):
    """The (kind, colour) to draw things from, every kind as often as another.

    coloured: colours of those kinds that do not come in all.
    """
    pairs = []
    for kind in KINDS:
        colours = coloured.get(kind) or [colour for other, colour in THINGS if other == kind]
        pairs += [(kind, colour) for colour in colours] * (6 // len(colours))
    return pairs


TRAINED_THINGS = [thing for thing in evenly({}) if thing not in HELD_OUT]
PICTURED_THINGS = evenly(COLOURED_CLASSES)
LAYOUTS = {"calm": (PICTURED_THINGS, CALM), "busy": (TRAINED_THINGS, BUSY)}  # what pictures show
STREAMS = {"backbone": 0, "train": 1, "test": 2}


def generator(seed, stream, index):
    return np.random.default_rng((seed, STREAMS[stream], index))


# ---- the backbone --------------------------------------------------------------------------------

def backbone_scene(arguments):
    seed, index = arguments
    rng = generator(seed, "backbone", index)
    height, width = rng.integers(180, 400, 2)
    return render_scene(rng, int(height), int(width), TRAINED_THINGS, BUSY)


def draw_crops(pool, count, rng):
    """Random native-size crops, half of them mirrored.

    Returns images (B, 3, S, S) uint8 and concepts (B, S, S) int64.
    """
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    labels = np.empty((count, SIDE, SIDE), np.uint8)
    for k in range(count):
        picture, concepts = pool[rng.integers(len(pool))]
        top, left = (int(rng.integers(0, side - SIDE + 1)) for side in concepts.shape)
        step = rng.choice([-1, 1])
        images[k] = picture[top:top + SIDE, left:left + SIDE][:, ::step]
        labels[k] = concepts[top:top + SIDE, left:left + SIDE][:, ::step]
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels).long()


def any_name(entry, rng):
    """The entry's first name or, as often, any of its synonyms."""
    names = NAMES[entry]
    return names[rng.integers(len(names))] if rng.uniform() < 0.5 else names[0]


def draw_vocabulary(rng):
    """The class names of one step, which exclude each other: every stuff, and every kind either
    bare or in each of its colours.

    Returns the names (T) and, for each concept, the name it answers to: (CONCEPTS,) int64, -1 for
    the held-out ones.
    """
    names, target = [], torch.full((CONCEPTS,), -1)
    for stuff in STUFF:
        target[STUFF.index(stuff)] = len(names)
        names.append(any_name(stuff, rng))
    for kind in KINDS:
        bare, first = kind in OWN_COLOUR or rng.uniform() < 0.5, len(names)
        for thing in THINGS:
            if thing[0] != kind or thing in HELD_OUT:
                continue
            target[thing_label(*thing)] = first if bare else len(names)
            if not bare or len(names) == first:
                names.append(any_name(kind, rng) if bare else f"{thing[1]} {any_name(kind, rng)}")
    return names, target


def caption(labels, rng):
    """What a crop shows, up to four things and stuffs in random order: "a photo of a red ball and
    sand"."""
    present, counts = np.unique(labels, return_counts=True)
    present = rng.permutation(present[counts > 200])[:4]
    words = []
    for entry, colour in map(concept, present):
        name = any_name(entry, rng)
        coloured = colour is not None and rng.uniform() >= 0.3
        words.append(name if entry in STUFF else f"a {colour} {name}" if coloured else f"a {name}")
    return "a photo of " + " and ".join(words)


def initialise(visual, images):
    """Start from principal components of real patches, and from strong sines and cosines for the
    (learned) positions.

    From small random positions the backbone grows its patches until they drown the positions, and
    ignores these; from strong ones it uses them. The waves are short, so that positions still
    differ from patch to patch where they are stretched. The attention of the first block is
    switched off, here and for the whole training.
    """
    patches = F.unfold(images, 16, stride=16).transpose(1, 2).flatten(0, 1)  # (n, 768)
    patches = patches[torch.randperm(len(patches))[:12000]]
    _, scales, components = torch.linalg.svd(patches - patches.mean(0), full_matrices=False)
    width = visual.conv1.out_channels
    deviations = (scales[:width, None] / len(patches) ** 0.5).clamp(min=0.3)
    visual.conv1.weight.copy_((components[:width] / deviations * 0.5).view_as(visual.conv1.weight))
    side = visual.grid_size[0]
    # (side, C / 4), 2 to 0.2 radians a patch
    angles = torch.arange(side)[:, None] * 2.0 * 0.1 ** (torch.arange(width // 4) / (width // 4))
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
    visual.positional_embedding[1:] = 0.7 * torch.cat([rows, columns], 1)
    visual.positional_embedding[0] = 0
    attention = visual.transformer.resblocks[0].attn.requires_grad_(False)
    attention.out_proj.weight.zero_()
    attention.out_proj.bias.zero_()


def draw_pool(seed, scenes):
    """The scenes to take crops from, [(picture, concepts)], and how frequent each concept is in
    them, (CONCEPTS,) float32."""
    tasks = [(seed, k) for k in range(scenes)]
    with multiprocessing.Pool() as workers:
        drawn = workers.imap(backbone_scene, tasks, chunksize=8)
        pool = list(tqdm(drawn, total=scenes, desc="drawing scenes"))
    labels = np.concatenate([labels.ravel() for _, labels in pool[:400]])
    frequency = np.bincount(labels, minlength=CONCEPTS) + 1.0
    return pool, torch.from_numpy(frequency / frequency.sum()).float()


class Tiny(NamedTuple):
    """The backbone in training."""
    model: torch.nn.Module
    backbone: NativeViT  # the model's image tower, as the stages run it
    tokenizer: Callable
    bias: torch.nn.Parameter  # of the image-level loss; no part of the model


def new_tiny(folder, pool, rng):
    """tiny before its first step. Writes the configuration, which open_clip builds it from."""
    write_json(folder / "open_clip_config.json", CONFIG)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    backbone = NativeViT(model, CONFIG["preprocess_cfg"])
    with torch.no_grad():
        initialise(model.visual, backbone.normalise(draw_crops(pool, 200, rng)[0]))
        model.logit_scale.fill_(math.log(15))
    return Tiny(model, backbone, tokenizer, torch.nn.Parameter(torch.tensor(-4.0)))


def make_optimizers(tiny):
    """Muon for the matrices of the image tower's blocks, AdamW for the rest.

    The `peak` of each group is its learning rate at the top of the schedule. The projection of the
    patches is slower than the rest, so that it does not outgrow the positions.
    """
    visual = tiny.model.visual
    matrices = [p for p in visual.transformer.parameters() if p.ndim == 2 and p.requires_grad]
    projection = [visual.conv1.weight]
    apart = {id(p) for p in matrices + projection}
    others = [p for p in tiny.model.parameters() if p.requires_grad and id(p) not in apart]
    muon = torch.optim.Muon([{"params": matrices, "peak": 0.02}], weight_decay=0.01)
    adam = torch.optim.AdamW([{"params": others + [tiny.bias], "peak": 1e-3},
                              {"params": projection, "peak": 1e-4}],
                             betas=(0.9, 0.98), weight_decay=0.0)
    return muon, adam


def set_rates(optimizers, step, steps):
    """150 steps of linear warm-up, under a cosine from the peak down to a fiftieth of it."""
    rate = min(1, (step + 1) / 150) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate


class Batch(NamedTuple):
    """What one step looks at: B crops, T class names, B captions."""
    images: torch.Tensor  # (B, 3, S, S) uint8
    names: list  # most of them within a template
    captions: list
    targets: torch.Tensor  # the name that every fourth pixel answers to, (B, S / 4, S / 4) int64
    shares: torch.Tensor  # how frequent the names are in the pool, (T,)


def draw_batch(pool, frequency, count, rng):
    images, labels = draw_crops(pool, count, rng)
    names, target = draw_vocabulary(rng)
    known = target >= 0
    shares = torch.zeros(len(names)).index_add_(0, target[known], frequency[known])
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    names = [templates[rng.integers(len(templates))](name) if rng.uniform() < 0.7 else name
             for name in names]
    captions = [caption(crop.numpy(), rng) for crop in labels]
    targets = target[labels[:, 2::4, 2::4]]  # the pixel nearest to each of the upsampled logits
    return Batch(images, names, captions, targets, shares)


def image_features(tiny, images):
    """Features of the patches (B, h, w, D), by MaskCLIP's value path, and of the class token
    (B, D). The two share all blocks but the last."""
    backbone, visual = tiny.backbone, tiny.model.visual
    grid, last = (SIDE // 16, SIDE // 16), len(backbone.blocks) - 1
    images = backbone.normalise(images) * torch.empty(len(images), 1, 1, 1).uniform_(0.85, 1.15)
    # the plain attention kernel is the faster one for 65 tokens in bf16 on a CPU
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        tokens = backbone.run_blocks(backbone.embed(images), grid, stop=last)
        patches = backbone.project(backbone.run_block(last, tokens, grid), grid)
        pooled = visual.ln_post(visual.transformer.resblocks[last](tokens)[:, 0]) @ visual.proj
    return patches.float(), pooled.float()


def losses(tiny, batch):
    """The dense loss, the image-level loss, and the dense logits (B, T, S / 4, S / 4).

    Dense: which of the names is here? The logits of the patches are upsampled, as they are for a
    segmentation, and names weigh by the inverse square root of how frequent they are.
    Image-level: is this the caption of that crop? Asked of each of the B * B pairs by itself.
    """
    texts = tiny.model.encode_text(tiny.tokenizer(batch.names + batch.captions))
    texts = F.normalize(texts, dim=-1)
    names, captions = texts[:len(batch.names)], texts[len(batch.names):]
    patches, pooled = image_features(tiny, batch.images)
    scale = tiny.model.logit_scale.exp()

    logits = F.normalize(patches, dim=-1) @ names.T * scale  # (B, h, w, T)
    logits = F.interpolate(logits.permute(0, 3, 1, 2), scale_factor=4, mode="bilinear")
    weights = batch.shares ** -0.5
    dense = F.cross_entropy(logits, batch.targets, weight=weights / weights.mean())

    agreement = F.normalize(pooled, dim=-1) @ captions.T * scale + tiny.bias  # (B, B)
    own = 2 * torch.eye(len(agreement)) - 1  # 1 where crop and caption belong together, else -1
    image = -F.logsigmoid(agreement * own).sum() / len(agreement)
    return dense, image, logits


def fit(tiny, pool, frequency, steps, rng, batch_size=32):
    """Train, and leave the running average of the weights in the model."""
    muon, adam = make_optimizers(tiny)
    optimizers = [muon, adam]
    weights = list(tiny.model.parameters())
    average = [p.detach().clone() for p in weights]
    started = time.time()
    progress = tqdm(range(steps), desc="training tiny", mininterval=5)
    for step in progress:
        set_rates(optimizers, step, steps)
        batch = draw_batch(pool, frequency, batch_size, rng)
        dense, image, logits = losses(tiny, batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (dense + 0.1 * image).backward()
        torch.nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, max(0.002, 1 / (step + 2)))
        if step % 100 == 99:
            accuracy = (logits.argmax(1) == batch.targets).float().mean()
            progress.write(f"step {step + 1}: dense loss {dense:.3f}, image loss {image:.3f}, "
                           f"accuracy {accuracy:.3f}, {time.time() - started:.0f} s")
    with torch.no_grad():
        for parameter, mean in zip(weights, average):
            parameter.copy_(mean)


def train_backbone(folder, seed, steps, scenes):
    torch.manual_seed(seed)
    rng = generator(seed, "backbone", scenes)
    pool, frequency = draw_pool(seed, scenes)
    tiny = new_tiny(folder, pool, rng)
    fit(tiny, pool, frequency, steps, rng)
    # half the size; open_clip loads it into float32
    save_open_clip(tiny.model.half(), CONFIG["model_cfg"], folder)


# ---- the pictures --------------------------------------------------------------------------------

def picture_size(rng):
    """Sides of 1.25 to 3.5 times the native one, more of them large than small, with aspect ratios
    from 1:2 to 2:1."""
    while True:
        height, width = (int(round(SIDE * 1.25 * 2.8 ** rng.uniform() ** 0.2)) for _ in range(2))
        if 0.5 <= height / width <= 2:
            return height, width


def write_pictures(folder, seed, train, test, layout="calm"):
    classes, ids = [], np.full(256, 255, np.uint8)
    for stuff in STUFF:
        ids[STUFF.index(stuff)] = len(classes)
        classes.append(NAMES[stuff])
    for kind, colour in THINGS:
        if kind in COLOURED_CLASSES and colour in COLOURED_CLASSES[kind]:
            entry = [f"{colour} {name}" for name in NAMES[kind]]
        elif kind not in COLOURED_CLASSES:
            entry = NAMES[kind]
        else:
            continue
        if entry not in classes:
            classes.append(entry)
        ids[thing_label(kind, colour)] = classes.index(entry)
    palette = np.random.default_rng(0).integers(40, 256, (256, 3), np.uint8).ravel().tolist()

    for part in ("train", "test"):
        shutil.rmtree(folder / part, ignore_errors=True)
    for part in ("train", "test/images", "test/masks"):
        (folder / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("".join(", ".join(names) + "\n" for names in classes))
    for index in tqdm(range(train), desc="train pictures"):
        rng = generator(seed, "train", index)
        picture, _ = render_scene(rng, *picture_size(rng), *LAYOUTS[layout])
        Image.fromarray(picture).save(folder / "train" / f"{index:03d}.jpg", quality=90)
    for index in tqdm(range(test), desc="test pictures"):
        rng = generator(seed, "test", index)
        picture, labels = render_scene(rng, *picture_size(rng), *LAYOUTS[layout])
        Image.fromarray(picture).save(folder / "test" / "images" / f"{index:03d}.jpg", quality=90)
        mask = Image.fromarray(ids[labels])
        mask.putpalette(palette)
        mask.save(folder / "test" / "masks" / f"{index:03d}.png", optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEMO, help="folder to write (data/demo)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["backbone", "pictures"], help="make one of the two")
    parser.add_argument("--steps", type=int, default=2000,
                        help="training steps of the backbone (2000, 0.4 seconds each)")
    parser.add_argument("--scenes", type=int, default=2000,
                        help="scenes that it is trained on (2000, 0.7 GB of memory)")
    parser.add_argument("--train", type=int, default=150,
                        help="unlabelled pictures for distillation (150)")
    parser.add_argument("--test", type=int, default=60,
                        help="labelled pictures for evaluation (60)")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="calm",
                        help="the pictures: calm (the demo's), or busy, as tiny was trained on")
    args = parser.parse_args()
    if args.only != "backbone":
        write_pictures(args.out, args.seed, args.train, args.test, args.layout)
    if args.only != "pictures":
        train_backbone(args.out / "tiny", args.seed, args.steps, args.scenes)


if __name__ == "__main__":
    main()
