"""The methods that foveate knows. A new method adds one entry here.

Importing this module imports none of them: classes are named, and imported when they are asked for.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class ClassReference(NamedTuple):
    """A class by the module that it is in and its name."""

    module: str
    name: str

    def load(self) -> type:
        return getattr(importlib.import_module(self.module), self.name)


@dataclass(frozen=True)
class Backbone:
    """The classes of one method on one backbone, found by the convention of their names.

    Args:
        base_model_type: `model_type` of the stock models that convert to it.
        model_type: its own, which also ends the names of its modules.
        stem: what the names of its classes begin with.
        title: the backbone's name for readers.
        has_image_processor: whether it has an image processor of its own, or images are prepared as the base does it.
    """

    base_model_type: str
    model_type: str
    stem: str
    title: str
    has_image_processor: bool = False

    @cached_property
    def references(self) -> dict[str, ClassReference]:
        """Where its classes are: "config", "processor", "model", "generation", and "image_processor" if it has one."""
        parts = {
            "config": ("configuration.configuration", "Config"),
            "processor": ("processing.processing", "Processor"),
            "model": ("modeling.modeling", "Model"),
            "generation": ("modeling.modeling", "ForConditionalGeneration"),
        }
        if self.has_image_processor:
            parts["image_processor"] = ("processing.image_processing", "ImageProcessor")
        return {
            part: ClassReference(f"foveate.{module}_{self.model_type}", f"{self.stem}{name}")
            for part, (module, name) in parts.items()
        }

    @cached_property
    def config_class(self) -> type:
        return self.references["config"].load()

    @cached_property
    def processor_class(self) -> type:
        return self.references["processor"].load()

    @cached_property
    def image_processor_class(self) -> type | None:
        """`None` where images are prepared as the base does it."""
        return self.references["image_processor"].load() if self.has_image_processor else None

    @cached_property
    def model_class(self) -> type:
        return self.references["model"].load()

    @cached_property
    def generation_class(self) -> type:
        return self.references["generation"].load()


@dataclass(frozen=True)
class Method:
    """One compression method.

    Args:
        name: as in the config's `compression` block and on the command line.
        title: for readers.
        paper: its address, or its title where no address is known.
        needs_training: whether a freshly converted checkpoint has weights that mean nothing yet.
        backbones: what it runs on.
    """

    name: str
    title: str
    paper: str
    needs_training: bool
    backbones: tuple[Backbone, ...]


_METACOMPRESS = "https://arxiv.org/abs/2603.21701"

_ETC = "ETC: Extreme Token Compression via Task-aware Visual Information Distillation in VLMs"

_METEOR = "Top-Down Compression: Revisit Efficient Vision Token Projection for Visual Instruction Tuning"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="recoverable",
            title="Recoverable Compression",
            paper="https://arxiv.org/abs/2409.01179",
            needs_training=False,
            backbones=(Backbone("llava", "llava_recoverable", "LlavaRecoverable", "LLaVA-1.5"),),
        ),
        Method(
            name="qg-vtc",
            title="QG-VTC",
            paper="https://arxiv.org/abs/2504.00654",
            needs_training=True,
            backbones=(
                Backbone("llava", "llava_qgvtc", "LlavaQGVTC", "LLaVA-1.5"),
                Backbone("llava_next", "llava_next_qgvtc", "LlavaNextQGVTC", "LLaVA-NeXT"),
            ),
        ),
        Method(
            name="metacompress",
            title="MetaCompress",
            paper=_METACOMPRESS,
            needs_training=True,
            backbones=(
                Backbone("llava", "llava_metacompress", "LlavaMetaCompress", "LLaVA-1.5"),
                Backbone("llava_next", "llava_next_metacompress", "LlavaNextMetaCompress", "LLaVA-NeXT"),
            ),
        ),
        *[
            Method(
                name=name,
                title=title,
                paper=_METACOMPRESS,
                needs_training=False,
                backbones=(
                    Backbone("llava", "llava_baseline", "LlavaBaseline", "LLaVA-1.5"),
                    Backbone("llava_next", "llava_next_baseline", "LlavaNextBaseline", "LLaVA-NeXT"),
                    Backbone("qwen3_vl", "qwen3_vl_baseline", "Qwen3VLBaseline", "Qwen3-VL"),
                ),
            )
            # The baselines of MetaCompress's paper, which share everything.
            for name, title in (
                ("random", "Random pruning"),
                ("sample", "Equidistant sampling"),
                ("spatial", "Spatial pooling"),
            )
        ],
        Method(
            name="etc",
            title="Extreme Token Compression",
            paper=_ETC,
            needs_training=True,
            backbones=(
                Backbone("llava", "llava_etc", "LlavaETC", "LLaVA-1.5"),
                Backbone("qwen3_vl", "qwen3_vl_etc", "Qwen3VLETC", "Qwen3-VL"),
            ),
        ),
        Method(
            name="meteor",
            title="LLaVA-Meteor",
            paper=_METEOR,
            needs_training=True,
            backbones=(Backbone("llava", "llava_meteor", "LlavaMeteor", "LLaVA-1.5", has_image_processor=True),),
        ),
    )
}


def backbones() -> list[Backbone]:
    """Every set of classes, once: methods may share one."""
    found = {backbone.model_type: backbone for method in METHODS.values() for backbone in method.backbones}
    return list(found.values())
