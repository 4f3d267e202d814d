"""The six benchmarks on small data in their true layouts: readers, label ids, thresholds, checks,
resuming, sharing out, plots, sheets."""
import contextlib
import csv
import functools
import io
import json
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate_ovs
from common import bilinear_strips, dense_features, label_strips
from conftest import files, refusal, results, run, save_image
from data.files import RunError
from data.benchmarks import (BENCHMARKS, GROUPS, Classes, Dataset, Rule, Size, benchmark_classes,
                             benchmark_rule, label_table, open_benchmark, read_label_ids,
                             read_mask, to_classes, voc_palette)
from data.journal import Journal
from evaluate_ovs import Method, choose_rule, label_map
from extras.drawing import palette
from extras.lposs import Lposs

SIZES = [(70, 100), (90, 64), (64, 64)]
evaluate = functools.partial(run, evaluate_ovs)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three images of each benchmark, with every label id that its files may hold."""
    root, rng = tmp_path_factory.mktemp("benchmarks"), np.random.default_rng(0)

    def labels(size, ids, border=None):
        coarse = rng.choice(np.array(ids, np.uint8), (6, 6))
        grown = np.array(Image.fromarray(coarse).resize(size[::-1], Image.NEAREST))
        if border is not None:
            grown[::17] = border
        return grown

    def photo(size):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
        return np.array(coarse.resize(size[::-1], Image.BICUBIC))

    for k, size in enumerate(SIZES):
        for year, kind, listing, ids in (
                ("2012", "SegmentationClass", "Segmentation", range(21)),
                ("2010", "SegmentationClassContext", "SegmentationContext", range(60))):
            folder = root / "VOCdevkit" / f"VOC{year}"
            save_image(photo(size), folder / "JPEGImages" / f"2007_00{k}.jpg")
            save_image(photo(size), folder / "JPEGImages" / f"2008_unlisted_{k}.jpg")
            save_image(labels(size, ids, 255 if year == "2012" else None),
                       folder / kind / f"2007_00{k}.png", "P")
            (folder / "ImageSets" / listing).mkdir(parents=True, exist_ok=True)
            (folder / "ImageSets" / listing / "val.txt").write_text(
                "2007_000\n2007_001\n2007_002\n")
        ade, stem = root / "ADEChallengeData2016", f"validation/ADE_val_0000000{k}"
        save_image(photo(size), ade / f"images/{stem}.jpg")
        save_image(labels(size, range(151)), ade / f"annotations/{stem}.png")
        city, stem = root / "cityscapes", f"lindau/lindau_00000{k}_000019"
        save_image(photo(size), city / f"leftImg8bit/val/{stem}_leftImg8bit.png")
        save_image(labels(size, range(34)), city / f"gtFine/val/{stem}_gtFine_labelIds.png")
        coco, stem = root / "coco_stuff164k", f"val2017/00000000000{k}"
        save_image(photo(size), coco / f"images/{stem}.jpg")
        save_image(labels(size, COCO, 255), coco / f"annotations/{stem}.png")
    return root


# the ids of COCO-Stuff: 80 things of COCO's 91 ids, less one each, then 91 kinds of stuff
COCO = [k for k in range(182) if k not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]


def known_mapping(name):
    """Return label id -> class, written out a second time."""
    if name == "coco-stuff":
        return {value: k for k, value in enumerate(COCO)}
    if name == "coco-object":
        return {value: k + 1 if value < 90 else 0 for k, value in enumerate([*COCO, 255])}
    if name in ("voc21", "context60"):
        return {k: k for k in range(60)}
    if name in ("voc20", "context59", "ade20k"):
        return {k: k - 1 for k in range(1, 151)}
    # road, sidewalk, building, wall, fence, pole, light, sign, ...
    order = "7 8 11 12 13 17 19 20 21 22 23 24 25 26 27 28 31 32 33".split()
    return {int(value): k for k, value in enumerate(order)}


def quick_texts(monkeypatch):
    """Take text embeddings from a hash of the name: 150 classes have 12,000 prompts."""
    def embed(backbone, names):
        generators = [torch.Generator().manual_seed(sum(map(ord, name))) for name in names]
        return F.normalize(torch.stack([torch.randn(backbone.dim, generator=generator)
                                        for generator in generators]),
                           dim=-1).to(backbone.mean.device)
    monkeypatch.setattr(evaluate_ovs, "embed_texts", embed)


# ---- readers ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def all_eight(root, micro, tmp_path_factory):
    """The folder of one evaluation on all benchmarks, and what it printed."""
    out, output = tmp_path_factory.mktemp("all"), io.StringIO()
    with contextlib.redirect_stdout(output), pytest.MonkeyPatch.context() as patch:
        quick_texts(patch)
        evaluate("--backbone", micro, "--dataset", "all8", "--data-root", root, "--short-side", 64,
                 "--json", out / "out.json", "--save-maps", out / "maps",
                 "--plot", out / "all.png", "--state", out)
    return out, output.getvalue()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_labels_and_miou_of_a_benchmark(name, all_eight, root, micro):
    out, _ = all_eight
    report = json.loads((out / "out.json").read_text())
    (row,) = [row for row in report["results"] if row["dataset"] == name]
    classes = benchmark_classes(name)
    folder = {"voc": "VOCdevkit/VOC2012/SegmentationClass",
              "con": "VOCdevkit/VOC2010/SegmentationClassContext",
              "ade": "ADEChallengeData2016/annotations/validation",
              "cit": "cityscapes/gtFine/val", "coc": "coco_stuff164k/annotations"}[name[:3]]
    mapping, hits, either = known_mapping(name), np.zeros(len(classes)), np.zeros(len(classes))
    masks = sorted((root / folder).rglob("*.png"))
    predictions = sorted((out / "maps" / name).rglob("*.labels.png"))
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
    assert row["miou"] == pytest.approx(iou.mean()) and row["images"] == 3
    assert list(row["per_class_iou"]) == classes.titles
    assert classes.titles[0] == {"voc21": "background", "context60": "background",
                                 "ade20k": "wall", "cityscapes": "road", "coco-stuff": "person",
                                 "coco-object": "background"}.get(name, "aeroplane")
    assert {"torch", "open_clip", "weights", "names_sha256", "resize", "templates", "short_side",
            "precision"} <= report["settings"].keys()
    assert not list(out.glob("*.jsonl"))  # nothing is left of a finished run


def test_a_table_of_all_benchmarks_ends_with_their_mean(all_eight):
    out, output = all_eight
    rows = results(out / "out.json")
    assert [row["dataset"] for row in rows] == list(BENCHMARKS)
    last = [line for line in output.splitlines() if line.startswith("single-pass")][-1]
    assert float(last.split()[-1]) == pytest.approx(np.mean([row["miou"] for row in rows]),
                                                    abs=0.06)


def test_cityscapes_prefers_train_ids(all_eight, root, micro, tmp_path, monkeypatch):
    quick_texts(monkeypatch)
    shutil.copytree(root / "cityscapes", tmp_path / "cityscapes")
    for path in (tmp_path / "cityscapes").rglob("*_labelIds.png"):
        ids = np.array(Image.open(path))
        train = np.full_like(ids, 255)
        for value, k in known_mapping("cityscapes").items():
            train[ids == value] = k
        Image.fromarray(train).save(str(path).replace("_labelIds", "_labelTrainIds"))
        path.write_text("not read")
    evaluate("--backbone", micro, "--dataset", "cityscapes", "--data-root", tmp_path,
             "--short-side", 64, "--json", tmp_path / "out.json", "--state", tmp_path)
    assert results(tmp_path / "out.json")[0] in results(all_eight[0] / "out.json")


# ---- the protocol, literally -----------------------------------------------------------------

def literal(similarities, classes, rule):
    """Return labels step by step in float64: softmax over all names, best synonym,
    area threshold, argmax, probability threshold."""
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


@pytest.mark.parametrize("backbone", ["tiny", "openclip"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_thresholds_equal_the_literal_protocol(name, backbone, monkeypatch):
    classes, rule = benchmark_classes(name), benchmark_rule(name, backbone)
    generator = torch.Generator().manual_seed(3)
    # similarities as a real backbone's: probabilities near the threshold
    low = torch.rand(5, 7, len(classes.flat), generator=generator) * 0.07
    low += 0.03 * torch.rand(len(classes.flat), generator=generator)
    size, class_of_name = (43, 61), classes.class_of_name
    strip = bilinear_strips(low, size)
    monkeypatch.setattr(evaluate_ovs, "label_strips", functools.partial(
        label_strips, values=61 * len(class_of_name) * 4))  # four rows at a time
    labels = label_map(strip, size, class_of_name, rule)
    assert torch.equal(labels, literal(strip(0, 43), classes, rule))
    if not (rule.threshold or rule.area_threshold):
        # softmax is not computed then, and scales change nothing
        assert torch.equal(labels, label_map(strip, size, class_of_name, Rule(7.0)))
    else:
        assert not torch.equal(labels, label_map(strip, size, class_of_name))
        assert (labels == 0).any()


@pytest.mark.parametrize("rule", [
    Rule(),
    Rule(logit_scale=30.0, threshold=0.3),
    Rule(area_threshold=0.2),
    Rule(25.0, 0.25, 0.1),
])
def test_a_method_takes_rules_of_plain_values(backbone, rule):
    """Use a method and a rule without any flags, as a library's user does."""
    image, size = torch.randint(0, 256, (3, 70, 115), dtype=torch.uint8), (70, 115)
    classes = Classes([["wall", "floor"], ["cat"], ["grass", "lawn", "turf"], ["sky"]], True)
    features = F.normalize(dense_features(backbone, image), dim=-1)
    # names that tell patches apart
    texts = F.normalize(features.flatten(0, 1)[[1, 5, 9, 14, 17, 21, 26]]
                        - features.mean((0, 1)), dim=-1)
    strip = bilinear_strips(features @ texts.T, size)
    expected = literal(strip(0, size[0]), classes, rule)
    class_of_name = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    assert torch.equal(label_map(strip, size, class_of_name, rule), expected)
    method = Method(backbone, "somewhere")
    assert torch.equal(method.predict(image, size, classes, texts, rule), expected)
    plain = method.predict(image, size, classes, texts)  # by the rule without thresholds
    assert torch.equal(plain, expected) == (rule == Rule())


