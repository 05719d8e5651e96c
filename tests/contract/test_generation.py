"""Contract 2–4: `generate()` unchanged, batches give what single rows give, caches go on."""

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForImageTextToText, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from foveate.modeling.compatibility import CACHE, cache_argument, cache_of

from ..helpers.batches import ROWS, Row, images_in, picture, prompt_for
from ..helpers.tiny_checkpoints import IMAGE_TOKEN_ID


pytestmark = pytest.mark.contract_core
# Random weights may say anything at any time, the end and image placeholders too.
LENGTH = {"max_new_tokens": 6, "eos_token_id": 9999, "pad_token_id": 0, "suppress_tokens": [IMAGE_TOKEN_ID]}


def new_tokens(model, inputs, **kwargs):
    output = model.generate(**inputs, **{**LENGTH, "do_sample": False, **kwargs})
    assert torch.equal(
        output[:, : inputs["input_ids"].shape[1]],
        inputs["input_ids"].repeat_interleave(len(output) // len(inputs["input_ids"]), 0),
    ), "what generate returns begins with input_ids"
    return output[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no-cache"])
def test_a_batch_gives_each_row_what_it_gets_alone(model, inputs_of, kwargs):
    together = new_tokens(model, inputs_of(*ROWS), **kwargs)
    for row, expected in zip(ROWS, together):
        assert torch.equal(new_tokens(model, inputs_of(row), **kwargs)[0], expected)


def test_without_a_cache_the_same_tokens_come_out(model, inputs_of):
    inputs = inputs_of(*ROWS)
    assert torch.equal(new_tokens(model, inputs), new_tokens(model, inputs, use_cache=False))


def test_a_static_cache_gives_what_a_dynamic_one_gives(model, inputs_of):
    inputs = inputs_of(*ROWS)
    assert torch.equal(new_tokens(model, inputs), new_tokens(model, inputs, cache_implementation="static"))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
    ],
)
def test_several_sequences_a_row_keep_each_rows_own_images(model, inputs_of, kwargs):
    torch.manual_seed(0)
    several = new_tokens(model, inputs_of(*ROWS), **kwargs)
    assert len(several) == len(ROWS) * kwargs.get("num_return_sequences", 1)
    # With one certain token a sampled sequence is the greedy one, whichever copy of the row it came from.
    if kwargs.get("do_sample") and "num_beams" not in kwargs:
        greedy = new_tokens(model, inputs_of(*ROWS))
        certain = new_tokens(model, inputs_of(*ROWS), **kwargs, top_k=1)
        assert torch.equal(certain, greedy.repeat_interleave(3, 0))


def test_streamers_scores_and_stopping_criteria_work(model, inputs_of):
    class Collect(BaseStreamer):
        def __init__(self):
            self.pieces = []

        def put(self, value):
            self.pieces.append(value.flatten())

        def end(self):
            self.pieces.append(torch.tensor([-1]))

    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= start + 3)

    inputs = inputs_of(ROWS[0])
    start, streamer = inputs["input_ids"].shape[1], Collect()
    output = model.generate(
        **inputs,
        **LENGTH,
        do_sample=False,
        streamer=streamer,
        return_dict_in_generate=True,
        output_scores=True,
        stopping_criteria=StoppingCriteriaList([AfterThree()]),
    )
    assert output.sequences.shape[1] == start + 3
    assert len(output.scores) == 3
    assert torch.equal(torch.cat(streamer.pieces)[:-1], output.sequences[0])


