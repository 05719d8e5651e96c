"""ETC's objective against a slow reference, who trains, and what is left of the decoder."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from foveate import FoveateError, convert
from foveate.training.data import Collator, Example
from foveate.training.recipe import AuxiliaryRecipe, make_stage, read_stage
from foveate.training.train import train
from foveate.training.visual_distillation import (
    VisualDecoder,
    VisualDistillation,
    distillation_loss,
    looked_at,
    position_code,
    stretch,
)

from ..helpers.batches import picture
from ..helpers.checkpointing import checkpoint_activations
from ..helpers.tiny_checkpoints import write_llava, write_qwen3_vl
from ..helpers.training_runs import Watch


M = 2
EXAMPLES = (
    Example("a", "what is it", "red", (picture(0),), (("is it red", "it is red"),)),
    Example("b", "what colour is it", "it is", (picture(1, (30, 90)),)),
    Example("c", "is it red", "it is it", (picture(2, (100, 20)), picture(3)), (("what", "red"),)),
)


@pytest.fixture(scope="module", params=[write_llava, write_qwen3_vl], ids=["llava", "qwen3_vl"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("etc")
    base = request.param(folder / "base", dtype=torch.float32)
    out = convert(base, folder / "out", "etc", settings={"num_visual_tokens": M})
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    return SimpleNamespace(folder=out, model=model, processor=AutoProcessor.from_pretrained(out))


@pytest.fixture
def batch(made):
    return Collator(made.processor, max_length=1000)(EXAMPLES)


@pytest.mark.parametrize("layer", [-1, 1])
def test_the_loss_is_what_a_slow_reference_says(made, batch, layer):
    """Image by image, from the queries and keys that the layer itself makes."""
    torch.manual_seed(0)
    model = made.model.train()
    recipe = AuxiliaryRecipe(weight=0.01, alpha=0.6, layer=layer, rank=4)
    VisualDistillation.prepare(model, recipe)
    objective = VisualDistillation(model, recipe)
    loss = objective(model, batch)

    layers, taken = model.model.language_model.layers, {}
    attention = layers[objective.layer - 1].self_attn

    def keep_states(_, args, kwargs):
        taken["input"], taken["rotary"] = kwargs["hidden_states"], kwargs["position_embeddings"]

    hook = attention.register_forward_pre_hook(keep_states, with_kwargs=True)
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    hook.remove()
    states = output.hidden_states[objective.layer]
    total, number = 0.0, 0
    for row in range(len(EXAMPLES)):
        is_image = batch["input_ids"][row] == model.config.image_token_id
        edges = (torch.cat([torch.tensor([False]), is_image, torch.tensor([False])]).long().diff()).nonzero()[:, 0]
        ends = edges[1::2].tolist()
        starts = edges[::2].tolist()
        lengths = model.count_placeholders({k: batch[k] for k in model.image_inputs if k in batch}).tolist()
        if len(starts) == 1 and len(EXAMPLES[row].images) == 2:  # one beside the other
            middle = starts[0] + lengths[number]
            starts, ends = [starts[0], middle], [middle, ends[0]]
        for start, end in zip(starts, ends):
            visual, compressed = torch.arange(start, end - M), torch.arange(end - M, end)
            text = [
                column
                for column in range(end, len(is_image))
                if batch["attention_mask"][row, column] and not is_image[column]
            ]
            weights = torch.zeros(len(visual))
            for query in text:
                weights += _attention(attention, taken, row, query, visual)
            weights = weights / len(text)
            weights = (weights - weights.min()) / (weights.max() - weights.min())
            target = (0.4 + 0.6 * weights)[:, None] * states[row, visual]
            mean = model.auxiliary(states[row, compressed][None], torch.tensor([len(visual)]))[0]
            variance = torch.nn.functional.softplus(model.auxiliary.s) + 1e-6
            terms = 0.5 * variance.log() + (target - mean) ** 2 / (2 * variance)
            total, number = total + float(terms.sum().detach()), number + 1
    assert number == 4
    expected = float(output.loss) + 0.01 * total / number
    torch.testing.assert_close(float(loss.detach()), expected, atol=1e-4, rtol=1e-4)
    del model.auxiliary


def _attention(attention, taken, row, query, visual):
    """Of one query to the visual tokens alone, the mean over heads."""
    hidden, (cosines, sines) = taken["input"][row], taken["rotary"]
    cosines, sines = (table.expand(len(taken["input"]), -1, -1)[row] for table in (cosines, sines))
    head_width = attention.head_dim

    def rotated(name, column):
        vector = getattr(attention, f"{name}_proj")(hidden[column]).view(-1, head_width)
        if hasattr(attention, f"{name}_norm"):
            vector = getattr(attention, f"{name}_norm")(vector)
        first, second = vector.chunk(2, dim=-1)
        return vector * cosines[column] + torch.cat([-second, first], dim=-1) * sines[column]

    with torch.no_grad():
        asking = rotated("q", query)
        keys = torch.stack([rotated("k", int(column)) for column in visual])
        keys = keys.repeat_interleave(len(asking) // keys.shape[1], dim=1)
        scores = (asking[None] * keys).sum(-1) / head_width**0.5
        return scores.softmax(0).mean(1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["vid", "mse", "none"])
def test_all_that_trains_gets_a_gradient(made, batch, kind, checkpointing):
    model = made.model.train()
    model.requires_grad_(False)
    model.model.compressor.requires_grad_(True)
    if checkpointing:
        checkpoint_activations(model)
    recipe = AuxiliaryRecipe(loss=kind, weight=0.1)
    VisualDistillation.prepare(model, recipe)
    VisualDistillation(model, recipe)(model, batch).backward()
    if checkpointing:
        checkpoint_activations(model, enabled=False)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    decoder = {f"auxiliary.{part}" for part in ("narrow.weight", "narrow.bias", "widen.weight", "widen.bias", "s")}
    assert gradients.keys() == {"model.compressor.embeddings"} | (decoder if kind != "none" else set())
    assert gradients["model.compressor.embeddings"].abs().sum() > 0
    model.zero_grad()
    if kind != "none":
        del model.auxiliary


def test_the_target_gets_no_gradient(made, batch):
    """With the answers' loss away and the decoder's output cut, nothing is left to learn from."""
    model = made.model.train()
    model.requires_grad_(True)
    recipe = AuxiliaryRecipe(weight=1.0)
    VisualDistillation.prepare(model, recipe)
    torch.nn.init.zeros_(model.auxiliary.widen.weight)
    model.auxiliary.widen.weight.requires_grad_(False)
    inputs = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    inputs["labels"][0, -1] = 1  # one answer token: a loss of none is no number
    objective = VisualDistillation(model, recipe)
    loss = objective(model, inputs)
    auxiliary = loss - model(**inputs).loss
    auxiliary.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-5}
    assert grads.keys() == {"auxiliary.widen.bias", "auxiliary.s"}
    model.zero_grad()
    del model.auxiliary


def test_the_terms():
    tokens = torch.tensor([[[0.0], [2.0]], [[1.0], [3.0]]])
    assert stretch(tokens, torch.tensor([5, 2]))[0, :, 0].tolist() == [0, 0.5, 1, 1.5, 2]
    assert stretch(tokens, torch.tensor([5, 2]))[1, :2, 0].tolist() == [1, 3]
    assert stretch(tokens[:, :1], torch.tensor([3, 1]))[0, :, 0].tolist() == [0, 0, 0]
    code = position_code(4, 6, torch.device("cpu"))
    assert code.shape == (4, 6)
    assert code[0].tolist() == [0, 1, 0, 1, 0, 1]
    there = torch.tensor([[True, True, False]])
    found = looked_at(torch.tensor([[[0.1, 0.3, 0.0], [0.3, 0.5, 0.0], [9, 9, 9]]])[:, :2], there[:, :2], there)
    assert found.tolist() == [[0, 1, 0]]
    target, mean, lengths = torch.tensor([[[1.0], [2.0]], [[3.0], [99]]]), torch.zeros(2, 2, 1), torch.tensor([2, 1])
    assert distillation_loss(target, mean, None, lengths) == (5 / 2 + 9 / 2) / 2
    found = distillation_loss(target, mean, torch.tensor(4.0), lengths)
    by_hand = ((5 / 8 + 2 * torch.tensor(2.0).log()) + (9 / 8 + torch.tensor(2.0).log())) / 2
    torch.testing.assert_close(found, by_hand)
    assert VisualDecoder(6, 2)(torch.randn(2, M, 6), lengths).shape == (2, 2, 6)


@pytest.mark.parametrize(("aux", "data"), [("vid", "lab:16"), ("none", "lab:16")])
def test_training_from_the_recipe(made, aux, data, tmp_path):
    """The decoder trains beside the model and is in no checkpoint; what trained has changed."""
    settings = {
        "data": data,
        "max_steps": 2,
        "batch_size": 2,
        "auxiliary.loss": aux,
        "precision": "fp32",
        "workers": 0,
        "logging_steps": 1,
    }
    out = train("etc", made.folder, tmp_path / "out", settings=settings, progress=False)
    log = json.loads((out / "training_log.json").read_text())["log"]
    assert ("auxiliary" in log[0]) == (aux != "none")
    before, after = tensors_of(made.folder), tensors_of(out)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert any("compressor" in key for key in changed)
    assert any("language_model" in key and "mlp" in key for key in changed)
    assert not any("blocks" in key or "vision_model" in key for key in changed), "the tower is frozen"
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    assert not hasattr(model, "auxiliary")


@pytest.mark.parametrize("number", [1, 4])
def test_the_number_of_compressed_tokens_is_the_recipes(made, number, tmp_path):
    """Fewer than the checkpoint has, or more; what is written says so to the model and to the processor."""
    settings = {"data": "lab:16", "max_steps": 1, "batch_size": 2, "precision": "fp32", "workers": 0}
    settings |= {"num_visual_tokens": number, "learning_rate.compressor": 1e-9, "warmup_ratio": 0}
    out = train("etc", made.folder, tmp_path / "out", settings=settings, progress=False)
    model, info = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    found = model.config.compression
    assert (found.num_visual_tokens, found.trained_tokens) == (number, number)
    ours, theirs = (x.model.compressor.embeddings for x in (model, made.model))
    assert len(ours) == number
    torch.testing.assert_close(ours[:M], theirs[:number], atol=1e-6, rtol=1e-6)
    inputs = Collator(AutoProcessor.from_pretrained(out), max_length=1000)(EXAMPLES)
    with torch.no_grad():
        model(**inputs)
    assert made.model.config.compression.trained_tokens == M


def tensors_of(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def test_resumed_equals_unbroken(made, tmp_path):
    """The decoder's state, and that of two optimizers, are part of what training goes on from."""
    settings = {"data": "lab:16", "max_steps": 4, "batch_size": 2, "precision": "fp32", "workers": 0, "save_steps": 2}
    settings |= {"optimizer": "muon", "auxiliary.weight": 1e-2}
    whole = train("etc", made.folder, tmp_path / "whole", settings=settings, progress=False)
    with pytest.raises(KeyboardInterrupt):
        train("etc", made.folder, tmp_path / "out", settings=settings, progress=False, callbacks=[Watch(stop=3)])
    out = train("etc", made.folder, tmp_path / "out", settings=settings, progress=False, resume=True)
    expected, found = tensors_of(whole), tensors_of(out)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_the_recipes_have_the_papers_values():
    for base, lora, rate, batch, warmup in (("llava", None, 2e-5, 16, 0.03), ("qwen3_vl", (8, 32), 1e-4, 8, 0.05)):
        stage = read_stage("etc", 1, base_model_type=base)
        assert stage.auxiliary == AuxiliaryRecipe("vid", 1e-5, 0.6, -1, 8)
        assert set(stage.learning_rate.values()) == {rate}
        assert (stage.lora and (stage.lora.r, stage.lora.alpha)) == lora
        assert (stage.batch_size, stage.warmup_ratio, stage.weight_decay, stage.epochs) == (batch, warmup, 0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auxiliary.loss": "vd"}, "auxiliary.loss must be one of vid, mse, none"),
        ({"auxiliary.alpha": 1.5}, "auxiliary.alpha must be a number from 0 to 1"),
        ({"auxiliary.layer": 0}, "auxiliary.layer must be a whole number other than 0"),
        ({"auxiliary.rank": 0}, "auxiliary.rank must be at least 1"),
        ({"auxiliary.weight": -1}, "auxiliary.weight must be a number at least 0"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    block = {"title": "t", "learning_rate": {"compressor": 1e-3}, "batch_size": 1, "auxiliary": {}}
    with pytest.raises(FoveateError, match=message):
        make_stage(block, changes, "here")


def test_a_layer_that_is_not_there_is_refused(made):
    with pytest.raises(FoveateError, match=r"auxiliary.layer must be from 1 to"):
        VisualDistillation(made.model, AuxiliaryRecipe(layer=17))


def test_another_methods_training_takes_no_auxiliary_block(tmp_path):
    base = write_llava(tmp_path / "base", dtype=torch.float32)
    out = convert(base, tmp_path / "out", "metacompress", settings={"key_width": 16})
    with pytest.raises(FoveateError, match="`auxiliary`, which is of 'etc'"):
        train("metacompress", out, tmp_path / "trained", settings={"auxiliary.loss": "vid", "data": "lab:4"})
