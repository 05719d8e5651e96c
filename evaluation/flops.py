"""What a model costs by account: FLOPs and KV-cache bytes of one image and one prompt, from the config alone.

FLOPs are 2 × the multiply-adds of the products that `torch.utils.flop_counter.FlopCounterMode` counts: linear layers,
the patch embedding's convolution, and QKᵀ and AV of every attention. Elementwise work (norms, activations, softmax,
rotary angles, ranking, gathering) is left out. A causal attention counts as n², as the counter takes it, though a
kernel may skip half. The language model's head runs on one position, as `generate` has it. So account and counter are
equal, and the tests hold them to that.

What differs by method is in `account_<ending>.py`, named by what a `model_type` adds to its backbone's (`qgvtc` of
`llava_next_qgvtc`), whose one function `account(config, stock, image_size)` returns a [`MethodAccount`]; `stock` is the
stock model's of the image.

What stands beside a method is the stock model of its backbone. For LLaVA-Meteor, too, that is LLaVA-1.5, which sees an
image of any size as one square: the model that was converted, so that a report says what the method costs or saves
whoever has that one. How many tokens LLaVA-Meteor would have if it selected none is `count_without_compression`'s.

Qwen3-VL takes an image as it is, within limits that are the processor's; so its size here is the one after that, and
only rounded to whole tokens.

Table 5 of QG-VTC (9.67 TFLOPs at 576 visual tokens, 3.86 at 144, 2.90 at 72: means of ten TextVQA samples) names
neither convention nor text lengths. All its cells fit, to 0.2 points, 2 FLOPs a multiply-add, the language model's
attention products left out (every column falls by the same 5.8 TFLOPs from 576 to 144, however long its text), the
head on all positions, and 68 to 231 text tokens, 125 on average: LLaVA's TextVQA prompts carry OCR tokens. This
account, with the products and one position of the head, has the table's shares to a point at `text_tokens=125`. The
paper leaves open which counter it used, and whether generated tokens are among the 125.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from foveate.conversion.checkpoints import read_config
from foveate.errors import FoveateError, bad_input, first_sentence
from foveate.evaluation.shapes import config_of_shape
from foveate.modeling.layers.slices import slice_grid_of
from foveate.modeling.layers.tiles import TileGrid, tile_grid
from foveate.modeling.methods.qgvtc_algorithm import token_schedule
from foveate.processing.base import MAX_ASPECT_RATIO
from foveate.registry import pairs


DEFAULT_TEXT_TOKENS = 60
_LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_vl_text")  # attention and gated MLP, all dense
_VISION_TOWERS = ("clip_vision_model", "qwen3_vl", "qwen3_vl_vision")  # 4.57 calls the last one by the middle name
_QWEN_IMAGE_SIZE = (1024, 1024)


@dataclass(frozen=True)
class VisionLayer:
    """How many tokens of one tile, the class token among them, go through the parts of an encoder layer.

    Args:
        queries: through the query and output projections, and rows of the attention.
        keys: through the key and value projections, and columns of the attention.
        mlp: through the MLP.
    """

    queries: int
    keys: int
    mlp: int

    @classmethod
    def plain(cls, tokens: int) -> VisionLayer:
        return cls(tokens, tokens, tokens)

    def flops(self, config: Any) -> int:
        """FLOPs of a layer of a tower, vision or text, of this config."""
        width = config.hidden_size
        projections = 2 * (self.queries + self.keys) * width * width
        attention = 2 * self.queries * self.keys * width
        return 2 * (projections + attention + 2 * self.mlp * width * config.intermediate_size)


@dataclass(frozen=True)
class MethodAccount:
    """What a method does with one image before the language model.

    Args:
        vision_layers: the layers of the vision tower that run, each on every tile.
        tokens_per_tile: visual tokens of a tile that reach the projector.
        num_tiles: pictures that the vision tower sees of the image.
        visual_tokens: of the image; `None`: what the tiles keep, as the backbone packs it.
        read_tokens: what the language model reads of the image before it keeps `visual_tokens`, in a pass before the
            text (all of which follows the image here); `None`: it reads what it keeps, with the text.
        compressor: FLOPs of what the method adds to the stock model, all tiles together.
        text_encoder: FLOPs of reading the question.
        at_most: whether the number of tokens depends on the image, and this is the upper bound.
    """

    vision_layers: Sequence[VisionLayer]
    tokens_per_tile: int
    num_tiles: int = 1
    visual_tokens: int | None = None
    read_tokens: int | None = None
    compressor: int = 0
    text_encoder: int = 0
    at_most: bool = False


@dataclass(frozen=True)
class Account:
    """Cost of one image and one prompt.

    Attributes:
        vision_tower, text_encoder, compressor, projector, llm_prefill: FLOPs.
        visual_tokens: of the image, as the language model sees them.
        kv_bytes: size of the KV cache after the prompt.
        at_most: whether the method chooses the number of tokens by the image, and all this is the upper bound.
    """

    vision_tower: int
    text_encoder: int
    compressor: int
    projector: int
    llm_prefill: int
    visual_tokens: int
    kv_bytes: int
    at_most: bool

    @property
    def total(self) -> int:
        """FLOPs of all parts."""
        return self.vision_tower + self.text_encoder + self.compressor + self.projector + self.llm_prefill

    def to_dict(self) -> dict[str, Any]:
        return {"total": self.total, **asdict(self)}


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
        image_size: (width, height) in pixels; `None`: one tile's, for Qwen3-VL 1024 × 1024. LLaVA-1.5 makes every image
            the same size.
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
    image_size = image_size or default_image_size(config)
    return FlopsReport(
        name=str(checkpoint or shape),
        method=_method_of(config) or "none",
        image_size=image_size,
        text_tokens=text_tokens,
        model=account_of(config, image_size, text_tokens),
        base=account_of(config, image_size, text_tokens, uncompressed=True),
    )


def account_of(config: Any, image_size: tuple[int, int], text_tokens: int, uncompressed: bool = False) -> Account:
    """The account of a config: one image of (width, height) pixels and a prompt of `text_tokens` tokens beside it.

    Args:
        uncompressed: account for the stock model of this shape, whatever the config's compression.

    Raises:
        FoveateError: towers that the account doesn't know, an image that can't be seen.
    """
    _require_known_towers(config)
    found = uncompressed_account(config, image_size)
    if not uncompressed and _method_of(config) is not None:
        found = _account_module(config).account(config, found, image_size)
    visual_tokens = found.visual_tokens
    if visual_tokens is None:
        visual_tokens = count_visual_tokens(config, image_size, found.tokens_per_tile)
    num_tokens = text_tokens + visual_tokens
    passes = [(num_tokens, num_tokens)]
    if found.read_tokens is not None:
        passes = [(found.read_tokens, found.read_tokens), (text_tokens, num_tokens)]
    return Account(
        vision_tower=found.num_tiles * vision_tower_flops(config.vision_config, found.vision_layers),
        text_encoder=found.text_encoder,
        compressor=found.compressor,
        projector=found.num_tiles * projector_flops(config, found.tokens_per_tile),
        llm_prefill=prefill_flops(config.text_config, passes),
        visual_tokens=visual_tokens,
        kv_bytes=kv_bytes_by_account(config.text_config, num_tokens, _dtype_of(config)),
        at_most=found.at_most,
    )


def uncompressed_account(config: Any, image_size: tuple[int, int]) -> MethodAccount:
    """The stock model's: Transformers runs all layers of the vision tower, also those after `vision_feature_layer`."""
    num_tiles = count_tiles(config, image_size)
    if is_qwen(config):
        vision = config.vision_config
        side = vision.patch_size * vision.spatial_merge_size
        merged = math.prod(max(1, round(pixels / side)) for pixels in image_size)
        layers = [VisionLayer.plain(merged * vision.spatial_merge_size**2)] * vision.depth
        return MethodAccount(layers, merged, visual_tokens=merged)
    tokens = 1 + num_patches(config.vision_config)
    layers = [VisionLayer.plain(tokens)] * config.vision_config.num_hidden_layers
    tokens_per_tile = tokens if config.vision_feature_select_strategy == "full" else tokens - 1
    return MethodAccount(layers, tokens_per_tile, num_tiles, count_visual_tokens(config, image_size, tokens_per_tile))


