"""The benchmark of conversion at real size, here at a small one."""

import json
import sys

import pytest
from transformers import LlavaConfig

from benchmarks import conversion
from benchmarks.conversion import benchmark, make_base, run
from foveate.conversion.checkpoints import read_shards
from foveate.errors import FoveateError
from foveate.lab import lab_folder


TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}


pytestmark = pytest.mark.slow  # a dozen processes that import torch


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    config = LlavaConfig.from_pretrained(lab_folder("tiny-llava"))
    return benchmark(tmp_path_factory.mktemp("work"), config, rounds=2, kills=2, text=TEXT)


def test_a_base_is_as_published(tmp_path):
    make_base(tmp_path / "base", LlavaConfig.from_pretrained(lab_folder("tiny-llava")), num_shards=2)
    names = {name for shard in read_shards(tmp_path / "base") for name in shard.tensors}
    assert names == {name for shard in read_shards(lab_folder("tiny-llava")) for name in shard.tensors}


def test_what_is_converted_is_whole_and_what_is_killed_is_not_there(result):
    runs = result["runs"]
    assert [len(runs[name]) for name in ("cp", "copy", "link", "original")] == [2, 2, 2, 1]
    assert all(one["whole"] for name in ("cp", "copy", "link", "original") for one in runs[name])
    assert len(result["kills"]) == 2
    assert "half" not in result["kills"]
    for name in ("libraries", "import", "copy", "link", "original"):
        assert all(50e6 < one["own_bytes"] < one["peak_bytes"] for one in runs[name])
    assert 0 < runs["cp"][0]["seconds"] < runs["copy"][0]["seconds"]
    assert json.loads(json.dumps(result)) == result


def test_a_failure_is_said():
    with pytest.raises(FoveateError, match="failed: "):
        run([sys.executable, "-c", "raise SystemExit('no')"])


def test_the_command_prints_the_targets(result, monkeypatch, capsys):
    monkeypatch.setattr(conversion, "benchmark", lambda *_, **__: dict(result))
    monkeypatch.setattr(sys, "argv", ["conversion"])
    conversion.main()
    printed = capsys.readouterr().out
    assert "Targets: 600 MB; --link 5 s; by copy cp + 5 s." in printed
    assert "half 0" in printed
    assert "Target: 1500 MB." in printed
