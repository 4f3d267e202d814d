"""The model card of a student: README.md in its folder, as huggingface.co shows it."""
import contextlib
import hashlib
import json
from pathlib import Path

from common import (BACKBONES, DINOV3, RunFailed, WrongCall, atomic_path, fits, read_json,
                    resolve_backbone)
from data.scores import result_label, result_size

# of the weights that a student continues from, where they are known; it keeps the licence
LICENSES = {"tiny": "mit", "siglip2": "apache-2.0", "siglip2-naflex": "apache-2.0",
            "openclip": "mit", "dinov3txt": "other",
            **dict.fromkeys(["tipsv2", "tipsv2-b", "tipsv2-so", "tipsv2-g"], "apache-2.0")}
MARK = "\n<!-- generated: "  # what follows says by which text a card is known as unedited
KEY = ("dataset", "method", "refine", "upsampler", "short_side", "area")  # of one result
TEACHER = {"backbone": str, "window": list | None, "stride": int | None, "images": str | None,
           "torch": str | None, "open_clip": str | None}  # what of spar.json's stands in the card
KEPT = (*KEY, "miou", "pixel_accuracy", "images")


def write_card(folder, results=()):
    """Write a student's card from its spar.json, or refresh it with results of evaluate_ovs.py.
    A card that somebody has edited stays as it is. Returns whether it was written.

    results: as --json holds them; those of other runs stay in the card.
    """
    folder = Path(folder)
    path, known = folder / "README.md", {}
    if path.exists():
        known = generated(path.read_text(encoding="utf-8"))
        if known is None:
            return False
    results = [{key: each.get(key) for key in KEPT} | {"dataset": Path(each["dataset"]).name}
               for each in [*known.get("results", ()), *results]]
    rows = {tuple(each[key] for key in KEY): each for each in results}
    text = card_text(folder, list(rows.values()))
    text = text.encode(errors="backslashreplace").decode()  # names of files need not be text
    stamp = {"sha256": digest(text), "results": list(rows.values())}
    with atomic_path(path) as temporary:
        temporary.write_text(f"{text}{MARK}{json.dumps(stamp)} -->\n", encoding="utf-8")
    return True


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def generated(card):
    """What the last line of a card holds: {"sha256": ..., "results": [...]}; None where the text
    before it was edited, or was never generated."""
    text, _, stamp = card.rpartition(MARK)
    with contextlib.suppress(ValueError):
        stamp = json.loads(stamp.removesuffix(" -->\n"))
        if stamp["sha256"] == digest(text):
            return stamp
    return None


def base_model(name):
    """The repository on huggingface.co of a --backbone's weights; None where it is not known."""
    try:
        architecture, tag = resolve_backbone(name)
    except WrongCall:  # no model of open_clip
        return None
    import open_clip
    kind, _, place = architecture.partition(":")
    if kind == "hf-hub":
        return place
    published = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    return "/".join(published.get("hf_hub", "").split("/")[:2]) or None


def metadata(name, library):
    """The YAML front matter for a student of the backbone `name`, which a library loads."""
    from huggingface_hub import ModelCardData
    short = next((key for key, identifier in BACKBONES.items() if name in (key, identifier)), None)
    return ModelCardData(
        library_name=library, pipeline_tag="image-segmentation", license=LICENSES.get(short),
        license_name=None if library else "dinov3-license",
        base_model=base_model(name),
        tags=["spar", "clip", "vision-language", "open-vocabulary-segmentation",
              "zero-shot-segmentation", "dense-features"]).to_yaml()


