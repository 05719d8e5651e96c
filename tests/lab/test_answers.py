"""What ships answers as it did: the lab's checkpoints, and methods without training on its bases."""

import json
import statistics
from pathlib import Path

import pytest

from foveate.conversion.shipped import lab_directory

from .answers import CONVERTED, SHIPPED, answer, answer_converted


RECORDED = json.loads((Path(__file__).parents[1] / "data" / "lab_answers.json").read_text(encoding="utf-8"))["answers"]
CLOSE_CALL = 0.2  # logits; processors round differently, and may tip what is closer than this


def assert_unchanged(found, recorded):
    sure = [margin > CLOSE_CALL for margin in recorded["margins"]]
    assert sum(sure) > len(sure) / 2
    changed = [pair for pair in zip(found["answers"], recorded["answers"], sure) if pair[2] and pair[0] != pair[1]]
    assert not changed
    assert statistics.median(abs(a - b) for a, b in zip(found["margins"], recorded["margins"])) < 1e-2
    assert found["visual_tokens"] == recorded["visual_tokens"]


def test_every_shipped_checkpoint_is_asked():
    ships = {f"lab:{folder.name}" for folder in (lab_directory() / "weights").iterdir() if folder.is_dir()}
    assert ships == {*SHIPPED, "lab:tiny-clip"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_checkpoint_answers_as_before(name):
    assert_unchanged(answer(name, SHIPPED[name]), RECORDED[name])


@pytest.mark.parametrize(("base", "method"), CONVERTED)
def test_a_method_without_training_answers_as_before(base, method, tmp_path):
    assert_unchanged(answer_converted(base, method, tmp_path), RECORDED[f"{method} on {base}"])
