"""Processor of LLaVA-NeXT with a training-free baseline (random, sample, spatial)."""

from __future__ import annotations

from .sequence_processor import LlavaNextSequenceProcessor


class LlavaNextBaselineProcessor(LlavaNextSequenceProcessor):
    """[`LlavaNextSequenceProcessor`]."""


__all__ = ["LlavaNextBaselineProcessor"]
