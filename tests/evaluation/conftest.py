"""Tiny random checkpoints: a base, and what it becomes by conversion."""

from pathlib import Path

import pytest

from foveate.conversion.convert import convert

from ..conversion.tiny_checkpoints import write_clip, write_llava


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with `base`, `clip` and `compressed`; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_llava(folder / "base", seed=3)  # one whose answers have several lengths
    write_clip(folder / "clip")
    convert(folder / "base", folder / "compressed", text_encoder=folder / "clip")
    return folder
