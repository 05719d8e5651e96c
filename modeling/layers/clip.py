"""A few rows of the attention matrix of CLIP's vision tower, computed beside its fused kernel."""

from __future__ import annotations

from typing import Any

import torch


def split_heads(projected: torch.Tensor, attention: Any) -> torch.Tensor:
    """(B, tokens, d) → (B, h, tokens, d/h)."""
    return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def class_correlation(query: torch.Tensor, keys: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
    """The class token's row of the attention matrix, at the patches: how much of the image each has to say.

    Args:
        query: (B, h, 1, d/h) of the class token.
        keys: (B, h, 1 + n, d/h).
        present: (B, 1 + n) bool, the tokens that are not padding; `None`: all.

    Returns:
        (B, n) float32, the mean over the heads.
    """
    return attention_rows(query.float(), keys.float(), present).mean(1)[:, 0, 1:]


def attention_rows(queries: torch.Tensor, keys: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of the attention matrix, (B, h, rows, tokens), of queries (B, h, rows, d/h) on keys (B, h, tokens, d/h),
    none of them on tokens that are not `present`, (B, tokens) bool."""
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.mT  # the scale on the smaller of the two
    if present is not None:
        scores = scores.masked_fill(~present[:, None, None], float("-inf"))
    return scores.softmax(-1)
