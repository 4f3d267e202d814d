"""The six benchmarks on small data in their true layouts: readers, label ids, thresholds, checks,
resuming, sharing out, plots, sheets."""
import csv
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate_ovs
from common import (RunFailed, WrongCall, bilinear_strips, dense_features, label_strips,
                    load_backbone, read_json_lines)
from data.benchmarks import (BENCHMARKS, Classes, Dataset, Rule, Size, benchmark_classes,
                             benchmark_rule, label_table, read_classes, read_label_ids, to_classes)
from evaluate_ovs import Method, Row, choose_rule, label_map

ROOT = Path(__file__).resolve().parent.parent
SIZES = [(70, 100), (90, 64), (64, 64)]


def run(*flags):
    evaluate_ovs.main(evaluate_ovs.parse_args([str(flag) for flag in flags]))


def save(array, path, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    if mode == "P":  # as VOC stores its labels
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tolist())
    picture.save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three pictures of each benchmark, with every label id that its files may hold."""
    root, rng = tmp_path_factory.mktemp("benchmarks"), np.random.default_rng(0)

    def labels(size, ids, border=None):
        coarse = rng.choice(np.array(ids, np.uint8), (6, 6))
        grown = np.array(Image.fromarray(coarse).resize(size[::-1], Image.NEAREST))
        if border is not None:
            grown[::17] = border
        return grown

    def photo(size):
        return np.array(Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize(
            size[::-1], Image.BICUBIC))

    for k, size in enumerate(SIZES):
        for year, kind, listing, ids in (
                ("2012", "SegmentationClass", "Segmentation", range(21)),
                ("2010", "SegmentationClassContext", "SegmentationContext", range(60))):
            folder = root / "VOCdevkit" / f"VOC{year}"
            save(photo(size), folder / "JPEGImages" / f"2007_00{k}.jpg")
            save(photo(size), folder / "JPEGImages" / f"2008_train_{k}.jpg")  # not in the list
            save(labels(size, ids, 255 if year == "2012" else None),
                 folder / kind / f"2007_00{k}.png", "P")
            (folder / "ImageSets" / listing).mkdir(parents=True, exist_ok=True)
            (folder / "ImageSets" / listing / "val.txt").write_text(
                "2007_000\n2007_001\n2007_002\n")
        save(photo(size), root / f"ADEChallengeData2016/images/validation/ADE_val_0000000{k}.jpg")
        save(labels(size, range(151)),
             root / f"ADEChallengeData2016/annotations/validation/ADE_val_0000000{k}.png")
        city, stem = root / "cityscapes", f"lindau/lindau_00000{k}_000019"
        save(photo(size), city / f"leftImg8bit/val/{stem}_leftImg8bit.png")
        save(labels(size, range(34)), city / f"gtFine/val/{stem}_gtFine_labelIds.png")
    return root


def known_mapping(name):
    """Label id -> class, written out a second time."""
    if name in ("voc21", "context60"):
        return {k: k for k in range(60)}
    if name in ("voc20", "context59", "ade20k"):
        return {k: k - 1 for k in range(1, 151)}
    # road, sidewalk, building, wall, fence, pole, light, sign, ...
    order = "7 8 11 12 13 17 19 20 21 22 23 24 25 26 27 28 31 32 33".split()
    return {int(value): k for k, value in enumerate(order)}


@pytest.fixture
def quick_texts(monkeypatch):
    """Text embeddings from a hash of the name instead of a text tower: 150 classes have 12,000
    prompts."""
    def embed(backbone, names, templates):
        return F.normalize(torch.stack([
            torch.randn(backbone.dim,
                        generator=torch.Generator().manual_seed(sum(map(ord, name))))
            for name in names]), dim=-1)
    monkeypatch.setattr(evaluate_ovs, "embed_texts", embed)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_reader_and_miou(name, root, micro, tmp_path, quick_texts):
    run("--backbone", micro, "--dataset", name, "--data-root", root, "--short-side", 64,
        "--json", tmp_path / "out.json", "--save-maps", tmp_path / "maps", "--state", tmp_path)
    report = json.loads((tmp_path / "out.json").read_text())
    row, classes = report["results"][0], benchmark_classes(name)
    folder = {"voc": "VOCdevkit/VOC2012/SegmentationClass",
              "con": "VOCdevkit/VOC2010/SegmentationClassContext",
              "ade": "ADEChallengeData2016/annotations/validation",
              "cit": "cityscapes/gtFine/val"}[name[:3]]
    mapping, hits, either = known_mapping(name), np.zeros(len(classes)), np.zeros(len(classes))
    masks = sorted((root / folder).rglob("*.png"))
    predictions = sorted((tmp_path / "maps").rglob("*.labels.png"))
    assert len(masks) == len(predictions) == 3
    for mask, prediction in zip(masks, predictions):
        for label, predicted in zip(np.array(Image.open(mask)).ravel().tolist(),
                                    np.array(Image.open(prediction)).ravel().tolist()):
            if label in mapping:
                wanted = mapping[label]
                hits[wanted] += wanted == predicted
                either[wanted] += 1
                either[predicted] += wanted != predicted
    iou = 100 * hits[either > 0] / either[either > 0]
    rule = benchmark_rule(name, micro)
    assert ((row["logit_scale"], row["prob_threshold"], row["area_threshold"])
            == (rule.logit_scale, rule.threshold, rule.area_threshold))
    assert (row["miou"] == pytest.approx(iou.mean()) and row["images"] == 3
            and row["dataset"] == report["dataset"] == name)
    assert (list(row["per_class_iou"]) == classes.titles
            and classes.titles[0] == {
                "voc21": "background", "context60": "background", "ade20k": "wall",
                "cityscapes": "road"}.get(name, "aeroplane"))
    assert {"torch", "open_clip", "timm", "weights", "names_sha256", "resize", "templates",
            "short_side", "precision"} <= report["settings"].keys()
    assert not list(tmp_path.glob("*.jsonl"))  # nothing is left of a finished run


def test_all_six_in_one_table(root, micro, tmp_path, capsys, quick_texts):
    run("--backbone", micro, "--dataset", "all", "--data-root", root, "--short-side", 64,
        "--json", tmp_path / "all.json", "--plot", tmp_path / "all.png", "--state", tmp_path)
    rows = json.loads((tmp_path / "all.json").read_text())["results"]
    assert [row["dataset"] for row in rows] == list(BENCHMARKS)
    table = capsys.readouterr().out.splitlines()
    last = next(line for line in reversed(table) if line.startswith("single-pass"))
    assert (float(last.split()[-1])
            == pytest.approx(np.mean([row["miou"] for row in rows]), abs=0.06))


def test_cityscapes_prefers_train_ids(root, micro, tmp_path, quick_texts):
    shutil.copytree(root / "cityscapes", tmp_path / "cityscapes")
    for path in (tmp_path / "cityscapes").rglob("*_labelIds.png"):
        ids = np.array(Image.open(path))
        train = np.full_like(ids, 255)
        for value, k in known_mapping("cityscapes").items():
            train[ids == value] = k
        Image.fromarray(train).save(str(path).replace("_labelIds", "_labelTrainIds"))
    for data_root, out in ((root, "raw.json"), (tmp_path, "train.json")):
        run("--backbone", micro, "--dataset", "cityscapes", "--data-root", data_root,
            "--short-side", 64, "--json", tmp_path / out, "--state", tmp_path)
    raw, train = (json.loads((tmp_path / out).read_text())["results"][0]
                  for out in ("raw.json", "train.json"))
    assert (raw["per_class_iou"] == train["per_class_iou"]
            and raw["pixel_accuracy"] == train["pixel_accuracy"])


# ---- the protocol, literally ---------------------------------------------------------------------

def literal(similarities, classes, rule):
    """protocol.md step by step in float64: softmax over all names, best synonym, area threshold,
    argmax, probability threshold."""
    logits = rule.logit_scale * similarities.double()  # (N, H, W)
    probabilities = torch.exp(logits - logits.amax(0)) / torch.exp(logits - logits.amax(0)).sum(0)
    per_class, first = [], 0
    for synonyms in classes.names:
        per_class.append(probabilities[first:first + len(synonyms)].amax(0))
        first += len(synonyms)
    per_class = torch.stack(per_class)
    if rule.area_threshold:
        winners = per_class.argmax(0)
        foreground = (winners > 0).sum()
        for k in range(1, len(per_class)):
            if (winners == k).sum() <= rule.area_threshold * foreground:
                per_class[k] = 0
    labels = per_class.argmax(0)
    labels[per_class.amax(0) < rule.threshold] = 0
    return labels


SETTINGS = [(name, backbone) for name in BENCHMARKS for backbone in ("tiny", "openclip")]


@pytest.mark.parametrize("name, backbone", SETTINGS)
def test_thresholds_equal_the_literal_protocol(name, backbone, monkeypatch):
    classes, rule = benchmark_classes(name), benchmark_rule(name, backbone)
    generator = torch.Generator().manual_seed(3)
    # similarities as a real backbone's: probabilities near the threshold
    low = torch.rand(5, 7, len(classes.flat), generator=generator) * 0.07
    low += 0.03 * torch.rand(len(classes.flat), generator=generator)
    strip, size, owner = bilinear_strips(low, (43, 61)), (43, 61), classes.owner
    monkeypatch.setattr(evaluate_ovs, "label_strips", functools.partial(
        label_strips, values=61 * len(owner) * 4))  # four rows at a time
    labels = label_map(strip, size, owner, rule)
    assert torch.equal(labels, literal(strip(0, 43), classes, rule))
    if not (rule.threshold or rule.area_threshold):
        # softmax is not computed then, and scales change nothing
        assert torch.equal(labels, label_map(strip, size, owner, Rule(7.0)))
    else:
        assert not torch.equal(labels, label_map(strip, size, owner)) and (labels == 0).any()


@pytest.mark.parametrize("rule", [
    Rule(),
    Rule(logit_scale=30.0, threshold=0.3),
    Rule(area_threshold=0.2),
    Rule(25.0, 0.25, 0.1),
])
def test_rules_of_plain_values(backbone, rule):
    """A method and a rule without any parsed flag, as a library calls them."""
    image, size = torch.randint(0, 256, (3, 70, 115), dtype=torch.uint8), (70, 115)
    classes = Classes([["wall", "floor"], ["cat"], ["grass", "lawn", "turf"], ["sky"]], True)
    features = F.normalize(dense_features(backbone, image), dim=-1)
    # names that tell patches apart
    texts = F.normalize(features.flatten(0, 1)[[1, 5, 9, 14, 17, 21, 26]]
                        - features.mean((0, 1)), dim=-1)
    strip = bilinear_strips(features @ texts.T, size)
    expected = literal(strip(0, size[0]), classes, rule)
    labels = label_map(strip, size, torch.tensor([0, 0, 1, 2, 2, 2, 3]), rule)
    assert torch.equal(labels, expected)
    method = Method("single-pass", "single pass", backbone, "somewhere")
    assert torch.equal(method.predict(image, size, classes, texts, rule), expected)
    plain = method.predict(image, size, classes, texts)  # by the rule that has no threshold
    assert torch.equal(plain, expected) == (rule == Rule())


def test_rules_go_by_the_backbone_however_it_is_spelt():
    assert (benchmark_rule("voc21", "ViT-B-16/laion2b_s34b_b88k")
            == benchmark_rule("voc21", "openclip") == Rule(65, 0.1, 0.1))
    assert (benchmark_rule("voc21", "a/folder/that/is/gone")
            == benchmark_rule("voc21", "tiny") == Rule(65))
    assert benchmark_rule("context60", "openclip") == Rule(50, 0.1)


def test_class_files_are_the_benchmarks():
    names = {name: benchmark_classes(name) for name in BENCHMARKS}
    assert {name: (len(classes), len(classes.flat)) for name, classes in names.items()} == {
        "voc21": (21, 56), "voc20": (20, 30), "cityscapes": (19, 19), "ade20k": (150, 150),
        "context60": (60, 60), "context59": (59, 59)}
    assert (names["voc21"].names[1:] == names["voc20"].names
            and names["context60"].names[1:] == names["context59"].names)


# ---- checks before a long run --------------------------------------------------------------------

@pytest.fixture
def own(tmp_path):
    """Four own pictures with masks of three classes: the flags for them."""
    rng = np.random.default_rng(5)
    for k in range(4):
        save(rng.integers(0, 256, (70 + k, 90, 3), np.uint8), tmp_path / "images" / f"{k}.png")
        save(rng.choice(np.array([0, 1, 2, 255], np.uint8), (70 + k, 90)),
             tmp_path / "masks" / f"{k}.png")
    return ["--images", tmp_path / "images", "--masks", tmp_path / "masks",
            "--classes", "cat, grass | lawn, sky", "--state", tmp_path / "state"]


def test_check_data_reports_a_good_data_set(own, root, capsys):
    run(*own, "--check-data")
    output = capsys.readouterr().out
    assert ("4 pictures" in output and "no problem found" in output
            and re.search(r"255 +4 +\d+\.\d+%  ignored", output)
            and re.search(r"1 +4 .*grass", output))
    with pytest.raises(RunFailed, match="problems"):
        run("--dataset", "cityscapes", "--data-root", root, "--check-data")
    output = capsys.readouterr().out
    assert ("3 of the known 500 pictures" in output
            and "3 pictures, but cityscapes is known to have 500" in output
            and re.search(r" 7 +\d .*road", output))


def test_check_data_lists_every_problem(own, capsys):
    images, masks = own[1], own[3]
    save(np.zeros((10, 10), np.uint8), masks / "0.png")
    save(np.full((71, 90), 9, np.uint8), masks / "1.png")
    (masks / "2.png").unlink()
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:2000])
    with pytest.raises(RunFailed):
        run(*own, "--check-data")
    output = capsys.readouterr().out
    for problem in ("0.png is 10 x 10 pixels .* 70 x 90",
                    "1.png holds labels 9; with 3 classes they go from 0 to 2",
                    "2.png has no mask: .*2.png does not exist",
                    "3.png cannot be read", "4 problems", "OUT OF RANGE"):
        assert re.search(problem, output), problem


@pytest.mark.parametrize("spoil, message", [
    (lambda masks: save(np.zeros((10, 10), np.uint8), masks / "3.png"),
     "3.png is 10 x 10 .* 73 x 90"),
    (lambda masks: save(np.full((73, 90), 7, np.uint8), masks / "3.png"),
     "3.png holds labels 7; with 3 classes they go from 0 to 2"),
    (lambda masks: save(np.full((73, 90), 300, np.uint16), masks / "3.png"),
     "3.png holds labels 300"),
    (lambda masks: save(np.zeros((73, 90, 3), np.uint8), masks / "3.png"),
     "3.png has 3 channels"),
    (lambda masks: Image.fromarray(np.full((73, 90), -4, np.int32)).save(masks / "3.png", "TIFF"),
     "3.png holds labels -4"),
    (lambda masks: Image.fromarray(np.zeros((73, 90), np.float32)).save(masks / "3.png", "TIFF"),
     "3.png holds float32 values"),
    (lambda masks: (masks / "3.png").write_text("no mask"), "3.png cannot be read as a mask"),
    (lambda masks: (masks / "3.png").unlink(),
     "images/3.png has no mask: .*masks/3.png does not exist"),
])
def test_bad_masks_stop_before_the_first_picture(own, micro, spoil, message, monkeypatch):
    spoil(own[3])
    monkeypatch.setattr(evaluate_ovs, "evaluate", lambda *_: pytest.fail("the run had begun"))
    with pytest.raises(RunFailed, match=message):
        run(*own, "--backbone", micro)


@pytest.mark.parametrize("flags, message", [
    (["--prob-threshold", 0.2], "no(ne|t).*--background|background class.*has none"),
    (["--area-threshold", 0.2], "has none"),
    (["--prob-threshold", 2, "--background", "wall"], "from 0"),
    (["--background", "wall,,floor"], "--background: an empty name"),
    (["--background", "wall, cat"], "'cat'"),
    (["--short-side", 0], "--short-side 0"),
    (["--short-side", 64, -1], "--short-side -1"),
    (["--area", 0], "--area 0"),
    (["--area", 64, "--short-side", 64], "--short-side and --area exclude each other"),
    (["--json", "out.txt"], "--json out.txt"),
    (["--plot", "out.txt"], "--plot out.txt"),
    (["--lposs-alpha", 1], "--lposs-alpha"),
    (["--limit", 0], "--limit 0"),
    (["--upsampler", "anyup", "--refine", "lposs+"], "lposs\\+ ends"),
    (["--upsampler", "anyup", "--inference", "sliding-window"], "sliding windows are joined"),
    (["--dataset", "voc21"], "exclude each other"),
])
def test_wrong_calls(own, micro, flags, message):
    with pytest.raises(WrongCall, match=message):
        run(*own, "--backbone", micro, *flags)


@pytest.mark.parametrize("flags, error, message", [
    (["--dataset", "voc21", "--classes", "cat, dog"], WrongCall,
     "--classes cat, dog lists 2 classes, but voc21 has 21"),
    (["--dataset", "all", "--classes", "cat"], WrongCall, "not of all"),
    (["--dataset", "voc21", "--background", "wall"], WrongCall, "--background goes with --images"),
    (["--dataset", "voc20", "--prob-threshold", 0.1], WrongCall, "voc20 has none"),
    (["--dataset", "ade20k", "--data-root", "/nowhere"], RunFailed,
     "/nowhere/ADEChallengeData2016 does not exist; --data-root"),
    (["--classes", "cat"], WrongCall, "--classes cat lists 1 classes, but the demo has 23"),
])
def test_wrong_calls_on_benchmarks(root, micro, flags, error, message):
    with pytest.raises(error, match=message):
        run("--backbone", micro, "--data-root", root, *flags)


def test_a_mask_of_one_bit(tmp_path):
    wanted = np.random.default_rng(0).integers(0, 2, (20, 30)).astype(bool)
    Image.fromarray(wanted).save(tmp_path / "mask.png")
    assert (to_classes(read_label_ids(tmp_path / "mask.png"), label_table("plain", 2), "").numpy()
            == wanted).all()


def test_too_many_classes():
    with pytest.raises(WrongCall, match="^`classes`: 300 classes"):
        read_classes(", ".join(f"name {k}" for k in range(300)))


# ---- long runs -----------------------------------------------------------------------------------

def command(*flags, launcher=()):
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "evaluate_ovs.py"), *map(str, flags)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process, code=0):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def result(path):
    rows = json.loads(Path(path).read_text())["results"]
    return [{key: value for key, value in row.items() if key != "seconds_per_image"}
            for row in rows]


def test_unreadable_pictures_are_left_out_and_counted(own, micro, tmp_path, capsys):
    run(*own, "--backbone", micro, "--json", tmp_path / "three.json", "--limit", 3)
    (own[1] / "3.png").write_bytes((own[1] / "3.png").read_bytes()[:2000])
    capsys.readouterr()
    run(*own, "--backbone", micro, "--json", tmp_path / "four.json")
    assert "1 of 4 pictures could not be read" in capsys.readouterr().out
    (three,), (four,) = result(tmp_path / "three.json"), result(tmp_path / "four.json")
    assert four["unreadable"] == ["3.png"] and four | {"unreadable": []} == three


@pytest.mark.slow
def test_two_processes_count_the_same_pixels(own, micro, tmp_path, one_thread):
    flags = [*own, "--backbone", micro, "--refine", "none", "lposs"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(*flags, "--json", tmp_path / "one.json", "--save-maps", tmp_path / "one")
    output = finish(command(*flags, "--json", tmp_path / "two.json", "--save-maps",
                            tmp_path / "two", launcher=launcher))
    assert (result(tmp_path / "one.json") == result(tmp_path / "two.json")
            and output.count("mIoU") >= 1)
    one, two = ({path.relative_to(tmp_path / name): path.read_bytes()
                 for path in (tmp_path / name).rglob("*.labels.png")} for name in ("one", "two"))
    assert one == two and len(two) == 8
    # without masks the shares of all pictures stand in one file
    flags = ["--images", own[1], *flags[4:]]
    run(*flags, "--save-maps", tmp_path / "one")
    finish(command(*flags, "--save-maps", tmp_path / "two", launcher=launcher))
    assert [path.name for path in (tmp_path / "two").rglob("*.csv")] == ["shares.csv"]
    assert ((tmp_path / "two" / "shares.csv").read_bytes()
            == (tmp_path / "one" / "shares.csv").read_bytes())


def test_counts_that_are_lost_are_not_passed_over(own, micro, monkeypatch):
    count = Row.count
    monkeypatch.setattr(Row, "count", lambda self, index, *rest:
                        None if index == 2 else count(self, index, *rest))
    with pytest.raises(RunFailed, match="counts of 1 pictures are missing"):
        run(*own, "--backbone", micro)


def test_maps_that_an_interruption_left_out_are_made(own, micro, tmp_path, monkeypatch):
    save_maps, calls = evaluate_ovs.save_maps, []

    def failing(*inputs):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        save_maps(*inputs)

    monkeypatch.setattr(evaluate_ovs, "save_maps", failing)
    with pytest.raises(KeyboardInterrupt):
        run(*own, "--backbone", micro, "--save-maps", tmp_path / "maps")
    monkeypatch.undo()
    run(*own, "--backbone", micro, "--save-maps", tmp_path / "maps")
    assert len(list((tmp_path / "maps").rglob("*.pca.png"))) == 4


def test_the_protocol_is_the_published_one():
    """Short sides, thresholds and counts as protocol tables state them; the rule of a student is
    its teacher's."""
    table = {"voc21": (672, 1449, (65, 0, 0), (65, 0.1, 0.1)),
             "voc20": (672, 1449, (40, 0, 0), (40, 0, 0)),
             "cityscapes": (None, 500, (40, 0, 0), (40, 0, 0)),
             "ade20k": (672, 2000, (40, 0, 0), (40, 0, 0)),
             "context60": (672, 5104, (50, 0.1, 0), (50, 0.1, 0)),
             "context59": (672, 5104, (40, 0, 0), (40, 0, 0))}
    for name, (short_side, count, rule, openclip) in table.items():
        benchmark = BENCHMARKS[name]
        assert (benchmark.short_side, benchmark.layouts["val"].count) == (short_side, count)
        dataset = Dataset(name, None, [], [], [], benchmark_classes(name), Size(short_side))

        def chosen(origin, refine, *given):
            method = Method("spar", "", None, origin, refine=refine)
            return choose_rule(method, dataset, *given or [None] * 3)

        for origin, expected in (("siglip2", rule), ("openclip", openclip),
                                 ("ViT-B-16/laion2b_s34b_b88k", openclip)):
            assert chosen(origin, "none") == Rule(*expected)
            # what is given goes before
            assert chosen(origin, "none", 7.0, None, None) == Rule(7.0, *expected[1:])
        assert chosen("openclip", "lposs") == Rule()
        if dataset.classes.background:
            assert chosen("openclip", "lposs", None, 0.3, None) == Rule(threshold=0.3)


