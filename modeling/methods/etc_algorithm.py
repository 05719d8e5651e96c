"""Extreme Token Compression (ETC): who sees what around the compressed tokens, and in which passes that is run.

For each image the language model reads its n visual tokens V and, right after them, M learned compressed tokens Z. Z
attends to all that came before, V among it; what comes after attends to text and Z, never to V. One masked pass says
so; the same comes of plain causal passes that each end with an image's Z, with V's keys and values dropped in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from foveate.modeling.core.positions import lay_out_columns


class CompressedTokens(nn.Module):
    """The embeddings of Z, (number of tokens that were trained, width of the language model)."""

    def __init__(self, num_tokens: int, width: int):
        super().__init__()
        self.embeddings = nn.Parameter(torch.empty(num_tokens, width))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embeddings, std=0.02)

    def resize(self, num_tokens: int) -> None:
        """Cuts the last tokens off, or adds new ones."""
        before = self.embeddings
        self.embeddings = nn.Parameter(before.new_empty(num_tokens, before.shape[1]))
        self.reset_parameters()
        with torch.no_grad():
            self.embeddings[: len(before)] = before[:num_tokens]

    def forward(self, num_tokens: int) -> torch.Tensor:
        """(num_tokens, width), the first ones."""
        # Not a view, which hooks on modules (accelerate's, profilers') take for something to differentiate.
        return self.embeddings.index_select(0, torch.arange(num_tokens, device=self.embeddings.device))


@dataclass
class ImageColumns:
    """Where the images of a batch lie; all on the host.

    Args:
        rows, first: (images,), row and first column of each image.
        lengths: (images,), n of each; its columns are n visual tokens, then M compressed ones.
        num_compressed: M.
        present: (batch, columns) bool, which columns are not padding.
        image: (batch, columns), the image that a column belongs to, −1 for none.
        offset: (batch, columns), the column's place in its image, from 0 to n + M − 1; 0 outside.
    """

    rows: torch.Tensor
    first: torch.Tensor
    lengths: torch.Tensor
    num_compressed: int
    present: torch.Tensor
    image: torch.Tensor
    offset: torch.Tensor

    @property
    def visual(self) -> torch.Tensor:
        """(batch, columns) bool, V."""
        return (self.image >= 0) & (self.offset < self.lengths[self.image])

    @property
    def compressed(self) -> torch.Tensor:
        """(batch, columns) bool, Z."""
        return (self.image >= 0) & (self.offset >= self.lengths[self.image])

    @property
    def segment(self) -> torch.Tensor:
        """(batch, columns): how many images of the row end before the column."""
        is_last = (self.image >= 0) & (self.offset == self.lengths[self.image] + self.num_compressed - 1)
        return is_last.cumsum(1) - is_last.long()

    def columns_of(self, compressed: bool) -> torch.Tensor:
        """Columns of V (images, longest n) or of Z (images, M), −1 beyond an image's own."""
        if compressed:
            return self.first[:, None] + self.lengths[:, None] + torch.arange(self.num_compressed)
        places = torch.arange(int(self.lengths.max()))
        return torch.where(places < self.lengths[:, None], self.first[:, None] + places, -1)


