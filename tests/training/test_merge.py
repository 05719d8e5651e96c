"""Small checkpoints through training and merging. (That loading one gives the same model is in the contract.)"""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from foveate import FoveateError, convert, train
from foveate.cli import app
from foveate.training.merge import merge

from ..helpers.tiny_checkpoints import write_clip, write_llava
from ..helpers.training_runs import QUICK


LORA = {"lora.r": 2, "lora.learning_rate": 0.05}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, and conversions of it in both layouts."""
    folder = tmp_path_factory.mktemp("layouts")
    base, clip = write_llava(folder / "base", dtype=torch.float32), write_clip(folder / "clip")
    for layout in ("full", "adapter"):
        convert(base, folder / layout, "qg-vtc", clip, {"num_visual_tokens": 4}, layout=layout)
    return folder


def trained(made, layout, out, **kwargs):
    settings = {**QUICK, **LORA, "data": "lab:8", "max_steps": 2}
    return train("qg-vtc", made / layout, out, 2, settings=settings, progress=False, **kwargs)


def state_of(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_what_is_trained_from_a_small_checkpoint_is_small_and_the_same(made, tmp_path):
    small, whole = (trained(made, layout, tmp_path / layout) for layout in ("adapter", "full"))
    assert_same(state_of(small), state_of(whole))
    (weights,) = small.glob("*.safetensors")
    names, of_base = load_file(weights).keys(), load_file(made / "base" / "model.safetensors")
    assert not any(name.startswith(("vision_tower", "language_model.model.embed_tokens")) for name in names)
    assert any(name.startswith("multi_modal_projector") for name in names), "what was trained differs from the base"
    assert len(names) < len(of_base)
    config = json.loads((small / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(made / "base")


def test_merging_makes_it_whole(made, tmp_path):
    small = trained(made, "adapter", tmp_path / "small")
    result = CliRunner().invoke(app, ["merge", str(small), str(tmp_path / "whole")])
    assert result.exit_code == 0, result.output
    assert "Wrote" in result.output
    assert_same(state_of(tmp_path / "whole"), state_of(small))
    assert "base_model_name_or_path" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (tmp_path / "whole" / "training_recipe.yaml").is_file()
    modes = {os.stat(path).st_mode for path in (tmp_path / "whole").glob("*.safetensors")}
    assert modes == {os.stat(tmp_path / "whole" / "config.json").st_mode}


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_merging_takes_the_lora_weights_in(made, layout, tmp_path):
    beside = trained(made, layout, tmp_path / "beside", merge=False)
    assert (beside / "adapter").is_dir()
    merge(beside, tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter").exists()
    assert_same(state_of(tmp_path / "merged"), state_of(trained(made, layout, tmp_path / "at once")))


def test_a_whole_checkpoint_has_nothing_to_merge(made, tmp_path):
    with pytest.raises(FoveateError, match="nothing to merge"):
        merge(made / "full", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_gone_is_said(made, tmp_path):
    small = convert(made / "base", tmp_path / "small", "metacompress", settings={"key_width": 16}, layout="adapter")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(OSError, match="put the base there, or set base_model_name_or_path"):
        AutoModelForImageTextToText.from_pretrained(small)
    with pytest.raises(FoveateError, match="can't be loaded"):
        merge(small, tmp_path / "out")


def test_an_unknown_layout_is_refused(made, tmp_path):
    with pytest.raises(FoveateError, match="choose one of full, adapter"):
        convert(made / "base", tmp_path / "out", "random", layout="small")
    with pytest.raises(FoveateError, match="nothing to link"):
        convert(made / "base", tmp_path / "out", "random", layout="adapter", link=True)
