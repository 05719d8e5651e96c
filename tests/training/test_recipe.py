"""The recipes: the paper's values, what can be changed, and what is refused."""

import pytest

from foveate import FoveateError
from foveate.hub_cards.training_records import RECIPE_FILE, earlier_stages
from foveate.training.recipe import RECIPES, read_stage, write_recipe


def test_the_papers_values():
    """QG-VTC, Appendix B, Table 4."""
    first, second = read_stage("qg-vtc", 1), read_stage("qg-vtc", 2)
    assert first.learning_rate == {"multi_modal_projector": 5e-4, "question_projector": 5e-4}
    assert second.learning_rate == {"multi_modal_projector": 1e-5, "question_projector": 1e-5}
    assert first.lora is None
    assert (second.lora.r, second.lora.alpha, second.lora.learning_rate) == (256, 128, 1e-4)
    assert (first.batch_size, second.batch_size) == (64, 16)
    for stage in (first, second):
        assert (stage.schedule, stage.warmup_ratio, stage.weight_decay) == ("cosine", 0.03, 0)
        assert (stage.epochs, stage.max_steps, stage.max_length) == (1, None, 2048)
    assert (first.lab_examples, second.lab_examples) == ("descriptions", "questions")


def test_metacompress_papers_values():
    """Section 6.1 and Algorithm 1."""
    stage = read_stage("metacompress", 1)
    assert stage.learning_rate == {"compressor": 1e-3}
    assert (stage.optimizer, stage.max_grad_value, stage.max_grad_norm) == ("sgd", 1e-2, None)
    assert (stage.epochs, stage.batch_size, stage.dialogues, stage.lora) == (2, 36, True, None)
    weights = stage.distillation
    assert (weights.prediction, weights.entropy, weights.collapse) == (1, 1, 1)


def test_values_change_by_their_path():
    changes = {
        "max_steps": 300,
        "learning_rate.multi_modal_projector": "1e-3",
        "learning_rate.question_projector": None,
        "lora.r": 8,
    }
    stage = read_stage("qg-vtc", 2, changes=changes)
    assert (stage.max_steps, stage.lora.r, stage.lora.alpha) == (300, 8, 128)
    assert stage.learning_rate == {"multi_modal_projector": 1e-3}
    assert read_stage("qg-vtc", 2, changes={"lora": None}).lora is None


def test_what_is_saved_reads_as_a_recipe(tmp_path):
    stages = {number: read_stage("qg-vtc", number, changes={"seed": 7}) for number in (1, 2)}
    path = tmp_path / RECIPE_FILE
    write_recipe("qg-vtc", {number: stage.to_dict() for number, stage in stages.items()}, path)
    for number, stage in stages.items():
        assert read_stage("qg-vtc", number, path) == stage
    assert earlier_stages(tmp_path) == {number: stage.to_dict() for number, stage in stages.items()}


def test_every_recipe_reads():
    for path in RECIPES.glob("*.yaml"):
        method, _, backbone = path.stem.partition("-") if path.stem.startswith("etc-") else (path.stem, "", "")
        stage = read_stage(method, 1, base_model_type=backbone)
        assert stage.precision == "auto", "no recipe of a paper is slow on a device without fast bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"learning_rte.question_projector": 1},
            "no key 'learning_rte'; the keys are title, learning_rate, batch_size",
        ),
        ({"lora.rank": 8}, "no key 'lora.rank'; the keys are lora.r, lora.alpha"),
        ({"lora": {"alpha": 1, "learning_rate": 1}}, "lora.r is missing"),
        ({"learning_rate": 1e-3}, "learning_rate.MODULE"),
        ({"optimizer": "adam"}, "optimizer must be one of adamw, sgd, muon, not 'adam'"),
        ({"max_grad_value": 0}, "max_grad_value must be a number above 0"),
        ({"distillation.entropie": 1}, "no key 'distillation.entropie'; the keys are distillation.prediction"),
        ({"distillation.entropy": -1}, "distillation.entropy must be a number at least 0"),
        (
            {"distillation": {"prediction": 0, "entropy": 0, "collapse": 0}},
            "there would be nothing to learn from",
        ),
        ({"learning_rate.question_projector": "fast"}, "learning_rate.question_projector must be a number above 0"),
        ({"learning_rate": {}, "lora": None}, "nothing would train"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"max_steps": True}, "max_steps must be a whole number"),
        ({"epochs": 0}, "epochs must be a number above 0"),
        ({"warmup_ratio": 1}, "warmup_ratio must be a number at least 0 and below 1, not 1"),
        ({"lora.dropout": float("nan")}, "lora.dropout must be a number"),
        ({"precision": "fp16"}, "precision must be one of auto, bf16, fp32, not 'fp16'"),
        ({"gradient_checkpointing": "yes"}, "one of true, false, null"),
        ({"skip_missing": 1}, "skip_missing must be one of true, false"),
    ],
)
def test_a_bad_value_is_named(changes, message):
    with pytest.raises(FoveateError) as error:
        read_stage("qg-vtc", 2, changes=changes)
    assert message in str(error.value)
    assert str(error.value).startswith("qg-vtc.yaml, stage 2: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: [", "can't be read as YAML"),
        ("- method", "holds no keys"),
        ("method: recoverable", "is a recipe for 'recoverable', not for 'qg-vtc'"),
        ("method: qg-vtc", "has no stages"),
        ("method: qg-vtc\nstage: {}", "there is no key 'stage'; the keys are method, stages"),
        ("method: qg-vtc\nstages: {1: 5}", "is no block of keys"),
        ("method: qg-vtc\nstages: {2: {}}", "has no stage 1: choose one of 2"),
        ("method: qg-vtc\nstages: {1: {title: t}}", "learning_rate is missing"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(FoveateError) as error:
        read_stage("qg-vtc", 1, path)
    assert message in str(error.value)


def test_a_method_or_file_without_a_recipe(tmp_path):
    with pytest.raises(FoveateError, match="no training recipe for 'recoverable': there is one for etc, metacompress"):
        read_stage("recoverable", 1)
    with pytest.raises(FoveateError, match="no recipe file"):
        read_stage("qg-vtc", 1, tmp_path / "none.yaml")
