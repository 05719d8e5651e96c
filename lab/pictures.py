"""The lab's test scenes as pictures to ask about: `foveate ask CKPT lab:NUMBER` and `foveate demo`."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

from foveate.evaluation.examples import DrawnPicture, PictureSource
from foveate.lab.large_scenes import draw_large_scene, draw_sliced_scene
from foveate.lab.scenes import Scene, ask_questions, draw_scene, sample_scene


def _source(draw_image: Callable[[Scene], Image.Image]) -> PictureSource:
    def draw(number: int) -> DrawnPicture:
        scene = sample_scene("test", number)
        asked = ask_questions(scene, ("what", "colour", "where"))
        return DrawnPicture(draw_image(scene), scene.caption, tuple(question.question for question in asked))

    return PictureSource("scene of the lab", draw)


PICTURES = {
    "lab": _source(draw_scene),
    "lab-next": _source(draw_large_scene),
    "lab-sliced": _source(draw_sliced_scene),
}
