"""Class lists, confusion matrix and scores, label maps."""
import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score

from common import bilinear_strips
from data.files import UsageError
from data.benchmarks import BENCHMARKS, Classes, benchmark_classes, read_classes
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


def test_class_lists_are_read(tmp_path):
    assert read_classes("cat, grass | lawn,sky").names == [["cat"], ["grass", "lawn"], ["sky"]]
    file = tmp_path / "classes.txt"
    file.write_text("background\ncat, kitten\n sky \n")
    assert read_classes(file).names == [["background"], ["cat", "kitten"], ["sky"]]
    assert read_classes(file).class_of_name.tolist() == [0, 1, 1, 2]


def test_class_files_are_the_benchmarks():
    names = {name: benchmark_classes(name) for name in BENCHMARKS}
    assert {name: (len(classes), len(classes.flat)) for name, classes in names.items()} == {
        "voc21": (21, 56), "voc20": (20, 30), "cityscapes": (19, 19), "ade20k": (150, 150),
        "context60": (60, 60), "context59": (59, 59), "coco-object": (81, 113),
        "coco-stuff": (171, 171)}
    assert names["voc21"].names[1:] == names["voc20"].names
    assert names["context60"].names[1:] == names["context59"].names


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_class_files_may_have_a_mark_and_other_line_ends(tmp_path, encoding, end):
    names = [["Straße", "Weg"], ["a\u2028b"], ["c\x0cd"]]
    text = "".join(", ".join(synonyms) + end for synonyms in names)
    (tmp_path / "classes.txt").write_bytes(text.encode(encoding))
    assert read_classes(tmp_path / "classes.txt").names == names


@pytest.mark.parametrize("content, message", [
    ("Straße".encode("latin-1"), "not UTF-8"), ("sky\n".encode("utf-16"), "not UTF-8"),
    (b'["sky", "grass"]', "JSON"), (b'{\n "0": "sky"}', "JSON"), (b"id,name\n0,sky\n", "CSV"),
    (b"0: sky\n1: grass\n", "numbered"), (b"", "empty"), (b"\n\n", "empty"),
    (b"cat\n\ndog", "class 2: an empty name"), (b"cat\ndog, Cat", "class 2: 'Cat'.*class 1"),
])
def test_class_files_that_are_refused(tmp_path, content, message):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(UsageError, match=f"classes .*classes.txt.*{message}"):
        read_classes(tmp_path / "classes.txt")


@pytest.mark.parametrize("source, background, message", [
    ("", None, "^classes: the list is empty"), ("sky; grass", None, "a single class would take"),
    ("missing.txt", None, "^classes.*no such file"),
    ("cat,,dog", None, "^classes.*class 2: an empty name"),
    ("cat, dog, Cat", None, "^classes.*class 3: 'Cat' is a name of class 1"),
    (", ".join(f"name {k}" for k in range(300)), None, "^classes: 300 classes"),
    ("cat, dog", "wall,,floor", "^background: an empty name"),
    ("cat, dog", "wall, cat", "'cat'"), ("cat, background", "wall", "called background"),
    ("cat, dog", "wall | dog", "'dog' is a name of"),
])
def test_class_lists_that_are_refused(source, background, message):
    with pytest.raises(UsageError, match=message):
        read_classes(source, background)


def test_a_class_is_as_similar_as_its_best_synonym():
    similarities = torch.randn(20, 30, 6)
    classes = Classes([["a"], ["b", "c", "d"], ["e", "f"]])
    expected = torch.stack([similarities[..., 0], similarities[..., 1:4].amax(-1),
                            similarities[..., 4:].amax(-1)]).argmax(0)
    strip = bilinear_strips(similarities, (20, 30))
    assert torch.equal(label_map(strip, (20, 30), classes.class_of_name), expected)
