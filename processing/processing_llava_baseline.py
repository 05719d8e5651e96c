"""Processor of LLaVA-1.5 with a training-free baseline (random, sample, spatial)."""

from __future__ import annotations

from foveate.processing.sequence import LlavaSequenceProcessor


class LlavaBaselineProcessor(LlavaSequenceProcessor):
    """[`LlavaSequenceProcessor`]."""


__all__ = ["LlavaBaselineProcessor"]
