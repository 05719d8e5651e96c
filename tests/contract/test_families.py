"""Any family of Transformers, end to end: the real processor, `generate`, a checkpoint that loads anywhere."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForImageTextToText, AutoProcessor

import foveate
from foveate.families import stock_families
from foveate.modeling.compatibility import cache_argument, cache_of, image_sequences

from ..helpers.language_models import seen_by_language_model
from ..helpers.tiny_families import FAMILIES, TinyFamily, make_prompt, make_stock_model, pictures, words_only


pytestmark = [
    pytest.mark.contract_core,
    pytest.mark.one_process,
    pytest.mark.skipif(not stock_families(), reason="Transformers 4.57 has not the doors"),
]

#: Whose own processor does not write placeholders through the door that `processing/any.py` goes through, or whose
#: stock model does not run: they are compressed without a processor, if at all (`test_model_half.py`).
WITHOUT_PROCESSOR = ("idefics2", "llama4")

#: Whose published names of weights `save_pretrained` of the stock class does not always write: the contract's own
#: checkpoints have them (`test_hub_checkpoint.py`).
WITH_OTHER_NAMES = ("llava", "llava_next")

TYPES = [model_type for model_type in FAMILIES if model_type not in WITHOUT_PROCESSOR]
CONVERTED = [model_type for model_type in TYPES if model_type not in WITH_OTHER_NAMES]
#: Whose stock image processor, saved and loaded by older releases, has another colour at the edges.
IS_OLDER = Version(transformers.__version__) < Version("5.23")
NOT_SAVED = ("deepseek_vl", "janus") if IS_OLDER else ()
#: That can't go on with a cache in older releases, compressed or not.
NOT_CONTINUED = ("ernie4_5_vl_moe",) if IS_OLDER else ()
LENGTH = 4


@dataclass
class Made:
    """A family's stock model and processor, and the compressed ones that share their weights."""

    family: TinyFamily
    stock: Any
    stock_processor: Any
    model: Any
    processor: Any

    def batch(self, processor: Any, *rows: tuple[list, str]) -> Any:
        """Rows of images and a text, padded on the left."""
        texts = [make_prompt(self.stock_processor, len(images), text) for images, text in rows]
        images = self.family.arrange([images for images, _ in rows])
        more = {"images": images, **self.family.call} if any(images for images, _ in rows) else {}
        return processor(text=texts, padding=True, return_tensors="pt", **more)

    def generate(self, inputs: Any, **options: Any) -> Any:
        return self.model.generate(
            **inputs,
            max_new_tokens=LENGTH,
            do_sample=False,
            eos_token_id=None,
            **words_only(self.processor),
            **options,
        )


A, B, C = pictures()
ROWS = (([A, B], "what is this"), ([C], "where is the red square"), ([], "see the sky"))


@pytest.fixture(scope="module", params=TYPES)
def whole(request) -> Made:
    family = FAMILIES[request.param]
    stock, processor = make_stock_model(family), family.make_processor()
    model, compressed = foveate.compress(stock, processor, "sample", keep_ratio=0.5)
    return Made(family, stock, processor, model.eval(), compressed)


@pytest.fixture
def made(whole) -> Made:
    """With half of the tokens, whatever a test before has set."""
    whole.model.set_compression(whole.processor, keep_ratio=0.5, positions=None)
    return whole


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_with_all_tokens_it_is_the_stock_model(made, positions):
    if positions == "compact" and made.model.model.num_position_axes > 1:
        pytest.skip("places with rows and columns are not counted by the stock model")
    made.model.set_compression(made.processor, keep_ratio=1.0, positions=positions)
    expected, found = (made.batch(processor, *ROWS) for processor in (made.stock_processor, made.processor))
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        assert torch.equal(torch.as_tensor(values), torch.as_tensor(found[name])), name
    with torch.no_grad():
        logits, theirs = made.model(**found).logits, made.stock(**expected).logits
    present = expected["attention_mask"].bool()
    torch.testing.assert_close(logits[present], theirs[present], atol=5e-5, rtol=1e-4)


