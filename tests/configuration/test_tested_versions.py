"""What saved code says on a Transformers that it was not tested with, and that `setup.cfg` excludes the same ones."""

import subprocess
import sys
import textwrap
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from foveate import convert
from foveate.configuration.tested_versions import TESTED_TRANSFORMERS, untested_sentence

from ..helpers.tiny_checkpoints import write_llava


LAST = TESTED_TRANSFORMERS[-1]
MAJOR, MINOR = map(int, LAST.split(".")[:2])
NEXT = f"{MAJOR}.{MINOR + 1}"
IN_CHECKPOINT, IN_PACKAGE = "transformers_modules.ckpt.0a1b.tested_versions", "foveate.configuration.tested_versions"

#: Loads a checkpoint's config, processor and model with Transformers claiming to be another version.
LOADING = textwrap.dedent(
    """
    import sys
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
    sys.modules["transformers"].__version__ = sys.argv[1]  # of the module that is there now: it replaces itself
    for auto in (AutoConfig, AutoProcessor, AutoModel, AutoModelForImageTextToText):
        for folder in sys.argv[2:]:
            auto.from_pretrained(folder, trust_remote_code=True)
    assert "foveate" not in sys.modules
    print("loaded")
    """
)


@pytest.mark.parametrize("installed", [*TESTED_TRANSFORMERS, f"{MAJOR}.{MINOR}.99", "5.20.0", "4.50.0", "unknown"])
def test_nothing_is_said_up_to_the_last_tested_minor(installed):
    assert untested_sentence(installed, IN_CHECKPOINT) is None


@pytest.mark.parametrize("installed", [f"{NEXT}.0", f"{NEXT}.0.dev0", f"{NEXT}rc1", f"{MAJOR}.{MINOR + 80}.1", "6.0.0"])
def test_a_newer_one_is_named_with_what_to_do(installed):
    said = untested_sentence(installed, IN_CHECKPOINT)
    assert installed in said and f"4.57 to {MAJOR}.{MINOR}" in said and "untested" in said
    assert "`foveate upgrade CKPT`" in said and said.count(". ") == 0 and said.endswith(".")


def test_the_package_names_its_own_way_out():
    said = untested_sentence(f"{NEXT}.0", IN_PACKAGE)
    assert "`pip install --upgrade foveate`" in said and "foveate upgrade CKPT" not in said


def test_the_versions_are_in_order():
    numbers = [tuple(map(int, tested.split("."))) for tested in TESTED_TRANSFORMERS]
    assert numbers == sorted(numbers)


def requirements() -> dict[str, Requirement]:
    config = ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    found = [Requirement(line) for line in config["options"]["install_requires"].split("\n") if line]
    return {requirement.name: requirement for requirement in found}


def test_setup_cfg_allows_what_is_tested_and_ends_where_it_ends():
    allowed = requirements()["transformers"].specifier
    assert all(tested in allowed for tested in TESTED_TRANSFORMERS)
    assert f"{MAJOR}.{MINOR}.99" in allowed and f"{NEXT}.0" not in allowed


def test_setup_cfg_bounds_the_hubs_client_and_what_is_installed_is_within_all_bounds():
    found = requirements()
    assert any(specifier.operator == "<" for specifier in found["huggingface-hub"].specifier)
    assert {name for name, needed in found.items() if version(name) not in needed.specifier} == set()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    place = tmp_path_factory.mktemp("untested")
    base = write_llava(place / "base", dtype=torch.float32)
    return [str(convert(base, place / name, "sample", settings={"keep_ratio": 0.5})) for name in ("one", "two")]


class TestLoading:
    """In a process without foveate, of two checkpoints whose code is the same."""

    def load(self, installed, checkpoints, tmp_path):
        script = tmp_path / "loading.py"
        script.write_text(LOADING)
        environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin"}
        command = [sys.executable, "-P", str(script), installed, *checkpoints]
        found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert found.returncode == 0 and found.stdout.endswith("loaded\n"), found.stderr[-3000:]
        return found.stderr

    def test_says_it_once_and_goes_on(self, checkpoints, tmp_path):
        said = self.load(f"{NEXT}.0.dev0", checkpoints, tmp_path)
        [line] = [line for line in said.splitlines() if "tested with" in line]
        assert line.endswith(untested_sentence(f"{NEXT}.0.dev0", IN_CHECKPOINT))

    def test_says_nothing_on_a_tested_version(self, checkpoints, tmp_path):
        assert "tested with" not in self.load(LAST, checkpoints, tmp_path)
