"""Registers the models with Transformers' Auto classes, without importing Transformers or a model.

After `import foveate`, `AutoModelForImageTextToText.from_pretrained` knows every model without `trust_remote_code`,
whatever was imported first. `import foveate` takes milliseconds all the same, and a program that loads no compressed
model imports none:

- A finder on `sys.meta_path` watches for Transformers' modules of Auto classes and for the modules of our own classes.
  It finds nothing itself: it wraps the loader that the other finders give, and registers when the module has run.
- What it registers are stand-ins for classes, which import the class when it is used. When the class is imported, it
  takes the place of its stand-in.

The classes themselves can't be registered there, since nothing can be imported there. Transformers' models import the
Auto classes while they have run in part only (`transformers.models.llava.modeling_llava` does), and ours need them
whole. Other threads may wait for the module that is being imported, and hold one that would have to be.
"""

from __future__ import annotations

import copyreg
import inspect
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from foveate.modeling.core.declarations import ClassReference, Method
from foveate.pairs import find_pairs
from foveate.registry import BACKBONES, METHODS, Pair, all_pairs, pairs, pairs_of


class StandIn(type):
    """Type of a class that stands for another one, which is imported when anything but its name is asked for."""

    reference: ClassReference

    def __getattribute__(cls, name: str) -> Any:
        if name.startswith("__") or name in type.__getattribute__(cls, "__dict__"):
            return type.__getattribute__(cls, name)
        return getattr(cls.reference.load(), name)

    def __call__(cls, *args, **kwargs) -> Any:
        return cls.reference.load()(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.reference.load())

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.reference.load())


def _reduce(stand_in: StandIn) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return ClassReference.load, (stand_in.reference,)


copyreg.pickle(StandIn, _reduce)  # in a pickle it is the class


_imported: dict[str, ModuleType] = {}
_stand_ins: dict[ClassReference, StandIn] = {}
_lock = threading.RLock()  # nothing is imported while it is held, so no thread waits for another


def _class_of(pair: Pair, part: str, *bases: type) -> type:
    """A class of a pair if it has been imported, else its stand-in, which is a subclass of `bases`."""
    reference = pair.references[part]
    if reference.module in _imported:
        return getattr(_imported[reference.module], reference.name)
    if reference not in _stand_ins:
        facts = {"__module__": reference.module, "reference": reference, "model_type": pair.model_type}
        _stand_ins[reference] = StandIn(reference.name, bases, facts)
    return _stand_ins[reference]


def _register_config(auto: ModuleType, pair: Pair) -> None:
    auto.AutoConfig.register(pair.model_type, _class_of(pair, "config"), exist_ok=True)


def _register_processor(auto: ModuleType, pair: Pair) -> None:
    if "processor" not in pair.references:
        return
    auto.AutoProcessor.register(_class_of(pair, "config"), _class_of(pair, "processor"), exist_ok=True)


def _register_image_processor(auto: ModuleType, pair: Pair) -> None:
    if "image_processor" not in pair.references:
        return
    from transformers.image_processing_utils import BaseImageProcessor  # imported by `auto` already

    found = _class_of(pair, "image_processor", BaseImageProcessor)
    classes: dict[str, Any] = {"slow_image_processor_class": found}  # 4.57 has no word for one that is neither
    if "image_processor_classes" in inspect.signature(auto.AutoImageProcessor.register).parameters:  # ≥ 5.0
        classes = {"image_processor_classes": {"pil": found, "torchvision": found}}
    auto.AutoImageProcessor.register(_class_of(pair, "config"), **classes, exist_ok=True)


def _register_models(auto: ModuleType, pair: Pair) -> None:
    """Models are looked up by their config's class, so there is nothing to register before that is imported."""
    config_class = _class_of(pair, "config")
    if isinstance(config_class, StandIn):
        return
    for name, part in _AUTO_MODELS.items():
        model_class = _class_of(pair, part)
        if isinstance(model_class, StandIn):
            type.__setattr__(model_class, "config_class", config_class)  # `register` compares it
        if hasattr(auto, name):
            getattr(auto, name).register(config_class, model_class, exist_ok=True)


#: Which class of ours serves which Auto class. 4.57 alone has the last one, newer versions alone that before it.
_AUTO_MODELS = {
    "AutoModel": "model",
    "AutoModelForImageTextToText": "generation",
    "AutoModelForMultimodalLM": "generation",
    "AutoModelForVision2Seq": "generation",
}

