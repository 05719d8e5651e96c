"""LLaVA-1.5 and LLaVA-NeXT with a SigLIP tower, which has no class token."""

import pytest
import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

import foveate

from ..helpers.batches import picture
from ..helpers.tiny_families import make_prompt, make_tokenizer


SIDE, PATCH = 24, 4


@pytest.fixture(params=["llava", "llava_next"])
def stock(request):
    tokenizer = make_tokenizer({"image_token": "<image>"})
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    common = {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    counts = {"patch_size": PATCH, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    torch.manual_seed(0)
    if request.param == "llava":
        config, model_class = LlavaConfig(**common), LlavaForConditionalGeneration
        square = {"height": SIDE, "width": SIDE}
        images = SiglipImageProcessor(size=square)
        images.crop_size = square
        processor = LlavaProcessor(images, tokenizer, **counts)
    else:
        pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
        config, model_class = (
            LlavaNextConfig(**common, image_grid_pinpoints=pinpoints),
            LlavaNextForConditionalGeneration,
        )
        images = LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints
        )
        processor = LlavaNextProcessor(images, tokenizer, **counts)
    return model_class(config).eval(), processor


def batch(stock_processor, processor):
    text = [make_prompt(stock_processor, 1, "what is this"), make_prompt(stock_processor, 1, "where")]
    return processor(text=text, images=[picture(0), picture(1, (40, 90))], padding=True, return_tensors="pt")


def test_with_all_tokens_it_is_the_stock_model(stock):
    model, processor = foveate.compress(*stock, "sample", keep_ratio=1.0)
    inputs, expected = batch(stock[1], processor), batch(stock[1], stock[1])
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock[0](**expected).logits)


def test_a_checkpoint_runs_at_a_budget(stock, tmp_path):
    base = tmp_path / "base"
    stock[0].save_pretrained(base)
    stock[1].save_pretrained(base)
    model, processor = foveate.compress(*stock, "sample", keep_ratio=0.25)
    inputs = batch(stock[1], processor)
    features = model.get_image_features(**{name: inputs[name] for name in model.model.visual_inputs})
    placeholders = int((inputs["input_ids"] == stock[0].config.image_token_id).sum())
    assert sum(len(tokens) for tokens in getattr(features, "pooler_output", features)) == placeholders
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 2
