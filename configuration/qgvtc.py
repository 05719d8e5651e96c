"""The `compression` block of QG-VTC, the same on every backbone."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

from foveate.configuration.compression import (
    CompressionSettings,
    require_bool,
    require_one_of,
    require_patches_of_one_layer,
)


@dataclass
class QGVTCSettings(CompressionSettings):
    """Settings of QG-VTC (Li et al., "QG-VTC: Question-Guided Visual Token Compression in MLLMs for Efficient VQA").

    Args:
        num_visual_tokens: tokens that an image (LLaVA-NeXT: a tile) is compressed to; `None` is an eighth of its
            patches, as 72 of 576 in the paper.
        layers: indices of the vision tower's layers that compress, from 0, each by the same number of patches; `None`
            is every second one of the tower's second half up to the last that runs, as 12, 14, …, 22 in the paper.
        guidance: `"question"` ranks the patches by the question, `"cls"` by the image's class token (Table 3: A7, A8).
        recycle: whether what the discarded patches hold goes on in the kept ones (Eq. 5; without: A7 and A9).
    """

    method: ClassVar[str] = "qg-vtc"
    guiding_turn: ClassVar[str] = "last"
    requires_question: ClassVar[bool] = False

    layers: list[int] | None = None
    guidance: str = "question"
    recycle: bool = True

    def __post_init__(self):
        super().__post_init__()
        require_one_of("guidance", self.guidance, ("question", "cls"))
        require_bool("recycle", self.recycle)
        if self.layers is not None:
            _require_layers(self.layers)
            self.layers = list(self.layers)

    def resolve(self, config: Any) -> QGVTCSettings:
        require_patches_of_one_layer(self.method, config)
        settings = super().resolve(config)
        depth = config.vision_config.num_hidden_layers
        running = config.vision_feature_layer % (depth + 1)  # layers that run: those after the features' don't
        layers = settings.layers
        if layers is None:
            first = depth // 2
            layers = list(range(first + (running - 1 - first) % 2, running, 2)) or [max(0, running - 1)]
        if layers[-1] >= running:
            raise ValueError(
                f"layers has {layers[-1]}, but the features are read after layer {running - 1} of {depth} "
                f"(vision_feature_layer {config.vision_feature_layer}): choose layers from 0 to {running - 1}."
            )
        number = settings.num_visual_tokens or max(1, config.num_patches // 8)
        return dataclasses.replace(settings, layers=layers, num_visual_tokens=number)


def _require_layers(layers: Any) -> None:
    wrong = (
        not isinstance(layers, (list, tuple))
        or not layers
        or any(isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 for layer in layers)
        or any(before >= after for before, after in itertools.pairwise(layers))
    )
    if wrong:
        raise ValueError(
            f"layers must be indices of vision layers in rising order, each once, for instance [12, 14, 16], "
            f"not {layers!r}."
        )
