"""What Extreme Token Compression costs: the language model reads all of an image and the compressed tokens, and keeps
the latter alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from foveate.modeling.core.account import ImageAccount, count_reading


def count_image(model: Any, inputs: Mapping[str, torch.Tensor]) -> ImageAccount:
    """The image is read as the stock model reads it; passes of the language model follow from the numbers."""
    image = count_reading(model, lambda: model.read_images(dict(inputs)).lengths)
    number = model.config.compression.num_visual_tokens
    return replace(image, visual_tokens=number, read_tokens=image.visual_tokens + number)
