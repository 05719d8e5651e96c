"""What is read: LLaVA's two published formats, the lab's scenes, and the batches that are made of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from foveate import FoveateError, lab_folder
from foveate.evaluation.harness import Checkpoint
from foveate.lab.data import LabExamples
from foveate.lab.language import dialogue_tokens
from foveate.lab.scenes import QuestionAnswer
from foveate.training.data import Collator, Example, LlavaExamples, TrainingOrder, open_data
from foveate.training.recipe import read_stage


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 42, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def processor(tiny):
    return AutoProcessor.from_pretrained(tiny)


def said(asked, answer):
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]


@pytest.fixture
def file_of(tmp_path):
    """Writes samples, and an image `there.jpg`, to a file as LLaVA publishes them."""
    PICTURE.save(tmp_path / "there.jpg")

    def write(samples):
        path = tmp_path / "samples.json"
        path.write_text(samples if isinstance(samples, str) else json.dumps(samples))
        return path

    return write


# LLaVA's files


def test_every_question_becomes_an_example_with_the_image(instructions):
    """As in llava_v1_5_mix665k.json."""
    data = LlavaExamples(instructions, instructions.parent)
    samples = [sample for sample in json.loads(instructions.read_text()) if "image" in sample]
    assert len(data) == sum(len(sample["conversations"]) for sample in samples) // 2 == 15
    assert [data[i].question for i in range(3)] == ["what colour is it", "is it red", "what is it"]
    assert [data[i].answer for i in range(3)] == ["red", "red", "it is red"]
    for index in (1, 2):  # two questions of one image
        assert data[index].images[0].tobytes() == data[1].images[0].tobytes()
        assert data[index].images[0].size == (60, 50)
    assert "<image>" not in "".join(pair.question for pair in data.pairs)
    assert data.summary == ("15 examples of 9 samples in llava_v1_5_mix665k.json; left out: 1 samples without an image")


def test_text_alone_is_kept_on_demand(instructions):
    data = LlavaExamples(instructions, instructions.parent, keep_text_only=True)
    assert len(data) == 16
    assert data[6] == Example(f"{instructions}, sample 3", "what is red", "it is it", ())


def test_captions(file_of):
    """As in blip_laion_cc_sbu_558k.json."""
    asked = "Render a clear and concise summary of the photo."
    path = file_of(
        [
            {"id": "004539375", "image": "there.jpg", "conversations": said(f"{asked}\n<image>", "select luxury")},
            {"id": "002239345", "image": "there.jpg", "conversations": said(f"<image>\n{asked}", "a grey wall")},
        ]
    )
    data = open_data(read_stage("qg-vtc", 1, changes={"data": str(path)}))
    assert [(data[i].question, data[i].answer) for i in (0, 1)] == [(asked, "select luxury"), (asked, "a grey wall")]


def test_what_published_dialogues_have_at_their_edges(file_of):
    """An answer before the first question, a question after the last answer, an empty answer."""
    turns = [{"from": "gpt", "value": "hi"}, *said("<image>\nwhat", "red"), *said("is it", " "), said("red", "")[0]]
    path = file_of([{"id": 1, "image": "there.jpg", "conversations": turns}])
    data = LlavaExamples(path, path.parent)
    assert [(pair.question, pair.answer) for pair in data.pairs] == [("what", "red")]
    assert "1 examples with an empty answer" in data.summary


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ("[{", "can't be read as JSON"),
        ({"id": 1}, "holds no list of samples"),
        ([], "holds no list of samples"),
        (["text"], "sample 0 has no conversations"),
        ([{"image": "there.jpg", "conversations": []}], "sample 0 has no conversations"),
        ([{"image": "there.jpg", "conversations": [{"from": "human"}]}], "sample 0 has a turn without a text"),
        ([{"image": 5, "conversations": said("<image>", "red")}], "sample 0 names an image that is no path"),
        ([{"image": "there.jpg", "conversations": said("what", "red")}], "sample 0 has 0 <image> for 1 image(s)"),
        ([{"conversations": said("<image>\nwhat", "red")}], "sample 0 has 1 <image> for 0 image(s)"),
        (
            [{"image": "there.jpg", "conversations": said("<image>\nwhat<image>", "red")}],
            "sample 0 has 2 <image> for 1 image(s)",
        ),
        (
            [{"image": "there.jpg", "conversations": said("<image>\nwhat", "red")[::-1] + said("it", "red")[:1] * 2}],
            "sample 0 has its speakers out of order",
        ),
        (
            [
                {"image": "there.jpg", "conversations": said("<image>\nwhat", "red")},
                {"image": "gone.jpg", "conversations": said("<image>\nwhat", "red")},
            ],
            "sample 1: there is no image",
        ),
        ([{"conversations": said("what", "red")}], "no example to train on"),
    ],
)
def test_a_bad_file_is_refused_by_file_and_sample(file_of, samples, message):
    path = file_of(samples)
    with pytest.raises(FoveateError) as error:
        open_data(read_stage("qg-vtc", 1, changes={"data": str(path)}))
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere.json"}, "There is no file nowhere.json"),
        ({"data": "lab:0"}, "lab:0 is no number of scenes"),
        ({"data": "lab:many"}, "lab:many is no number of scenes"),
    ],
)
def test_bad_data_is_refused(changes, message):
    with pytest.raises(FoveateError, match=message):
        open_data(read_stage("qg-vtc", 1, changes=changes))


def test_images_that_are_missing_or_broken(file_of):
    samples = [{"image": name, "conversations": said("<image>\nwhat", "red")} for name in ("there.jpg", "gone.jpg")]
    path = file_of(samples)
    assert "1 examples whose image is missing" in LlavaExamples(path, path.parent, skip_missing=True).summary
    data = LlavaExamples(path, path.parent, skip_missing=True)
    (path.parent / "there.jpg").write_bytes(b"no picture")
    with pytest.raises(FoveateError, match=r"sample 0: the image .*there.jpg can't be read"):
        data[0]
    (path.parent / "there.jpg").unlink()
    with pytest.raises(FoveateError, match=r"sample 0: there is no image .*there.jpg"):
        data[0]


# The lab


def test_lab_examples_are_a_function_of_seed_and_position():
    data, other = LabExamples(4, "questions", seed=0), LabExamples(4, "questions", seed=1)
    first, again, next_epoch = data[1], LabExamples(4, "questions", seed=0)[1], data[5]
    assert (first.question, first.answer) == (again.question, again.answer)
    assert first.images[0].tobytes() == again.images[0].tobytes() == next_epoch.images[0].tobytes()
    asked = [[source[4 * epoch + index].question for index in range(4)] for source in (data, other) for epoch in (0, 1)]
    assert len({tuple(questions) for questions in asked}) == 4


def test_lab_descriptions_name_every_object():
    example = LabExamples(2, "descriptions", seed=0)[0]
    assert example.question in ("What is where?", "What is in the picture?")
    assert len(example.answer.split(", ")) >= 3


def test_the_order_visits_everything_each_epoch():
    order = list(TrainingOrder(5, 12, seed=3))
    assert sorted(order[:5]) == list(range(5))
    assert sorted(order[5:10]) == list(range(5, 10))
    assert [position - 5 for position in order[5:10]] != order[:5]
    assert len(order) == len(TrainingOrder(5, 12, seed=3)) == 12
    assert list(TrainingOrder(5, 12, seed=3)) == order != list(TrainingOrder(5, 12, seed=4))


# Batches


def test_only_answers_are_learned(processor):
    collate = Collator(processor, max_length=64)
    examples = [Example("a", "what colour is it", "it is red", (PICTURE,)), Example("b", "is it", "red", (PICTURE,))]
    batch = collate(examples)
    learned = [row[row != -100] for row in batch["labels"]]
    assert [processor.tokenizer.decode(row) for row in learned] == ["it is red </s>", "red </s>"]
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        assert mask.tolist() == sorted(mask.tolist(), reverse=True), "padded on the right"
        assert (labels[mask == 0] == -100).all()
    assert batch["pixel_values"].shape[0] == 2


def test_prompts_are_what_generation_sees(processor, tiny):
    """Token for token and pixel for pixel what the harness asks with."""
    collate = Collator(processor, max_length=64)
    question = "what colour is it"
    batch = collate([Example("a", question, "red", (PICTURE,))])
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]

    class Model:
        device, dtype = "cpu", torch.float32

    inputs = Checkpoint("tiny", tiny, Model, processor).encode([asked], [PICTURE])
    length = inputs["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], inputs["input_ids"])
    assert (batch["labels"][:, :length] == -100).all()
    assert (batch["labels"][:, length:] != -100).all()
    for name in ("pixel_values", "question_input_ids", "question_attention_mask"):
        assert torch.equal(batch[name], inputs[name]), name


def test_the_labs_answers_are_tokenized_as_its_model_learned_them():
    processor = AutoProcessor.from_pretrained(lab_folder("tiny-llava"))
    example = LabExamples(1, "descriptions", seed=0)[0]
    batch = Collator(processor, max_length=2048)([example])
    ids, labels, _ = dialogue_tokens([QuestionAnswer(example.question, example.answer, "describe")])
    assert batch["labels"][0, -len(labels) :].tolist() == labels
    after_image = (batch["input_ids"][0] == processor.image_token_id).nonzero()[-1] + 1
    assert batch["input_ids"][0, after_image:].tolist() == ids


def test_an_answer_ends_with_one_end_of_sequence(processor):
    """The llava-hf models' template, like the tiny one's, writes a space after an answer; the lab's writes </s>."""
    of_lab = AutoProcessor.from_pretrained(lab_folder("tiny-llava"))
    for read in (processor, of_lab):
        batch = Collator(read, max_length=256)([Example("a", "what is it", "red", (PICTURE,))])
        learned = batch["labels"][0][batch["labels"][0] != -100]
        assert (learned == read.tokenizer.eos_token_id).sum() == 1
        assert learned[-1] == read.tokenizer.eos_token_id


