"""Write a student, or any backbone, as one ONNX file for programs without Python:
`evaluate_ovs.py --export FILE.onnx` calls export().

With class names: "image", uint8 (H, W, 3) -> "labels", uint8 (H, W), with the names in the file's
metadata under "classes". Without: "images", uint8 (B, H, W, 3) -> "features", float32
(B, H/p, W/p, D), comparable with text. H, W and B are any. The file holds no text tower.

    import json, numpy, onnxruntime, PIL.Image
    session = onnxruntime.InferenceSession("segmenter.onnx")
    titles = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    image = numpy.array(PIL.Image.open("photo.jpg").convert("RGB"))
    labels, = session.run(None, {"image": image})

With --export features.onnx --export-texts words.npz, words can change later:

    session, words = onnxruntime.InferenceSession("features.onnx"), numpy.load("words.npz")
    features, = session.run(None, {"images": image[None]})           # (1, h, w, D)
    features /= numpy.linalg.norm(features, axis=-1, keepdims=True)
    similarities = features[0] @ words["texts"].T                    # (h, w, N)
    classes = words["class_of_name"][similarities.argmax(-1)]        # (h, w), of words["titles"]
"""
import importlib.util
import json
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import dense_features, embed_texts, label_pixels
from data.files import RunError, UsageError, atomic_path, first_line

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 23  # the first with an Attention operator
MAX_BYTES = 2 ** 31 - 2 ** 24  # of weights, since protobuf ends at 2 GiB
MIN_AGREEMENT = 0.99  # fraction of the pixels whose label must be torch's
MAX_ERROR = 1e-2  # norm of the features' difference, relative to their norm


class Features(nn.Module):
    """Images (B, H, W, 3) uint8 -> features (B, H/p, W/p, D): dense_features for a batch."""

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
    """An image (H, W, 3) uint8 -> labels (H, W) uint8, as label_pixels gives them."""

    def __init__(self, backbone, texts, class_of_name):
        super().__init__(backbone)
        self.register_buffer("texts", texts)  # (N, D)
        self.register_buffer("class_of_name", class_of_name.to(torch.uint8))  # (N,)

    def forward(self, image, chunk=8):
        """chunk: names whose similarities are held at the size of the image."""
        features = F.normalize(super().forward(image[None]), dim=-1)
        similarities = (features @ self.texts.T).permute(0, 3, 1, 2)  # (1, N, h, w)
        best = winner = None
        for first in range(0, len(self.texts), chunk):
            part = F.interpolate(similarities[:, first:first + chunk], size=image.shape[:2],
                                 mode="bilinear", align_corners=False)[0]
            values, names = part.max(0)  # (H, W)
            if best is not None:
                names = torch.where(values > best, names + first, winner)
                values = torch.maximum(values, best)
            best, winner = values, names
        return self.class_of_name[winner]


def export(backbone, path, classes=None, plain=False):
    """Write an ONNX file, if onnxruntime gives what torch gives. Raise UsageError for a backbone
    that cannot be exported, RunError if packages are missing or the file is wrong.

    backbone: on the CPU. classes: None for features. plain: without onnxruntime's own attention.
    """
    name = backbone.source["name"]
    refuse_export(backbone)
    print("exporting takes about a minute")
    if classes:
        texts = embed_texts(backbone, classes.flat)
        module, ends = Segmenter(backbone, texts, classes.class_of_name), ("image", "labels")
        example = torch.zeros(150, 201, 3, dtype=torch.uint8)
    else:
        module, ends = Features(backbone), ("images", "features")
        example = torch.zeros(2, 150, 201, 3, dtype=torch.uint8)
    try:
        program = to_onnx(module.eval(), example, ends)
    except Exception as error:  # torch.export and torch.onnx raise many types
        raise UsageError(f"backbone {name} cannot be exported: {first_line(error)}") from error
    if not plain:
        use_contrib_attention(program.model)
    metadata = {"backbone": Path(name).name, "patch": str(backbone.patch)}
    if classes:
        metadata["classes"] = json.dumps(classes.titles)
    program.model.metadata_props.update(metadata)
    with atomic_path(path) as temporary:
        program.save(temporary, external_data=False)
        check(module, temporary, ends)
    operators = f"opset {OPSET}" + ("" if plain else " and onnxruntime's attention")
    print(f"{path}: {ends[0]} -> {ends[1]}, {os.path.getsize(path) / 1e6:.1f} MB, {operators}")


def export_texts(backbone, path, classes):
    """Write class names as an .npz file: titles (K,), class_of_name (N,), and the unit vectors of
    the names, texts (N, D) float32."""
    texts = embed_texts(backbone, classes.flat).numpy()
    with atomic_path(path) as temporary:
        np.savez(temporary, titles=np.array(classes.titles), texts=texts,
                 class_of_name=classes.class_of_name.numpy())
    print(f"{path}: {classes}")


