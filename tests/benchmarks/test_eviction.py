"""The benchmark of ETC's cache runs what it says that it runs, on one set of weights."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import Qwen3VLConfig

from benchmarks import eviction
from benchmarks.eviction import NAMES, _Bench, benchmark, kv_bytes
from foveate.configuration.configuration_qwen3_vl_etc import Qwen3VLETCConfig
from foveate.modeling.compatibility import cache_of


FIELDS = {
    "text_config": {
        "vocab_size": 2000,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 14,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
    "image_token_id": 1990,
    "video_token_id": 1991,
    "vision_start_token_id": 1992,
    "vision_end_token_id": 1993,
    "tie_word_embeddings": True,
}
SIDE, TEXT = 112, 5  # 4 × 4 visual tokens
BYTES = 3 * 2 * 16 * 4  # of a token's keys and values


def configs():
    return Qwen3VLETCConfig(**FIELDS, compression={"num_visual_tokens": 2}), Qwen3VLConfig(**FIELDS)


@pytest.fixture(scope="module")
def result():
    return benchmark(*configs(), side=SIDE, text_tokens=TEXT, dtype=torch.float32, repeats=2, progress=False)


def test_bytes_are_those_of_what_is_cached(result):
    found = {name: part["kv_bytes"] for name, part in result["parts"].items()}
    assert found == dict(zip(NAMES, ((16 + TEXT) * BYTES, (2 + TEXT) * BYTES, (2 + TEXT) * BYTES)))
    assert result["image_bytes"] == 2 * BYTES  # the image comes first: there is no text before it
    assert (result["visual_tokens"], result["compressed_tokens"], result["text_tokens"]) == (16, 2, TEXT)


def test_every_part_is_timed_and_counted(result):
    for part in result["parts"].values():
        for times in (part["first_token"], part["later_token"], part["first_token_ratio"]):
            assert 0 < times["quartiles"][0] <= times["median"] <= times["quartiles"][1]
    flops = {name: part["flops"]["llm_prefill"] for name, part in result["parts"].items()}
    assert flops["etc, compressed before"] < flops["uncompressed"] < flops["etc"] * 1.2
    assert json.loads(json.dumps(result)) == result


@torch.inference_mode()
def test_the_parts_answer_as_models_of_the_same_weights():
    """A compressed image answers as the image, and the stock model as itself; timing leaves the caches as they were."""
    bench = _Bench(*configs(), SIDE, TEXT, torch.float32)
    etc, before = (bench.first_token(name).logits for name in NAMES[1:])
    torch.testing.assert_close(etc, before, atol=1e-5, rtol=1e-5)
    assert bench.stock.model.language_model is bench.etc.model.language_model
    cache = cache_of(bench.first_token("etc"))
    later = bench.later_token("etc", cache)
    later()
    later()
    assert kv_bytes(cache) == (2 + TEXT) * BYTES


def test_the_peak_is_what_a_call_takes_on_top():
    """In a process of its own: what an earlier test freed, an allocator may still hold, and hand out again."""
    script = (
        "import torch; from benchmarks.eviction import peak_growth\n"
        "output, found = peak_growth(lambda: torch.ones(64_000_000)); print(len(output), found)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    length, found = done.stdout.split()
    assert length == "64000000"
    assert found == "None" or 200e6 < int(found) < 400e6


def test_the_command_prints_the_paper_beside_it(result, monkeypatch, capsys):
    monkeypatch.setattr(eviction, "benchmark", lambda **_: dict(result))
    monkeypatch.setattr(sys, "argv", ["eviction", "--repeats", "2"])
    eviction.main()
    printed = capsys.readouterr().out
    assert "-66.7%" in printed  # (2 + 5) of (16 + 5) tokens
    assert "KV cache 223.54 → 10.44 (-95.3%)" in printed
    assert "Command: python -m benchmarks.eviction --repeats 2" in printed
