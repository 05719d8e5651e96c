"""What every compressed model shares, whatever its method and backbone.

A model class of a method on a backbone is put together of three: the method's mixin, the backbone's, and the stock
class of Transformers, in this order. It is one line and a config class; so is the class with a head. The stock
`forward` says which arguments there are, so that `generate`, PEFT and whoever else reads a signature find the ones that
they know.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Collection, Iterable
from inspect import Parameter, Signature
from inspect import signature as signature_of
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig

from foveate.modeling.compatibility import MixedIn, output_classes, register_key_mapping
from foveate.modeling.core.compressed_image import CompressedImage
from foveate.modeling.core.loading import (
    base_of,
    forget_base,
    hub_arguments,
    read_all_tensors,
    read_generation_config,
)
from foveate.modeling.core.outputs import WITH_PLACES, WITH_PROVENANCE, CodeWriter, extended


class SavedCompressionMixin(MixedIn):
    """How a compressed model is loaded, saved and set; mixed into the classes with and without a head."""

    #: Writes the flat remote code beside a saved checkpoint. Set by the foveate package; a class that was itself loaded
    #: from such code leaves that to Transformers, which copies its files.
    code_writer: ClassVar[CodeWriter | None] = None

    #: Parts that quantisation leaves as they are, by their names in a model without a head: what sees, and what
    #: compresses. They are a small share of the weights, and where little is kept, its choice should be the best.
    full_precision: ClassVar[tuple[str, ...]] = ("vision_tower", "visual")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, quantization_config=None, **kwargs):
        """As everywhere in Transformers. A quantisation that doesn't say which modules it leaves out leaves out
        `full_precision`, and the head; a checkpoint in the adapter layout finds its base."""
        name = pretrained_model_name_or_path
        if quantization_config is not None:
            names = [f"{start}{part}" for start in ("", "model.") for part in cls.full_precision]
            kwargs["quantization_config"] = _leaving_out(quantization_config, [*names, "lm_head"])
        base = None if name is None else base_of(name, config, kwargs)
        if base is None:
            return super().from_pretrained(name, *args, config=config, **kwargs)
        if not isinstance(config, PretrainedConfig):
            config = cls.config_class.from_pretrained(config or name, **hub_arguments(kwargs))
        kwargs["state_dict"] = read_all_tensors(name, base, kwargs)
        found = super().from_pretrained(None, *args, config=config, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        forget_base(model)
        if model.can_generate() and (generation_config := read_generation_config(name, kwargs)) is not None:
            model.generation_config = generation_config
        return found

    def save_pretrained(self, save_directory, *args, **kwargs):
        _unlink_shared_weights(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.code_writer is not None:
            type(self).code_writer(type(self), save_directory)

    def _returned(self, output: Any, return_dict: bool | None) -> Any:
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    def set_compression(self, processor: Any = None, keep_ratio: float | None = None, **changes) -> None:
        """Changes settings of the compression on this model, and on its processor, without converting again.

        Args:
            processor: the processor that goes with this model; it has to know as well where it counts tokens.
            keep_ratio: the share of an image's tokens to keep, in (0, 1]; sets the budget.
            changes: fields of the config's `compression` block, for instance `num_visual_tokens=64`.

        Raises:
            ValueError: an unknown setting or a value out of range; nothing is changed then.
        """
        settings = self.config.change_compression(keep_ratio, **changes)
        if processor is not None:
            processor.set_compression(settings)


class CompressedModelMixin(SavedCompressionMixin):
    """Mixed into a model without a head, before the Transformers class."""

    #: Names of the modules that a method adds, those among them that stay in float32, and the classes of those that
    #: begin in a way of their own.
    added_modules: ClassVar[tuple[str, ...]] = ()
    kept_in_fp32: ClassVar[tuple[str, ...]] = ()
    own_modules: ClassVar[tuple[type, ...]] = ()

    #: Why a visual token is there, in the order of [`TokenProvenance`]'s `roles`: nothing of a discarded patch is left.
    role_names: ClassVar[tuple[str, ...]] = ("discarded", "kept")

    #: Inputs that images come in, the pixels first: of the backbone, or else what the stock `get_image_features` takes.
    visual_inputs: ClassVar[tuple[str, ...]] = ()

    #: Inputs with one entry an image that a method adds to them.
    guiding_inputs: ClassVar[tuple[str, ...]] = ()

    #: What a method takes in place of images.
    image_substitutes: ClassVar[tuple[str, ...]] = ()

    #: Arguments of the stock `forward` that are not taken here.
    unused_inputs: ClassVar[frozenset[str]] = frozenset({"vision_feature_layer", "vision_feature_select_strategy"})

    #: Whether a method's own weights are saved without the "model." before their names, and whether the published names
    #: of the vision tower's have "vision_model.": of the backbone.
    publishes_short_names: ClassVar[bool] = True
    names_vision_model: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        stock = stock_class(cls)
        if stock is None:
            return
        cls.full_precision = (*SavedCompressionMixin.full_precision, *cls.added_modules)
        if not cls.visual_inputs:
            taken = signature_of(stock.get_image_features).parameters.values()
            names = [p.name for p in taken if p.kind is not Parameter.VAR_KEYWORD and p.name not in cls.unused_inputs]
            cls.visual_inputs = tuple(names[1:])
        for output_class in output_classes(stock):
            extended(output_class, WITH_PROVENANCE), extended(output_class, WITH_PLACES)
        own = (*cls.guiding_inputs, *cls.image_substitutes, "output_compression")
        signature = _signature(stock.forward, own, cls.unused_inputs)
        cls.forward = _with_signature(cls.forward, signature)
        cls.get_image_features = _with_signature(
            cls.get_image_features,
            _signature_of_images((*cls.visual_inputs, *cls.guiding_inputs)),
        )

    def __init__(self, config):
        super().__init__(config)
        self.extend(config)

    def extend(self, config: Any) -> None:
        """Makes a compressed model of the stock one."""
        self.add_modules(config)
        if self.kept_in_fp32:  # 4.57 looks for them when the stock model is made, which has none
            self._keep_in_fp32_modules = list(self.kept_in_fp32)
        self.post_init()

    def add_modules(self, config: Any) -> None:
        """Gives the stock model what the method adds to it (`added_modules`)."""

    def _init_weights(self, module):
        if isinstance(module, self.own_modules):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def compress(self, *args, **kwargs) -> list[CompressedImage]:
        """Reads images once, for any number of questions in any process."""
        raise ValueError(
            f"The method '{self.config.compression.method}' compresses an image for one question: pass the image "
            "itself with every question."
        )

    def _find_placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """(batch, columns) bool."""
        image_token_id = self.config.image_token_id
        if input_ids is not None:
            return input_ids == image_token_id
        token = torch.tensor(image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)


class CompressedGenerationMixin(SavedCompressionMixin):
    """Mixed into the model with a head, before the Transformers class.

    Attributes:
        model_class: the class of the model without a head.
    """

    model_class: ClassVar[type[CompressedModelMixin]]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        stock = stock_class(cls)
        if stock is None:
            return
        model = cls.model_class
        cls.full_precision = model.full_precision
        own = (*model.guiding_inputs, *model.image_substitutes, "output_compression")
        signature = _signature(stock.forward, own, model.unused_inputs)
        cls.forward = _with_signature(cls.forward, signature)
        images = _signature_of_images((*model.visual_inputs, *model.guiding_inputs))
        cls.get_image_features = _with_signature(cls.get_image_features, images)
        if model.publishes_short_names:
            register_key_mapping(model, cls, model.added_modules, model.names_vision_model)

    def __init__(self, config):
        super().__init__(config)
        # The stock class makes its model by name; ours is the same one with more modules and other methods.
        self.model.__class__ = self.model_class
        self.model.extend(config)
        if self.model_class.kept_in_fp32:
            self._keep_in_fp32_modules = list(self.model_class.kept_in_fp32)
        self.post_init()

    @property
    def image_inputs(self) -> tuple[str, ...]:
        """Inputs with one entry an image, the pixels first."""
        model = self.model_class
        stored = tuple(name for name in model.image_substitutes if name == "compressed_images")
        return (*model.visual_inputs, *model.guiding_inputs, *stored)

    def get_image_features(self, **images):
        """See the model without a head."""
        return self.model.get_image_features(**images)

    def compress(self, *args, **kwargs) -> list[CompressedImage]:
        """See the model without a head."""
        return self.model.compress(*args, **kwargs)

    def set_trained_budget(self, num_visual_tokens: int, processor: Any = None) -> None:
        """Changes the budget that the model is about to be trained at: as `set_compression`, but weights whose shape
        says the budget follow it."""
        resize = getattr(self.model, "resize_budget", None)
        if resize is None:
            return self.set_compression(processor, num_visual_tokens=num_visual_tokens)
        settings = resize(num_visual_tokens)
        if processor is not None:
            processor.set_compression(settings)
        return None


def stock_class(cls: type) -> Any:
    """The class of Transformers that a class is made of; `None` for a mixin."""
    return next((base for base in cls.__mro__ if base.__module__.startswith("transformers.models.")), None)


def _signature(function: Callable, added: Iterable[str], removed: Collection[str]) -> Signature:
    """A function's signature with arguments added, `None` by default, and some taken out."""
    signature = signature_of(function)
    known = [p for p in signature.parameters.values() if p.name not in removed and p.kind is not Parameter.VAR_KEYWORD]
    names = {parameter.name for parameter in known}
    own = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in added if name not in names]
    wildcard = Parameter("kwargs", Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*known, *own, wildcard])


