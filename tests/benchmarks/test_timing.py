"""What all benchmarks have alike: they compute in what the processor is fast in, if nobody says otherwise."""

import importlib
import sys

import pytest
import torch

from benchmarks.timing import command_parser, conditions, describe, parse
from foveate.errors import FoveateError


class MadeError(Exception):
    """Ends a benchmark before it runs anything."""


@pytest.mark.parametrize("name", ["compression", "encoder", "eviction", "fusion", "prefill"])
@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float32])
def test_the_dtype_is_what_the_processor_computes_fast_in(name, fast, monkeypatch):
    module, made = importlib.import_module(f"benchmarks.{name}"), []

    class Bench:
        def __init__(self, *args):
            made.extend(arg for arg in args if isinstance(arg, torch.dtype))
            raise MadeError

    monkeypatch.setattr(module, "_Bench", Bench)
    monkeypatch.setattr(module, "fast_dtype", lambda device: fast if device == "cpu" else None)
    for chosen, expected in (({}, fast), ({"dtype": torch.bfloat16}, torch.bfloat16)):
        with pytest.raises(MadeError):
            module.benchmark(progress=False, **chosen)
        assert made.pop() == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], None),
        (["--dtype", "auto"], None),
        (["--dtype", "bfloat16"], torch.bfloat16),
        (["--dtype", "float32"], torch.float32),
    ],
)
def test_the_option_names_it(words, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", *words])
    arguments, command = parse(command_parser("fusion", None))
    assert arguments.dtype is expected
    assert command == " ".join(["python -m benchmarks.fusion", *words])


@pytest.mark.parametrize("name", ["compression", "encoder", "eviction", "fusion", "prefill"])
def test_what_cannot_be_measured_is_one_sentence(name, monkeypatch, capsys):
    def refuse(**options):
        assert options["repeats"] == 2
        raise FoveateError("There is no memory: run fewer layers.")

    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(module, "benchmark", refuse)
    monkeypatch.setattr(sys, "argv", ["", "--repeats", "2"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("error: There is no memory: run fewer layers.\n")


def test_the_conditions_say_it():
    assert ", float32, " in describe(conditions(8, torch.float32, 3))