#: What is registered in each of Transformers' modules of Auto classes.
_REGISTER: dict[str, Callable[[ModuleType, Pair], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.processing_auto": _register_processor,
    "transformers.models.auto.image_processing_auto": _register_image_processor,
    "transformers.models.auto.modeling_auto": _register_models,
}

#: Whose classes are in each of our modules.
_PAIRS: dict[str, Pair] = {}

_BASE_OF_MODELS = "foveate.modeling.core.base"
_KEY_MAPPING = "transformers.conversion_mapping"  # ≥ 5.0


def _on_import(module: ModuleType) -> None:
    """Does what a watched module makes possible."""
    name = module.__name__
    if name == _BASE_OF_MODELS:
        module.SavedCompressionMixin.code_writer = staticmethod(_write_code)
        return
    if name == _KEY_MAPPING:
        # Transformers makes its table of weights' names at the first look into it, and what our modules enter is lost
        # where a second thread makes it too. It is made here, before anybody can look.
        module.get_checkpoint_conversion_mapping("llava")
        return
    with _lock:
        _imported[name] = module
        if name in _REGISTER:
            know_found_families()
        found = [_PAIRS[name]] if name in _PAIRS else set(_PAIRS.values())
        for pair in found:
            for auto in _REGISTER if name in _PAIRS else [name]:
                if auto in _imported:
                    _REGISTER[auto](_imported[auto], pair)


def _write_code(model_class: type, folder: str) -> None:
    """Writes the remote code beside a saved model."""
    from foveate.conversion.bundle import write_bundle

    write_bundle(model_class, folder)


class _WatchingLoader(Loader):
    """Another loader, which stays the one that the module names."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # such as `get_source`

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _on_import(module)


class _Watcher(MetaPathFinder):
    """Lets the other finders find a watched module, and wraps its loader."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.startswith(_OF_PAIRS) and fullname not in _PAIRS:
            know_found_families()
        if fullname not in _WATCHED and fullname not in _PAIRS:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _WatchingLoader(spec.loader)
                return spec
        return None


#: What the names of the modules of pairs begin with.
_OF_PAIRS = tuple(f"foveate.{folder}.{folder}_" for folder in ("configuration", "processing", "modeling"))

_WATCHED = frozenset({*_REGISTER, _BASE_OF_MODELS, _KEY_MAPPING})
_watcher = _Watcher()


def register_models() -> None:
    """Registers every model with those Auto classes that are imported, and with the others when they are."""
    if _watcher in sys.meta_path:
        return
    register_pairs(pairs())
    sys.meta_path.insert(0, _watcher)
    for name in _WATCHED & sys.modules.keys():
        _on_import(import_module(name))  # waits for a thread that is importing it


def know_found_families() -> None:
    """Registers what methods make of families of Transformers that have no file here. The tables that name them are
    read when somebody looks for a model, not before."""
    with _lock:
        if not _found:
            _found.extend(pair for pair in all_pairs() if pair.references["config"].module not in _PAIRS)
            register_pairs(_found)


_found: list[Pair] = []


def register_pairs(found: Iterable[Pair]) -> None:
    """Lets the modules of pairs be imported, and registers their classes likewise."""
    find_pairs(found)
    with _lock:
        _PAIRS.update({reference.module: pair for pair in found for reference in pair.references.values()})
        for auto in _REGISTER.keys() & _imported.keys():
            for pair in found:
                _REGISTER[auto](_imported[auto], pair)


def register_method(method: Method) -> Method:
    """Makes a method from outside of foveate known: to `convert`, the commands, Transformers' Auto classes, and as
    names of foveate (`foveate.LlavaEverySecondModel`).

    Args:
        method: its declaration, with classes of modules that can be imported. Its module, and those of its own package
            that it imports, become part of a converted checkpoint's code.

    Returns:
        The declaration, as the registry keeps it.

    Raises:
        ValueError: its name or stem is another method's, or a backbone is not known.
    """
    if method.name in METHODS or method.stem in {known.stem for known in METHODS.values()}:
        raise ValueError(f"There is a method '{method.name}' or one with the stem '{method.stem}' already: rename it.")
    if unknown := sorted(set(method.backbones) - set(BACKBONES)):
        raise ValueError(f"There is no backbone '{unknown[0]}'. Choose from: {', '.join(BACKBONES)}.")
    classes = {field.name: getattr(method, field.name) for field in fields(method)}
    references: dict[str, Any] = {
        name: ClassReference(value.__module__, value.__name__)
        for name, value in classes.items()
        if isinstance(value, type)
    }
    METHODS[method.name] = replace(method, **references)
    register_pairs(pairs_of(method.name))
    if _found:
        _found.clear()
        know_found_families()
    return METHODS[method.name]