@pytest.mark.parametrize("name, size", [("voc21", (672, 1008)), ("cityscapes", (70, 105))])
def test_benchmarks_are_opened_with_their_size(name, size, root):
    dataset = evaluate_ovs.open_benchmark(name, root)
    assert dataset.size.resize(torch.zeros(3, 70, 105, dtype=torch.uint8)).shape[1:] == size


def interrupt_after(count, monkeypatch):
    """Note predictions, and let Ctrl-C come in the place of the one after `count` of them, if that
    is a number: a list of their sizes, which grows."""
    predict, calls = Method.predict, []

    def failing(self, image, size, *rest, **named):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(tuple(size))
        return predict(self, image, size, *rest, **named)

    monkeypatch.setattr(Method, "predict", failing)
    return calls


def test_an_interrupted_run_continues_to_the_same_counts(own, micro, tmp_path, monkeypatch, capsys):
    flags = [*own, "--backbone", micro]
    run(*flags, "--json", tmp_path / "whole.json")
    interrupt_after(3, monkeypatch)  # the warm-up, and two pictures
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--json", tmp_path / "resumed.json")
    monkeypatch.undo()
    (state,) = (tmp_path / "state").iterdir()
    assert len(read_json_lines(state)) == 2
    with open(state, "a") as file:
        file.write('{"image": "2.png", "cel')  # as a killed process leaves it
    capsys.readouterr()
    run(*flags, "--json", tmp_path / "resumed.json")
    assert ("continuing an unfinished run: 2 of 4" in capsys.readouterr().out
            and not list((tmp_path / "state").iterdir()))
    assert result(tmp_path / "whole.json") == result(tmp_path / "resumed.json")