def test_the_protocol_is_the_published_one():
    """Short sides, thresholds and counts; a student has the rule of its teacher, however that is
    spelt."""
    table = {"voc21": (672, 1449, (65, 0, 0), (65, 0.1, 0.1)),
             "voc20": (672, 1449, (40, 0, 0), (40, 0, 0)),
             "cityscapes": (None, 500, (40, 0, 0), (40, 0, 0)),
             "ade20k": (672, 2000, (40, 0, 0), (40, 0, 0)),
             "context60": (672, 5104, (50, 0.1, 0), (50, 0.1, 0)),
             "context59": (672, 5104, (40, 0, 0), (40, 0, 0)),
             "coco-object": (672, 5000, (50, 0.1, 0), (50, 0.1, 0)),
             "coco-stuff": (672, 5000, (40, 0, 0), (40, 0, 0))}
    assert GROUPS == {"all": list(table)[:6], "all8": list(table)}
    for name, (short_side, count, rule, openclip) in table.items():
        benchmark = BENCHMARKS[name]
        assert (benchmark.short_side, benchmark.layouts["val"].count) == (short_side, count)
        dataset = Dataset(name, None, [], [], [], benchmark_classes(name), Size(short_side))
        for origin, expected in (("siglip2", rule), ("a/folder", rule), ("openclip", openclip),
                                 ("ViT-B-16/laion2b_s34b_b88k", openclip)):
            student = Method(None, origin, checkpoint="runs/spar")
            assert choose_rule(student, dataset, {}) == Rule(*expected)
            # what is given goes before
            assert choose_rule(student, dataset, {"logit_scale": 7.0}) == Rule(7.0, *expected[1:])
        refined = Method(None, "openclip", lposs=Lposs())
        assert choose_rule(refined, dataset, {}) == Rule()
        if dataset.classes.background:
            assert choose_rule(refined, dataset, {"threshold": 0.3}) == Rule(threshold=0.3)


