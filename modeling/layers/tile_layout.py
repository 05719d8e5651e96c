"""Where the tokens of LLaVA-NeXT's tiles stand in the sequence of their image, for a batch of images at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from foveate.modeling.layers.tiles import TileGrid, tile_grid


def tile_grid_of(config: Any, image_size: Sequence[int]) -> TileGrid:
    """The grid of tiles of an image of (height, width) pixels, by the config of a LLaVA-NeXT."""
    vision = config.vision_config
    return tile_grid(image_size, config.image_grid_pinpoints, vision.image_size, vision.patch_size)


class TileLayout:
    """The tiles of a batch of images, image after image, the overview first in each.

    Args:
        grids: one an image.
        device: where the indices are wanted.

    Attributes:
        image_of_tile: (tiles,), the image of each tile.
    """

    def __init__(self, grids: list[TileGrid], device: torch.device):
        self.grids, self.device = grids, device
        rows = [
            # image, whether overview, first row and column of the tile, and the part that is image
            (image, tile == 0, *_corner(grid, tile), *_bounds(grid, tile))
            for image, grid in enumerate(grids)
            for tile in range(grid.num_tiles)
        ]
        (
            self.image_of_tile,
            self._is_overview,
            self._row,
            self._column,
            self._top,
            self._bottom,
            self._left,
            self._right,
        ) = torch.tensor(rows).to(device, non_blocking=True).unbind(1)
        self._side, self._width = grids[0].side, max(grid.columns * grid.side for grid in grids)

    @property
    def num_tiles(self) -> int:
        return sum(grid.num_tiles for grid in self.grids)

    @property
    def num_newlines(self) -> int:
        return sum(grid.num_newlines for grid in self.grids)

    def rows_of_tiles(self, most_tiles: int) -> torch.Tensor:
        """(tiles,), where each tile is among the tiles of a padded batch, `most_tiles` an image."""
        rows = [image * most_tiles + tile for image, grid in enumerate(self.grids) for tile in range(grid.num_tiles)]
        return torch.tensor(rows).to(self.device, non_blocking=True)

    def is_image(self, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Which patches are not padding.

        Args:
            positions: (tiles, tokens), patches of each tile; all of them if `None`.

        Returns:
            (tiles, tokens) bool.
        """
        if positions is None:
            positions = torch.arange(self._side**2, device=self.device)[None]
        row, column = self._place(positions)
        rows = (row >= self._top[:, None]) & (row < self._bottom[:, None])
        return rows & (column >= self._left[:, None]) & (column < self._right[:, None])

    def order(self, positions: torch.Tensor) -> torch.Tensor:
        """The sequence of every image, image after image: its overview, then the rows of its grid, each with a newline.

        Args:
            positions: (tiles, tokens), the patch that each token was.

        Returns:
            (tokens of all images,) indices into the tokens, tile after tile, with the newlines of all images after
            them. Tokens of the padding are left out.
        """
        row, column = self._place(positions)
        in_image = torch.where(self._is_overview[:, None] == 1, positions, self._side**2 + self._key(row, column))
        last = self._side**2 + self._key(max(grid.rows for grid in self.grids) * self._side, 0)  # beyond every image's
        keys = self.image_of_tile[:, None] * last + in_image
        padding = ~self.is_image(positions)
        keys = keys.masked_fill(padding, len(self.grids) * last).flatten()
        newlines = [
            image * last + self._side**2 + self._key(row, self._width)
            for image, grid in enumerate(self.grids)
            for row in range(grid.top, grid.bottom)
        ]
        keys = torch.cat([keys, torch.tensor(newlines).to(self.device, non_blocking=True)])
        total = sum(grid.num_tokens(positions.shape[1]) for grid in self.grids)
        return keys.argsort(stable=True)[:total]

    def _place(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column in the grid (or the overview) of the patches of each tile."""
        return positions // self._side + self._row[:, None], positions % self._side + self._column[:, None]

    def _key(self, row, column):
        return row * (self._width + 1) + column


def _corner(grid: TileGrid, tile: int) -> tuple[int, int]:
    if tile == 0:
        return 0, 0
    return (tile - 1) // grid.columns * grid.side, (tile - 1) % grid.columns * grid.side


def _bounds(grid: TileGrid, tile: int) -> tuple[int, int, int, int]:
    if tile == 0:
        return 0, grid.side, 0, grid.side
    return grid.top, grid.bottom, grid.left, grid.right
