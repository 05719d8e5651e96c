"""The `foveate` command: what it prints, and one line and status 2 for whatever is wrong with the input."""

import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from foveate.cli import _quiet, app, parse_settings
from foveate.conversion import convert as convert_module
from foveate.errors import FoveateError
from foveate.evaluation import ask as ask_module
from foveate.evaluation import harness
from foveate.evaluation.examples import PictureSource
from foveate.evaluation.harness import open_checkpoint
from foveate.lab.pictures import PICTURES
from foveate.lab.scenes import draw_scene, sample_scene
from foveate.modeling.core.precision import dtype_name, fast_dtype

from ..helpers.command import assert_refused, run
from ..helpers.tiny_checkpoints import write_clip, write_llava


QUESTION = "what colour is it"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """`base`, `clip` and `compressed`, which the command itself has converted."""
    folder = tmp_path_factory.mktemp("originals")
    write_llava(folder / "base")
    write_clip(folder / "clip")
    found = run("convert", folder / "base", folder / "compressed", "--text-encoder", folder / "clip")
    assert found.exit_code == 0, found.output
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in."""
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture(scope="module")
def checkpoint(originals):
    return open_checkpoint(originals / "compressed", dtype="float32")


@pytest.fixture(scope="module")
def images():
    return [draw_scene(sample_scene("test", index)) for index in range(2)]


class TestCommands:
    def test_help_names_them(self):
        found = run("--help")
        assert found.exit_code == 0
        assert all(
            name in found.output
            for name in ("demo", "methods", "convert", "ask", "evaluate", "card", "verify", "upgrade", "push")
        )

    def test_loading_notes_are_not_shown_but_that_transformers_is_untested_is(self):
        _quiet()
        assert logging.getLogger("transformers.foveate").isEnabledFor(logging.WARNING)
        assert not logging.getLogger("transformers.models").isEnabledFor(logging.WARNING)

    def test_version(self):
        assert run("--version").stdout.startswith("foveate 0.")

    def test_methods(self):
        found = run("methods")
        assert found.exit_code == 0
        for part in (
            "recoverable",
            "Recoverable Compression",
            "LLaVA-1.5",
            "training-free",
            "arxiv.org/abs/2409.01179",
        ):
            assert part in found.stdout

    def test_convert(self, originals, place):
        words = ("--text-encoder", originals / "clip", "--set", "num_visual_tokens=4", "--set", "variant=paper")
        found = run("convert", originals / "base", "out", *words)
        assert found.exit_code == 0, found.output
        assert str(place / "out") in found.stdout
        compression = json.loads(Path("out/config.json").read_text())["compression"]
        assert (compression["num_visual_tokens"], compression["variant"]) == (4, "paper")

    def test_convert_to_a_share_of_the_tokens(self, originals, place):
        run("convert", originals / "base", "out", "--method", "metacompress", "--keep-ratio", "0.5")
        block = json.loads((place / "out" / "config.json").read_text())["compression"]
        assert (block["keep_ratio"], block["num_visual_tokens"]) == (0.5, None)
        run(
            "convert",
            *map(str, (originals / "base", "other", "--text-encoder", originals / "clip")),
            "--keep-ratio",
            "0.5",
        )
        assert json.loads((place / "other" / "config.json").read_text())["compression"]["num_visual_tokens"] == 4

    def test_ask(self, originals, place):
        words = ("--compare", originals / "base", "--show", "shown.png", "--max-new-tokens", 2)
        found = run("ask", originals / "compressed", "lab:3", QUESTION, *words)
        assert found.exit_code == 0, found.output
        assert all(part in found.stdout for part in ("visual tokens", "time to first token", "KV cache", "shown.png"))
        assert f"{dtype_name(fast_dtype('cpu', torch.bfloat16))} on cpu" in found.stdout
        found = run("ask", originals / "compressed", "lab:3", QUESTION, "--max-new-tokens", 1, "--dtype", "float32")
        assert "float32 on cpu" in found.stdout
        assert Image.open("shown.png").format == "PNG"

    def test_ask_prints_json_and_nothing_else(self, originals, place):
        found = run("ask", originals / "compressed", "lab:3", QUESTION, "--json", "--max-new-tokens", 2)
        answer = json.loads(found.stdout)
        assert answer["visual_tokens_before"] == 9
        assert answer["question"] == QUESTION
        assert (answer["dtype"], answer["device"]) == (dtype_name(fast_dtype("cpu", torch.bfloat16)), "cpu")

    @pytest.mark.parametrize(("task", "number"), [("lab-vqa", 6), ("lab-dialogue", 2)])
    def test_evaluate(self, task, number, originals, place):
        words = (
            "--task",
            task,
            "--limit",
            number,
            "--seed",
            3,
            "--json",
            "result.json",
            "--set",
            "num_visual_tokens=4",
        )
        found = run("evaluate", originals / "compressed", *words)
        assert found.exit_code == 0, found.output
        assert task in found.stdout and "9 → 4.0" in found.stdout
        result = json.loads(Path("result.json").read_text())
        assert result["dtype"] == dtype_name(fast_dtype("cpu", torch.bfloat16))
        assert f"{result['dtype']} on cpu" in found.stdout
        assert (result["n"], result["seed"], result["mean_visual_tokens"]) == (number, 3, 4)
        for word in words:
            assert str(word) in result["command"]

    def test_evaluate_on_published_files(self, originals, place):
        """Three dialogues about three images, one of which is missing."""
        rows = {str(i): {"imageId": f"n{i // 3}", "question": "what is it", "answer": "red"} for i in range(9)}
        Path("gqa/images").mkdir(parents=True)
        Path("gqa/testdev_balanced_questions.json").write_text(json.dumps(rows))
        for index in range(2):
            draw_scene(sample_scene("test", index)).save(f"gqa/images/n{index}.jpg")
        words = ("--task", "mt-gqa", "--data", "gqa", "--reuse-cache", "--skip-missing")
        found = run("evaluate", originals / "compressed", *words, "--json", "result.json")
        assert found.exit_code == 0, found.output
        assert "exact match" in found.stdout and "turn 3" in found.stdout
        assert "Left out 1 dialogue(s)" in found.stdout and "questions 6, 7, 8" in found.stdout
        result = json.loads(Path("result.json").read_text())
        assert (result["n"], result["reuse_cache"], result["skipped"]["n"]) == (2, True, 1)
        assert all(word in result["command"] for word in words)


class TestStartUp:
    """Measured by processor time, the best of three: what else the machine does is not in it."""

    @pytest.mark.parametrize("words", [["--help"], ["--version"], ["methods"], ["train", "--help"]], ids=" ".join)
    def test_takes_less_than_a_second(self, words, tmp_path):
        times = []
        for folder in (tmp_path, tmp_path, ROOT):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-m", "foveate", *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert min(times) < 1

    def test_imports_neither_torch_nor_transformers(self):
        names = [command.name or command.callback.__name__ for command in app.registered_commands]
        commands = [["--help"], ["methods"], *([name, "--help"] for name in names)]
        code = (
            "import json, sys; from typer.testing import CliRunner; from foveate.cli import app; "
            "assert not any(CliRunner().invoke(app, words).exit_code for words in json.loads(sys.argv[1])); "
            "print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
        )
        command = [sys.executable, "-c", code, json.dumps(commands)]
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "set()\n"


class TestPublishing:
    @pytest.fixture
    def copy(self, originals, tmp_path) -> Path:
        return shutil.copytree(originals / "compressed", tmp_path / "copies" / "compressed")

    def test_card_says_what_was_evaluated(self, copy, place):
        evaluated = run("evaluate", copy, "--limit", 6, "--json", "result.json")
        assert evaluated.exit_code == 0, evaluated.output
        found = run("card", copy, "--evaluation", "result.json")
        assert found.exit_code == 0, found.output
        assert found.stdout == f"Wrote {copy / 'README.md'}.\n"
        assert "\nfoveate evaluate compressed --task lab-vqa --limit 6 " in (copy / "README.md").read_text()
        assert_refused("another checkpoint", "card", self.changed(copy), "--evaluation", "result.json")
        assert run("card", copy).exit_code == 0
        assert "not evaluated" in (copy / "README.md").read_text()

    def test_card_takes_the_license_of_the_base_that_is_named(self, copy, place):
        shutil.copytree(copy, "mine")
        Path("mine/README.md").write_text("---\nlicense: llama2\n---\n")
        assert run("card", copy, "--base", "mine").exit_code == 0
        card = (copy / "README.md").read_text()
        assert "\nlicense: llama2\n" in card and "\n# mine with " in card

    def changed(self, copy) -> Path:
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "more": 1}))
        return copy

    def test_verify_ends_with_0_or_1(self, copy):
        found = run("verify", copy)
        assert found.exit_code == 0 and "as foveate" in found.stdout and "--full reads them whole" in found.stdout
        assert run("verify", copy, "--full").exit_code == 0
        found = run("verify", self.changed(copy))
        assert found.exit_code == 1 and "changed: config.json" in found.stdout and found.stderr == ""
        assert run("verify", copy.parent).exit_code == 1

    def test_push_lists_what_it_would_upload(self, copy):
        found = run("push", copy, "user/tiny", "--dry-run")
        assert found.exit_code == 0, found.output
        for path in copy.rglob("*"):
            assert not path.is_file() or path.relative_to(copy).as_posix() in found.stdout
        assert "Dry run: " in found.stdout and found.stdout.rstrip().endswith("/user/tiny.")

    def test_push_refuses(self, copy, place):
        self.changed(copy)
        assert_refused("not as foveate", "push", copy, "user/tiny", "--dry-run")
        assert run("push", copy, "user/tiny", "--dry-run", "--force").exit_code == 0
        (copy / "old.bin").write_bytes(b"")
        assert_refused("old.bin is a pickle", "push", copy, "user/tiny", "--dry-run", "--force")

    @pytest.mark.parametrize("words", [("card",), ("verify",), ("push", "user/tiny")])
    def test_what_is_not_there(self, words, place):
        command, *more = words
        complaint = "is no checkpoint" if command == "card" else "is no folder"
        assert_refused(complaint, command, "nowhere", *more)


class TestSettings:
    def test_are_json_or_text(self):
        words = ["a=1", "b=0.5", "c=true", "d=null", "e=paper", 'f="1"', "g=x=y", "h="]
        assert parse_settings(words) == {
            "a": 1, "b": 0.5, "c": True, "d": None, "e": "paper", "f": "1", "g": "x=y", "h": "",
        }  # fmt: skip
        assert parse_settings(None) == {}

    @pytest.mark.parametrize("word", ["variant", "=paper", ""])
    def test_need_a_key_and_a_value(self, word):
        with pytest.raises(FoveateError, match="KEY=VALUE"):
            parse_settings([word])


class TestBadInput:
    def test_no_question(self, originals, place):
        assert_refused("no question", "ask", originals / "compressed", "lab:0", "")

    def test_an_image_that_is_not_there(self, originals, place):
        assert_refused("nothing.png can't be read", "ask", originals / "compressed", "nothing.png", QUESTION)

    def test_an_image_that_is_none(self, originals, place):
        Path("notes.png").write_text("no picture")
        assert_refused("not an image", "ask", originals / "compressed", "notes.png", QUESTION, "--show", "shown.png")

    def test_an_image_of_8000_by_10_pixels(self, originals, place):
        Image.new("RGB", (8000, 10)).save("strip.png")
        assert_refused("8000 × 10", "ask", originals / "compressed", "strip.png", QUESTION, "--show", "shown.png")

    @pytest.mark.parametrize("mode", ["RGBA", "L", "I;16", "pixel"])
    def test_an_image_of_another_mode_or_of_one_pixel_is_none(self, mode, originals, place):
        image = draw_scene(sample_scene("test", 0))
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        else:
            image = Image.new("RGB", (1, 1)) if mode == "pixel" else image.convert(mode)
        image.save("image.png")
        found = run("ask", originals / "compressed", "image.png", QUESTION, "--max-new-tokens", 1)
        assert found.exit_code == 0, found.output

    @pytest.mark.parametrize("command", ["ask", "evaluate"])
    def test_a_checkpoint_that_is_not_there(self, command, place):
        words = ("lab:0", QUESTION) if command == "ask" else ()
        assert_refused("neither a folder nor a model on the hub", command, "nobody/nothing", *words)

    @pytest.mark.parametrize("command", ["ask", "evaluate"])
    def test_a_truncated_weight_file(self, command, originals, place, tmp_path):
        copy = shutil.copytree(originals / "compressed", tmp_path / "copy")
        cut(min(copy.glob("*.safetensors")))
        words = ("lab:0", QUESTION, "--show", "shown.png") if command == "ask" else ("--json", "result.json")
        assert_refused("truncated", command, copy, *words)

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (("--task", "vqa"), "choose one of lab-vqa, lab-dialogue"),
            (("--limit", 0), "limit is 0"),
            (("--set", "variant"), "KEY=VALUE"),
            (("--set", "variant=new"), "variant must be one of"),
            (("--set", "num_visual_tokens=10"), "choose at most 9"),
            (("--set", "colour=red"), "Unknown compression setting 'colour'"),
            (("--device", "abacus"), "no device"),
            (("--task", "mt-vqa-v2"), "--data names the folder"),
            (("--task", "mt-vqa-v2", "--data", "nowhere"), "no folder nowhere"),
            (("--data", "nowhere"), "reads no files"),
        ],
    )
    def test_of_evaluate(self, words, complaint, originals, place):
        assert_refused(complaint, "evaluate", originals / "compressed", "--json", "result.json", *words)

    @pytest.mark.parametrize("words", [("ask",), ("nonsense",), ("evaluate", "x", "--limit", "many"), ("methods", "x")])
    def test_of_the_command_line_itself(self, words):
        found = run(*words)
        assert found.exit_code == 2
        assert "Traceback" not in found.output


class TestConversionThatFails:
    def convert(self, folder, *words):
        return "convert", folder / "base", "out", "--text-encoder", folder / "clip", *words

    @pytest.fixture
    def copies(self, originals, tmp_path, place) -> Path:
        """A base and a CLIP of the test's own."""
        for name in ("base", "clip"):
            shutil.copytree(originals / name, tmp_path / "copies" / name)
        return tmp_path / "copies"

    def test_a_base_that_is_no_llava(self, originals, place):
        assert_refused("is a 'clip'", "convert", originals / "clip", "out")

    def test_a_base_that_is_compressed_already(self, originals, place):
        assert_refused("compressed already", "convert", originals / "compressed", "out")

    def test_a_text_encoder_without_projections(self, copies):
        path = copies / "clip" / "model.safetensors"
        tensors = {key: value for key, value in load_file(path).items() if "projection" not in key}
        save_file(tensors, path, metadata={"format": "pt"})
        assert_refused("projection", *self.convert(copies))

    @pytest.mark.parametrize("name", ["base", "clip"])
    def test_truncated_weights(self, name, copies):
        cut(copies / name / "model.safetensors")
        assert_refused("truncated", *self.convert(copies))

    def test_out_that_exists(self, originals, place):
        Path("out").mkdir()
        Path("out/notes.txt").write_text("mine")
        assert_refused("exists already", *self.convert(originals))
        assert os.listdir("out") == ["notes.txt"]

    def test_a_disk_that_gets_full(self, originals, place, monkeypatch):
        def fail(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(convert_module, "write_safetensors", fail)
        assert_refused("No space left", *self.convert(originals))

    def test_a_disk_that_is_full(self, originals, place, monkeypatch):
        usage = shutil.disk_usage(place)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert_refused("No space left", *self.convert(originals))

    def test_an_unknown_method_or_setting(self, originals, place):
        assert_refused("no method 'magic'", *self.convert(originals, "--method", "magic"))
        assert_refused("'colour'", *self.convert(originals, "--set", "colour=red"))

    def test_a_budget_out_of_range_or_said_twice(self, originals, place):
        base = "convert", originals / "base", "out", "--method", "sample"
        assert_refused("above 0 and at most 1, not 1.5", *base, "--keep-ratio", "1.5")
        assert_refused("give one of them", *base, "--keep-ratio", "0.5", "--num-visual-tokens", "4")
        assert_refused("choose at most 9", *base, "--num-visual-tokens", "10")


class TestOtherEnds:
    def test_an_interrupt_ends_with_status_130(self, originals, place, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(harness, "_ask_batch", interrupt)
        found = run("evaluate", originals / "compressed", "--json", "result.json")
        assert found.exit_code == 130
        assert "interrupted" in found.stderr and os.listdir() == []

    @pytest.mark.parametrize("kind", [RuntimeError, ValueError, TypeError])
    def test_a_bug_keeps_its_traceback(self, kind, originals, monkeypatch):
        """Also a `ValueError`, where it isn't our own or Transformers' word on the input."""

        def fail(*_):
            raise kind("a bug")

        monkeypatch.setattr(ask_module, "_times_to_first_token", fail)
        found = run("ask", originals / "compressed", "lab:0", QUESTION)
        assert found.exit_code == 1 and type(found.exception) is kind

    def test_something_not_installed(self, originals, monkeypatch):
        def fail(*_):
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")

        monkeypatch.setitem(PICTURES, "lab", PictureSource("scene", fail))
        assert_refused("pip install 'foveate[eval]'", "ask", originals / "compressed", "lab:0", QUESTION)

    def test_from_a_shell(self, originals, place):
        """The same in a process of its own: no traceback, no warning, no progress bar."""
        words = [sys.executable, "-m", "foveate", "ask", originals / "compressed", "nothing.png", QUESTION]
        found = subprocess.run(words, capture_output=True, text=True)
        assert found.returncode == 2
        assert found.stdout == ""
        assert found.stderr == "foveate: The image nothing.png can't be read: No such file or directory.\n"

    SCRIPT = """
import atexit, gc
from foveate import cli

assert gc.isenabled()  # importing lets it be
atexit.register(print, "registered for the end")

@cli.app.command()
def end(status: int):
    print("unwritten", end=" ")
    if status < 0:
        raise RuntimeError("a bug")
    raise SystemExit(status)

cli.main()
"""

    @pytest.mark.parametrize("status", [0, 3])
    def test_the_end_of_the_process(self, status):
        """It is cut short: what was printed is there, what waits for the end has run, and the status is as it was."""
        found = subprocess.run([sys.executable, "-c", self.SCRIPT, "end", str(status)], capture_output=True, text=True)
        assert (found.returncode, found.stdout, found.stderr) == (status, "unwritten registered for the end\n", "")

    def test_the_end_after_a_bug(self):
        found = subprocess.run([sys.executable, "-c", self.SCRIPT, "end", "--", "-1"], capture_output=True, text=True)
        assert found.returncode == 1
        assert found.stdout == "unwritten registered for the end\n"
        assert "RuntimeError" in found.stderr and "leaked" not in found.stderr

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
    def test_output_that_can_not_be_written(self):
        """As Python says it, and not with status 0."""
        with Path("/dev/full").open("w") as full:
            words, buffered = [sys.executable, "-c", self.SCRIPT, "end", "0"], {**os.environ, "PYTHONUNBUFFERED": ""}
            found = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, env=buffered)
        assert found.returncode == 120
        assert "No space left on device" in found.stderr


class TestTheProcessor:
    """What has no command of its own: prompts and images as Python passes them."""

    def test_two_images_and_one_placeholder(self, checkpoint, images):
        with pytest.raises(ValueError, match=r"1 <image> placeholder\(s\) for 2 image\(s\)"):
            checkpoint.processor(images=images, text=f"USER: <image> {QUESTION} ASSISTANT:")

    @pytest.mark.parametrize("text", ["USER: <image> ASSISTANT:", "<image>"])
    def test_an_image_without_a_question(self, text, checkpoint, images):
        with pytest.raises(ValueError, match="no question beside it"):
            checkpoint.processor(images=images[:1], text=text)

    @torch.no_grad()
    def test_a_text_only_row_in_a_batch_gets_what_it_gets_alone(self, checkpoint, images):
        prompts = [f"USER: <image> {QUESTION} ASSISTANT:", "USER: what is red ASSISTANT:"]
        pictures = [[images[0]], []]

        def logits(rows):
            inputs = checkpoint.processor(
                images=[pictures[row] for row in rows],
                text=[prompts[row] for row in rows],
                padding=True,
                return_tensors="pt",
            )
            return checkpoint.model(**inputs).logits[:, -1]

        together = logits([0, 1])
        alone = torch.cat([logits([0]), logits([1])])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])
