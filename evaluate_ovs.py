"""Stage 3: open-vocabulary segmentation with a student or a pre-trained backbone, scored or just shown (paper, section 4).

In: a student's folder (or a backbone's name), pictures, class names, and label masks if there are any. Out: a table of mIoU,
the same as JSON (--json), label maps, overlays and PCA pictures (--save-maps).

    python evaluate_ovs.py                                                     # the demo: pre-trained, sliding window, student
    python evaluate_ovs.py --images photo.jpg --classes "cat, grass | lawn"    # your own picture, your own words
    python evaluate_ovs.py --images pictures --masks masks --classes classes.txt --compare
"""
import argparse


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", help="a student: a folder that distill.py wrote (default: runs/spar)")
    add("--backbone", help="evaluate this pre-trained model instead: tiny, openclip, hf-hub:ORG/NAME, local-dir:PATH, ARCH/TAG")
    add("--random-init", action="store_true", help="the architecture without weights, for timing and tests")
    add("--inference", choices=["single-pass", "sliding-window"], help="(default: single-pass)")
    add("--stride", type=int, nargs="+", metavar="N", help="pixels between sliding windows; several give several rows (default: half the window, and 24)")
    add("--window", type=int, metavar="N", help="side of the sliding window in pixels (default: the size that the backbone was trained on)")
    add("--compare", action=argparse.BooleanOptionalAction, help="pre-trained single pass, pre-trained sliding window and student in one table (default: on for the demo)")
    add("--dataset", choices=["demo"], help="labelled pictures (default: demo, unless --images is given)")
    add("--images", metavar="PATH", help="own pictures: a folder, searched recursively, or one file")
    add("--masks", metavar="DIR", help="label masks of --images: PNG files of the same relative names, one channel of class numbers, 255 is ignored")
    add("--classes", metavar="FILE|NAMES", help="a file with one class a line and commas between synonyms, the first line is label 0; or \"cat, grass | lawn, sky\"")
    add("--short-side", type=int, metavar="N", help="resize pictures before inference so that the short side has N pixels (default: as they are)")
    add("--batch-size", type=int, default=60, help="windows per forward pass (%(default)s)")
    add("--limit", type=int, metavar="N", help="the first N pictures only")
    add("--json", metavar="FILE", help="write the results with every setting to FILE")
    add("--save-maps", metavar="DIR", help="write label maps, overlays with a legend and PCA pictures to DIR (own pictures without masks: runs/maps)")
    add("--workers", type=int, default=2, help="threads that read pictures ahead (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s: a GPU if there is one)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of the matrix products (%(default)s: fp16 on a GPU, fp32 on a CPU)")
    add("--seed", type=int, default=0, help="of random weights (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":  # before torch is imported, so that --help and a wrong flag answer at once
    ARGS = parse_args()

import colorsys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from common import (DEMO, IGNORE, RunFailed, WrongCall, atomic_path, check_window, command_line, dense_features, embed_texts,
                    label_map, list_images, load_backbone, prefetch, prepare, read_classes, read_image, read_json, resize_short_side,
                    single_pass_similarities, sliding_window_similarities, start_runtime, stitched_features, weights_hash, write_json)

SHEET_ROWS = 6  # pictures in the contact sheet


# ---- data: pictures, masks, classes -------------------------------------------------------------------------------------

@dataclass
class Dataset:
    name: str
    root: Path
    images: list  # paths relative to root
    masks: list | None  # paths of their label masks, or None
    classes: object


def open_dataset(args):
    """The pictures, masks and classes that the flags ask for. Raises WrongCall or RunFailed before anything long has run."""
    if args.images is None:
        for flag in ("masks", "classes"):
            if getattr(args, flag):
                raise WrongCall(f"--{flag} goes with --images")
        root, mask_root, classes, name = DEMO / "test" / "images", DEMO / "test" / "masks", read_classes(DEMO / "classes.txt"), "demo"
    else:
        if args.dataset:
            raise WrongCall("--dataset and --images exclude each other")
        if not args.classes:
            raise WrongCall("--images needs --classes, a file or names like \"cat, grass | lawn, sky\"")
        root, mask_root, classes, name = Path(args.images), args.masks and Path(args.masks), read_classes(args.classes), str(args.images)
    images = list_images(root)[:args.limit]
    root = root.parent if root.is_file() else root
    if mask_root is None:
        return Dataset(name, root, images, None, classes)
    masks = [mask_root / Path(image).with_suffix(".png") for image in images]
    for image, mask in zip(images, masks):
        if not mask.is_file():
            raise RunFailed(f"{root / image} has no mask: {mask} does not exist")
        if masks.count(mask) > 1:
            raise RunFailed(f"{mask} would be the mask of several pictures: {', '.join(i for i, m in zip(images, masks) if m == mask)}")
    return Dataset(name, root, images, masks, classes)


def read_mask(path, size, count):
    """A label mask as (H, W) int64, checked against its picture's size and the number of classes. Raises RunFailed."""
    try:
        with Image.open(path) as picture:
            labels = np.asarray(picture)
    except OSError as error:
        raise RunFailed(f"{path} cannot be read as a mask: {error}") from None
    if labels.ndim != 2:
        raise RunFailed(f"{path} has {labels.shape[2]} channels; a mask has one, of class numbers")
    if labels.shape != tuple(size):
        raise RunFailed(f"{path} is {labels.shape[0]} x {labels.shape[1]} pixels (height x width), but its picture {size[0]} x {size[1]}")
    wrong = np.unique(labels[(labels >= count) & (labels != IGNORE)])
    if len(wrong):
        raise RunFailed(f"{path} holds labels {', '.join(map(str, wrong[:5]))}; with {count} classes they go from 0 to {count - 1}, and {IGNORE} is ignored")
    return torch.from_numpy(labels.astype(np.int64))


def load_sample(dataset, index):
    """(picture (3, H, W) uint8, mask (H, W) int64 or None)."""
    image = read_image(dataset.root / dataset.images[index])
    return image, None if dataset.masks is None else read_mask(dataset.masks[index], image.shape[-2:], len(dataset.classes))


# ---- methods -----------------------------------------------------------------------------------------------------------

@dataclass
class Method:
    """One row of the table: a backbone, and how it looks at a picture (stride 0 is the single pass)."""
    name: str
    title: str
    backbone: object
    texts: torch.Tensor
    stride: int = 0

    def predict(self, image, size, classes, args, runtime):
        """(3, H, W) uint8 -> class of each pixel, (*size) int64."""
        if self.stride == 0:
            similarities = single_pass_similarities(self.backbone, image, self.texts, size, runtime.autocast)
        else:
            similarities = sliding_window_similarities(self.backbone, image, self.texts, size, window_of(self.backbone, args), self.stride,
                                                       args.batch_size, runtime.autocast)
        return label_map(similarities, classes).cpu()

    def features(self, image, args, runtime):
        """The features behind it, for a picture of their principal components: (h, w, D)."""
        if self.stride == 0:
            return dense_features(self.backbone, image, runtime.autocast)
        with torch.no_grad():
            return stitched_features(self.backbone, [prepare(self.backbone, image)], window_of(self.backbone, args), self.stride, args.batch_size,
                                     runtime.autocast)[0]


def window_of(backbone, args):
    return (args.window, args.window) if args.window else backbone.window


def open_methods(args, classes, runtime):
    """The rows of the table, from the flags."""
    compare = args.compare if args.compare is not None else not (args.images or args.inference or args.backbone or args.checkpoint or args.stride)
    pretrained = student = None
    if args.backbone and args.checkpoint:
        raise WrongCall("--backbone evaluates a pre-trained model and --checkpoint a student; give one of them")
    if args.backbone and compare:
        raise WrongCall("--compare needs a student; give --checkpoint instead of --backbone, which follows from it")
    if args.inference and compare:
        raise WrongCall("--compare shows both kinds of inference; leave --inference away")
    if args.stride and not compare and args.inference != "sliding-window":
        raise WrongCall("--stride goes with --inference sliding-window or --compare")
    if args.backbone:
        pretrained = load_backbone(args.backbone, args.random_init, runtime.device, text=True)
    else:
        folder = Path(args.checkpoint or "runs/spar")
        if not (folder / "open_clip_model.safetensors").is_file():
            raise RunFailed(f"{folder} holds no student; distill.py writes one, or give --backbone for a pre-trained model")
        student = load_backbone(f"local-dir:{folder}", device=runtime.device, text=True)
        if compare:
            teacher = read_json(folder / "spar.json", "distill.py")["teacher"]
            pretrained = load_backbone(teacher["backbone"], teacher["random_init"], runtime.device)
    model = pretrained or student
    strides = args.stride or [min(model.window) // 2, 24]
    if compare or args.inference == "sliding-window":
        for stride in strides:
            check_window(window_of(model, args), stride, model.patch)
    texts = embed_texts(model, classes.flat)  # the student's text tower is the pre-trained one
    sliding = [Method(f"sliding-window/{stride}", f"window, stride {stride}", model, texts, stride) for stride in strides]
    if compare:
        return [Method("single-pass", "single pass", pretrained, texts), *sliding, Method("spar", "SPAR, single pass", student, texts)]
    if args.inference == "sliding-window":
        return sliding
    return [Method("spar", "SPAR, single pass", student, texts) if student else Method("single-pass", "single pass", pretrained, texts)]


# ---- scores ----------------------------------------------------------------------------------------------------------

def confusion_matrix(labels, predictions, count):
    """Pixels by label (rows) and prediction (columns): (count, count) int64. Label 255 counts nowhere."""
    kept = labels != IGNORE
    return torch.bincount(labels[kept] * count + predictions[kept], minlength=count * count).view(count, count)


def scores(confusion):
    """(IoU of each class in percent, nan for a class in neither labels nor predictions; their mean; pixel accuracy in percent)."""
    confusion = confusion.double()
    hits = confusion.diagonal()
    iou = 100 * hits / (confusion.sum(0) + confusion.sum(1) - hits)
    return iou, iou.nanmean().item(), (100 * hits.sum() / confusion.sum()).item()


def print_table(methods, classes, results):
    width = max(len("pixel accuracy"), *map(len, classes.titles)) + 2
    print("\n" + " " * width + "".join(f"{name:>20}" for name in results))
    for index, title in enumerate(classes.titles):
        print(f"{title:<{width}}" + "".join(f"{'-' if value != value else f'{value:.1f}':>20}" for value in (row["iou"][index].item() for row in results.values())))
    for title, key, digits in (("mIoU", "miou", 1), ("pixel accuracy", "accuracy", 1), ("seconds/image", "seconds", 3)):
        print(f"{title:<{width}}" + "".join(f"{row[key]:>20.{digits}f}" for row in results.values()))


# ---- pictures of the results ---------------------------------------------------------------------------------------------

def palette(count):
    """Distinct colours: (count, 3) uint8, by golden-ratio steps around the hue circle."""
    return np.array([[round(255 * c) for c in colorsys.hsv_to_rgb(k * 0.618034 % 1, (0.85, 0.6, 0.45)[k % 3], (0.95, 0.75, 0.55)[k // 3 % 3])]
                     for k in range(count)], np.uint8)


def palette_picture(labels, count):
    picture = Image.fromarray(labels.numpy().astype(np.uint8))
    colours = np.zeros((256, 3), np.uint8)
    colours[:count] = palette(count)
    picture.putpalette(colours.ravel().tolist())
    return picture


def overlay_picture(image, labels, classes):
    """The picture under its class colours, with a legend of the classes and their share of the area."""
    colours = palette(len(classes))
    blend = (0.45 * image.permute(1, 2, 0).numpy() + 0.55 * colours[labels.numpy()]).astype(np.uint8)
    shares = torch.bincount(labels.flatten(), minlength=len(classes)) / labels.numel()
    shown = [k for k in shares.argsort(descending=True).tolist() if shares[k] >= 0.001]
    line, font = 18, ImageFont.load_default(13)
    sheet = Image.new("RGB", (blend.shape[1] + 190, max(blend.shape[0], line * len(shown) + 8)), "white")
    sheet.paste(Image.fromarray(blend))
    draw = ImageDraw.Draw(sheet)
    for row, k in enumerate(shown):
        left, top = blend.shape[1] + 10, 6 + row * line
        draw.rectangle([left, top, left + 12, top + 12], fill=tuple(colours[k].tolist()))
        draw.text((left + 20, top - 2), f"{classes.titles[k]}  {100 * shares[k]:.1f} %", fill="black", font=font)
    return sheet


def pca_picture(features, size):
    """The first three principal components of L2-normalised features as red, green and blue: (h, w, D) -> a picture of size (H, W)."""
    flat = torch.nn.functional.normalize(features.flatten(0, 1).float().cpu(), dim=-1)
    _, _, components = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    components = components[:3] * torch.sign(components[:3].sum(1, keepdim=True))
    scores = (flat - flat.mean(0)) @ components.T  # (h * w, 3)
    low, high = scores.quantile(0.02, 0), scores.quantile(0.98, 0)
    pixels = ((scores - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).view(*features.shape[:2], -1)
    return Image.fromarray((255 * pixels).byte().numpy()).resize((size[1], size[0]), Image.BILINEAR)


def contact_sheet(rows, titles, classes, height=150):
    """Pictures side by side: rows of ((3, H, W) uint8, then label maps (H, W)) under column titles, with a legend below."""
    colours, font, gap = palette(len(classes)), ImageFont.load_default(13), 4
    strips = []
    for image, *label_maps in rows:
        cells = [image.permute(1, 2, 0).numpy()] + [(0.25 * image.permute(1, 2, 0).numpy() + 0.75 * colours[labels.clamp(max=len(classes) - 1).numpy()]).astype(np.uint8)
                                                    for labels in label_maps]
        strips.append([Image.fromarray(cell).resize((max(1, round(height * cell.shape[1] / cell.shape[0])), height), Image.BILINEAR) for cell in cells])
    width = max(150, *(strip[0].width for strip in strips))
    shown = sorted({k for _, *label_maps in rows for labels in label_maps for k in labels.unique().tolist() if k < len(classes)})
    per_line = max(1, (width + gap) * len(titles) // 130)
    sheet = Image.new("RGB", ((width + gap) * len(titles), 22 + (height + gap) * len(strips) + 18 * -(-len(shown) // per_line) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((column * (width + gap) + 2, 3), title, fill="black", font=font)
        for row, strip in enumerate(strips):
            sheet.paste(strip[column], (column * (width + gap), 22 + row * (height + gap)))
    for position, k in enumerate(shown):
        left, top = position % per_line * 130 + 2, 24 + (height + gap) * len(strips) + position // per_line * 18
        draw.rectangle([left, top, left + 12, top + 12], fill=tuple(colours[k].tolist()))
        draw.text((left + 18, top - 2), classes.titles[k], fill="black", font=font)
    return sheet


def save_picture(picture, path):
    with atomic_path(path) as temporary:
        picture.save(temporary)


def save_maps(folder, image_name, image, labels, features, classes):
    """NAME.labels.png (palette PNG of class numbers), NAME.overlay.png and NAME.pca.png."""
    save_picture(palette_picture(labels, len(classes)), folder / f"{image_name}.labels.png")
    save_picture(overlay_picture(image, labels, classes), folder / f"{image_name}.overlay.png")
    save_picture(pca_picture(features, labels.shape), folder / f"{image_name}.pca.png")


# ---- the loop --------------------------------------------------------------------------------------------------------

def main(args):
    dataset = open_dataset(args)
    if dataset.masks is None and args.json:
        raise WrongCall("--json holds scores, which need --masks")
    runtime = start_runtime(args.device, args.precision, args.seed)
    classes, count = dataset.classes, len(dataset.classes)
    methods = open_methods(args, classes, runtime)
    maps = Path(args.save_maps) if args.save_maps else Path("runs/maps") if dataset.masks is None else None
    print(f"{dataset.name}: {len(dataset.images)} pictures, {count} classes ({len(classes.flat)} names), "
          f"{f'short side {args.short_side}' if args.short_side else 'at their own size'}")

    confusions = {method.name: torch.zeros(count, count, dtype=torch.int64) for method in methods}
    seconds = dict.fromkeys(confusions, 0.0)
    sheet = []  # rows of the contact sheet: the first pictures, their labels, and every method's
    progress = tqdm(total=len(dataset.images) * len(methods), desc="evaluate", unit="map")
    for index, (image, labels) in enumerate(prefetch(lambda k: load_sample(dataset, k), range(len(dataset.images)), args.workers)):
        size = image.shape[-2:]
        resized = resize_short_side(image, args.short_side) if args.short_side else image
        if len(sheet) < SHEET_ROWS:
            sheet.append([image] if labels is None else [image, labels])
        for method in methods:
            if index == 0:
                method.predict(resized, size, classes, args, runtime)  # warm-up, not timed
            started = time.perf_counter()
            predictions = method.predict(resized, size, classes, args, runtime)  # ends on the CPU, so the device has finished
            seconds[method.name] += time.perf_counter() - started
            if index < SHEET_ROWS:
                sheet[index].append(predictions)
            if labels is not None:
                confusions[method.name] += confusion_matrix(labels, predictions, count)
            if maps:
                folder = maps / method.name.replace("/", "-") if len(methods) > 1 else maps
                save_maps(folder, dataset.images[index], image, predictions, method.features(resized, args, runtime), classes)
                if dataset.masks is None:
                    shares = torch.bincount(predictions.flatten(), minlength=count) / predictions.numel()
                    progress.write(f"{dataset.images[index]} ({method.name}): " + ", ".join(
                        f"{classes.titles[k]} {100 * shares[k]:.1f} %" for k in shares.argsort(descending=True).tolist() if shares[k] > 0))
            progress.update()
    progress.close()

    if dataset.masks is not None:
        results = {}
        for method in methods:
            iou, miou, accuracy = scores(confusions[method.name])
            results[method.name] = {"iou": iou, "miou": miou, "accuracy": accuracy, "seconds": seconds[method.name] / len(dataset.images)}
        print_table(methods, classes, results)
        if args.json:
            write_json(args.json, {
                "dataset": dataset.name,
                "results": [{"method": name, "miou": row["miou"], "pixel_accuracy": row["accuracy"], "images": len(dataset.images),
                             "seconds_per_image": row["seconds"],
                             "per_class_iou": {title: None if value != value else value for title, value in zip(classes.titles, row["iou"].tolist())}}
                            for name, row in results.items()],
                "settings": {"checkpoint": args.checkpoint or (None if args.backbone else "runs/spar"), "backbone": args.backbone,
                             "weights": {method.name: weights_hash(method.backbone) for method in methods}, "window": list(window_of(methods[0].backbone, args)),
                             "short_side": args.short_side, "limit": args.limit, "upsampler": "bilinear", "classes": classes.names, "templates": 80,
                             "device": str(runtime.device), "precision": runtime.precision, "torch": torch.__version__, "open_clip": open_clip.__version__},
            })
            print(f"results in {args.json}")
    if maps:
        titles = ["picture"] + ["labels"] * (dataset.masks is not None) + [method.title for method in methods]
        save_picture(contact_sheet(sheet, titles, classes), maps / "sheet.png")
        print(f"maps in {maps}, the first {len(sheet)} side by side in {maps / 'sheet.png'}")


if __name__ == "__main__":
    command_line(main, ARGS)
