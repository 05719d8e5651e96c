"""Language models without full attention in every layer: refused where a method is not exact on them, else exact."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from foveate import convert
from foveate.configuration.attention import attention_kinds, require_attention
from foveate.errors import FoveateError
from foveate.modeling.compatibility import cache_argument, cache_of

from ..helpers.batches import ROWS, Row, picture, prompt_for
from ..helpers.tiny_checkpoints import write_clip, write_llava


WINDOW = 6  # shorter than an image's 9 patches
INTERLEAVED = ["sliding_attention", "full_attention"]
SLIDING_MODELS = {
    "mistral": (MistralConfig, {"sliding_window": WINDOW}),
    "qwen2": (Qwen2Config, {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": INTERLEAVED}),
    "gemma3": (Gemma3TextConfig, {"sliding_window": WINDOW, "layer_types": INTERLEAVED, "head_dim": 32}),
}


@pytest.fixture(scope="module", params=SLIDING_MODELS)
def sliding_base(request, tmp_path_factory):
    text_class, text = SLIDING_MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "base"
    return write_llava(folder, torch.float32, text_class=text_class, initializer_range=0.2, **text)


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def inputs_of(processor, *rows: Row):
    images = [list(row.images) for row in rows]
    texts = [prompt_for(processor, row.prompt) for row in rows]
    return processor(images=images if any(images) else None, text=texts, padding=True, return_tensors="pt")


def test_etc_is_refused_on_sliding_windows_at_conversion(sliding_base, tmp_path):
    with pytest.raises(FoveateError, match=r"'etc' .* sliding_attention \(text_config.sliding_window is 6\): choose"):
        convert(sliding_base, tmp_path / "out", "etc")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["etc", "recoverable"])
@pytest.mark.parametrize("kind", ["chunked_attention", "linear_attention"])
def test_deferred_methods_are_refused_on_other_layers_at_load(method, kind, tmp_path):
    """A checkpoint that was made of such a base before it was refused."""
    base = write_llava(tmp_path / "base", torch.float32, text_class=Qwen3Config)
    text_encoder = write_clip(tmp_path / "clip") if method == "recoverable" else None
    out = convert(base, tmp_path / "out", method, text_encoder)
    config = json.loads((out / "config.json").read_text())
    config["text_config"]["layer_types"] = [kind, "full_attention"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"'{method}' .* layers of {kind}: choose another method or another base"):
        AutoConfig.from_pretrained(out)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (LlamaConfig(), ["full_attention"]),
        (MistralConfig(sliding_window=None), ["full_attention"]),
        (MistralConfig(sliding_window=8), ["sliding_attention"]),
        (Qwen2Config(sliding_window=8), ["full_attention"]),
        (Qwen3Config(num_hidden_layers=2, layer_types=INTERLEAVED), ["full_attention", "sliding_attention"]),
    ],
)
def test_the_kinds_of_a_language_models_layers(text, kinds):
    assert attention_kinds(text) == kinds


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"attention_chunk_size": 8}, r"chunked_attention \(text_config.attention_chunk_size is 8\)"),
        ({"layer_types": ["mamba", "attention"]}, "mamba"),
        ({"layers_block_type": ["mamba", "attention"]}, "mamba"),
        ({"cross_attention_layers": [1]}, "cross_attention"),
    ],
)
def test_other_kinds_are_named_in_the_refusal(changes, kind):
    text = LlamaConfig()
    for name, value in changes.items():
        object.__setattr__(text, name, value)
    with pytest.raises(ValueError, match=f"layers of {kind}: choose"):
        require_attention("etc", text)


def test_an_exact_method_at_full_budget_is_the_stock_model_on_sliding_windows(sliding_base, tmp_path):
    out = convert(sliding_base, tmp_path / "out", "spatial", keep_ratio=1.0)
    stock, reads = load(sliding_base), AutoProcessor.from_pretrained(sliding_base)
    model, processor = load(out), AutoProcessor.from_pretrained(out)
    inputs, theirs = inputs_of(processor, *ROWS), inputs_of(reads, *ROWS)
    assert torch.equal(inputs["input_ids"], theirs["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, stock(**theirs).logits, atol=1e-5, rtol=1e-5)
    limits = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 9999, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **limits), stock.generate(**theirs, **limits))


@pytest.fixture(scope="module")
def recoverable(sliding_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recoverable")
    out = convert(sliding_base, folder / "out", "recoverable", write_clip(folder / "clip"))
    return load(out), AutoProcessor.from_pretrained(out)


def test_recoverable_gives_a_row_what_it_gets_alone_on_sliding_windows(recoverable):
    """A window counts the tokens that are there; what goes on with a cache is what a fresh run gives."""
    model, processor = recoverable
    batch, following = inputs_of(processor, *ROWS), torch.tensor([[6, 7, 8, 9, 10]])
    with torch.no_grad():
        together = model(**batch)
        mask = torch.cat([batch["attention_mask"], torch.ones(len(ROWS), 5, dtype=torch.int64)], dim=1)
        cache = cache_argument(cache_of(together))
        later = model(input_ids=following.repeat(len(ROWS), 1), attention_mask=mask, **cache).logits
        for index, row in enumerate(ROWS):
            alone = inputs_of(processor, row)
            length = alone["input_ids"].shape[1]
            alone["input_ids"] = torch.cat([alone["input_ids"], following], dim=1)
            alone["attention_mask"] = torch.ones_like(alone["input_ids"])
            expected = model(**alone, use_cache=False).logits[0]
            torch.testing.assert_close(together.logits[index, -length:], expected[:length], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(later[index], expected[length:], atol=1e-4, rtol=1e-4)


def test_recoverable_refuses_padding_that_a_sliding_window_would_count(recoverable):
    """Later turns of different lengths in one batch; alone each goes on."""
    model, processor = recoverable
    first = inputs_of(processor, *ROWS[:2])
    turns = inputs_of(processor, Row("USER: <image> what is", (picture(9),)), Row("USER: what"))
    with torch.no_grad():
        cache = cache_argument(cache_of(model(**first)))
        mask = torch.cat([first["attention_mask"], turns["attention_mask"]], dim=1)
        with pytest.raises(ValueError, match=r"windows would count the padding .* one row at a time"):
            model(**{**turns, "attention_mask": mask}, **cache)
        alone = inputs_of(processor, ROWS[0])
        turn = inputs_of(processor, Row("USER: <image> what is", (picture(9),)))
        mask = torch.cat([alone["attention_mask"], turn["attention_mask"]], dim=1)
        model(**{**turn, "attention_mask": mask}, **cache_argument(cache_of(model(**alone))))
