"""The card that a student gets: what huggingface_hub reads in it, scores that are added, edits that
stay."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import distill
import evaluate_ovs
import extract_teacher
from data import model_card
from common import RunFailed
from data.model_card import base_model, write_card
from test_stages import ROOT, SMALL, run

RESULT = {"dataset": "secret/place/voc21", "method": "spar", "refine": "none",
          "upsampler": "bilinear", "short_side": 448, "area": None, "miou": 61.25,
          "pixel_accuracy": 88.0, "images": 1449, "seconds_per_image": 0.1, "per_class_iou": {}}


@pytest.fixture(scope="module")
def trained(micro, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("card")
    run(extract_teacher, "--images", photos, "--out", out / "teacher", "--backbone", micro, *SMALL)
    run(distill, "--teacher", out / "teacher", "--out", out / "spar", "--epochs", 1)
    return out / "spar"


@pytest.fixture
def student(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "spar"))


def test_the_hub_reads_it(student, micro):
    card = ModelCard.load(student / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "open_clip" and data["pipeline_tag"] == "image-segmentation"
    assert "open-vocabulary-segmentation" in data["tags"]
    assert not {"base_model", "license"} & data.keys()  # of random weights nothing is known
    for text in ("(loss.png)", "stride 24", "| epochs | 1 |", "create_model_and_transforms"):
        assert text in card.text
    assert "mIoU" not in card.text
    assert micro.removeprefix("local-dir:") not in str(card)  # nobody's folders
    (student / "again.md").write_text(str(card))
    assert ModelCard.load(student / "again.md").data.to_dict() == data


@pytest.mark.slow
def test_its_examples_run(student):
    """Each code block, with the folder in the place of the hub's name."""
    card = (student / "README.md").read_text()
    for block in card.split("```python\n")[1:]:
        code = block.split("```")[0].replace("hf-hub:ORG/NAME", f"local-dir:{student}")
        code = code.replace("photo.jpg", str(ROOT / "data/demo/test/images/000.jpg"))
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name, base, license_", [
    ("siglip2", "timm/ViT-B-16-SigLIP2-512", "apache-2.0"),
    ("openclip", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "mit"),
    ("ViT-B-16/laion2b_s34b_b88k", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "mit"),
    ("ViT-L-14/datacomp_xl_s13b_b90k", "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K", None),
    ("hf-hub:somebody/model", "somebody/model", None),
    ("tiny", None, "mit"),
    ("dinov3txt", None, "other"),
])
def test_base_model_and_licence(name, base, license_, student):
    assert base_model(name) == base
    settings = json.loads((student / "spar.json").read_text())
    settings["teacher"]["backbone"] = name
    (student / "spar.json").write_text(json.dumps(settings))
    assert write_card(student)
    data = ModelCard.load(student / "README.md").data
    assert (data.base_model, data.license) == (base, license_)


def test_scores_are_added_and_refreshed(student):
    window = RESULT | {"method": "sliding-window/24", "miou": 60.0}
    assert write_card(student, [RESULT, window])
    assert write_card(student, [RESULT | {"miou": 62.0}])
    assert write_card(student)  # as when distill.py is run again
    card = (student / "README.md").read_text()
    assert "| voc21 | 448 | spar | 62.0 | 88.0 | 1449 |" in card
    assert "| sliding-window/24 | 60.0 |" in card
    assert "61.2" not in card and "secret" not in card


@pytest.mark.parametrize("edit", [
    lambda text: text.replace("# A single-pass", "# My own single-pass"),
    lambda text: text[:text.index(model_card.MARK)],
    lambda text: text + "\nTrained in a hurry.\n",
    lambda text: "",
])
def test_an_edited_card_stays(edit, student):
    path = student / "README.md"
    path.write_text(edit(path.read_text()))
    before = path.read_bytes()
    assert not write_card(student, [RESULT])
    assert path.read_bytes() == before


@pytest.mark.slow
def test_evaluation_fills_it_in(student, monkeypatch, tmp_path):
    flags = ["--checkpoint", student, "--state", tmp_path / "state", "--dataset", "demo"]
    card = (student / "README.md").read_bytes()
    run(evaluate_ovs, *flags, "--limit", 1)
    assert (student / "README.md").read_bytes() == card  # not of a part
    monkeypatch.setattr(evaluate_ovs, "demo_pictures", lambda *_: demo(None, 1))
    run(evaluate_ovs, *flags)
    assert "| demo | the data's own | spar |" in (student / "README.md").read_text()


demo = evaluate_ovs.demo_pictures


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_costs_no_scores(student, monkeypatch, tmp_path, capsys):
    def refused(*_):
        raise RunFailed("README.md could not be written")
    monkeypatch.setattr(evaluate_ovs, "write_card", refused)
    monkeypatch.setattr(evaluate_ovs, "demo_pictures", lambda *_: demo(None, 1))
    run(evaluate_ovs, "--checkpoint", student, "--state", tmp_path / "state",
        "--json", tmp_path / "out.json")
    assert "the model card lacks these scores" in capsys.readouterr().out
    assert (tmp_path / "out.json").exists()


def test_cards_of_other_kinds_of_students(student):
    """TIPSv2's loads in transformers; an official one, converted, was not trained here."""
    settings = json.loads((student / "spar.json").read_text())
    (student / "open_clip_config.json").unlink()
    (student / "config.json").write_text("{}")
    settings["teacher"]["backbone"] = "tipsv2"
    (student / "spar.json").write_text(json.dumps(settings))
    assert write_card(student)
    data = ModelCard.load(student / "README.md").data.to_dict()
    assert (data["library_name"], data["license"]) == ("transformers", "apache-2.0")
    assert "AutoModel" in (student / "README.md").read_text()
    (student / "spar.json").write_text(json.dumps(
        {"teacher": {"backbone": "siglip2"}, "converted_from": "downloads/spar.ckpt"}))
    assert write_card(student)
    assert "Converted from spar.ckpt" in (student / "README.md").read_text()


@pytest.mark.parametrize("change", [{"backbone": 5}, {"window": 5}, {"images": []}])
def test_spoilt_settings_are_named(student, change):
    settings = json.loads((student / "spar.json").read_text())
    settings["teacher"] |= change
    (student / "spar.json").write_text(json.dumps(settings))
    with pytest.raises(RunFailed, match="spar.json"):
        write_card(student)


def test_names_that_are_no_text(student):
    settings = json.loads((student / "spar.json").read_text())
    settings["teacher"]["images"] = "folder \ud800"
    (student / "spar.json").write_text(json.dumps(settings))
    assert write_card(student) and write_card(student)
