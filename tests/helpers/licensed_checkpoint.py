"""A tiny checkpoint that says under which license it is, converted once; tests that change it take a copy."""

import shutil
from pathlib import Path

import pytest
import torch

from foveate import convert

from .tiny_checkpoints import write_llava


CARD = """---
license: other
license_name: tiny
license_link: LICENSE.md
---

# A tiny base
"""


@pytest.fixture(scope="session")
def licensed_base(tmp_path_factory) -> Path:
    folder = write_llava(tmp_path_factory.mktemp("licensed") / "base", dtype=torch.float32)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="session")
def written(licensed_base, tmp_path_factory) -> Path:
    """The base with every second token, as conversion wrote it."""
    return convert(licensed_base, tmp_path_factory.mktemp("written") / "tiny", "sample", settings={"keep_ratio": 0.5})


@pytest.fixture
def copy(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "copy")
