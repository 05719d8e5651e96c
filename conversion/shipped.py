"""Checkpoints that ship with foveate, by what comes after `lab:` in their names: where their folders are.

The lab trains them, and its package is not imported to find them.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from foveate.errors import FoveateError


LAB_PREFIX = "lab:"

#: The shipped LLaVA models, each with the CLIP checkpoint whose text tower is aligned with its vision tower. A further
#: base, "tiny-qwen3vl", has none.
TEXT_ENCODERS_THAT_SHIP = {"tiny-llava": "tiny-clip", "tiny-llava-next": "tiny-clip"}

#: Is in a folder that holds a shard: what training changed of a base (see `shards.py`).
SHARD_FILE = "shard.json"


def lab_directory() -> Path:
    """The lab's own folder, in which weights, recipes and results lie."""
    spec = find_spec("foveate.lab")
    if spec is None or spec.origin is None:
        raise FoveateError("This installation of foveate has no lab: install foveate again.")
    return Path(spec.origin).resolve().parent  # a development install is a folder of links


def shipped_folder(name: str) -> Path:
    """The folder of what ships under a name ("tiny-llava", "tiny-clip"), as it lies: a checkpoint, or a shard of one.

    Raises:
        FoveateError: nothing ships under this name.
    """
    weights = lab_directory() / "weights"
    folder = weights / name
    if not any((folder / file).exists() for file in (SHARD_FILE, "config.json")):
        known = sorted(path.name for path in weights.glob("*") if path.is_dir())
        has = ", ".join(known) or "none (run `make lab`)"
        raise FoveateError(f"The lab has no checkpoint '{name}'; it has: {has}.")
    return folder
