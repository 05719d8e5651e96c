"""The lab's tasks: questions about its test scenes, for `foveate evaluate --task`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from PIL import Image

from foveate.evaluation.examples import Example, Turn
from foveate.evaluation.tasks import Task
from foveate.lab.large_scenes import draw_large_scene, draw_sliced_scene
from foveate.lab.scenes import QUESTION_TYPES, Scene, ask_questions, draw_scene, sample_scene


def _lab_examples(
    number: int, seed: int, num_turns: int, draw: Callable[[Scene], Image.Image | None]
) -> Iterator[Example]:
    """Questions about test scenes, in the order of the types."""
    index = -1
    for example in range(number):
        wanted = [QUESTION_TYPES[(example + turn) % len(QUESTION_TYPES)] for turn in range(num_turns)]
        found: list = []
        while [question.type for question in found] != wanted:  # a scene without a word has nothing to read
            index += 1
            scene = sample_scene("test", index, seed=seed)
            found = ask_questions(scene, wanted)
        yield Example(draw(scene), tuple(Turn(q.question, (q.answer,), q.type) for q in found))


# Single questions, one a scene, the types in rotation; and three of different types, so that over the dialogues every
# turn has all of them.
lab_questions = partial(_lab_examples, num_turns=1, draw=draw_scene)
lab_dialogues = partial(_lab_examples, num_turns=3, draw=draw_scene)
lab_blind_questions = partial(_lab_examples, num_turns=1, draw=lambda scene: None)
lab_next_questions = partial(_lab_examples, num_turns=1, draw=draw_large_scene)
lab_next_dialogues = partial(_lab_examples, num_turns=3, draw=draw_large_scene)
lab_sliced_questions = partial(_lab_examples, num_turns=1, draw=draw_sliced_scene)

TASKS = {
    "lab-vqa": Task("single questions about the lab's test scenes", lab_questions, 1200),
    "lab-dialogue": Task("dialogues of three turns about the lab's test scenes", lab_dialogues, 1000),
    "lab-vqa-blind": Task("the same single questions without the image", lab_blind_questions, 1200),
    "lab-next-vqa": Task("single questions about larger scenes, in tiles", lab_next_questions, 1200),
    "lab-next-dialogue": Task("dialogues of three turns about larger scenes, in tiles", lab_next_dialogues, 1000),
    "lab-sliced-vqa": Task("single questions about larger scenes, in slices", lab_sliced_questions, 1200),
}
