"""What every compressed model shares, whatever its method and backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch


@dataclass
class TokenProvenance:
    """What the visual tokens of one image are made of.

    Args:
        weights: (tokens, patches), non-negative: how much of each source patch every token holds.
        roles: (tokens,), why each token is there, as an index into `role_names`.
        role_names: the method's names for the roles.
    """

    weights: torch.Tensor
    roles: torch.Tensor
    role_names: tuple[str, ...]


class CompressedModelMixin:
    """Mixed into every compressed model, before the Transformers class."""

    #: Writes the flat remote code beside a saved checkpoint. Set by the foveate package; a class that was itself loaded
    #: from such code leaves that to Transformers, which copies its files.
    code_writer: ClassVar[Callable[[type, str], None] | None] = None

    def save_pretrained(self, save_directory, *args, **kwargs):
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if self.code_writer is not None:
            type(self).code_writer(type(self), save_directory)

    def set_compression(self, processor: Any = None, keep_ratio: float | None = None, **changes) -> None:
        """Changes settings of the compression on this model, and on its processor, without converting again.

        Args:
            processor: the processor that goes with this model; it has to know as well where it counts tokens.
            keep_ratio: sets `num_visual_tokens` to this share of an image's patches, in (0, 1].
            changes: fields of the config's `compression` block, for instance `num_visual_tokens=64`.

        Raises:
            ValueError: an unknown setting or a value out of range; nothing is changed then.
        """
        config = self.config  # type: ignore[attr-defined]
        if keep_ratio is not None:
            if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, (int, float)) or not 0 < keep_ratio <= 1:
                raise ValueError(f"keep_ratio must be a number above 0 and at most 1, not {keep_ratio!r}.")
            changes["num_visual_tokens"] = max(1, round(keep_ratio * config.num_patches))
        settings = config.settings_class.from_dict({**config.compression.to_dict(), **changes})
        settings.validate_for(config.num_patches)
        config.compression = settings
        if processor is not None:
            processor.set_compression(settings)


def select_images(images_per_row: torch.Tensor, first_per_row: torch.Tensor) -> torch.Tensor:
    """Indices, among images listed row after row, of those from the `first_per_row`-th on in each row.

    Args:
        images_per_row, first_per_row: (rows,).
    """
    rank = _rank_in_row(images_per_row)
    first = first_per_row.repeat_interleave(images_per_row)
    return (rank >= first).nonzero()[:, 0]


def repeat_images(images_per_row: torch.Tensor, repeats: int) -> torch.Tensor:
    """Indices that repeat the images of each row as `repeat_interleave(repeats)` repeats the rows."""
    starts = (images_per_row.cumsum(0) - images_per_row).repeat_interleave(repeats)
    repeated = images_per_row.repeat_interleave(repeats)
    return starts.repeat_interleave(repeated) + _rank_in_row(repeated)


def _rank_in_row(images_per_row: torch.Tensor) -> torch.Tensor:
    starts = (images_per_row.cumsum(0) - images_per_row).repeat_interleave(images_per_row)
    return torch.arange(len(starts), device=starts.device) - starts
