"""The checkpoints of trained methods that the measurements need: converted from the lab's base, then trained by
`foveate train` with the lab's recipe of the method (`lab/recipes/`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from foveate.conversion.convert import convert
from foveate.conversion.shards import compose
from foveate.lab.shards import write_shard
from foveate.training.train import train


RECIPES = Path(__file__).resolve().with_name("recipes")


@dataclass(frozen=True)
class Training:
    """A checkpoint to be trained.

    Args:
        name: of its folder.
        method: of compression.
        settings: of the compression.
        seed: of the order of the data, the questions, and the adapters' initial values.
        changes: to the last stage of the recipe, as `foveate train --set` takes them.
    """

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    changes: dict[str, Any] = field(default_factory=dict)


def trained_shard(training: Training, base: str, work: Path) -> Path:
    """What training changed, as a shard of the base; what isn't there yet is converted and trained, and a training that
    was broken off goes on.

    Args:
        base: checkpoint of the base model, "lab:NAME".
        work: folder of all that is trained.
    """
    shard = work / f"{training.name}-shard"
    if shard.exists():
        return shard
    of_base = RECIPES / f"{training.method}-{base.removeprefix('lab:')}.yaml"
    recipe = of_base if of_base.is_file() else RECIPES / f"{training.method}.yaml"
    stages = sorted(yaml.safe_load(recipe.read_text(encoding="utf-8"))["stages"])
    before = work / f"{training.name}-stage0"
    if not before.exists():
        convert(base, before, training.method, settings=training.settings)
    for stage in stages:
        out = work / f"{training.name}-stage{stage}"
        if not out.exists():
            broken_off = out.with_name(f"{out.name}.training").exists()
            is_last = stage == stages[-1]
            changes = {"seed": training.seed, **(training.changes if is_last else {})}
            train(training.method, before, out, stage, recipe, changes, resume=broken_off, merge=not is_last)
        before = out
    return write_shard(before, shard, base)


def trained_checkpoint(training: Training, base: str, work: Path) -> Path:
    """The folder of the trained checkpoint, put together from its shard as one that ships is."""
    out = work / training.name
    return out if out.exists() else compose(trained_shard(training, base, work), out)
