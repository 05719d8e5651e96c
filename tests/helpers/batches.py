"""Prompts and pictures of random pixels, which tests make batches of every shape of."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .tiny_checkpoints import QWEN_IMAGE


def prompt_for(processor, text: str) -> str:
    """A prompt with `<image>` in the processor's own words for it."""
    return text.replace("<image>", "<image>" if processor.image_token == "<image>" else QWEN_IMAGE)


def images_in(model, inputs) -> dict:
    """What a processor returned for images."""
    return {name: inputs[name] for name in model.image_inputs if name in inputs}


def picture(seed: int, size: tuple[int, int] = (60, 42)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


@dataclass
class Row:
    """One row of a batch: its prompt and its images."""

    prompt: str
    images: tuple = ()


ROWS = (
    Row("USER: <image> what is it ASSISTANT:", (picture(0),)),
    Row("USER: what is red ASSISTANT:"),
    Row("USER: <image> <image> what colour is it is it ASSISTANT:", (picture(1), picture(2, (90, 30)))),
    Row(
        "USER: <image> is it red ASSISTANT: it is red USER: <image> what colour ASSISTANT:",
        (picture(3, (40, 100)), picture(4)),
    ),
)
