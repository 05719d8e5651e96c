"""What Recoverable Compression costs, read off `LlavaRecoverableModel.compress_images` and its compressor."""

from __future__ import annotations

from typing import Any

from foveate.evaluation.flops import MethodAccount, VisionLayer, num_patches, text_encoder_flops


def account(config: Any, stock: MethodAccount, image_size: tuple[int, int]) -> MethodAccount:
    """One image is one tile. Without a fixed `num_visual_tokens` the filters choose a number for every image and
    question: the account is then the upper bound, all patches with all but one of them merged."""
    settings, vision, question = config.compression, config.vision_config, config.question_config
    patches, width, projection = num_patches(vision), vision.hidden_size, question.projection_dim
    layers = vision.num_hidden_layers
    uses_text = settings.text_recovery or (settings.secondary_recovery and settings.variant == "official")
    runs_last = uses_text or config.vision_feature_layer % (layers + 1) == layers

    multiply_adds = width * width * (patches + 2) + width * (patches + 1)  # last layer's keys, CLS's query, Eq. 1
    if uses_text:  # Eq. 2: projected patches, their similarity to the question
        multiply_adds += patches * width * projection + patches * projection
    merged = _num_merged(settings, patches)
    multiply_adds += 2 * merged * patches * width  # similarity to the cluster centres, weighted sums

    of_question = text_encoder_flops(question) + 2 * question.hidden_size * projection if uses_text else 0
    return MethodAccount(
        vision_layers=[VisionLayer.plain(1 + patches)] * (layers if runs_last else layers - 1),
        tokens_per_tile=settings.num_visual_tokens or patches,
        compressor=2 * multiply_adds,
        text_encoder=of_question,
        at_most=settings.num_visual_tokens is None,
    )


def _num_merged(settings: Any, patches: int) -> int:
    """Merged tokens of an image, as `assign_tokens` divides a fixed budget."""
    if not settings.secondary_recovery:
        return 0
    if settings.num_visual_tokens is None:
        return patches - 1
    return settings.num_visual_tokens * (patches - settings.num_visual_tokens) // (5 * patches)
