"""What a model costs by account: FLOPs and KV-cache bytes of one image and one prompt, from the config alone.

The model is built of its config without weights (on PyTorch's meta device), its own code runs on an image and a prompt
without values, and `torch.utils.flop_counter.FlopCounterMode` counts: 2 FLOPs a multiply-add of linear layers, the
patch embedding's convolution, and QKᵀ and AV of every attention. Elementwise work (norms, activations, softmax, rotary
angles, ranking, gathering) is left out. A causal attention counts as n², though a kernel may skip half. The language
model's head runs on one position, as `generate` has it.

A method whose number of tokens follows from the image's size needs nothing but `compress_images`. What can't run
without values is declared beside the method, in `<module of the method>_account.py`, which may have

- `image_inputs(config, image_size)`: what the processor returns for an image, where images are cut in a way of its own;
- `count_image(model, image_inputs)`: the [`ImageAccount`] of the image, in place of [`count_image`] here.

What stands beside a method is the stock model of its backbone, of the same config without the compression. No module of
a checkpoint's code imports this one.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForImageTextToText

from foveate.configuration.compression import MAX_ASPECT_RATIO
from foveate.errors import FoveateError, bad_input, first_sentence
from foveate.modeling.compatibility import (
    cache_argument,
    cache_of,
    cache_positions,
    image_sequences,
)
from foveate.modeling.core.base import CompressedModelMixin, stock_class
from foveate.modeling.layers.tiles import tile_grid


DEFAULT_TEXT_TOKENS = 60
_DEFAULT_SIDE = 1024  # pixels, where an image keeps its size
_LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_vl_text")  # layers that are all alike, and dense
_VISION_TOWERS = ("clip_vision_model", "qwen3_vl", "qwen3_vl_vision")  # 4.57 calls the last one by the middle name

#: Parts of a model without a head, by what the names of their modules begin with; the first that fits.
_PARTS = {
    "projector": r"multi_modal_projector|visual\.merger|visual\.deepstack_merger_list",
    "vision_tower": r"vision_tower|visual",
    "text_encoder": r"question_encoder",
}


@dataclass(frozen=True)
class ImageAccount:
    """What a model does with one image before the language model.

    Args:
        vision_tower, text_encoder, projector: FLOPs; of the text encoder on the image's question.
        compressor: FLOPs of what belongs to no part of the stock model.
        visual_tokens: of the image, as the language model keeps them.
        read_tokens: what the language model reads of the image before it keeps `visual_tokens`, in a pass before the
            text (all of which follows the image here); `None`: it reads what it keeps, with the text.
        at_most: whether the number of tokens depends on the image, and this is the upper bound.
    """

    vision_tower: int
    text_encoder: int
    compressor: int
    projector: int
    visual_tokens: int
    read_tokens: int | None = None
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


def account_of(config: Any, image_size: tuple[int, int], text_tokens: int, uncompressed: bool = False) -> Account:
    """The account of a config: one image of (width, height) pixels and a prompt of `text_tokens` tokens beside it.

    Args:
        uncompressed: account for the stock model of this shape, whatever the config's compression.

    Raises:
        FoveateError: towers that the account doesn't know, an image that can't be seen.
    """
    require_known_towers(config)
    _require_visible(image_size)
    model = model_without_values(stock_config(config) if uncompressed else config)
    image = getattr(_declared_by_method(model), "count_image", count_image)(model, _inputs_of(model, image_size))
    num_tokens = text_tokens + image.visual_tokens
    passes = [(num_tokens, num_tokens)]
    if image.read_tokens is not None:
        passes = [(image.read_tokens, image.read_tokens), (text_tokens, num_tokens)]
    return Account(
        vision_tower=image.vision_tower,
        text_encoder=image.text_encoder,
        compressor=image.compressor,
        projector=image.projector,
        llm_prefill=prefill_flops(config.text_config, passes),
        visual_tokens=image.visual_tokens,
        kv_bytes=kv_bytes_by_account(config.text_config, num_tokens, _dtype_of(config)),
        at_most=image.at_most,
    )


def count_image(model: Any, inputs: Mapping[str, torch.Tensor]) -> ImageAccount:
    """Counts what a model does with an image before the language model.

    Args:
        model: without a head and without values, as [`model_without_values`] makes it.
        inputs: of one image, as [`image_inputs`] makes them.

    Raises:
        FoveateError: a method whose compression depends on values, and that declares no account.
    """
    if isinstance(model, CompressedModelMixin):
        try:
            return count_reading(model, lambda: model.compress_images(dict(inputs)).lengths)
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            method = model.config.compression.method
            raise FoveateError(
                f"What the method '{method}' costs can't be counted without values ({first_sentence(error)}): declare "
                "count_image in a module beside the method's (see foveate.modeling.core.account)."
            ) from error
    return count_reading(model, lambda: map(len, image_sequences(model.get_image_features(**inputs))))


def count_reading(model: Any, read: Callable[[], Iterable[int]]) -> ImageAccount:
    """Counts what a function runs of a model.

    Args:
        model: as in [`count_image`].
        read: runs the model on one image, and returns the number of its visual tokens.
    """
    with count_parts(model, _PARTS, rest="compressor", attention="vision_tower") as found:
        (visual_tokens,) = read()
    return ImageAccount(**found, visual_tokens=visual_tokens)  # type: ignore[arg-type]


def count_without_compression(model: Any, image_size: tuple[int, int]) -> int:
    """Tokens of an image of (width, height) pixels if a compressed model, without a head, left none out: the stock
    model's or, of a method that cuts images into views of its own, all patches of these."""
    _require_visible(image_size)
    with bad_input():
        ((lengths, num_separators),) = model.crop_lengths(_inputs_of(model, image_size))
    return sum(lengths) + num_separators


