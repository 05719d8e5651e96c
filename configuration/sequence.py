"""The `compression` block of methods that compress the whole sequence of an image, right before the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from foveate.configuration.compression import CompressionSettings, require_one_of, require_ratio


DEFAULT_KEEP_RATIO = 0.1
POSITIONS = ("original", "compact")


@dataclass
class SequenceSettings(CompressionSettings):
    """Settings of a method that makes m tokens of the n that an image has, both known from its size alone.

    Args:
        num_visual_tokens: m, the same for every image; `None`: see `keep_ratio`. One of the two is set.
        keep_ratio: m / n, in (0, 1] (a reduction by 90 % is 0.1); 1 leaves the image as it is. 0.1 if neither is set.
        positions: "original": every token keeps the place that it has in the uncompressed sequence, and the text goes
            on where it would; "compact": positions count what is there. `None`: original where places have rows and
            columns (M-RoPE), else compact, as the papers have it.
    """

    keeps_images: ClassVar[bool] = True

    keep_ratio: float | None = None
    positions: str | None = None

    def __post_init__(self):
        super().__post_init__()
        require_ratio("keep_ratio", self.keep_ratio, optional=True)
        if self.positions is not None:
            require_one_of("positions", self.positions, POSITIONS)
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
    def settings_for_ratio(cls, keep_ratio: float, config: Any) -> dict[str, Any]:
        return {"keep_ratio": keep_ratio, "num_visual_tokens": None}

    @classmethod
    def with_budget(cls, num_visual_tokens: int | None, keep_ratio: float | None) -> SequenceSettings:
        if num_visual_tokens is None and keep_ratio is None:
            keep_ratio = 1.0
        return cls(num_visual_tokens=num_visual_tokens, keep_ratio=keep_ratio)

    def resolve(self, config: Any) -> SequenceSettings:
        strategy = getattr(config, "vision_feature_select_strategy", "default")
        has_class_token = getattr(getattr(config, "vision_config", None), "model_type", None) == "clip_vision_model"
        if strategy != "default" and has_class_token:
            raise ValueError(
                f"The method '{self.method}' needs vision_feature_select_strategy 'default' (patches without the class "
                f"token) with this vision tower, not {strategy!r}."
            )
        return super().resolve(config)

    def largest_budget(self, config: Any) -> int | None:
        """Tokens of the image that has the most of them."""
        if config.num_patches is None:
            return None
        vision = config.vision_config
        side, patch = vision.image_size, vision.patch_size
        grids = [  # LLaVA-NeXT's tiles and newlines
            (height // side) * (width // side) * config.num_patches + height // patch
            for height, width in getattr(config, "image_grid_pinpoints", None) or ()
        ]
        return config.num_patches + max(grids, default=0)

    def count_tokens(self, length: int) -> int:
        """m of an image of n = `length` tokens."""
        if self.num_visual_tokens is not None:
            return min(self.num_visual_tokens, length)
        return max(1, round(length * (self.keep_ratio or DEFAULT_KEEP_RATIO)))

    def count_placeholders(self, *lengths: int, num_separators: int = 0) -> int:
        return self.count_tokens(sum(lengths) + num_separators)  # separators are tokens of the sequence like others
