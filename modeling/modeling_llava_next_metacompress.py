"""LLaVA-NeXT with MetaCompress (Wang et al., "Rethinking Token Reduction for Large
Vision-Language Models")."""

from __future__ import annotations

from torch import nn
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import LlavaNextPreTrainedModel

from foveate.configuration.configuration_llava_next_metacompress import LlavaNextMetaCompressConfig
from foveate.modeling.compatibility import register_key_mapping
from foveate.modeling.core.sequence import LlavaNextSequenceMixin, SequenceGenerationMixin
from foveate.modeling.methods.metacompress import MetaCompressModelMixin


class LlavaNextMetaCompressModel(MetaCompressModelMixin, LlavaNextSequenceMixin, LlavaNextModel):
    """The stock model, the generator of compression matrices, and the language model."""

    config_class = LlavaNextMetaCompressConfig

    def __init__(self, config: LlavaNextMetaCompressConfig):
        super().__init__(config)
        self._add_compressor(config)
        self.post_init()


class LlavaNextMetaCompressForConditionalGeneration(SequenceGenerationMixin, LlavaNextForConditionalGeneration):
    """[`LlavaNextMetaCompressModel`] with a language modeling head."""

    config_class = LlavaNextMetaCompressConfig

    def __init__(self, config: LlavaNextMetaCompressConfig):
        LlavaNextPreTrainedModel.__init__(self, config)  # not the stock class's: it would build the stock model first
        self.model = LlavaNextMetaCompressModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


register_key_mapping(
    LlavaNextMetaCompressModel,
    LlavaNextMetaCompressForConditionalGeneration,
    base_model_type="llava_next",
    own_keys=("compressor",),
)

__all__ = ["LlavaNextMetaCompressForConditionalGeneration", "LlavaNextMetaCompressModel"]
