"""`foveate.compress` and `foveate.uncompress`: models that are loaded already."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, BertConfig, BertModel

import foveate
from foveate.errors import FoveateError
from foveate.families import stock_families

from ..conftest import TINY_BASES
from ..helpers.batches import ROWS, prompt_for
from ..helpers.tiny_families import FAMILIES, make_stock_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    write_base, _ = TINY_BASES["llava"]
    return write_base(tmp_path_factory.mktemp("base") / "llava", dtype=torch.float32)


@pytest.fixture
def stock(base):
    return AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture
def processor(base):
    return AutoProcessor.from_pretrained(base)


def logits_of(model, processor):
    row = ROWS[0]
    inputs = processor(images=list(row.images), text=prompt_for(processor, row.prompt), return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def test_the_two_share_their_weights_and_both_go_on(stock, processor):
    before = logits_of(stock, processor)
    model, compressed = foveate.compress(stock, processor, "sample", keep_ratio=0.25)
    assert {id(p) for p in model.parameters()} == {id(p) for p in stock.parameters()}
    assert (
        model.config.compression.keep_ratio == compressed.keep_ratio == 0.25 if hasattr(compressed, "keep_ratio") else 1
    )
    assert logits_of(model, compressed).shape[1] < before.shape[1]
    assert torch.equal(logits_of(stock, processor), before), "the stock model is as it was"
    assert type(stock).__name__ == "LlavaForConditionalGeneration" and not hasattr(stock.config, "compression")


def test_it_is_the_model_that_convert_makes(base, stock, processor, tmp_path):
    model, compressed = foveate.compress(stock, processor, "sample", keep_ratio=0.25)
    foveate.convert(base, tmp_path / "converted", "sample", keep_ratio=0.25)
    converted = AutoModelForImageTextToText.from_pretrained(tmp_path / "converted", dtype=torch.float32).eval()
    assert type(model) is type(converted)
    expected = logits_of(converted, AutoProcessor.from_pretrained(tmp_path / "converted"))
    assert torch.equal(logits_of(model, compressed), expected)


def test_what_it_saves_is_a_checkpoint(stock, processor, tmp_path):
    model, compressed = foveate.compress(stock, processor, "metacompress", keep_ratio=0.25)
    model.save_pretrained(tmp_path)
    compressed.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    found = logits_of(loaded, AutoProcessor.from_pretrained(tmp_path))
    torch.testing.assert_close(found, logits_of(model, compressed))


def test_uncompress_leaves_nothing_behind(stock, processor):
    model, compressed = foveate.compress(stock, processor, "metacompress", keep_ratio=0.25)
    again, stock_processor = foveate.uncompress(model, compressed)
    assert type(again) is type(stock) and type(stock_processor) is type(processor)
    assert again.state_dict().keys() == stock.state_dict().keys()
    assert again.config.to_dict() == stock.config.to_dict()
    assert torch.equal(logits_of(again, stock_processor), logits_of(stock, processor))
    assert model.model.compressor is not None, "and the compressed model goes on"


def test_adapters_stay_around_it(stock, processor):
    adapted = get_peft_model(stock, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model, compressed = foveate.compress(adapted, processor, "sample", keep_ratio=0.25)
    assert type(model) is type(adapted)
    with model.disable_adapter():
        plain = logits_of(model, compressed)
    found = logits_of(model, compressed)
    assert not torch.equal(found, plain), "the adapters are read"
    merged, _ = foveate.compress(adapted.merge_and_unload(), None, "sample", keep_ratio=0.25)
    torch.testing.assert_close(found, logits_of(merged, compressed), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("how", ["offloaded", "dispatched"])
def test_weights_may_lie_elsewhere(stock, processor, how, tmp_path):
    model, compressed = foveate.compress(stock, processor, "sample", keep_ratio=0.25)
    expected = logits_of(model, compressed)
    if how == "offloaded":
        cpu_offload(stock, execution_device=torch.device("cpu"))
    else:
        parts = dict.fromkeys(["model.vision_tower", "model.multi_modal_projector", "lm_head"], "cpu")
        parts["model.language_model"] = "disk"
        dispatch_model(stock, parts, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    elsewhere, _ = foveate.compress(stock, None, "sample", keep_ratio=0.25)
    assert torch.equal(logits_of(elsewhere, compressed), expected)


def test_quantised_weights_stay_quantised(base, processor):
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["vision_tower", "lm_head"])
    stock = AutoModelForImageTextToText.from_pretrained(base, quantization_config=quantised).eval()
    model, compressed = foveate.compress(stock, processor, "metacompress", keep_ratio=0.25)
    layer = model.model.language_model.layers[0].self_attn.q_proj
    assert layer is stock.model.language_model.layers[0].self_attn.q_proj and type(layer).__name__ == "Linear4bit"
    assert torch.isfinite(logits_of(model, compressed)).all()


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ({"method": "sampel"}, "There is no method 'sampel'"),
            ({"method": "qg-vtc"}, "needs more than a loaded model"),
            ({"keep_ratio": 0}, "keep_ratio must be"),
            ({"settings": {"seeds": 1}}, "Unknown compression setting 'seeds'"),
        ],
    )
    def test_wrong_settings(self, stock, arguments, sentence):
        with pytest.raises(FoveateError, match=sentence):
            foveate.compress(stock, **arguments)

    def test_a_model_without_images(self):
        tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
        with pytest.raises(FoveateError, match="it is no vision-language model"):
            foveate.compress(BertModel(tiny))

    def test_a_model_without_a_head(self, base):
        with pytest.raises(FoveateError, match="no head to generate with"):
            foveate.compress(AutoModel.from_pretrained(base))

    def test_what_is_no_model(self):
        with pytest.raises(FoveateError, match="no model of Transformers"):
            foveate.compress(torch.nn.Linear(2, 2))

    def test_twice(self, stock):
        model, _ = foveate.compress(stock)
        with pytest.raises(FoveateError, match="compressed already"):
            foveate.compress(model)

    def test_what_is_not_compressed(self, stock):
        with pytest.raises(FoveateError, match="nothing to undo"):
            foveate.uncompress(stock)

    @pytest.mark.skipif(not stock_families(), reason="4.57 has no doors")
    def test_a_processor_that_writes_placeholders_in_a_way_of_its_own(self):
        family = FAMILIES["idefics2"]
        with pytest.raises(FoveateError, match="takes the model alone"):
            foveate.compress(make_stock_model(family), family.make_processor())
