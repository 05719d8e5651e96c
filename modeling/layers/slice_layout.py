"""The views that images are cut into, for a batch of images at once: where they are, and where their tokens go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from foveate.modeling.layers.slices import SliceGrid, slice_grid


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
