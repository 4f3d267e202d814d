"""evaluate_probes.py: each probe against a naive version in float64 or a library's own, and the
stage as users run it."""
import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, copy_files, refusal, results, run, save_image
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import f1_score
from sklearn.neighbors import NearestNeighbors

import evaluate_probes
from common import start_runtime
from data.files import RunError
from data.benchmarks import open_benchmark, own_images, read_classes, read_mask, true_segments
from evaluate_ovs import Method
from evaluate_probes import Fold, Prober
from extras import probes
from extras.probes import (Features, Settings, bank, crop_logits, match_segments, nearest,
                           panoptic_scores, patch_shares, pool, random_crop, rare_patches,
                           read_head, schedule, train_head, vote)

CLASSES = "sky, grass | lawn, red ball, house"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Eight images of different sizes and masks of blocks that share their colours, two folders;
    class 3 is in the last two alone, and the first mask is ignored but for a corner."""
    folder, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(3)
    colours = np.array([[90, 140, 230], [60, 170, 60], [220, 40, 40], [150, 110, 80]])
    for k in range(8):
        height, width = (int(side) for side in rng.integers(70, 130, 2))
        blocks = rng.integers(0, 3 if k < 6 else 4, (3, 4))
        labels = np.kron(blocks, np.ones((45, 35), int))[:height, :width]
        pixels = colours[labels] + rng.normal(0, 12, (*labels.shape, 3))
        labels[rng.uniform(size=labels.shape) < 0.05] = 255
        if k == 0:
            labels[20:] = 255
        for name, array in (("images", pixels.clip(0, 255)), ("masks", labels)):
            (folder / name).mkdir(exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(folder / name / f"{k}.png")
    return folder / "images", folder / "masks"


@pytest.fixture
def features(backbone, labelled, tmp_path):
    """The labelled images' features, none of which is kept yet."""
    dataset = own_images([labelled[0]], labelled[1], read_classes(CLASSES))
    return Features(Method(backbone, "micro"), dataset, start_runtime("cpu"), 2, tmp_path)


def prober(folder, **settings):
    return Prober(Settings(**settings), None, folder, folder / "head", None, folder)


def fold(features, seed=0):
    return Fold(features, [0, 1, 2, 6], features, [3, 4, 5, 7], seed)


# ---- kNN -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [[500], [40, 1, 300, 159], [3, 4]])
def test_nearest_equals_scikit_learns(sizes):
    rng = torch.Generator().manual_seed(1)
    queries, rows = (F.normalize(torch.randn(n, 16, generator=rng), dim=-1)
                     for n in (70, sum(sizes)))
    chunks = zip(rows.split(sizes), torch.eye(len(rows)).split(sizes))
    cosines, found, shares = nearest(queries, chunks, 12, block=32)
    k = min(12, len(rows))
    distances, expected = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(
        rows.double().numpy()).kneighbors(queries.double().numpy())
    assert np.allclose(cosines[:, :k], 1 - distances, atol=1e-6)
    assert (np.sort(found[:, :k]) == np.sort(expected)).all()
    assert cosines[:, k:].eq(-torch.inf).all()  # which have no vote
    weights = vote(cosines, shares[found], 0.1)
    assert torch.allclose(weights.sum(1), torch.ones(70), atol=1e-6)


