"""The model card: valid metadata, nothing that nobody knows, and examples that run."""

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import LlavaConfig

from foveate import evaluate
from foveate.errors import FoveateError
from foveate.evaluation.flops import flops
from foveate.evaluation.shapes import SHAPES, config_of_shape
from foveate.hub_cards import compression_table
from foveate.hub_cards.card import PLACE, read_base_name, write_card
from foveate.hub_cards.compression_table import image_sizes, table_of
from foveate.registry import METHODS, pairs_of


SHAPE_OF = {"llava": "llava-1.5-7b", "llava_next": "llava-next-vicuna-7b", "qwen3_vl": "qwen3-vl-2b"}
PAIRS = [(method.name, SHAPE_OF[b.base_model_type]) for method in METHODS.values() for b in pairs_of(method.name)]


@pytest.fixture
def of_shape(tmp_path):
    """Makes a folder with the config of a published shape."""

    def make(shape, method, **settings):
        config_of_shape(shape, method, settings).save_pretrained(tmp_path)
        return tmp_path

    return make


@pytest.fixture(scope="module")
def result(written, tmp_path_factory):
    """A result file of the checkpoint, at another budget than its own."""
    file = tmp_path_factory.mktemp("results") / "result.json"
    evaluate(written, limit=6, output=file, settings={"keep_ratio": 0.4}, progress=False)
    return file


def metadata(folder) -> dict:
    return ModelCard.load(folder / "README.md").data.to_dict()


class TestMetadata:
    def test_says_what_the_hub_asks(self, copy):
        assert metadata(copy) == {
            "library_name": "transformers",
            "pipeline_tag": "image-text-to-text",
            "tags": ["foveate", "sample", "visual-token-compression"],
            "license": "other",
            "license_name": "tiny",
        }

    def test_of_a_base_on_the_hub_its_license_can_be_found_there(self, copy, licensed_base):
        write_card(copy, "org/base", licensed_base)
        found = metadata(copy)
        assert found["base_model"] == "org/base"
        assert found["license_link"] == "https://huggingface.co/org/base/blob/main/LICENSE.md"
        card = (copy / "README.md").read_text()
        assert "License: the base's, [tiny](https://huggingface.co/org/base/blob/main/LICENSE.md)." in card
        write_card(copy)
        assert (copy / "README.md").read_text() == card, "a card written again has it from the one before"

    @pytest.mark.parametrize("readme", [None, "# No metadata", "---\nlicense: [\n---\n", "---\nlicense: 7\n---\n"])
    def test_no_license_is_made_up(self, readme, copy, tmp_path):
        if readme is not None:
            (tmp_path / "README.md").write_text(readme)
        write_card(copy, "org/base", tmp_path)
        assert not any(name.startswith("license") for name in metadata(copy))
        assert "License: not stated by the base's card" in (copy / "README.md").read_text()

    def test_the_base_is_known_by_its_name_alone(self, written, licensed_base):
        assert read_base_name(written) == licensed_base.name
        assert str(licensed_base.parent) not in (written / "README.md").read_text()


class TestTheText:
    @pytest.mark.parametrize(("method", "shape"), PAIRS)
    def test_of_every_model(self, method, shape, of_shape):
        folder = of_shape(shape, method)
        write_card(folder, "org/base")
        card = (folder / "README.md").read_text()
        assert f"# org/base with {METHODS[method].title}" in card
        assert METHODS[method].paper in card and METHODS[method].summary in card
        assert ("It is untrained" in card) == METHODS[method].needs_training
        assert "{{" not in card and "{%" not in card and "None" not in card
        rows = re.findall(r"^\| (any|\d+x\d+) \|", card, re.MULTILINE)
        one_size = shape == "llava-1.5-7b" and method != "meteor"
        assert rows == ["any"] if one_size else len(set(rows)) == 3

    def test_of_every_method_is_three_sentences(self):
        sentences = {name: len(re.findall(r"\.(?:\s|$)", method.summary)) for name, method in METHODS.items()}
        assert sentences == dict.fromkeys(METHODS, 3)

    def test_there_is_none_of_another_model(self, tmp_path):
        LlavaConfig().save_pretrained(tmp_path)
        with pytest.raises(FoveateError, match="convert its base first"):
            write_card(tmp_path)
        assert not (tmp_path / "README.md").exists()


