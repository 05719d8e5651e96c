"""ETC: the passes are the masked pass, text never sees an image's visual tokens, and the cache holds none of them."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from foveate import convert
from foveate.modeling.compatibility import (
    CACHE,
    cache_argument,
    cache_of,
    iterate_cache_tensors,
)
from foveate.modeling.core.positions import lay_out_columns
from foveate.modeling.methods import etc as modeling_etc
from foveate.modeling.methods.etc_algorithm import bottleneck_mask, locate_columns, plan_passes, positions_by_places

from ..helpers.batches import ROWS, Row, picture, prompt_for
from ..helpers.checkpointing import checkpoint_activations
from ..helpers.tiny_checkpoints import write_llava, write_qwen3_vl


M = 3
pytestmark = pytest.mark.contract_core


@pytest.fixture(scope="module", params=[write_llava, write_qwen3_vl], ids=["llava", "qwen3_vl"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("etc")
    base = request.param(folder / "base", dtype=torch.float32)
    out = convert(base, folder / "out", "etc", settings={"num_visual_tokens": M})
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    return SimpleNamespace(folder=out, base=base, model=model, processor=AutoProcessor.from_pretrained(out))


def inputs_of(made, *rows: Row, **kwargs):
    images = [list(row.images) for row in rows]
    texts = [prompt_for(made.processor, row.prompt) for row in rows]
    return made.processor(
        images=images if any(images) else None, text=texts, padding=True, return_tensors="pt", **kwargs
    )


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_passes_are_the_masked_pass(made, padding_side):
    """Several images in a row, rows without, text before, between and after."""
    inputs = inputs_of(made, *ROWS, padding_side=padding_side)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        passes = made.model(**inputs, output_hidden_states=True)
        masked = made.model(**inputs, use_cache=False, output_hidden_states=True)
        trained = copy.deepcopy(made.model).train()(**inputs)
    assert cache_of(passes) is not None
    assert cache_of(masked) is None
    assert cache_of(trained) is None, "training takes the masked pass"
    torch.testing.assert_close(passes.logits[real], masked.logits[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(trained.logits[real], masked.logits[real], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(passes.hidden_states, masked.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)


def test_a_kernel_without_masks_trains_in_passes(made, monkeypatch):
    """As FlashAttention has to: with the same gradients."""
    inputs = inputs_of(made, *ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == made.model.config.image_token_id, -100)
    found = []
    for kernels in (modeling_etc.MASK_KERNELS, ()):
        monkeypatch.setattr(modeling_etc, "MASK_KERNELS", kernels)
        model = copy.deepcopy(made.model).train()
        output = model(**inputs, labels=labels, use_cache=False)
        assert cache_of(output) is None
        output.loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-3, msg=name)
    checkpoint_activations(model)
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        model(**inputs)


def test_text_does_not_see_what_an_image_was_read_from(made):
    """The image changes, Z's cache is held: not a bit of what follows changes."""
    first = inputs_of(made, Row("USER: <image>", (picture(0),)))
    other = inputs_of(made, Row("USER: <image>", (picture(1),)))
    text = made.processor.tokenizer(" what colour is it ASSISTANT:", add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        caches = [cache_of(made.model(**inputs)) for inputs in (first, other)]
        mine, theirs = caches[0].inner, caches[1].inner
        assert any(not torch.equal(a, b) for a, b in zip(iterate_cache_tensors(mine), iterate_cache_tensors(theirs)))
        for a, b in zip(iterate_cache_tensors(mine), iterate_cache_tensors(theirs)):
            b.copy_(a)
        logits = [made.model(input_ids=text["input_ids"], **cache_argument(cache)).logits for cache in caches]
    assert torch.equal(*logits)


def test_no_visual_token_stays_in_the_cache(made):
    """Its bytes are those of text and compressed tokens, exactly."""
    inputs = inputs_of(made, ROWS[3])
    with torch.no_grad():
        cache = cache_of(made.model(**inputs))
    num_text = int((inputs["input_ids"] != made.model.config.image_token_id).sum())
    text = made.model.config.text_config
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_width * 4
    assert sum(tensor.nbytes for tensor in iterate_cache_tensors(cache)) == (num_text + 2 * M) * per_token
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_at_no_time_there_are_visual_keys_of_two_layers(made):
    """When the second layer stores its keys, the first has let go of its visual ones."""
    inputs, seen = inputs_of(made, ROWS[0]), []
    layers = made.model.model.language_model.layers

    def before(_, args, kwargs):
        cache = kwargs[CACHE]
        seen.append([layer.keys.shape[2] for layer in cache.layers if getattr(layer, "keys", None) is not None])

    hook = layers[1].self_attn.register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad():
        made.model(**inputs)
    hook.remove()
    places = (inputs["input_ids"][0] == made.model.config.image_token_id).nonzero()[:, 0]
    assert seen[0][0] == int(places[0]) + M


def test_a_later_call_in_columns_goes_on_where_the_first_ended(made):
    """Text after text and an image after an image on one cache, against one call."""
    row = Row("USER: <image> what is it ASSISTANT: red USER: <image> is it red ASSISTANT:", (picture(0), picture(1)))
    whole = inputs_of(made, row)
    ids, image_token = whole["input_ids"], made.model.config.image_token_id
    is_image = (ids[0] == image_token).long()
    second = int((is_image.diff() == 1).nonzero()[1]) + 1
    images = {name: whole[name] for name in made.model.image_inputs if name in whole}
    pick = [made.model.take_images(dict.fromkeys(made.model.image_inputs) | images, torch.tensor([i])) for i in (0, 1)]
    with torch.no_grad():
        expected = made.model(**whole).logits
        first = made.model(input_ids=ids[:, : second - 2], **pick[0])
        later = made.model(input_ids=ids[:, second - 2 :], **pick[1], **cache_argument(cache_of(first)))
    torch.testing.assert_close(later.logits, expected[:, second - 2 :], atol=1e-5, rtol=1e-5)


def test_provenance_is_the_attention_to_the_image(made):
    eager = AutoModelForImageTextToText.from_pretrained(
        made.folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    inputs = inputs_of(made, *ROWS)
    with torch.no_grad():
        found = made.model(**inputs, output_compression=True).compression
        masked = eager(**inputs, use_cache=False, output_attentions=True, output_compression=True)
    for ours, theirs in zip(found, masked.compression, strict=True):
        torch.testing.assert_close(ours.weights, theirs.weights, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.weights.sum(1), torch.ones(M))
    # The first image, from the matrices themselves.
    columns = (inputs["input_ids"][0] == eager.config.image_token_id).nonzero()[:, 0]
    visual, compressed = columns[:-M], columns[-M:]
    attended = torch.stack([layer[0][:, compressed][:, :, visual] for layer in masked.attentions])
    expected = (attended / attended.sum(-1, keepdim=True)).mean((0, 1))
    torch.testing.assert_close(found[0].weights, expected, atol=1e-5, rtol=1e-5)


def test_attention_kernels_agree_in_passes(made):
    eager = AutoModelForImageTextToText.from_pretrained(
        made.folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    inputs = inputs_of(made, *ROWS)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = made.model(**inputs).logits, eager(**inputs).logits
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)


def test_positions_on_a_grid():
    """Two images of 2 × 3 and 3 × 1 tokens with M = 2 in one row after padding, by hand."""
    # pad, text, [6 + 2], text, text, [3 + 2], text
    is_image = torch.tensor([[0, 0] + [1] * 8 + [0, 0] + [1] * 5 + [0]]).bool()
    present = torch.ones_like(is_image)
    present[0, 0] = False
    columns = locate_columns(is_image, present, [6, 3], 2)
    grids = ((2, 3), (3, 1))
    places = torch.tensor([[0, row, column] for rows, width in grids for row in range(rows) for column in range(width)])
    extents = torch.tensor([max(grid) for grid in grids])
    time, height, width = positions_by_places(columns, places, extents)[:, 0]
    # The first image begins at 1 and ends before 4; Z at 4 and 5; text 6 and 7; the second from 8 to 10, Z at 11, 12.
    assert time.tolist()[1:] == [0] + [1] * 6 + [4, 4] + [6, 7] + [8] * 3 + [11, 11] + [13]
    assert height.tolist()[1:] == [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert width.tolist()[1:] == [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 11, 12, 13]
    assert lay_out_columns(present)[0][0, 0].tolist()[1:] == list(range(17))


def test_positions_before_the_compressed_tokens_are_the_stock_models(made):
    """Text and image as the stock model lays them out; what follows is pushed by M."""
    row = ROWS[0]
    ours = inputs_of(made, row)
    stock = AutoModelForImageTextToText.from_pretrained(made.base, dtype=torch.float32).eval()
    reads = AutoProcessor.from_pretrained(made.base)
    theirs = reads(images=list(row.images), text=prompt_for(reads, row.prompt), return_tensors="pt")
    end = int((theirs["input_ids"][0] == stock.config.image_token_id).nonzero()[-1]) + 1
    assert torch.equal(ours["input_ids"][0, :end], theirs["input_ids"][0, :end])
    assert torch.equal(ours["input_ids"][0, end + M :], theirs["input_ids"][0, end:])
    with torch.no_grad():
        mine, stocks = made.model(**ours).logits, stock(**theirs).logits
    torch.testing.assert_close(mine[0, :end], stocks[0, :end], atol=1e-5, rtol=1e-5)


def test_the_mask_says_who_sees_whom():
    # text, [2 + 1], text, [1 + 1], text
    is_image = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0]]).bool()
    columns = locate_columns(is_image, torch.ones_like(is_image), [2, 1], 1)
    sees = (bottleneck_mask(columns, torch.float32, torch.device("cpu"))[0, 0] == 0).long()
    assert sees.tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 1, 1, 0],
        [1, 0, 0, 1, 1, 0, 1, 1],
    ]
    passes = plan_passes(columns)
    assert [step.columns.tolist() for step in passes] == [[[0, 1, 2, 3]], [[4, 5, 6]], [[7]]]
    assert [None if step.kept is None else step.kept.tolist() for step in passes] == [[[0, 3]], [[0, 2]], None]


