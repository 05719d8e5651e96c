"""MetaCompress (Wang et al., "Rethinking Token Reduction for Large Vision-Language Models",
https://arxiv.org/abs/2603.21701): a small module makes a compression matrix of an image's visual tokens alone, however
many there are, and nothing reads the prompt.

B: images of one length, n: tokens of an image, m: tokens that are left, d: width of the language model, d_c: width of
queries and keys.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from foveate.configuration.metacompress import MetaCompressSettings
from foveate.modeling.core.declarations import Method
from foveate.modeling.core.exact import ExactGenerationMixin, Mixture, SequenceModelMixin


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

    def forward(self, sequences: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """P, (B, m, n) float32, whose rows sum to 1 (Eq. 6 to 8).

        Args:
            sequences: X, (B, n, d).
            num_tokens: m.
        """
        _, length, width = sequences.shape
        positioned = sequences + sinusoidal_positions(length, width, sequences.device).to(sequences.dtype)
        dtype = self.w_q.dtype
        queries = pool_sequence(positioned, num_tokens).to(dtype) @ self.w_q * self.omega
        keys = positioned.to(dtype) @ self.w_k
        # In float32: half precision has no room for the scores of long tokens, bfloat16 rounds them away.
        scores = queries.float() @ keys.float().mT * self.w_q.shape[1] ** -0.5
        return scores.softmax(-1)


class MetaCompressModelMixin(SequenceModelMixin):
    """The generator of compression matrices before the language model, which reads X̃ = P·X."""

    added_modules = ("compressor",)
    own_modules = (MetaCompressor,)

    def add_modules(self, config):
        self.compressor = MetaCompressor(config.get_text_config().hidden_size, config.compression.key_width)

    def choose_tokens(self, sequences, num_tokens, keys):
        return Mixture(self.compressor(sequences, num_tokens))


METHOD = Method(
    name="metacompress",
    stem="MetaCompress",
    title="MetaCompress",
    paper="https://arxiv.org/abs/2603.21701",
    kind="sequence",
    mixin=MetaCompressModelMixin,
    generation_mixin=ExactGenerationMixin,
    settings=MetaCompressSettings,
    backbones=("llava", "llava_next"),
    needs_training=True,
    objective="distillation",
    summary=(
        "A small module makes a compression matrix of an image's own visual tokens, however many there are. The "
        "tokens that are left are mixtures of them, and because nothing reads the prompt they serve every turn of a "
        "conversation. The module is trained by distillation: the compressed model learns to answer as the "
        "uncompressed one does."
    ),
    limits=("It is trained at one share of tokens. `set_compression` takes others, at which it has not been trained.",),
)
