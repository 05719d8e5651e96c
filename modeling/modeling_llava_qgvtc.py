"""LLaVA-1.5 with QG-VTC (Li et al., "QG-VTC: Question-Guided Visual Token Compression in MLLMs for Efficient VQA")."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

from foveate.configuration.configuration_llava_qgvtc import LlavaQGVTCConfig
from foveate.modeling.compatibility import register_key_mapping
from foveate.modeling.core.base import TokenProvenance
from foveate.modeling.core.exact import CompressedImages
from foveate.modeling.methods.qgvtc import ROLE_NAMES, QGVTCGenerationMixin, QGVTCModelMixin


class LlavaQGVTCModel(QGVTCModelMixin, LlavaModel):
    """The question's text encoder, the guided vision tower, the projector and the language model."""

    config_class = LlavaQGVTCConfig

    def __init__(self, config: LlavaQGVTCConfig):
        super().__init__(config)
        self._add_question_modules(config)
        self.post_init()

    def compress_images(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        *,
        trace: bool = False,
    ) -> CompressedImages:
        """Encodes images, each compressed by its question.

        Args:
            pixel_values: (images, 3, height, width).
            image_sizes: not used, all images are of one size here.
            question_input_ids, question_attention_mask: (images, 77), from the processor.
            trace: whether to say what the tokens are made of.
        """
        encoded = self._encode_images(pixel_values, question_input_ids, question_attention_mask, trace=trace)
        num_images, num_tokens = encoded.features.shape[:2]
        provenance = None
        if trace:
            roles = torch.full((num_tokens,), self._role(), device=pixel_values.device)
            provenance = [
                TokenProvenance(
                    encoded.weights[image],
                    roles,
                    ROLE_NAMES,
                    tuple((f"layer {layer}", kept[image]) for layer, kept in encoded.steps),
                )
                for image in range(num_images)
            ]
        tokens = self.multi_modal_projector(encoded.features).flatten(0, 1)
        return CompressedImages(tokens, [num_tokens] * num_images, provenance)


class LlavaQGVTCForConditionalGeneration(QGVTCGenerationMixin, LlavaForConditionalGeneration):
    """[`LlavaQGVTCModel`] with a language modeling head."""

    config_class = LlavaQGVTCConfig

    def __init__(self, config: LlavaQGVTCConfig):
        LlavaPreTrainedModel.__init__(self, config)  # not the stock class's: it would build the stock model first
        self.model = LlavaQGVTCModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def count_placeholders(self, images: dict[str, torch.Tensor]) -> torch.Tensor:
        pixel_values, number = images["pixel_values"], self.config.compression.num_visual_tokens
        return torch.full((len(pixel_values),), number, device=pixel_values.device)


register_key_mapping(
    LlavaQGVTCModel,
    LlavaQGVTCForConditionalGeneration,
    base_model_type="llava",
    own_keys=("question_encoder", "question_projector"),
)

__all__ = ["LlavaQGVTCForConditionalGeneration", "LlavaQGVTCModel"]
