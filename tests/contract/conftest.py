"""What the contract tests share: a loaded model and processor, and batches of every shape."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..helpers.batches import Row, prompt_for


@pytest.fixture(scope="session")
def loaded(checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture
def model(loaded):
    """The model with the settings that it was converted with, whatever a test does to them; its processor likewise."""
    model, processor = loaded
    settings = model.config.compression
    yield model
    model.config.compression = settings
    processor.set_compression(settings)


@pytest.fixture
def processor(loaded, model):
    return loaded[1]


@pytest.fixture
def inputs_of(processor):
    """Rows → model inputs, left-padded."""

    def make(*rows: Row):
        images = [list(row.images) for row in rows]
        return processor(
            images=images if any(images) else None,
            text=[prompt_for(processor, row.prompt) for row in rows],
            padding=True,
            return_tensors="pt",
        )

    return make
