"""LLaVA-1.5 with MetaCompress (Wang et al., "Rethinking Token Reduction for Large
Vision-Language Models")."""

from __future__ import annotations

from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

from foveate.configuration.configuration_llava_metacompress import LlavaMetaCompressConfig
from foveate.modeling.compatibility import register_key_mapping
from foveate.modeling.core.sequence import LlavaSequenceMixin, SequenceGenerationMixin
from foveate.modeling.methods.metacompress import MetaCompressModelMixin


class LlavaMetaCompressModel(MetaCompressModelMixin, LlavaSequenceMixin, LlavaModel):
    """The stock model, the generator of compression matrices, and the language model."""

    config_class = LlavaMetaCompressConfig

    def __init__(self, config: LlavaMetaCompressConfig):
        super().__init__(config)
        self._add_compressor(config)
        self.post_init()


class LlavaMetaCompressForConditionalGeneration(SequenceGenerationMixin, LlavaForConditionalGeneration):
    """[`LlavaMetaCompressModel`] with a language modeling head."""

    config_class = LlavaMetaCompressConfig

    def __init__(self, config: LlavaMetaCompressConfig):
        LlavaPreTrainedModel.__init__(self, config)  # not the stock class's: it would build the stock model first
        self.model = LlavaMetaCompressModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


register_key_mapping(
    LlavaMetaCompressModel,
    LlavaMetaCompressForConditionalGeneration,
    base_model_type="llava",
    own_keys=("compressor",),
)

__all__ = ["LlavaMetaCompressForConditionalGeneration", "LlavaMetaCompressModel"]
