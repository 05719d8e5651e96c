"""CONTRIBUTING's example of a new method, as it stands there: written in a folder of its own, registered by one call,
and through the contract."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]

#: Loaded by pytest before the tests are collected, as a user's script would be run.
REGISTRATION = """
import foveate
from every_second import METHOD

foveate.register_method(METHOD)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(\"\"\"Every second.*?)```", text, flags=re.DOTALL)
    (folder / "every_second.py").write_text(code, encoding="utf-8")
    (folder / "registration.py").write_text(REGISTRATION, encoding="utf-8")
    return folder


def run(folder, *command):
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    for name in [name for name in environment if name.startswith(("PYTEST_", "COV_"))]:
        del environment[name]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_goes_through_the_contract(folder):
    options = ["-p", "registration", "-p", "no:cacheprovider", f"--basetemp={folder / 'tmp'}", "-rpfE"]
    found = run(folder, "-m", "pytest", *options, "--method", "every-second", "tests/contract", "-k", "every-second")
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]
    passed = re.findall(r"^PASSED .*every-second-(\w+)", found.stdout, flags=re.MULTILINE)
    assert all(passed.count(backbone) > 40 for backbone in ("llava", "llava_next", "qwen3_vl"))


NAMES = """
import foveate, registration
from foveate.registry import pairs_of

print(*[pair.model_type for pair in pairs_of("every-second")])
print(foveate.LlavaEverySecondForConditionalGeneration.__name__, "Qwen3VLEverySecondModel" in dir(foveate))
try:
    foveate.register_method(registration.METHOD)
except ValueError as error:
    print(error)
"""


def test_is_known_by_its_names(folder):
    found = run(folder, "-c", NAMES)
    assert found.stdout.splitlines() == [
        "llava_everysecond llava_next_everysecond qwen3_vl_everysecond",
        "LlavaEverySecondForConditionalGeneration True",
        "There is a method 'every-second' or one with the stem 'EverySecond' already: rename it.",
    ], found.stderr
