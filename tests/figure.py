"""Draw the method from the demo: windows of an image, their features, the stitched teacher, and the
student's single pass. Colours are the first three principal components of the teacher's features.

    python extract_teacher.py && python distill.py && python tests/figure.py
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.patches import ConnectionPatch, Rectangle

from common import DEMO, cut_windows, dense_features, load_backbone, stitched_features
from data.files import fit_to_patches, read_image

IMAGE = DEMO / "test" / "images" / "026.jpg"
WINDOWS = [23, 56, 119]  # numbers of the windows that are shown
EDGES = ["#e8590c", "#2f9e44", "#1971c2"]


def draw(axes, pixels, edge=None):
    axes.imshow(pixels, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=edge is not None, color=edge, linewidth=3)


def point(figure, source, target, height, colour, reverse=False):
    """Draw an arrow between two neighbouring panels."""
    ends = {"xyA": (1.04, 0.5), "xyB": (-0.02, height)}
    if reverse:  # from right to left: what the student learns to match
        ends = {"xyA": (-0.02, 0.5), "xyB": (1.02, height)}
    figure.add_artist(ConnectionPatch(**ends, coordsA="axes fraction", coordsB="axes fraction",
                                      axesA=source, axesB=target, arrowstyle="-|>",
                                      mutation_scale=18, color=colour, linewidth=1.5))


@torch.no_grad()
def main():
    backbone, student = load_backbone("tiny"), load_backbone("runs/spar")
    image = fit_to_patches(read_image(IMAGE), backbone.patch)
    pixels = backbone.normalise(image)
    teacher = stitched_features(backbone, pixels, backbone.window, 24)
    flat = F.normalize(teacher.flatten(0, 1), dim=-1)
    mean = flat.mean(0)
    basis = torch.linalg.eigh((flat - mean).T @ (flat - mean)).eigenvectors[:, -3:].flip(1)
    scores = (flat - mean) @ basis
    low, high = scores.quantile(0.02, 0), scores.quantile(0.98, 0)

    def colours(features):
        projected = (F.normalize(features, dim=-1) - mean) @ basis
        return ((projected - low) / (high - low)).clamp(0, 1).numpy()

    figure, panels = plt.subplot_mosaic(
        [["image", "0", "teacher", "student"], ["image", "1", "teacher", "student"],
         ["image", "2", "teacher", "student"]], width_ratios=[3, 1, 3, 3], figsize=(12, 3.1),
        layout="constrained")
    draw(panels["image"], image.permute(1, 2, 0))
    side, height, width = backbone.window[0], *image.shape[1:]
    places = cut_windows(torch.stack(torch.meshgrid(
        torch.arange(height), torch.arange(width), indexing="ij")), backbone.window, 24)
    views = cut_windows(pixels, backbone.window, 24)
    for row, (number, edge) in enumerate(zip(WINDOWS, EDGES)):
        top, left = places[number][:, 0, 0].tolist()
        panels["image"].add_patch(Rectangle((left, top), side, side, fill=False, color=edge,
                                            linewidth=3))
        draw(panels[str(row)], colours(backbone.encode_dense(views[number][None])[0]), edge)
        point(figure, panels[str(row)], panels["teacher"], 0.82 - 0.32 * row, edge)
    draw(panels["teacher"], colours(teacher))
    draw(panels["student"], colours(dense_features(student, image)))
    point(figure, panels["student"], panels["teacher"], 0.5, "black", reverse=True)
    figure.savefig(DEMO / "method.png", dpi=80)


if __name__ == "__main__":
    main()