@pytest.mark.parametrize("name, size", [("voc21", (672, 1008)), ("cityscapes", (70, 105))])
def test_benchmarks_are_opened_with_their_size(name, size, root):
    dataset = open_benchmark(name, root)
    assert dataset.size.resize(torch.zeros(3, 70, 105, dtype=torch.uint8)).shape[1:] == size


# ---- masks, and checks before a long run -----------------------------------------------------

@pytest.fixture
def own(tmp_path):
    """Four own images with masks of three classes: the flags for them."""
    rng = np.random.default_rng(5)
    for k in range(4):
        pixels = rng.integers(0, 256, (70 + k, 90, 3), np.uint8)
        save_image(pixels, tmp_path / "images" / f"{k}.png")
        labels = rng.choice(np.array([0, 1, 2, 255], np.uint8), (70 + k, 90))
        save_image(labels, tmp_path / "masks" / f"{k}.png")
    return ["--images", tmp_path / "images", "--masks", tmp_path / "masks",
            "--classes", "cat, grass | lawn, sky", "--state", tmp_path / "state"]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_few_bits_keep_their_class_numbers(tmp_path, bits):
    labels = np.random.default_rng(0).integers(0, 2 ** bits, (20, 32))
    cells = labels.reshape(20, -1, 8 // bits) << (8 - bits * np.arange(1, 8 // bits + 1))
    packed = cells.sum(-1).astype(np.uint8)

    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))

    (tmp_path / "mask.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 20, bits, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed)))
        + chunk(b"IEND", b""))
    ids = read_label_ids(tmp_path / "mask.png", (20, 32))
    assert (to_classes(ids, label_table("plain", 2 ** bits), "").numpy() == labels).all()


