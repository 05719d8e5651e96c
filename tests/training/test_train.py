"""What a training leaves behind: the right weights changed, at their own rates, in a checkpoint that answers."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from foveate import FoveateError, evaluate, train
from foveate.cli import app
from foveate.conversion.verify import verify
from foveate.hub_cards.manifest import MANIFEST_FILE
from foveate.hub_cards.training_records import RECIPE_FILE, earlier_stages
from foveate.training import train as training
from foveate.training.recipe import read_stage, write_recipe

from ..helpers.training_runs import QUICK, Watch


LORA = {"lora.r": 2, "lora.dropout": 0.1}  # dropout: going on needs the random numbers' state as well


def weights(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in after if not torch.equal(before[name], after[name])}


def run(tiny, instructions, out, stage=2, steps=5, **kwargs):
    settings = {**QUICK, **(LORA if stage == 2 else {}), "data": str(instructions), "max_steps": steps}
    settings |= kwargs.pop("settings", {})
    return train("qg-vtc", tiny, out, stage, settings=settings, progress=False, **kwargs)


@pytest.fixture(scope="module")
def first_stage(tiny, instructions, tmp_path_factory):
    return run(tiny, instructions, tmp_path_factory.mktemp("trained") / "first", stage=1)


@pytest.fixture(scope="module")
def second_stage(first_stage, instructions, tmp_path_factory):
    """Five steps of stage 2, on from stage 1."""
    return run(first_stage, instructions, tmp_path_factory.mktemp("trained") / "second")


# What trains


def test_stage_1_trains_projector_and_question(tiny, first_stage):
    names = changed(weights(tiny), weights(first_stage))
    assert {name.partition(".")[0] for name in names} == {"multi_modal_projector", "question_projector"}
    assert len(names) == 8, "weights and biases of two linear layers each"


def test_stage_2_trains_the_language_model_too(first_stage, second_stage):
    """By LoRA: every linear layer of it and nothing else, the vision and the text encoder never."""
    names = changed(weights(first_stage), weights(second_stage))
    assert {name.partition(".")[0] for name in names} == {
        "multi_modal_projector",
        "question_projector",
        "language_model",
    }
    of_language_model = {name for name in names if name.startswith("language_model")}
    assert len(of_language_model) == 2 * 7, "two layers of seven linear layers"
    assert all(name.endswith("_proj.weight") for name in of_language_model)


def test_modules_train_at_their_own_rates(tiny, instructions, tmp_path):
    watch = Watch(stop=1)
    rates = {"learning_rate.question_projector": 3e-3, "warmup_ratio": 0, "schedule": "constant_with_warmup"}
    with pytest.raises(KeyboardInterrupt):
        run(tiny, instructions, tmp_path / "out", settings=rates, callbacks=[watch])
    trained = {id(p): name for name, p in watch.model.named_parameters() if p.requires_grad}
    found = {group["lr"]: {trained[id(p)] for p in group["params"]} for group in watch.groups}
    assert found.keys() == {1e-5, 3e-3, 1e-4}
    assert sum(map(len, found.values())) == len(trained)
    assert all("multi_modal_projector" in name for name in found[1e-5])
    assert all("question_projector" in name for name in found[3e-3])
    assert all("lora_" in name and "language_model" in name for name in found[1e-4])
    # Adam's first step is as long as the rate, whatever the gradient.
    before = weights(tiny)
    for name, parameter in watch.model.named_parameters():
        if name.endswith("_projector.linear_2.bias"):
            step = (parameter - before[name.removeprefix("model.")]).abs().max().item()
            assert step == pytest.approx(1e-5 if "multi_modal" in name else 3e-3, rel=0.02)


def test_what_trains_is_float32_in_a_bf16_model(tiny, instructions, tmp_path):
    watch = Watch(stop=1)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, instructions, tmp_path / "out", settings={"precision": "bf16"}, callbacks=[watch])
    dtypes = {(p.requires_grad, p.dtype) for p in watch.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.fixture
def fast(monkeypatch):
    """Makes every device compute fast in a dtype."""

    def compute_fast_in(dtype):
        monkeypatch.setattr(training, "fast_dtype", lambda device, stored=None: dtype)

    return compute_fast_in


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, "bf16"), (torch.float32, "fp32"), (torch.float16, "fp32")],  # float16 would need scaled losses
)
def test_auto_is_what_the_device_computes_fast_in_and_is_recorded_as_such(
    dtype, precision, tiny, instructions, tmp_path, fast, capsys
):
    fast(dtype)
    settings = {**QUICK, "precision": "auto", "data": str(instructions), "max_steps": 1}
    watch = Watch()
    out = train("qg-vtc", tiny, tmp_path / "out", settings=settings, callbacks=[watch])
    frozen = {p.dtype for p in watch.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert watch.arguments.bf16 == (precision == "bf16")
    assert earlier_stages(out)[1]["precision"] == precision
    assert json.loads((out / "training_log.json").read_text())["precision"] == precision
    said = capsys.readouterr().err
    name = {"bf16": "bfloat16", "fp32": "float32"}[precision]
    assert f"1 steps in {name} on cpu" in said and f"precision: {precision}" in said


@pytest.mark.parametrize(("before", "after"), [("bf16", torch.float32), ("fp32", torch.bfloat16)])
def test_a_resumed_training_keeps_the_precision_that_it_began_with(before, after, tiny, instructions, tmp_path, fast):
    out, settings = tmp_path / "out", {"precision": "auto", "save_steps": 1}
    fast({"bf16": torch.bfloat16, "fp32": torch.float32}[before])
    with pytest.raises(KeyboardInterrupt):
        run(tiny, instructions, out, stage=1, steps=3, settings=settings, callbacks=[Watch(stop=2)])
    fast(after)  # it goes on on another device
    other = {"bf16": "fp32", "fp32": "bf16"}[before]
    with pytest.raises(FoveateError, match=f"began with precision = {before}, not {other}"):
        run(tiny, instructions, out, stage=1, steps=3, settings={**settings, "precision": other}, resume=True)
    watch = Watch()
    run(tiny, instructions, out, stage=1, steps=3, settings=settings, resume=True, callbacks=[watch])
    assert watch.arguments.bf16 == (before == "bf16")
    assert earlier_stages(out)[1]["precision"] == before
    unbroken = tmp_path / "unbroken"
    run(tiny, instructions, unbroken, stage=1, steps=3, settings={"precision": before})
    assert not changed(weights(unbroken), weights(out))


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], "fp32"), (["--dtype", "auto"], "bf16"), (["--dtype", "float32"], "fp32"), (["--dtype", "bfloat16"], "bf16")],
)
def test_the_commands_dtype_comes_before_the_recipes(words, expected, tiny, instructions, tmp_path, fast):
    fast(torch.bfloat16)
    recipe = tmp_path / "own.yaml"
    block = {**read_stage("qg-vtc", 1).to_dict(), **QUICK, "data": str(instructions), "max_steps": 1}
    write_recipe("qg-vtc", {1: block}, recipe)  # which says fp32
    arguments = ["train", "qg-vtc", tiny, tmp_path / "out", "--recipe", recipe, *words]
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert found.exit_code == 0, found.output
    assert earlier_stages(tmp_path / "out")[1]["precision"] == expected


def test_batches_without_an_image_train_too(tiny, instructions, tmp_path):
    """Where only what is before the language model trains, they would have no gradient at all."""
    alone = {"keep_text_only": True, "batch_size": 1}
    out = run(tiny, instructions, tmp_path / "out", stage=1, steps=16, settings=alone)
    assert changed(weights(tiny), weights(out))


def test_the_budget_can_be_the_recipes(tiny, instructions, tmp_path):
    """In the config and in the processor of what is written, which is otherwise as before."""
    out = run(tiny, instructions, tmp_path / "out", stage=1, steps=1, settings={"num_visual_tokens": 2})
    model, processor = AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert model.config.compression.num_visual_tokens == 2
    prompt = "USER: <image> what is it ASSISTANT:"
    inputs = processor(images=Image.new("RGB", (50, 40), "red"), text=prompt, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 2
    model(**inputs)
    assert (out / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    with pytest.raises(FoveateError, match=r"can't be trained at this budget: num_visual_tokens is 99"):
        run(tiny, instructions, tmp_path / "none", stage=1, settings={"num_visual_tokens": 99})


# Breaking off


def test_resumed_equals_unbroken(first_stage, instructions, second_stage, tmp_path):
    out, often = tmp_path / "resumed", {"settings": {"save_steps": 2}}
    with pytest.raises(KeyboardInterrupt):
        run(first_stage, instructions, out, callbacks=[Watch(stop=3)], **often)
    assert not out.exists()
    state = tmp_path / "resumed.training"
    assert [path.name for path in state.glob("checkpoint-*")] == ["checkpoint-2"]
    assert load_file(state / "checkpoint-2" / "trained.safetensors").keys(), "what trains, and no more"
    assert sum(path.stat().st_size for path in state.rglob("trained.safetensors")) < 200_000
    with pytest.raises(FoveateError, match="--resume"):
        run(first_stage, instructions, out, **often)
    with pytest.raises(FoveateError, match="began with seed = 0, not 1"):
        run(first_stage, instructions, out, resume=True, settings={"seed": 1})
    (state / "checkpoint-3").mkdir()  # as a break during saving leaves it
    run(first_stage, instructions, out, resume=True, **often)
    assert not changed(weights(second_stage), weights(out))
    assert not state.exists()


def test_broken_off_before_the_first_state_begins_again(tiny, instructions, first_stage, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tiny, instructions, tmp_path / "out", stage=1, callbacks=[Watch(stop=1)])
    run(tiny, instructions, tmp_path / "out", stage=1, resume=True)
    assert not changed(weights(first_stage), weights(tmp_path / "out"))


# The result


def test_the_result_is_a_checkpoint_like_conversions(tiny, second_stage):
    """File for file but for the weights, so that it loads wherever that one does, foveate there or not."""
    for path in tiny.rglob("*"):
        of_weights = path.name.endswith((".safetensors", ".index.json"))
        if path.is_file() and not of_weights and path.name not in ("README.md", MANIFEST_FILE):
            assert (second_stage / path.relative_to(tiny)).read_bytes() == path.read_bytes(), path.name
    assert verify(second_stage).as_written
    assert [path.name for path in second_stage.parent.iterdir()] == [second_stage.name], "nothing else is left"


def test_the_result_answers(second_stage):
    model = AutoModelForImageTextToText.from_pretrained(second_stage)
    processor = AutoProcessor.from_pretrained(second_stage)
    prompt = "USER: <image> what is it ASSISTANT:"
    inputs = processor(images=Image.new("RGB", (50, 40), "red"), text=prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 3


def test_merged_equals_adapter(first_stage, instructions, second_stage, tmp_path):
    peft = pytest.importorskip("peft")
    kept = run(first_stage, instructions, tmp_path / "kept", merge=False)
    assert {name.partition(".")[0] for name in changed(weights(first_stage), weights(kept))} == {
        "multi_modal_projector",
        "question_projector",
    }
    processor = AutoProcessor.from_pretrained(kept)
    inputs = processor(
        images=Image.new("RGB", (50, 40), "red"), text="USER: <image> what is it ASSISTANT:", return_tensors="pt"
    )
    merged = AutoModelForImageTextToText.from_pretrained(second_stage).eval()
    plain = AutoModelForImageTextToText.from_pretrained(kept).eval()
    with torch.no_grad():
        expected, before = merged(**inputs).logits, plain(**inputs).logits
        adapted = peft.PeftModel.from_pretrained(plain, kept, subfolder="adapter").eval()
        found = adapted(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-5)
    assert 'subfolder="adapter"' in (kept / "README.md").read_text()
    with pytest.raises(FoveateError, match="not merged"):
        run(kept, instructions, tmp_path / "next")


def test_a_bf16_checkpoint_stays_bf16(tiny, instructions, tmp_path):
    half = tmp_path / "half"
    AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(half)
    AutoProcessor.from_pretrained(tiny).save_pretrained(half)
    out = run(half, instructions, tmp_path / "out", settings={"precision": "bf16", "lora.learning_rate": 0.05})
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    assert any(name.startswith("language_model") for name in changed(weights(half), weights(out)))


def test_recipe_log_and_card_say_how_it_was_trained(first_stage, second_stage):
    for stage in (1, 2):
        saved = read_stage("qg-vtc", stage, second_stage / RECIPE_FILE)
        assert (saved.max_steps, saved.batch_size) == (5, 2)
    with pytest.raises(FoveateError, match="no stage 2"):
        read_stage("qg-vtc", 2, first_stage / RECIPE_FILE)
    log = json.loads((second_stage / "training_log.json").read_text())
    assert (log["steps"], log["num_processes"]) == (5, 1)
    assert sum("loss" in entry for entry in log["log"]) == 5
    card = (second_stage / "README.md").read_text()
    assert "trained (stage 1 and 2, see below)" in card
    assert "untrained" not in card
    assert "# llava with QG-VTC" in card, "the base's name is carried on"
    assert "LoRA on language_model (r 2, α 128, 0.0001)" in card
    assert "llava_v1_5_mix665k.json, 5 steps, 2 examples a device and step" in card


def test_the_lab_trains_and_is_evaluated(tiny, tmp_path):
    settings = {**QUICK, "data": "lab:4", "max_steps": 3, "lora.r": 2, "workers": 1}
    out = train("qg-vtc", tiny, tmp_path / "out", 2, settings=settings, progress=False)
    assert evaluate(out, limit=6, progress=False)["n"] == 6


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such", "CKPT", "OUT"], "There is no method 'no-such': choose one of etc, metacompress,"),
        (["recoverable", "CKPT", "OUT"], "There is no training recipe for 'recoverable': there is one for"),
        (["qg-vtc", "CKPT", "OUT", "--stage", "3"], "qg-vtc.yaml has no stage 3: choose one of 1, 2."),
        (["qg-vtc", "CKPT", "OUT", "--set", "lr=1"], "there is no key 'lr'"),
        (["qg-vtc", "CKPT", "OUT", "--max-steps", "0"], "max_steps must be at least 1, not 0."),
        (["qg-vtc", "CKPT", "OUT", "--dtype", "float16"], "can't compute in 'float16'"),
        (["qg-vtc", "CKPT", "OUT", "--data", "gone.json"], "There is no file gone.json"),
        (["qg-vtc", "CKPT", "OUT", "--recipe", "gone.yaml"], "There is no recipe file gone.yaml."),
        (["qg-vtc", "CKPT", "OUT", "--resume"], "There is nothing to resume"),
        (["qg-vtc", "CKPT", "OUT", "--set", "learning_rate.head=1"], "no module 'head' to train: it has vision_tower"),
        (["qg-vtc", "CKPT", "CKPT"], "exists already and is not empty"),
        (["qg-vtc", "lab:tiny-llava", "OUT"], "lab:tiny-llava is not compressed: convert it first"),
        (["qg-vtc", "nowhere", "OUT"], "nowhere is neither a folder nor a model on the hub"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tiny, tmp_path, arguments, message):
    places = {"CKPT": str(tiny), "OUT": str(tmp_path / "out")}
    result = CliRunner().invoke(app, ["train", *(places.get(word, word) for word in arguments)])
    assert result.exit_code == 2
    assert result.stderr.startswith("foveate: ")
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_image_that_is_gone_during_training_is_one_sentence(tiny, instructions, tmp_path):
    """Whichever process reads it."""
    samples = [sample for sample in json.loads(instructions.read_text()) if "image" in sample]
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    for sample in samples:
        (tmp_path / sample["image"]).write_bytes(b"no picture")
    (tmp_path / "data.json").write_text(json.dumps(samples))
    for workers in (0, 1):
        with pytest.raises(FoveateError) as error:
            out, settings = tmp_path / f"out{workers}", {"workers": workers}
            run(tiny, tmp_path / "data.json", out, stage=1, settings=settings)
        assert str(error.value).startswith(f"{tmp_path / 'data.json'}, sample ")
        assert "can't be read" in str(error.value)
        assert "\n" not in str(error.value)
