"""Settings of all tests: nothing is downloaded, few threads, tiny checkpoints made once a session."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from foveate import convert
from foveate.registry import METHODS

from .conversion.tiny_checkpoints import write_clip, write_llava, write_llava_next, write_qwen3_vl


torch.set_num_threads(1)  # the models are tiny: more threads would only wait for each other

#: How to write a tiny base of each kind, with the text encoder that goes with it.
TINY_BASES = {
    "llava": (write_llava, write_clip),
    "llava_next": (write_llava_next, write_clip),
    "qwen3_vl": (write_qwen3_vl, None),
}

#: Settings with which the contract sees all that a method does, where its defaults do little on so small a model.
SETTINGS = {
    "qg-vtc": {"num_visual_tokens": 4, "layers": [0, 1]},
    "metacompress": {"keep_ratio": 0.4, "key_width": 16},
    **{name: {"keep_ratio": 0.4} for name in ("random", "sample", "spatial")},
    "etc": {"num_visual_tokens": 3, "trained_tokens": 9},
    "meteor": {"num_visual_tokens": 4, "max_slices": 3},
}

#: Methods for which no budget is the stock model on the same images, and no token a sum of the stock model's patches;
#: why, and where else that is tested.
UNLIKE_THE_STOCK_MODEL = {
    "etc": "the language model makes the visual tokens: tests/modeling/test_etc.py",
    "meteor": "images are cut into views: tests/modeling/test_meteor.py",
}

#: (method, backbone) pairs of the registry: every model class goes through the contract.
CLASSES = [(method, backbone) for method in METHODS.values() for backbone in method.backbones]


def reads_question(backbone) -> bool:
    return "question_config" in backbone.config_class.sub_configs


@pytest.fixture(scope="session", params=CLASSES, ids=lambda pair: f"{pair[0].name}-{pair[1].base_model_type}")
def method_and_backbone(request):
    return request.param


@pytest.fixture(scope="session")
def base_folder(method_and_backbone, tmp_path_factory):
    """A tiny random base checkpoint, float32."""
    _, backbone = method_and_backbone
    write_base, _ = TINY_BASES[backbone.base_model_type]
    return write_base(tmp_path_factory.mktemp("base") / backbone.base_model_type, dtype=torch.float32)


@pytest.fixture(scope="session")
def text_encoder_folder(method_and_backbone, tmp_path_factory):
    """Of a method that reads the question; else `None`."""
    _, backbone = method_and_backbone
    if not reads_question(backbone):
        return None
    _, write_text_encoder = TINY_BASES[backbone.base_model_type]
    return write_text_encoder(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="session")
def checkpoint(method_and_backbone, base_folder, text_encoder_folder, tmp_path_factory):
    """The base converted by the method."""
    method, backbone = method_and_backbone
    out = tmp_path_factory.mktemp("converted") / backbone.model_type
    return convert(base_folder, out, method.name, text_encoder_folder, SETTINGS.get(method.name))
