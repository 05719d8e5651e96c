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


def recycle(kept: torch.Tensor, discarded: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Adds what the discarded tokens hold to the kept ones, by attention (Eq. 5).

    Args:
        kept: (B, 1 + k, d), after the layer's attention and residual.
        discarded: (B, m, d), likewise.
        weights: (B, 1 + k, m), the attention that the kept pay to the discarded, mean over the heads.
    """
    return torch.baddbmm(kept, weights.to(kept.dtype), discarded)
