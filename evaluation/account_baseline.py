"""What the training-free baselines cost, read off `BaselineModelMixin`: taking tokens is free, means are a product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .flops import MethodAccount


def account(config: Any, stock: MethodAccount, num_tiles: int, length: int) -> MethodAccount:
    """Of the whole sequence of an image, newlines among it."""
    settings = config.compression
    kept, multiply_adds = settings.count_tokens(length), 0
    if settings.method == "spatial" and kept < length:
        multiply_adds = kept * length * config.text_config.hidden_size
    return replace(stock, visual_tokens=kept, compressor=2 * multiply_adds)
