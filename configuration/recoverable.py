"""The `compression` block of Recoverable Compression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from foveate.configuration.attention import FULL, SLIDING, require_attention
from foveate.configuration.compression import (
    CompressionSettings,
    require_bool,
    require_one_of,
    require_patches_of_one_layer,
    require_positive_int,
)


@dataclass
class RecoverableSettings(CompressionSettings):
    """Settings of Recoverable Compression (Chen et al., "Recoverable Compression: A Multimodal Vision Token Recovery
    Mechanism Guided by Text Information").

    Args:
        num_visual_tokens: `None` (the paper's way) lets the dynamic scale filter choose a number for each image and
            question, about a tenth on average. A number fixes it.
        variant: `"official"` computes what the authors' code computes, `"paper"` what the paper's equations say.
        text_recovery: the question recovers patches that the visual filter dropped.
        secondary_recovery: what is then left is merged into a few tokens, not dropped.
        lof_neighbors: k of the Local Outlier Factor in the first two filters (the paper: 20 for ScienceQA, TextVQA
            and MMBench, 30 for MME and POPE, 90 for VQAv2).
        secondary_lof_neighbors: k of the Local Outlier Factor that chooses the cluster centres.
    """

    method: ClassVar[str] = "recoverable"

    variant: str = "official"
    text_recovery: bool = True
    secondary_recovery: bool = True
    lof_neighbors: int = 20
    secondary_lof_neighbors: int = 10

    def __post_init__(self):
        super().__post_init__()
        require_one_of("variant", self.variant, ("official", "paper"))
        require_bool("text_recovery", self.text_recovery)
        require_bool("secondary_recovery", self.secondary_recovery)
        require_positive_int("lof_neighbors", self.lof_neighbors)
        require_positive_int("secondary_lof_neighbors", self.secondary_lof_neighbors)

    def resolve(self, config: Any) -> RecoverableSettings:
        require_patches_of_one_layer(self.method, config)
        require_attention(self.method, config.get_text_config(), supported=(FULL, SLIDING))
        return super().resolve(config)

    def count_placeholders(self, *lengths: int, num_separators: int = 0) -> int:
        return sum(lengths) + num_separators  # the upper bound: how many are left is known when the image has been seen
