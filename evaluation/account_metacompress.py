"""What MetaCompress costs, read off `MetaCompressor`: the stock model up to the language model, then the matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from foveate.evaluation.flops import MethodAccount


def account(config: Any, stock: MethodAccount, image_size: tuple[int, int]) -> MethodAccount:
    """The whole sequence of an image, newlines among it, is compressed at once; with nothing to compress there is no
    matrix."""
    settings, width, length = config.compression, config.text_config.hidden_size, stock.visual_tokens
    kept, multiply_adds = settings.count_tokens(length), 0
    if kept < length:
        multiply_adds += (kept + length) * width * settings.key_width  # Eq. 6 and 7: queries and keys
        multiply_adds += kept * length * (settings.key_width + width)  # Eq. 8: scores, P·X
    return replace(stock, visual_tokens=kept, compressor=2 * multiply_adds)