# Images that were compressed before


def test_compressed_images_answer_as_pixels_do(made):
    inputs = inputs_of(made, *ROWS)
    limits = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 9999, "pad_token_id": 0}
    limits["suppress_tokens"] = [made.model.config.image_token_id]
    images = made.model.compress(**inputs)
    rest = iter(images)
    again = inputs_of(made, *(Row(row.prompt, tuple(next(rest) for _ in row.images)) for row in ROWS))
    for options in ({}, {"num_beams": 2}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}):
        expected = made.model.generate(**inputs, **{**limits, **options})
        assert torch.equal(made.model.generate(**again, **{**limits, **options}), expected)
    text = made.model.config.text_config
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_width * 4
    assert images[0].num_bytes == M * per_token + images[0].prefix.nbytes


def test_a_compressed_image_takes_any_question_but_one_beginning(made):
    beginning = Row("USER: <image>", (picture(0),))
    [image] = made.model.compress(**inputs_of(made, beginning))
    limits = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 9999, "pad_token_id": 0}
    for question in ("what is it", "is it red"):
        prompt = f"USER: <image> {question} ASSISTANT:"
        expected = made.model.generate(**inputs_of(made, Row(prompt, (picture(0),))), **limits)
        assert torch.equal(made.model.generate(**inputs_of(made, Row(prompt, (image,))), **limits), expected)
    with pytest.raises(ValueError, match="compressed after other text"):
        made.model(**inputs_of(made, Row("USER: what <image> is it", (image,))))
    pair = inputs_of(made, Row("USER: <image> <image> what", (picture(0), picture(1))))
    first, second = made.model.compress(**pair)
    assert first.digest == image.digest
    made.model(**inputs_of(made, Row("USER: <image> <image> what", (first, second))))
    changed = dataclasses.replace(first, keys=first.keys + 1)
    with pytest.raises(ValueError, match="or other images"):
        made.model(**inputs_of(made, Row("USER: <image> <image> what", (changed, second))))