def count_without_compression(config: Any, image_size: tuple[int, int]) -> int:
    """Tokens of an image of which nothing is left out: the stock model's or, of a method that cuts images into views of
    its own, all patches of these."""
    if getattr(config, "image_processor", None) is not None:
        most = config.compression.largest_budget(config)
        return slice_grid_of(config, image_size[::-1]).num_tokens(most)
    return uncompressed_account(config, image_size).visual_tokens


# The parts


def num_patches(vision_config: Any) -> int:
    return (vision_config.image_size // vision_config.patch_size) ** 2


def default_image_size(config: Any) -> tuple[int, int]:
    """(width, height) in pixels of an image that is one tile."""
    return _QWEN_IMAGE_SIZE if is_qwen(config) else (config.vision_config.image_size,) * 2


def is_qwen(config: Any) -> bool:
    return config.vision_config.model_type in _VISION_TOWERS[1:]


def vision_tower_flops(config: Any, layers: Sequence[VisionLayer]) -> int:
    """FLOPs of a vision tower on one tile: the patch embedding and the layers that run."""
    if config.model_type in _VISION_TOWERS[1:]:
        patches, values = layers[0].keys, config.in_channels * config.temporal_patch_size
    else:
        patches, values = layers[0].keys - 1, config.num_channels  # but for the class token
    embedding = 2 * patches * values * config.patch_size**2 * config.hidden_size
    return embedding + sum(layer.flops(config) for layer in layers)


def text_encoder_flops(config: Any) -> int:
    """FLOPs of a CLIP text tower on one question, which the processor pads to all positions."""
    return config.num_hidden_layers * VisionLayer.plain(config.max_position_embeddings).flops(config)


def projector_flops(config: Any, tokens: int) -> int:
    """FLOPs of the two linear layers between vision tower and language model; in Qwen3-VL, where they read the merged
    patches, there are as many pairs more as layers of DeepStack."""
    if is_qwen(config):
        vision = config.vision_config
        merged = vision.hidden_size * vision.spatial_merge_size**2
        pairs = 1 + len(vision.deepstack_visual_indexes)
        return 2 * tokens * pairs * merged * (merged + vision.out_hidden_size)
    layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    width = config.text_config.hidden_size
    return 2 * tokens * (layers * config.vision_config.hidden_size * width + width * width)


def prefill_flops(config: Any, passes: Sequence[tuple[int, int]]) -> int:
    """FLOPs of a language model on a prompt, its head on the last token alone; `passes`: how many tokens each runs, and
    how many they attend to."""
    tokens = sum(queries for queries, _ in passes)
    width, head_width = config.hidden_size, _head_width(config)
    queries, keys = config.num_attention_heads * head_width, config.num_key_value_heads * head_width
    linear = tokens * (2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size)
    attention = 2 * sum(asking * asked for asking, asked in passes) * queries
    return 2 * (config.num_hidden_layers * (linear + attention) + width * config.vocab_size)


def kv_bytes_by_account(text_config: Any, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of `num_tokens` tokens in a language model of this config."""
    width = text_config.num_key_value_heads * _head_width(text_config)
    return num_tokens * text_config.num_hidden_layers * 2 * width * dtype.itemsize


def _head_width(text_config: Any) -> int:
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def encoder_ratio(
    layers: Sequence[int],
    num_visual_tokens: int,
    num_patches: int = 576,
    num_layers: int = 24,
    width: int = 1024,
    intermediate: int = 4096,
) -> float:
    """R of QG-VTC's Eq. 6 in percent: the compressed vision encoder's FLOPs by those of the plain one.

    In the paper's terms: f(n) = 4nd² + 2n²d + 2ndm for the n patches that enter a layer, without the class token, over
    all layers, without the question's own cost.

    Args:
        layers: the compressing ones, counted from 0.
        num_visual_tokens: M.
        num_patches, num_layers, width, intermediate: N, number of layers, d and m of the encoder.

    Raises:
        FoveateError: layers or a number of tokens that the encoder doesn't have.
    """
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < num_layers:
        raise FoveateError(f"The layers {list(layers)} have to ascend, from 0 to at most {num_layers - 1}.")
    if not 1 <= num_visual_tokens <= num_patches:
        raise FoveateError(f"num_visual_tokens is {num_visual_tokens}: choose from 1 to {num_patches}.")

    def cost(tokens: int) -> int:
        return 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * intermediate

    left = dict(zip(layers, token_schedule(num_patches, num_visual_tokens, len(layers))))
    tokens, total = num_patches, 0
    for layer in range(num_layers):
        total += cost(tokens)
        tokens = left.get(layer, tokens)
    return 100 * total / (num_layers * cost(num_patches))


# LLaVA-NeXT's tiles


def count_tiles(config: Any, image_size: tuple[int, int]) -> int:
    """Images that the vision tower sees of one of (width, height) pixels: LLaVA-NeXT's tiles with its overview, else 1.

    Raises:
        FoveateError: an image of no size, or too narrow for anything to be seen.
    """
    if min(image_size) < 1 or max(image_size) > MAX_ASPECT_RATIO * min(image_size):
        raise FoveateError(
            f"An image of {image_size[0]}x{image_size[1]} pixels can't be seen: both sides are at least 1, and one at "
            f"most {MAX_ASPECT_RATIO} times the other."
        )
    grid = _tile_grid(config, image_size)
    return grid.num_tiles if grid else 1


def count_visual_tokens(config: Any, image_size: tuple[int, int], tokens_per_tile: int) -> int:
    """Tokens of one image in the language model; LLaVA-NeXT drops padding and adds newlines (`image_tiles.py`)."""
    grid = _tile_grid(config, image_size)
    return grid.num_tokens(tokens_per_tile) if grid else tokens_per_tile


def _tile_grid(config: Any, image_size: tuple[int, int]) -> TileGrid | None:
    """`None` where the backbone has no tiles."""
    if not hasattr(config, "image_grid_pinpoints"):
        return None
    vision, (width, height) = config.vision_config, image_size
    return tile_grid((height, width), config.image_grid_pinpoints, vision.image_size, vision.patch_size)


# The config


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


def _account_module(config: Any) -> Any:
    (backbone,) = [backbone for backbone in pairs() if backbone.model_type == config.model_type]
    name = f"{__package__}.account_{backbone.model_type.removeprefix(f'{backbone.base_model_type}_')}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        method = _method_of(config)
        raise FoveateError(f"What the method '{method}' costs is not accounted for: there is no {name}.") from error


def _require_known_towers(config: Any) -> None:
    vision = getattr(getattr(config, "vision_config", None), "model_type", None)
    language = getattr(getattr(config, "text_config", None), "model_type", None)
    if vision not in _VISION_TOWERS or language not in _LANGUAGE_MODELS:
        raise FoveateError(
            f"A '{config.model_type}' model with vision tower '{vision}' and language model '{language}' has no "
            f"account here: it takes one of {', '.join(_VISION_TOWERS)} and one of {', '.join(_LANGUAGE_MODELS)}."
        )


def _dtype_of(config: Any) -> torch.dtype:
    """What the checkpoint loads in; float32 where it doesn't say, as Transformers has it."""
    return getattr(config, "dtype", None) or torch.float32
