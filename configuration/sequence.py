"""The `compression` block of methods that compress the whole sequence of an image, right before the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foveate.configuration.compression import CompressionConfigMixin, CompressionSettings, require_ratio


DEFAULT_KEEP_RATIO = 0.1


@dataclass
class SequenceSettings(CompressionSettings):
    """Settings of a method that makes m tokens of the n that an image has, both known from its size alone.

    Args:
        num_visual_tokens: m, the same for every image; `None`: see `keep_ratio`. One of the two is set.
        keep_ratio: m / n, in (0, 1] (a reduction by 90 % is 0.1); 1 leaves the image as it is. 0.1 if neither is set.
    """

    keep_ratio: float | None = None

    def __post_init__(self):
        super().__post_init__()
        require_ratio("keep_ratio", self.keep_ratio, optional=True)
        if self.num_visual_tokens is not None and self.keep_ratio is not None:
            raise ValueError(
                f"num_visual_tokens is {self.num_visual_tokens} and keep_ratio {self.keep_ratio}: choose one of them, "
                "and set the other to null."
            )
        if self.num_visual_tokens is None and self.keep_ratio is None:
            self.keep_ratio = DEFAULT_KEEP_RATIO

    @classmethod
    def merge(cls, before: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        if changes.get("num_visual_tokens") is not None:  # it takes the place of the other budget
            before = {**before, "keep_ratio": None}
        return super().merge(before, changes)

    @classmethod
    def budget_of_ratio(cls, keep_ratio: float, config: Any) -> dict[str, Any]:
        return {"keep_ratio": keep_ratio, "num_visual_tokens": None}

    def fitted_to(self, config: Any) -> SequenceSettings:
        longest = config.longest_sequence
        if self.num_visual_tokens is not None and longest is not None and self.num_visual_tokens > longest:
            raise ValueError(
                f"num_visual_tokens is {self.num_visual_tokens}, but an image has at most {longest} tokens of all its "
                f"patches: choose at most {longest}."
            )
        return self

    def count_tokens(self, length: int) -> int:
        """m of an image of n = `length` tokens."""
        if self.num_visual_tokens is not None:
            return min(self.num_visual_tokens, length)
        return max(1, round(length * self.keep_ratio))


class SequenceConfigMixin(CompressionConfigMixin):
    """A config whose model compresses an image's sequence. Its class calls `_check_method_fields` at the end of its
    `__init__`."""

    @property
    def longest_sequence(self) -> int | None:
        """Tokens of the image that has the most of them; `None`: an image's size is its own, and so is their number."""
        if self.num_patches is None:
            return None
        vision = self.vision_config  # type: ignore[attr-defined]
        side, patch = vision.image_size, vision.patch_size
        grids = [  # LLaVA-NeXT's tiles and newlines
            (height // side) * (width // side) * self.num_patches + height // patch
            for height, width in getattr(self, "image_grid_pinpoints", None) or ()
        ]
        return self.num_patches + max(grids, default=0)

    def _check_method_fields(self) -> None:
        if getattr(self, "vision_feature_select_strategy", "default") != "default":  # type: ignore[attr-defined]
            raise ValueError(
                f"The method '{self.compression.method}' needs vision_feature_select_strategy 'default' (patches "
                f"without the class token), not {self.vision_feature_select_strategy!r}."  # type: ignore[attr-defined]
            )
        self.compression = self.compression.fitted_to(self)
