"""The guided vision tower against its slow reference, and what it promises of cost and gradients."""

from itertools import pairwise

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from foveate.configuration.qgvtc import QGVTCSettings
from foveate.modeling.compatibility import clip_embeddings, clip_layers
from foveate.modeling.layers.clip import choose_tokens, straight_through_gate
from foveate.modeling.methods.qgvtc_algorithm import encode_crops, token_schedule

from .reference_qgvtc import encode as reference


NUM_PATCHES, WIDTH, DEPTH = 16, 32, 8
LAYERS = [2, 4, 5]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def tower(request):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        attn_implementation=request.param,
    )
    tower = CLIPVisionModel(config).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # the usual start makes attention nearly even
    return tower


@pytest.fixture
def images():
    return torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def text_class():
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2))


def settings_with(number=5, layers=LAYERS, **changes):
    return QGVTCSettings(num_visual_tokens=number, layers=layers, **changes)


def test_the_papers_schedule():
    assert token_schedule(576, 72, 6) == [492, 408, 324, 240, 156, 72]


@pytest.mark.parametrize("num_patches", [9, 144, 576])
@pytest.mark.parametrize("number", [1, 5, 9])
@pytest.mark.parametrize("num_steps", [1, 3, 6])
def test_every_schedule_falls_in_equal_steps_and_ends_on_the_budget(num_patches, number, num_steps):
    left = [num_patches, *token_schedule(num_patches, number, num_steps)]
    steps = [before - after for before, after in pairwise(left)]
    assert left[-1] == number
    assert max(steps) - min(steps) <= 1


@torch.no_grad()
@pytest.mark.parametrize("recycle", [True, False])
@pytest.mark.parametrize("guidance", ["question", "cls"])
def test_it_computes_what_the_reference_computes(tower, images, text_class, guidance, recycle):
    settings = settings_with(guidance=guidance, recycle=recycle)
    counts = token_schedule(NUM_PATCHES, 5, len(LAYERS))
    text = text_class if guidance == "question" else None
    found = encode_crops(tower, images, settings, DEPTH - 1, text)
    for index, embeddings in enumerate(clip_embeddings(tower, images)):
        guide = None if text is None else text[index]
        expected, positions = reference(clip_layers(tower)[: DEPTH - 1], embeddings, LAYERS, counts, guide, recycle)
        assert found.positions[index].tolist() == positions
        torch.testing.assert_close(found.features[index], expected, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_an_image_without_a_question_is_guided_by_its_class_token(tower, images, text_class):
    has_question = torch.tensor([True, False, True])
    mixed = encode_crops(tower, images, settings_with(), DEPTH - 1, text_class, has_question)
    asked = encode_crops(tower, images, settings_with(), DEPTH - 1, text_class)
    unasked = encode_crops(tower, images, settings_with(guidance="cls"), DEPTH - 1)
    for index, expected in enumerate([asked, unasked, asked]):
        assert torch.equal(mixed.positions[index], expected.positions[index])
        torch.testing.assert_close(mixed.features[index], expected.features[index], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_each_layer_runs_on_the_tokens_that_are_left_and_the_last_is_never_run(tower, images, text_class):
    """Counted where every layer passes: its MLP."""
    seen = {}
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, index=index: seen.update({index: args[0].shape[1]}))
        for index, layer in enumerate(clip_layers(tower))
    ]
    encode_crops(tower, images, settings_with(), DEPTH - 1, text_class)
    for hook in hooks:
        hook.remove()
    after = dict(zip(LAYERS, token_schedule(NUM_PATCHES, 5, len(LAYERS))))
    expected, number = {}, NUM_PATCHES
    for index in range(DEPTH - 1):
        number = after.get(index, number)
        expected[index] = number + 1  # and the class token
    assert seen == expected


@torch.no_grad()
@pytest.mark.parametrize("recycle", [True, False])
def test_attention_weights_are_made_at_compressing_layers_only_for_the_kept_rows(
    tower, images, text_class, recycle, monkeypatch
):
    made = []
    import foveate.modeling.methods.qgvtc_algorithm as encoder

    original = encoder.attention_rows
    monkeypatch.setattr(encoder, "attention_rows", lambda q, k: made.append((q.shape[2], k.shape[2])) or original(q, k))
    encode_crops(tower, images, settings_with(recycle=recycle), DEPTH - 1, text_class)
    left = [NUM_PATCHES, *token_schedule(NUM_PATCHES, 5, len(LAYERS))]
    assert made == ([(after + 1, before + 1) for before, after in pairwise(left)] if recycle else [])


def test_the_gate_changes_no_value_and_brings_the_gradient_to_the_correlation():
    tokens = torch.randn(2, 5, 8)
    correlation = torch.rand(2, 5, requires_grad=True)
    gated = straight_through_gate(tokens, correlation)
    assert torch.equal(gated, tokens)
    gated.square().sum().backward()
    share = (correlation / correlation.sum(-1, keepdim=True)).detach()
    by_share = 2 * tokens.square().sum(-1)  # the derivative by a token's factor
    expected = (by_share - (by_share * share).sum(-1, keepdim=True)) / correlation.detach().sum(-1, keepdim=True)
    torch.testing.assert_close(correlation.grad, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_reaches_the_question_through_the_tower(tower, images, text_class, checkpointing):
    asked = text_class.clone().requires_grad_()
    with_gate = encode_crops(
        tower, images, settings_with(), DEPTH - 1, asked, checkpoint_activations=checkpointing
    ).features
    with torch.no_grad():
        without = encode_crops(tower, images, settings_with(), DEPTH - 1, text_class).features
    torch.testing.assert_close(with_gate, without)
    with_gate.square().sum().backward()
    assert (asked.grad.abs().sum(-1) > 0).all()


def test_padding_is_kept_only_where_there_is_nothing_else():
    correlation = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    kept, discarded = choose_tokens(correlation, 2, torch.tensor([[False, True, False, True]]))
    assert kept.tolist() == [[1, 3]]
    assert discarded.tolist() == [[0, 2]]
    kept, _ = choose_tokens(correlation, 3, torch.tensor([[False, True, False, True]]))
    assert kept.tolist() == [[0, 1, 3]]


@torch.no_grad()
def test_at_a_budget_of_all_patches_it_is_the_stock_tower(tower, images, text_class):
    stock = tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    found = encode_crops(tower, images, settings_with(NUM_PATCHES), DEPTH - 1, text_class)
    torch.testing.assert_close(found.features, stock, atol=1e-5, rtol=1e-5)
