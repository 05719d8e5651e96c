"""Processor of LLaVA-NeXT with MetaCompress."""

from __future__ import annotations

from foveate.processing.sequence import LlavaNextSequenceProcessor


class LlavaNextMetaCompressProcessor(LlavaNextSequenceProcessor):
    """[`LlavaNextSequenceProcessor`]."""


__all__ = ["LlavaNextMetaCompressProcessor"]
