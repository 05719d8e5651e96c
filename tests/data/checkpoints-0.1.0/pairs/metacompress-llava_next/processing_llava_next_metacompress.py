"""Processor of LLaVA-NeXT with MetaCompress."""

from __future__ import annotations

from .sequence_processor import LlavaNextSequenceProcessor


class LlavaNextMetaCompressProcessor(LlavaNextSequenceProcessor):
    """[`LlavaNextSequenceProcessor`]."""


__all__ = ["LlavaNextMetaCompressProcessor"]


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
