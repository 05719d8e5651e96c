"""What `foveate flops` reports: the account (`modeling/core/account.py`) of a checkpoint, of which only the config is
read, or of a published shape, beside that of the stock model.

For a method that cuts an image into views of its own, too, that is the stock model, which sees an image of any size as
it always does: the model that was converted, so that a report says what the method costs or saves whoever has that one.
How many tokens such a method would have if it left none out is `count_without_compression`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from foveate.conversion.checkpoints import read_config
from foveate.errors import FoveateError, bad_input, first_sentence
from foveate.evaluation.shapes import config_of_shape
from foveate.modeling.core.account import (
    DEFAULT_TEXT_TOKENS,
    Account,
    account_of,
    declared_beside,
    default_image_size,
)
from foveate.registry import METHODS


@dataclass(frozen=True)
class FlopsReport:
    """A model's account beside that of its backbone's stock model.

    Attributes:
        name: checkpoint or shape.
        method: its name, "none" for a model without.
        image_size: (width, height) in pixels.
    """

    name: str
    method: str
    image_size: tuple[int, int]
    text_tokens: int
    model: Account
    base: Account

    def to_dict(self) -> dict[str, Any]:
        """The model's account, its base's under "base", and what is left of FLOPs and bytes under "share"."""
        return {
            "name": self.name,
            "method": self.method,
            "image_size": list(self.image_size),
            "text_tokens": self.text_tokens,
            **self.model.to_dict(),
            "base": self.base.to_dict(),
            "share": {
                "total": self.model.total / self.base.total,
                "kv_bytes": self.model.kv_bytes / self.base.kv_bytes,
            },
        }


def flops(
    checkpoint: str | Path | None = None,
    shape: str | None = None,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    text_tokens: int = DEFAULT_TEXT_TOKENS,
) -> FlopsReport:
    """The account of a checkpoint, of which only the config is read, or of a shape that needs none.

    Args:
        checkpoint: a folder, a hub id, or `lab:NAME`; compressed, or a base.
        shape: a name in `foveate.evaluation.shapes.SHAPES`.
        method: compresses the shape; a checkpoint has its own.
        settings: fields of the `compression` block, for instance `{"num_visual_tokens": 72}`.
        image_size: (width, height) in pixels; `None`: one tile's, or 1024 × 1024 where an image keeps its size.
            LLaVA-1.5 makes every image the same size.
        text_tokens: length of the prompt without its visual tokens.

    Raises:
        FoveateError: not exactly one of checkpoint and shape, one that can't be found or read, an unknown method,
            settings where nothing compresses, that don't exist or are out of range, sizes out of range.
    """
    settings = dict(settings or {})
    if (checkpoint is None) == (shape is None):
        given = "both a checkpoint and a shape are" if shape is not None else "neither a checkpoint nor a shape is"
        raise FoveateError(f"What to count is not clear, as {given} given: give CKPT or --shape.")
    if method is not None and checkpoint is not None:
        raise FoveateError(f"--method goes with --shape: {checkpoint} has its own method, or none.")
    if text_tokens < 1:
        raise FoveateError(f"text_tokens is {text_tokens}: a prompt has at least 1.")
    config = config_of_shape(shape, method, settings) if shape is not None else _config_of(checkpoint, settings)
    method, image_size = _method_of(config), image_size or default_image_size(config)
    base = account_of(config, image_size, text_tokens, uncompressed=True)
    return FlopsReport(
        name=str(checkpoint or shape),
        method=method or "none",
        image_size=image_size,
        text_tokens=text_tokens,
        model=base if method is None else account_of(config, image_size, text_tokens),
        base=base,
    )


def encoder_ratio(layers: Sequence[int], num_visual_tokens: int) -> float:
    """The compressed vision encoder's FLOPs by those of the plain one, in percent, as the paper of the method counts
    that declares such a ratio, of CLIP ViT-L/14-336.

    Raises:
        FoveateError: layers or a number of tokens that the encoder doesn't have.
    """
    declared = (declared_beside(method.mixin.module) for method in METHODS.values())
    return next(found for found in declared if hasattr(found, "encoder_ratio")).encoder_ratio(layers, num_visual_tokens)


def _config_of(checkpoint: str | Path | None, settings: dict[str, Any]) -> Any:
    # Not above: conversion writes cards, whose table of compression reads this module.
    from foveate.conversion.shards import find_checkpoint

    folder = find_checkpoint(str(checkpoint))
    read_config(folder)  # says what is wrong where there is none
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # a config can be wrong in any way
        raise FoveateError(f"{checkpoint}'s config can't be read: {first_sentence(error)}") from error
    if not settings:
        return config
    if _method_of(config) is None:
        raise FoveateError(f"{checkpoint} doesn't compress, so there is no {', '.join(settings)} to set.")
    with bad_input():
        config.change_compression(**settings)
    return config


def _method_of(config: Any) -> str | None:
    """Name of the method; `None` for a stock model. Not by `model_type`, which methods may share."""
    return getattr(getattr(config, "compression", None), "method", None)
