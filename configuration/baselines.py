"""The `compression` blocks of the training-free baselines of MetaCompress's paper, the same on every backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from foveate.configuration.sequence import SequenceSettings


@dataclass
class BaselineSettings(SequenceSettings):
    """Settings of one of the baselines; `from_dict` chooses the class by the block's `method`, and equidistant sampling
    for an empty one."""

    method: ClassVar[str] = "baseline"

    @classmethod
    def from_dict(cls, block: Any) -> Any:
        if cls is not BaselineSettings or isinstance(block, BaselineSettings):
            return super().from_dict(block)
        method = (block or {}).get("method", SampleSettings.method)
        found = {known.method: known for known in (RandomSettings, SampleSettings, SpatialSettings)}.get(method)
        return super().from_dict(block) if found is None else found.from_dict(block)


@dataclass
class RandomSettings(BaselineSettings):
    """Random pruning: m of the tokens, in their order; the same ones whenever the same image comes again.

    Args:
        num_visual_tokens, keep_ratio: as in [`SequenceSettings`].
        seed: chooses others.
    """

    method: ClassVar[str] = "random"

    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, not {self.seed!r}.")


@dataclass
class SampleSettings(BaselineSettings):
    """Equidistant sampling: token ⌊i·n/m⌋ for i = 0 … m − 1. Settings as in [`SequenceSettings`]."""

    method: ClassVar[str] = "sample"


@dataclass
class SpatialSettings(BaselineSettings):
    """Pooling: the mean of each of m stretches of the sequence, as long as the stride n / m. Settings as in
    [`SequenceSettings`]."""

    method: ClassVar[str] = "spatial"
