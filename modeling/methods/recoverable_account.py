"""What Recoverable Compression costs. Its `compress_images` depends on values, so it can't be counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from foveate.modeling.compatibility import clip_embeddings, clip_layers, run_clip_layer
from foveate.modeling.core.account import ImageAccount, count_reading


def count_image(model: Any, inputs: Mapping[str, torch.Tensor]) -> ImageAccount:
    """One image is one tile. Without a fixed `num_visual_tokens` the filters choose a number for every image and
    question: the account is then the upper bound, all patches with all but one of them merged."""
    config, settings, patches = model.config, model.config.compression, model.config.num_patches
    width, projection = config.vision_config.hidden_size, config.question_config.projection_dim
    uses_text = settings.text_recovery or (settings.secondary_recovery and settings.variant == "official")
    layers = clip_layers(model.vision_tower)
    runs_last = uses_text or config.vision_feature_layer % (len(layers) + 1) == len(layers)
    number = settings.num_visual_tokens or patches

    def read() -> list[int]:
        hidden = clip_embeddings(model.vision_tower, inputs["pixel_values"])
        for layer in layers if runs_last else layers[:-1]:
            hidden = run_clip_layer(layer, hidden)
        if uses_text:
            model.embed_question(*(inputs[name] for name in model.guiding_inputs))
        return [len(model.multi_modal_projector(hidden[0, 1 : 1 + number]))]

    multiply_adds = width * width * (patches + 2) + width * (patches + 1)  # last layer's keys, CLS's query, Eq. 1
    if uses_text:  # Eq. 2: projected patches, their similarity to the question
        multiply_adds += patches * width * projection + patches * projection
    multiply_adds += 2 * _num_merged(settings, patches) * patches * width  # similarity to the centres, weighted sums
    return replace(count_reading(model, read), compressor=2 * multiply_adds, at_most=settings.num_visual_tokens is None)


def _num_merged(settings: Any, patches: int) -> int:
    """Merged tokens of an image, as `assign_tokens` divides a fixed budget."""
    if not settings.secondary_recovery:
        return 0
    if settings.num_visual_tokens is None:
        return patches - 1
    return settings.num_visual_tokens * (patches - settings.num_visual_tokens) // (5 * patches)
