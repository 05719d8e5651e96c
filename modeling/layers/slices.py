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
from typing import Any

import torch


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


def slice_grid_of(config: Any, image_size: Sequence[int]) -> SliceGrid:
    """The views of an image of (height, width) pixels, by the config of a LLaVA-Meteor."""
    vision = config.vision_config
    return slice_grid(image_size, vision.image_size, vision.patch_size, config.compression.max_slices)


class SliceLayout:
    """The views of a batch of images, image after image, the overview first in each.

    Args:
        grids: one an image.
        device: where the indices are wanted.

    Attributes:
        shapes: (rows, columns) of patches of each view.
        rows, columns: the same, (views,) each, on the device.
    """

    def __init__(self, grids: list[SliceGrid], device: torch.device):
        self.grids, self.device = grids, device
        self.shapes = [shape for grid in grids for shape in grid.shapes]
        self.rows, self.columns = self._to_device(torch.tensor(self.shapes)).unbind(1)
        self.lengths = [rows * columns for rows, columns in self.shapes]

    @property
    def num_views(self) -> int:
        return len(self.shapes)

    @property
    def num_patches(self) -> torch.Tensor:
        """(views,), on the device."""
        return self.rows * self.columns

    @property
    def most_patches(self) -> int:
        """Of a view; shorter ones are padded to it."""
        return max(self.lengths)

    def present(self) -> torch.Tensor | None:
        """(views, most patches) bool, the patches that are not padding; `None` where all views have as many."""
        if min(self.lengths) == self.most_patches:
            return None
        return torch.arange(self.most_patches, device=self.device) < self.num_patches[:, None]

    def rows_of_views(self, most_views: int) -> torch.Tensor:
        """(views,), where each view is among the views of a padded batch, `most_views` an image."""
        rows = [torch.arange(grid.num_views) + image * most_views for image, grid in enumerate(self.grids)]
        return self._to_device(torch.cat(rows))

    def order(self, num_kept: int) -> torch.Tensor:
        """The sequence of every image, image after image: its overview, then its slices row by row, a comma between the
        slices of a row, a newline between rows.

        Args:
            num_kept: tokens of every view, the first of which are not padding.

        Returns:
            (tokens of all images,) indices into the tokens, view after view, and after them one comma and one newline.
        """
        comma = torch.tensor([self.num_views * num_kept])
        pieces, first = [], 0
        for grid in self.grids:
            for view in range(grid.num_views):
                if view > 1:
                    pieces.append(comma + ((view - 1) % grid.columns == 0))
                number = min(num_kept, self.lengths[first + view])
                pieces.append((first + view) * num_kept + torch.arange(number))
            first += grid.num_views
        return self._to_device(torch.cat(pieces))

    def _to_device(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.device, non_blocking=True)
