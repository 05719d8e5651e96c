"""What ETC costs: the language model reads all of an image and the compressed tokens, and keeps the latter alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from foveate.evaluation.flops import MethodAccount


def account(config: Any, stock: MethodAccount, image_size: tuple[int, int]) -> MethodAccount:
    number = config.compression.num_visual_tokens
    return replace(stock, visual_tokens=number, read_tokens=stock.visual_tokens + number)
