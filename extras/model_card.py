"""The model card of a student: README.md in its folder, as huggingface.co shows it."""
from pathlib import Path

from common import BACKBONES, DINOV3, resolve_backbone
from data.files import UsageError, atomic_path, read_json, reading
from data.results import result_label

# of the weights that a student continues from; those of the other BACKBONES are apache-2.0
LICENSES = {"tiny": "mit", "openclip": "mit", "dinov3txt": "other"}
MARKER = "<!-- Generated. Remove this line, and the card will not be rewritten. -->"
SETTINGS = ("maps", "train_blocks", "train_only", "epochs", "steps", "batch_size", "lr",
            "schedule", "weight_decay", "random_scale", "seed", "precision", "loss_of", "loss")
LOADING = {  # by library; None is DINOv3's public code
    "open_clip": '''import open_clip
name = "hf-hub:ORG/NAME"  # or local-dir:PATH
model, _, preprocess = open_clip.create_model_and_transforms(name)
tokenizer = open_clip.get_tokenizer(name)''',
    "transformers": '''from transformers import AutoModel, AutoTokenizer  # 5.14 or newer
model = AutoModel.from_pretrained("ORG/NAME")
tokenizer = AutoTokenizer.from_pretrained("ORG/NAME")''',
    "timm": '''import safetensors.torch, timm  # the tower alone, without text
tower = timm.create_model("{architecture}", num_classes=0, dynamic_img_size=True)
weights = safetensors.torch.load_file("open_clip_model.safetensors")
tower.load_state_dict({{key.removeprefix("visual.trunk."): value for key, value in weights.items()
                       if key.startswith("visual.trunk.")}})''',
    None: f'''import safetensors.torch  # the model is the one of DINOv3's public code
model.load_state_dict(safetensors.torch.load_file("{DINOV3}"))''',
}


def write_card(folder, results=()):
    """Write a student's card with an evaluation's results. A card without its marker is kept."""
    path = Path(folder) / "README.md"
    with reading(path, "delete it, and it will be written again"):
        if path.exists() and MARKER not in path.read_text(encoding="utf-8", errors="replace"):
            return
    with reading(path.with_name("spar.json"), "run distill.py again"):
        text = card_text(path.parent) + (score_table(results) if results else "")
    with atomic_path(path) as temporary:  # file names may not be valid text
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def card_text(folder):
    """Return the card of a student's folder without its scores."""
    settings = read_json(folder / "spar.json", "run distill.py again")
    backbone = settings["teacher"]["backbone"]
    library = "transformers" if (folder / "config.json").is_file() else "open_clip"
    if (folder / DINOV3).is_file():
        library = None
    known = [key for key, identifier in BACKBONES.items() if backbone in (key, identifier)]
    metadata = {"library_name": library, "base_model": base_model(backbone),
                "license": LICENSES.get(known[0], "apache-2.0") if known else None,
                "license_name": None if library else "dinov3-license"}
    metadata = "\n".join(f"{key}: {value}" for key, value in metadata.items() if value)
    is_folder = Path(backbone.removeprefix("local-dir:")).exists()
    name = Path(backbone).name if is_folder else backbone  # without anyone's folders
    origin = how_made(settings, name)
    if (folder / "loss.png").is_file():
        origin += "\n\n![The loss over the steps](loss.png)"
    snippet = LOADING[library]
    if library == "open_clip":
        config = read_json(folder / "open_clip_config.json", "run distill.py again")
        architecture = config["model_cfg"]["vision_cfg"].get("timm_model_name")
        if architecture:
            snippet += "\n\n" + LOADING["timm"].format(architecture=architecture)
    return Path(__file__).with_suffix(".md").read_text().format(
        metadata=metadata, marker=MARKER, name=cell(name), loading=snippet,
        place="hf-hub:ORG/NAME" if library else "PATH", origin=origin)


def base_model(name):
    """Return the repository on huggingface.co of a backbone's weights, or None."""
    import open_clip
    try:
        architecture, tag = resolve_backbone(name)
    except UsageError:  # no model of open_clip
        return None
    if architecture.startswith("hf-hub:"):
        return architecture.removeprefix("hf-hub:")
    published = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    return "/".join(published.get("hf_hub", "").split("/")[:2]) or None


def how_made(settings, name):
    """Return what a student was distilled from, and how, as Markdown."""
    if "converted_from" in settings:
        checkpoint = cell(Path(settings["converted_from"]).name)
        return f"Converted from {checkpoint}, a checkpoint of the method's authors."
    teacher = settings["teacher"]
    facts = {"teacher": name, "images": Path(teacher.get("images") or "").name or None,
             **{key: teacher.get(key) for key in ("window", "stride")},
             **{key.replace("_", " "): settings.get(key) for key in SETTINGS},
             "frozen blocks": None}
    if settings.get("frozen_stride"):
        facts["frozen blocks"] = (f"see windows every {settings['frozen_stride']} pixels, as "
                                  "common.py runs them; plain open_clip does not")
    return table([["", ""], *(fact for fact in facts.items() if fact[1] is not None)])


def score_table(results):
    """Return the section of the card that shows results."""
    rows = [["data", "size", "method", "mIoU", "pixel accuracy", "images"]]
    rows += [[Path(result["dataset"]).name,
              result["short_side"] or result["area"] or "the data's own",
              result_label(result),
              f"{result['miou']:.1f}", f"{result['pixel_accuracy']:.1f}", result["images"]]
             for result in results]
    return f"\n## Scores, in percent\n\n{table(rows)}\n\n`spar` is this student.\n"


def table(rows):
    """Return rows, the first of which is the head, as a Markdown table."""
    lines = [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def cell(value):
    """Return a value as text that stays in one cell of a Markdown table."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
