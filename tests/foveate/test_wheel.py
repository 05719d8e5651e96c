"""The wheel, installed alone in an environment outside the repository, has all that the commands need."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from foveate import FoveateError, lab_folder
from foveate.cli import app

from ..helpers.original_checkpoints import write_original
from ..helpers.tiny_checkpoints import write_clip


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FOLDERS = ("configuration", "processing", "modeling", "conversion", "hub_cards", "training", "evaluation", "lab")
QUESTION = "What is at the middle left?"

#: Every command, one after the other in one folder, after `foveate demo`. `import` has ORIGINAL, which is made for it.
COMMANDS = [
    ["methods"],
    ["flops", "--shape", "llava-1.5-7b", "--method", "qg-vtc", "--num-visual-tokens", "72"],
    ["convert", "lab:tiny-llava", "small", "--method", "metacompress", "--set", "key_width=64", "--layout", "adapter"],
    ["merge", "small", "whole"],
    ["train", "metacompress", "whole", "trained", "--data", "lab:4", "--max-steps", "1", "--batch-size", "1"],
    ["ask", "trained", "lab:7", QUESTION, "--show", "kept.png"],
    ["evaluate", "demo/checkpoint", "--limit", "4", "--json", "result.json"],
    ["card", "demo/checkpoint", "--evaluation", "result.json"],
    ["verify", "demo/checkpoint"],
    ["upgrade", "demo/checkpoint"],
    ["push", "demo/checkpoint", "user/name", "--dry-run"],
    ["import", "ORIGINAL", "imported"],
]

#: Runs commands, one JSON list a line, in the environment with the wheel; prints what became of each.
DRIVER = """
import json, sys
from typer.testing import CliRunner
from foveate.cli import app

found = []
for words in json.load(sys.stdin):
    run = CliRunner().invoke(app, words, prog_name="foveate")
    found.append({"status": run.exit_code, "output": run.output, "error": repr(run.exception)})
modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "foveate"]
print("FOUND" + json.dumps([found, sorted({str(module.__file__) for module in modules})]))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with the source distribution, and the wheel that is made of it."""
    folder = tmp_path_factory.mktemp("built")
    hidden = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*FOLDERS, "foveate", "benchmarks"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=hidden)
    (folder / "source" / "lab" / "weights" / "tiny-llava" / "optimizer.pt").touch()  # as a training could leave it
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder / "source"),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder / "dist"


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory) -> Path:
    """A virtual environment with the wheel, and this one's packages. Those come by a `.pth` file, which does not read
    theirs, so that an editable install of foveate in this environment is none in that."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    paths = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "base.pth").write_text("\n".join(paths))
    [wheel] = built.glob("*.whl")
    command = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--ignore-installed", str(wheel)], check=True)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder that the commands run in, with an original for `import`."""
    folder = tmp_path_factory.mktemp("place")
    write_clip(folder / "clip")
    write_original(folder / "ORIGINAL", folder / "clip")
    return folder


def run(environment: Path, place: Path, *command: str, **options) -> subprocess.CompletedProcess:
    """A program of the environment, in a process that knows nothing of the repository."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hub")}
    words = [str(environment / "bin" / command[0]), *command[1:]]
    return subprocess.run(words, cwd=place, env=variables, capture_output=True, encoding="utf-8", **options)


@pytest.fixture(scope="module")
def demonstrated(environment, place):
    return run(environment, place, "foveate", "demo")


@pytest.fixture(scope="module")
def found(environment, place, demonstrated):
    """What became of the commands, and of `--help` of each; and the files of foveate that were imported for them."""
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    commands = [*COMMANDS, *([name, "--help"] for name in names)]
    done = run(environment, place, "python", "-c", DRIVER, input=json.dumps(commands))
    assert done.returncode == 0, done.stderr
    results, files = json.loads(done.stdout.rpartition("FOUND")[2])
    return {" ".join(words): result for words, result in zip(commands, results)}, files


def test_has_all_modules_and_data_and_nothing_else(built):
    [wheel], [source] = built.glob("*.whl"), built.glob("*.tar.gz")
    kept = {".py", ".md", ".yaml", ".json", ".jinja", ".safetensors"}
    files = {f"foveate/{path.name}" for path in (ROOT / "foveate").glob("*.py")} | {"foveate/py.typed"}
    for folder in FOLDERS:
        files |= {f"foveate/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*") if path.suffix in kept}
    left_out = ("foveate/lab/results/", "foveate/lab/work/")
    files = {name for name in files if not name.startswith(left_out)} - {"foveate/lab/RESULTS.md"}
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert in_wheel == files
    with tarfile.open(source) as archive:
        in_source = {name.partition("/")[2] for name in archive.getnames()}
    assert {name.removeprefix("foveate/") for name in files if name.count("/") > 1} <= in_source
    assert not [name for name in in_source if name.startswith(("tests", "benchmarks", "lab/results", "lab/work"))]


def test_has_of_the_labs_weights_what_its_names_reach_and_its_recipes(built):
    with pytest.raises(FoveateError, match="it has: ") as refused:
        lab_folder("nothing")
    names = str(refused.value).partition("it has: ")[2].removesuffix(".").split(", ")
    [wheel] = built.glob("*.whl")
    files = [name.split("/")[2:] for name in zipfile.ZipFile(wheel).namelist() if name.startswith("foveate/lab/")]
    data = [parts for parts in files if not parts[-1].endswith(".py")]
    assert {parts[0] for parts in data} == {"weights", "recipes"}
    assert {parts[1] for parts in data if parts[0] == "weights"} == set(names)
    for name in names:  # each is a checkpoint, or a shard that is put together with one
        assert [file for file in ("config.json", "shard.json") if ["weights", name, file] in data], name


def test_foveate_comes_from_the_wheel_alone(environment, place, found):
    _, files = found
    assert len(files) > 50
    assert all(Path(file).is_relative_to(environment) for file in files)


def test_runs_the_demo(demonstrated, place):
    assert (demonstrated.returncode, demonstrated.stderr) == (0, "")
    assert "->  square   (38 of 144 visual tokens)" in demonstrated.stdout
    assert (place / "demo" / "kept.png").is_file()


def test_every_command_is_run():
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert names == {words[0] for words in COMMANDS} | {"demo"}


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_runs(words, found):
    results, _ = found
    result = results[" ".join(words)]
    assert result["status"] == 0, result
    help_text = results[f"{words[0]} --help"]
    assert help_text["status"] == 0, help_text
    assert f"foveate {words[0]}" in help_text["output"]
