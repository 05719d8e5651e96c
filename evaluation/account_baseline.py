"""What the training-free baselines cost, read off `BaselineModelMixin`: taking tokens is free, means are a product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from foveate.evaluation.flops import MethodAccount, is_qwen


def account(config: Any, stock: MethodAccount, image_size: tuple[int, int]) -> MethodAccount:
    """Of the whole sequence of an image, newlines among it."""
    settings, length = config.compression, stock.visual_tokens
    kept, multiply_adds = settings.count_tokens(length), 0
    if settings.method == "spatial" and kept < length:
        multiply_adds = kept * length * _width(config)
    return replace(stock, visual_tokens=kept, compressor=2 * multiply_adds)


def _width(config: Any) -> int:
    """Of what goes into a mean: in Qwen3-VL what DeepStack adds to a token, and its place, go with it."""
    width = config.text_config.hidden_size
    return width * (1 + len(config.vision_config.deepstack_visual_indexes)) + 2 if is_qwen(config) else width
