"""What a method and a backbone say of themselves.

Each stands in the file of what it describes, as one call with literal values and names of classes:
`METHOD = Method(…)`, `BACKBONE = Backbone(…)`. So the registry can read it from the source, without importing torch
(`foveate/registry.py`), as setuptools reads a version.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class ClassReference(NamedTuple):
    """A class by the module that it is in and its name."""

    module: str
    name: str

    def load(self) -> type:
        return getattr(importlib.import_module(self.module), self.name)


@dataclass(frozen=True)
class Backbone:
    """A family of stock models.

    Args:
        model_type: of their config, and the end of the names of what is made of them.
        stem: what the names of their classes begin with: `LlavaNext` of `LlavaNextModel`, `LlavaNextConfig`, …
        title: for readers.
        mixin: what differs from other backbones in the model without a head.
        stock: names of its stock classes that are not the stem and the usual end: of "config", "model" (without a
            head), "head" (the model with one) and "processor"; "" for one that there is not.
    """

    model_type: str
    stem: str
    title: str
    mixin: Any
    stock: dict[str, str] = field(default_factory=dict, hash=False)

    def stock_class(self, kind: str) -> ClassReference:
        """One of its stock classes; see `stock`."""
        ends = {"config": "Config", "model": "Model", "head": "ForConditionalGeneration", "processor": "Processor"}
        return ClassReference("transformers", self.stock.get(kind, f"{self.stem}{ends[kind]}"))


@dataclass(frozen=True)
class Method:
    """A compression method.

    Args:
        name: as in the config's `compression` block and on the command line.
        stem: in the names of classes (`LlavaQGVTCModel`), and, in small letters, of files (`modeling_llava_qgvtc.py`).
        title: for readers.
        paper: its address, or its title where no address is known.
        kind: what the number of visual tokens follows from, and what it needs: "sequence" (the image's length; the
            visual tokens, right before the language model), "encoder" (the image's size; a way into the vision tower),
            "image" (the image's size; images of its own) or "deferred" (known when the image has been seen, or freed
            after it was read; a forward pass of its own).
        mixin: what it adds to a model without a head.
        generation_mixin: and to one with a head.
        settings: its class of the `compression` block; `SequenceSettings` or `CompressionSettings` where it has no
            settings of its own.
        backbones: the `model_type`s of what it runs on.
        reads_question: whether a CLIP text tower reads the question: the config has a `question_config` then, the
            processor a `question_tokenizer`.
        cuts_images: whether it prepares images in its own way: it has a file in `processing/` then, named after it,
            with `<stem>ProcessorMixin` and, for each backbone, an image processor.
        equals_stock: whether at a budget of all tokens the logits are the stock model's on the same images.
        family: for readers, of methods that share their classes.
        needs_training: whether a freshly converted checkpoint has weights that mean nothing yet.
        differs_by_question_type: whether what a smaller budget costs depends on what is asked, so that results are
            drawn for each type of question.
        objective: what its training has beside the answers' loss: the recipe's key for it, one in
            `training.recipe.OBJECTIVES`, which no other method's recipe may have.
        summary: for a card: what the method does, in a sentence or two.
        limits: for a card: what to know before relying on it.
    """

    name: str
    stem: str
    title: str
    paper: str
    kind: str
    mixin: Any
    generation_mixin: Any
    settings: Any
    backbones: tuple[str, ...]
    reads_question: bool = False
    cuts_images: bool = False
    equals_stock: bool = True
    family: str | None = None
    needs_training: bool = False
    differs_by_question_type: bool = False
    objective: str | None = None
    summary: str = ""
    limits: tuple[str, ...] = ()