# Bad input


def test_more_compressed_tokens_than_were_trained_are_refused(made):
    with pytest.raises(ValueError, match="has 3 compressed token"):
        made.model.set_compression(num_visual_tokens=4)


def test_placeholders_without_compressed_tokens_are_refused(made):
    inputs = inputs_of(made, ROWS[0])
    places = (inputs["input_ids"][0] == made.model.config.image_token_id).nonzero()[:, 0]
    kept = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    kept[places[-M:]] = False
    by_hand = {**inputs, "input_ids": inputs["input_ids"][:, kept], "attention_mask": inputs["attention_mask"][:, kept]}
    with pytest.raises(ValueError, match="right after them its compressed ones"):
        made.model(**by_hand)
    apart = inputs["input_ids"].clone()
    apart[0, places[-1]], apart[0, places[-1] + 1] = apart[0, places[-1] + 1].clone(), apart[0, places[-1]].clone()
    with pytest.raises(ValueError, match="has them apart"):
        made.model(**{**inputs, "input_ids": apart})


def test_an_image_that_is_not_passed_is_missed(made):
    inputs = inputs_of(made, ROWS[0])
    with pytest.raises(ValueError, match="but there are none"):
        made.model(input_ids=inputs["input_ids"])


def test_without_a_cache_generate_works_and_says_so_once(made, caplog):
    modeling_etc.logger.warning_once.cache_clear()
    inputs = inputs_of(made, ROWS[0])
    limits = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 9999, "pad_token_id": 0}
    expected = made.model.generate(**inputs, **limits)
    assert not caplog.messages
    for _ in range(2):
        assert torch.equal(made.model.generate(**inputs, **limits, use_cache=False), expected)
    assert [message for message in caplog.messages if "nothing is freed" in message] == [
        "Without a cache ETC reads every image again for every token, and nothing is freed."
    ]
    with pytest.raises(ValueError, match="leave use_cache=False out"):
        [image] = made.model.compress(**inputs)
        made.model(**inputs_of(made, Row(ROWS[0].prompt, (image,))), use_cache=False)


