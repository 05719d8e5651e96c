"""What models gain whose processor writes as many placeholders as there are tokens: they are encoded before `generate`
begins, once for all beams, and a prompt can be read in chunks."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from foveate import convert

from ..helpers.batches import ROWS
from ..helpers.tiny_checkpoints import IMAGE_TOKEN_ID, write_clip, write_llava, write_llava_next


LENGTH = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 9999, "suppress_tokens": [IMAGE_TOKEN_ID]}


@pytest.fixture(scope="module", params=[write_llava, write_llava_next], ids=["llava", "llava_next"])
def asked(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    base = request.param(folder / "base", dtype=torch.float32)
    settings = {"num_visual_tokens": 4, "layers": [0, 1]}
    out = convert(base, folder / "out", "qg-vtc", write_clip(folder / "clip"), settings)
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(out)
    inputs = processor(
        images=[list(row.images) for row in ROWS], text=[row.prompt for row in ROWS], padding=True, return_tensors="pt"
    )
    return model, inputs


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_every_image_is_encoded_once(asked, kwargs):
    model, inputs = asked
    encoded = []
    hook = model.model.question_projector.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    model.generate(**inputs, **{**LENGTH, **kwargs}, pad_token_id=0)
    hook.remove()
    assert encoded == [sum(len(row.images) for row in ROWS)]


def test_a_prompt_read_in_chunks_gives_the_same(asked):
    model, inputs = asked
    whole = model.generate(**inputs, **LENGTH, pad_token_id=0)
    assert torch.equal(model.generate(**inputs, **LENGTH, pad_token_id=0, prefill_chunk_size=5), whole)


def test_whoever_asks_for_image_features_gets_compressed_ones(asked):
    """The door of serving engines: one (tokens, width) tensor an image, as many as the processor counts."""
    model, inputs = asked
    images = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    features = model.get_image_features(**images).pooler_output
    assert sum(map(len, features)) == int((inputs["input_ids"] == IMAGE_TOKEN_ID).sum())
    with torch.no_grad():
        given = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            mm_encoder_outputs={"image": model.get_image_features(**images)},
        )
        torch.testing.assert_close(given.logits, model(**inputs).logits)


def test_placeholders_of_another_budget_are_refused_with_the_way_out(asked):
    model, inputs = asked
    settings = model.config.compression
    model.set_compression(num_visual_tokens=3)
    with pytest.raises(ValueError, match="set_compression changes both"):
        model(**inputs)
    model.config.compression = settings
