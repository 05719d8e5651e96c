"""How methods that keep some patches of an image choose them, and how the choice learns.

B: images (or views of them), n: patches, k: patches that are kept, m = n − k, d: width.
"""

from __future__ import annotations

import torch


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
