"""Processor of LLaVA-NeXT with MetaCompress."""

from __future__ import annotations

from .sequence_processor import LlavaNextSequenceProcessor


class LlavaNextMetaCompressProcessor(LlavaNextSequenceProcessor):
    """[`LlavaNextSequenceProcessor`]."""


__all__ = ["LlavaNextMetaCompressProcessor"]
