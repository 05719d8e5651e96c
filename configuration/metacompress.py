"""The `compression` block of MetaCompress, the same on every backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.configuration.compression import require_positive_int
from foveate.configuration.sequence import SequenceSettings


@dataclass
class MetaCompressSettings(SequenceSettings):
    """Settings of MetaCompress (Wang et al., "Rethinking Token Reduction for Large Vision-Language Models").

    Args:
        num_visual_tokens, keep_ratio: as in [`SequenceSettings`].
        key_width: d_c, width of the queries and keys that the compression matrix is made of. It is the shape of trained
            weights: to change it is to convert and train again.
    """

    method: ClassVar[str] = "metacompress"
    shape_fields = ("key_width",)

    key_width: int = 256

    def __post_init__(self):
        super().__post_init__()
        require_positive_int("key_width", self.key_width)