def locate_columns(
    is_placeholder: torch.Tensor, present: torch.Tensor, lengths: list[int], num_compressed: int
) -> ImageColumns:
    """Finds the columns of each image.

    Args:
        is_placeholder: (batch, columns) bool, on the host: n + M columns an image, images row after row.
        present: (batch, columns) bool.
        lengths: n of each image.
        num_compressed: M.

    Raises:
        ValueError: the placeholders are not n + M in a row for every image.
    """
    counts = torch.tensor(lengths) + num_compressed
    places = is_placeholder.flatten().nonzero()[:, 0]
    width = is_placeholder.shape[1]
    fits = len(places) == int(counts.sum())
    if fits:
        starts = counts.cumsum(0) - counts
        first, last = places[starts], places[starts + counts - 1]
        fits = bool(((last - first == counts - 1) & (first // width == last // width)).all())
    if not fits:
        expected = " + ".join(f"({n} + {num_compressed})" for n in lengths[:4]) + (" + …" if len(lengths) > 4 else "")
        raise ValueError(
            f"{len(lengths)} image(s) need {expected} = {int(counts.sum())} placeholder tokens, each "
            f"image's visual tokens and right after them its compressed ones, but input_ids has {len(places)}, or has "
            "them apart: let the processor write them, with the same compression settings as the model "
            "(set_compression changes both), and pass exactly the images that they stand for."
        )
    image, offset = torch.full((2, *is_placeholder.shape), -1)
    image.view(-1)[places] = torch.arange(len(lengths)).repeat_interleave(counts)
    offset.fill_(0).view(-1)[places] = torch.arange(len(places)) - starts.repeat_interleave(counts)
    return ImageColumns(first // width, first % width, torch.tensor(lengths), num_compressed, present, image, offset)


def bottleneck_mask(columns: ImageColumns, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The additive attention mask of the masked pass, (batch, 1, columns, columns): causal, and V is seen only from its
    own image's V and Z."""
    length = columns.present.shape[1]
    visual, segment = columns.visual.to(device), columns.segment.to(device)
    allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril() & columns.present.to(device)[:, None]
    allowed = allowed & (~visual[:, None] | (segment[:, :, None] == segment[:, None]))
    allowed = allowed | torch.eye(length, dtype=torch.bool, device=device)  # padding sees itself: no empty softmax
    hidden = torch.finfo(dtype).min
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, hidden)[:, None]


@dataclass
class Pass:
    """One plain causal pass: for every row the columns up to the end of its next image, pushed to the right.

    Args:
        columns: (batch, width), −1 where a row has fewer.
        kept: (batch, kept width), entries of the pass whose keys and values stay, pushed to the right, −1 as above;
            `None`: all of them.
        images: indices of the images that end in this pass.
        has_gaps: whether any row has fewer columns than others.
    """

    columns: torch.Tensor
    kept: torch.Tensor | None
    images: torch.Tensor
    has_gaps: bool


def plan_passes(columns: ImageColumns, run_images: bool = True) -> list[Pass]:
    """The passes that together are the masked pass; as many as a row has images at most, and one for what comes after.

    Args:
        columns: of the batch.
        run_images: whether V and Z run at all; else their keys and values come from elsewhere, after each pass.
    """
    segment, visual = columns.segment, columns.visual
    num_images = torch.zeros(len(segment), dtype=torch.int64).index_add_(0, columns.rows, torch.ones_like(columns.rows))
    last = int(num_images.max())
    segment = torch.where(segment == num_images[:, None], last, segment)  # rows with fewer images end with the others
    runs = columns.present if run_images else columns.present & (columns.image < 0)
    nth = columns.segment[columns.rows, columns.first]
    passes = []
    for number in range(last + 1):
        images = (nth == number).nonzero()[:, 0] if number < last else torch.zeros(0, dtype=torch.int64)
        found = push_right(runs & (segment == number))
        if found.shape[1] or len(images):
            evicted = (found >= 0) & visual.gather(1, found.clamp(min=0))
            kept = push_right((found >= 0) & ~evicted) if evicted.any() else None
            passes.append(Pass(found, kept, images, bool((found < 0).any())))
    return passes


def push_right(chosen: torch.Tensor) -> torch.Tensor:
    """(batch, columns) bool → (batch, most chosen in a row), the chosen columns of each row in order at the right, −1
    before them."""
    width = int(chosen.sum(1).max())
    order = chosen.to(torch.int8).argsort(dim=1, stable=True)[:, chosen.shape[1] - width :]
    return torch.where(chosen.gather(1, order), order, -1)


def take_entries(values: torch.Tensor, index: torch.Tensor, padding: int) -> torch.Tensor:
    """(batch, entries) → (batch, taken): the values at an index, `padding` where that is −1."""
    return values.gather(1, index.clamp(min=0)).masked_fill(index < 0, padding)


def positions_by_places(columns: ImageColumns, places: torch.Tensor, extents: torch.Tensor) -> torch.Tensor:
    """Position ids where an image's tokens have places in it, (dimensions, batch, columns), from 0 in each row.

    Where the largest of an image's ids ends, at p, Z goes on: the first dimension, time, is p for all of it, the others
    are p, p + 1, …; then the text.

    Args:
        columns: of the batch.
        places: (visual tokens of all images, dimensions).
        extents: (images,).
    """
    is_visual, is_compressed = columns.visual, columns.compressed
    is_last = is_visual & (columns.offset == columns.lengths[columns.image] - 1)
    in_columns = torch.zeros((places.shape[1], *is_visual.shape), dtype=torch.int64)
    in_columns[:, is_visual] = places.T
    at_last = torch.where(is_last, extents[columns.image], 0)
    positions, _ = lay_out_columns(columns.present, is_visual, in_columns, at_last)
    positions[0] -= torch.where(is_compressed, columns.offset - columns.lengths[columns.image], 0)
    return positions
