"""The training-free baselines of MetaCompress's paper (Section 6.2, Table 5): random pruning, equidistant sampling and
spatial pooling of an image's sequence.

B: images of one length, n: tokens of an image, m: tokens that are left, d: width of the language model. Every function
returns the tokens, (B, m, d).
"""

from __future__ import annotations

import torch


def random_positions(keys: torch.Tensor, length: int, num_tokens: int, seed: int) -> torch.Tensor:
    """m different positions out of n for every image, in rising order.

    A counter-based generator: what an image gets depends on its key and the seed alone, not on what else is in the
    batch or was drawn before.

    Args:
        keys: (B,) int64, one an image.

    Returns:
        (B, m) int64.
    """
    counter = torch.arange(length, device=keys.device)
    draws = _mix(_mix(keys + 1)[:, None] + _mix(counter + 1) * (2 * seed + 1) + seed)
    return draws.argsort(dim=1, stable=True)[:, :num_tokens].sort(1).values


def sample_positions(length: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    """⌊i·n/m⌋, (m,) int64."""
    return torch.arange(num_tokens, device=device) * length // num_tokens


def pool_stretches(sequences: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The mean of each stretch from ⌊i·n/m⌋ to the next: the kernel is as long as the stride (Table 5)."""
    return stretch_matrix(sequences.shape[1], num_tokens, sequences.device).to(sequences.dtype) @ sequences


def stretch_matrix(length: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    """(m, n) float32: which token goes into which mean, and how much of it."""
    starts = sample_positions(length, num_tokens, device)
    places = torch.arange(length, device=device)
    belongs = torch.searchsorted(starts, places, right=True) - 1 == torch.arange(num_tokens, device=device)[:, None]
    return belongs / belongs.sum(1, keepdim=True)


def take_positions(sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Tokens at (m,) or (B, m) positions."""
    if positions.dim() == 1:
        return sequences[:, positions]
    return sequences.gather(1, positions[..., None].expand(-1, -1, sequences.shape[2]))


def image_keys(pixel_values: torch.Tensor) -> torch.Tensor:
    """A number for every image that depends on its pixels alone, (images,) int64; absent tiles (zeros) don't count."""
    bits = pixel_values.flatten(1).view({8: torch.int64, 4: torch.int32, 2: torch.int16}[pixel_values.element_size()])
    weights = 2 * torch.arange(bits.shape[1], device=bits.device) + 1  # so that a mirrored image has another
    return (bits * weights).sum(1)


def _mix(numbers: torch.Tensor) -> torch.Tensor:
    """Scatters int64 numbers over 63 bits: multiplication by an odd constant and a shift, twice (as in SplitMix64)."""
    for factor in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        numbers = numbers * factor
        numbers = numbers ^ ((numbers >> 31) & 0x1FFFFFFFF)
    return numbers
