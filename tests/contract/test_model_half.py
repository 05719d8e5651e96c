"""The model half of every other vision-language type of Transformers, whose placeholders the test cuts itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING

import foveate
from foveate.families import stock_families, why_unfit
from foveate.modeling.compatibility import image_sequences

from ..helpers.language_models import seen_by_language_model
from ..helpers.tiny_families import FAMILIES
from ..helpers.tiny_models import IMAGE_TOKEN_ID, MODELS, UNFIT, TinyModel, make_stock_model


pytestmark = [
    pytest.mark.contract_core,
    pytest.mark.one_process,
    pytest.mark.skipif(not stock_families(), reason="Transformers 4.57 has not the doors"),
]

IS_NEWEST = Version(transformers.__version__) >= Version("5.23")

TYPES = [model_type for model_type in MODELS if why_unfit(model_type) is None and model_type in CONFIG_MAPPING]

#: Whose processor writes an image in rows, which the placeholders here are not in: `test_families.py` has Mistral 3.
ROWS = ("mistral_large4",)

#: Can't be built here: its vision encoder is timm's.
NOT_BUILT = ("gemma3n",)


@dataclass
class Made:
    """A stock model, a compressed one that shares its weights, and images as both take them."""

    entry: TinyModel
    stock: Any
    model: Any
    images: dict[str, Any]

    def inputs(self, lengths: list[int]) -> dict[str, Any]:
        """A row of text with as many placeholders for every image, and the images."""
        start = [] if self.entry.start_token_id is None else [self.entry.start_token_id]
        ids = [10, 11]
        for length in lengths:
            ids += [*start, *[IMAGE_TOKEN_ID] * length, 12, 13]
        return self.of_ids(torch.tensor([[*ids, 14]]))

    def of_ids(self, ids: torch.Tensor) -> dict[str, Any]:
        more = self.entry.extra_inputs(self.stock.config, ids)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.images, **more}

    def lengths(self, model: Any) -> list[int]:
        """Visual tokens of every stretch of placeholders: what the stock model has as one."""
        with torch.no_grad():
            stretches = len(image_sequences(self.stock.model.get_image_features(**self.images)))
            found = [len(tokens) for tokens in image_sequences(model.get_image_features(**self.images))]
        several = len(found) // stretches
        return [sum(found[index : index + several]) for index in range(0, len(found), several)]


def tiny_or_skip(model_type: str) -> Any:
    try:
        return make_stock_model(MODELS[model_type])
    except TypeError as error:  # before 5.23 some configs are no dataclasses, which is how they are made tiny
        if IS_NEWEST:
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=TYPES)
def whole(request) -> Made:
    entry, stock = MODELS[request.param], tiny_or_skip(request.param)
    model, _ = foveate.compress(stock, method="sample", keep_ratio=0.5)
    images = entry.make_images(stock.config, torch.Generator().manual_seed(1))
    return Made(entry, stock, model.eval(), images)


@pytest.fixture
def made(whole) -> Made:
    """With half of the tokens, whatever a test before has set."""
    whole.model.set_compression(keep_ratio=0.5, positions=None)
    return whole


def test_with_all_tokens_it_is_the_stock_model(made):
    made.model.set_compression(keep_ratio=1.0)
    inputs = made.inputs(made.lengths(made.stock.model))
    with torch.no_grad():
        assert torch.equal(made.model(**inputs).logits, made.stock(**inputs).logits)


def test_half_of_the_tokens_are_the_stock_models_in_their_places(made):
    if made.entry.model_type not in ROWS:
        made.model.set_compression(positions="original")
    whole = made.inputs(made.lengths(made.stock.model))
    half = made.inputs(made.lengths(made.model))
    with torch.no_grad():
        expected, found = seen_by_language_model(made.stock, whole), seen_by_language_model(made.model, half)
        patches = [image.weights for image in made.model(**half, output_compression=True).compression]
    starts = torch.tensor([0, *(weights.shape[1] for weights in patches)]).cumsum(0)
    chosen = torch.cat([weights.argmax(1) + start for weights, start in zip(patches, starts)])
    is_image = whole["input_ids"] == IMAGE_TOKEN_ID
    kept = ~is_image
    kept[0, is_image[0].nonzero()[chosen, 0]] = True
    assert torch.equal(expected.embeddings[kept], found.embeddings[0])
    if made.entry.model_type not in ROWS:
        assert torch.equal(expected.distances(kept), found.distances(torch.ones_like(half["input_ids"]).bool()))


def test_generate_goes_on_as_runs_without_a_cache(made):
    inputs = made.inputs(made.lengths(made.model))
    words = [index for index in range(made.stock.config.get_text_config().vocab_size) if not 10 <= index < 100]
    limits = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "suppress_tokens": words}
    found = made.model.generate(**inputs, **limits)
    ids = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(3):
            logits = made.model(**made.of_ids(ids), use_cache=False).logits[:, -1, :]
            ids = torch.cat([ids, 10 + logits[:, 10:100].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, ids)


def test_what_needs_lengths_beforehand_is_refused_in_a_sentence(made):
    with pytest.raises(ValueError, match="not known from its inputs"):
        made.model.uncompressed_lengths(made.images)


@pytest.mark.skipif(not IS_NEWEST, reason="older tables have fewer types")
def test_every_type_of_the_table_works_or_says_why():
    reasons = {model_type: why_unfit(model_type) for model_type in stock_families()}
    tested = {*FAMILIES, *TYPES, *NOT_BUILT}
    assert not {model_type for model_type, reason in reasons.items() if reason is None} - tested
    assert set(reasons) <= {*FAMILIES, *MODELS, *UNFIT}, "a type that is in no table"
    assert len(TYPES) >= 35 and len(FAMILIES) >= 35


@pytest.mark.parametrize("model_type", [m for m in MODELS if m in CONFIG_MAPPING and m not in TYPES])
def test_a_type_that_is_not_fit_is_refused_with_the_reason(model_type):
    stock = tiny_or_skip(model_type)
    with pytest.raises(foveate.FoveateError, match="which the method 'sample' can't compress"):
        foveate.compress(stock, method="sample")
