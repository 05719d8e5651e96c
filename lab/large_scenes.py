"""Scenes that are larger than one tile: the lab's worlds for models that read an image in tiles, or in slices.

A canvas is 2 × 2, 2 × 1, 1 × 2, 3 × 1 or 1 × 3 tiles of 168 pixels; for slices from 1 × 1 to 2 × 3 or 3 × 2. Each of
the nine places is a block of cells of 56 pixels, and its object lies in one of them at its usual size: no tile boundary
cuts it, and it is small in the overview. The background's tint changes from left to right and from top to bottom, so
that a patch shows by itself roughly which part of the picture it is from, as in most photographs. (Without, a patch's
column follows from nothing but its distance to the last newline, which so small a language model hardly learns to
measure.) The finished picture has many sizes. All choices come from the scene's own streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from foveate.lab.scenes import CELL_SIZE, GRID, IMAGE_SIZE, PLACES, Brush, Scene, background, draw_brush, paint


SHAPES_IN_TILES = ((2, 2), (2, 1), (1, 2), (3, 1), (1, 3))
"""(Rows, columns) of the canvases, in tiles."""

SHAPES_IN_SLICES = ((1, 1), (2, 1), (1, 2), (2, 2), (2, 3), (3, 2))
"""The same, of the world for LLaVA-Meteor, which cuts an image into at most six."""

PINPOINTS = [[168, 336], [336, 168], [336, 336], [504, 168], [168, 504]]
"""(Height, width) of the canvases in pixels, as LLaVA-NeXT's `image_grid_pinpoints`."""

Shapes = Sequence[tuple[int, int]]

_TINT = 14  # as strong as the random tints that the vision tower knows
_CANVAS_STREAM = 2**31  # far from those of questions and trainings
_SMALLEST_TILE, _LARGEST_TILE = 143, 193  # 0.85 and 1.15 of a tile


@dataclass(frozen=True)
class Canvas:
    """Where a large scene is drawn: `rows` × `columns` tiles, the (row, column) of each object among its cells of 56
    pixels, and the (width, height) in pixels to which the finished picture is resized."""

    rows: int
    columns: int
    cells: tuple[tuple[int, int], ...]
    size: tuple[int, int]


def canvas_of(scene: Scene, shapes: Shapes = SHAPES_IN_TILES) -> Canvas:
    """The canvas of a scene, always the same."""
    random = scene.random(_CANVAS_STREAM)
    rows, columns = shapes[int(random.integers(len(shapes)))]
    cells = []
    for item in scene.objects:
        row, column = divmod(PLACES.index(item.place), GRID)
        cells.append((row * rows + int(random.integers(rows)), column * columns + int(random.integers(columns))))
    squeezed = random.random() < 0.4
    # Only what fits into its own tiles is squeezed: enlarged as well, it would be read in more tiles than it has.
    side = int(random.integers(_SMALLEST_TILE, (IMAGE_SIZE if squeezed else _LARGEST_TILE) + 1))
    size = [columns * side, rows * side]
    if squeezed:
        along = int(random.integers(2))
        size[along] = round(size[along] * random.uniform(0.88, 0.97))
    return Canvas(rows, columns, tuple(cells), (size[0], size[1]))


def draw_large_scene(scene: Scene, augment: bool = False, shapes: Shapes = SHAPES_IN_TILES) -> Image.Image:
    """The picture of a scene on its canvas; `augment` as in `draw_scenes`."""
    canvas = canvas_of(scene, shapes)
    picture, brushes = _begin(scene, canvas, augment)
    _put(picture, canvas.cells, scene, brushes, augment)
    drawn = Image.fromarray(picture.clamp(0, 255).byte().permute(1, 2, 0).numpy())
    return drawn.resize(canvas.size, Image.Resampling.BICUBIC)


def draw_sliced_scene(scene: Scene, augment: bool = False) -> Image.Image:
    """The same in the world of slices."""
    return draw_large_scene(scene, augment, SHAPES_IN_SLICES)


def draw_in_one_tile(scene: Scene, augment: bool = False) -> torch.Tensor:
    """The same objects, drawn as on the canvas, but in the nine cells of one tile, uint8 (3, 168, 168)."""
    _, brushes = _begin(scene, canvas_of(scene), augment)
    picture = background(scene.random(1))
    _put(picture, [divmod(PLACES.index(item.place), GRID) for item in scene.objects], scene, brushes, augment)
    return picture.clamp(0, 255).byte()


def _begin(scene: Scene, canvas: Canvas, augment: bool) -> tuple[torch.Tensor, list[Brush]]:
    """The empty canvas and what its objects are drawn with."""
    random = scene.random(1)
    picture = background(random, canvas.rows, canvas.columns, _tint(canvas))
    return picture, [draw_brush(random, item, augment) for item in scene.objects]


def _tint(canvas: Canvas) -> torch.Tensor:
    """From blue at the left to red at the right, and greener towards the bottom, (3, height, width)."""
    down, right = (torch.linspace(-1, 1, IMAGE_SIZE * tiles) for tiles in (canvas.rows, canvas.columns))
    down, right = torch.meshgrid(down, right, indexing="ij")
    return _TINT * torch.stack([right, down, -right])


def _put(picture: torch.Tensor, places: Sequence, scene: Scene, brushes: list[Brush], augment: bool) -> None:
    """Draws the objects into cells of the picture, given as (row, column)."""
    cells = picture.unfold(1, CELL_SIZE, CELL_SIZE).unfold(2, CELL_SIZE, CELL_SIZE)  # (rgb, rows, columns, 56, 56)
    rows, columns = [row for row, _ in places], [column for _, column in places]
    painted, _ = paint(cells[:, rows, columns].transpose(0, 1), list(scene.sprites), brushes, augment)
    cells[:, rows, columns] = painted.transpose(0, 1)
