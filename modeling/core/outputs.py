"""What passes between the parts of a compressed model, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from foveate.modeling.compatibility import StockCausalLMOutput, StockModelOutput


@dataclass
class TokenProvenance:
    """What the visual tokens of one image are made of.

    Args:
        weights: (tokens, patches), non-negative: how much of each source patch every token holds.
        roles: (tokens,), why each token is there, as an index into `role_names`.
        role_names: the method's names for the roles.
        steps: for a method that compresses in several steps, the name of each and the patches whose tokens it kept.
        scores: for a method that asks several experts, the name of each and its score of every patch, (patches,).
    """

    weights: torch.Tensor
    roles: torch.Tensor
    role_names: tuple[str, ...]
    steps: tuple[tuple[str, torch.Tensor], ...] = ()
    scores: tuple[tuple[str, torch.Tensor], ...] = ()


@dataclass
class VisualTokens:
    """Visual tokens of a batch of images, compressed or not.

    Args:
        tokens: (tokens of all images, width of the language model), image after image.
        lengths: tokens of each image.
        deepstack: for each of the language model's first layers what is added there, (tokens of all images, width).
        places: (tokens of all images, 2), row and column of each token in its image, where positions need them.
        grids: (images, 2), height and width of each image in tokens, where positions need them.
        provenance: one an image, when it was asked for.
    """

    tokens: torch.Tensor
    lengths: list[int]
    deepstack: list[torch.Tensor] = field(default_factory=list)
    places: torch.Tensor | None = None
    grids: torch.Tensor | None = None
    provenance: list[TokenProvenance] | None = None


@dataclass
class CompressedModelOutputWithPast(StockModelOutput):
    """Output of a compressed model without a language modeling head: the stock model's, and

    Args:
        compression: one [`TokenProvenance`] an image, when `output_compression=True`.
        physical_sequence: a [`PhysicalSequence`] when `return_physical=True`: `last_hidden_state` is then in its
            columns.

    Where the language model runs on fewer columns than the caller sees, `last_hidden_state` is in the caller's columns,
    zeros at placeholders that have no token, the cache is a [`LogicalCache`], and `hidden_states` and `attentions` are
    those of the language model, on the columns that it runs on.
    """

    compression: list[TokenProvenance] | None = None
    physical_sequence: object | None = None


@dataclass
class CompressedCausalLMOutputWithPast(StockCausalLMOutput):
    """Output of a compressed model with a language modeling head: the stock model's, with `compression` as in
    [`CompressedModelOutputWithPast`], and with logits in the caller's columns."""

    compression: list[TokenProvenance] | None = None


#: Images by the names of their inputs, as the processor returns them.
Images = dict[str, Any]

#: Writes the remote code of a model class beside a saved checkpoint.
CodeWriter = Callable[[type, str], None]
