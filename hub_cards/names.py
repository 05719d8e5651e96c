"""How a checkpoint is named, and its card."""

from __future__ import annotations


CARD_FILE = "README.md"


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the hub ("user/name"), not a folder's."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))
