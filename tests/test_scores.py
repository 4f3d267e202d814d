"""Class lists, confusion matrix and scores, label maps."""
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score

from common import bilinear_strips
from data.files import RunError, UsageError
from data.benchmarks import Classes, label_table, read_classes, read_labels
from evaluate_ovs import confusion_matrix, label_map, scores


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    count = 9
    labels = rng.integers(0, count - 2, (40, 50))
    predictions = rng.integers(0, count - 1, (40, 50))  # class 8 is in neither
    predictions = np.where(rng.uniform(size=labels.shape) < 0.5, labels, predictions)
    labels[rng.uniform(size=labels.shape) < 0.2] = 255
    confusion = sum(confusion_matrix(torch.from_numpy(a), torch.from_numpy(b), count)
                    for a, b in zip(labels, predictions))
    kept = labels != 255
    assert (confusion.numpy()
            == sklearn_confusion(labels[kept], predictions[kept], labels=range(count))).all()
    iou, miou, accuracy = scores(confusion)
    expected = jaccard_score(labels[kept], predictions[kept], labels=range(count - 1),
                             average=None)
    assert np.allclose(iou[:-1].numpy(), 100 * expected) and torch.isnan(iou[-1])
    assert abs(miou - 100 * expected.mean()) < 1e-9
    assert abs(accuracy - 100 * (labels[kept] == predictions[kept]).mean()) < 1e-9


def test_class_lists(tmp_path):
    assert read_classes("cat, grass | lawn,sky").names == [["cat"], ["grass", "lawn"], ["sky"]]
    file = tmp_path / "classes.txt"
    file.write_text("background\ncat, kitten\n sky \n")
    assert read_classes(file).names == [["background"], ["cat", "kitten"], ["sky"]]
    assert read_classes(file).class_of_name.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("source, message", [
    ("", "empty"),
    ("cat,,dog", "class 2: an empty name"),
    ("cat, dog, Cat", "class 3: 'Cat' is a name of class 1"),
    ("missing.txt", "no such file"),
])
def test_bad_class_lists_are_refused(source, message):
    with pytest.raises(UsageError, match=f"^classes.*{message}"):
        read_classes(source)


def test_a_class_is_as_similar_as_its_best_synonym():
    similarities = torch.randn(20, 30, 6)
    classes = Classes([["a"], ["b", "c", "d"], ["e", "f"]])
    expected = torch.stack([similarities[..., 0], similarities[..., 1:4].amax(-1),
                            similarities[..., 4:].amax(-1)]).argmax(0)
    strip = bilinear_strips(similarities, (20, 30))
    assert torch.equal(label_map(strip, (20, 30), classes.class_of_name), expected)


def test_masks_are_checked(tmp_path):
    def read_mask(path, size, count):
        return read_labels(path, size, label_table("plain", count))

    labels = np.array([[0, 1, 255], [3, 7, 0]], np.uint8)
    Image.fromarray(labels).save(tmp_path / "mask.png")
    assert (read_mask(tmp_path / "mask.png", (2, 3), 8).numpy() == labels).all()
    with pytest.raises(RunError,
                       match="mask.png holds labels 3, 7; with 3 classes they go from 0 to 2"):
        read_mask(tmp_path / "mask.png", (2, 3), 3)
    with pytest.raises(RunError, match="mask.png is 2 x 3.*4 x 4"):
        read_mask(tmp_path / "mask.png", (4, 4), 8)
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "rgb.png")
    with pytest.raises(RunError, match="3 channels"):
        read_mask(tmp_path / "rgb.png", (2, 3), 8)