def test_a_dialogue_is_one_example_whose_answers_are_learned(processor):
    """The tokens are those of the whole conversation in the chat template; an end of sequence stands where the template
    has one, and at the end."""
    of_lab = AutoProcessor.from_pretrained(lab_folder("tiny-llava"))
    turns = [("what colour is it", "red"), ("is it red", "it is red"), ("what is it", "it")]
    example = Example("a", *turns[0], (PICTURE,), tuple(turns[1:]))
    chat = []
    for index, (question, answer) in enumerate(turns):
        image = [{"type": "image"}] if index == 0 else []
        chat.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    for read, ends in ((processor, 1), (of_lab, 3)):
        batch = Collator(read, max_length=512)([example, Example("b", "what is it", "red", (PICTURE,))])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        whole = read(images=PICTURE, text=read.apply_chat_template(chat, tokenize=False), return_tensors="pt")
        whole = whole["input_ids"][0]
        assert ids[: len(whole)].tolist() == whole.tolist()
        learned = read.tokenizer.decode(labels[labels != -100], skip_special_tokens=True)
        assert learned.split() == ["red", "it", "is", "red", "it"]
        assert int((labels == read.tokenizer.eos_token_id).sum()) == ends


def test_a_files_dialogues_stay_whole_on_demand(instructions):
    pairs = LlavaExamples(instructions, instructions.parent)
    data = open_data(read_stage("metacompress", 1, changes={"data": str(instructions)}))
    assert len(data) == 8
    found = [(e.question, e.answer) for i in range(8) for e in [data[i]]]
    assert len(found) + sum(len(data[i].later) for i in range(8)) == len(pairs) == 15
    assert data[1].later == (("what is it", "it is red"),)