def read_shares(path):
    with open(path) as file:
        header, *lines = csv.reader(file)
    return header, lines


def test_an_interrupted_run_without_masks_continues(own, micro, tmp_path, monkeypatch, capsys):
    """Without predicting again what was done; shares.csv holds all pictures."""
    flags = ["--images", own[1], *own[4:], "--backbone", micro, "--refine", "none", "lposs"]
    run(*flags, "--save-maps", tmp_path / "whole")
    sizes = [(70 + k, 90) for k in range(4)]
    calls = interrupt_after(8, monkeypatch)  # the first row, its warm-up, two of the second row
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--save-maps", tmp_path / "maps")
    assert calls == [sizes[0], *sizes, sizes[0], *sizes[:2]]
    assert not (tmp_path / "maps" / "shares.csv").exists()
    monkeypatch.undo()
    calls = interrupt_after(None, monkeypatch)
    capsys.readouterr()
    run(*flags, "--save-maps", tmp_path / "maps")
    assert calls == [sizes[2], *sizes[2:]]  # the warm-up, and the two that were left
    output = capsys.readouterr().out
    assert "continuing an unfinished run: 6 of 8 maps" in output
    header, lines = read_shares(tmp_path / "maps" / "shares.csv")
    assert ([line[:2] for line in lines] == [[f"{k}.png", method] for method in
                                             ("single-pass", "single-pass +lposs")
                                             for k in range(4)])
    assert all(re.search(rf"^{k}.png \(single-pass\): .* %", output, re.M) for k in range(4))
    assert (header, lines) == read_shares(tmp_path / "whole" / "shares.csv")
    assert not list((tmp_path / "state").iterdir())
    files = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}
             for folder in (tmp_path / "whole", tmp_path / "maps")]
    assert files[0] == files[1] and len(files[0]) == 2 * 4 * 3 + 1


