"""LPOSS against dense solutions of its definition in float64, AnyUp in tiles against
its own published code."""
import functools
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate_ovs
import extras.anyup
from common import bilinear_strips, cut_windows, dense_features, label_strips, prepare
from data.files import RunError, UsageError
from conftest import run, stitch_by_definition
from data.benchmarks import Classes
from evaluate_ovs import Method, label_map
from extras.anyup import AnyUp, TiledAttention
from extras.lposs import (Lposs, best_synonyms, conjugate_gradients, patch_graph,
                          propagate_patches, read_settings)


# ---- LPOSS -----------------------------------------------------------------------------------

def adjacency(features, centres, k, gamma, sigma, power):
    """Return the graph of patches by its definition, edge by edge."""
    count = len(features)
    cosine = features @ features.T
    a = np.zeros((count, count))
    for i in range(count):
        for j in sorted(range(count), key=lambda j: -cosine[i, j])[:k]:
            if i != j:
                a[i, j] = (max(0.0, cosine[i, j]) ** gamma
                           * np.exp(-sigma * np.linalg.norm(centres[i] - centres[j]) ** power))
    w = a + a.T
    degrees = w.sum(1)
    degrees[degrees == 0] = 1
    return w / np.sqrt(degrees[:, None] * degrees[None])