def test_compressed_images_are_refused_where_they_can_not_be(made):
    inputs = inputs_of(made, ROWS[0])
    [image] = made.model.compress(**inputs)
    again = inputs_of(made, Row(ROWS[0].prompt, (image,)))
    with pytest.raises(ValueError, match="not both"):
        made.model(**inputs, compressed_images=[image])
    with torch.no_grad():
        cache = cache_of(made.model(**again))
    with pytest.raises(ValueError, match="start without a cache"):
        made.model(**again, **cache_argument(cache))
    flipped = None if image.extent is not None else 2
    for wrong in (
        {"keys": image.keys[1:]},
        {"keys": image.keys[..., 1:]},
        {"keys": image.keys[:, 1:]},
        {"extent": flipped},
    ):
        other = dataclasses.replace(image, **wrong)
        with pytest.raises(ValueError, match="compressed by another model"):
            made.model(**{**again, "compressed_images": [other]})
    made.model.set_compression(num_visual_tokens=2)
    with pytest.raises(ValueError, match=r"compressed to 3 token\(s\), the model is set to 2"):
        made.model(**again)
    made.model.set_compression(num_visual_tokens=3)
    with pytest.raises(ValueError, match="no image to compress"):
        made.model.compress(**inputs_of(made, ROWS[1]))


def test_videos_are_refused(made):
    if made.model.config.model_type != "qwen3_vl_etc":
        return
    with pytest.raises(ValueError, match="not videos yet"):
        made.processor(text="USER: <|video_pad|>", videos=[torch.zeros(2, 3, 56, 56)])
    inputs = inputs_of(made, ROWS[1])
    with pytest.raises(ValueError, match="not videos yet"):
        made.model(**inputs, pixel_values_videos=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="need image_grid_thw"):
        made.model(**{name: v for name, v in inputs_of(made, ROWS[0]).items() if name != "image_grid_thw"})
