"""Contract 12: checkpoints that a released version wrote answer as they did, once `foveate upgrade` has been run."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import transformers

from foveate.conversion.upgrade import upgrade
from foveate.conversion.verify import verify

from ..conftest import CLASSES
from ..helpers.released_checkpoints import ANSWERS, PAIRS, SOURCE, assemble


pytestmark = pytest.mark.contract_core

#: All checkpoints in one process: to start one takes longer than to ask them all.
STRANGER = textwrap.dedent(
    """
    import sys

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "foveate":
                raise ModuleNotFoundError("foveate is not installed here")

    sys.meta_path.insert(0, Hidden())
    sys.path[:] = [entry for entry in sys.path if entry]
    import json
    import runpy
    from pathlib import Path

    answers_of = runpy.run_path(sys.argv[1])["answers_of"]
    found = {folder.name: answers_of(folder) for folder in sorted(Path(sys.argv[2]).iterdir())}
    assert "foveate" not in sys.modules
    print("FOUND" + json.dumps(found))
    """
)


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory):
    """Every checkpoint of 0.1.0, upgraded in place, and what was found and done."""
    folder = tmp_path_factory.mktemp("released")
    done = {}
    for pair in PAIRS:
        checkpoint = assemble(pair, folder / pair)
        done[pair] = (verify(checkpoint), upgrade(checkpoint))
    return folder, done


@pytest.fixture(scope="module")
def answers(upgraded, tmp_path_factory):
    """Of a process without foveate."""
    folder, _ = upgraded
    place = tmp_path_factory.mktemp("without_foveate")
    script = place / "without_foveate.py"
    script.write_text(STRANGER)
    command = [sys.executable, "-P", str(script), str(SOURCE), str(folder)]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hf"), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.rpartition("FOUND")[2])


def test_there_is_one_of_every_method_and_backbone_of_that_version():
    known = {f"{method.name}-{backbone.base_model_type}" for method, backbone in CLASSES}
    assert set(PAIRS) <= known, "what was written once loads for ever"
    assert len(PAIRS) == 17


@pytest.mark.parametrize("pair", PAIRS)
def test_answers_as_it_did(pair, answers):
    expected = json.loads(ANSWERS.read_text())[transformers.__version__.partition(".")[0]][pair]
    assert answers[pair].keys() == expected.keys()
    for question, answer in expected.items():
        assert answers[pair][question]["ids"] == answer["ids"], question
        np.testing.assert_allclose(answers[pair][question]["logits"], answer["logits"], atol=0.01, err_msg=question)


def test_the_answers_are_the_same_on_4_and_5_but_for_those_that_hang_on_every_bit():
    of_4, of_5 = (json.loads(ANSWERS.read_text())[major] for major in ("4", "5"))
    ids = [{pair: [answer["ids"] for answer in found[pair].values()] for pair in PAIRS} for found in (of_4, of_5)]
    assert {pair for pair in PAIRS if ids[0][pair] != ids[1][pair]} == {"random-llava", "random-llava_next"}


@pytest.mark.parametrize("pair", PAIRS)
def test_verify_says_before_that_it_is_due_and_afterwards_that_it_is_not(pair, upgraded):
    folder, done = upgraded
    before, changes = done[pair]
    assert before.upgrade_due and not before.as_written
    assert f"`foveate upgrade {folder / pair}` brings it up to date." in before.verdict
    assert changes.before == "0.1.0" and changes.is_change and not changes.edited and not changes.kept_passages
    found = verify(folder / pair, full=True)
    assert found.as_written and not found.upgrade_due and not found.not_whole
    assert not upgrade(folder / pair).is_change