@pytest.mark.slow
def test_other_settings_do_not_continue(own, micro, monkeypatch):
    class Begun(Exception):
        pass

    def begin(row, *_):
        raise Begun(row.journal)

    monkeypatch.setattr(evaluate_ovs, "evaluate", begin)

    def path(*extra):
        with pytest.raises(Begun) as begun:
            run(*own, "--backbone", micro, *extra)
        return str(begun.value)

    sliding, lposs = ["--inference", "sliding-window"], ["--refine", "lposs"]
    paths = [path(), path("--short-side", 64), path("--area", 64), path("--limit", 3),
             path(*lposs), path(*lposs, "--lposs-k", 30), path(*sliding), path(*sliding, *lposs),
             path(*sliding, "--window", 48, "--stride", 32), path("--background", "wall"),
             path("--background", "wall", "--prob-threshold", 0.1),
             path("--classes", "cat, grass | lawn, skies")]
    assert len(set(paths)) == len(paths) and path() == paths[0]
    # other rows may come and go, and so may what changes no number
    assert path("--refine", "none", "lposs") == path("--workers", 1) == paths[0]
    save(np.zeros((73, 90), np.uint8), own[3] / "3.png")
    assert path() != paths[0]


# ---- sweep, plots, own pictures ------------------------------------------------------------------

