"""Families of ViTs beyond those that common.py knows: timm's Eva and NaFlexVit in open_clip, and
TIPSv2 (--backbone tipsv2, tipsv2-b, tipsv2-so, tipsv2-g, or a folder) in transformers."""
import contextlib
import functools
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit

from common import Backbone, TimmViT, loading, refuse_misfits
from data.files import RunError, UsageError, atomic_path, first_line


# ---- open_clip -------------------------------------------------------------------------------

class EvaViT(TimmViT):
    """timm's Eva (EVA-01, EVA-02, PE-Core), whose blocks take rotary positions."""

    def __init__(self, model, preprocess):
        super().__init__(model, preprocess)
        if self.trunk.rope_mixed:
            raise UsageError("its rotary positions differ from block to block, which is not "
                             "supported")
        if self.trunk.rope is not None:
            # private; timm's cache holds the positions of one grid, whichever grid is asked for
            self.trunk.rope._use_cached_embed = False

    def attend(self, block, tokens, grid):
        rope = self.trunk.rope
        return block(tokens, rope=None if rope is None else rope.get_embed(list(grid)))


class NaFlexViT(TimmViT):
    """timm's NaFlexVit (SigLIP2 NaFlex), which resizes its positions itself, bilinearly."""
    positions = None

    def set_sizes(self):
        if self.trunk.rope is not None:
            raise UsageError("it is a NaFlexVit with rotary positions, which is not supported")
        self.window, self.patch = None, self.trunk.embeds.patch_size[0]

    def embed(self, images):
        return self.trunk.norm_pre(self.trunk.embeds(images)[0])


def other_family(visual):
    """Return the Backbone class for an image tower of open_clip. Raise UsageError."""
    trunk = type(getattr(visual, "trunk", visual))
    if trunk in (Eva, NaFlexVit):
        return EvaViT if trunk is Eva else NaFlexViT
    raise UsageError(f"its image tower is a {trunk.__name__}, which is not supported: only ViTs "
                     "are whose patches form one sequence, with absolute or rotary positions")


# ---- TIPSv2 ----------------------------------------------------------------------------------

# width, blocks and heads of the image tower, hidden width of its MLPs, blocks of the text tower,
# and whether the MLPs are SwiGLU, which takes two thirds of that hidden width
TIPSV2 = {
    "google/tipsv2-b14": (768, 12, 12, 3072, 12, False),
    "google/tipsv2-l14": (1024, 24, 16, 4096, 12, False),
    "google/tipsv2-so400m14": (1152, 27, 16, 4304, 27, False),
    "google/tipsv2-g14": (1536, 40, 24, 6144, 12, True),
}


