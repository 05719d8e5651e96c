"""The `compression` block of ETC."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from foveate.configuration.attention import require_attention
from foveate.configuration.compression import CompressionSettings, require_positive_int


@dataclass
class ETCSettings(CompressionSettings):
    """Settings of ETC.

    Args:
        num_visual_tokens: M, the compressed tokens that an image leaves in the cache; 1 if `None`.
        trained_tokens: compressed tokens that the checkpoint has; `num_visual_tokens` can go up to it.
    """

    method: ClassVar[str] = "etc"
    shape_fields: ClassVar[tuple[str, ...]] = ("trained_tokens",)
    keeps_images: ClassVar[bool] = True

    trained_tokens: int | None = None

    def __post_init__(self):
        super().__post_init__()
        require_positive_int("trained_tokens", self.trained_tokens, optional=True)

    @classmethod
    def settings_for_ratio(cls, keep_ratio: float, config: Any) -> dict[str, Any]:
        if config.num_patches is None:
            raise ValueError("keep_ratio means nothing where an image's size is its own: set num_visual_tokens.")
        return super().settings_for_ratio(keep_ratio, config)

    def count_placeholders(self, *lengths: int, num_separators: int = 0) -> int:
        return sum(lengths) + num_separators + (self.num_visual_tokens or 1)  # read first, then freed

    def largest_budget(self, config: Any) -> int | None:
        return self.trained_tokens

    def resolve(self, config: Any) -> ETCSettings:
        # A window counts entries: visual tokens fill it in a masked pass, and are gone from it in passes.
        require_attention(self.method, config.get_text_config())
        number = self.num_visual_tokens or 1
        trained = self.trained_tokens or number
        if number > trained:
            raise ValueError(
                f"num_visual_tokens is {number}, but this checkpoint has {trained} compressed token(s): choose at most "
                f"{trained}, or convert the base again with more and train them."
            )
        return dataclasses.replace(self, num_visual_tokens=number, trained_tokens=trained)
