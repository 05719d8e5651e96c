"""The algorithm of QG-VTC (Li et al., "QG-VTC: Question-Guided Visual Token Compression in MLLMs for Efficient VQA").

At a compressing layer the question ranks the patches (Eq. 4), the best stay in their original order, and what the
others hold is recycled into them by attention (Eq. 5). `vision_encoder_qgvtc.py` puts it into a vision tower.

B: images, h: heads, n: patches that enter the layer, k: patches that it keeps, m = n − k: patches that it discards,
d: width. A row or column of tokens has the class token in front: 1 + n, or 1 + k, of them.
"""

from __future__ import annotations

import torch


def token_schedule(num_patches: int, num_visual_tokens: int, num_steps: int) -> list[int]:
    """Patches left after each of `num_steps` compressing layers: equal steps down to `num_visual_tokens` (Table 1)."""
    dropped = num_patches - num_visual_tokens
    return [num_patches - round(step * dropped / num_steps) for step in range(1, num_steps + 1)]


def question_correlation(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Correlation of the question with every patch (Eq. 4).

    Args:
        query: (B, d), the question's class token by the layer's own W_Q.
        keys: (B, n, d), the patches' keys, heads concatenated.

    Returns:
        (B, n) float32, each row sums to 1. In float32 because it is for ranking: bfloat16 would make ties.
    """
    scores = (keys.float() @ query.float()[..., None])[..., 0]
    return (scores * keys.shape[-1] ** -0.5).softmax(-1)


def class_correlation(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The class token's row of the attention matrix, at the patches: what guides without a question.

    Args:
        query: (B, h, 1, d/h) of the class token.
        keys: (B, h, 1 + n, d/h).

    Returns:
        (B, n) float32, the mean over the heads.
    """
    return attention_rows(query.float(), keys.float()).mean(1)[:, 0, 1:]


def attention_rows(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Rows of the attention matrix, (B, h, rows, tokens), of queries (B, h, rows, d/h) on keys (B, h, tokens, d/h)."""
    return ((queries * queries.shape[-1] ** -0.5) @ keys.mT).softmax(-1)  # the scale on the smaller of the two


def choose_tokens(
    correlation: torch.Tensor, number: int, selectable: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The patches to keep and to discard (step 3b).

    Args:
        correlation: (B, n).
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


def recycle(kept: torch.Tensor, discarded: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Adds what the discarded tokens hold to the kept ones, by attention (Eq. 5).

    Args:
        kept: (B, 1 + k, d), after the layer's attention and residual.
        discarded: (B, m, d), likewise.
        weights: (B, 1 + k, m), the attention that the kept pay to the discarded, mean over the heads.
    """
    return torch.baddbmm(kept, weights.to(kept.dtype), discarded)


def straight_through_gate(tokens: torch.Tensor, correlation: torch.Tensor) -> torch.Tensor:
    """Lets the gradient of the kept tokens reach their correlation; the values stay as they are.

    A hard choice has no gradient, and Eq. 5 does not read the correlation, so as printed the question's MLP would never
    train. Each token is multiplied by 1 + c − c, the second c held constant.

    Args:
        tokens: (B, k, d), kept patches.
        correlation: (B, k), theirs; it is renormalised over the kept.
    """
    share = correlation / correlation.sum(-1, keepdim=True)
    return tokens * (1 + (share - share.detach()))[..., None].to(tokens.dtype)