def test_masks_are_turned_like_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    labels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    save_image(labels, tmp_path / "mask.png", exif=exif)
    assert (read_label_ids(tmp_path / "mask.png", (3, 2)) == np.rot90(labels, -1)).all()


def test_check_data_reports_a_good_data_set(own, root, capsys):
    evaluate(*own, "--check-data")
    output = capsys.readouterr().out
    assert "4 images" in output and "no problem found" in output
    assert re.search(r"255 +\d+\.\d+%  ignored", output) and re.search(r" 1 .*grass", output)
    with pytest.raises(RunError, match="problems"):
        evaluate("--dataset", "cityscapes", "--data-root", root, "--check-data")
    output = capsys.readouterr().out
    assert re.search(r" 7 .*road", output)
    assert "3 images, but cityscapes is known to have 500" in output


def test_check_data_lists_every_problem(own, capsys):
    images, masks = own[1], own[3]
    save_image(np.zeros((10, 10), np.uint8), masks / "0.png")
    save_image(np.full((71, 90), 9, np.uint8), masks / "1.png")
    (masks / "2.png").unlink()
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:2000])
    with pytest.raises(RunError):
        evaluate(*own, "--check-data")
    output = capsys.readouterr().out
    for problem in ("0.png is 10 x 10 pixels .* 70 x 90",
                    "1.png holds labels 9; with 3 classes they go from 0 to 2",
                    "2.png has no mask: .*2.png does not exist",
                    "3.png cannot be read", "4 problems", "OUT OF RANGE"):
        assert re.search(problem, output), problem


@pytest.mark.parametrize("array, options, message", [
    (np.zeros((10, 10), np.uint8), {}, "is 10 x 10 .* 73 x 90"),
    (np.full((73, 90), 7, np.uint8), {}, "holds labels 7; with 3 classes they go from 0 to 2"),
    (np.full((73, 90), 300, np.uint16), {}, "holds labels 300"),
    (np.zeros((73, 90, 3), np.uint8), {}, "has 3 channels"),
    (np.full((73, 90), -4, np.int32), {"format": "TIFF"}, "holds labels -4"),
    (np.zeros((73, 90), np.float32), {"format": "TIFF"}, "holds float32 values"),
    (np.zeros((73, 90), np.uint8), {"format": "JPEG"}, "is a JPEG"),
    ("no mask", {}, "cannot be read"),
    (None, {}, "does not exist"),
])
def test_bad_masks_stop_before_the_first_image(own, micro, array, options, message, monkeypatch):
    mask = own[3] / "3.png"
    mask.unlink()
    if isinstance(array, str):
        mask.write_text(array)
    elif array is not None:
        save_image(array, mask, **options)
    monkeypatch.setattr(evaluate_ovs, "evaluate", lambda *_: pytest.fail("the run had begun"))
    with pytest.raises(RunError, match=f"3.png {message}"):
        evaluate(*own, "--backbone", micro)