def test_sweep_table_and_plots(own, micro, tmp_path, capsys):
    flags = [*own, "--backbone", micro, "--inference", "sliding-window", "--strides", 32, 24,
             "--short-side", 64, 96, 128]
    run(*flags, "--json", tmp_path / "sweep.json", "--plot", tmp_path / "sweep.png")
    rows = result(tmp_path / "sweep.json")
    assert ([(row["method"], row["short_side"]) for row in rows]
            == [(f"sliding-window/{stride}", side)
                for side in (64, 96, 128) for stride in (32, 24)])
    table = capsys.readouterr().out
    line = next(line for line in table.splitlines()
                if line.startswith("sliding-window/24") and len(line.split()) == 4)
    assert line.split()[1:] == [f"{row['miou']:.1f}" for row in rows
                                if row["method"] == "sliding-window/24"]
    run("--results", tmp_path / "sweep.json", "--plot", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "sweep.png").read_bytes()
    run("--results", tmp_path / "sweep.json", "--plot", tmp_path / "again.svg")
    assert line in capsys.readouterr().out
    (tmp_path / "second.json").write_text((tmp_path / "sweep.json").read_text())
    run("--results", tmp_path / "sweep.json", tmp_path / "second.json")
    assert ("second: sweep" not in (output := capsys.readouterr().out)
            and "second: sliding-window/24" in output and "sweep: sliding-window/24" in output)
    with pytest.raises(RunFailed, match="missing.json does not exist"):
        run("--results", tmp_path / "missing.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(RunFailed, match="other.json holds no results"):
        run("--results", tmp_path / "other.json")


def test_sweep_of_areas(own, micro, tmp_path, capsys, monkeypatch):
    seen, prepare = [], evaluate_ovs.prepare

    def noting(backbone, image):
        seen.append(tuple(image.shape[1:]))
        return prepare(backbone, image)

    monkeypatch.setattr(evaluate_ovs, "prepare", noting)
    flags = [*own, "--backbone", micro, "--refine", "none", "lposs", "--area", 64, 100]
    run(*flags, "--json", tmp_path / "sweep.json", "--plot", tmp_path / "sweep.png")
    output, report = capsys.readouterr().out, json.loads((tmp_path / "sweep.json").read_text())
    for area, sizes in ((64, seen[:10]), (100, seen[10:])):  # four pictures and a warm-up each
        assert len(sizes) == 10 and all(abs(height * width - area ** 2) <= (height + width) / 2 + 1
                                        for height, width in sizes)
        assert f"3 classes (4 names), area of {area} x {area}" in output
    rows = report["results"]
    assert ([(row["refine"], row["area"], row["short_side"]) for row in rows]
            == [(refine, area, None) for area in (64, 100) for refine in ("none", "lposs")])
    assert report["settings"]["area"] == [64, 100] and report["settings"]["short_side"] is None
    summary = [line.split() for line in output.split("\nmIoU ")[-1].splitlines()[:3]]
    none, lposs = ([f"{row['miou']:.1f}" for row in rows if row["refine"] == refine]
                   for refine in ("none", "lposs"))
    assert summary == [["64", "100"], ["single-pass", *none], ["single-pass", "+lposs", *lposs]]
    for plot in ("again.png", "again.svg"):
        run("--results", tmp_path / "sweep.json", "--plot", tmp_path / plot)
        assert output.split("\nmIoU ")[-1].splitlines()[:3] == (
            capsys.readouterr().out.split("\nmIoU ")[-1].splitlines()[:3])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "sweep.png").read_bytes()
    assert "side of the square of the picture's area" in (tmp_path / "again.svg").read_text()


