"""What other packages add to foveate by name: tasks, training data and drawn pictures, through Python entry points.

An entry point names a table, a dictionary of what a package adds. Its keys are the entry point's name, or begin with it
and a hyphen: that tells which package a name is in, and no other one is imported. The lab is plugged in so, and so may
anybody's package be:

    [options.entry_points]
    foveate.tasks =
        charts = my_package.tasks:TASKS

where `TASKS` is `{"charts-vqa": Task(…)}`, makes `foveate evaluate CKPT --task charts-vqa` work. The groups are
`TASKS_GROUP`, `DATA_GROUP` and `PICTURES_GROUP`.

Entry points are read from the metadata of what is installed. Those of foveate itself are also read from the `setup.cfg`
of a source tree, which needs no metadata then, and may be newer than its last install.
"""

from __future__ import annotations

import configparser
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any


TASKS_GROUP = "foveate.tasks"  # of `evaluation.tasks.Task`
DATA_GROUP = "foveate.data"  # of `training.data.DataSource`
PICTURES_GROUP = "foveate.pictures"  # of `evaluation.examples.PictureSource`

_SOURCE_TREE = Path(__file__).resolve().parents[1]


def find_plugin(group: str, name: str) -> Any | None:
    """What a package adds to a group under a name; `None` where no package does.

    Raises:
        ImportError: the package that has the name can't be imported.
    """
    for entry in _entries(group):
        if name == entry.name or name.startswith(f"{entry.name}-"):
            found = entry.load().get(name)
            if found is not None:
                return found
    return None


def all_plugins(group: str) -> dict[str, Any]:
    """All that packages add to a group, by name; imports every one of them."""
    return {name: found for entry in _entries(group) for name, found in entry.load().items()}


def _entries(group: str) -> Iterator[EntryPoint]:
    declared = _of_source_tree(group)
    yield from declared
    names = {entry.name for entry in declared}
    yield from (entry for entry in entry_points(group=group) if entry.name not in names)


def _of_source_tree(group: str) -> list[EntryPoint]:
    """What foveate's own `setup.cfg` declares; nothing where foveate was installed as a wheel."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(_SOURCE_TREE / "setup.cfg", encoding="utf-8")
    if config.get("metadata", "name", fallback=None) != "foveate":  # somebody else's, or none
        return []
    lines = filter(None, config.get("options.entry_points", group, fallback="").split("\n"))
    pairs = (line.partition("=") for line in lines)
    return [EntryPoint(name.strip(), value.strip(), group) for name, _, value in pairs]
