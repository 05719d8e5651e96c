"""Training LLaVA-Meteor: its two stages, and how its native expert is let in."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from foveate import FoveateError, convert, train
from foveate.training.recipe import read_stage

from ..helpers.tiny_checkpoints import write_llava
from ..helpers.training_runs import QUICK


class WatchWarmup(TrainerCallback):
    """Notes at the end of every step how much say the native expert had in it."""

    def __init__(self):
        self.found = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.found.append(model.model.native_warmup)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meteor")
    base = write_llava(folder / "base", dtype=torch.float32)
    return convert(base, folder / "out", "meteor", settings={"num_visual_tokens": 4})


def parts_changed(before, after):
    tensors = [{}, {}]
    for found, folder in zip(tensors, (before, after)):
        for path in folder.glob("*.safetensors"):
            found |= load_file(path)
    assert tensors[0].keys() == tensors[1].keys()
    return {name.split(".")[0] for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])}


@pytest.mark.parametrize(("stage", "parts"), [(1, set()), (2, {"language_model"})])
def test_a_stage_trains_its_parts_and_never_the_vision_tower(fresh, instructions, tmp_path, stage, parts):
    settings = {**QUICK, "data": str(instructions), "max_steps": 2}
    out = train("meteor", fresh, tmp_path / "out", stage, settings=settings, progress=False)
    assert parts_changed(fresh, out) == {"compressor", "multi_modal_projector"} | parts


def test_the_native_experts_say_rises_from_nothing(fresh, instructions, tmp_path):
    settings = {**QUICK, "data": str(instructions), "max_steps": 6, "native_warmup_steps": 4}
    watch = WatchWarmup()
    train("meteor", fresh, tmp_path / "out", 1, settings=settings, progress=False, callbacks=[watch])
    assert watch.found == [0, 0.25, 0.5, 0.75, 1, 1]


def test_the_recipe_has_the_papers_values():
    first, second = (read_stage("meteor", stage) for stage in (1, 2))
    assert (set(first.learning_rate.values()), first.batch_size) == ({1e-3}, 256)
    assert (set(second.learning_rate.values()), second.batch_size) == ({2e-5}, 128)
    assert "language_model" in second.learning_rate
    assert "language_model" not in first.learning_rate


def test_other_methods_have_no_native_expert(tiny, instructions, tmp_path):
    settings = {**QUICK, "data": str(instructions), "native_warmup_steps": 4}
    with pytest.raises(FoveateError, match="`native_warmup_steps`, which is of 'meteor'"):
        train("qg-vtc", tiny, tmp_path / "out", 1, settings=settings, progress=False)