def refuse_export(backbone):
    """Raise RunError if packages are missing, UsageError for what no ONNX file can hold."""
    if backbone.windows:
        raise UsageError(f"backbone {backbone.source['name']}: its frozen blocks see "
                         "windows, whose number depends on the image, which no ONNX graph holds")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(f"ONNX files need {', '.join(missing)}: pip install {' '.join(missing)}")
    size = sum(value.nbytes for value in backbone.visual.state_dict().values())
    if size > MAX_BYTES:
        raise UsageError(f"backbone {backbone.source['name']}: its {size / 1e9:.1f} GB of "
                         "weights do not fit into one ONNX file, which ends at 2 GB")


@torch.no_grad()
def to_onnx(module, example, ends):
    """Return a torch.onnx.ONNXProgram of a module, for images of any size."""
    names = dict(enumerate(("batch", "height", "width")[-example.ndim + 1:]))
    sizes = {dimension: torch.export.Dim.DYNAMIC for dimension in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.export.export(module, (example,), dynamic_shapes=(sizes,), strict=False)
        return torch.onnx.export(graph, opset_version=OPSET, verbose=False, input_names=ends[:1],
                                 output_names=ends[1:], dynamic_shapes=(names,))


def use_contrib_attention(model):
    """Replace opset 23's Attention by onnxruntime's, which holds one tile of the matrix at a time:
    a fifth of the memory for `tiny` at 1024 x 2048."""
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.pattern import RewriteRule

    def attention(op, queries, keys, values):
        return op.Attention(queries, keys, values, _outputs=["attended"])

    def heads_are_known(context, queries, **_):
        return queries.shape is not None and isinstance(queries.shape[1], int)

    def contrib(op, queries, keys, values, attended):
        heads = queries.shape[1]
        scale = attended.producer().attributes.get("scale")
        scale = {} if scale is None else {"scale": scale.value}

        def joined(tensor):  # (B, heads, n, d) -> (B, n, heads * d)
            return op.Reshape(op.Transpose(tensor, perm=[0, 2, 1, 3]),
                              op.Constant(value_ints=[0, 0, -1]))
        result = op.MultiHeadAttention(joined(queries), joined(keys), joined(values),
                                       num_heads=heads, **scale, _domain="com.microsoft")
        result = op.Reshape(result, op.Constant(value_ints=[0, 0, heads, -1]))
        return op.Transpose(result, perm=[0, 2, 1, 3])

    rewrite(model, [RewriteRule(attention, contrib, heads_are_known)])


def check(module, path, ends):
    """Print how a file's outputs differ from torch's. Raise RunError if that is too much."""
    import onnxruntime
    try:
        # as bytes, since onnxruntime refuses names that are not UTF-8
        session = onnxruntime.InferenceSession(Path(path).read_bytes(),
                                               providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own types
        raise RunError(f"onnxruntime {onnxruntime.__version__} cannot read opset {OPSET} "
                       f"({first_line(error)}); install a newer one: pip install -U onnxruntime"
                       ) from error
    backbone, generator = module.backbone, torch.Generator().manual_seed(0)
    height, width = backbone.window or (16 * backbone.patch, 16 * backbone.patch)
    sizes = (height, width), (height * 2 // 3 + 3, width + 5), (height * 5 // 4 + 7, width)
    for size in sizes:
        coarse = 255 * torch.rand(1, 3, 6, 7, generator=generator)
        image = F.interpolate(coarse, size=size, mode="bilinear")[0].to(torch.uint8)  # (3, H, W)
        pixels = image.permute(1, 2, 0)  # (H, W, 3)
        if ends[1] == "labels":
            ours = label_pixels(backbone, image, module.texts, module.class_of_name)
        else:
            ours, pixels = dense_features(backbone, image)[None], pixels[None]
        what = f"{size[0]} x {size[1]} pixels in onnxruntime"
        try:
            theirs = session.run(None, {ends[0]: pixels.numpy()})[0]
        except Exception as error:  # onnxruntime's own types
            raise RunError(f"backbone {backbone.source['name']} cannot be exported: {what} "
                           f"failed ({first_line(error)}); the file was not kept") from error
        is_close, difference = compare(theirs, ours.numpy())
        if not is_close:
            raise RunError(f"{what}: {difference}; the file was not kept")
        print(f"{what}: {difference}")


def compare(theirs, ours):
    """Return whether onnxruntime's labels or features are close to torch's, and how in words."""
    if theirs.dtype == np.uint8:
        agreement = np.mean(theirs == ours)
        return agreement >= MIN_AGREEMENT, f"{100 * agreement:.3f} % of the labels are torch's"
    # resampled pixels may be rounded differently, which changes a patch a little
    error = np.linalg.norm(theirs - ours) / np.linalg.norm(ours)
    return error < MAX_ERROR, f"the features differ from torch's by {error:.1e} of their norm"
