"""The processor of Mistral 3 and its like, which writes an image as rows."""

from __future__ import annotations

from transformers import PixtralProcessor

from foveate.modeling.layers.rows import tokens_of_rows
from foveate.processing.any import AnyProcessorMixin


class Mistral3CompressionProcessor(AnyProcessorMixin, PixtralProcessor):
    """`PixtralProcessor` that spreads the tokens that are left of an image over its rows. A row without any goes, with
    the break after it."""

    def compress_text(self, text, tile_length=None):
        rows = text.removesuffix(self.image_end_token).split(self.image_break_token)
        num_tokens = self.count_tokens(sum(row.count(self.placeholder) for row in rows))
        counts = tokens_of_rows(num_tokens, len(rows))
        return self.image_break_token.join(self.placeholder * count for count in counts if count) + self.image_end_token


MistralLarge4CompressionProcessor = Mistral3CompressionProcessor
