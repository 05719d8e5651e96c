"""Processor of LLaVA-1.5 with ETC."""

from __future__ import annotations

from foveate.processing.sequence import LlavaSequenceProcessor


class LlavaETCProcessor(LlavaSequenceProcessor):
    """`LlavaProcessor` that writes a placeholder for every patch of an image, and then one for each compressed token.

    Args:
        num_additional_image_tokens: as in `LlavaProcessor`. `set_compression` counts the compressed tokens in.
        others: as in `LlavaProcessor`.
    """


__all__ = ["LlavaETCProcessor"]
