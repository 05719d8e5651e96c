"""Processor of LLaVA-1.5 with MetaCompress."""

from __future__ import annotations

from foveate.processing.sequence import LlavaSequenceProcessor


class LlavaMetaCompressProcessor(LlavaSequenceProcessor):
    """[`LlavaSequenceProcessor`]."""


__all__ = ["LlavaMetaCompressProcessor"]