class TestTheTable:
    def test_has_the_accounts_numbers(self, of_shape):
        table = table_of(of_shape("llava-1.5-7b", "qg-vtc", num_visual_tokens=72))
        row = table.splitlines()[-1]
        assert row.startswith("| any | 72 of 576 (12.5%) | 2.02 TFLOPs of 8.86 TFLOPs (22.8%) | 37.7 MB of 302 MB")
        report = flops(shape="llava-1.5-7b", method="qg-vtc", settings={"num_visual_tokens": 72})
        assert f"{report.model.total / 1e12:.3g} TFLOPs of {report.base.total / 1e12:.3g} TFLOPs" in row

    def test_has_the_sizes_that_matter(self, of_shape):
        def sizes(shape, method):
            return image_sizes(config_of_shape(shape, method), of_shape(shape, method))

        assert sizes("llava-1.5-7b", "sample") == [(336, 336)]
        assert sizes("llava-1.5-7b", "meteor") == [(336, 336), (672, 336), (672, 672)]
        assert sizes("llava-next-vicuna-7b", "sample") == [(336, 336), (672, 336), (672, 672)]
        assert sizes("qwen3-vl-2b", "sample") == [(512, 512), (1024, 1024), (2048, 2048)]

    @pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
    def test_keeps_to_the_processors_limits(self, name, of_shape):
        folder = of_shape("qwen3-vl-2b", "sample")
        limits = {"size": {"shortest_edge": 64**2, "longest_edge": 1024**2}}
        (folder / name).write_text(json.dumps({"image_processor": limits} if name.startswith("proc") else limits))
        assert image_sizes(config_of_shape("qwen3-vl-2b", "sample"), folder) == [(128, 128), (256, 256), (512, 512)]

    def test_says_at_most_where_the_image_decides(self, of_shape):
        assert "| at most 576 of 576 (100.0%) |" in table_of(of_shape("llava-1.5-7b", "recoverable"))

    def test_a_model_that_the_account_does_not_know_has_a_card_without(self, of_shape, monkeypatch):
        def fail(*_, **__):
            raise FoveateError("no account of it.")

        folder = of_shape("llava-1.5-7b", "sample")
        monkeypatch.setattr(compression_table, "account_of", fail)
        write_card(folder, "org/base")
        assert "Not accounted for: no account of it." in (folder / "README.md").read_text()


class TestAccuracy:
    def test_is_not_evaluated_where_no_file_says_so(self, written):
        assert "Accuracy: not evaluated." in (written / "README.md").read_text()
        assert "model-index" not in metadata(written)

    def test_is_what_a_file_says(self, copy, result):
        write_card(copy, evaluations=[result])
        content = json.loads(result.read_text())
        card, score = (copy / "README.md").read_text(), content["exact_match"]
        low, high = score["interval"]
        assert "not evaluated" not in card
        assert f"| lab-vqa (keep_ratio=0.4) | exact match | {score['value']:.1%} | {low:.1%} – {high:.1%} | 6 |" in card
        options = f"--set keep_ratio=0.4 --dtype {content['dtype']} --json result.json"
        assert f"foveate evaluate tiny --task lab-vqa --limit 6 --seed 0 {options}" in card
        assert str(result.parent) not in card and str(copy.parent) not in card, "paths of this machine are nobody's"
        [index] = metadata(copy)["model-index"]
        assert index["name"] == "base with Equidistant sampling"
        [found] = index["results"]
        assert found["task"] == {"type": "image-text-to-text"} and found["dataset"]["type"] == "lab-vqa"
        [metric] = found["metrics"]
        assert metric["type"] == "exact_match" and metric["value"] == round(score["value"], 4)
        assert metric["args"]["n"] == 6 and metric["args"]["interval_95"] == [round(low, 4), round(high, 4)]
        assert metric["args"]["command"].startswith("foveate evaluate tiny ")

    def test_of_other_weights_is_refused(self, copy, result):
        before = (copy / "README.md").read_bytes()
        [weights] = copy.glob("*.safetensors")
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        with pytest.raises(FoveateError, match="about another checkpoint"):
            write_card(copy, evaluations=[result])
        assert (copy / "README.md").read_bytes() == before

    @pytest.mark.parametrize("content", ["no JSON", "[]", "{}", '{"checkpoint_hash": "x", "compression": {}}'])
    def test_of_another_file_is_refused(self, content, copy, tmp_path):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(FoveateError, match="is no result of `foveate evaluate`"):
            write_card(copy, evaluations=[tmp_path / "other.json"])
        with pytest.raises(FoveateError, match="can't be read"):
            write_card(copy, evaluations=[tmp_path / "nothing.json"])


def blocks_of(folder) -> list[str]:
    """The Python of a card, with the folder's own place."""
    card = (folder / "README.md").read_text().replace(PLACE, str(folder))
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_the_examples_run(copy, tmp_path):
    """As they are, in a process that has not imported foveate."""
    for package in ("peft", "bitsandbytes"):
        pytest.importorskip(package)
    auto, pipe, quantised, lora = blocks_of(copy)
    assert "load_in_4bit" in quantised
    quantised += "\nassert model.is_loaded_in_4bit\n"
    Image.new("RGB", (60, 40), "red").save(tmp_path / "picture.png")
    ends = "\nimport sys\nassert 'foveate' not in sys.modules\nassert model.peft_config\n"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    script = "\n".join((auto.replace("=50", "=3"), pipe, quantised, lora)) + ends
    command = [sys.executable, "-P", "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]


def test_an_adapter_that_is_not_merged_is_loaded_by_its_folder(copy):
    (copy / "adapter").mkdir()
    (copy / "adapter" / "adapter_config.json").write_text("{}")
    write_card(copy)
    with_adapter = blocks_of(copy)[-1]
    assert f'PeftModel.from_pretrained(model, "{copy}", subfolder="adapter")' in with_adapter
    assert textwrap.dedent(with_adapter) == with_adapter
    compile(with_adapter, "card", "exec")


def test_the_shapes_are_all_known_to_this_test():
    assert {SHAPES[shape][0].model_type for shape in SHAPE_OF.values()} == set(SHAPE_OF)
    assert torch.float16 == config_of_shape("llava-1.5-7b", "sample").dtype
