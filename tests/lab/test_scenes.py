"""The lab's scenes: reproducible, honest splits, and answers that are true."""

import numpy as np
import pytest
import torch

from foveate.lab.scenes import (
    COLOURS,
    DIGITS,
    PLACES,
    QUESTION_TYPES,
    SPLITS,
    _sprites_of,
    ask_questions,
    describe,
    draw_scenes,
    sample_scene,
)


def test_no_handwritten_digit_is_in_two_splits():
    sprites = [{int(s) for name in DIGITS for s in _sprites_of(split)[name]} for split in SPLITS]
    assert all(sprites)
    assert not (sprites[0] & sprites[1] or sprites[0] & sprites[2] or sprites[1] & sprites[2])


def test_a_scene_is_the_same_in_every_batch():
    scenes = [sample_scene("test", index) for index in range(5)]
    together, _ = draw_scenes(scenes)
    alone, _ = draw_scenes([sample_scene("test", 3)])
    assert torch.equal(together[3], alone[0])
    assert sample_scene("test", 3, seed=1) != sample_scene("test", 3)


def test_patches_are_covered_where_objects_are_and_nowhere_else():
    scene = sample_scene("train", 0)
    _, covered = draw_scenes([scene])
    cells = covered.view(3, 4, 3, 4).amax((1, 3)).flatten() > 0.05
    assert [PLACES[i] for i in cells.nonzero().flatten()] == [item.place for item in scene.objects]


@pytest.mark.parametrize("index", range(20))
def test_answers_are_true(index):
    """Checked against the list of objects, by other means than those that made the answers."""
    scene = sample_scene("test", index)
    by_place = {item.place: item for item in scene.objects}
    for qa in ask_questions(scene, QUESTION_TYPES):
        words = qa.question.rstrip("?").split()
        assert 1 <= len(qa.answer.split()) <= 3
        if qa.type == "what":
            place = qa.question.split(" at the ")[1].rstrip("?")
            assert qa.answer == ("word" if by_place[place].kind == "word" else by_place[place].name)
        elif qa.type == "where":
            colour, name = by_place[qa.answer].colour, by_place[qa.answer].name
            assert name in words or colour in words
        elif qa.type == "read":
            assert any(item.kind == "word" and item.name == qa.answer for item in scene.objects)
        elif qa.type == "colour":
            assert qa.answer in {item.colour for item in scene.objects}
        elif qa.type == "count":
            wanted = [w for w in words if w in COLOURS or w.rstrip("s") in ("digit", "shape", "word")]
            match = [o for o in scene.objects if not wanted or o.colour == wanted[0] or o.kind == wanted[0].rstrip("s")]
            assert qa.answer == str(len(match))
        elif qa.type == "exist":
            named = [o for o in scene.objects if o.name in words]
            wanted = set(words) & set(COLOURS)
            assert qa.answer == ("yes" if any(not wanted or o.colour in wanted for o in named) else "no")


def test_yes_and_no_are_about_as_frequent():
    answers = [qa.answer for i in range(300) for qa in ask_questions(sample_scene("test", i), ["exist"])]
    assert 0.4 < np.mean([answer == "yes" for answer in answers]) < 0.65


def test_a_description_names_every_object():
    scene = sample_scene("test", 0)
    assert all(item.noun in describe(scene).answer and item.place in describe(scene).answer for item in scene.objects)
