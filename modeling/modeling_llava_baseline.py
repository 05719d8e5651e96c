"""LLaVA-1.5 with a training-free baseline: random pruning, equidistant sampling or spatial
pooling."""

from __future__ import annotations

from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

from foveate.configuration.configuration_llava_baseline import LlavaBaselineConfig
from foveate.modeling.compatibility import register_key_mapping
from foveate.modeling.core.sequence import LlavaSequenceMixin, SequenceGenerationMixin
from foveate.modeling.methods.baselines import BaselineModelMixin


class LlavaBaselineModel(BaselineModelMixin, LlavaSequenceMixin, LlavaModel):
    """The stock model, with fewer tokens an image."""

    config_class = LlavaBaselineConfig


class LlavaBaselineForConditionalGeneration(SequenceGenerationMixin, LlavaForConditionalGeneration):
    """[`LlavaBaselineModel`] with a language modeling head."""

    config_class = LlavaBaselineConfig

    def __init__(self, config: LlavaBaselineConfig):
        LlavaPreTrainedModel.__init__(self, config)  # not the stock class's: it would build the stock model first
        self.model = LlavaBaselineModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


register_key_mapping(
    LlavaBaselineModel,
    LlavaBaselineForConditionalGeneration,
    base_model_type="llava",
    own_keys=(),
)

__all__ = ["LlavaBaselineForConditionalGeneration", "LlavaBaselineModel"]
