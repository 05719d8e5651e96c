"""The vision-language models that the installed Transformers has, by its own Auto tables.

The tables are read from their source, as the registry reads declarations: neither Transformers nor torch is imported.
What a family needs beside them is in `modeling/backbones/`, where one differs from `any.py`.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from foveate.modeling.core.declarations import Backbone, ClassReference


#: Since when the doors are there that `modeling/backbones/any.py` goes through.
OLDEST_TRANSFORMERS = (5, 19)

#: Where a class of a `model_type` is looked up: the tables, and the files that fill them.
_TABLES = {
    "config": (("CONFIG_MAPPING_NAMES",), ("auto_mappings", "configuration_auto")),
    "model": (("MODEL_MAPPING_NAMES",), ("modeling_auto",)),
    "head": (("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",), ("modeling_auto",)),
    "processor": (
        ("PROCESSOR_MAPPING_NAMES", "MISSING_PROCESSOR_MAPPING_NAMES"),
        ("auto_mappings", "processing_auto"),
    ),
}


@cache
def stock_tables() -> dict[str, dict[str, str]]:
    """Names of classes by `model_type`: of configs, of models without and with a head, of processors. Empty where
    Transformers is too old for models that have no file of their own here."""
    from importlib.metadata import version  # not light

    if tuple(int(part) for part in version("transformers").split(".")[:2]) < OLDEST_TRANSFORMERS:
        return {kind: {} for kind in _TABLES}
    spec = importlib.util.find_spec("transformers")
    folder = Path(str(spec.origin)).parent / "models" / "auto"  # type: ignore[union-attr]
    names = {file for _, files in _TABLES.values() for file in files}
    trees = {file: ast.parse((folder / f"{file}.py").read_text(encoding="utf-8")) for file in sorted(names)}
    return {
        kind: {key: name for file in files for key, name in _entries(trees[file], tables)}
        for kind, (tables, files) in _TABLES.items()
    }


def _entries(tree: ast.Module, tables: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The pairs of names in what a module assigns to tables, or adds to them."""
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update":
            targets = [node.func.value]
        if not any(isinstance(target, ast.Name) and target.id in tables for target in targets):
            continue
        for pair in ast.walk(node):
            if isinstance(pair, ast.Tuple) and len(pair.elts) == 2:
                names = [element.value for element in pair.elts if isinstance(element, ast.Constant)]
                if len(names) == 2 and all(isinstance(name, str) for name in names):
                    yield str(names[0]), str(names[1])


@cache
def stock_families() -> dict[str, Backbone]:
    """Every `model_type` that has a model for images and text, as a backbone by the doors alone. Whether they are
    there is asked of its classes, when they are wanted ([`why_unfit`])."""
    tables, found = stock_tables(), {}
    for model_type in tables["head"]:
        if model_type not in tables["config"]:
            continue
        stem = tables["config"][model_type].removesuffix("Config")  # two types may have one model, not one config
        found[model_type] = Backbone(
            model_type=model_type,
            stem=stem,
            title=stem.rstrip("_"),
            mixin=ClassReference("foveate.modeling.backbones.any", "AnyBackboneMixin"),
            stock={
                "processor": "",  # where the table has none, there is none
                **{kind: table[model_type] for kind, table in tables.items() if model_type in table},
            },
        )
    return found


#: Why a family can't be compressed by the doors, where its tables and classes do not tell.
_UNFIT = {
    "blip": "its decoder looks at the image by cross-attention: there are no placeholders",
    "blip-2": "its forward does not read get_image_features",
    "diffusion_gemma": "it writes text in blocks, and reads images in an encoder of its own",
    "evolla": "it reads proteins, not images",
    "florence2": "it is an encoder-decoder: visual tokens enter its encoder alone, and the decoder keeps none of them",
    "fuyu": "its get_image_features gives no pooler_output",
    "git": "visual tokens stand before the text, without placeholders",
    "granite4_vision": "its get_image_features gives features of layers, and no pooler_output",
    "granite_docling": "its get_image_features gives the tiles of a row as one, and their lengths differ",
    "hunyuan_vl": "its positions begin anew in every image, and count the images",
    "idefics": "its decoder looks at the image by cross-attention: there are no placeholders",
    "inkling_mm_model": "each of its patches is an entry of one token, so where an image ends is not known",
    "instructblip": "the model without a head has no get_image_features",
    "instructblipvideo": "it reads videos alone",
    "kosmos-2": "a mask of places says where visual tokens go, not a placeholder",
    "kosmos-2.5": "a mask of places says where visual tokens go, not a placeholder",
    "llama4": "its get_image_features gives what has not been projected yet",
    "minicpmv4_7": "its positions follow from the marks around the slices of an image",
    "mistral4": "the class that the Auto table names is a language model",
    "mllama": "its decoder looks at the image by cross-attention: there are no placeholders",
    "nemotron_h_omni": "the model without a head has no get_image_features",
    "pi0": "it moves a robot, and writes no text",
    "pix2struct": "it is an encoder-decoder, whose encoder is the image",
    "pp_formulanet": "it is an encoder-decoder, whose encoder is the image",
    "t5gemma2": "it is an encoder-decoder: visual tokens enter its encoder alone",
    "udop": "it is an encoder-decoder that merges patches with words",
    "vision-encoder-decoder": "it is an encoder-decoder, whose encoder is the image",
}


def why_unfit(model_type: str) -> str | None:
    """Why a family of Transformers can't be compressed by the doors, as the end of a sentence; `None` if it can.

    Its classes are imported for that.
    """
    if model_type in _UNFIT:
        return _UNFIT[model_type]
    if (family := stock_families().get(model_type)) is None:
        known = model_type in stock_tables()["config"]
        return "it is no vision-language model" if known else "the installed Transformers has no such model"
    try:
        model_class = family.stock_class("model").load()
    except AttributeError:
        return "it has no model without a head"
    return None if hasattr(model_class, "get_image_features") else "its model has no get_image_features"


def writes_placeholders(model_type: str) -> bool:
    """Whether the processor of a family writes an image's placeholders by the door through which fewer are written."""
    from transformers import ProcessorMixin  # not light

    reference = stock_families()[model_type].stock_class("processor")
    return bool(reference.name) and reference.load().replace_image_token is not ProcessorMixin.replace_image_token  # type: ignore[attr-defined]
