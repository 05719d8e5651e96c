"""How LLaVA-NeXT cuts an image into tiles, and how many tokens are left of each tile when it is compressed.

The first tile is the whole image, made small. The others are a grid of it at a larger resolution, with padding where
the image is narrower than the grid; a token in the padding never reaches the language model, and a newline token ends
each row of the grid. All sizes here are in patches but for the image's own, in pixels; height comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
