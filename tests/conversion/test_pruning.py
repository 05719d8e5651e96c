"""What a bundle takes of the modules that its entries import: what is reached, as it is written."""

import ast

from foveate.conversion.pruning import prune


LIBRARY = b'''"""A library."""

from __future__ import annotations

import math
from typing import (
    Any,
    TypeVar,
)

from house.modeling.deep import low, unread


warn()

#: Half of it.
HALF = 0.5
OTHER = 1

try:
    from fast import scan
except ImportError:
    scan = None


def used(x: Any) -> float:
    """Uses a constant, a function and a late import."""
    from house.modeling.late import later

    return HALF * low(x) + later(x)


# Why this is here.
@decorated
def unused(x):
    return math.sqrt(OTHER) * unread(x)


class Base:
    attribute = HALF


class Derived(Base):
    pass
'''

DEEP = b"def low(x):\n    return x\n\n\ndef unread(x):\n    return low(x)\n"
LATE = b"x = 1\n\n\ndef later(x):\n    return x\n"
ALONE = b"def nothing(): ...\n"


def pruned(entry: bytes) -> dict[str, str]:
    sources = {
        "house.modeling.entry": entry,
        "house.modeling.library": LIBRARY,
        "house.modeling.deep": DEEP,
        "house.modeling.late": LATE,
        "house.modeling.alone": ALONE,
    }
    return {name: code.decode() for name, code in prune(sources, ["house.modeling.entry"]).items()}


def test_only_what_is_reached_is_taken_and_as_it_is_written():
    found = pruned(b"from house.modeling.library import used\n\nanything = used\n")
    assert found["house.modeling.library"] == (
        '"""A library."""\n\nfrom __future__ import annotations\nfrom typing import Any\n\n'
        "from house.modeling.deep import low\n\n\nwarn()\n\n#: Half of it.\nHALF = 0.5\n\n\n"
        "def used(x: Any) -> float:\n"
        '    """Uses a constant, a function and a late import."""\n'
        "    from house.modeling.late import later\n\n    return HALF * low(x) + later(x)\n"
    )
    assert found["house.modeling.deep"] == "def low(x):\n    return x\n"
    assert "def later" in found["house.modeling.late"]
    assert "house.modeling.alone" not in found


def test_a_class_brings_its_bases_and_what_they_use():
    library = pruned(b"from house.modeling.library import Derived\n")["house.modeling.library"]
    assert [node.name for node in ast.parse(library).body if isinstance(node, ast.ClassDef)] == ["Base", "Derived"]
    assert "HALF = 0.5" in library and "def used" not in library


def test_names_that_are_defined_within_a_block_bring_the_block():
    library = pruned(b"from house.modeling.library import scan\n")["house.modeling.library"]
    assert "except ImportError:\n    scan = None\n" in library


def test_an_entry_is_taken_whole_with_all_that_it_imports():
    entry = b"from house.modeling.deep import low, unread\n\n\ndef uncalled(): ...\n"
    found = pruned(entry)
    assert found["house.modeling.entry"] == entry.decode()
    assert found["house.modeling.deep"] == DEEP.decode()