@pytest.mark.parametrize(
    "second", [Row(" is it red ASSISTANT:"), Row(" <image> what colour ASSISTANT:", (picture(9),))]
)
@pytest.mark.parametrize("all_images", [True, False], ids=["all-images", "new-images"])
def test_a_later_turn_on_the_same_cache_gives_what_a_fresh_run_gives(model, processor, inputs_of, second, all_images):
    """Two rows of different lengths; the second turn may bring an image, passed alone or after the first ones."""
    rows = [ROWS[0], ROWS[2]]
    inputs = inputs_of(*rows)
    first = model.generate(**inputs, **LENGTH, do_sample=False, return_dict_in_generate=True)
    assert cache_of(first).get_seq_length() == first.sequences.shape[1] - 1

    prompt = prompt_for(processor, " USER:" + second.prompt)
    turn = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    image_token = model.config.image_token_id
    turn = [t for i in turn for t in [i] * (_placeholders(processor, inputs, image_token) if i == image_token else 1)]
    ids = torch.cat([first.sequences, torch.tensor([turn, turn])], dim=1)
    new_columns = torch.ones(2, ids.shape[1] - inputs["attention_mask"].shape[1], dtype=torch.long)
    mask = torch.cat([inputs["attention_mask"], new_columns], dim=1)

    # Images of both turns, row after row, each with the question of its own turn.
    per_row = [[*row.images, *second.images] for row in rows]
    questions = [["what is it"], ["what colour is it is it"] * 2]
    questions = [asked + ["what colour"] * len(second.images) for asked in questions]
    text = [prompt_for(processor, "<image> " * len(images) + "what") for images in per_row]
    asked = {"question": questions} if hasattr(processor, "question_tokenizer") else {}
    full = processor(images=per_row, text=text, **asked, padding=True, return_tensors="pt")
    visual = images_in(model, full)
    fresh = model.generate(input_ids=ids, attention_mask=mask, **visual, **LENGTH, do_sample=False)

    if not all_images:
        rank = torch.tensor([0] * 1 + [1] * len(second.images) + [0] * 2 + [1] * len(second.images))
        chosen = (rank == 1).nonzero()[:, 0]
        visual = model.take_images(dict.fromkeys(model.image_inputs) | visual, chosen) if second.images else {}
    again = model.generate(
        input_ids=ids,
        attention_mask=mask,
        **visual,
        **cache_argument(cache_of(first)),
        **LENGTH,
        do_sample=False,
    )
    assert torch.equal(again, fresh)


def test_a_later_turn_may_leave_out_what_an_earlier_one_said(model, processor, inputs_of):
    """Its mask has zeros at columns that are cached: an end of sequence that the chat template doesn't write."""
    inputs = inputs_of(ROWS[0], ROWS[2])
    first = model.generate(**inputs, **LENGTH, do_sample=False, return_dict_in_generate=True)
    turn = processor.tokenizer(" USER: is it red ASSISTANT:", add_special_tokens=False)["input_ids"]
    ids = torch.cat([first.sequences, torch.tensor([turn, turn])], dim=1)
    new_columns = torch.ones(2, ids.shape[1] - inputs["attention_mask"].shape[1], dtype=torch.long)
    mask = torch.cat([inputs["attention_mask"], new_columns], dim=1)
    mask[0, first.sequences.shape[1] - 4 : first.sequences.shape[1]] = 0
    mask[1, first.sequences.shape[1] - 1] = 0
    visual = images_in(model, inputs)
    fresh = model.generate(input_ids=ids, attention_mask=mask, **visual, **LENGTH, do_sample=False)
    kept = model.generate(
        input_ids=ids, attention_mask=mask, **cache_argument(cache_of(first)), **LENGTH, do_sample=False
    )
    assert torch.equal(kept, fresh)


def _placeholders(processor, inputs, image_token: int) -> int:
    return int((inputs["input_ids"][0] == image_token).sum())


def test_the_cache_goes_by_its_older_name_too(model, inputs_of):
    """As in Transformers' own models: from 5.24 on with a warning."""
    inputs = inputs_of(ROWS[0])
    mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.int64)], dim=1)
    later = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": mask}
    with torch.no_grad():
        expected = model(**later, **cache_argument(cache_of(model(**inputs)))).logits
        warns = pytest.warns(FutureWarning, match="past_key_values") if CACHE == "cache" else nullcontext()
        with warns:
            found = model(**later, past_key_values=cache_of(model(**inputs))).logits
    assert torch.equal(found, expected)


def test_assisted_decoding_gives_what_greedy_gives(checkpoint, model, inputs_of):
    """A wrong guess of the assistant's crops the cache to logical lengths."""
    assistant = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        assistant.lm_head.weight[::2] *= -1  # so that it guesses wrong now and then
    inputs = inputs_of(ROWS[0])
    assert torch.equal(new_tokens(model, inputs, assistant_model=assistant), new_tokens(model, inputs))
