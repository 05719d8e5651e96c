"""QG-VTC's settings: the paper's defaults for any tower, and one sentence for what can't be."""

import pytest
from transformers import CLIPVisionConfig

from foveate import LlavaQGVTCConfig


def config_with(depth=24, image_size=336, feature_layer=-2, **compression):
    vision = CLIPVisionConfig(num_hidden_layers=depth, image_size=image_size, patch_size=14)
    return LlavaQGVTCConfig(vision_config=vision, vision_feature_layer=feature_layer, compression=compression)


@pytest.mark.parametrize(
    ("depth", "feature_layer", "layers"),
    [
        (24, -2, [12, 14, 16, 18, 20, 22]),
        (24, 23, [12, 14, 16, 18, 20, 22]),
        (12, -2, [6, 8, 10]),
        (24, -1, [13, 15, 17, 19, 21, 23]),
        (2, -2, [0]),
    ],
)
def test_by_default_every_second_layer_of_the_second_half_compresses_up_to_the_last_that_runs(
    depth, feature_layer, layers
):
    assert config_with(depth, feature_layer=feature_layer).compression.layers == layers


def test_by_default_an_eighth_of_the_patches_is_left():
    assert config_with().compression.num_visual_tokens == 72
    assert config_with(image_size=168, depth=12).compression.num_visual_tokens == 18


def test_what_was_filled_in_is_in_the_saved_config(tmp_path):
    config_with().save_pretrained(tmp_path)
    block = LlavaQGVTCConfig.from_pretrained(tmp_path).to_dict()["compression"]
    assert block == {
        "method": "qg-vtc",
        "num_visual_tokens": 72,
        "layers": [12, 14, 16, 18, 20, 22],
        "guidance": "question",
        "recycle": True,
    }


@pytest.mark.parametrize(
    ("compression", "message"),
    [
        ({"layers": [14, 12]}, "rising order"),
        ({"layers": [12, 12]}, "rising order"),
        ({"layers": []}, "rising order"),
        ({"layers": [-1]}, "rising order"),
        ({"layers": 12}, "rising order"),
        ({"layers": [1.5]}, "rising order"),
        ({"layers": [12, 24]}, "choose layers from 0 to 22"),
        ({"layers": [12, 23]}, "choose layers from 0 to 22"),
        ({"num_visual_tokens": 577}, "choose at most 576"),
        ({"num_visual_tokens": 0}, "at least 1"),
        ({"guidance": "caption"}, "'question', 'cls'"),
        ({"recycle": "yes"}, "true or false"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_sentence(compression, message):
    with pytest.raises(ValueError, match=message):
        config_with(**compression)
