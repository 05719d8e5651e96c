"""The lab's scenes: reproducible, honest splits, and answers that are true."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers.image_processing_utils import select_best_resolution

from foveate.lab.large_scenes import (
    PINPOINTS,
    SHAPES_IN_SLICES,
    SHAPES_IN_TILES,
    canvas_of,
    draw_large_scene,
    draw_sliced_scene,
)
from foveate.lab.scenes import (
    CELL_SIZE,
    COLOURS,
    DIGITS,
    IMAGE_SIZE,
    PATCH_SIZE,
    PLACES,
    QUESTION_TYPES,
    SPLITS,
    _sprites_of,
    ask_questions,
    describe,
    draw_scenes,
    sample_scene,
)
from foveate.modeling.layers.slices import slice_grid


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


def test_scenes_are_the_ones_that_results_were_measured_on():
    """The mean of each cell and colour of one picture, as drawn when the weights were trained (machines differ by
    less)."""
    expected = [
        [[76.5, 90.3, 62.1], [98.5, 78.2, 91.6], [52.6, 96.1, 66.4]],
        [[72.1, 89.1, 74.6], [79.9, 76.5, 77.8], [51.3, 67.7, 89.3]],
        [[56.6, 68.4, 129.2], [59.6, 81.6, 103.9], [56.1, 71.6, 95.2]],
    ]
    scene = sample_scene("test", 0)
    pictures, _ = draw_scenes([scene])
    means = pictures[0].float().view(3, 3, CELL_SIZE, 3, CELL_SIZE).mean((2, 4))
    torch.testing.assert_close(means, torch.tensor(expected), atol=0.1, rtol=0)


def test_a_large_scene_is_always_the_same_and_comes_in_many_sizes():
    scenes = [sample_scene("validation", index) for index in range(60)]
    canvases = [canvas_of(scene) for scene in scenes]
    assert canvases == [canvas_of(scene) for scene in scenes]
    assert {(canvas.rows, canvas.columns) for canvas in canvases} == set(SHAPES_IN_TILES)
    assert len({canvas.size for canvas in canvases}) > 40
    pictures = [draw_large_scene(scene) for scene in scenes[:5]]
    assert [picture.size for picture in pictures] == [canvas.size for canvas in canvases[:5]]
    assert all(picture == draw_large_scene(scene) for picture, scene in zip(pictures, scenes))
    assert pictures[0] != draw_large_scene(scenes[0], augment=True)
    assert draw_large_scene(scenes[0], augment=True).size == pictures[0].size


def test_a_scene_for_slices_is_read_in_up_to_six_of_them():
    """At about their own resolution: a canvas of several tiles is cut where its tiles meet, but for small ones."""
    found = {}
    for index in range(150):
        scene = sample_scene("train", index)
        canvas, picture = canvas_of(scene, SHAPES_IN_SLICES), draw_sliced_scene(scene)
        assert picture.size == canvas.size
        grid = slice_grid(canvas.size[::-1], IMAGE_SIZE, PATCH_SIZE, 6)
        found.setdefault((canvas.rows, canvas.columns), set()).add((grid.rows, grid.columns))
    assert set(found) == set(SHAPES_IN_SLICES)
    assert {(2, 3), (3, 2)} <= set().union(*found.values())
    assert (2, 2) in found[2, 2]


def test_a_large_scene_is_read_in_the_tiles_that_it_was_drawn_in():
    for index in range(500):
        canvas = canvas_of(sample_scene("train", index))
        width, height = canvas.size
        tiles = tuple(IMAGE_SIZE * side for side in (canvas.rows, canvas.columns))
        assert tuple(select_best_resolution((height, width), PINPOINTS)) == tiles


@pytest.mark.parametrize("index", range(12))
def test_an_object_of_a_large_scene_lies_in_one_cell_of_its_place(index):
    """Against the same canvas with its objects in black and white: only their cells differ, and all of them do."""
    scene = sample_scene("test", index)
    canvas = canvas_of(scene)
    for item, (row, column) in zip(scene.objects, canvas.cells):
        assert (row // canvas.rows, column // canvas.columns) == divmod(PLACES.index(item.place), 3)
    repainted = dataclasses.replace(
        scene,
        objects=tuple(dataclasses.replace(o, colour="blue" if o.colour == "red" else "red") for o in scene.objects),
    )
    assert canvas_of(repainted) == canvas
    drawn, again = (
        np.asarray(draw_large_scene(one).resize((3 * CELL_SIZE * canvas.columns, 3 * CELL_SIZE * canvas.rows)), float)
        for one in (scene, repainted)
    )
    changed = np.abs(drawn - again).max(2).reshape(3 * canvas.rows, CELL_SIZE, 3 * canvas.columns, CELL_SIZE)
    changed = (changed > 40).mean((1, 3)) > 0.01
    assert {(int(row), int(column)) for row, column in zip(*changed.nonzero())} == set(canvas.cells)
