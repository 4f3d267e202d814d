"""The card that a student gets: what huggingface_hub reads in it, scores that are added, cards that
were edited."""
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import evaluate_ovs
from data.files import RunError
from conftest import ROOT, run
from extras.model_card import MARKER, base_model, write_card

RESULT = {"dataset": "secret/place/voc21", "method": "spar", "refine": "none",
          "upsampler": "bilinear", "short_side": 448, "area": None, "miou": 61.25,
          "pixel_accuracy": 88.0, "images": 1449, "seconds_per_image": 0.1, "per_class_iou": {}}


@pytest.fixture
def folder(student, tmp_path):
    """A student's folder that a test may change."""
    return Path(shutil.copytree(student, tmp_path / "spar"))


def change_settings(folder, teacher=(), **settings):
    path = folder / "spar.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | settings | {"teacher": before["teacher"] | dict(teacher)}))


def test_the_hub_reads_it(folder, micro):
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "open_clip" and data["pipeline_tag"] == "image-segmentation"
    assert "open-vocabulary-segmentation" in data["tags"]
    assert not {"base_model", "license"} & data.keys()  # of random weights nothing is known
    for text in ("(loss.png)", "| stride | 24 |", "| epochs | 3 |", "open_clip.create_model"):
        assert text in card.text
    assert "mIoU" not in card.text
    assert micro.removeprefix("local-dir:") not in str(card)  # nobody's folders


@pytest.mark.slow
def test_its_examples_run(folder, monkeypatch):
    """Each code block, with the folder in place of the hub's name."""
    monkeypatch.chdir(ROOT)
    for block in (folder / "README.md").read_text().split("```python\n")[1:]:
        code = block.split("```")[0].replace("hf-hub:ORG/NAME", f"local-dir:{folder}")
        code = code.replace("photo.jpg", str(ROOT / "data/demo/test/images/000.jpg"))
        exec(code, {})


@pytest.mark.parametrize("name, base, license_", [
    ("siglip2", "timm/ViT-B-16-SigLIP2-512", "apache-2.0"),
    ("openclip", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "mit"),
    ("ViT-B-16/laion2b_s34b_b88k", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "mit"),
    ("ViT-L-14/datacomp_xl_s13b_b90k", "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K", None),
    ("hf-hub:somebody/model", "somebody/model", None),
    ("tiny", None, "mit"),
    ("dinov3txt", None, "other"),
])
def test_the_card_names_base_model_and_licence(name, base, license_, folder):
    assert base_model(name) == base
    change_settings(folder, {"backbone": name})
    write_card(folder)
    data = ModelCard.load(folder / "README.md").data
    assert (data.base_model, data.license) == (base, license_)


def test_the_card_has_the_scores_of_the_last_evaluation(folder):
    window = RESULT | {"method": "sliding-window/24", "miou": 60.0}
    write_card(folder, [RESULT])
    write_card(folder, [RESULT | {"miou": 62.0}, window])
    card = (folder / "README.md").read_text()
    assert "| voc21 | 448 | spar | 62.0 | 88.0 | 1449 |" in card
    assert "| sliding-window/24 | 60.0 |" in card
    assert "61.2" not in card and "secret" not in card
    write_card(folder)  # as when distill.py is run again
    assert "Scores" not in (folder / "README.md").read_text()


def test_a_card_without_its_marker_is_not_touched(folder):
    path = folder / "README.md"
    lines = path.read_text().splitlines()
    for text in ("", "\n".join(line for line in lines if not line.startswith(MARKER))):
        path.write_text(text)
        write_card(folder, [RESULT])
        assert path.read_text() == text


@pytest.mark.slow
def test_evaluation_adds_scores_of_a_whole_data_set(folder, photos, masks, tmp_path):
    flags = ["--checkpoint", folder, "--state", tmp_path / "state", "--images", photos,
             "--masks", masks, "--classes", "cat, dog, sky"]
    path = folder / "README.md"
    card = path.read_bytes()
    run(evaluate_ovs, *flags, "--limit", 1)
    assert path.read_bytes() == card
    run(evaluate_ovs, *flags)
    assert f"| {photos.name} | the data's own | spar |" in path.read_text()
    path.unlink()
    path.mkdir()  # cannot be written
    run(evaluate_ovs, *flags, "--json", tmp_path / "out.json")
    assert (tmp_path / "out.json").exists()


def test_cards_say_how_other_kinds_of_students_load(folder):
    """TIPSv2's loads in transformers; an official one, converted, was not trained here."""
    (folder / "open_clip_config.json").unlink()
    (folder / "config.json").write_text("{}")
    change_settings(folder, {"backbone": "tipsv2"})
    write_card(folder)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and "AutoModel" in card.text
    change_settings(folder, converted_from="downloads/spar.ckpt")
    write_card(folder)
    assert "Converted from spar.ckpt" in (folder / "README.md").read_text()


@pytest.mark.parametrize("damage", [{"backbone": 5}, {"images": [5]}])
def test_damaged_settings_are_named(folder, damage):
    change_settings(folder, damage)
    with pytest.raises(RunError, match="spar.json"):
        write_card(folder)


def test_odd_names_leave_the_card_readable(folder):
    """Surrogates, line breaks, the end of a comment, the border of a table's cell."""
    change_settings(folder, {"images": "photos/a\nb --> | \ud800"})
    odd = RESULT | {"dataset": "photos/c\n--> {d} | \udc80"}
    write_card(folder, [odd])
    card = ModelCard.load(folder / "README.md").text
    assert card.count("| 448 | spar | 61.2 | 88.0 | 1449 |") == 1
    assert len([line for line in card.splitlines() if line.startswith("<!--")]) == 1
