"""`foveate demo` and `foveate ask` print what README shows, and nothing else."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ..foveate.test_cli import assert_refused


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder that the commands run in, one after the other as README has them."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def demo(place):
    return run(place, "demo")


def run(place: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "foveate", *words]
    return subprocess.run(command, cwd=place, capture_output=True, encoding="utf-8")


def without_times(text: str) -> list[str]:
    """Lines without what differs from run to run: milliseconds, and the width of the columns that they are in."""
    return [re.sub(r" +", " ", re.sub(r"\d+\.\d ms", "TIME", line)).rstrip() for line in text.splitlines()]


def test_the_demo_prints_what_readme_shows(demo, place):
    assert (demo.returncode, demo.stderr) == (0, "")
    assert f"```\n{demo.stdout}```\n" in README
    assert Image.open(place / "demo" / "kept.png").format == "PNG"


def test_a_second_demo_takes_the_place_of_the_first(demo, place):
    draw = place / "demo" / "scene.png"
    again = run(place, "demo", "demo", str(draw), "What is at the middle left?")
    assert (again.returncode, again.stderr) == (0, "")
    assert len(again.stdout.splitlines()) == 4
    assert "  ->  square   (38 of 144 visual tokens)\n" in again.stdout


def test_asking_prints_what_readme_shows(demo, place):
    words = ("demo/checkpoint", "lab:7", "What is at the middle left?", "--compare", "lab:tiny-llava")
    asked = run(place, "ask", *words, "--show", "kept.png")
    assert (asked.returncode, asked.stderr) == (0, "")
    shown = next(block for block in README.split("```\n") if block.endswith("Picture: kept.png\n"))
    assert without_times(asked.stdout) == without_times(shown)


def test_a_picture_that_is_not_there_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused("nowhere.png can't be read", "demo", "out", "nowhere.png")
