"""The weights that ship: ordinary checkpoints, small, and good; and what compression does to their real features."""

import sys

import pytest
import torch
from transformers import CLIPModel, LlavaForConditionalGeneration, LlavaProcessor

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


def test_they_are_small():
    files = [path for name in ("tiny-llava", "tiny-clip") for path in lab_folder(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15_000_000


def test_the_lab_model_sees():
    """Far above what guessing gives; the measured accuracy is in lab/RESULTS.md."""
    result = evaluate("lab:tiny-llava", limit=60, dtype="float32", progress=False)
    assert result["exact_match"]["value"] > 0.7


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