def _inputs_of(model: Any, image_size: tuple[int, int]) -> dict[str, torch.Tensor]:
    return getattr(_declared_by_method(model), "image_inputs", image_inputs)(model.config, image_size)


def image_inputs(config: Any, image_size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """What the processor returns for one image of (width, height) pixels: the pixels without values, their layout with
    them, and a question of full length where the model reads one.

    An image that keeps its size is rounded to whole tokens; the limits of its size are the processor's.
    """
    vision, (width, height), found = config.vision_config, image_size, {}
    if hasattr(vision, "spatial_merge_size"):
        merge = vision.spatial_merge_size
        rows, columns = (merge * max(1, round(side / (vision.patch_size * merge))) for side in (height, width))
        shape: tuple[int, ...] = (
            rows * columns,
            vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        )
        found["image_grid_thw"] = torch.tensor([[1, rows, columns]])
    else:
        shape = (1, vision.num_channels, vision.image_size, vision.image_size)
        if hasattr(config, "image_grid_pinpoints"):
            grid = tile_grid((height, width), config.image_grid_pinpoints, vision.image_size, vision.patch_size)
            shape = (1, grid.num_tiles, *shape[1:])
            found["image_sizes"] = torch.tensor([[height, width]])
    found["pixel_values"] = torch.empty(shape, dtype=_dtype_of(config), device="meta")
    if hasattr(config, "question_config"):
        question = torch.ones(1, config.question_config.max_position_embeddings, dtype=torch.int64)
        found |= {"question_input_ids": question, "question_attention_mask": question}
    return found


def default_image_size(config: Any) -> tuple[int, int]:
    """(width, height) in pixels of an image that is one tile, or of a usual one where an image keeps its size."""
    return (getattr(getattr(config, "vision_config", None), "image_size", _DEFAULT_SIDE),) * 2


def prefill_flops(config: Any, passes: Sequence[tuple[int, int]]) -> int:
    """FLOPs of a language model on a prompt, its head on the last token alone.

    Args:
        config: of the language model; its layers are all alike, so that one is run.
        passes: how many tokens each runs, and how many they attend to.
    """
    one_layer = copy.deepcopy(config)
    one_layer.num_hidden_layers = 1
    with torch.device("meta"):
        model = AutoModel.from_config(one_layer, attn_implementation="sdpa").eval().requires_grad_(False)
    model.rotary_emb = _RotaryAngles(_head_width(config))

    def run(length: int, past: int, cache: Any = None) -> Any:
        embeddings = torch.empty(1, length, config.hidden_size, dtype=model.dtype, device="meta")
        positions = cache_positions(past, length, embeddings.device)
        return model(inputs_embeds=embeddings, use_cache=True, **cache_argument(cache), **positions)

    found = 0
    for queries, keys in passes:
        past = keys - queries
        with _values_left_out():
            cache = cache_of(run(past, 0)) if past else None
        with count_parts(model, {}, rest="layer") as parts:
            run(queries, past, cache)
        found += parts["layer"]
    return config.num_hidden_layers * found + 2 * config.hidden_size * config.vocab_size


def kv_bytes_by_account(text_config: Any, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of `num_tokens` tokens in a language model of this config."""
    width = text_config.num_key_value_heads * _head_width(text_config)
    return num_tokens * text_config.num_hidden_layers * 2 * width * dtype.itemsize


class _RotaryAngles(nn.Module):
    """Cosines and sines without values. No product is theirs, but 4.57 computes them by one, and on a real device."""

    def __init__(self, head_width: int):
        super().__init__()
        self.head_width = head_width

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        angles = hidden_states.new_empty(*hidden_states.shape[:2], self.head_width)
        return angles, angles


def _head_width(text_config: Any) -> int:
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


# The count


@contextmanager
def count_parts(
    model: Any, parts: Mapping[str, str], rest: str, attention: str | None = None
) -> Iterator[dict[str, int]]:
    """Counts the FLOPs of what runs inside, without gradients, on inputs with or without values.

    Args:
        model: without values; it can't be counted twice at a time.
        parts: their names, and a pattern of what the names of their modules begin with; of a module the first that fits
            counts, of modules in each other the innermost.
        rest: the name of all else.
        attention: the part that attention belongs to where it is computed outside of all modules of a part.

    Yields:
        FLOPs by name, filled in at the end.
    """
    found = dict.fromkeys((*parts, rest), 0)
    with _values_left_out(), FlopCounterMode(display=False) as counter:
        clock = _PartClock(counter.get_total_flops, found, rest)
        hooks = []
        for name, module in model.named_modules():
            part = next((part for part, start in parts.items() if re.match(rf"({start})\b", name)), None)
            if part is not None:
                hooks.append(module.register_forward_pre_hook(lambda *_, part=part: clock.enter(part)))
                hooks.append(module.register_forward_hook(lambda *_: clock.leave()))
        try:
            with _AttentionOfPart(clock, rest, attention or rest):
                yield found
        finally:
            clock.read()
            for hook in hooks:
                hook.remove()


class _PartClock:
    """Gives what a counter goes up by to the part that is running."""

    def __init__(self, count: Callable[[], int], found: dict[str, int], rest: str):
        self.count, self.found, self.running, self.seen = count, found, [rest], 0

    def read(self) -> None:
        total = self.count()
        self.found[self.running[-1]] += total - self.seen
        self.seen = total

    def enter(self, part: str) -> None:
        self.read()
        self.running.append(part)

    def leave(self) -> None:
        self.read()
        self.running.pop()


class _AttentionOfPart(TorchFunctionMode):
    """Gives attention that no part computes to one."""

    def __init__(self, clock: _PartClock, rest: str, part: str):
        super().__init__()
        self.clock, self.rest, self.part = clock, rest, part

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not scaled_dot_product_attention or self.clock.running[-1] != self.rest:
            return func(*args, **(kwargs or {}))
        self.clock.enter(self.part)
        output = func(*args, **(kwargs or {}))
        self.clock.leave()
        return output


class _OneDevice(TorchDispatchMode):
    """Lets tensors with values (layouts of images, questions) stand beside those without: what is computed of both has
    none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1:
            args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


class _ProductsAlone(TorchFunctionMode):
    """Leaves out of layers what is not counted, as it takes most of the time without values, too: a linear layer is its
    product, attention is two, which every version of the counter knows, and a norm has nothing but a shape."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        run = {linear: _product, scaled_dot_product_attention: _two_products, layer_norm: _same_shape}.get(func, func)
        return run(*args, **(kwargs or {}))


def _product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return states @ weight.mT


def _two_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, enable_gqa: bool = False, **__: Any
) -> torch.Tensor:
    if enable_gqa:
        key, value = (states.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3) for states in (key, value))
    return query @ key.mT @ value


def _same_shape(states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(states)


@contextmanager
def _values_left_out() -> Iterator[None]:
    with torch.no_grad(), _ProductsAlone(), _OneDevice():
        yield


# The model


def model_without_values(config: Any) -> Any:
    """The model without a head of a config, on the meta device."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    if hasattr(model.model, "question_encoder"):  # SDPA looks whether anything of its mask is to be masked
        model.model.question_encoder.set_attn_implementation("eager")
    return model.model.eval().requires_grad_(False)  # views of parameters break the counter's hooks


def stock_config(config: Any) -> Any:
    """The config of the stock model that a compressed one was made of; a stock model's own."""
    stock = stock_class(type(config))
    if stock is type(config):
        return config
    return stock.from_dict({name: value for name, value in config.to_dict().items() if name not in _OWN_FIELDS})


_OWN_FIELDS = ("architectures", "auto_map", "compression", "model_type", "question_config")


def declared_beside(module: str) -> Any:
    """The module with what a method declares of its account, by the name of the method's own; `None` without one."""
    name = f"{module}_account"
    return importlib.import_module(name) if importlib.util.find_spec(name) is not None else None


def _declared_by_method(model: Any) -> Any:
    bases = (base for base in type(model).__mro__ if issubclass(base, CompressedModelMixin))
    return next((found for base in bases if (found := declared_beside(base.__module__)) is not None), None)


def require_known_towers(config: Any) -> None:
    """Raises `FoveateError` where a model has parts that there is no account of."""
    vision = getattr(getattr(config, "vision_config", None), "model_type", None)
    language = getattr(getattr(config, "text_config", None), "model_type", None)
    if vision not in _VISION_TOWERS or language not in _LANGUAGE_MODELS:
        raise FoveateError(
            f"A '{config.model_type}' model with vision tower '{vision}' and language model '{language}' has no "
            f"account here: it takes one of {', '.join(_VISION_TOWERS)} and one of {', '.join(_LANGUAGE_MODELS)}."
        )


def _require_visible(image_size: tuple[int, int]) -> None:
    if min(image_size) < 1 or max(image_size) > MAX_ASPECT_RATIO * min(image_size):
        raise FoveateError(
            f"An image of {image_size[0]}x{image_size[1]} pixels can't be seen: both sides are at least 1, and one at "
            f"most {MAX_ASPECT_RATIO} times the other."
        )


def _dtype_of(config: Any) -> torch.dtype:
    """What the checkpoint loads in; float32 where it doesn't say, as Transformers has it."""
    return getattr(config, "dtype", None) or torch.float32