def test_a_template_that_nothing_can_be_learned_from_is_refused(processor, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", "{% if add_generation_prompt %}ASSISTANT:{% endif %}")
    with pytest.raises(FoveateError, match="chat template doesn't write an answer"):
        Collator(processor, max_length=64)


def test_a_long_answer_is_cut_and_never_the_image(processor):
    example = Example("a", "what is it", "red " * 50, (PICTURE,))
    length = Collator(processor, max_length=500).prompt_length(example)
    batch = Collator(processor, max_length=length + 3)([example])
    assert batch["input_ids"].shape == (1, length + 3)
    assert int((batch["labels"] != -100).sum()) == 3


def test_an_example_with_a_prompt_that_is_too_long_is_left_out(processor, file_of):
    asked = ["what is it", "what " * 40]
    samples = [{"image": "there.jpg", "conversations": said(f"<image>\n{text}", "red")} for text in asked]
    path = file_of(samples)
    data = LlavaExamples(path, path.parent)
    collate = Collator(processor, max_length=40)
    data.leave_out_long(collate)
    assert [pair.question for pair in data.pairs] == ["what is it"]
    assert "1 examples with a prompt of 40 tokens or more" in data.summary
    with pytest.raises(FoveateError, match=r"sample 1: the prompt has \d+ tokens"):
        collate([LlavaExamples(path, path.parent)[1]])
    with pytest.raises(FoveateError, match=r"No prompt in .* fits into max_length=5"):
        data.leave_out_long(Collator(processor, max_length=5))


def test_text_alone_in_a_batch(processor):
    collate = Collator(processor, max_length=64)
    text, picture = Example("t", "what is red", "it is", ()), Example("p", "what is it", "red", (PICTURE,))
    batch = collate([text, picture])
    assert len(batch["pixel_values"]) == len(batch["question_input_ids"]) == 1
    alone = collate([text])
    assert len(alone["pixel_values"]) == 1, "a blank one, so that all that trains gets a gradient in every batch"
    assert (alone["labels"][1] == -100).all()
    assert torch.equal(alone["labels"][0][alone["labels"][0] != -100], batch["labels"][0][batch["labels"][0] != -100])


def test_an_image_that_the_processor_refuses_is_named(processor):
    example = Example("file, sample 7", "what is it", "red", (Image.new("RGB", (400, 2)),))
    with pytest.raises(FoveateError, match="file, sample 7: The image is 400 × 2 pixels"):
        Collator(processor, max_length=64)([example])
