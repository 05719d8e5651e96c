"""The budget of methods that compress an image's whole sequence: a number or a share, one of the two."""

import pytest

from foveate.configuration.baselines import BaselineSettings, RandomSettings, SampleSettings
from foveate.configuration.configuration_llava_baseline import LlavaBaselineConfig
from foveate.configuration.configuration_llava_metacompress import LlavaMetaCompressConfig
from foveate.configuration.configuration_llava_next_metacompress import LlavaNextMetaCompressConfig
from foveate.configuration.metacompress import MetaCompressSettings


def test_without_a_budget_a_tenth_is_kept():
    settings = MetaCompressSettings()
    assert (settings.keep_ratio, settings.num_visual_tokens) == (0.1, None)
    assert [settings.count_tokens(length) for length in (576, 2928, 4, 1)] == [58, 293, 1, 1]


def test_a_number_is_the_same_for_every_image_that_has_as_many():
    settings = MetaCompressSettings(num_visual_tokens=64)
    assert [settings.count_tokens(length) for length in (576, 2928, 40)] == [64, 64, 40]


def test_one_budget_takes_the_place_of_the_other():
    config = LlavaMetaCompressConfig()
    config.change_compression(num_visual_tokens=64)
    assert config.compression.to_dict()["keep_ratio"] is None
    config.change_compression(keep_ratio=0.25)
    assert config.compression.num_visual_tokens is None
    assert config.compression.count_tokens(config.num_patches) == 144


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"keep_ratio": 0}, "keep_ratio must be a number above 0 and at most 1 or null, not 0"),
        ({"keep_ratio": 1.01}, "at most 1 or null, not 1.01"),
        ({"keep_ratio": True}, "not True"),
        ({"keep_ratio": 0.5, "num_visual_tokens": 3}, "choose one of them"),
        ({"num_visual_tokens": 577}, "at most 576"),
        ({"key_width": 0}, "key_width must be a whole number"),
        ({"tokens": 3}, "Unknown compression setting 'tokens'"),
    ],
)
def test_a_bad_setting_is_named(block, message):
    with pytest.raises(ValueError, match=message):
        LlavaMetaCompressConfig(compression=block)


def test_on_llava_next_the_largest_image_is_the_limit():
    config = LlavaNextMetaCompressConfig(compression={"num_visual_tokens": 2928})
    assert config.compression.largest_budget(config) == 5 * 576 + 48
    with pytest.raises(ValueError, match="at most 2928"):
        config.change_compression(num_visual_tokens=2929)
    assert config.compression.num_visual_tokens == 2928


def test_the_width_of_trained_weights_can_not_be_set_on_a_model():
    config = LlavaMetaCompressConfig(compression={"key_width": 16})
    with pytest.raises(ValueError, match="key_width is 16 in this model's weights"):
        config.change_compression(key_width=32)
    config.change_compression(key_width=16, keep_ratio=0.5)


def test_a_baselines_method_chooses_its_settings():
    assert isinstance(BaselineSettings.from_dict({"method": "random", "seed": 3}), RandomSettings)
    assert isinstance(LlavaBaselineConfig().compression, SampleSettings)
    with pytest.raises(ValueError, match="Unknown compression setting 'seed' for the method 'sample'"):
        LlavaBaselineConfig(compression={"method": "sample", "seed": 3})
    with pytest.raises(ValueError, match="seed must be a whole number"):
        LlavaBaselineConfig(compression={"method": "random", "seed": -1})


def test_the_class_token_has_no_place_in_the_sequence():
    with pytest.raises(ValueError, match="vision_feature_select_strategy 'default'"):
        LlavaMetaCompressConfig(vision_feature_select_strategy="full")
