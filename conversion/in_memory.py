"""A stock model that is loaded already → a compressed one that shares its weights, and back."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from foveate.conversion.convert import make_processor
from foveate.errors import FoveateError, bad_input
from foveate.modeling.core.base import CompressedGenerationMixin, stock_class
from foveate.registry import METHODS, Pair, require_pair


def compress(
    model: Any,
    processor: Any = None,
    method: str = "sample",
    settings: Mapping[str, Any] | None = None,
    keep_ratio: float | None = None,
) -> tuple[Any, Any]:
    """Makes a compressed model of one that is loaded, however it is: quantised, on several devices, with adapters of
    PEFT around it. No weight is copied: the two share their modules, and the stock model goes on working.

    Args:
        model: a stock model with a head, `…ForConditionalGeneration`, or a `PeftModel` of one.
        processor: its processor; `None` where there is none to compress.
        method: a name in `foveate.registry.METHODS`, of one that reads no question and cuts no images.
        settings: fields of the config's `compression` block.
        keep_ratio: in (0, 1], sets the budget to this share of an image's tokens.

    Returns:
        The compressed model and processor. Their `save_pretrained` writes a hub checkpoint.

    Raises:
        FoveateError: a model that the method can't run on, an unknown method or setting.
    """
    if method not in METHODS:
        raise FoveateError(f"There is no method '{method}': choose one of {', '.join(METHODS)}.")
    declared = METHODS[method]
    if declared.reads_question or declared.cuts_images:
        raise FoveateError(f"The method '{method}' needs more than a loaded model: use `foveate convert` instead.")
    stock = _innermost(model)
    if isinstance(stock, CompressedGenerationMixin):
        raise FoveateError("The model is compressed already: change its settings with set_compression.")
    if not hasattr(stock, "config"):
        raise FoveateError(f"A {type(stock).__name__} is no model of Transformers: pass one with a head.")
    pair = require_pair(method, stock.config.model_type, f"This {type(stock).__name__}")
    expected = pair.backbone.stock_class("head").name
    if expected not in {base.__name__ for base in type(stock).__mro__}:
        raise FoveateError(f"A {type(stock).__name__} has no head to generate with: pass a {expected}.")
    with bad_input():
        config = _compressed_config(pair, stock.config, {"method": method, **(settings or {})})
        if keep_ratio is not None:
            config.change_compression(keep_ratio)
    made = _as_class(stock, pair.generation_class, config)
    made.model = _as_class(stock.model, pair.model_class, config)
    _draw_modules(made.model, config)
    return _around(model, stock, made), None if processor is None else make_processor(processor, pair, None, config)


def uncompress(model: Any, processor: Any = None) -> tuple[Any, Any]:
    """The other way round: the stock model and processor of compressed ones, which share their weights.

    Args:
        model: a compressed model with a head, whose method adds modules to the stock one's or not, or a `PeftModel` of
            one.
        processor: its processor, or `None`.

    Raises:
        FoveateError: a model that is not compressed.
    """
    inner: Any = _innermost(model)
    if not isinstance(inner, CompressedGenerationMixin):
        raise FoveateError(f"A {type(inner).__name__} is not compressed: there is nothing to undo.")
    stock, stock_model = stock_class(type(inner)), stock_class(type(inner.model))
    fields = inner.config.to_dict()
    for name in ("compression", "question_config", "auto_map", "model_type"):
        fields.pop(name, None)
    config_class = stock_class(type(inner.config))
    config = _keep_internal(inner.config, config_class.from_dict(fields))
    made = _as_class(inner, stock, config)
    made.model = _as_class(inner.model, stock_model, config)
    for name in inner.model_class.added_modules:
        delattr(made.model, name)
    return _around(model, inner, made), None if processor is None else _stock_processor(processor)


def _compressed_config(pair: Pair, stock: Any, compression: dict[str, Any]) -> Any:
    fields = stock.to_dict()
    fields.pop("model_type", None)
    config = pair.config_class.from_dict({**fields, "compression": compression})
    return _keep_internal(stock, config)


def _keep_internal(before: Any, config: Any) -> Any:
    """A config with what another knows of the loaded model and does not write: its attention kernel, its name."""
    config._attn_implementation = before._attn_implementation
    for name in before.sub_configs:
        old, new = getattr(before, name, None), getattr(config, name, None)
        if old is not None and new is not None:
            new._attn_implementation = old._attn_implementation
    config._name_or_path = before._name_or_path
    if (quantization := getattr(before, "quantization_config", None)) is not None:
        config.quantization_config = quantization
    return config


def _as_class(module: Any, new_class: Any, config: Any) -> Any:
    """A module of another class with the same parts, which are shared."""
    made = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        vars(made)[name] = dict(vars(module)[name])
    made.__class__ = new_class
    made.config = config
    _move_hook(module, made)
    return made


def _move_hook(before: Any, made: Any) -> None:
    """Accelerate's hook of a module, which has put a `forward` on it that is bound to it, on another."""
    hook = vars(made).pop("_hf_hook", None)
    if hook is None:
        return
    from accelerate.hooks import add_hook_to_module

    for name in ("forward", "_old_forward"):
        vars(made).pop(name, None)
    add_hook_to_module(made, hook)


def _draw_modules(model: Any, config: Any) -> None:
    """Gives a model what its method adds to it, as it begins, on the device and in the dtype of its embeddings."""
    model.add_modules(config)
    weight = model.get_input_embeddings().weight
    for name in model.added_modules:
        module = getattr(model, name)
        module.apply(model._init_weights)
        dtype = torch.float32 if name in model.kept_in_fp32 or not weight.is_floating_point() else weight.dtype
        module.to(weight.device, dtype)


def _innermost(model: Any) -> Any:
    """The model of Transformers inside adapters of PEFT."""
    while type(model).__module__.partition(".")[0] == "peft":
        model = model.base_model if "base_model" in model._modules else model.model
    return model


def _around(model: Any, inner: Any, made: Any) -> Any:
    """The adapters around a model, around another one."""
    if model is inner:
        return made
    name = "base_model" if "base_model" in model._modules else "model"
    found = copy.copy(model)
    vars(found)["_modules"] = {**model._modules, name: _around(model._modules[name], inner, made)}
    if "config" in vars(found):
        found.config = made.config
    return found


def _stock_processor(processor: Any) -> Any:
    stock, processor = stock_class(type(processor)), copy.copy(processor)
    processor.set_compression(processor.settings_class.with_budget(None, None))
    names = inspect.signature(stock.__init__).parameters
    return stock(**{name: getattr(processor, name) for name in names if name != "self" and hasattr(processor, name)})
