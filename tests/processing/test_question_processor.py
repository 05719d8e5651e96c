"""Which question guides an image, by each method's rule, and what there is to say of questions."""

import pytest

from foveate import convert
from foveate.registry import METHODS, pairs_of

from ..helpers.batches import picture
from ..helpers.tiny_checkpoints import write_clip, write_llava, write_llava_next


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("processors")
    bases = {"llava": write_llava(folder / "llava"), "llava_next": write_llava_next(folder / "llava_next")}
    clip = write_clip(folder / "clip")
    found = {}
    for method in METHODS.values():
        for backbone in pairs_of(method.name) if method.reads_question else ():
            out = convert(bases[backbone.base_model_type], folder / backbone.model_type, method.name, clip)
            found[backbone.model_type] = AutoProcessor.from_pretrained(out)
    return found


def questions_of(processor, prompts, pictures, **kwargs):
    inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt", **kwargs)
    texts = processor.question_tokenizer.batch_decode(inputs["question_input_ids"], skip_special_tokens=True)
    return texts, inputs["question_attention_mask"]


CHAT = "USER: <image> what is it ASSISTANT: it USER: colour ASSISTANT:"
TWO_TURNS = "USER: <image> what is it ASSISTANT: it USER: <image> colour ASSISTANT:"


@pytest.mark.parametrize("name", ["llava_qgvtc", "llava_next_qgvtc"])
def test_qg_vtc_is_guided_by_the_users_last_turn(processors, name):
    assert questions_of(processors[name], CHAT, [picture(0)])[0] == ["colour"]
    assert questions_of(processors[name], TWO_TURNS, [picture(0), picture(1)])[0] == ["colour", "colour"]
    ended = CHAT + " it"
    assert questions_of(processors[name], ended, [picture(0)])[0] == ["colour"]


def test_recoverable_is_guided_by_the_turn_that_the_image_stands_in(processors):
    assert questions_of(processors["llava_recoverable"], CHAT, [picture(0)])[0] == ["what is it"]
    found, _ = questions_of(processors["llava_recoverable"], TWO_TURNS, [picture(0), picture(1)])
    assert found == ["what is it", "colour"]


def test_a_raw_prompt_without_a_template_asks_after_the_last_image(processors, monkeypatch):
    processor = processors["llava_qgvtc"]
    monkeypatch.setattr(processor, "chat_template", None)
    monkeypatch.setattr(processor.tokenizer, "chat_template", None)
    assert questions_of(processor, "what is it <image> colour", [picture(0)])[0] == ["colour"]
    assert questions_of(processor, "what is it <image>", [picture(0)])[0] == ["what is it"]


def test_a_question_can_be_given_by_hand(processors):
    pictures = [picture(0), picture(1)]
    for processor in processors.values():
        assert questions_of(processor, TWO_TURNS, pictures, question="what")[0] == ["what", "what"]
        assert questions_of(processor, [TWO_TURNS], pictures, question=[["what", "it"]])[0] == ["what", "it"]


@pytest.mark.parametrize("name", ["llava_qgvtc", "llava_next_qgvtc"])
def test_an_empty_question_leaves_the_guidance_to_the_image_and_says_so_once(processors, name, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    logging.get_logger("foveate.processing.question").warning_once.__func__.cache_clear()
    prompts = ["USER: <image> ASSISTANT:", "USER: <image> colour ASSISTANT:"]
    for _ in range(2):
        _, mask = questions_of(processors[name], prompts, [picture(0), picture(1)])
    assert mask.any(1).tolist() == [False, True]
    assert sum("class token" in record.message for record in caplog.records) == 1


def test_an_empty_question_is_refused_where_nothing_else_guides(processors):
    with pytest.raises(ValueError, match="no question"):
        processors["llava_recoverable"](images=[picture(0)], text="USER: <image> ASSISTANT:")


def test_a_question_of_300_words_is_cut_for_guidance_alone_and_said_once(processors, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    for name, processor in processors.items():
        logging.get_logger("foveate.processing.question").warning_once.__func__.cache_clear()
        caplog.clear()
        prompt = "USER: <image> " + "colour " * 300 + "ASSISTANT:"
        for _ in range(2):
            inputs = processor(images=[picture(0)], text=prompt, return_tensors="pt")
        assert inputs["question_input_ids"].shape == (1, 77), name
        colour = processor.tokenizer.convert_tokens_to_ids("colour")
        assert int((inputs["input_ids"] == colour).sum()) == 300, "the language model reads all of it"
        assert sum("guided by its beginning" in record.message for record in caplog.records) == 1