@pytest.mark.parametrize("flags, message", [
    ("--prob-threshold 0.2", "has none; give --background"), ("--area-threshold 0.2", "has none"),
    ("--prob-threshold 2 --background wall", "--prob-threshold.*at most 1"),
    ("--background wall,,floor", "background: an empty name"), ("--area 0", "--area.*0"),
    ("--short-side 64 -1", "--short-side.*-1"), ("--limit 0", "--limit.*0"),
    ("--area 64 --short-side 64", "--short-side.*not allowed"), ("--lposs k=20", "--refine"),
    ("--json out.txt", "--json.*out.txt"), ("--plot out.txt", "--plot.*out.txt"),
    ("--lposs alpha=1 --refine lposs", "alpha"), ("--dataset voc21", "mutually exclusive"),
    ("--upsampler anyup --inference sliding-window", "window")])
def test_a_call_that_cannot_work_is_named(own, micro, flags, message, capsys):
    flags = [*own, "--backbone", micro, *flags.split()]
    assert re.search(message, refusal(capsys, evaluate_ovs, *flags)[1])


@pytest.mark.parametrize("flags, message", [
    (["--dataset", "voc21", "--classes", "cat, dog"], "cat, dog: 2 classes, but voc21 has 21"),
    (["--dataset", "all", "--classes", "cat"], "not of all"),
    (["--dataset", "voc21", "--background", "wall"], "--background goes with --images"),
    (["--dataset", "voc20", "--prob-threshold", 0.1], "voc20 has none"),
    (["--dataset", "ade20k", "--data-root", "/nowhere"],
     "/nowhere/ADEChallengeData2016 does not exist; --data-root"),
    (["--classes", "cat, dog"], "cat, dog: 2 classes, but the demo has 23"),
])
def test_a_call_that_cannot_work_on_benchmarks_is_named(root, micro, flags, message, capsys):
    flags = ["--backbone", micro, "--data-root", root, *flags]
    assert message in refusal(capsys, evaluate_ovs, *flags)[1]


# ---- long runs -------------------------------------------------------------------------------

def test_unreadable_images_are_left_out_and_counted(own, micro, tmp_path, capsys):
    evaluate(*own, "--backbone", micro, "--json", tmp_path / "three.json", "--limit", 3)
    (own[1] / "3.png").write_bytes((own[1] / "3.png").read_bytes()[:2000])
    capsys.readouterr()
    evaluate(*own, "--backbone", micro, "--json", tmp_path / "four.json")
    assert "1 of 4 images could not be read" in capsys.readouterr().out
    (three,), (four,) = results(tmp_path / "three.json"), results(tmp_path / "four.json")
    assert four["unreadable"] == ["3.png"] and four | {"unreadable": []} == three


@pytest.mark.slow
def test_two_processes_count_the_same_pixels(fork, own, micro, tmp_path):
    flags = [*own, "--backbone", micro, "--refine", "none", "lposs"]
    one, two = tmp_path / "one", tmp_path / "two"
    evaluate(*flags, "--json", tmp_path / "one.json", "--save-maps", one)
    codes, outputs = fork("evaluate_ovs", [*flags, "--json", tmp_path / "two.json", "--save-maps",
                                           two], world=2)
    assert codes == [0, 0], outputs
    assert results(tmp_path / "one.json") == results(tmp_path / "two.json")
    assert files(one) == files(two) and len(files(two)) == 2 * 4 * 3 + 2
    # without masks, the areas of all images are in one file
    flags = ["--images", own[1], *flags[4:], "--save-maps"]
    evaluate(*flags, one)
    assert fork("evaluate_ovs", [*flags, two], world=2)[0] == [0, 0]
    assert files(one) == files(two) and "shares.csv" in files(two)


def test_counts_that_are_lost_are_not_passed_over(own, micro, monkeypatch):
    count = Journal.count
    monkeypatch.setattr(Journal, "count", lambda self, image, *rest:
                        None if image == "2.png" else count(self, image, *rest))
    with pytest.raises(RunError, match="counts of 1 images are missing"):
        evaluate(*own, "--backbone", micro)