def random_patches(height, width, dim=12, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((height * width, dim)) + 1.5 * rng.standard_normal((1, dim))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    centres = np.array([(16 * y + 8, 16 * x + 8) for y in range(height) for x in range(width)],
                       float)
    return features, centres, rng.uniform(-0.1, 0.4, (height * width, 5))


@pytest.mark.parametrize("shape, k, gamma, sigma, power", [
    ((9, 13), 30, 3.0, 0.01, 1.0),
    ((7, 5), 400, 3.0, 0.01, 1.0),
    ((12, 8), 10, 1.5, 0.002, 2.0),
    ((1, 3), 2, 3.0, 0.01, 1.0),
])
def test_lposs_equals_a_dense_solution(shape, k, gamma, sigma, power):
    features, centres, similarities = random_patches(*shape)
    similarities[:, 2] = 0  # a column of zeros stays one
    s = adjacency(features, centres, k, gamma, sigma, power)
    inputs = [torch.from_numpy(each).float() for each in (features, centres)]
    lposs = Lposs(k=k, gamma=gamma, sigma=sigma, power=power)
    graph = patch_graph(*inputs, lposs, values=100)  # in many parts
    assert np.abs(graph.to_dense().numpy() - s).max() < 1e-6
    expected = 0.05 * np.linalg.solve(np.eye(len(s)) - 0.95 * s, similarities)
    inputs.append(torch.from_numpy(similarities).float())
    converged = propagate_patches(*inputs, replace(lposs, steps=300)).numpy()
    assert np.abs(converged - expected).max() < 2e-6 * max(1, np.abs(expected).max())
    ten = propagate_patches(*inputs, lposs).numpy()
    assert (np.linalg.norm(ten - expected) < 2e-2 * np.linalg.norm(expected)
            and (ten[:, 2] == 0).all())


@pytest.mark.parametrize("text", [
    "k=0", "k=2.5", "k=x", "steps=0", "alpha=1", "alpha=-0.1", "gamma=nan", "sigma=inf",
    "lambda=1", "k", "=3"])
def test_wrong_settings_are_named(text):
    with pytest.raises(UsageError, match=f"--lposs {text}: "):
        read_settings(["gamma=2", text])


def test_settings_replace_the_defaults():
    assert read_settings([]) == Lposs()
    assert read_settings(["k=20", "sigma=2e-3"]) == Lposs(k=20, sigma=0.002)


def test_patch_without_similar_neighbours_keeps_its_similarities():
    features, centres = torch.eye(4), torch.zeros(4, 2)
    similarities = torch.rand(4, 3)
    propagated = propagate_patches(features, centres, similarities, Lposs())
    assert torch.allclose(propagated, 0.05 * similarities)


def test_each_column_has_its_own_step_sizes():
    """Ten steps on several columns equal ten steps on each alone."""
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(30, 30, dtype=torch.float64, generator=generator)
    matrix, targets = (root @ root.T / 30 + torch.eye(30),
                       torch.randn(4, 30, dtype=torch.float64, generator=generator)
                       * torch.tensor([1e-3, 1.0, 50.0, 0.0])[:, None])
    together = conjugate_gradients(lambda rows: rows @ matrix, targets, 10)
    for target, solution in zip(targets[:3], together):
        x, r = torch.zeros(30, dtype=torch.float64), target.clone()
        p = r.clone()
        for _ in range(10):
            step = r @ r / (p @ matrix @ p)
            x, new = x + step * p, r - step * (matrix @ p)
            p, r = new + (new @ new) / (r @ r) * p, new
        assert torch.allclose(solution, x, rtol=1e-9)
    assert (together[3] == 0).all()


def test_refined_prediction_end_to_end(backbone):
    """Method.predict equals its steps by hand, on an image whose sides are not multiples of the
    patch."""
    image = torch.randint(0, 256, (3, 70, 115), dtype=torch.uint8)
    classes = Classes([["a", "b"], ["c"]])
    texts = F.normalize(torch.randn(3, backbone.dim), dim=-1)
    lposs, size = Lposs(k=20), (70, 115)
    single = Method(backbone, "", lposs=lposs)
    features = F.normalize(dense_features(backbone, image), dim=-1)  # (4, 7, D)
    centres = torch.tensor([(16 * y + 8.0, 16 * x + 8.0) for y in range(4) for x in range(7)])
    patches = propagate_patches(features.flatten(0, 1), centres,
                                features.flatten(0, 1) @ texts.T, lposs).view(4, 7, 3)
    best = torch.stack([patches[..., :2].amax(-1), patches[..., 2]])
    expected = F.interpolate(best[None], size=size, mode="bilinear", align_corners=False)[0]
    clear = (expected[0] - expected[1]).abs() > 1e-5
    labels = single.predict(image, size, classes, texts)
    assert torch.equal(labels[clear], expected.argmax(0)[clear])
    assert clear.double().mean() > 0.9
    # one window, which is the single pass
    covering = Method(backbone, "", stride=64, window=(64, 64), lposs=lposs)
    # without synonyms, whose maximum is taken at pixels there and at patches here
    inputs = image[:, :64, :64], (64, 64), Classes([["a"], ["b"], ["c"]]), texts
    same = covering.predict(*inputs) == single.predict(*inputs)
    assert same.double().mean() > 0.999


@torch.no_grad()
def test_windows_in_one_graph_take_the_best_synonym_before_the_last_resize(backbone):
    """The patches of all windows are in one graph and stitched at the size of the network's
    input; there the maximum over synonyms is taken, and then resized."""
    image, size = torch.randint(0, 256, (3, 70, 115), dtype=torch.uint8), (130, 201)
    names = [[f"{k} {j}" for j in range(6)] for k in range(3)]
    # windows of 2 x 2 patches have many borders, where neighbouring pixels differ
    window, lposs = (32, 32), Lposs(k=30, alpha=0.5)
    method = Method(backbone, "", stride=24, window=window, batch_size=5, lposs=lposs)

    prepared = prepare(backbone, image)  # 64 x 112
    maps = torch.cat([backbone.encode_dense(view[None])
                      for view in cut_windows(prepared, window, 24)])
    maps = F.normalize(maps, dim=-1)  # (15, 2, 2, D)
    flat = maps.flatten(0, 2)
    # names that tell patches apart
    texts = F.normalize(flat[torch.randperm(60)[:18]] - flat.mean(0), dim=-1)
    centres = [(top + 16 * y + 8.0, left + 16 * x + 8.0)
               for top in (0, 24, 32) for left in (0, 24, 48, 72, 80)
               for y in range(2) for x in range(2)]
    patches = propagate_patches(flat, torch.tensor(centres), flat @ texts.T, lposs)

    def at_pixels(maps):  # (60, N) -> (64, 112, N)
        return stitch_by_definition(maps.view(15, 2, 2, -1).double(), (64, 112), window, 24, 1,
                                    (64, 112))

    def resized(maps):  # -> (N, 130, 201)
        return F.interpolate(maps.permute(2, 0, 1)[None], size=size, mode="bilinear",
                             align_corners=False)[0]

    def best(maps):  # (..., 18) -> (..., 3)
        return maps.unflatten(-1, (3, 6)).amax(-1)

    expected = resized(best(at_pixels(patches)))
    labels = method.predict(image, size, Classes(names), texts)
    first, second = expected.topk(2, dim=0).values
    clear = first - second > 1e-5
    assert clear.double().mean() > 0.99
    assert torch.equal(labels[clear], expected.argmax(0)[clear])
    # the maximum of patches, or after the last resize, would give other labels
    for other in (resized(at_pixels(best(patches))).argmax(0),
                  best(resized(at_pixels(patches)).permute(1, 2, 0)).argmax(-1)):
        assert (labels != other)[clear].any()


def test_the_best_synonym_counts():
    similarities = torch.randn(4, 5, 6)
    expected = torch.stack([similarities[..., 0], similarities[..., 1:4].amax(-1),
                            similarities[..., 4:].amax(-1)], -1)
    assert torch.equal(best_synonyms(similarities, torch.tensor([0, 1, 1, 1, 2, 2])), expected)


# ---- AnyUp -----------------------------------------------------------------------------------

ANYUP = os.environ.get("SPAR_ANYUP_DIR")
needs_anyup = pytest.mark.skipif(
    not ANYUP, reason="AnyUp's public code is not here; SPAR_ANYUP_DIR names a clone of "
                      "https://github.com/wimmerth/anyup")


@pytest.fixture(scope="module")
def anyup():
    torch.manual_seed(0)
    ours = AnyUp(hub_dir=ANYUP, random_init=True)
    for parameter in ours.block.parameters():
        parameter.data.mul_(3)  # attention that is far from even
    return ours


def published(ours, image, similarities, size):
    """Return the output of the published network's own forward pass: (N, H, W)."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    keep, ours.model.cross_decode = ours.model.cross_decode, ours.block
    try:
        with torch.no_grad():
            return ours.model((image.float() / 255 - mean)[None] / std,
                              similarities.permute(2, 0, 1)[None], size)[0]
    finally:
        ours.model.cross_decode = keep


@needs_anyup
@pytest.mark.parametrize("side, grid, size, names", [
    ((96, 128), (6, 8), (96, 128), 5),
    ((112, 80), (7, 5), (75, 61), 19),
    ((48, 160), (3, 10), (60, 201), 150),
    ((64, 64), (4, 4), (33, 40), 1),
])
def test_anyup_in_tiles_equals_its_own_output(anyup, side, grid, size, names, monkeypatch):
    small = functools.partial(TiledAttention, side=24)
    monkeypatch.setattr(extras.anyup, "TiledAttention", small)
    image = torch.randint(0, 256, (3, *side), dtype=torch.uint8)
    similarities = 0.3 * torch.rand(*grid, names)
    strip = anyup.strips(image, similarities, size)
    ours = torch.cat([strip(first, min(first + 37, size[0]))
                      for first in range(0, size[0], 37)], 1)
    theirs = published(anyup, image, similarities, size)
    assert ours.shape == theirs.shape == (names, *size)
    assert (ours - theirs).abs().max() < 2e-6
    # a convex combination
    assert ours.min() >= similarities.min() - 1e-6 and ours.max() <= similarities.max() + 1e-6


@needs_anyup
def test_anyup_by_the_command_line(micro, photos, tmp_path):
    run(evaluate_ovs, "--backbone", micro, "--random-init", "--images", photos, "--limit", 2,
        "--classes", "cat, grass | lawn, sky", "--upsampler", "bilinear", "anyup", "--hub-dir",
        ANYUP, "--save-maps", tmp_path, "--state", tmp_path / "state")
    for label in ("single-pass", "single-pass+anyup"):
        assert (tmp_path / label / "0.png.labels.png").is_file()


def test_anyup_without_its_code_or_weights(tmp_path):
    with pytest.raises(UsageError, match="hubconf.py"):
        AnyUp(hub_dir=tmp_path)
    (tmp_path / "hubconf.py").write_text("")
    with pytest.raises(RunError, match="anyup_multi_backbone.pth does not exist"):
        AnyUp(hub_dir=tmp_path)


def test_anyup_leaves_images_of_one_patch_to_bilinear_upsampling():
    image, similarities = torch.zeros(3, 16, 64, dtype=torch.uint8), torch.rand(1, 4, 3)
    strips = AnyUp.strips(None, image, similarities, (20, 70))
    assert torch.equal(strips(0, 20), bilinear_strips(similarities, (20, 70))(0, 20))


def test_bilinear_strips_equal_interpolation(backbone, monkeypatch):
    image = torch.randint(0, 256, (3, 90, 130), dtype=torch.uint8)
    texts = F.normalize(torch.randn(7, backbone.dim), dim=-1)
    similarities = F.normalize(dense_features(backbone, image), dim=-1) @ texts.T
    for size in ((90, 130), (40, 200), tuple(similarities.shape[:2])):
        expected = F.interpolate(similarities.permute(2, 0, 1)[None].double(), size=size,
                                 mode="bilinear", align_corners=False)[0]
        strip = bilinear_strips(similarities, size)
        joined = torch.cat([strip(first, min(first + 13, size[0]))
                            for first in range(0, size[0], 13)], 1)
        assert (joined - expected).abs().max() < 1e-6
        monkeypatch.setattr(evaluate_ovs, "label_strips",
                            functools.partial(label_strips, values=7 * size[1] * 11))
        assert (label_map(strip, size, torch.arange(7))
                == expected.argmax(0)).double().mean() > 0.9999