def _signature_of_images(names: Iterable[str]) -> Signature:
    """Of a method that takes images by these names; `generate` reads there which inputs to hand on."""
    named = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names]
    self = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    return Signature([self, *named, Parameter("kwargs", Parameter.VAR_KEYWORD)])


def _with_signature(function: Callable, signature: Signature) -> Callable:
    """A method that takes its arguments by name, with another signature, by which those without a name are known."""
    function = getattr(function, "_by_name_of", function)
    names = [name for name, p in signature.parameters.items() if p.kind is Parameter.POSITIONAL_OR_KEYWORD][1:]

    @functools.wraps(function)
    def by_name(self, *args, **kwargs):
        return function(self, **dict(zip(names, args)), **kwargs)

    by_name._by_name_of = function  # type: ignore[attr-defined]
    by_name.__signature__ = signature  # type: ignore[attr-defined]
    return by_name


def _leaving_out(quantization_config: Any, modules: list[str]) -> Any:
    """A quantisation config, or a dictionary of one, that leaves these modules out if it names none itself. Configs of
    bitsandbytes have a word of their own for that."""
    is_dict = isinstance(quantization_config, dict)
    known = quantization_config if is_dict else vars(quantization_config)
    of_bitsandbytes = any(name in known for name in ("llm_int8_skip_modules", "load_in_4bit", "load_in_8bit"))
    field = "llm_int8_skip_modules" if of_bitsandbytes else "modules_to_not_convert"
    if known.get(field) is not None or not (is_dict or field in known):
        return quantization_config
    changed = copy.deepcopy(quantization_config)
    if is_dict:
        changed[field] = modules
    else:
        setattr(changed, field, modules)
    return changed


def _unlink_shared_weights(folder: str | os.PathLike) -> None:
    """Takes weight files out of a folder that are hard links to other files, as `foveate convert --link` makes them:
    written over, they would change there too."""
    for path in Path(folder).glob("*.safetensors"):
        if path.stat().st_nlink > 1:
            path.unlink()
