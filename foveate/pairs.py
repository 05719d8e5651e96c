"""The modules of a method on a backbone, whose few lines are made when they are imported.

What each holds is the two put together, and nothing else: the very text that a converted checkpoint brings along as
`configuration_llava_qgvtc.py`, `processing_llava_qgvtc.py` and `modeling_llava_qgvtc.py` (`conversion/bundle.py`), so
the package and the checkpoint can't differ.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterable
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

from foveate.modeling.core.declarations import ClassReference
from foveate.registry import Pair


def module_source(pair: Pair, module: str) -> str:
    """The source of one of a pair's modules.

    Args:
        pair: a method on a backbone.
        module: its full name, of `pair.references`.
    """
    folder = module.split(".")[1]
    return {"configuration": _configuration, "processing": _processing, "modeling": _modeling}[folder](pair)


#: Modules with settings that name no method: one that has none of its own gets a class of them beside its config.
_PLAIN_SETTINGS = ("foveate.configuration.compression", "foveate.configuration.sequence")


def _settings(pair: Pair) -> ClassReference:
    """Of a pair, the class of its `compression` block."""
    found: Any = pair.method.settings
    if found.module not in _PLAIN_SETTINGS:
        return found
    return ClassReference(pair.references["config"].module, f"{pair.method.stem}Settings")


def _configuration(pair: Pair) -> str:
    base = ClassReference("foveate.configuration.compression", "CompressionConfigMixin")
    stock = pair.backbone.stock_class("config")
    declared: Any = pair.method.settings
    settings, classes = _settings(pair), []
    if settings != declared:
        doc = f"Settings of {pair.method.title}: those of [`{declared.name}`]."
        classes.append(_class(settings.name, [declared], doc, {"method": f'"{pair.method.name}"'}))
    attributes = {"model_type": f'"{pair.model_type}"', "settings_class": settings.name}
    if pair.method.reads_question:
        attributes["reads_question"] = "True"
    if (image_processor := pair.references.get("image_processor")) is not None:
        flat = "_".join(image_processor.module.split(".")[1:])
        attributes["image_processor"] = f'"{flat}.{image_processor.name}"'
    doc = f"`{stock.name}` with the settings of the compression, [`{settings.name}`]."
    classes.append(_class(pair.references["config"].name, [base, stock], doc, attributes))
    return _module(f"Configuration of {_title(pair)}.", [base, stock, declared], classes)


def _processing(pair: Pair) -> str:
    backbone: Any = pair.backbone
    name, stock = backbone.mixin.module.rpartition(".")[2], backbone.stock_class("processor")
    bases = [ClassReference(f"foveate.processing.{name}", f"{backbone.stem}CompressionProcessor")]
    if name == "any" or importlib.util.find_spec(f"foveate.processing.{name}") is None:
        bases = [ClassReference("foveate.processing.any", "AnyProcessorMixin"), stock]
    if pair.method.cuts_images:
        bases.insert(
            0, ClassReference(f"foveate.processing.{pair.method.stem.lower()}", f"{pair.method.stem}ProcessorMixin")
        )
    if pair.method.reads_question:
        bases.insert(0, ClassReference("foveate.processing.question", "QuestionProcessorMixin"))
    settings, reference = _settings(pair), pair.references["processor"]
    attributes = {"settings_class": settings.name, "file_name": f'"{reference.module.rpartition(".")[2]}"'}
    doc = f"`{stock.name}` that writes the placeholders of {pair.method.title}."
    made = _class(reference.name, bases, doc, attributes)
    return _module(f"Processor of {_title(pair)}.", [*bases, settings], [made])


def _modeling(pair: Pair) -> str:
    method: Any = pair.method
    backbone: Any = pair.backbone
    stock, stock_head = (backbone.stock_class(kind) for kind in ("model", "head"))
    config, model, head = (pair.references[part] for part in ("config", "model", "generation"))
    config_class = {"config_class": config.name}
    classes = [
        _class(model.name, [method.mixin, backbone.mixin, stock], f"`{stock.name}` with {method.title}.", config_class),
        _class(
            head.name,
            [method.generation_mixin, stock_head],
            f"[`{model.name}`] with a language modeling head.",
            {**config_class, "model_class": model.name},
        ),
    ]
    used = [config, method.mixin, backbone.mixin, method.generation_mixin, stock, stock_head]
    return _module(f"{_title(pair)}: the method and the backbone put together.", used, classes)


def _title(pair: Pair) -> str:
    return f"{pair.backbone.title} with {pair.method.family or pair.method.title}"


def _class(name: str, bases: Iterable[ClassReference], doc: str, attributes: dict[str, str]) -> tuple[str, str]:
    """A class's name and source."""
    lines = [f"class {name}({', '.join(base.name for base in bases)}):", f'    """{doc}"""', ""]
    return name, "\n".join([*lines, *(f"    {key} = {value}" for key, value in attributes.items())])


def _module(doc: str, used: Iterable[ClassReference], classes: list[tuple[str, str]]) -> str:
    imported: dict[str, set[str]] = {}
    for reference in used:
        imported.setdefault(reference.module, set()).add(reference.name)
    # Transformers' first, as isort has it.
    order = sorted(imported, key=lambda module: (module != "transformers", module))
    lines = [f"from {module} import {', '.join(sorted(imported[module]))}" for module in order]
    if order[0] == "transformers":
        lines.insert(1, "")
    names = ", ".join(f'"{name}"' for name in sorted(name for name, _ in classes))
    parts = [f'"""{doc}"""\n', *lines, "", "", "\n\n\n".join(source for _, source in classes)]
    return "\n".join([*parts, "", "", f"__all__ = [{names}]", ""])


class _PairLoader(InspectLoader):
    """Runs the source of one module. Tools that read sources ask it for them."""

    def __init__(self, pair: Pair):
        self.pair = pair

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        path = module.__spec__.origin  # type: ignore[union-attr]
        exec(compile(self.get_source(module.__name__), str(path), "exec"), module.__dict__)

    def get_source(self, fullname: str) -> str:
        return module_source(self.pair, fullname)


class _PairFinder(MetaPathFinder):
    """Finds the modules of every pair."""

    def __init__(self) -> None:
        self.pairs: dict[str, Pair] = {}

    def add(self, found: Iterable[Pair]) -> None:
        for pair in found:
            for reference in pair.references.values():
                if reference.module.endswith(f"_{pair.model_type}"):  # an image processor has a file
                    self.pairs[reference.module] = pair

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.pairs:
            return None
        # Where the file would lie: readers of sources ask the loader, as it isn't there.
        _, folder, name = fullname.split(".")
        place = Path(sys.modules[f"foveate.{folder}"].__path__[0]) / f"{name}.py"
        spec = spec_from_loader(fullname, _PairLoader(self.pairs[fullname]), origin=str(place))
        if spec is not None:
            spec.has_location = True
        return spec


_finder = _PairFinder()
_lock = threading.Lock()


def find_pairs(found: Iterable[Pair]) -> None:
    """Lets the modules of pairs be imported from now on."""
    with _lock:
        _finder.add(found)
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
