"""What MetaCompress's models share, whatever their backbone: the generator of compression matrices."""

from __future__ import annotations

from foveate.modeling.core.sequence import SequenceModelMixin
from foveate.modeling.methods.metacompress_algorithm import MetaCompressor


class MetaCompressModelMixin(SequenceModelMixin):
    """Mixed into a model without a head, before its backbone's mixin."""

    def _add_compressor(self, config) -> None:
        self.compressor = MetaCompressor(config.text_config.hidden_size, config.compression.key_width)

    def _init_weights(self, module):
        if isinstance(module, MetaCompressor):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def compress_sequences(self, sequences, num_tokens, keys, trace):
        return *self.compressor(sequences, num_tokens), 2
