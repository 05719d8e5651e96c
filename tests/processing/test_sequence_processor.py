"""Processors of methods that compress an image's sequence count what the model makes, whatever the image's size."""

import itertools
import math
import random

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from foveate import convert
from foveate.modeling.methods.metacompress import MetaCompressor

from ..helpers.tiny_checkpoints import IMAGE_TOKEN_ID, write_llava_next


WIDTHS, HEIGHTS = (20, 2000), (20, 300)
RAGGED = [(60, 42), (42, 60), (300, 40), (60, 42), (84, 84), (2000, 20), (31, 30)]  # width, height
BUDGETS = [{"keep_ratio": 0.1}, {"keep_ratio": 0.35}, {"num_visual_tokens": 7}]
BATCH_SIZE = 20


def random_sizes(number: int) -> list[tuple[int, int]]:
    """(width, height): the four extremes, and others with each side as often in one octave as in the next."""
    generator = random.Random(0)

    def draw(low: int, high: int) -> int:
        return round(math.exp(generator.uniform(math.log(low), math.log(high))))

    extremes = list(itertools.product(WIDTHS, HEIGHTS))
    return extremes + [(draw(*WIDTHS), draw(*HEIGHTS)) for _ in range(number - len(extremes))]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_llava_next(tmp_path_factory.mktemp("next") / "base", dtype=torch.float32)


@pytest.fixture(scope="module", params=["metacompress", "random", "sample", "spatial"])
def both(request, base, tmp_path_factory):
    """Model and processor; a test sets the budget that it needs."""
    out = convert(base, tmp_path_factory.mktemp("converted") / "out", request.param)
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(out)


@pytest.fixture(scope="module")
def pictures():
    return [Image.effect_noise(size, 80).convert("RGB") for size in RAGGED]


def inputs_of(processor, images):
    prompts = ["USER: <image> what is it ASSISTANT:"] * len(images)
    return processor(images=images, text=prompts, padding=True, return_tensors="pt")


@torch.no_grad()
def tokens_of(model, inputs) -> list[torch.Tensor]:
    """The visual tokens of each image, by the door of serving engines."""
    features = model.model.get_image_features(**{name: inputs[name] for name in ("pixel_values", "image_sizes")})
    return list(getattr(features, "pooler_output", features))


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("both", ["metacompress"], indirect=True)
def test_processor_and_model_agree_on_every_size(both, base, budget):
    model, processor = both
    model.set_compression(processor, **budget)
    stock = AutoProcessor.from_pretrained(base)
    sizes = random_sizes(200)
    for start in range(0, len(sizes), BATCH_SIZE):
        batch = sizes[start : start + BATCH_SIZE]
        inputs = inputs_of(processor, [Image.new("RGB", size, "red") for size in batch])
        written = (inputs["input_ids"] == IMAGE_TOKEN_ID).sum(1).tolist()
        assert written == [len(tokens) for tokens in tokens_of(model, inputs)]
        assert written == model.count_placeholders(inputs).tolist()
        in_rows = [(height, width) for width, height in batch]
        assert written == processor._get_num_multimodal_tokens(image_sizes=in_rows)["num_image_tokens"]
        lengths = stock._get_num_multimodal_tokens(image_sizes=in_rows)["num_image_tokens"]
        assert written == [model.config.compression.count_tokens(length) for length in lengths]


def test_a_batch_of_sizes_gives_each_image_what_it_gets_alone(both, pictures):
    model, processor = both
    model.set_compression(processor, keep_ratio=0.35)
    together = tokens_of(model, inputs_of(processor, pictures))
    assert len({len(tokens) for tokens in together}) > 3
    for picture, found in zip(pictures, together):
        (alone,) = tokens_of(model, inputs_of(processor, [picture]))
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("both", ["metacompress"], indirect=True)
def test_no_matrix_is_larger_than_its_image_needs(both, pictures, budget, monkeypatch):
    model, processor = both
    model.set_compression(processor, **budget)
    made, original = [], MetaCompressor.forward

    def watched(self, sequences, num_tokens):
        matrices = original(self, sequences, num_tokens)
        made.extend(tuple(matrix.shape) for matrix in matrices)
        return matrices

    monkeypatch.setattr(MetaCompressor, "forward", watched)
    inputs = inputs_of(processor, pictures)
    counts = [len(tokens) for tokens in tokens_of(model, inputs)]
    lengths = model.uncompressed_lengths(inputs)
    assert sorted(made) == sorted(zip(counts, lengths))
