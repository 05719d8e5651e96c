"""The training-free baselines of MetaCompress's paper (https://arxiv.org/abs/2603.21701, Section 6.2, Table 5): random
pruning, equidistant sampling and spatial pooling of an image's visual tokens.

B: images of one length, n: tokens of an image, m: tokens that are left.
"""

from __future__ import annotations

import torch

from foveate.configuration.baselines import BaselineSettings
from foveate.modeling.core.declarations import Method
from foveate.modeling.core.exact import ExactGenerationMixin, Mixture, Selection, SequenceModelMixin


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


def stretch_matrix(length: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    """(m, n) float32: which token goes into which mean, and how much of it."""
    starts = sample_positions(length, num_tokens, device)
    places = torch.arange(length, device=device)
    belongs = torch.searchsorted(starts, places, right=True) - 1 == torch.arange(num_tokens, device=device)[:, None]
    return belongs / belongs.sum(1, keepdim=True)


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


class BaselineModelMixin(SequenceModelMixin):
    """Which of the three it is, the settings say."""

    def image_keys(self, images, num_images):
        if self.config.compression.method != "random" or images["pixel_values"] is None:
            return super().image_keys(images, num_images)
        pixels = self.pixels_of(images, num_images)
        return image_keys(pixels) if torch.is_tensor(pixels) else torch.cat([image_keys(one[None]) for one in pixels])

    def choose_tokens(self, sequences, num_tokens, keys):
        settings, (batch, length, _) = self.config.compression, sequences.shape
        if settings.method == "spatial":
            return Mixture(stretch_matrix(length, num_tokens, sequences.device).expand(batch, -1, -1))
        if settings.method == "random":
            return Selection(random_positions(keys.to(sequences.device), length, num_tokens, settings.seed))
        return Selection(sample_positions(length, num_tokens, sequences.device).expand(batch, -1))


METHODS = (
    Method(
        name="random",
        stem="Baseline",
        title="Random pruning",
        paper="https://arxiv.org/abs/2603.21701",
        kind="sequence",
        mixin=BaselineModelMixin,
        generation_mixin=ExactGenerationMixin,
        family="a training-free baseline",
        settings=BaselineSettings,
        backbones=("llava", "llava_next", "qwen3_vl"),
        summary=(
            "A random choice of an image's visual tokens is kept, in their order. The others are dropped. It is a "
            "baseline of MetaCompress's paper: nothing is trained, and nothing reads the question."
        ),
    ),
    Method(
        name="sample",
        stem="Baseline",
        title="Equidistant sampling",
        paper="https://arxiv.org/abs/2603.21701",
        kind="sequence",
        mixin=BaselineModelMixin,
        generation_mixin=ExactGenerationMixin,
        family="a training-free baseline",
        settings=BaselineSettings,
        backbones=("llava", "llava_next", "qwen3_vl"),
        summary=(
            "Every so many of an image's visual tokens are kept, at equal distances. The others are dropped. It is a "
            "baseline of MetaCompress's paper: nothing is trained, and nothing reads the question."
        ),
    ),
    Method(
        name="spatial",
        stem="Baseline",
        title="Spatial pooling",
        paper="https://arxiv.org/abs/2603.21701",
        kind="sequence",
        mixin=BaselineModelMixin,
        generation_mixin=ExactGenerationMixin,
        family="a training-free baseline",
        settings=BaselineSettings,
        backbones=("llava", "llava_next", "qwen3_vl"),
        summary=(
            "An image's visual tokens are divided into stretches. Each becomes one token, the mean of what it holds. "
            "It is a baseline of MetaCompress's paper: nothing is trained, and nothing reads the question."
        ),
    ),
)
