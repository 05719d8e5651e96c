"""The benchmark of the time to first token runs what it says that it runs, on one set of weights."""

import json
import sys

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from benchmarks import prefill, timing
from benchmarks.prefill import _Bench, benchmark
from foveate.configuration.configuration_llava_metacompress import LlavaMetaCompressConfig
from foveate.errors import FoveateError
from foveate.modeling.compatibility import cache_of, visual_tokens_of


PARTS = ["metacompress", "sample", "uncompressed", "language model", "compressor"]


def tiny_config(*_):
    """16 patches, of which 4 are left."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlavaMetaCompressConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=56, patch_size=14),
        text_config=LlamaConfig(**sizes, vocab_size=20),
        image_token_index=5,
        compression={"keep_ratio": 0.25, "key_width": 4},
    )


@pytest.fixture(scope="module")
def result():
    return benchmark(
        tiny_config(), with_base=True, text_tokens=6, batch_size=2, dtype=torch.float32, repeats=3, progress=False
    )


def test_every_part_and_ratio_has_a_median_and_quartiles(result):
    assert list(result["milliseconds"]) == PARTS
    for times in [*result["milliseconds"].values(), *result["ratios"].values()]:
        low, high = times["quartiles"]
        assert 0 < low <= times["median"] <= high
    assert json.loads(json.dumps(result)) == result


def test_ratios_stand_beside_those_of_the_account_and_the_targets(result):
    ratios = result["ratios"]
    assert {name: ratio["target"] for name, ratio in ratios.items()} == {
        "metacompress : sample": 1.03,
        "metacompress : uncompressed": None,
        "compressor : language model": 0.02,
        "compressor : metacompress": None,
    }
    compressor = 2 * ((4 + 16) * 16 * 4 + 4 * 16 * (4 + 16))
    share = ratios["compressor : metacompress"]["by_account"]
    assert ratios["metacompress : sample"]["by_account"] == pytest.approx(1 / (1 - share))
    assert ratios["metacompress : uncompressed"]["by_account"] < 1
    flops = _Bench(tiny_config(), 6, 1, torch.float32).flops()
    assert flops["compressor"] == compressor
    assert ratios["compressor : language model"]["by_account"] == compressor / flops["language model"]
    assert (result["visual_tokens"], result["uncompressed_visual_tokens"], result["layers"]) == (4, 16, 2)


@torch.inference_mode()
def test_all_models_are_made_of_the_same_weights_and_differ_in_their_tokens():
    bench = _Bench(tiny_config(), text_tokens=6, batch_size=1, dtype=torch.float32)
    own = {id(parameter) for parameter in bench.metacompress.parameters()}
    seen = {}
    for name in ("metacompress", "sample", "uncompressed"):
        model = getattr(bench, name)
        assert {id(parameter) for parameter in model.parameters()} <= own
        assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
        output = bench.first_token(model)()
        assert output.logits.shape[1] == 1 and output.logits.isfinite().all()
        seen[name] = (cache_of(output).layers[0].keys.shape[2], len(visual_tokens_of(output)))
    assert seen == {"metacompress": (10, 4), "sample": (10, 4), "uncompressed": (22, 16)}


def test_the_same_in_bfloat16_with_fewer_layers_and_without_the_base():
    found = benchmark(tiny_config(), layers=1, text_tokens=6, dtype=torch.bfloat16, repeats=1, progress=False)
    assert list(found["milliseconds"]) == [name for name in PARTS if name != "uncompressed"]
    assert (found["layers"], found["all_layers"], found["dtype"]) == (1, 2, "bfloat16")


def test_a_model_that_doesnt_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(timing, "_HEADROOM", 1e12)
    with pytest.raises(FoveateError, match=r"don't fit in the .* GB of memory that are free: run fewer layers"):
        benchmark(tiny_config(), progress=False)


@pytest.mark.parametrize("words", [[], ["--json"], ["--cpu-time", "--with-base"]])
def test_the_command_prints_a_table_or_json(words, monkeypatch, capsys):
    monkeypatch.setattr(prefill, "config_of_shape", tiny_config)
    monkeypatch.setattr(sys, "argv", ["", "--repeats", "1", "--dtype", "float32", "--layers", "1", *words])
    prefill.main()
    printed = capsys.readouterr().out
    if "--json" in words:
        found = json.loads(printed)
        assert (found["batch_size"], found["text_tokens"], found["layers"]) == (1, 60, 1)
        assert found["command"].startswith("python -m benchmarks.prefill --repeats 1")
    else:
        assert "16 → 4 visual tokens, 60 of text, 1 of 2 layers" in printed
        assert "at most 103%" in printed and "at most 2%" in printed
        assert ("metacompress : uncompressed" in printed) == ("--with-base" in words)
        assert f"By {'processor' if words else 'wall'} time" in printed


@pytest.mark.parametrize(
    ("words", "complaint"), [(["--layers", "3"], "choose from 1 to"), (["--repeats", "0"], "at least 1")]
)
def test_the_command_answers_bad_options_with_one_line(words, complaint, monkeypatch, capsys):
    monkeypatch.setattr(prefill, "config_of_shape", tiny_config)
    monkeypatch.setattr(sys, "argv", ["", *words])
    with pytest.raises(SystemExit):
        prefill.main()
    assert complaint in capsys.readouterr().err
