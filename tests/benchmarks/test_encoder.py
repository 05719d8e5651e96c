"""The benchmark of the vision encoder says what it measured, next to what it should be."""

import json
import sys

import pytest
import torch

from benchmarks import encoder
from benchmarks.encoder import benchmark
from benchmarks.timing import Shapes, measure_in_turns, spread
from foveate.evaluation.flops import flops
from foveate.modeling.methods.qgvtc_account import encoder_ratio


SHAPES = Shapes(
    width=32, layers=6, heads=2, image_size=56, text_width=32, text_layers=1, text_heads=2, projection=16
)  # 16 patches


@pytest.fixture(scope="module")
def result():
    return benchmark(
        SHAPES, num_visual_tokens=4, layers=[2, 4], batch_size=2, dtype=torch.float32, repeats=3, progress=False
    )


def test_every_part_has_a_median_and_quartiles(result):
    assert result["milliseconds"].keys() == {
        "stock, 6 layers",
        "stock, 5 layers",
        "compressed, 5 layers",
        "compressed, 6 layers",
        "text encoder",
        "question MLP",
    }
    for times in [*result["milliseconds"].values(), *result["ratios"].values()]:
        low, high = times["quartiles"]
        assert 0 < low <= times["median"] <= high
    assert json.loads(json.dumps(result)) == result


def test_each_ratio_stands_beside_the_share_of_flops(result):
    assert result["R"] == pytest.approx(encoder_ratio([2, 4], 4, 16, 6, 32, 128) / 100)
    assert result["distance_from_R"] == pytest.approx(result["ratios"]["all_layers"]["median"] / result["R"] - 1)
    shares = [result["ratios"][name]["by_account"] for name in ("as_run", "all_layers", "without_last_layer")]
    assert shares == sorted(shares)


def test_the_account_of_what_is_run_is_that_of_the_model():
    paper = Shapes()
    found = flops(shape="llava-1.5-7b", method="qg-vtc", settings={"num_visual_tokens": 72})
    config = encoder.LlavaQGVTCConfig(
        vision_config=paper.vision_config, question_config=paper.text_config, compression={"num_visual_tokens": 72}
    )
    ratios = encoder._ratios(torch.ones(1, 25), torch.ones(1, 25), config)
    assert ratios["as_run"]["by_account"] == found.model.vision_tower / found.base.vision_tower


def test_the_layers_are_told_one_by_one(result):
    rows = result["layers"]
    assert [row["layer"] for row in rows] == list(range(6))
    assert [row["entering"] for row in rows] == [16, 16, 16, 10, 10, 4]
    assert [row["leaving"] for row in rows] == [16, 16, 10, 10, 4, 4]
    assert [row["layer"] for row in rows if row["compresses"]] == [2, 4]
    assert all(row["milliseconds"] > 0 and row["stock_milliseconds"] > 0 for row in rows)
    assert [row["by_account"] for row in rows[:2]] == [1, 1] and rows[2]["by_account"] < 1


def test_parts_measure_in_turns_and_the_first_round_warms_up():
    calls = []
    parts = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert measure_in_turns(parts, repeats=2, progress=False) == {"a": [3, 5], "b": [4, 6]}
    assert "".join(calls) == "ababab"
    assert spread([4.0]) == {"median": 4.0, "quartiles": [4.0, 4.0]}
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "quartiles": [2.0, 4.0]}


@pytest.mark.parametrize("words", [[], ["--json"], ["--cpu-time"]])
def test_the_command_prints_a_table_or_json(words, monkeypatch, capsys):
    monkeypatch.setattr(encoder, "Shapes", lambda: SHAPES)
    options = ["--batch-size", "1", "--repeats", "1", "--dtype", "float32", "--num-visual-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["", *options, "--layers", "2,4", *words])
    encoder.main()
    printed = capsys.readouterr().out
    if "--json" in words:
        assert json.loads(printed)["compression"]["layers"] == [2, 4]
        assert json.loads(printed)["command"].startswith("python -m benchmarks.encoder --batch-size")
    else:
        assert "R of Eq. 6 is" in printed and "16 → 10" in printed
        assert f"By {'processor' if words else 'wall'} time" in printed


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--layers", "12;14"], "invalid layer_list value"),
        (["--layers", "23"], "choose layers from 0 to 22"),
        (["--num-visual-tokens", "577"], "only 576 patches"),
        (["--repeats", "0"], "at least 1"),
    ],
)
def test_the_command_answers_bad_options_with_one_line(words, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", *words])
    with pytest.raises(SystemExit):
        encoder.main()
    assert complaint in capsys.readouterr().err