@pytest.mark.slow
def test_a_short_side_that_its_bound_cuts_is_said(own, micro, tmp_path, capsys):
    save(np.zeros((20, 1000, 3), np.uint8), own[1] / "long.png")
    save(np.zeros((1500, 15, 3), np.uint8), own[1] / "tall.png")
    (own[1] / "text.png").write_text("no picture")
    flags = ["--images", own[1], *own[4:], "--backbone", micro, "--save-maps", tmp_path / "maps"]
    run(*flags, "--short-side", 64)
    assert ("2 of 7 pictures get a short side of 20 to 41 pixels only, as their long side may have "
            "2048 at most\n") in capsys.readouterr().out
    run(*flags, "--short-side", 16, 32)  # 32: of tall.png alone
    sixteen, thirty_two = capsys.readouterr().out.split("short side 32")
    assert "at most" not in sixteen
    assert re.search(r"1 of 7 pictures get a short side of 20\D.* at most\n", thirty_two)
    run(*flags, "--area", 128)
    assert "at most" not in capsys.readouterr().out


def test_own_words_with_a_background(own, micro, tmp_path):
    flags = ["--images", own[1], "--classes", "cat, grass | lawn", "--background", "wall, floor",
             "--prob-threshold", "0.999", "--backbone", micro, "--save-maps", tmp_path / "maps",
             "--state", tmp_path / "state"]
    run(*flags, "--logit-scale", 1)  # every probability is under the threshold
    assert all((np.asarray(Image.open(path)) == 0).all()
               for path in (tmp_path / "maps").glob("*.labels.png"))
    run(*flags, "--logit-scale", 1e6)  # none is
    assert any((np.asarray(Image.open(path)) > 0).any()
               for path in (tmp_path / "maps").glob("*.labels.png"))
    header, lines = read_shares(tmp_path / "maps" / "shares.csv")
    assert (header == ["image", "method", "background %", "cat %", "grass %"]
            and [line[0] for line in lines] == [f"{k}.png" for k in range(4)])
    for line in lines:
        labels = np.asarray(Image.open(tmp_path / "maps" / f"{line[0]}.labels.png"))
        assert ([float(value) for value in line[2:]]
                == pytest.approx([100 * (labels == k).mean() for k in range(3)], abs=0.006))


