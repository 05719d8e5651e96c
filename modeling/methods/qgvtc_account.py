"""What QG-VTC adds to the products of its vision tower, and the paper's own account of the encoder (Eq. 6).

Table 5 of QG-VTC (9.67 TFLOPs at 576 visual tokens, 3.86 at 144, 2.90 at 72: means of ten TextVQA samples) names
neither convention nor text lengths. All its cells fit, to 0.2 points, 2 FLOPs a multiply-add, the language model's
attention products left out (every column falls by the same 5.8 TFLOPs from 576 to 144, however long its text), the
head on all positions, and 68 to 231 text tokens, 125 on average: LLaVA's TextVQA prompts carry OCR tokens. This
account, with the products and one position of the head, has the table's shares to a point at `text_tokens=125`. The
paper leaves open which counter it used, and whether generated tokens are among the 125.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from foveate.errors import FoveateError
from foveate.modeling.core import account
from foveate.modeling.methods.qgvtc_algorithm import token_schedule


def count_image(model: Any, inputs: Mapping[str, torch.Tensor]) -> account.ImageAccount:
    """All of it is counted. Which products are the compression's own is declared: the counter can't tell them from the
    tower's, whose weights and attention rows they use."""
    found = account.count_image(model, inputs)
    own = 2 * _added_multiply_adds(model.config, len(model.cut_images(dict(inputs)).pixel_values))
    return replace(found, compressor=own, vision_tower=found.vision_tower + found.compressor - own)


def _added_multiply_adds(config: Any, num_crops: int) -> int:
    """Of the crops of an image, each guided by the same question, which goes through its MLP once."""
    settings, patches, width = config.compression, config.num_patches, config.vision_config.hidden_size
    by_question = settings.guidance == "question" and settings.num_visual_tokens < patches
    found, entering = 0, patches
    for kept in token_schedule(patches, settings.num_visual_tokens, len(settings.layers)):
        if kept == entering:
            continue
        found += (1 + entering) * width  # the class token's correlation, for images without a question
        if by_question:
            found += width * width + entering * width  # Eq. 4: the question's query, its correlation
        if settings.recycle:
            found += (1 + kept) * (entering - kept) * width  # Eq. 5
        else:
            found += width * width  # the class token's query, before it is known what is kept
        entering = kept
    of_question = config.question_config.hidden_size * width + width * width if by_question else 0
    return num_crops * found + of_question


def encoder_ratio(
    layers: Sequence[int],
    num_visual_tokens: int,
    num_patches: int = 576,
    num_layers: int = 24,
    width: int = 1024,
    intermediate: int = 4096,
) -> float:
    """R of QG-VTC's Eq. 6 in percent: the compressed vision encoder's FLOPs by those of the plain one.

    In the paper's terms: f(n) = 4nd² + 2n²d + 2ndm for the n patches that enter a layer, without the class token, over
    all layers, without the question's own cost.

    Args:
        layers: the compressing ones, counted from 0.
        num_visual_tokens: M.
        num_patches, num_layers, width, intermediate: N, number of layers, d and m of the encoder.

    Raises:
        FoveateError: layers or a number of tokens that the encoder doesn't have.
    """
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < num_layers:
        raise FoveateError(f"The layers {list(layers)} have to ascend, from 0 to at most {num_layers - 1}.")
    if not 1 <= num_visual_tokens <= num_patches:
        raise FoveateError(f"num_visual_tokens is {num_visual_tokens}: choose from 1 to {num_patches}.")

    def cost(tokens: int) -> int:
        return 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * intermediate

    left = dict(zip(layers, token_schedule(num_patches, num_visual_tokens, len(layers))))
    tokens, total = num_patches, 0
    for layer in range(num_layers):
        total += cost(tokens)
        tokens = left.get(layer, tokens)
    return 100 * total / (num_layers * cost(num_patches))
