"""Position ids of text and images, where they follow from the columns of a prompt."""

from __future__ import annotations

import torch


def line_positions(present: torch.Tensor) -> torch.Tensor:
    """Position ids that count every column, (1, batch, columns), from 0 in each row.

    Args:
        present: (batch, columns) bool, which are no padding.
    """
    return (present.long().cumsum(1) - 1).clamp(min=0)[None]


def grid_positions(
    present: torch.Tensor, is_visual: torch.Tensor, places: torch.Tensor, extents: torch.Tensor
) -> torch.Tensor:
    """Qwen's position ids in time, height and width, (3, batch, columns), from 0 in each row: an image's tokens lie at
    their places in its grid, all at one time; text goes on after the largest of them.

    Args:
        present, is_visual: (batch, columns) bool.
        places: (2, batch, columns), row and column of a visual token in its image; 0 elsewhere.
        extents: (batch, columns), the longer side of an image's grid at its last visual token; 0 at its others.
    """
    step = torch.where(is_visual, extents, 1) * present
    base = step.cumsum(1) - step
    return torch.stack([base, base + places[0], base + places[1]])
