"""Contract 5–10 on the forward pass: attention kernels, identity, budgets, provenance, gradients, bad input."""

import copy
import dataclasses
import itertools
import re

import accelerate
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from foveate.modeling.compatibility import TRANSFORMERS_5, cache_of, visual_tokens_of

from ..helpers.batches import ROWS, Row, images_in, picture, prompt_for
from ..helpers.checkpointing import checkpoint_activations


pytestmark = pytest.mark.contract_core


def logits_of(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def has_ratio(config) -> bool:
    """Whether a share of an image's tokens says how many are left."""
    try:
        return bool(config.compression.settings_for_ratio(0.5, config))
    except ValueError:
        return False


def has_tiles_of(config) -> int | None:
    """Patches of each picture that the vision tower sees of an image, at least about; `None`: an image has its own."""
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2 if hasattr(vision, "image_size") else None


def at_text(inputs, model):
    """Columns with a text token of the caller's: there logical and physical agree."""
    return inputs["attention_mask"].bool() & (inputs["input_ids"] != model.config.image_token_id)


def test_batched_logits_equal_single_ones(model, inputs_of):
    batch = inputs_of(*ROWS)
    together = logits_of(model, batch)
    for index, row in enumerate(ROWS):
        single = inputs_of(row)
        length = single["input_ids"].shape[1]
        text = at_text(single, model)[0]
        torch.testing.assert_close(
            together[index, -length:][text], logits_of(model, single)[0][text], atol=1e-5, rtol=1e-5
        )


def test_right_padding_gives_the_same_logits(model, processor, inputs_of):
    rows = ROWS[:3]
    left = inputs_of(*rows)
    right = processor(
        images=[list(row.images) for row in rows],
        text=[prompt_for(processor, row.prompt) for row in rows],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    assert not torch.equal(left["input_ids"], right["input_ids"])
    torch.testing.assert_close(
        logits_of(model, left)[at_text(left, model)],
        logits_of(model, right)[at_text(right, model)],
        atol=1e-5,
        rtol=1e-5,
    )


def test_eager_and_sdpa_agree(checkpoint, model, inputs_of):
    eager = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    inputs = inputs_of(*ROWS)
    text = at_text(inputs, model)
    torch.testing.assert_close(logits_of(eager, inputs)[text], logits_of(model, inputs)[text], atol=1e-5, rtol=1e-5)


def test_no_method_asks_for_attention_matrices(model, inputs_of, monkeypatch):
    """FlashAttention can't give them; a request anywhere in the model shows as `output_attentions=True`."""
    asked = []
    for module in model.modules():
        module.register_forward_pre_hook(
            lambda _, args, kwargs: asked.append(kwargs.get("output_attentions")), with_kwargs=True
        )
    logits_of(model, inputs_of(*ROWS))
    assert asked
    assert not any(asked)


@pytest.fixture
def like_the_stock_model(method_and_backbone):
    method, _ = method_and_backbone
    if not method.equals_stock:
        pytest.skip("it promises to be like no stock model; what it is instead: tests/modeling")


@pytest.mark.usefixtures("like_the_stock_model")
def test_at_a_budget_of_all_tokens_the_logits_are_the_stock_models(base_folder, model, processor, inputs_of):
    stock = AutoModelForImageTextToText.from_pretrained(base_folder, dtype=torch.float32).eval()
    compressed = logits_of(model, inputs_of(*ROWS))
    model.set_compression(processor, keep_ratio=1.0)
    inputs = inputs_of(*ROWS)
    ours = logits_of(model, inputs)
    theirs = logits_of(stock, {k: v for k, v in inputs.items() if not k.startswith("question")})
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(compressed[:, -1], theirs[:, -1], atol=1e-3), "without the budget something is compressed"


def test_bf16_follows_fp32(checkpoint, model, processor, inputs_of):
    half = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    if has_ratio(model.config):
        model.set_compression(processor, keep_ratio=1.0)  # the choice of patches may tip over
        half.set_compression(keep_ratio=1.0)
    inputs = inputs_of(*ROWS)
    text = at_text(inputs, model)
    expected, found = logits_of(model, inputs)[text], logits_of(half, inputs.to(torch.bfloat16))[text].float()
    assert (expected - found).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("budget", [1, 4, 9])
def test_the_budget_can_be_changed_on_model_and_processor_by_one_call(model, processor, inputs_of, budget):
    model.set_compression(processor=processor, num_visual_tokens=budget)
    inputs = inputs_of(ROWS[2])
    with torch.no_grad():
        output = model(**inputs, output_compression=True)
    for image in output.compression:
        num_tiles = image.weights.shape[1] // (has_tiles_of(model.config) or image.weights.shape[1])
        num_tokens = len(image.weights)  # with newline tokens, where images are cut into tiles
        if model.config.num_patches is None:  # an image may have fewer
            budget = model.config.compression.count_tokens(image.weights.shape[1])
        assert num_tokens == budget if num_tiles == 1 else num_tokens >= budget
        made_of_patches = int((image.weights.sum(1) > 0).sum())
        assert made_of_patches == budget if num_tiles == 1 else made_of_patches <= budget * num_tiles
    num_tokens = sum(len(image.weights) for image in output.compression)
    assert visual_tokens_of(output).shape[0] == num_tokens
    num_text = int(at_text(inputs, model).sum())
    assert cache_of(output).layers[0].keys.shape[2] == num_text + num_tokens


def test_keep_ratio_is_a_share_of_the_tokens(model, processor, inputs_of):
    counts = []
    if not has_ratio(model.config):
        with pytest.raises(ValueError, match="set num_visual_tokens"):
            model.set_compression(processor, keep_ratio=0.5)
        return
    for keep_ratio in (1.0, 0.5):
        model.set_compression(processor, keep_ratio=keep_ratio)
        counts.append(int((inputs_of(ROWS[0])["input_ids"] == model.config.image_token_id).sum()))
        with torch.no_grad():
            output = model(**inputs_of(ROWS[0]), output_compression=True)
        kept = int((output.compression[0].weights.sum(1) > 0).sum())
        assert kept <= round(keep_ratio * output.compression[0].weights.shape[1])
    assert counts[1] <= counts[0]
    model.set_compression(processor, num_visual_tokens=4)  # one budget takes the place of the other
    inputs_of(ROWS[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_visual_tokens": 10_000}, r"(patches|compressed token\(s\)): choose at most"),
        ({"num_visual_tokens": 0}, "at least 1"),
        ({"keep_ratio": 1.5}, "keep_ratio"),
        ({"keep_ratio": "half"}, "keep_ratio"),
        ({"no_such_setting": 1}, "no_such_setting"),
    ],
)
def test_a_bad_setting_is_refused_and_changes_nothing(model, change, message):
    before = model.config.compression.to_dict()
    if (
        "num_visual_tokens" in change
        and model.config.compression.largest_budget(model.config) is None
        and change["num_visual_tokens"] > 0
    ):
        return  # whatever an image has, another may have more
    with pytest.raises(ValueError, match=message):
        model.set_compression(**change)
    assert model.config.compression.to_dict() == before


@pytest.mark.usefixtures("like_the_stock_model")
def test_provenance_says_what_the_tokens_are_made_of(method_and_backbone, checkpoint, inputs_of):
    """The weights over the patches give back the very tokens, in a vision tower whose layers change nothing: there a
    token is just a sum of patches, wherever in the tower a method compresses."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    if model.config.num_patches is None:  # the vision tower merges patches itself
        check_provenance_of_visual_tokens(model, inputs_of(*ROWS))
        return
    for name, parameter in model.model.vision_tower.named_parameters():
        if ".out_proj." in name or ".fc2." in name:
            torch.nn.init.zeros_(parameter)
    inputs = inputs_of(*ROWS)
    with torch.no_grad():
        output = model(**inputs, output_compression=True)
        assert model(**inputs).compression is None, "it costs nothing when not asked for"
        patches = model.model.vision_tower(tiles_of(inputs["pixel_values"])).last_hidden_state[:, 1:]
        tokens = visual_tokens_of(output).split([len(image.weights) for image in output.compression])
        patches = patches.flatten(0, 1).split([image.weights.shape[1] for image in output.compression])
        project, newline = model.model.multi_modal_projector, getattr(model.model, "image_newline", None)
        for image, found, features in zip(output.compression, tokens, patches):
            made_of_patches = image.weights.sum(1) > 0
            if method_and_backbone[0].kind == "sequence":  # compressed after the projector
                expected = image.weights @ project(features)
                if newline is not None:  # what is of no patch is of newlines
                    expected = expected + (1 - image.weights.sum(1, keepdim=True)) * newline
            else:
                expected = project(image.weights @ features)
            torch.testing.assert_close(found[made_of_patches], expected[made_of_patches], atol=1e-5, rtol=1e-5)
            assert made_of_patches.any()
            assert (image.weights >= 0).all()
            assert image.roles.max() < len(image.role_names)
    if output.compression[0].steps:
        for image in output.compression:
            kept = [set(patches.tolist()) for _, patches in image.steps]
            assert all(later < earlier for earlier, later in itertools.pairwise(kept))


def check_provenance_of_visual_tokens(model, inputs):
    """Where patches are merged before the language model, weights are over the merged ones."""
    with torch.no_grad():
        output = model(**inputs, output_compression=True)
        read = model.model.read_images(inputs)
    features = read.tokens.split(read.lengths)
    tokens = visual_tokens_of(output).split([len(image.weights) for image in output.compression])
    for image, found, merged in zip(output.compression, tokens, features, strict=True):
        torch.testing.assert_close(found, image.weights @ merged, atol=1e-5, rtol=1e-5)
        assert image.roles.max() < len(image.role_names)


def tiles_of(pixel_values):
    """(tiles of all images, 3, height, width); where images are cut into tiles, absent ones are all zeros."""
    if pixel_values.dim() == 4:
        return pixel_values
    flat = pixel_values.flatten(0, 1)
    return flat[flat.flatten(1).any(1)]


def test_the_question_reaches_the_compression_of_its_own_images_and_no_others(method_and_backbone, model, inputs_of):
    """Eight pictures asked two questions, each beside a row that stays the same; without a guide it reaches none."""
    changed = []
    for seed in range(8):
        found = []
        for words in ("what is it", "colour it colour it"):
            row = Row(f"USER: <image> {words} ASSISTANT:", (picture(100 + seed),))
            with torch.no_grad():
                found.append(model(**inputs_of(row, ROWS[2]), output_compression=True).compression)
        own, *others = [[image.weights for image in images] for images in zip(*found)]
        changed.append(own[0].shape != own[1].shape or not torch.allclose(*own, atol=1e-5))
        for before, after in others:
            torch.testing.assert_close(before, after, atol=1e-6, rtol=1e-6)
    assert any(changed) == method_and_backbone[0].reads_question


def test_labels_at_text_columns_give_the_loss_of_the_text(model, inputs_of):
    """The loss runs on the tokens that are there; shifted logits of the logical layout say the same for text."""
    inputs = inputs_of(*ROWS)
    labels = inputs["input_ids"].masked_fill(~at_text(inputs, model), -100)
    labels[:, :-3] = -100
    with torch.no_grad():
        output = model(**inputs, labels=labels)
    shifted = output.logits[:, :-1].reshape(-1, output.logits.shape[-1])
    expected = torch.nn.functional.cross_entropy(shifted, labels[:, 1:].reshape(-1), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainable_parameters_get_a_gradient_and_frozen_ones_none(checkpoint, inputs_of, checkpointing):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).train()
    frozen = ("vision_tower", "visual.", "question_encoder")
    if checkpointing:
        checkpoint_activations(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
        if "compressor" in name and not parameter.any():  # zero, so that untrained it changes nothing: no way through
            torch.nn.init.normal_(parameter, std=0.02)
    inputs = inputs_of(*ROWS)
    model(**inputs, labels=inputs["input_ids"].masked_fill(~at_text(inputs, model), -100)).loss.backward()
    trained = ["multi_modal_projector", "language_model", "compressor"]
    names = [name for name in trained if hasattr(model.model, name)]
    names += [] if model.config.tie_word_embeddings else ["lm_head"]
    for name in names:
        gradients = [p.grad for n, p in model.named_parameters() if name in n]
        assert gradients
        assert all(g is not None and g.abs().sum() > 0 for g in gradients), name
    assert all(p.grad is None for n, p in model.named_parameters() if any(part in n for part in frozen))


def test_lora_wraps_trains_and_generates(checkpoint, inputs_of):
    peft = pytest.importorskip("peft")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    wrapped = peft.get_peft_model(model, lora)
    inputs = inputs_of(*ROWS)
    wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in wrapped.parameters())
    output = wrapped.generate(**inputs, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.fixture
def offloadable(model):
    """A model whose base can leave its weights elsewhere."""
    if not TRANSFORMERS_5 and hasattr(model.model, "visual"):
        pytest.skip("the Qwen3-VL of Transformers 4.57 mixes up weights that are offloaded")
    return model


def test_accelerate_places_the_parts_and_leaves_some_on_disk(checkpoint, offloadable, inputs_of, tmp_path):
    """Where memory is short: no block is split, and what is fetched when it is needed gives the same."""
    limit = sum(parameter.nbytes for parameter in offloadable.parameters()) * 3 // 4
    offloaded = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float32, device_map="auto", max_memory={"cpu": limit}, offload_folder=tmp_path
    ).eval()
    assert "disk" in offloaded.hf_device_map.values()
    inputs = inputs_of(*ROWS)
    text = at_text(inputs, offloadable)
    torch.testing.assert_close(logits_of(offloaded, inputs)[text], logits_of(offloadable, inputs)[text])
    found, expected = (part.generate(**inputs, max_new_tokens=3, pad_token_id=0) for part in (offloaded, offloadable))
    assert torch.equal(found, expected)


def test_every_part_is_found_on_disk(checkpoint, offloadable, inputs_of, tmp_path):
    """What compresses, too: by its modules' forward, where accelerate fetches weights. (Generation is left out, for
    Transformers' own LLaVA-NeXT asks for its newline outside of it.)"""
    stored = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    stored = accelerate.disk_offload(stored, tmp_path)
    assert all(parameter.is_meta for parameter in stored.parameters())
    inputs = inputs_of(*ROWS)
    text = at_text(inputs, offloadable)
    torch.testing.assert_close(logits_of(stored, inputs)[text], logits_of(offloadable, inputs)[text])


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_loads_and_generates(checkpoint, inputs_of, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
    )
    quantized = [name for name, part in model.named_modules() if type(part).__module__.startswith("bitsandbytes")]
    assert "model.language_model.layers.0.mlp.up_proj" in quantized
    left_out = [name for name in quantized if set(name.split(".")) & {*model.full_precision, "lm_head"}]
    assert not left_out, "what sees and what compresses stays as it is"
    inputs = inputs_of(*ROWS).to(torch.bfloat16)
    output = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 3


def test_torchao_loads_and_generates(checkpoint, inputs_of):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.bfloat16, device_map="cpu"
    )
    quantized = [name for name, weight in model.named_parameters() if type(weight).__module__.startswith("torchao")]
    assert "model.language_model.layers.0.mlp.up_proj.weight" in quantized
    left_out = [name for name in quantized if set(name.split(".")) & {*model.full_precision, "lm_head"}]
    assert not left_out, "what sees and what compresses stays as it is"
    inputs = inputs_of(*ROWS).to(torch.bfloat16)
    output = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 3


def test_placeholders_and_images_that_differ_are_refused(model, inputs_of):
    inputs = inputs_of(ROWS[0])
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    for wrong in (places, places[-1:]):  # all of them, as in a prompt without an image, or one too few
        broken = copy.deepcopy(inputs["input_ids"])
        broken[0, wrong] = 5
        with pytest.raises(ValueError, match="placeholder"):
            model(**{**inputs, "input_ids": broken})


def test_images_and_placeholders_that_differ_are_refused_by_the_processor(processor):
    with pytest.raises(ValueError, match=rf"one {re.escape(processor.image_token)} for every image"):
        processor(images=[picture(0), picture(1)], text=prompt_for(processor, "USER: <image> what ASSISTANT:"))


def test_an_image_compressed_once_stands_for_itself_from_then_on(model, processor, inputs_of, tmp_path):
    """From a file, in any question; where its text and those of other rows are what they were."""
    inputs = inputs_of(*ROWS)
    if not model.config.compression.keeps_images:
        with pytest.raises(ValueError, match="for one question"):
            model.compress(**inputs)
        return
    made = model.compress(**inputs)
    for index, image in enumerate(made):
        image.save(tmp_path / f"{index}.safetensors")
        assert (tmp_path / f"{index}.safetensors").stat().st_size < image.num_bytes + 2000
    loaded = [type(image).load(tmp_path / f"{index}.safetensors") for index, image in enumerate(made)]
    rest = iter(loaded)
    again = processor(
        images=[[next(rest) for _ in row.images] for row in ROWS],
        text=[prompt_for(processor, row.prompt) for row in ROWS],
        padding=True,
        return_tensors="pt",
    )
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    assert not images_in(model, again).keys() & {"pixel_values"}
    text = at_text(inputs, model)
    torch.testing.assert_close(logits_of(model, again)[text], logits_of(model, inputs)[text], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="compressed by another model"):
        model(**{**again, "compressed_images": [dataclasses.replace(image, method="other") for image in loaded]})
    with pytest.raises(ValueError, match="not a compressed image"):
        (tmp_path / "broken").write_bytes(b"nothing")
        type(loaded[0]).load(tmp_path / "broken")
    with pytest.raises(ValueError, match="not both at once"):
        processor(images=[loaded[0], picture(0)], text=prompt_for(processor, "<image> <image>"))


def test_processor_round_trip_keeps_everything(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again).__name__ == type(processor).__name__
    row = ROWS[2]
    prompt = prompt_for(processor, row.prompt)
    first = processor(images=list(row.images), text=prompt, return_tensors="pt")
    second = again(images=list(row.images), text=prompt, return_tensors="pt")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
