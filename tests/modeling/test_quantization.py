"""What quantisation leaves out when nobody says it. (That models quantise and generate is in the contract.)"""

import pytest
from transformers import BitsAndBytesConfig

from foveate import LlavaMeteorForConditionalGeneration, LlavaMeteorModel
from foveate.modeling.core.base import _leaving_out


MODULES = ["model.vision_tower", "lm_head"]


class Other:
    """A config of another library."""

    def __init__(self, modules_to_not_convert=None):
        self.modules_to_not_convert = modules_to_not_convert


class Unknown:
    """One that has no word for it."""


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (BitsAndBytesConfig(load_in_4bit=True), "llm_int8_skip_modules"),
        (BitsAndBytesConfig(load_in_8bit=True), "llm_int8_skip_modules"),
        ({"load_in_8bit": True}, "llm_int8_skip_modules"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "llm_int8_skip_modules"),
        (Other(), "modules_to_not_convert"),
        ({"quant_method": "torchao"}, "modules_to_not_convert"),
    ],
)
def test_the_modules_are_left_out_and_the_callers_config_stays(config, field):
    found = _leaving_out(config, MODULES)
    assert (found[field] if isinstance(found, dict) else getattr(found, field)) == MODULES
    before = config.get(field) if isinstance(config, dict) else getattr(config, field)
    assert before is None


@pytest.mark.parametrize(
    "config",
    [
        BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"]),
        {"load_in_8bit": True, "llm_int8_skip_modules": []},
        Other([]),
        Unknown(),
    ],
)
def test_who_says_it_is_listened_to(config):
    assert _leaving_out(config, MODULES) is config


def test_what_sees_and_what_compresses_is_named():
    named = {"vision_tower", "visual", "compressor"}
    for model_class in (LlavaMeteorModel, LlavaMeteorForConditionalGeneration):
        assert named == set(model_class.full_precision)
