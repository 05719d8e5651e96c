"""Settings of all tests: nothing is downloaded, few threads, tiny checkpoints made once a session."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from foveate import convert
from foveate.registry import METHODS, Method, Pair, pairs_of

from .helpers.deprecations import refuse_deprecated_names
from .helpers.tiny_checkpoints import write_clip, write_llava, write_llava_next, write_qwen3_vl


refuse_deprecated_names()
torch.set_num_threads(1)  # the models are tiny: more threads would only wait for each other

#: How to write a tiny base of each kind, with the text encoder that goes with it.
TINY_BASES = {
    "llava": (write_llava, write_clip),
    "llava_next": (write_llava_next, write_clip),
    "qwen3_vl": (write_qwen3_vl, None),
}

#: Settings with which the contract sees all that a method does, where its defaults do little on so small a model.
SETTINGS: dict[str, dict] = {
    **{name: {"keep_ratio": 0.4} for name, method in METHODS.items() if method.kind == "sequence"},
    "qg-vtc": {"num_visual_tokens": 4, "layers": [0, 1]},
    "metacompress": {"keep_ratio": 0.4, "key_width": 16},
    "etc": {"num_visual_tokens": 3, "trained_tokens": 9},
    "meteor": {"num_visual_tokens": 4, "max_slices": 3},
}

#: (method, backbone) pairs of the registry: every model class goes through the contract.
CLASSES = [(method, backbone) for method in METHODS.values() for backbone in pairs_of(method.name)]


def pair_id(method: Method, backbone: Pair) -> str:
    return f"{method.name}-{backbone.base_model_type}"


def pytest_addoption(parser):
    parser.addoption("--method", help="Run the tests of every model on those of this method alone.")


def chosen_classes(config: pytest.Config) -> list[tuple[Method, Pair]]:
    """Those of `CLASSES` that the command line asks for."""
    wanted = config.getoption("--method")
    return [pair for pair in CLASSES if wanted in (None, pair[0].name)]


def pytest_generate_tests(metafunc):
    if "method_and_backbone" in metafunc.fixturenames:
        chosen = chosen_classes(metafunc.config)
        ids = [pair_id(*pair) for pair in chosen]
        metafunc.parametrize("method_and_backbone", chosen, indirect=True, ids=ids, scope="session")


@pytest.fixture(scope="session")
def method_and_backbone(request):
    return request.param


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Where tests run in several processes, those that share what is made once a session or module stay together."""
    for item in items:
        pair = getattr(item, "callspec", None) and item.callspec.params.get("method_and_backbone")
        shared_by_all = item.get_closest_marker("one_process")
        group = pair_id(*pair) if pair and not shared_by_all else item.module.__name__
        item.add_marker(pytest.mark.xdist_group(group))


@dataclass(frozen=True)
class TinyCheckpoint:
    """A method's checkpoint with random weights, float32.

    Args:
        base: what it was converted from.
        text_encoder: of a method that reads the question; else `None`.
        folder: the checkpoint.
    """

    base: Path
    text_encoder: Path | None
    folder: Path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """(method, backbone) → its [`TinyCheckpoint`], made when it is first asked for."""

    @functools.cache
    def make(method: Method, backbone: Pair) -> TinyCheckpoint:
        write_base, write_text_encoder = TINY_BASES[backbone.base_model_type]
        base = write_base(tmp_path_factory.mktemp("base") / backbone.base_model_type, dtype=torch.float32)
        text_encoder = write_text_encoder(tmp_path_factory.mktemp("clip") / "clip") if method.reads_question else None
        out = tmp_path_factory.mktemp("converted") / f"{method.name}-{backbone.model_type}"
        folder = convert(base, out, method.name, text_encoder, SETTINGS.get(method.name))
        return TinyCheckpoint(base, text_encoder, folder)

    return make


@pytest.fixture(scope="session")
def tiny(method_and_backbone, tiny_checkpoint) -> TinyCheckpoint:
    return tiny_checkpoint(*method_and_backbone)


@pytest.fixture(scope="session")
def base_folder(tiny):
    """A tiny random base checkpoint, float32."""
    return tiny.base


@pytest.fixture(scope="session")
def text_encoder_folder(tiny):
    """Of a method that reads the question; else `None`."""
    return tiny.text_encoder


@pytest.fixture(scope="session")
def checkpoint(tiny):
    """The base converted by the method."""
    return tiny.folder