class Tipsv2(Backbone):
    """transformers' Tipsv2Model: a tower like DINOv2's with two class tokens, that takes pixels in
    0..1 and resizes its positions itself. Patches meet the text without a projection (MaskCLIP)."""
    visual_prefix = "vision_model."
    pooling = "class token"

    def __init__(self, model, place):
        super().__init__(model, {"mean": [0.0] * 3, "std": [1.0] * 3})
        config = self.visual.config
        self.place, self.blocks = place, self.visual.encoder.layer
        self.patch, self.dim = config.patch_size, config.hidden_size
        self.window = (config.image_size // self.patch * self.patch,) * 2
        self.prefix = 1 + config.num_register_tokens  # the register is the second class token

    def embed(self, images):
        return self.visual.embeddings(images)

    def run_block(self, index, tokens, grid):
        block = self.blocks[index]
        if index < len(self.blocks) - 1:
            return block(tokens)
        tokens, attention = tokens[:, self.prefix:], block.attention  # MaskCLIP
        values = attention.o_proj(attention.v_proj(block.norm1(tokens)))
        tokens = tokens + block.layer_scale1(values)
        return tokens + block.layer_scale2(block.mlp(block.norm2(tokens)))

    def project(self, tokens, grid):
        return self.visual.layernorm(tokens).unflatten(1, grid)

    @functools.cached_property
    def tokenizer(self):
        """The tokenizer that the model was trained with. Raises RunError."""
        from transformers import Tipsv2Tokenizer
        advice = (f"{files_advice(self.place)}; if there is only a tokenizer.model, "
                  "pip install sentencepiece protobuf")
        with loading(f"the tokenizer of backbone {self.place}", advice):
            tokenizer = Tipsv2Tokenizer.from_pretrained(self.place)
            # without files, transformers makes a tokenizer that knows no word
            if not set(tokenizer("photo").input_ids) - {tokenizer.unk_token_id}:
                raise FileNotFoundError("its files are missing")
        return tokenizer

    def encode_text(self, texts):
        model = self.both_towers()
        length = model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, padding_side="right", truncation=True,
                                max_length=length, return_tensors="pt").to(self.mean.device)
        # the mask keeps padding out of attention and out of the mean over words
        return model.get_text_features(tokens.input_ids, tokens.attention_mask,
                                       return_dict=True).pooler_output.float()

    def save(self, folder):
        """Write a folder like the published ones. Return how transformers loads it."""
        from safetensors import SafetensorError
        from transformers import Tipsv2ImageProcessor
        size = dict(zip(("height", "width"), self.window))
        parts = [Tipsv2ImageProcessor(size=size), self.both_towers()]
        if self.windows:
            self.model.config.windows = asdict(self.windows)
        try:
            parts.append(self.tokenizer)
        except RunError as error:
            print(f"warning: saved without a tokenizer: {error}", file=sys.stderr)
        staging = Path(folder, ".tmp")
        try:
            for part in parts:
                part.save_pretrained(staging)
            # the configuration comes last, since it makes the folder a model
            for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
                with contextlib.suppress(PermissionError):  # a file system without modes
                    path.chmod(0o644)  # safetensors leaves the weights to their owner alone
                with atomic_path(Path(folder) / path.name) as temporary:
                    os.replace(path, temporary)
        except (OSError, SafetensorError) as error:  # a full disk, mostly
            raise RunError(f"{folder} could not be written ({first_line(error)})") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return f"transformers.AutoModel.from_pretrained('{folder}')"


def files_advice(place):
    """Return where a model's files can be had, and where to put them."""
    if place not in TIPSV2:
        return "The folder must hold all files that save_pretrained of transformers writes"
    return (f"Without network, fetch all files of https://huggingface.co/{place} elsewhere, put "
            "them into one folder and give --backbone FOLDER")


def load_tipsv2(name, place, random_init):
    """Load TIPSv2 from a repository on huggingface.co or a folder. Raise RunError."""
    try:
        from transformers import Tipsv2Config, Tipsv2Model
    except ImportError:
        raise RunError(f"backbone {name} needs transformers 5.14 or newer: pip install "
                       "'transformers>=5.14'") from None
    with loading(f"backbone {name}", files_advice(place)):
        if random_init and place not in TIPSV2:
            return Tipsv2(Tipsv2Model(Tipsv2Config.from_pretrained(place)), place)
        if random_init:
            width, blocks, heads, hidden, text_blocks, swiglu = TIPSV2[place]
            both = {"hidden_size": width, "num_attention_heads": heads}
            config = Tipsv2Config(
                vision_config=both | {"num_hidden_layers": blocks, "mlp_ratio": hidden / width,
                                      "use_swiglu_ffn": swiglu},
                text_config=both | {"num_hidden_layers": text_blocks,
                                    "intermediate_size": hidden})
            return Tipsv2(Tipsv2Model(config), place)
        model, found = Tipsv2Model.from_pretrained(
            place, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True)  # these are refused below
    refuse_misfits({"missing": found["missing_keys"], "unknown": found["unexpected_keys"],
                    "of another shape": [key for key, *_ in found["mismatched_keys"]]}, place)
    backbone = Tipsv2(model, place)
    backbone.set_windows(getattr(model.config, "windows", None), place)
    return backbone
