"""The weights that ship: ordinary checkpoints, small, and good; and what compression does to their real features."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    CLIPModel,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)

from foveate import convert, evaluate, lab_folder, load_lab
from foveate.lab.scenes import QUESTION_TYPES, ask_questions, draw_scene, sample_scene
from foveate.modeling.compressor_recoverable import assign_tokens

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


def test_they_are_small():
    files = [path for name in ("tiny-llava", "tiny-clip") for path in lab_folder(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15_000_000
    files = [path for path in lab_folder("tiny-llava-next").rglob("*") if path.is_file()]
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
    from transformers import AutoModelForImageTextToText, AutoProcessor

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

    module = sys.modules[type(model.model).__module__]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "assign_tokens", spy)
        images = model.model.compress_images(
            inputs["pixel_values"], inputs["question_input_ids"], inputs["question_attention_mask"]
        )
    assert len(set(images.counts.tolist())) > 1
    for row, (weights, roles) in enumerate(images.assignment.provenance()):
        one = [seen[name][row].double().numpy() for name in ("scores", "similarity", "keys")]
        expected_weights, expected_roles = reference.compress_image(*one, variant=variant)
        assert roles.tolist() == expected_roles.tolist()
        torch.testing.assert_close(weights.double(), torch.as_tensor(expected_weights), atol=1e-5, rtol=1e-4)
