"""A student, or any backbone, as one ONNX file for programs without Python: `evaluate_ovs.py
--export FILE.onnx` calls export().

With class names: "image", uint8 (H, W, 3) -> "labels", uint8 (H, W), with the names in the file's
metadata under "classes". Without: "images", uint8 (B, H, W, 3) -> "features", float32
(B, H/p, W/p, D), comparable with text. H, W and B are any; what common.py does to a picture from
its RGB pixels on is in the graph, the text tower is not.

    import json, numpy, onnxruntime, PIL.Image
    session = onnxruntime.InferenceSession("segmenter.onnx")
    titles = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    picture = numpy.array(PIL.Image.open("photo.jpg").convert("RGB"))
    labels, = session.run(None, {"image": picture})
"""
import importlib.util
import json
import os
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import (RunFailed, WrongCall, atomic_path, dense_features, embed_texts, first_line,
                    label_pixels)

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 23  # the first with an Attention operator
LARGEST = 2 ** 31 - 2 ** 24  # bytes of weights: protobuf ends at 2 GiB
ALIKE = 0.99  # share of the pixels that must get the label that torch gives
OFF = 1e-2  # of the features' length, by which they may differ


class Features(nn.Module):
    """Pictures (B, H, W, 3) uint8 -> features (B, H/p, W/p, D): dense_features for a batch."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images):
        patch = self.backbone.patch
        # nearest_multiple, in whole numbers
        size = [torch.sym_max(patch, (2 * side + patch) // (2 * patch) * patch)
                for side in images.shape[1:3]]
        images = images.permute(0, 3, 1, 2).float()  # (B, 3, H, W)
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False).round()
        return self.backbone.encode_dense(self.backbone.normalise(images))


class Segmenter(Features):
    """A picture (H, W, 3) uint8 -> labels (H, W) uint8, as label_pixels gives them."""

    def __init__(self, backbone, texts, owner):
        super().__init__(backbone)
        self.register_buffer("texts", texts)  # (N, D)
        self.register_buffer("owner", owner.to(torch.uint8))  # (N,)

    def forward(self, image, at_once=8):
        """at_once: names whose similarities are held at the picture's size."""
        features = F.normalize(super().forward(image[None]), dim=-1)
        similarities = (features @ self.texts.T).permute(0, 3, 1, 2)  # (1, N, h, w)
        best = winner = None
        for first in range(0, len(self.texts), at_once):
            some = F.interpolate(similarities[:, first:first + at_once], size=image.shape[:2],
                                 mode="bilinear", align_corners=False)[0]
            values, names = some.max(0)  # (H, W)
            if best is not None:
                better = values > best
                values = torch.where(better, values, best)
                names = torch.where(better, names + first, winner)
            best, winner = values, names
        return self.owner[winner]


