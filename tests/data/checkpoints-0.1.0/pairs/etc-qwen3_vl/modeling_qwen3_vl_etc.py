"""Qwen3-VL with Extreme Token Compression (ETC), for images."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLPreTrainedModel

from .configuration_qwen3_vl_etc import Qwen3VLETCConfig
from .compressor_etc import positions_on_grids
from .modeling_etc import EncodedImages, ETCGenerationMixin, ETCModelMixin
from .qwen3_vl_backbone import Qwen3VLGenerationMixin, Qwen3VLModelMixin


class Qwen3VLETCModel(Qwen3VLModelMixin, ETCModelMixin, Qwen3VLModel):
    """The stock model with compressed tokens after each image's visual ones, to which DeepStack adds nothing."""

    config_class = Qwen3VLETCConfig

    def __init__(self, config: Qwen3VLETCConfig):
        super().__init__(config)
        self._add_compressor(config)
        self.post_init()

    def encode_images(self, pixel_values, image_grid_thw):
        sequences, deepstack, grids = self.read_images(pixel_values, image_grid_thw)
        return EncodedImages(torch.cat(sequences), [len(tokens) for tokens in sequences], grids, deepstack)

    def positions_of(self, columns, grids):
        return positions_on_grids(columns, grids)


class Qwen3VLETCForConditionalGeneration(Qwen3VLGenerationMixin, ETCGenerationMixin, Qwen3VLForConditionalGeneration):
    """[`Qwen3VLETCModel`] with a language modeling head."""

    config_class = Qwen3VLETCConfig

    def __init__(self, config: Qwen3VLETCConfig):
        Qwen3VLPreTrainedModel.__init__(self, config)  # not the stock class's: it would build the stock model first
        self.model = Qwen3VLETCModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


__all__ = ["Qwen3VLETCForConditionalGeneration", "Qwen3VLETCModel"]


# Written by foveate's bundle. Transformers 4.57 copies, from a local folder, only the files that this one itself names;
# these are the ones that they import in turn.
if False:
    from .adapter_layout import *
    from .attention_rows import *
    from .compatibility import *
    from .compressed_image import *
    from .compressed_model import *
    from .compression_settings import *
    from .evicting_cache import *
    from .image_inputs import *
    from .logical_cache import *
    from .logical_model import *
    from .physical_sequence import *
    from .placed_model import *
    from .position_ids import *
    from .settings_etc import *