@pytest.mark.parametrize("size, grid", [((48, 80), (3, 5)), ((50, 71), (3, 4)), ((9, 16), (1, 1))])
def test_patch_shares_equal_counting_pixel_by_pixel(size, grid):
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 4, size))
    labels[labels == 3] = 255
    labels[:, :20] = 255
    expected = torch.zeros(*grid, 3)
    for y in range(grid[0] * 16):
        for x in range(grid[1] * 16):
            label = int(labels[int((y + 0.5) * size[0] / (grid[0] * 16)),
                               int((x + 0.5) * size[1] / (grid[1] * 16))])
            if label != 255:
                expected[y // 16, x // 16, label] += 1 / 256
    assert torch.equal(patch_shares(labels, grid, 16, 3), expected.flatten(0, 1))


def test_a_bounded_bank_favours_rare_classes():
    only = torch.zeros(100, 3)
    only[:, 0], only[7] = 1, torch.tensor([0, 1.0, 0])
    assert len(rare_patches(only, 1000, None)) == 100
    for k in range(20):  # 99 u against 1 u
        generator = torch.Generator().manual_seed(k)
        drawn = torch.rand(100, generator=torch.Generator().manual_seed(k))
        score = torch.where(only[:, 1] > 0, 1, 99) * drawn
        kept = rare_patches(only, 10, generator)
        assert kept.tolist() == sorted(score.topk(10, largest=False).indices.tolist())


@pytest.mark.parametrize("settings", [{}, {"k": 5}, {"bank_size": 40}, {"k": 10_000}])
def test_knn_equals_brute_force(features, tmp_path, settings):
    confusion, images = prober(tmp_path, **settings).knn(fold(features))
    settings = Settings(**settings)
    vectors, shares = map(torch.cat, zip(*bank(features, [0, 1, 2, 6], settings, 0, rows=7)))
    if not settings.bank_size:  # every labelled patch is there
        counts = [(read_mask(features.dataset, k) != 255).sum() for k in (0, 1, 2, 6)]
        assert abs(shares.float().sum() * 256 / sum(counts) - 1) < 0.3
    else:
        assert len(vectors) <= 40
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for index, one_map in features.stream([3, 4, 5, 7]):
        queries = F.normalize(one_map.flatten(0, 1).float(), dim=-1).half().double()
        cosines, order = (queries @ vectors.double().T).sort(descending=True)
        votes = torch.exp((cosines - cosines[:, :1]) / 0.02)[:, :settings.k]
        weights = torch.einsum("qk,qkc->qc", votes, shares[order[:, :settings.k]].double())
        weights /= votes.sum(1, keepdim=True)
        labels = read_mask(features.dataset, index)
        enlarged = F.interpolate(weights.T.view(1, 4, *one_map.shape[:2]), size=labels.shape,
                                 mode="bilinear", align_corners=False)[0].argmax(0)
        kept = labels != 255
        expected += torch.from_numpy(sklearn_confusion(labels[kept], enlarged[kept],
                                                       labels=range(4)))
    assert images == 4 and confusion.sum() == expected.sum()
    assert (confusion - expected).abs().sum() <= 0.002 * expected.sum()  # fp32 against fp64: ties


def test_a_bank_of_ignored_pixels_alone_is_an_error(features, tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "read_mask", lambda dataset, k: torch.full((64, 64), 255))
    with pytest.raises(RunError, match="nothing to learn from"):
        prober(tmp_path).knn(fold(features))


@pytest.mark.slow
def test_the_bank_is_never_in_memory():
    """A bank of 1.6 GB in an address space that grows by no more than 0.6 GB."""
    script = (
        "import resource, torch; from extras.probes import nearest; torch.set_num_threads(1);"
        "bank = lambda n: ((torch.randn(2 ** 15, 768), torch.ones(2 ** 15, 1)) for _ in range(n));"
        "queries = torch.randn(64, 768); nearest(queries, [(queries, queries)], 30);"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize();"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 6 * 10 ** 8,) * 2);"
        "rows = nearest(queries, bank(16), 30)[1]; print(rows.max().item() > 2 ** 18)")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


# ---- linear --------------------------------------------------------------------------------------

def naive_step(weight, bias, samples, moments, step, settings):
    """One step of AdamW in float64 with a gradient by hand: the mean loss."""
    gradients, losses = [torch.zeros_like(weight), torch.zeros_like(bias)], 0
    for features, labels in samples:
        (height, width), (rows, columns) = features.shape[:2], labels.shape
        down = F.interpolate(torch.eye(height).double()[None], size=rows, mode="linear")[0].T
        across = F.interpolate(torch.eye(width).double()[None], size=columns, mode="linear")[0].T
        x = features.double()
        logits = torch.einsum("yh,xw,hwk->yxk", down, across, x @ weight.T + bias)
        kept = labels != 255
        probabilities = logits.softmax(-1)
        target = F.one_hot(labels.where(kept, 0), len(bias)).double()
        losses -= (logits.log_softmax(-1) * target).sum(-1)[kept].sum() / kept.sum()
        error = (probabilities - target) * kept[..., None] / kept.sum()
        low = torch.einsum("yh,xw,yxk->hwk", down, across, error)
        gradients[0] += torch.einsum("hwk,hwd->kd", low, x) / settings.images_per_step
        gradients[1] += low.sum((0, 1)) / settings.images_per_step
    rate = settings.lr * (1 - step / settings.steps) ** 0.9
    for value, gradient, (first, second) in zip((weight, bias), gradients, moments):
        value *= 1 - rate * settings.weight_decay
        first.mul_(0.9).add_(0.1 * gradient)
        second.mul_(0.999).add_(0.001 * gradient ** 2)
        value -= rate * (first / (1 - 0.9 ** (step + 1))) / (
            (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    return losses / settings.images_per_step


@pytest.mark.parametrize("steps", [1, 10])
def test_linear_training_equals_a_derivation_by_hand(steps, tmp_path, monkeypatch):
    settings = Settings(steps=steps, lr=1e-2)
    rng = torch.Generator().manual_seed(0)
    sizes = [(2, 3), (1, 4), (3, 3), (2, 2)]
    samples = [(torch.randn(h, w, 8, generator=rng).half(),
                torch.randint(0, 5, (h * 16, w * 16), generator=rng)) for h, w in sizes]
    for _, labels in samples:
        labels[labels == 4] = 255
    samples.append((torch.zeros(0, 0, 8), samples[0][1]))  # an image that cannot be read
    monkeypatch.setattr(probes, "load_sample",
                        lambda features, index, flip, crop, seed: samples[index])
    features = SimpleNamespace(dim=8, workers=0, dataset=SimpleNamespace(classes="abcd"),
                               encode=lambda loaded: loaded, runtime=start_runtime("cpu"))
    torch.manual_seed(3)
    start = torch.nn.Linear(8, 4)
    weight, bias = start.weight.detach().double(), start.bias.detach().double()
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in (weight, bias)]
    order = [index for index, _ in schedule(range(5), settings, 3)]
    for step in range(steps):
        batch = [samples[index] for index in order[16 * step:16 * step + 16] if index < 4]
        naive_step(weight, bias, batch, moments, step, settings)
    head = train_head(features, range(5), settings, 3, tmp_path / "state.pt")
    assert torch.allclose(head.weight.double(), weight, atol=2e-6)
    assert torch.allclose(head.bias.double(), bias, atol=2e-6)


@pytest.mark.parametrize("crop", [None, 32])
def test_an_interrupted_head_is_trained_to_the_same(features, tmp_path, monkeypatch, crop):
    monkeypatch.setattr(probes.time, "monotonic", iter(range(0, 10 ** 6, 31)).__next__)
    settings, usual = Settings(steps=6, lr=1e-2, crop=crop), probes.image_loss

    def head(name, stop=None):
        calls = iter(range(10 ** 6))

        def loss(*values):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return usual(*values)
        monkeypatch.setattr(probes, "image_loss", loss)
        return train_head(features, [0, 1, 2, 6], settings, 0, tmp_path / name).state_dict()
    whole = head("whole.pt")
    with pytest.raises(KeyboardInterrupt):
        head("part.pt", stop=4 * 16 + 3)
    assert torch.load(tmp_path / "part.pt", weights_only=True)["step"] == 4
    resumed = head("part.pt")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    (tmp_path / "part.pt").write_bytes(b"spoilt")
    with pytest.raises(RunError, match="part.pt cannot be read.*trained anew"):
        head("part.pt")


def test_the_schedule_shows_every_image_as_often():
    samples = schedule([3, 5, 8], Settings(steps=9), seed=0)
    assert len(samples) == 9 * 16 and {k for k, _ in samples} == {3, 5, 8}
    for first in range(0, 144, 3):
        assert {k for k, _ in samples[first:first + 3]} == {3, 5, 8}
    assert 40 < sum(flip for _, flip in samples) < 104


@pytest.mark.parametrize("size", [(80, 120), (130, 90), (40, 300)])
def test_crops_show_every_pixel_and_windows_are_spread_evenly(size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    labels = torch.randint(0, 4, size)
    shown = set()
    for seed in range(12):
        pixels, cropped = random_crop(image, labels, 64, np.random.default_rng(seed))
        assert pixels.shape == (3, 64, 64) and pixels.dtype == torch.uint8
        assert cropped.shape == (64, 64) and (pixels[:, cropped == 255] == 0).all()
        shown |= set(cropped.unique().tolist())
    assert shown >= {0, 1, 2, 3}

    def encode(window):  # 4 x 4 patches' mean pixels
        assert window.shape == (3, 64, 64)
        return F.avg_pool2d(window[None].float(), 16)[0].permute(1, 2, 0) / 255
    head = torch.nn.Linear(3, 2).requires_grad_(False)
    logits = crop_logits(head, encode, image, 64)
    scale = 64 / min(size)
    assert logits.shape == (*[round(side * scale) for side in size], 2)
    turned = crop_logits(head, lambda window: encode(window.transpose(1, 2)).transpose(0, 1),
                         image.transpose(1, 2), 64)
    assert torch.allclose(turned.transpose(0, 1), logits, atol=1e-4)


# ---- panoptic ------------------------------------------------------------------------------------

def test_pooling_equals_a_loop_over_pixels():
    features, segments = torch.randn(3, 4, 6), torch.randint(-1, 5, (50, 61))
    segments[segments == 3] = 0
    segments[20, 30] = 3  # one pixel
    pooled, areas = pool(features, segments, 5)
    for k in range(5):
        places = (segments == k).nonzero().tolist()
        values = [features[y * 3 // 50, x * 4 // 61] for y, x in places]
        assert areas[k] == len(places)
        assert torch.allclose(pooled[k], torch.stack(values).mean(0), atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_panoptic_quality_is_the_f1_of_classes(seed):
    rng = np.random.default_rng(seed)
    true, predicted = rng.integers(0, 6, (2, 80))
    predicted = np.where(rng.uniform(size=80) < 0.6, true, predicted)
    counts = match_segments(*map(torch.from_numpy, (true, predicted)), torch.ones(80), 8)
    each, pq, sq, rq = panoptic_scores(counts)
    assert each[6:].isnan().all()
    assert np.isclose(pq, 100 * f1_score(true, predicted, average="macro")) and np.isclose(pq, rq)
    assert sq == 100


@pytest.mark.parametrize("seed", range(4))
def test_merged_panoptic_quality_equals_torchmetrics(seed):
    torchmetrics = pytest.importorskip("torchmetrics.detection")
    rng = np.random.default_rng(seed)
    metric = torchmetrics.PanopticQuality({0, 1}, {2, 3, 4}, return_sq_and_rq=True)
    counts = torch.zeros(4, 5, dtype=torch.float64)
    for _ in range(6):
        count = 9
        segments = torch.from_numpy(np.kron(rng.integers(0, count, (6, 7)), np.ones((5, 4), int)))
        present, segments = segments.unique(return_inverse=True)
        true = torch.from_numpy(rng.integers(0, 5, len(present)))
        stuff = {}  # one segment a class
        for k, each in enumerate(true.tolist()):
            if each > 1:
                segments[segments == k] = stuff.setdefault(each, k)
        present, segments = segments.unique(return_inverse=True)
        true = true[present]
        named = torch.where(torch.rand(len(true)) < 0.6, true,
                            torch.from_numpy(rng.integers(0, 5, len(true))))
        areas = segments.flatten().bincount()
        counts += match_segments(true, named, areas, 5, {2, 3, 4})
        metric.update(torch.stack([named[segments], segments], -1)[None],
                      torch.stack([true[segments], segments], -1)[None])
    _, pq, sq, rq = panoptic_scores(counts)
    assert np.allclose([pq, sq, rq], 100 * metric.compute().numpy(), atol=1e-3)


def test_segments_are_read_from_cocos_panoptic_format(tmp_path):
    """COCO's panoptic format: ids in RGB, crowds and void left out, things told from stuff."""
    root, name = tmp_path / "cityscapes", "frankfurt_000000_000294"
    ids = np.zeros((20, 30), int)
    ids[:10], ids[10:, :15], ids[10:, 15:20] = 7, 26001, 26002
    ids[15:, 25:] = 26000  # a crowd
    labels = np.where(ids >= 26000, 13, np.where(ids == 7, 0, 255)).astype(np.uint8)
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    for array, path in (
            (0 * rgb, f"leftImg8bit/val/frankfurt/{name}_leftImg8bit.png"),
            (labels, f"gtFine/val/frankfurt/{name}_gtFine_labelTrainIds.png"),
            (rgb, f"gtFine/cityscapes_panoptic_val/{name}_gtFine_panoptic.png")):
        save_image(array, root / path)
    report = {
        "categories": [{"id": 7, "isthing": 0}, {"id": 26, "isthing": 1}],
        "annotations": [{
            "image_id": name, "file_name": f"{name}_gtFine_panoptic.png",
            "segments_info": [{"id": 7, "category_id": 7, "iscrowd": 0},
                              {"id": 26001, "category_id": 26, "iscrowd": 0},
                              {"id": 26002, "category_id": 26, "iscrowd": 0},
                              {"id": 26000, "category_id": 26, "iscrowd": 1}]}]}
    listing = root / "gtFine" / "cityscapes_panoptic_val.json"
    listing.write_text(json.dumps(report))
    dataset = open_benchmark("cityscapes", tmp_path, panoptic=True)
    assert dataset.things == {13}
    segments, classes = true_segments(dataset, 0, read_mask(dataset, 0))
    assert classes.tolist() == [0, 13, 13]
    assert (segments[:10] == 0).all() and (segments[10:, :15] == 1).all()
    assert (segments[15:, 25:] == -1).all() and (segments[10:15, 20:] == -1).all()
    listing.write_text('{"categories": 3}')
    with pytest.raises(RunError, match="panoptic format"):
        open_benchmark("cityscapes", tmp_path, panoptic=True)


# ---- the stage -----------------------------------------------------------------------------------

def probe(*flags):
    run(evaluate_probes, *flags)


def own(backbone, images, masks, *flags):
    return ["--backbone", backbone, "--images", images, "--masks", masks, "--classes", CLASSES,
            *flags]


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def probed(micro, labelled, tmp_path_factory):
    """The folder in which all probes ran on the labelled images, the flags, and the output."""
    folder, output = tmp_path_factory.mktemp("probed"), io.StringIO()
    flags = own(micro, *labelled, "--steps", 3)
    with contextlib.chdir(folder), contextlib.redirect_stdout(output):
        probe(*flags, "--json", "out.json", "--save-maps", "maps")
    return folder, flags, output.getvalue()


def test_own_images_are_scored_in_two_folds(probed):
    folder, _, table = probed
    assert re.search("knn +single-pass +8 +mIoU", table) and "PQ, stuff merged" in table
    scored = {result["probe"]: result for result in results(folder / "out.json")}
    assert list(scored) == ["knn", "linear", "panoptic"]
    assert all(each["images"] == 8 and each["method"] == "single-pass"
               for each in scored.values())
    assert scored["knn"]["miou"] > 40  # the classes are colours
    assert set(scored["linear"]["per_class_iou"]) == {"sky", "grass", "red ball", "house"}
    assert {"pq", "sq", "rq", "pq_merged"} <= scored["panoptic"].keys()
    assert len(list((folder / "maps").rglob("*.labels.png"))) == 16
    assert not list((folder / "runs" / "probes").iterdir())
    assert len(list((folder / "runs" / "heads").iterdir())) == 2


def test_a_head_labels_more_images(probed, micro, labelled, tmp_path):
    folder, *_ = probed
    probe("--head", min((folder / "runs" / "heads").iterdir()), "--backbone", micro,
          "--images", labelled[0], "--save-maps", tmp_path)
    one, = (folder / "maps").rglob("linear/1.png.labels.png")
    assert np.array_equal(np.array(Image.open(one)),
                          np.array(Image.open(tmp_path / "1.png.labels.png")))


@pytest.mark.slow
def test_kept_features_and_heads_give_the_same(probed, work, monkeypatch):
    """A full disk keeps no features; damaged ones are named."""
    folder, flags, _ = probed
    heads = folder / "runs" / "heads"
    dates = {path: path.stat().st_mtime_ns for path in heads.iterdir()}

    def again(*more):
        probe(*flags, *more, "--json", "out.json")
        assert results("out.json") == results(folder / "out.json")
    again("--heads", heads, "--keep-features", "kept")
    assert {path: path.stat().st_mtime_ns for path in heads.iterdir()} == dates
    assert len(list((work / "kept").rglob("*.npy"))) == 8
    again("--heads", "anew", "--keep-features", "kept")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 10 ** 6))
        again("--heads", heads, "--keep-features", "none")
    assert not (work / "none").exists()
    path = next((work / "kept").rglob("3.npy"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RunError, match=re.escape(f"{path.relative_to(work)} cannot be read")):
        again("--heads", heads, "--keep-features", "kept")


def test_data_sets_of_one_folder_name_have_heads_of_their_own(micro, labelled, work):
    for name, numbers in (("a", (1, 2)), ("b", (3, 4))):
        for source in labelled:
            copy_files(source, work / name / source.name, *(f"{k}.png" for k in numbers))
        probe(*own(micro, f"{name}/images", f"{name}/masks", "--probe", "linear", "--steps", 1))
    assert len(list((work / "runs" / "heads").iterdir())) == 4


@pytest.mark.slow
def test_killed_runs_and_two_processes_give_the_same(fork, micro, labelled, work):
    """Killed when there are so many files of its state, started again: the same to the last bit."""
    flags = own(micro, *labelled, "--steps", 4, "--inference", "sliding-window", "--stride", 24, 32,
                "--device", "cpu", "--json", "out.json")

    probe(*flags)
    whole, kills = results("out.json"), []
    shutil.rmtree("runs")
    for count in (2, 6, 12, 18, 24):
        kills += fork("evaluate_probes", flags, number=signal.SIGKILL, watched=work / "runs",
                      count=count)[0]
    assert kills.count(-signal.SIGKILL) > 2, kills
    assert fork("evaluate_probes", flags)[0] == [0]
    assert results("out.json") == whole
    shutil.rmtree("runs/heads")
    codes, outputs = fork("evaluate_probes", flags, world=2)
    assert codes == [0, 0], outputs
    for one, two in zip(whole, results("out.json"), strict=True):
        assert one["method"] == two["method"] and one["images"] == two["images"]
        key = "pq" if one["probe"] == "panoptic" else "miou"
        assert abs(one[key] - two[key]) < 0.2


def test_probes_learn_from_other_images(micro, labelled, work, capsys):
    few = [copy_files(source, work / "few" / source.name, *(f"{k}.png" for k in range(4)))
           for source in labelled]
    (few[0] / "1.png").write_bytes(b"spoilt")
    flags = own(micro, *labelled, "--train-images", few[0], "--train-masks", few[1])
    probe(*flags, "--probe", "knn", "panoptic", "--train-share", 0.7,
          "--seeds", 0, 1, "--bank-size", 60, "--json", "out.json")
    assert "±" in capsys.readouterr().out
    rows = results("out.json")
    assert [row["draws"] for row in rows] == [2, 1]  # nothing is random in the panoptic probe
    assert rows[0]["per_class_iou"]["house"] == 0  # in no mask to learn from
    with pytest.raises(RunError, match="problems"):
        probe(*flags, "--check-data")
    assert "1.png cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    ("--train-images x", "go together"), ("--masks x", "goes with --images"),
    ("--images x", "needs --masks"), ("--limit 1", "two images"), ("--dataset cats", "unknown"),
    ("--images x --masks y --classes a --train-images z", "go together"),
    ("--crop 50 --limit 2", "multiple of the patch"), ("--probe knn --crop 64", "--probe linear"),
    ("--head x --images y", "does not exist"), ("--k 0", "at least 1"),
    ("--train-share 2", "at most 1"), ("--temperature nan", "must be"),
    ("--seeds -1", "at least 0"), ("--json out.txt", ".json"), ("--heads=", "empty"),
    ("--probe cnn", "invalid choice")])
def test_a_call_that_cannot_work_is_named(flags, message, work, capsys):
    _, line = refusal(capsys, evaluate_probes, "--backbone", "tiny", *flags.split())
    assert message in line


def test_heads_that_do_not_fit_are_refused(probed, micro, labelled, work):
    head, images = next((probed[0] / "runs" / "heads").iterdir()), labelled[0]
    flags = ["--head", head, "--images", images]
    with pytest.raises(RunError, match="weights was"):
        probe(*flags, "--backbone", "tiny")
    with pytest.raises(RunError, match="stride was 0 and is 32"):
        probe(*flags, "--backbone", micro, "--inference", "sliding-window", "--stride", 32)
    tensors, about = load_file(head), read_head(head, "cpu")[1]
    damaged = {
        "it lacks|NoneType": (tensors, None),
        "does not say its crop": (tensors, {key: about[key] for key in about if key != "crop"}),
        "one output per class": (tensors, about | {"classes": [["a"]]}),
        "not finite": ({key: value * torch.nan for key, value in tensors.items()}, about),
        "weight": ({"bias": tensors["bias"]}, about)}
    for message, (values, header) in damaged.items():
        save_file(values, "bad.safetensors", header and {"probe": json.dumps(header)})
        with pytest.raises(RunError, match=f"bad.safetensors cannot be read.*({message})"):
            probe("--head", "bad.safetensors", "--backbone", micro, "--images", images)


def test_labels_that_a_class_list_lacks_are_named(micro, labelled, work):
    save_image(np.zeros((70, 70, 3), np.uint8), work / "a" / "0.png")
    save_image(np.full((70, 70), 7, np.uint8), work / "b" / "0.png")
    with pytest.raises(RunError, match="labels 7"):
        probe(*own(micro, *labelled, "--train-images", "a", "--train-masks", "b"))