def test_half_of_the_tokens_are_the_stock_models_in_their_places(made):
    made.model.set_compression(made.processor, positions="original")
    whole, half = (made.batch(processor, *ROWS) for processor in (made.stock_processor, made.processor))
    with torch.no_grad():
        expected = seen_by_language_model(made.stock, whole)
        found = seen_by_language_model(made.model, half)
        patches = [image.weights for image in made.model(**half, output_compression=True).compression]
    is_image = whole["input_ids"] == made.stock.config.image_token_id
    columns, number = is_image.flatten().nonzero()[:, 0], sum(weights.shape[1] for weights in patches)
    if number != len(columns):
        pytest.skip("provenance is over patches, not visual tokens: test_llava_next_tiles.py looks at these")
    starts = torch.tensor([0, *(weights.shape[1] for weights in patches)]).cumsum(0)
    chosen = torch.cat([weights.argmax(1) + start for weights, start in zip(patches, starts)])
    kept = whole["attention_mask"].bool() & ~is_image
    kept.view(-1)[columns[chosen]] = True
    present = half["attention_mask"].bool()
    assert torch.equal(expected.embeddings[kept], found.embeddings[present])
    # Positions that are rotated count only as distances.
    assert torch.equal(expected.distances(kept), found.distances(present))


def test_a_batch_gives_each_row_what_it_gets_alone(made):
    together = made.batch(made.processor, *ROWS)
    greedy, beams = made.generate(together), made.generate(together, num_beams=3)
    with torch.no_grad():
        logits = made.model(**together).logits
        for number, row in enumerate(ROWS):
            if not row[0] and not made.family.text_only:
                continue
            alone = made.batch(made.processor, row)
            of_row = made.model(**alone).logits[0]
            torch.testing.assert_close(logits[number, -len(of_row) :], of_row, atol=5e-4, rtol=1e-3)
            assert torch.equal(greedy[number, -LENGTH:], made.generate(alone)[0, -LENGTH:])
            assert torch.equal(beams[number, -LENGTH:], made.generate(alone, num_beams=3)[0, -LENGTH:])


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_later_turn_on_the_cache_gives_what_a_fresh_run_gives(made, positions):
    if made.family.model_type in NOT_CONTINUED:
        pytest.skip("its stock model does not cut moe_mm_token_type_ids to the new columns")
    made.model.set_compression(made.processor, positions=positions)
    inputs = made.batch(made.processor, ROWS[0])
    first = made.generate(inputs, return_dict_in_generate=True)
    turn = made.processor.tokenizer(" what red", add_special_tokens=False)["input_ids"]
    ids = torch.cat([first.sequences, torch.tensor([turn])], dim=1)
    types = {
        name: torch.cat([values, values.new_zeros(1, ids.shape[1] - values.shape[1])], dim=1)
        for name, values in inputs.items()
        if name.endswith("token_type_ids")
    }
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types}
    images = {name: values for name, values in inputs.items() if name in made.model.model.visual_inputs}
    fresh = made.generate({**text, **images})
    assert torch.equal(made.generate({**text, **cache_argument(cache_of(first))}), fresh)


def test_model_and_processor_agree_on_the_number(made):
    for picture in (A, B, C):
        row = ([picture], "what is this")
        whole, half = (made.batch(processor, row) for processor in (made.stock_processor, made.processor))
        images = {name: values for name, values in half.items() if name in made.model.model.visual_inputs}
        with torch.no_grad():
            features = image_sequences(made.model.get_image_features(**images))
        image_token_id = made.stock.config.image_token_id
        before, left = (int((inputs["input_ids"] == image_token_id).sum()) for inputs in (whole, half))
        assert sum(len(tokens) for tokens in features) == left < before
        if hasattr(made.stock_processor, "_get_num_multimodal_tokens"):
            asked = {"image_sizes": [[picture.height, picture.width]], **made.family.call}
            (stock,) = made.stock_processor._get_num_multimodal_tokens(**asked).num_image_tokens
            (ours,) = made.processor._get_num_multimodal_tokens(**asked).num_image_tokens
            assert stock - ours == before - left


def test_a_video_is_refused_in_a_sentence(made):
    text = make_prompt(made.stock_processor, 0, "what is this")
    with pytest.raises(ValueError, match="not videos yet"):
        made.processor(text=[text], videos=[[A, B]])
    inputs = made.batch(made.processor, ROWS[0])
    with pytest.raises(ValueError, match="not videos yet"):
        made.model(**inputs, pixel_values_videos=torch.zeros(1))


