"""Tiny random checkpoints: a base, and what it becomes by conversion."""

from pathlib import Path

import pytest
import torch

from foveate.conversion.convert import convert
from foveate.evaluation import demo, harness

from ..helpers.tiny_checkpoints import write_clip, write_llava


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with `base`, `clip` and `compressed`; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_llava(folder / "base", seed=3)  # one whose answers have several lengths
    write_clip(folder / "clip")
    convert(folder / "base", folder / "compressed", text_encoder=folder / "clip")
    return folder


class Devices:
    """What every device computes fast in, from the next call of `compute_fast_in` on."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.asked: list = []

    def compute_fast_in(self, name: str) -> None:
        def fast_dtype(device, stored=None):
            self.asked.append((torch.device(device), stored))
            return getattr(torch, name)

        for module in (harness, demo):
            self.monkeypatch.setattr(module, "fast_dtype", fast_dtype)


@pytest.fixture
def devices(monkeypatch) -> Devices:
    return Devices(monkeypatch)
