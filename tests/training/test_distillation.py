"""MetaCompress's objective: teacher and student are one frozen model, and only the matrices' generator learns."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from foveate import FoveateError, convert
from foveate.lab.fixed_matrix import fit_matrix, retained
from foveate.training.data import Collator, Example
from foveate.training.distillation import (
    Distillation,
    collapse_loss,
    entropy_loss,
    expand_placeholders,
    prediction_loss,
    uncompressed,
)
from foveate.training.recipe import DistillationRecipe
from foveate.training.train import train

from ..helpers.batches import picture
from ..helpers.checkpointing import checkpoint_activations
from ..helpers.tiny_checkpoints import write_llava, write_llava_next
from ..helpers.training_runs import QUICK


#: Dialogues of several lengths, about images of several sizes, one of them about two.
EXAMPLES = (
    Example("a", "what is it", "red", (picture(0),), (("is it red", "it is red"),)),
    Example("b", "what colour is it", "it is", (picture(1, (30, 90)),)),
    Example("c", "is it red", "it is it", (picture(2, (100, 20)), picture(3)), (("what", "red"), ("is it", "it"))),
)
TEXT = ("input_ids", "attention_mask", "labels")


@pytest.fixture(scope="module", params=[write_llava, write_llava_next], ids=["llava", "llava_next"])
def distilled(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    base = request.param(folder / "base", dtype=torch.float32)
    out = convert(base, folder / "out", "metacompress", settings={"key_width": 16}, keep_ratio=0.3)
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    model.requires_grad_(False)
    model.model.compressor.requires_grad_(True)
    stock = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    return SimpleNamespace(folder=out, model=model, processor=AutoProcessor.from_pretrained(out), stock=stock)


@pytest.fixture
def batch(distilled):
    return Collator(distilled.processor, max_length=1000)(EXAMPLES)


def test_the_teacher_reads_what_the_uncompressed_processor_writes(distilled, batch):
    text = {name: batch[name] for name in TEXT}
    images = {name: value for name, value in batch.items() if name not in TEXT}
    found = expand_placeholders(distilled.model, text, images)
    whole = AutoProcessor.from_pretrained(distilled.folder)
    settings = distilled.model.config.compression
    distilled.model.set_compression(whole, keep_ratio=1.0)
    distilled.model.config.compression = settings
    expected = Collator(whole, max_length=1000)(EXAMPLES)
    for name in ("attention_mask", "labels"):
        assert torch.equal(found[name], expected[name]), name
    real = expected["attention_mask"].bool()
    assert torch.equal(found["input_ids"][real], expected["input_ids"][real])


def test_the_loss_is_what_a_slow_reference_says(distilled, batch):
    """The stock model answers each dialogue alone, and so does the compressed one."""
    model = distilled.model
    loss = Distillation(model, DistillationRecipe(prediction=1.0, entropy=0.5, collapse=0.25))(model, batch)
    divergences, entropies, collapses = [], [], []
    for example in EXAMPLES:
        alone = Collator(distilled.processor, max_length=1000)([example])
        with uncompressed(model):
            text = {name: alone[name] for name in TEXT}
        images = {name: value for name, value in alone.items() if name not in TEXT}
        whole = expand_placeholders(model, text, images)
        matrices = []
        hook = model.model.compressor.register_forward_hook(lambda _, __, output, to=matrices: to.append(output))
        with torch.no_grad():
            of_teacher = distilled.stock(**{k: whole[k] for k in TEXT[:2]}, **images).logits
            of_student = model(**{k: alone[k] for k in TEXT[:2]}, **images).logits
        hook.remove()
        teacher = of_teacher[0, :-1][whole["labels"][0, 1:] != -100].softmax(-1)
        student = of_student[0, :-1][alone["labels"][0, 1:] != -100].softmax(-1)
        divergences += (teacher * (teacher.log() - student.log())).sum(-1).tolist()
        for matrix in (m for group in matrices for m in group):
            entropies.append(float(torch.distributions.Categorical(probs=matrix).entropy().mean()))
            collapses.append(max(float(column.sum()) for column in matrix.T))
    mean = [sum(values) / len(values) for values in (divergences, entropies, collapses)]
    assert len(entropies) == 4
    torch.testing.assert_close(float(loss), mean[0] + 0.5 * mean[1] + 0.25 * mean[2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_matrices_generator_gets_a_gradient(distilled, batch, checkpointing):
    model, found = distilled.model.train(), []
    if checkpointing:
        checkpoint_activations(model)
    encoded = model.model.vision_tower.register_forward_hook(lambda *_: found.append(1))
    Distillation(model, DistillationRecipe())(model, batch).backward()
    encoded.remove()
    if checkpointing:
        checkpoint_activations(model, enabled=False)
    assert found == [1], "the image is encoded once, for teacher and student"
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {name for name, gradient in gradients.items() if gradient is not None} == {
        f"model.compressor.{name}" for name in ("w_q", "w_k", "omega")
    }
    assert all(gradients[f"model.compressor.{name}"].abs().sum() > 0 for name in ("w_q", "w_k", "omega"))
    model.zero_grad()
    assert model.config.compression.keep_ratio == 0.3, "what the teacher ran with is put back"


def test_the_terms():
    uniform, one_hot = torch.full((1, 2, 4), 0.25), torch.eye(4)[None, :2].clone().requires_grad_()
    torch.testing.assert_close(entropy_loss([uniform]), torch.tensor(4.0).log())
    loss = entropy_loss([one_hot])
    assert loss == 0
    loss.backward()
    assert torch.isfinite(one_hot.grad).all()
    assert collapse_loss([torch.tensor([[[1.0, 0, 0], [1, 0, 0]]]), torch.eye(3)[None]]) == 1.5
    logits = torch.randn(3, 5)
    assert prediction_loss(logits, logits.clone()) == 0


def test_training_changes_the_compressor_alone_and_no_further_than_its_limits(distilled, instructions, tmp_path):
    settings = {**QUICK, "data": str(instructions), "max_steps": 3, "learning_rate.compressor": 0.5}
    train("metacompress", distilled.folder, tmp_path / "out", settings=settings, progress=False)
    before = {}
    for path in distilled.folder.glob("*.safetensors"):
        before |= load_file(path)
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"compressor.w_q", "compressor.w_k", "compressor.omega"}
    for name in changed:
        assert (after[name] - before[name]).abs().max() <= 3 * 0.5 * 1e-2 + 1e-6, "SGD, every entry cut to 1e-2"
    log = json.loads((tmp_path / "out" / "training_log.json").read_text())["log"]
    assert {"loss", "prediction", "entropy", "collapse"} <= log[0].keys()
    assert "trained" in (tmp_path / "out" / "README.md").read_text()


def test_a_method_without_matrices_is_refused(tiny, tmp_path):
    with pytest.raises(FoveateError, match="`distillation`, which is of 'metacompress'"):
        train("qg-vtc", tiny, tmp_path / "out", settings={**QUICK, "distillation.entropy": 1}, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_matrix_for_one_image(distilled):
    """Algorithm 2 finds tokens that say more than it began with, in a model of any size."""
    fitted = fit_matrix(
        distilled.model, distilled.processor, EXAMPLES[0], steps=30, learning_rate=2.0, entropy=0.0, progress=False
    )
    assert fitted.prediction[-1] < fitted.prediction[0]
    torch.testing.assert_close(fitted.matrix.sum(1), torch.ones(len(fitted.matrix)))
    pressed = fit_matrix(
        distilled.model, distilled.processor, EXAMPLES[0], steps=30, learning_rate=2.0, entropy=1.0, progress=False
    )
    assert pressed.entropy[-1] < fitted.entropy[-1]
    shown = retained(fitted.provenance)
    assert set(shown.weights.sum(1).tolist()) <= {0.0, 1.0}, "a token is a patch, or a newline"
    with pytest.raises(FoveateError, match="c has 2 images"):
        fit_matrix(distilled.model, distilled.processor, EXAMPLES[2])
