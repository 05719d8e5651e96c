"""The benchmark of LLaVA-Meteor's fusion runs what it says that it runs."""

import json
import sys

import pytest
import torch

from benchmarks import fusion
from benchmarks.fusion import _Bench, benchmark
from benchmarks.timing import Shapes


SHAPES = Shapes(width=32, layers=3, heads=2, image_size=56, patch_size=14)


@pytest.fixture(scope="module")
def result():
    return benchmark(SHAPES, batch_size=2, dtype=torch.float32, repeats=2, progress=False)


def test_every_part_is_timed(result):
    assert len(result["parts"]) == 5 + 3
    for found in result["parts"].values():
        assert 0 < found["quartiles"][0] <= found["median"] <= found["quartiles"][1]
    tower, fusion = result["parts"]["vision tower"]["median"], result["parts"]["fusion"]["median"]
    assert result["share"]["fusion"] == fusion / tower
    assert set(result["microseconds_a_patch"]) == {"144", "576", "2304"}
    assert json.loads(json.dumps(result)) == result


@torch.inference_mode()
def test_the_two_blocks_compute_the_same():
    bench = _Bench(SHAPES, 2, torch.float32)
    torch.nn.init.normal_(bench.fusion.forward_mixer.out_proj.weight)
    bench.mixer.load_state_dict(bench.fusion.forward_mixer.state_dict())
    ours, theirs = (bench.parts()[name]() for name in ("one block of it", "the same, Transformers' mixer"))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_the_tower_and_the_selection_are_on_whole_views():
    bench = _Bench(SHAPES, 2, torch.float32)
    features, row = bench.run_tower()
    assert features.shape == (2, 16, 32)
    assert row.shape == (2, 16)
    assert bench.select().shape == (2, 16, 32)


def test_the_command_prints_the_target_beside_it(result, monkeypatch, capsys):
    monkeypatch.setattr(fusion, "benchmark", lambda *_, **__: dict(result))
    monkeypatch.setattr(sys, "argv", ["fusion", "--repeats", "2"])
    fusion.main()
    printed = capsys.readouterr().out
    assert "Target: fusion at most 15% of the tower's forward." in printed
    assert "Command: python -m benchmarks.fusion --repeats 2" in printed
