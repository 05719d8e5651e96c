"""What a task asks: an image and the turns asked about it."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Turn:
    """A question, its right answers (one, or what several people said), and the type that results are split by."""

    question: str
    answers: tuple[str, ...]
    type: str


@dataclass(frozen=True)
class Example:
    """An image, or none, and what is asked about it, turn after turn."""

    image: Image.Image | None
    turns: tuple[Turn, ...]
