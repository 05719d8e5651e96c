"""The algorithm of MetaCompress (Wang et al., "Rethinking Token Reduction for Large Vision-Language Models"): a small
module makes a compression matrix of an image's sequence alone, whatever its length, and nothing reads the prompt.

B: images of one length, n: tokens of an image, m: tokens that are left, d: width of the language model, d_c: width of
queries and keys.
"""

from __future__ import annotations

import math

import torch
from torch import nn


KERNEL_SIZE = 3  # of the pooling (Section 8.2)


def sinusoidal_positions(length: int, width: int, device: torch.device) -> torch.Tensor:
    """E_pos, (n, d) float32: sines and cosines of the index in the sequence, in turn. Fixed, so that any n has one."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


def pool_sequence(sequences: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Average pooling with a fractional stride (Eq. 6, Section 8.2).

    Args:
        sequences: (B, n, d).
        num_tokens: m ≤ n.

    Returns:
        (B, m, d): output i is the mean of the up to 3 tokens from ⌊i·n/m⌋ on.
    """
    length = sequences.shape[1]
    steps = torch.arange(num_tokens, device=sequences.device)
    window = (steps * length // num_tokens)[:, None] + torch.arange(KERNEL_SIZE, device=sequences.device)
    inside = window < length
    taken = sequences[:, window.clamp(max=length - 1)]  # (B, m, 3, d)
    return (taken * inside[..., None]).sum(2) / inside.sum(1, keepdim=True)


class MetaCompressor(nn.Module):
    """The generator of compression matrices, all that trains in MetaCompress.

    Args:
        width: d.
        key_width: d_c.
    """

    def __init__(self, width: int, key_width: int):
        super().__init__()
        # Bare parameters, not linear layers: 2 million numbers that quantisation and LoRA have nothing to gain from.
        self.w_q = nn.Parameter(torch.empty(width, key_width))
        self.w_k = nn.Parameter(torch.empty(width, key_width))
        self.omega = nn.Parameter(torch.empty(key_width))

    def reset_parameters(self) -> None:
        """W_q = W_k ~ N(0, 1/d_c), ω = 1: a weighted pooling to begin with (Section 9)."""
        nn.init.normal_(self.w_q, std=self.w_q.shape[1] ** -0.5)
        nn.init.ones_(self.omega)
        with torch.no_grad():
            self.w_k.copy_(self.w_q)

    def forward(self, sequences: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compresses the sequences of images of one length.

        Args:
            sequences: X, (B, n, d).
            num_tokens: m.

        Returns:
            X̃ = P·X, (B, m, d), and P, (B, m, n) float32, whose rows sum to 1 (Eq. 8).
        """
        matrices = self.matrices(sequences, num_tokens)
        return matrices.to(sequences.dtype) @ sequences, matrices

    def matrices(self, sequences: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """P, (B, m, n) float32 (Eq. 6 to 8)."""
        _, length, width = sequences.shape
        positioned = sequences + sinusoidal_positions(length, width, sequences.device).to(sequences.dtype)
        dtype = self.w_q.dtype
        queries = pool_sequence(positioned, num_tokens).to(dtype) @ self.w_q * self.omega
        keys = positioned.to(dtype) @ self.w_k
        # In float32: half precision has no room for the scores of long tokens, bfloat16 rounds them away.
        scores = queries.float() @ keys.float().mT * self.w_q.shape[1] ** -0.5
        return scores.softmax(-1)
