"""`foveate demo` and `foveate ask` print what README shows, and nothing else; the demo's other process computes in what
it is told."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from foveate.evaluation import demo

from ..helpers.command import assert_refused


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder that the commands run in, one after the other as README has them."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def demonstrated(place):
    return run(place, "demo")


def run(place: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "foveate", *words]
    return subprocess.run(command, cwd=place, capture_output=True, encoding="utf-8")


def shown_in_readme(last_line: str) -> str:
    """The one code block of README that ends so."""
    [block] = [block for block in README.split("```\n") if re.search(f"{last_line}\n\\Z", block)]
    return block


def comparable(text: str) -> str:
    """Without what differs between machines (dtypes, the bytes that they take, milliseconds, and which of README's two
    answers the last question gets), and the width of the columns that these are in."""
    text = re.sub(r"\d+(\.\d)? (ms|kB)|float32|bfloat16", "…", text)
    text = re.sub(r"cross\?  ->  (bottom left   \(32 of|center   \(34 of|bottom left\n|center\n)", "cross? …\n", text)
    return re.sub(r" +", " ", re.sub(r" +\n", "\n", text))


def test_the_demo_prints_what_readme_shows(demonstrated, place):
    assert (demonstrated.returncode, demonstrated.stderr) == (0, "")
    assert comparable(demonstrated.stdout) == comparable(shown_in_readme("is drawn in demo/kept.png."))
    assert Image.open(place / "demo" / "kept.png").format == "PNG"


def test_asking_prints_what_readme_shows(demonstrated, place):
    words = ("demo/checkpoint", "lab:7", "What is at the middle left?", "--compare", "lab:tiny-llava")
    asked = run(place, "ask", *words, "--show", "kept.png")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert comparable(asked.stdout) == comparable(shown_in_readme("Picture: kept.png"))


def test_a_second_demo_takes_the_place_of_the_first(demonstrated, place):
    again = run(place, "demo", "demo", "demo/scene.png", "What is at the middle left?")
    assert (again.returncode, again.stderr) == (0, "")
    assert len(again.stdout.splitlines()) == 4
    assert "  ->  square   (38 of 144 visual tokens)\n" in again.stdout


def test_a_picture_that_is_not_there_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused("nowhere.png can't be read", "demo", "out", "nowhere.png")


@pytest.mark.parametrize("fast", ["bfloat16", "float32"])
def test_the_process_without_foveate_computes_in_what_the_processor_is_fast_in(
    fast, devices, tmp_path, monkeypatch, capfd
):
    run = subprocess.run

    def run_and_say_the_dtype(command, **options):
        python, option, code, *arguments = command
        return run([python, option, code + "print('computed in', model.dtype)", *arguments], **options)

    monkeypatch.setattr(demo.subprocess, "run", run_and_say_the_dtype)
    devices.compute_fast_in(fast)
    demo.run_demo(tmp_path / "demo")
    printed = capfd.readouterr().out
    assert f"Asked in {fast} by a process without foveate:" in printed
    assert f"computed in torch.{fast}\n" in printed
    assert "What is at the middle left?  ->  square" in printed
    assert (tmp_path / "demo" / "kept.png").is_file()
