"""The `compression` block of LLaVA-Meteor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from foveate.configuration.compression import (
    MAX_ASPECT_RATIO,
    CompressionSettings,
    require_one_of,
    require_patches_of_one_layer,
    require_positive_int,
)


SCANS = ("local-to-single", "single")

#: Tokens that stand between the slices of an image, by the names that tokenizers have for them.
_COMMAS, _NEWLINES = (",",), ("\n", "<0x0A>", "Ċ")


@dataclass
class MeteorSettings(CompressionSettings):
    """Settings of LLaVA-Meteor (Li et al., "Top-Down Compression: Revisit Efficient Vision Token Projection for Visual
    Instruction Tuning").

    Args:
        num_visual_tokens: K, tokens that every view of an image is compressed to (a view that has fewer patches keeps
            them all); `None` is a quarter of a square view's patches, as 144 of 576 in the paper.
        visual_share: λ, how much the visual expert has to say beside the native one, from 0 to 1 (Section 3.3).
        scan: "local-to-single" puts the mean of its neighbourhood before every patch, "single" scans patches alone.
        state_size: N of the state space blocks.
        max_slices: most slices that an image is cut into, beside the view of the whole.
        comma_token_id, newline_token_id: tokens of the language model between slices of a row, and between rows.
    """

    method: ClassVar[str] = "meteor"
    shape_fields: ClassVar[tuple[str, ...]] = ("state_size",)
    keeps_images: ClassVar[bool] = True

    visual_share: float = 0.8
    scan: str = "local-to-single"
    state_size: int = 16
    max_slices: int = 6
    comma_token_id: int = 29892
    newline_token_id: int = 13

    def __post_init__(self):
        super().__post_init__()
        share = self.visual_share
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(f"visual_share must be a number from 0 to 1, not {share!r}.")
        require_one_of("scan", self.scan, SCANS)
        for name in ("state_size", "max_slices"):
            require_positive_int(name, getattr(self, name))

    @classmethod
    def settings_from_tokenizer(cls, tokenizer: Any, given: Collection[str]) -> dict[str, Any]:
        vocabulary, found = tokenizer.get_vocab(), {}
        for what, names in (("comma", _COMMAS), ("newline", _NEWLINES)):
            field = f"{what}_token_id"
            if field in given:
                continue
            name = next((name for name in names if name in vocabulary), None)
            if name is None:
                raise ValueError(
                    f"The tokenizer has no token for a {what}, which the method 'meteor' puts between the slices of an "
                    f"image: choose another of its tokens by the setting {field}."
                )
            found[field] = vocabulary[name]
        return found

    @classmethod
    def settings_for_ratio(cls, keep_ratio: float, config: Any) -> dict[str, Any]:
        """Of the patches of a square view; with 1, every view keeps all that it has."""
        number = largest_view(config) if keep_ratio == 1 else max(1, round(keep_ratio * square_view(config)))
        return {"num_visual_tokens": number}

    def resolve(self, config: Any) -> MeteorSettings:
        require_patches_of_one_layer(self.method, config)
        if config.vision_feature_layer % (config.vision_config.num_hidden_layers + 1) == 0:
            raise ValueError(
                f"The method '{self.method}' needs a vision_feature_layer after the first, as it reads what that "
                f"layer's class token looks at, not {config.vision_feature_layer!r}."
            )
        number = self.num_visual_tokens or max(1, square_view(config) // 4)
        for name in ("comma_token_id", "newline_token_id"):
            if not 0 <= getattr(self, name) < config.text_config.vocab_size:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but the language model has {config.text_config.vocab_size} "
                    "tokens, counted from 0."
                )
        return dataclasses.replace(super().resolve(config), num_visual_tokens=number)

    def largest_budget(self, config: Any) -> int:
        return largest_view(config)


def square_view(config: Any) -> int:
    """Patches of a square view."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def largest_view(config: Any) -> int:
    """Patches of the view that has the most of them: rounding to whole patches can add to the area."""
    side = config.vision_config.image_size / config.vision_config.patch_size
    narrowest = side / math.sqrt(MAX_ASPECT_RATIO)
    most = 1
    for rows in range(1, math.ceil(side) + 1):
        if rows + 0.5 > narrowest:
            before_rounding = max(rows - 0.5 if rows > 1 else 0, narrowest)
            most = max(most, rows * max(1, round(side * side / before_rounding)))
    return most