# ---- students: the contact sheet, and the name of the teacher's backbone -------------------------

@pytest.fixture(scope="module")
def student(micro, tmp_path_factory):
    """A folder as distill.py writes it, of another image tower than its teacher's."""
    folder = tmp_path_factory.mktemp("student")
    backbone = load_backbone(micro, text=True)
    for parameter in backbone.blocks[-1].parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    backbone.save(folder)
    (folder / "spar.json").write_text(json.dumps({"teacher": {"backbone": micro}}))
    return folder


def test_the_name_of_the_teachers_backbone_is_accepted(own, micro, student, tmp_path):
    flags = [*own, "--checkpoint", student]
    run(*flags, "--json", tmp_path / "alone.json")
    run(*flags, "--backbone", micro, "--json", tmp_path / "named.json")
    (alone,), (named,) = result(tmp_path / "alone.json"), result(tmp_path / "named.json")
    assert alone == named and named["method"] == "spar"
    run(*flags, "--backbone", micro, "--compare", "--json", tmp_path / "compared.json")
    assert result(tmp_path / "compared.json")[-1] == alone
    for extra in ([], ["--compare"]):
        with pytest.raises(WrongCall, match=f"--backbone tiny.* a student of {micro}"):
            run(*flags, "--backbone", "tiny", *extra)