@pytest.mark.parametrize("method", ["random", "spatial", "metacompress"])
def test_every_method_of_the_visual_tokens_runs(made, method):
    model, processor = foveate.compress(made.stock, made.stock_processor, method, keep_ratio=0.5)
    inputs = made.batch(processor, *ROWS[:2])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for parameter in made.stock.parameters():
        parameter.requires_grad_(False)
    output = model(**{**inputs, "labels": labels})
    assert torch.isfinite(output.loss)
    if method == "metacompress":
        output.loss.backward()
        gradients = [parameter.grad for parameter in model.model.compressor.parameters()]
        assert gradients and all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_uncompress_gives_the_stock_model_back(made):
    stock, processor = foveate.uncompress(made.model, made.processor)
    assert type(stock) is type(made.stock) and type(processor) is type(made.stock_processor)
    inputs = made.batch(processor, *ROWS)
    with torch.no_grad():
        assert torch.equal(stock(**inputs).logits, made.stock(**made.batch(made.stock_processor, *ROWS)).logits)


# Checkpoints

#: A process without foveate, which takes a folder with checkpoints and with inputs.
STRANGER = textwrap.dedent(
    """
    import json, sys, traceback
    from pathlib import Path

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "foveate":
                raise ModuleNotFoundError("foveate is not installed here")

    sys.meta_path.insert(0, Hidden())
    sys.path[:] = [entry for entry in sys.path if entry]
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
    from transformers.models.smolvlm import processing_smolvlm

    processing_smolvlm.num2words = str  # not installed here, and for videos alone
    torch.set_num_threads(1)
    trusted, found = {"trust_remote_code": True}, {}
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        try:
            call = torch.load(folder / "call.pt", weights_only=False)
            AutoConfig.from_pretrained(folder, **trusted)
            AutoModel.from_pretrained(folder, **trusted)
            model, info = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **trusted
            )
            assert not info["missing_keys"] and not info["unexpected_keys"], info
            inputs = AutoProcessor.from_pretrained(folder, **trusted)(**call)
            with torch.no_grad():
                found[folder.name] = model.eval()(**inputs).logits
        except Exception:
            found[folder.name] = traceback.format_exc()
    assert "foveate" not in sys.modules
    torch.save(found, sys.argv[2])
    """
)


@pytest.fixture(scope="module")
def of_strangers(tmp_path_factory) -> dict[str, tuple[Any, torch.Tensor]]:
    """For every family what a process without foveate finds of its converted checkpoint, and what this one finds of the
    compressed model in memory."""
    place = tmp_path_factory.mktemp("families")
    expected = {}
    for model_type in CONVERTED:
        family = FAMILIES[model_type]
        stock, processor = make_stock_model(family), family.make_processor()
        base, out = place / "bases" / model_type, place / "out" / model_type
        stock.save_pretrained(base)
        processor.save_pretrained(base)
        foveate.convert(base, out, "sample", keep_ratio=0.5)
        model, compressed = foveate.compress(stock, processor, "sample", keep_ratio=0.5)
        made = Made(family, stock, processor, model.eval(), compressed)
        texts = [make_prompt(processor, len(images), text) for images, text in ROWS]
        call = {"text": texts, "images": family.arrange([images for images, _ in ROWS]), **family.call}
        torch.save({**call, "padding": True, "return_tensors": "pt"}, out / "call.pt")
        with torch.no_grad():
            expected[model_type] = made.model(**made.batch(compressed, *ROWS)).logits
    script, found = place / "without_foveate.py", place / "found.pt"
    script.write_text(STRANGER)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hf"), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-P", str(script), str(place / "out"), str(found)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place)
    assert result.returncode == 0, result.stderr[-3000:]
    of_process = torch.load(found, weights_only=False)
    return {model_type: (of_process[model_type], expected[model_type]) for model_type in CONVERTED}


@pytest.mark.parametrize("model_type", [m for m in CONVERTED if m not in NOT_SAVED])
def test_a_converted_checkpoint_loads_where_foveate_is_not_installed(of_strangers, model_type):
    found, expected = of_strangers[model_type]
    assert torch.is_tensor(found), found
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_a_saved_model_loads_with_the_package(made, tmp_path):
    if made.family.model_type in NOT_SAVED:
        pytest.skip("its stock image processor does not come back as it was")
    made.model.save_pretrained(tmp_path)
    made.processor.save_pretrained(tmp_path)
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is type(made.processor)
    with torch.no_grad():
        found = model.eval()(**made.batch(processor, *ROWS)).logits
        expected = made.model(**made.batch(made.processor, *ROWS)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