def export(backbone, path, classes=None, plain=False):
    """Write an ONNX file, once it gave in onnxruntime what torch gives at three sizes.

    backbone: on the CPU, with its text tower if there are classes. classes: a Classes; without, the
    file gives features. plain: operators of opset 23 alone, instead of onnxruntime's attention.
    Raises WrongCall for a backbone that cannot be exported, RunFailed where packages are missing or
    the file is wrong.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RunFailed(f"ONNX files need {', '.join(missing)}: pip install {' '.join(missing)}")
    name = backbone.source["name"]
    size = sum(value.nbytes for value in backbone.visual.state_dict().values())
    if size > LARGEST:
        raise WrongCall(f"`backbone` {name}: its {size / 1e9:.1f} GB of weights do not fit into "
                        "one ONNX file, which ends at 2 GB")
    if classes:
        texts = embed_texts(backbone, classes.flat)
        module, ends = Segmenter(backbone, texts, classes.owner), ("image", "labels")
        example, dynamic = torch.zeros(150, 201, 3, dtype=torch.uint8), (0, 1)
    else:
        module, ends = Features(backbone), ("images", "features")
        example, dynamic = torch.zeros(2, 150, 201, 3, dtype=torch.uint8), (0, 1, 2)
    try:
        program = to_onnx(module.eval(), example, dynamic, ends)
    except Exception as error:  # torch.export and torch.onnx raise many types
        raise WrongCall(f"`backbone` {name} cannot be exported: {first_line(error)}") from error
    if not plain:
        use_contrib_attention(program.model)
    program.model.metadata_props.update(
        {"backbone": name, "patch": str(backbone.patch)}
        | ({"classes": json.dumps(classes.titles)} if classes else {}))
    with atomic_path(path) as temporary:
        program.save(temporary, external_data=False)
        for line in check(module, temporary, ends):
            print(line)
    print(f"{path}: {ends[0]} -> {ends[1]}, {os.path.getsize(path) / 1e6:.1f} MB, opset {OPSET}"
          + ("" if plain else " and onnxruntime's attention"))


@torch.no_grad()
def to_onnx(module, example, dynamic, ends):
    """A module of one input as a torch.onnx.ONNXProgram.

    example: an input; dynamic: its dimensions that are any; ends: names of input and output.
    """
    anything = {dimension: torch.export.Dim.DYNAMIC for dimension in dynamic}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.export.export(module, (example,), dynamic_shapes=(anything,), strict=False)
        return torch.onnx.export(graph, opset_version=OPSET, verbose=False,
                                 input_names=ends[:1], output_names=ends[1:])


def use_contrib_attention(model):
    """Replace opset 23's Attention, which onnxruntime computes with its whole matrix, by a kernel
    of its own that holds a tile of it: a fifth of the memory of `tiny` at 1024 x 2048."""
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.pattern import RewriteRule

    def attention(op, queries, keys, values):
        return op.Attention(queries, keys, values, _outputs=["attended"])

    def is_plain(context, queries, attended, **_):
        attributes = attended.producer().attributes
        return (queries.shape is not None and isinstance(queries.shape[1], int)
                and not (attributes["is_causal"].value if "is_causal" in attributes else 0))

    def contrib(op, queries, keys, values, attended):
        heads = queries.shape[1]
        scale = attended.producer().attributes.get("scale")

        def joined(tensor):  # (B, heads, n, d) -> (B, n, heads * d)
            return op.Reshape(op.Transpose(tensor, perm=[0, 2, 1, 3]),
                              op.Constant(value_ints=[0, 0, -1]))
        result = op.MultiHeadAttention(
            joined(queries), joined(keys), joined(values), num_heads=heads,
            **({} if scale is None else {"scale": scale.value}), _domain="com.microsoft")
        result = op.Reshape(result, op.Constant(value_ints=[0, 0, heads, -1]))
        return op.Transpose(result, perm=[0, 2, 1, 3])

    rewrite(model, [RewriteRule(attention, contrib, is_plain)])


def check(module, path, ends):
    """Run a file at three sizes beside torch: yields a line of what differs for each. Raises
    RunFailed where too much does."""
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    backbone, generator = module.backbone, torch.Generator().manual_seed(0)
    height, width = backbone.window or (16 * backbone.patch, 16 * backbone.patch)
    for size in ((height, width), (height * 2 // 3 + 3, width + 5), (height * 5 // 4 + 7, width)):
        coarse = 255 * torch.rand(1, 3, 6, 7, generator=generator)
        image = F.interpolate(coarse, size=size, mode="bilinear")[0].to(torch.uint8)  # (3, H, W)
        picture = image.permute(1, 2, 0).numpy()
        whole = picture if ends[1] == "labels" else picture[None]
        try:
            theirs = session.run(None, {ends[0]: whole})[0]
        except Exception as error:  # onnxruntime's own types
            raise RunFailed(f"`backbone` {backbone.source['name']} cannot be exported: onnxruntime "
                            f"refuses {size[0]} x {size[1]} pixels ({first_line(error)}); the file "
                            "was not kept") from error
        if ends[1] == "labels":
            ours = label_pixels(backbone, image, module.texts, module.owner).numpy()
            same = np.mean(theirs == ours)
            good, what = same >= ALIKE, f"{100 * same:.3f} % of the labels are torch's"
        else:
            ours = dense_features(backbone, image).numpy()
            # a resampled pixel may be rounded to the next level, which changes a patch a little
            off = np.linalg.norm(theirs[0] - ours) / np.linalg.norm(ours)
            good, what = off < OFF, f"features differ from torch's by {off:.1e} of their length"
        line = f"{size[0]} x {size[1]} in onnxruntime: {what}"
        if not good:
            raise RunFailed(f"{line}; the file was not kept")
        yield line
