"""What GitHub runs is what the Makefile and `.ci/run` have."""

import os
import re
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: Path) -> dict:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {**workflow, "on": workflow.pop(True)}  # YAML 1.1 reads the key `on` as true


def test_there_is_one_for_changes_and_one_for_each_week():
    triggers = {path.stem: read(path)["on"] for path in WORKFLOWS}
    assert triggers.keys() == {"canary", "ci"}
    assert triggers["ci"].keys() == {"push", "pull_request"}
    assert triggers["canary"].keys() == {"schedule", "workflow_dispatch"}
    [when] = triggers["canary"]["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", when["cron"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_runs_what_is_there(path):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    [job] = read(path)["jobs"].values()
    assert job["timeout-minutes"] <= 90
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        program, word = command.split()
        if program == "make":
            assert word in targets
        else:
            assert program == "bash" and os.access(ROOT / word, os.X_OK)
    used = [step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step]
    assert used == ["actions/checkout", "actions/setup-python"]


def test_the_canary_names_transformers_as_the_makefile_reads_it():
    [job] = read(ROOT / ".github" / "workflows" / "canary.yml")["jobs"].values()
    [step] = [step for step in job["steps"] if step.get("run") == "make canary"]
    assert step["env"] == {"CANARY_TRANSFORMERS": "${{ matrix.transformers }}"}
    assert "\nCANARY_TRANSFORMERS ?= transformers\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
    named = [row["transformers"] for row in job["strategy"]["matrix"]["include"]]
    assert named == ["transformers", "git+https://github.com/huggingface/transformers"]