def picture_miou(labels, predictions):
    from sklearn.metrics import jaccard_score
    kept = labels != 255
    present = sorted(set(labels[kept]) | set(predictions[kept]))
    return 100 * jaccard_score(labels[kept], predictions[kept], labels=present, average="macro")


@pytest.mark.slow
def test_the_sheet_begins_where_windows_lead_most(own, micro, student, tmp_path, monkeypatch):
    """By the last window's lead over the first row in the mIoU of a picture alone."""
    rng = np.random.default_rng(6)
    for k in range(4, 9):
        save(rng.integers(0, 256, (70 + k, 90, 3), np.uint8), own[1] / f"{k}.png")
        save(rng.choice(np.array([0, 1, 2, 255], np.uint8), (70 + k, 90)), own[3] / f"{k}.png")
    drawn, maps, names = [], tmp_path / "maps", [f"{k}.png" for k in range(9)]
    contact_sheet = evaluate_ovs.contact_sheet

    def noting(*inputs):
        drawn.append(inputs)
        return contact_sheet(*inputs)

    monkeypatch.setattr(evaluate_ovs, "contact_sheet", noting)
    flags = [*own, "--checkpoint", student, "--save-maps", maps]
    run(*flags, "--compare", "--stride", 16, 32)
    masks = {name: np.array(Image.open(own[3] / name)) for name in names}
    labels = {folder.name: {name: np.array(Image.open(folder / f"{name}.labels.png"))
                            for name in names}
              for folder in maps.iterdir() if folder.is_dir()}
    miou = {row: {name: picture_miou(masks[name].ravel(), each[name].ravel()) for name in names}
            for row, each in labels.items()}

    def by_lead(window):
        return sorted(names, key=lambda name: miou["single-pass"][name] - miou[window][name])

    order = by_lead("sliding-window-32")
    assert order[:6] not in (by_lead("sliding-window-16")[:6], names[:6])
    ((rows, titles, _),) = drawn
    assert titles == ["picture", "labels", "single pass", "window, stride 16", "window, stride 32",
                      "SPAR, single pass"]
    columns = ["single-pass", "sliding-window-16", "sliding-window-32", "spar"]
    for name, (image, mask, *shown) in zip(order[:6], rows, strict=True):
        pixels = np.array(Image.open(own[1] / name))
        assert (image.permute(1, 2, 0).numpy() == pixels).all()
        assert (mask.numpy() == masks[name]).all() and len(shown) == 4
        for column, predictions in zip(columns, shown):
            assert (predictions.numpy() == labels[column][name]).all()

    # where no window is compared with a first row, and without masks: the first pictures
    run(*flags)
    run("--images", own[1], *own[4:], *flags[-4:], "--compare", "--stride", 32)
    for rows, titles, _ in drawn[1:]:
        assert ([len(row[0][0]) for row in rows] == [70, 71, 72, 73, 74, 75]
                and all(len(row) == len(titles) for row in rows))
    assert [len(titles) for _, titles, _ in drawn[1:]] == [3, 4]
