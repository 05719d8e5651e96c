"""What passes between the parts of a compressed model, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from foveate.modeling.compatibility import StockCausalLMOutput, StockModelOutput, take_image_features


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
        places: (tokens of all images, dimensions), where each token lies in its image, if positions are laid out by
            that (`positions.py`).
        extents: (images,), how far the text after an image is from where it begins, likewise.
        provenance: one an image, when it was asked for.
        output: what the stock model's `get_image_features` returned, of all tokens.
        stacked: whether it has the tokens of its images in one tensor.
    """

    tokens: torch.Tensor
    lengths: list[int]
    deepstack: list[torch.Tensor] = field(default_factory=list)
    places: torch.Tensor | None = None
    extents: torch.Tensor | None = None
    provenance: list[TokenProvenance] | None = None
    output: Any = None
    stacked: bool = False


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


@dataclass
class EncodedImages:
    """Encoded images in place of pixels, for a stock `forward` that takes no encoded ones: it hands them on to
    `get_image_features`, which returns them.

    Args:
        tokens: of all images.
        features: the same as `get_image_features` returns them.
    """

    tokens: VisualTokens
    features: Any

    def size(self, dim: int) -> int:
        """Some look whether there is an image at all."""
        return len(self.tokens.lengths)

    def take(self, chosen: list[int]) -> EncodedImages:
        """Some of the images, at least one."""
        tokens, lengths = self.tokens, self.tokens.lengths

        def of_chosen(values: torch.Tensor) -> torch.Tensor:
            parts = values.split(lengths)
            return torch.cat([parts[index] for index in chosen])

        taken = VisualTokens(
            of_chosen(tokens.tokens),
            [lengths[index] for index in chosen],
            [of_chosen(layer) for layer in tokens.deepstack],
            None if tokens.places is None else of_chosen(tokens.places),
            None if tokens.extents is None else tokens.extents[chosen],
            stacked=tokens.stacked,
        )
        return EncodedImages(taken, take_image_features(self.features, chosen, WITH_PLACES))


_extended: dict[tuple[type, tuple[str, ...]], type] = {}


def extended(output_class: type, names: tuple[str, ...]) -> Any:
    """An output class of Transformers with more fields, `None` by default.

    It is a subclass, so whoever knows the stock one knows it. Models make theirs beforehand (`base.py`), for one that
    is compiled can't make a class.
    """
    if (output_class, names) not in _extended:
        facts = {
            "__annotations__": dict.fromkeys(names, Any),
            "__reduce__": lambda self: (_made_again, (output_class, names, dict(self))),  # it has no place in a module
            **dict.fromkeys(names),
        }
        name = f"{output_class.__name__}With{''.join(name.title() for name in names)}"
        made: type = dataclass(type(name, (output_class,), facts))
        _extended[output_class, names] = made
    return _extended[output_class, names]


def _made_again(output_class: type, names: tuple[str, ...], fields: dict[str, Any]) -> Any:
    return extended(output_class, names)(**fields)


def is_extended(output_class: type, names: tuple[str, ...]) -> bool:
    """Whether there is such a class already."""
    return (output_class, names) in _extended


#: What an output of a model has besides, and one of its image features, where positions are laid out by places.
WITH_PROVENANCE, WITH_PLACES = ("compression",), ("places", "extents")


#: Images by the names of their inputs, as the processor returns them.
Images = dict[str, Any]

#: Writes the remote code of a model class beside a saved checkpoint.
CodeWriter = Callable[[type, str], None]
