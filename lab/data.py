"""The lab's training scenes as examples for `foveate train --data lab:NUMBER`."""

from __future__ import annotations

from functools import partial

from PIL import Image
from torch.utils.data import Dataset

from foveate.lab.language import TYPE_SHARES
from foveate.lab.large_scenes import draw_large_scene, draw_sliced_scene
from foveate.lab.scenes import QUESTION_TYPES, Scene, ask_questions, describe, draw_scenes, sample_scene
from foveate.training.data import DataSource, Example
from foveate.training.recipe import StageRecipe


LAB_SCENES = 8192
_LAB_SEED = 2  # the scenes that the lab's base model was trained with


def _small_pictures(scene: Scene) -> Image.Image:
    pictures, _ = draw_scenes([scene], augment=True)
    return Image.fromarray(pictures[0].permute(1, 2, 0).numpy())


def _large_pictures(scene: Scene) -> Image.Image:
    return draw_large_scene(scene, augment=True)


def _sliced_pictures(scene: Scene) -> Image.Image:
    return draw_sliced_scene(scene, augment=True)


#: How the scenes are drawn, by what `data` in a recipe calls them.
PICTURES = {"lab": _small_pictures, "lab-next": _large_pictures, "lab-sliced": _sliced_pictures}


class LabExamples(Dataset):
    """The lab's training scenes with a description, a question or a dialogue each, other words every time a scene
    returns.

    Example `position` is about scene `position % len(self)`, in its round `position // len(self)`; it is a pure
    function of position and seed.

    Args:
        number: of scenes.
        examples: "descriptions", "questions" or "dialogues".
        seed: chooses the words.
        pictures: a name in `PICTURES`.
        turns: questions of a dialogue.
    """

    def __init__(self, number: int, examples: str, seed: int, pictures: str = "lab", turns: int = 6):
        self.number, self.examples, self.seed, self.pictures = number, examples, seed, pictures
        self.turns = turns if examples == "dialogues" else 1
        kind = "larger scenes" if pictures != "lab" else "scenes"
        self.summary = f"{number} {kind} of the lab, {examples}"

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, position: int) -> Example:
        epoch, index = divmod(position, self.number)
        scene = sample_scene("train", index, seed=_LAB_SEED)
        stream = 10_000 * (self.seed + 1) + 2 * epoch  # streams of no other use of the scenes
        if self.examples == "descriptions":
            asked = [describe(scene, stream)]
        else:
            kinds = scene.random(stream + 1).choice(len(QUESTION_TYPES), size=self.turns, p=TYPE_SHARES)
            asked = ask_questions(scene, [QUESTION_TYPES[int(kind)] for kind in kinds], stream)
        first, later = asked[0], tuple((qa.question, qa.answer) for qa in asked[1:])
        return Example(f"scene {index}", first.question, first.answer, (PICTURES[self.pictures](scene),), later)


def _open(stage: StageRecipe, number: int, pictures: str) -> LabExamples:
    examples = "dialogues" if stage.dialogues else stage.lab_examples
    return LabExamples(number, examples, stage.seed, pictures, stage.lab_turns)


SOURCES = {name: DataSource(partial(_open, pictures=name), LAB_SCENES, "scenes") for name in PICTURES}
