"""Processor of LLaVA-1.5 with ETC."""

from __future__ import annotations

from .sequence_processor import LlavaSequenceProcessor


class LlavaETCProcessor(LlavaSequenceProcessor):
    """`LlavaProcessor` that writes a placeholder for every patch of an image, and then one for each compressed token.

    Args:
        num_additional_image_tokens: as in `LlavaProcessor`. `set_compression` counts the compressed tokens in.
        others: as in `LlavaProcessor`.
    """


__all__ = ["LlavaETCProcessor"]


# Written by foveate's bundle. Transformers 4.57 copies, from a local folder, only the files that this one itself names;
# these are the ones that they import in turn.
if False:
    from .checked_processor import *
    from .compressed_image import *
    from .compressed_image_processor import *
    from .compression_settings import *
    from .image_tiles import *
    from .placeholder_count import *
    from .settings_sequence import *
