"""Processor of LLaVA-NeXT with a training-free baseline (random, sample, spatial)."""

from __future__ import annotations

from foveate.processing.sequence import LlavaNextSequenceProcessor


class LlavaNextBaselineProcessor(LlavaNextSequenceProcessor):
    """[`LlavaNextSequenceProcessor`]."""


__all__ = ["LlavaNextBaselineProcessor"]
