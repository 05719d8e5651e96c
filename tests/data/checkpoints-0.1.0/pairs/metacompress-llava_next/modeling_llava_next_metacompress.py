"""LLaVA-NeXT with MetaCompress (Wang et al., "Rethinking Token Reduction for Large
Vision-Language Models")."""

from __future__ import annotations

from torch import nn
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import LlavaNextPreTrainedModel

from .configuration_llava_next_metacompress import LlavaNextMetaCompressConfig
from .compatibility import register_key_mapping
from .modeling_metacompress import MetaCompressModelMixin
from .sequence_compression import LlavaNextSequenceMixin, SequenceGenerationMixin


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


# Written by foveate's bundle. Transformers 4.57 copies, from a local folder, only the files that this one itself names;
# these are the ones that they import in turn.
if False:
    from .adapter_layout import *
    from .compressed_image import *
    from .compressed_model import *
    from .compression_settings import *
    from .compressor_metacompress import *
    from .exact_count import *
    from .image_inputs import *
    from .image_tiles import *
    from .settings_metacompress import *
    from .settings_sequence import *
    from .tile_layout import *
