"""LLaVA-NeXT with a training-free baseline: random pruning, equidistant sampling or spatial
pooling."""

from __future__ import annotations

from torch import nn
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import LlavaNextPreTrainedModel

from foveate.configuration.configuration_llava_next_baseline import LlavaNextBaselineConfig
from foveate.modeling.compatibility import register_key_mapping
from foveate.modeling.core.sequence import LlavaNextSequenceMixin, SequenceGenerationMixin
from foveate.modeling.methods.baselines import BaselineModelMixin


class LlavaNextBaselineModel(BaselineModelMixin, LlavaNextSequenceMixin, LlavaNextModel):
    """The stock model, with fewer tokens an image."""

    config_class = LlavaNextBaselineConfig


class LlavaNextBaselineForConditionalGeneration(SequenceGenerationMixin, LlavaNextForConditionalGeneration):
    """[`LlavaNextBaselineModel`] with a language modeling head."""

    config_class = LlavaNextBaselineConfig

    def __init__(self, config: LlavaNextBaselineConfig):
        LlavaNextPreTrainedModel.__init__(self, config)  # not the stock class's: it would build the stock model first
        self.model = LlavaNextBaselineModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


register_key_mapping(
    LlavaNextBaselineModel,
    LlavaNextBaselineForConditionalGeneration,
    base_model_type="llava_next",
    own_keys=(),
)

__all__ = ["LlavaNextBaselineForConditionalGeneration", "LlavaNextBaselineModel"]
