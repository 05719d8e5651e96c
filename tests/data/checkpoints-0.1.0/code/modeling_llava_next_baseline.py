"""LLaVA-NeXT with a training-free baseline: random pruning, equidistant sampling or spatial
pooling."""

from __future__ import annotations

from torch import nn
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import LlavaNextPreTrainedModel

from .configuration_llava_next_baseline import LlavaNextBaselineConfig
from .compatibility import register_key_mapping
from .modeling_baseline import BaselineModelMixin
from .sequence_compression import LlavaNextSequenceMixin, SequenceGenerationMixin


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


# Written by foveate's bundle. Transformers 4.57 copies, from a local folder, only the files that this one itself names;
# these are the ones that they import in turn.
if False:
    from .adapter_layout import *
    from .compressed_image import *
    from .compressed_model import *
    from .compression_settings import *
    from .compressor_baselines import *
    from .exact_count import *
    from .image_inputs import *
    from .image_tiles import *
    from .settings_baseline import *
    from .settings_sequence import *
    from .tile_layout import *
