"""Image towers of open_clip beyond those that common.py knows: timm's Eva and NaFlexVit."""
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer_relpos import VisionTransformerRelPos

from common import TimmViT
from data.files import UsageError


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
    positions = official_positions = None

    def set_sizes(self):
        if self.trunk.rope is not None:
            raise UsageError("it is a NaFlexVit with rotary positions, which is not supported")
        self.window, self.patch = None, self.trunk.embeds.patch_size[0]

    def embed(self, images):
        return self.trunk.norm_pre(self.trunk.embeds(images)[0])


def other_family(visual):
    """Return the Backbone class for an image tower of open_clip. Raise UsageError."""
    import open_clip
    if isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        raise UsageError("its image tower is a ResNet (ModifiedResNet), which has neither patch "
                         "tokens nor transformer blocks")
    trunk = type(visual.trunk)
    if trunk in (Eva, NaFlexVit):
        return EvaViT if trunk is Eva else NaFlexViT
    if issubclass(trunk, VisionTransformerRelPos):
        raise UsageError("its image tower has tables of relative positions, which belong to one "
                         "grid size")
    raise UsageError(f"its image tower is a {trunk.__name__}, which is not supported: "
                     "convolutional and hierarchical towers have no single sequence of patch "
                     "tokens")