def interrupt_after(count, monkeypatch):
    """Let Ctrl-C come in place of the prediction after `count` of them, if that is a number.
    Return a list of the sizes that are predicted, which grows."""
    predict, calls = Method.predict, []

    def failing(self, image, size, *rest):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(tuple(size))
        return predict(self, image, size, *rest)

    monkeypatch.setattr(Method, "predict", failing)
    return calls


def read_shares(path):
    header, *lines = csv.reader(path.read_text().splitlines())
    return header, lines


@pytest.mark.parametrize("labelled", [True, False])
def test_an_interrupted_run_continues_exactly(own, micro, tmp_path, monkeypatch, capsys, labelled):
    """What was done is not predicted again; scores, maps and areas are those of a whole run."""
    flags = [*own, "--backbone", micro, "--refine", "none", "lposs", "--save-maps"]
    if labelled:
        flags = ["--json", tmp_path / "out.json", *flags]
    else:
        del flags[2:4]
    evaluate(*flags, tmp_path / "whole")
    whole = results(tmp_path / "out.json") if labelled else None
    sizes = [(70 + k, 90) for k in range(4)]
    # the first row, the second row's first two images, and warm-ups where time is reported
    warm = sizes[:1] * labelled
    calls = interrupt_after(6 + 2 * labelled, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*flags, tmp_path / "maps")
    assert calls == [*warm, *sizes, *warm, *sizes[:2]]
    assert not (tmp_path / "maps" / "shares.csv").exists()
    monkeypatch.undo()
    for state in (tmp_path / "state").iterdir():
        with open(state, "a") as file:
            file.write('{"image": "2.png", "cel')  # as a killed process leaves it
    calls = interrupt_after(None, monkeypatch)
    capsys.readouterr()
    evaluate(*flags, tmp_path / "maps")
    assert len(calls) == labelled + 2
    assert "continuing an unfinished run: 6 of 8 label maps" in capsys.readouterr().out
    assert not list((tmp_path / "state").iterdir())
    assert files(tmp_path / "whole") == files(tmp_path / "maps")
    assert len(files(tmp_path / "maps")) == 2 * 4 * 3 + 2
    if labelled:
        assert results(tmp_path / "out.json") == whole
    else:
        _, lines = read_shares(tmp_path / "maps" / "shares.csv")
        assert [line[:2] for line in lines] == [
            [f"{k}.png", method] for method in ("single-pass", "single-pass +lposs")
            for k in range(4)]


@pytest.mark.slow
def test_a_run_of_other_settings_is_not_continued(own, micro, monkeypatch, capsys):
    flags = [*own, "--backbone", micro]

    def interrupt():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_after(2, patch)  # the warm-up and one image
            evaluate(*flags)

    def continues(*extra):
        capsys.readouterr()
        evaluate(*flags, *extra)
        return "continuing an unfinished run" in capsys.readouterr().out
    interrupt()
    for extra in ("--short-side 64", "--area 64", "--limit 3", "--background wall",
                  "--background wall --prob-threshold 0.1", "--refine lposs",
                  "--inference sliding-window --stride 32", "--classes a,b,c"):
        assert not continues(*extra.split()), extra
    assert continues("--workers", 1)  # which changes no number
    interrupt()
    save_image(np.zeros((73, 90), np.uint8), own[3] / "3.png")
    assert not continues()


# ---- sweeps, own words -----------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("flag, key, sides, label", [
    ("--short-side", "short_side", (64, 80, 96), "short side of the image"),
    ("--area", "area", (64, 80), "side of the square of the image's area"),
])
def test_a_sweep_has_a_row_a_size_and_a_plot(own, micro, tmp_path, capsys, flag, key, sides, label):
    strides = (32, 24)
    evaluate(*own, "--backbone", micro, "--inference", "sliding-window", "--strides", *strides,
             "--limit", 2, flag, *sides, "--json", tmp_path / "sweep.json",
             "--plot", tmp_path / "sweep.svg")
    output, rows = capsys.readouterr().out, results(tmp_path / "sweep.json")
    assert [(row["method"], row[key]) for row in rows] == [
        (f"sliding-window/{stride}", side) for side in sides for stride in strides]
    summary = [line.split() for line in output.split("\nmIoU ")[-1].splitlines()[:3]]
    assert summary == [[str(side) for side in sides]] + [
        [method, *(f"{row['miou']:.1f}" for row in rows if row["method"] == method)]
        for method in ("sliding-window/32", "sliding-window/24")]
    assert label in (tmp_path / "sweep.svg").read_text()


