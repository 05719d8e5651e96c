"""What QG-VTC costs, read off `vision_encoder_qgvtc.py`: layers after the features' don't run."""

from __future__ import annotations

from typing import Any

from foveate.evaluation.flops import MethodAccount, VisionLayer, num_patches, text_encoder_flops
from foveate.modeling.methods.qgvtc_algorithm import token_schedule


def account(config: Any, stock: MethodAccount, image_size: tuple[int, int]) -> MethodAccount:
    """Every tile is compressed to `num_visual_tokens`, each by the same question, which is read once."""
    settings, vision = config.compression, config.vision_config
    patches, width = num_patches(vision), vision.hidden_size
    running = config.vision_feature_layer % (vision.num_hidden_layers + 1)
    by_question = settings.guidance == "question" and settings.num_visual_tokens < patches
    left = dict(zip(settings.layers, token_schedule(patches, settings.num_visual_tokens, len(settings.layers))))

    layers, multiply_adds, entering = [], 0, patches
    for index in range(running):
        kept = left.get(index, entering)
        if kept == entering:
            layers.append(VisionLayer.plain(1 + entering))
            continue
        # Recycling reads the attention of the discarded tokens too; the MLP runs on the kept ones alone.
        layers.append(VisionLayer(1 + (entering if settings.recycle else kept), 1 + entering, 1 + kept))
        multiply_adds += (1 + entering) * width  # the class token's correlation, for images without a question
        if by_question:
            multiply_adds += width * width + entering * width  # Eq. 4: the question's query, its correlation
        if settings.recycle:
            multiply_adds += (1 + kept) * (entering - kept) * width  # Eq. 5
        else:
            multiply_adds += width * width  # the class token's query, before it is known what is kept
        entering = kept

    compressor = 2 * stock.num_tiles * multiply_adds
    if by_question:
        compressor += 2 * (config.question_config.hidden_size * width + width * width)  # the question's MLP
    return MethodAccount(
        vision_layers=layers,
        tokens_per_tile=settings.num_visual_tokens,
        num_tiles=stock.num_tiles,
        compressor=compressor,
        text_encoder=text_encoder_flops(config.question_config) if by_question else 0,
    )
