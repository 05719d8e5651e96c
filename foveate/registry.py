"""The methods and backbones that foveate knows, and the classes of each pair of them.

A method is declared in its file in `modeling/methods/`, a backbone in `modeling/backbones/`. Importing this module
imports none of them: declarations are read from the source. No file is written for a pair either: its three modules
(`foveate.modeling.modeling_llava_qgvtc`, …) are a few lines that are made when they are imported (`foveate/pairs.py`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import foveate.modeling.backbones
import foveate.modeling.methods
from foveate.errors import FoveateError
from foveate.families import stock_families, why_unfit
from foveate.modeling.core.declarations import Backbone, ClassReference, Method


@dataclass(frozen=True)
class Pair:
    """A method on a backbone: its classes, imported when they are asked for.

    Methods that share everything but their settings share the classes too.
    """

    method: Method
    backbone: Backbone

    @property
    def base_model_type(self) -> str:
        """`model_type` of the stock models that convert to it."""
        return self.backbone.model_type

    @property
    def model_type(self) -> str:
        """Its own, which also ends the names of its modules."""
        return f"{self.backbone.model_type.replace('-', '_')}_{self.method.stem.lower()}"

    @property
    def stem(self) -> str:
        """What the names of its classes begin with."""
        return f"{self.backbone.stem}{self.method.stem}"

    @property
    def title(self) -> str:
        """The backbone's name for readers."""
        return self.backbone.title

    @cached_property
    def references(self) -> dict[str, ClassReference]:
        """Where its classes are: "config", "model", "generation"; "processor" and "image_processor" if it has one."""
        places = {
            "config": ("configuration.configuration", "Config"),
            "processor": ("processing.processing", "Processor"),
            "model": ("modeling.modeling", "Model"),
            "generation": ("modeling.modeling", "ForConditionalGeneration"),
        }
        found = {
            part: ClassReference(f"foveate.{module}_{self.model_type}", f"{self.stem}{name}")
            for part, (module, name) in places.items()
        }
        if not self.backbone.stock_class("processor").name:
            del found["processor"]
        if self.method.cuts_images:
            module = f"foveate.processing.{self.method.stem.lower()}"
            found["image_processor"] = ClassReference(module, f"{self.stem}ImageProcessor")
        return found

    @cached_property
    def config_class(self) -> Any:
        return self.references["config"].load()

    @cached_property
    def processor_class(self) -> Any:
        """`None` where Transformers names no processor for the backbone."""
        return self.references["processor"].load() if "processor" in self.references else None

    @cached_property
    def image_processor_class(self) -> Any:
        """`None` where images are prepared as the base does it."""
        return self.references["image_processor"].load() if "image_processor" in self.references else None

    @cached_property
    def model_class(self) -> Any:
        return self.references["model"].load()

    @cached_property
    def generation_class(self) -> Any:
        return self.references["generation"].load()


def pairs_of(method: str) -> tuple[Pair, ...]:
    """A method by its name, on every backbone that has a file here and that it runs on."""
    return tuple(Pair(METHODS[method], BACKBONES[backbone]) for backbone in METHODS[method].backbones)


def pairs() -> list[Pair]:
    """Every set of classes on backbones that have a file here, once: methods may share one."""
    return _once(pair for method in METHODS for pair in pairs_of(method))


def all_pairs() -> list[Pair]:
    """The same, and what the methods that go through the doors alone make of all other families of Transformers."""
    found = (Pair(method, backbone) for method in METHODS.values() for backbone in _found(method))
    return _once((*pairs(), *found))


def pair_on(method: str, base_model_type: str) -> Pair | None:
    """A method on a kind of base; `None` where it does not run on it."""
    declared = METHODS[method]
    backbone = BACKBONES.get(base_model_type) if base_model_type in declared.backbones else None
    if backbone is None:
        backbone = next((found for found in _found(declared) if found.model_type == base_model_type), None)
    return None if backbone is None else Pair(declared, backbone)


def require_pair(method: str, base_model_type: str, name: str) -> Pair:
    """As [`pair_on`]. Raises `FoveateError` where there is none, with the reason.

    Args:
        name: of the base, for readers.
    """
    pair = pair_on(method, base_model_type)
    if pair is not None and (base_model_type in BACKBONES or why_unfit(base_model_type) is None):
        return pair
    if METHODS[method].kind == "sequence":
        reason = why_unfit(base_model_type)
        raise FoveateError(f"{name} is a '{base_model_type}', which the method '{method}' can't compress: {reason}.")
    known = ", ".join(METHODS[method].backbones)
    raise FoveateError(f"{name} is a '{base_model_type}': the method '{method}' compresses {known}.")


def pair_of_model_type(model_type: str | None) -> Pair | None:
    """The classes of a compressed checkpoint's `model_type`; `None` where it is no compressed model's."""
    return next((pair for found in (pairs, all_pairs) for pair in found() if pair.model_type == model_type), None)


def _found(method: Method) -> list[Backbone]:
    """Families without a file here that a method runs on: a method of the visual tokens needs nothing but the doors."""
    if method.kind != "sequence":
        return []
    families = {model_type: BACKBONES.get(model_type, found) for model_type, found in stock_families().items()}
    return [backbone for model_type, backbone in families.items() if model_type not in method.backbones]


def _once(found: Iterable[Pair]) -> list[Pair]:
    by_type: dict[str, Pair] = {}
    for pair in found:
        by_type.setdefault(pair.model_type, pair)
    return list(by_type.values())


def outside_packages() -> set[str]:
    """Top-level names of the modules of methods from outside, which become part of a checkpoint's code."""
    modules = (method.mixin.module for method in METHODS.values())
    return {module.partition(".")[0] for module in modules} - {"foveate"}


def _declared(package: Any, kind: type) -> Iterator[Any]:
    """The declarations of a kind in the files of a package, in the order of their names; a class in one is a
    [`ClassReference`]."""
    (folder,) = package.__path__
    for file in sorted(Path(folder).glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        module = f"{package.__name__}.{file.stem}"
        imported = {
            alias.asname or alias.name: ClassReference(str(node.module), alias.name)
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        calls = (node for statement in tree.body if isinstance(statement, ast.Assign) for node in ast.walk(statement))
        for call in calls:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == kind.__name__:
                values = {str(keyword.arg): keyword.value for keyword in call.keywords}
                yield kind(
                    **{
                        name: imported.get(value.id, ClassReference(module, value.id))
                        if isinstance(value, ast.Name)
                        else ast.literal_eval(value)
                        for name, value in values.items()
                    }
                )


BACKBONES: dict[str, Backbone] = {found.model_type: found for found in _declared(foveate.modeling.backbones, Backbone)}
METHODS: dict[str, Method] = {
    found.name: found for found in sorted(_declared(foveate.modeling.methods, Method), key=lambda method: method.name)
}