def test_own_words_leave_the_rest_to_the_background(own, micro, tmp_path):
    flags = ["--images", own[1], "--limit", 2,
             "--classes", "cat, grass | lawn", "--background", "wall, floor",
             "--prob-threshold", "0.999", "--backbone", micro, "--save-maps", tmp_path / "maps",
             "--state", tmp_path / "state"]

    def labels(name="*"):
        return np.concatenate([np.asarray(Image.open(path)).ravel() for path in
                               (tmp_path / "maps").glob(f"{name}.labels.png")])

    evaluate(*flags, "--logit-scale", 1)  # every probability is under the threshold
    assert (labels() == 0).all()
    evaluate(*flags, "--logit-scale", 1e6)  # none is
    assert (labels() > 0).any()
    header, lines = read_shares(tmp_path / "maps" / "shares.csv")
    assert header == ["image", "method", "background %", "cat %", "grass %"]
    assert [line[0] for line in lines] == ["0.png", "1.png"]
    for line in lines:
        areas = [100 * (labels(line[0]) == k).mean() for k in range(3)]
        assert [float(value) for value in line[2:]] == pytest.approx(areas, abs=0.006)


def test_the_teachers_backbone_may_be_named(own, micro, student, tmp_path, capsys):
    flags = [*own, "--limit", 2, "--checkpoint", student]
    evaluate(*flags, "--json", tmp_path / "alone.json")
    evaluate(*flags, "--backbone", micro, "--json", tmp_path / "named.json")
    (alone,), (named,) = results(tmp_path / "alone.json"), results(tmp_path / "named.json")
    assert alone == named and named["method"] == "spar"
    evaluate(*flags, "--backbone", micro, "--compare", "--stride", 32, "--json",
             tmp_path / "compared.json")
    assert results(tmp_path / "compared.json")[-1] == alone
    for extra in ([], ["--compare"]):
        assert re.search(f"--backbone tiny.* a student of {micro}",
                         refusal(capsys, evaluate_ovs, *flags, "--backbone", "tiny", *extra)[1])


def test_reordered_palettes_of_voc_are_read_by_their_colours(root, tmp_path):
    """As a tool leaves them that saves a mask anew; other palettes are taken as they are."""
    dataset = open_benchmark("voc21", root)
    expected = read_mask(dataset, 0)
    ids = np.array(Image.open(dataset.masks[0]))
    order = np.random.default_rng(0).permutation(256).astype(np.uint8)
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    shutil.copytree(root / "VOCdevkit" / "VOC2012", folder)
    mask = Image.fromarray(order[ids])
    palette = np.zeros((256, 3), np.uint8)
    palette[order] = voc_palette()
    mask.putpalette(palette.ravel().tolist())
    mask.save(folder / "SegmentationClass" / "2007_000.png")
    assert torch.equal(read_mask(open_benchmark("voc21", tmp_path), 0), expected)
    assert voc_palette()[[0, 1, 15, 20, 255]].tolist() == [  # background, aeroplane, person, ...
        [0, 0, 0], [128, 0, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192]]


def test_maps_have_the_colours_of_their_data_set():
    voc, city = (palette(benchmark_classes(name)) for name in ("voc20", "cityscapes"))
    assert voc[[0, 14, 255]].tolist() == [[128, 0, 0], [192, 128, 128], [0, 0, 0]]  # person: 14
    assert city[[0, 10, 18]].tolist() == [[128, 64, 128], [70, 130, 180], [119, 11, 32]]
    lab = palette(benchmark_classes("ade20k"))[:150].astype(int)
    apart = np.abs(lab[:, None] - lab[None]).sum(-1) + 1000 * np.eye(150, dtype=int)
    assert apart.min() > 20 and len(np.unique(lab, axis=0)) == 150
