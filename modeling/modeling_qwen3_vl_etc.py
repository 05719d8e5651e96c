"""Qwen3-VL with Extreme Token Compression (ETC), for images."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLPreTrainedModel

from foveate.configuration.configuration_qwen3_vl_etc import Qwen3VLETCConfig
from foveate.modeling.backbones.qwen_vl import Qwen3VLGenerationMixin, Qwen3VLModelMixin
from foveate.modeling.methods.etc import EncodedImages, ETCGenerationMixin, ETCModelMixin
from foveate.modeling.methods.etc_algorithm import positions_on_grids


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