LOADING = '''Plain open_clip loads it:

```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:ORG/NAME")  # or local-dir:PATH
tokenizer = open_clip.get_tokenizer("hf-hub:ORG/NAME")
```
'''
LOADING_TIPSV2 = '''Plain transformers, from 5.14 on, loads it:

```python
from transformers import AutoModel, AutoTokenizer
model, tokenizer = (each.from_pretrained("ORG/NAME") for each in (AutoModel, AutoTokenizer))
```
'''
LOADING_DINOV3 = f'''DINOv3's public code builds the model, under the DINOv3 licence:

```python
import safetensors.torch
model.load_state_dict(safetensors.torch.load_file("{DINOV3}"))
```
'''
SEGMENTING = '''Labels of a picture of any size, with the code that distilled it:

```python
from PIL import Image
from common import load_backbone, segment
backbone = load_backbone("{name}")
labels = segment(backbone, Image.open("photo.jpg"), ["sky", ["grass", "lawn"]])  # (H, W)
```
'''


def card_text(folder, rows):
    """Front matter and text of the card of a student's folder, without the last line."""
    settings = read_json(folder / "spar.json", "distill.py", {"teacher": dict})
    teacher = settings["teacher"]
    if not fits(teacher, TEACHER) or not fits(settings, {"converted_from": str | None}):
        raise RunFailed(f"{folder / 'spar.json'} does not tell what the student was made from")
    name = teacher["backbone"]
    library, loading = "open_clip", LOADING
    if (folder / DINOV3).is_file():
        library, loading = None, LOADING_DINOV3
    elif (folder / "config.json").is_file():
        library, loading = "transformers", LOADING_TIPSV2
    shown = Path(name).name if Path(name.removeprefix("local-dir:")).exists() else name
    parts = [
        f"---\n{metadata(name, library)}\n---\n",
        f"# A single-pass student of {shown}\n",
        "A vision transformer that gives dense features, comparable with text, of a whole picture "
        "of any size in one pass. It was distilled from sliding windows over the same pictures: "
        "SPAR (Kombol et al., CVPR 2026, https://arxiv.org/abs/2604.02252), in an independent "
        "implementation.\n",
        loading, SEGMENTING.replace("{name}", "hf-hub:ORG/NAME" if library else "PATH"),
        "## How it was made\n", how_made(settings, teacher, shown)]
    if (folder / "loss.png").is_file():
        parts.append("![The loss over the steps](loss.png)\n")
    if rows:
        parts += ["## Scores\n", score_table(rows)]
    return "\n".join(parts)


def how_made(settings, teacher, backbone):
    """A Markdown table of a student's settings."""
    if "converted_from" in settings:
        return f"Converted from {Path(settings['converted_from']).name}, of the method's authors.\n"
    window, pictures = teacher.get("window") or (), Path(teacher.get("images") or "a folder").name
    lines = {
        "teacher": f"{backbone}, " + (
            f"windows of {' x '.join(map(str, window))}, stride {teacher['stride']}"
            if teacher.get("stride") else "a single pass"),
        "maps distilled on": f"{settings.get('maps')} of pictures in {pictures}",
        "trained blocks": settings.get("train_blocks"), "trained part": settings.get("train_only"),
        **{key.replace("_", " "): settings.get(key) for key in (
            "epochs", "steps", "batch_size", "lr", "schedule", "weight_decay",
            "random_scale", "seed", "precision")},
        "loss of": settings.get("loss_of"), "last loss": settings.get("loss"),
        "torch": teacher.get("torch"), "open_clip": teacher.get("open_clip")}
    lines = {key: f"{value:.4g}" if isinstance(value, float) else value
             for key, value in lines.items() if value is not None}
    return "\n".join(["| | |", "| --- | --- |",
                      *(f"| {key} | {value} |" for key, value in lines.items())]) + "\n"


def score_table(rows):
    """A Markdown table of results; "spar" is the student."""
    lines = ["| data | size | method | mIoU | pixel accuracy | pictures |",
             "| --- | --- | --- | --- | --- | --- |"]
    for each in rows:
        size = result_size(each).asked or "the data's own"
        lines.append(f"| {each['dataset']} | {size} | {result_label(each)} | "
                     f"{each['miou']:.1f} | {each['pixel_accuracy']:.1f} | {each['images']} |")
    return "\n".join(lines) + "\n\n`spar` is this student; scores in percent.\n"
