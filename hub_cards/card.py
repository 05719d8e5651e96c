"""The model card of a converted or trained checkpoint: what it is, how to use it, and what is known of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..registry import METHODS, Method


TEMPLATE = Path(__file__).with_name("card_template.md")


def write_card(
    folder: Path,
    base_name: str,
    training: Mapping[int, Mapping[str, Any]] | None = None,
    adapter: str | None = None,
) -> None:
    """Writes `README.md` into a checkpoint, from its `config.json`.

    Args:
        folder: the checkpoint.
        base_name: what it was converted from: a hub id, or the name of a folder.
        training: the recipes of the stages that it was trained in, by number; `None` for one just converted.
        adapter: the folder in it that holds LoRA weights which are not merged.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    method = METHODS[config["compression"]["method"]]
    is_hub_id = base_name.count("/") == 1 and not base_name.startswith((".", "/", "~"))
    data = ModelCardData(
        base_model=base_name if is_hub_id else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["foveate", method.name, "visual-token-compression"],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=folder.name,
        base_name=base_name if is_hub_id else Path(base_name).name,
        method_title=method.title,
        method=_named(method),
        state=_state(method, training),
        stages=[_stage_line(number, stage) for number, stage in sorted((training or {}).items())],
        adapter=adapter,
        settings=json.dumps(config["compression"], indent=2, sort_keys=True),
    )
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def read_base_name(folder: Path) -> str:
    """What a checkpoint was converted from, as its card says; the name of its folder where it has none."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except OSError:
        return folder.name
    found = re.search(r"^base_model: (\S+)$", card, re.MULTILINE) or re.search(r"^# (.+) with ", card, re.MULTILINE)
    return found.group(1) if found else folder.name


def _named(method: Method) -> str:
    """The method with its paper's address, or title."""
    is_address = method.paper.startswith("https://")
    return f"[{method.title}]({method.paper})" if is_address else f"{method.title} (“{method.paper}”)"


def _state(method: Method, training: Mapping[int, Mapping[str, Any]] | None) -> str:
    if training:
        return f"trained (stage {' and '.join(map(str, sorted(training)))}, see below)"
    return "untrained: its new parameters are freshly initialised" if method.needs_training else "training-free"


def _stage_line(number: int, stage: Mapping[str, Any]) -> str:
    """One stage of a training, for readers."""
    rates = [f"{module} (learning rate {rate:g})" for module, rate in stage["learning_rate"].items()]
    if lora := stage.get("lora"):
        rates.append(f"LoRA on {lora['target']} (r {lora['r']}, α {lora['alpha']:g}, {lora['learning_rate']:g})")
    length = f"{stage['max_steps']} steps" if stage.get("max_steps") else f"{stage['epochs']:g} epoch(s)"
    return (
        f"Stage {number}, {stage['title']}: {', '.join(rates)}; {Path(stage['data']).name}, {length}, "
        f"{stage['batch_size']} examples a device and step."
    )
