"""The weights that ship: ordinary checkpoints, small, and good; and what compression does to their real features."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPModel,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from foveate import convert, evaluate, lab_folder, load_lab
from foveate.lab.scenes import QUESTION_TYPES, ask_questions, draw_scene, sample_scene
from foveate.modeling.methods import recoverable
from foveate.modeling.methods.recoverable_algorithm import assign_tokens

from ..modeling import reference_recoverable as reference


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return convert("lab:tiny-llava", tmp_path_factory.mktemp("lab") / "recoverable")


def test_they_are_ordinary_checkpoints():
    model, processor = load_lab(dtype=torch.float32)
    assert type(model) is LlavaForConditionalGeneration
    assert type(processor) is LlavaProcessor
    _, info = CLIPModel.from_pretrained(lab_folder("tiny-clip"), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_the_next_base_is_an_ordinary_checkpoint_around_the_same_tower():
    from foveate.lab.large_scenes import PINPOINTS

    folder = lab_folder("tiny-llava-next")
    model, info = LlavaNextForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    _, processor = load_lab("tiny-llava-next")
    assert type(processor) is LlavaNextProcessor
    assert model.config.image_grid_pinpoints == processor.image_processor.image_grid_pinpoints == PINPOINTS
    names = load_file(folder / "model.safetensors")
    assert {"image_newline", "language_model.model.norm.weight"} <= set(names)
    base = load_file(lab_folder("tiny-llava") / "model.safetensors")
    tower = [name for name in base if name.startswith("vision_tower.vision_model.")]
    assert tower
    assert all(torch.equal(base[name], names[name]) for name in tower)
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())


def test_the_qwen_base_is_an_ordinary_checkpoint_as_published_ones_are():
    folder = lab_folder("tiny-qwen3vl")
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(model) is Qwen3VLForConditionalGeneration
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    _, processor = load_lab("tiny-qwen3vl")
    assert type(processor) is Qwen3VLProcessor
    names = load_file(folder / "model.safetensors")
    assert {name.split(".")[1] for name in names} == {"visual", "language_model"}
    assert len(model.model.visual.deepstack_merger_list) >= 2
    assert all(merger.linear_fc2.weight.any() for merger in model.model.visual.deepstack_merger_list)
    assert model.config.text_config.vocab_size >= len(processor.tokenizer) + 8
    assert sum(model.config.text_config.rope_scaling["mrope_section"]) == model.config.text_config.head_dim // 2
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())


@pytest.mark.parametrize(
    ("size", "grid"),
    [((168, 168), [12, 12]), ((252, 140), [10, 18]), ((280, 280), [20, 20]), ((900, 900), [20, 20])],
)
def test_the_qwen_base_takes_pictures_of_any_size(size, grid):
    _, processor = load_lab("tiny-qwen3vl")
    picture = draw_scene(sample_scene("validation", 0)).resize(size)
    inputs = processor(images=[picture], text=["<|vision_start|><|image_pad|><|vision_end|>"], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, *grid]]
    num_visual_tokens = (inputs["input_ids"] == processor.image_token_id).sum()
    assert num_visual_tokens == grid[0] * grid[1] // 4 <= 100


@pytest.mark.parametrize("names", [("tiny-llava", "tiny-clip"), ("tiny-llava-next",), ("tiny-qwen3vl",)])
def test_they_are_small(names):
    files = [path for name in names for path in lab_folder(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15_000_000


def test_the_lab_model_sees():
    """Far above what guessing gives; the measured accuracy is in lab/RESULTS.md."""
    result = evaluate("lab:tiny-llava", limit=60, dtype="float32", progress=False)
    assert result["exact_match"]["value"] > 0.7


def test_the_next_base_sees():
    """Far above what guessing gives, on canvases of all shapes; the measured accuracy is in lab/RESULTS.md."""
    from foveate.lab.next import measure

    found = measure(lab_folder("tiny-llava-next"), number=40)
    assert found["all"]["n"] == 40
    assert found["all"]["value"] > 0.7


@pytest.mark.parametrize("size", [(168, 168), (252, 168), (140, 224)])
def test_the_qwen_base_sees_pictures_of_several_sizes(size):
    """Far above what guessing gives; the measured accuracy is in lab/RESULTS.md."""
    from foveate.lab.qwen3vl import measure

    found = measure(lab_folder("tiny-qwen3vl"), number=30, size=size)
    assert found["all"]["n"] == 30
    assert found["all"]["value"] > 0.7


def test_what_the_qwen_base_is_trained_on_is_what_its_processor_gives():
    from foveate.lab.qwen3vl import SCENE_SEED, dialogue_batch

    batch = dialogue_batch(0, "validation", num_turns=3)
    _, processor = load_lab("tiny-qwen3vl")
    scene = sample_scene("validation", 0, SCENE_SEED + 2)
    row = batch["input_ids"][0][batch["input_ids"][0] != processor.tokenizer.pad_token_id]
    turns = processor.tokenizer.decode(row).split("<|vision_end|>")[1].split("<|im_end|>\n")
    said = [turn.removesuffix("<|im_end|>").split("\n")[-1] for turn in turns]
    assert len(said) == 6
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": said[0]}]}]
    for place, words in enumerate(said[1:]):
        talk.append({"role": ("assistant", "user")[place % 2], "content": [{"type": "text", "text": words}]})
    prompt = processor.apply_chat_template(talk)
    inputs = processor(images=[draw_scene(scene)], text=[prompt], return_tensors="pt")
    assert inputs["input_ids"][0].tolist()[: len(row)] == row.tolist()
    assert processor.tokenizer.decode(inputs["input_ids"][0][len(row) :]) == "\n"
    torch.testing.assert_close(inputs["pixel_values"], batch["pixel_values"][: len(inputs["pixel_values"])])


def test_what_the_next_base_is_trained_on_is_what_it_generates_from():
    """Dialogues that share an image in training give what each gives alone, through processor and model."""
    from foveate.lab.large_scenes import draw_large_scene
    from foveate.lab.next import NextSpeaker

    speaker = NextSpeaker().eval()
    batch = speaker.batch(0, "validation", batch_size=1)
    dialogues = batch["dialogues"][0]
    with torch.no_grad():
        together, _ = speaker(batch["images"][0], dialogues)
    processor = LlavaNextProcessor.from_pretrained(lab_folder("tiny-llava-next"))
    picture = draw_large_scene(sample_scene("validation", 0, seed=3))
    inputs = processor(images=[picture], text=["USER: <image>"], return_tensors="pt")
    for dialogue in (0, 5):
        chosen = dialogues["dialogue"] == dialogue
        inputs["input_ids"] = torch.cat([inputs["input_ids"], dialogues["ids"][chosen][None]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            alone = speaker.model(**inputs).logits[0, -int(chosen.sum()) - 1 : -1]
        # A dialogue's first token, a newline, is the processor's; what predicts it stands before the image's end.
        torch.testing.assert_close(together[chosen][1:], alone[1:], atol=1e-3, rtol=1e-3)
        inputs["input_ids"] = inputs["input_ids"][:, : -int(chosen.sum())]


def test_the_converted_model_answers_with_fewer_tokens(converted):
    result = evaluate(converted, limit=60, dtype="float32", progress=False)
    assert result["mean_visual_tokens"] < 0.5 * result["base_visual_tokens"]
    assert result["exact_match"]["value"] > 0.2


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_on_real_features_the_fast_compressor_is_the_reference(converted, variant):
    """Scores, similarities and keys of test scenes under their questions, images of different counts in one batch."""
    model = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(converted)
    model.set_compression(variant=variant)
    scenes = [sample_scene("test", index) for index in range(8)]
    questions = [ask_questions(s, [QUESTION_TYPES[i % 3]])[0].question for i, s in enumerate(scenes)]
    prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in questions]
    inputs = processor(images=[draw_scene(s) for s in scenes], text=prompts, padding=True, return_tensors="pt")

    seen = {}

    def spy(*args, **kwargs):
        seen.update(zip(("scores", "similarity", "keys"), args))
        return assign_tokens(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(recoverable, "assign_tokens", spy)
        _, assignment = model.model.assign_tokens(inputs)
    assert len(set(assignment.counts.tolist())) > 1
    for row, (weights, roles) in enumerate(assignment.provenance()):
        one = [seen[name][row].double().numpy() for name in ("scores", "similarity", "keys")]
        expected_weights, expected_roles = reference.compress_image(*one, variant=variant)
        assert roles.tolist() == expected_roles.tolist()
        torch.testing.assert_close(weights.double(), torch.as_tensor(expected_weights), atol=1e-5, rtol=1e-4)
