"""Inside CLIP's vision tower: a few rows of its attention matrix, computed beside the fused kernel, which patches are
kept by them, and how such a choice learns.

B: pictures, h: heads, n: patches, k: patches that are kept, m = n − k, d: width.
"""

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


def choose_tokens(
    correlation: torch.Tensor, number: int, selectable: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The patches to keep and to discard.

    Args:
        correlation: (B, n), not negative: the more, the sooner a patch is kept.
        number: k.
        selectable: (B, n) bool; the others (padding) are kept only where there are too few.

    Returns:
        (B, k) and (B, m) indices of the kept and the discarded, each in their original order.
    """
    correlation = correlation.detach()
    if selectable is not None:
        correlation = correlation.masked_fill(~selectable, -1.0)
    order = correlation.argsort(dim=-1, descending=True, stable=True)
    return order[:, :number].sort(-1).values, order[:, number:].sort(-1).values


def straight_through_gate(tokens: torch.Tensor, correlation: torch.Tensor) -> torch.Tensor:
    """Lets the gradient of the kept tokens reach their correlation; the values stay as they are.

    A hard choice has no gradient, and nothing else reads what was chosen by (in QG-VTC's Eq. 5 as in LLaVA-Meteor), so
    as printed the question's MLP, or the instruction token, would never train. Each token is multiplied by 1 + c − c,
    the second c held constant.

    Args:
        tokens: (B, k, d), kept patches.
        correlation: (B, k), theirs, not negative; it is renormalised over the kept.
    """
    share = correlation / correlation.sum(-1, keepdim=True)
    return tokens * (1 + (share - share.detach()))[..., None].to(tokens.dtype)
