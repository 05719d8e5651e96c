"""Position ids where they do not follow from the number of columns.

An image lies in a sequence with the tokens that it would have without compression: each that is left has its place
among them, and the text goes on where they end. In one dimension a place is a number, with M-RoPE it has several.
Places and the extent of an image are what the stock model itself lays out for it (`AnyBackboneMixin.lay_out`); here
they become position ids of columns.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

from foveate.modeling.core.image_inputs import locate_images
from foveate.modeling.core.outputs import VisualTokens


#: On a cache: what has to be added to the number of its columns, and of those that are there, for the next column's
#: position, (batch, 1) each.
_OFFSETS = "foveate_position_offsets"


def lay_out_columns(
    present: torch.Tensor,
    is_visual: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    extents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids of columns, from 0 in each row, (dimensions, batch, columns), and of what comes after them,
    (batch, 1).

    Args:
        present: (batch, columns) bool, which are no padding.
        is_visual: likewise, which are visual tokens; `None`: no column, there is one dimension then.
        places: (dimensions, batch, columns), the place of a visual token in its image; 0 elsewhere.
        extents: (batch, columns), how much further the text goes on, at an image's last visual token; 0 at its others.
    """
    step = present.long() if is_visual is None else torch.where(is_visual, extents, 1) * present  # type: ignore[arg-type]
    end = step.cumsum(1)
    start = (end - step)[None]
    return start if places is None else start + places, end[:, -1:]


def lay_out_images(
    present: torch.Tensor, is_visual: torch.Tensor, images: VisualTokens
) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`lay_out_columns`].

    Args:
        present, is_visual: (batch, columns) bool.
        images: row after row, with places and extents.
    """
    places: Any = images.places
    extents: Any = images.extents
    device, number = is_visual.device, torch.tensor(images.lengths, device=is_visual.device)
    rows, first = locate_images(is_visual, number)
    at_last = torch.zeros_like(is_visual, dtype=torch.int64)
    at_last[rows, first + number - 1] = extents.to(device)
    in_columns = torch.zeros((places.shape[1], *is_visual.shape), dtype=torch.int64, device=device)
    in_columns[:, is_visual] = places.to(device).T
    return lay_out_columns(present, is_visual, in_columns, at_last)


def next_positions(cache: Cache | None, mask: torch.Tensor | None, batch_size: int, device: torch.device) -> Any:
    """Of the column after those that a cache holds, (batch, 1), or 0.

    Args:
        mask: (batch, columns that the cache holds), which of them are there; `None`: all that were.
    """
    if cache is None or cache.get_seq_length() == 0:
        return 0
    offsets = getattr(cache, _OFFSETS, None)
    of_columns, of_present = (torch.zeros(1, 1, dtype=torch.int64),) * 2 if offsets is None else offsets
    offset = (of_columns if mask is None else of_present).to(device)
    offset = offset.repeat_interleave(batch_size // len(offset), dim=0)  # rows may have been repeated
    return offset + (cache.get_seq_length() if mask is None else mask.sum(1, keepdim=True))


def keep_next_positions(cache: Cache | None, mask: torch.Tensor | None, positions: torch.Tensor) -> None:
    """Has a cache remember the position of the next column.

    It is kept as a distance from the number of columns, and of those that are there, so that it stays right where
    columns of text are taken back, hidden or copied.

    Args:
        mask: (batch, columns), which of all columns are there; `None`: all.
        positions: (batch, 1).
    """
    if cache is not None:
        of_columns = positions - cache.get_seq_length()
        setattr(cache, _OFFSETS, (of_columns, of_columns if mask is None else positions - mask.sum(1, keepdim=True)))
