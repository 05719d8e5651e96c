"""How LLaVA-NeXT cuts an image into tiles, and how many tokens are left of each tile when it is compressed.

The first tile is the whole image, made small. The others are a grid of it at a larger resolution, with padding where
the image is narrower than the grid; a token in the padding never reaches the language model, and a newline token ends
each row of the grid. All sizes here are in patches but for the image's own, in pixels; height comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.image_processing_utils import select_best_resolution


@dataclass(frozen=True)
class TileGrid:
    """The grid of an image's tiles.

    Args:
        side: patches along a side of a tile.
        rows, columns: tiles of the grid; the overview tile is one more.
        top, bottom, left, right: the part of the grid that is image and not padding, in patches.
    """

    side: int
    rows: int
    columns: int
    top: int
    bottom: int
    left: int
    right: int

    @property
    def num_tiles(self) -> int:
        return 1 + self.rows * self.columns

    @property
    def num_newlines(self) -> int:
        return self.bottom - self.top

    def patches_of_tiles(self) -> list[int]:
        """Patches of every tile that are not padding, the overview first."""
        heights = [_overlap(row * self.side, self.side, self.top, self.bottom) for row in range(self.rows)]
        widths = [_overlap(column * self.side, self.side, self.left, self.right) for column in range(self.columns)]
        return [self.side**2] + [height * width for height in heights for width in widths]

    def num_tokens(self, num_visual_tokens: int) -> int:
        """Tokens of the image when no tile keeps more than `num_visual_tokens`, the newlines included."""
        return sum(min(num_visual_tokens, patches) for patches in self.patches_of_tiles()) + self.num_newlines


def _overlap(start: int, length: int, low: int, high: int) -> int:
    return max(0, min(start + length, high) - max(start, low))


def tile_grid(image_size: Sequence[int], pinpoints: list[list[int]], tile_size: int, patch_size: int) -> TileGrid:
    """The grid that LLaVA-NeXT cuts an image into.

    Args:
        image_size: (height, width) in pixels.
        pinpoints: the resolutions that grids may have, as in the model's config.
        tile_size, patch_size: their sides in pixels.
    """
    height, width = (int(length) for length in image_size)
    best_height, best_width = select_best_resolution((height, width), pinpoints)
    side = tile_size // patch_size
    rows, columns = best_height // tile_size, best_width // tile_size
    num_rows, num_columns = rows * side, columns * side
    pad_rows = pad_columns = 0
    # As the stock model computes it, rounding included.
    if width / height > num_columns / num_rows:
        pad_rows = (num_rows - int(round(height * (num_columns / width), 7))) // 2
    else:
        pad_columns = (num_columns - int(round(width * (num_rows / height), 7))) // 2
    return TileGrid(side, rows, columns, pad_rows, num_rows - pad_rows, pad_columns, num_columns - pad_columns)


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
