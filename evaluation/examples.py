"""What is asked: an image and the turns asked about it; and pictures that are drawn, by number."""

from __future__ import annotations

from collections.abc import Callable
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


@dataclass(frozen=True)
class DrawnPicture:
    """A picture with what it shows, in words, and questions about it that have an answer in it."""

    image: Image.Image
    caption: str
    questions: tuple[str, ...]


@dataclass(frozen=True)
class PictureSource:
    """Pictures to ask about that no file holds, by number: `foveate ask CKPT NAME:NUMBER`.

    Args:
        title: what one of them is, for readers ("scene of the lab").
        draw: number, from 0 → the picture, the same one each time.
    """

    title: str
    draw: Callable[[int], DrawnPicture]
