"""How LLaVA-Meteor cuts an image of any size into views (LLaVA-UHD's slicing), and how many tokens are left of it.

The first view is the whole image. A larger one is cut along a grid into at most `max_slices` slices besides. Every view
is resized to the area of the vision tower's own square, its aspect ratio kept, its sides whole patches; so views differ
in shape, but hardly in size. In the sequence of an image a comma stands between the slices of a row, a newline between
rows. Shapes are in patches, height first; sizes of images are in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SliceGrid:
    """The views of an image.

    Args:
        overview: (rows, columns) of patches of the whole image.
        rows, columns: slices; 0 where the overview is all there is.
        slice_shape: (rows, columns) of patches of every slice; (0, 0) without.
    """

    overview: tuple[int, int]
    rows: int = 0
    columns: int = 0
    slice_shape: tuple[int, int] = (0, 0)

    @property
    def num_slices(self) -> int:
        return self.rows * self.columns

    @property
    def num_views(self) -> int:
        return 1 + self.num_slices

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows, columns) of patches of every view, the overview first, then the slices row by row."""
        return [self.overview, *[self.slice_shape] * self.num_slices]

    @property
    def num_patches(self) -> int:
        """Patches of all views."""
        return sum(rows * columns for rows, columns in self.shapes)

    @property
    def num_separators(self) -> int:
        """Commas and newlines between slices."""
        return max(0, self.num_slices - 1)

    def num_tokens(self, num_visual_tokens: int) -> int:
        """Tokens of the image when no view keeps more than `num_visual_tokens`, the separators included."""
        kept = sum(min(num_visual_tokens, rows * columns) for rows, columns in self.shapes)
        return kept + self.num_separators


def slice_grid(image_size: Sequence[int], view_size: int, patch_size: int, max_slices: int) -> SliceGrid:
    """The views of an image.

    Args:
        image_size: (height, width) in pixels.
        view_size: side of the square whose area every view has, in pixels.
        patch_size: side of a patch in pixels.
        max_slices: most slices beside the overview.
    """
    height, width = (int(length) for length in image_size)
    overview = _view_shape(height, width, view_size, patch_size)
    rows, columns = _choose_grid(height, width, view_size, max_slices)
    if rows * columns == 1:
        return SliceGrid(overview)
    return SliceGrid(overview, rows, columns, _view_shape(height / rows, width / columns, view_size, patch_size))


def _choose_grid(height: int, width: int, view_size: int, max_slices: int) -> tuple[int, int]:
    """Rows and columns of the grid whose cells are closest to squares, of about as many cells as the image has areas of
    a view; (1, 1) where it has no more than one."""
    ideal = min(-(-height * width // view_size**2), max_slices)
    if ideal <= 1:
        return 1, 1
    grids = [
        (number // columns, columns)
        for number in (ideal - 1, ideal, ideal + 1)
        if 1 < number <= max_slices
        for columns in range(1, number + 1)
        if number % columns == 0
    ]
    aspect = math.log(width / height)
    # Of equally good ones (to rounding) the first: fewer slices, then fewer columns.
    return min(grids, key=lambda grid: round(abs(aspect - math.log(grid[1] / grid[0])), 9))


def _view_shape(height: float, width: float, view_size: int, patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches of a view of about `view_size`² pixels with this aspect ratio."""
    stretch = math.sqrt(height / width)
    side = view_size / patch_size
    return max(1, round(side * stretch)), max(1, round(side / stretch))


def most_patches(view_size: int, patch_size: int, max_aspect_ratio: int) -> int:
    """Patches of the view that has the most of them: rounding to whole patches can add to the area."""
    side = view_size / patch_size
    narrowest = side / math.sqrt(max_aspect_ratio)
    most = 1
    for rows in range(1, math.ceil(side) + 1):
        if rows + 0.5 > narrowest:
            before_rounding = max(rows - 0.5 if rows > 1 else 0, narrowest)
            most = max(most, rows * max(1, round(side * side / before_rounding)))
    return most
