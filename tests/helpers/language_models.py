"""What the language model inside a vision-language model is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Seen:
    """Of one call.

    Args:
        embeddings: (batch, columns, width).
        positions: (axes, batch, columns).
    """

    embeddings: torch.Tensor
    positions: torch.Tensor

    def distances(self, chosen: torch.Tensor) -> torch.Tensor:
        """Positions of the chosen columns, (batch, columns) bool, counted from the first of them in each row."""
        found = [positions[:, of_row] for positions, of_row in zip(self.positions.transpose(0, 1), chosen)]
        return torch.cat([positions - positions[:, :1] for positions in found], dim=1).long()


def seen_by_language_model(model: Any, inputs: Any) -> Seen:
    """Runs a model with a head, and says what its language model is given."""
    inner = model.model
    module = next((getattr(inner, name) for name in ("language_model", "text_model") if hasattr(inner, name)), None)
    module = inner.layers[0] if module is None else module
    seen: dict[str, Any] = {}

    def look(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        if args:
            seen["inputs_embeds"] = args[0]

    hook = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        model(**inputs)
    finally:
        hook.remove()
    embeddings = seen.get("inputs_embeds")
    embeddings = seen["hidden_states"] if embeddings is None else embeddings
    positions = seen.get("position_ids")
    if positions is None:  # counted, padding too
        positions = torch.arange(embeddings.shape[1])[None]
    positions = positions[-3:] if positions.dim() == 3 else positions[None]
    return Seen(embeddings, positions.expand(-1, len(embeddings), -1))
