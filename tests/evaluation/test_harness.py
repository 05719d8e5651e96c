"""One harness for every model: the same questions each time, counted and recorded rightly."""

import errno
import json
import os
import shlex
import shutil
from collections import Counter

import pytest
import torch

from benchmarks.compression import Shapes, benchmark
from foveate.cli import parse_settings
from foveate.conversion.checkpoints import declared_dtype, read_shards
from foveate.errors import FoveateError
from foveate.evaluation import harness
from foveate.evaluation.harness import evaluate, open_checkpoint
from foveate.evaluation.metrics import wilson_interval
from foveate.evaluation.results import write_results
from foveate.evaluation.tasks import all_tasks, find_task
from foveate.lab import tasks
from foveate.lab.scenes import QUESTION_TYPES
from foveate.lab.tasks import lab_dialogues, lab_questions


def quietly(checkpoint, *args, **kwargs) -> dict:
    return evaluate(checkpoint, *args, progress=False, dtype="float32", **kwargs)


@pytest.fixture
def answers(monkeypatch) -> list[str]:
    """The answers that models give from now on."""
    given: list[str] = []
    decode = harness.Checkpoint.decode

    def remember(*args):
        found = decode(*args)
        given.extend(found)
        return found

    monkeypatch.setattr(harness.Checkpoint, "decode", remember)
    return given


class TestTheQuestions:
    def test_every_type_is_asked_equally_often_and_each_scene_once(self):
        examples = list(lab_questions(24, seed=0))
        assert Counter(turn.type for e in examples for turn in e.turns) == dict.fromkeys(QUESTION_TYPES, 4)
        assert all(len(example.turns) == 1 for example in examples)
        assert len({example.image.tobytes() for example in examples}) == 24

    def test_dialogues_have_three_turns_and_every_turn_all_types(self):
        examples = list(lab_dialogues(12, seed=0))
        for example in examples:
            assert len({turn.type for turn in example.turns}) == len({turn.question for turn in example.turns}) == 3
        for turn in range(3):
            assert Counter(example.turns[turn].type for example in examples) == dict.fromkeys(QUESTION_TYPES, 2)

    def test_a_seed_gives_the_same_questions_and_another_gives_others(self):
        def asked(seed):
            return [(example.turns, example.image.tobytes()) for example in lab_questions(6, seed)]

        assert asked(3) == asked(3)
        assert not set(asked(3)) & set(asked(4))

    def test_scenes_are_the_test_splits(self, monkeypatch):
        splits = []
        sample = tasks.sample_scene
        monkeypatch.setattr(
            tasks, "sample_scene", lambda split, *a, **k: splits.append(split) or sample(split, *a, **k)
        )
        list(lab_questions(2, 0)), list(lab_dialogues(2, 0))
        assert set(splits) == {"test"}

    def test_the_default_numbers(self):
        numbers = {name: task.num_examples for name, task in all_tasks().items()}
        assert numbers == {
            "lab-vqa": 1200,
            "lab-dialogue": 1000,
            "lab-vqa-blind": 1200,
            "lab-next-vqa": 1200,
            "lab-next-dialogue": 1000,
            "lab-sliced-vqa": 1200,
            "mt-vqa-v2": 25_000,
            "mt-gqa": None,
        }


class TestAResult:
    def test_says_all_that_a_table_needs(self, checkpoints, tmp_path):
        path = tmp_path / "new" / "result.json"
        result = quietly(checkpoints / "compressed", limit=12, batch_size=5, output=path)
        assert json.loads(path.read_text()) == result
        assert os.listdir(path.parent) == ["result.json"]
        assert (result["task"], result["n"], result["seed"]) == ("lab-vqa", 12, 0)
        assert (result["label"], result["method"]) == ("recoverable", "recoverable")
        assert result["compression"]["variant"] == "official"
        assert result["exact_match"]["n"] == 12
        assert {name: share["n"] for name, share in result["by_type"].items()} == dict.fromkeys(QUESTION_TYPES, 2)
        assert "by_turn" not in result
        assert result["base_visual_tokens"] == 9
        assert 1 <= result["mean_visual_tokens"] < 9
        assert result["versions"].keys() == {"python", "torch", "transformers", "foveate"}

    def test_is_the_same_again_but_for_the_timing(self, checkpoints):
        first, second = (quietly(checkpoints / "compressed", limit=6) for _ in range(2))
        assert first.pop("timing") and second.pop("timing")
        assert first == second

    def test_does_not_depend_on_the_batch_size(self, checkpoints, answers):
        results = [quietly(checkpoints / "compressed", "lab-dialogue", 6, batch_size=size) for size in (1, 4)]
        assert results[0]["mean_visual_tokens"] == results[1]["mean_visual_tokens"]
        number = len(answers) // 2
        assert Counter(answers[:number]) == Counter(answers[number:])

    def test_a_base_goes_through_the_same_harness(self, checkpoints):
        result = quietly(checkpoints / "base", limit=3)
        assert (result["label"], result["method"], result["compression"]) == ("base", "none", None)
        assert result["mean_visual_tokens"] == result["base_visual_tokens"] == 9

    def test_questions_without_the_image_are_the_same(self, checkpoints):
        """A base answers them from their words, and so does a compressed model."""
        for name in ("base", "compressed"):
            result = quietly(checkpoints / name, "lab-vqa-blind", limit=6)
            assert result["mean_visual_tokens"] == result["base_visual_tokens"] == 0
        asked, blind = (list(find_task(name).examples(6, 0)) for name in ("lab-vqa", "lab-vqa-blind"))
        assert [example.turns for example in asked] == [example.turns for example in blind]
        assert all(example.image is None for example in blind)

    def test_settings_hold_for_the_run_and_are_recorded(self, checkpoints):
        settings = {"num_visual_tokens": 4, "variant": "paper"}
        result = quietly(checkpoints / "compressed", limit=3, settings=settings, method_label="four tokens")
        assert result["mean_visual_tokens"] == 4
        assert result["compression"].items() >= settings.items()
        assert result["label"] == "four tokens"

    def test_its_command_is_the_one_that_makes_it(self, checkpoints, tmp_path):
        settings, folder = {"num_visual_tokens": 4, "variant": "paper"}, checkpoints / "compressed"
        result = quietly(
            folder, limit=1, seed=7, settings=settings, output=tmp_path / "r.json", method_label="4 tokens"
        )
        words = shlex.split(result["command"])
        assert words[:3] == ["foveate", "evaluate", str(folder)]
        options = list(zip(words[3::2], words[4::2]))
        assert parse_settings([value for key, value in options if key == "--set"]) == settings
        assert (
            dict(options).items()
            >= {"--limit": "1", "--seed": "7", "--label": "4 tokens", "--dtype": "float32"}.items()
        )

    @pytest.mark.parametrize("fast", ["bfloat16", "float32"])
    @pytest.mark.parametrize("name", ["base", "compressed"])
    def test_names_the_dtype_that_auto_is_on_the_device(self, name, fast, checkpoints, devices):
        """The checkpoints are stored in bfloat16."""
        devices.compute_fast_in(fast)
        result = evaluate(checkpoints / name, limit=2, progress=False)
        words = shlex.split(result["command"])
        assert (result["dtype"], words[words.index("--dtype") + 1]) == (fast, fast)
        assert devices.asked == [(torch.device("cpu"), torch.bfloat16)]

    @pytest.mark.parametrize("value", [1, 0.5, True, None, "paper", "1", "null", "a b=c"])
    def test_settings_survive_the_command_line(self, value):
        assert parse_settings([f"key={harness._as_option(value)}"]) == {"key": value}


class TestTheDtype:
    @pytest.mark.parametrize("fast", ["bfloat16", "float32"])
    def test_of_the_weights_is_what_the_device_computes_fast_in(self, fast, checkpoints, devices):
        devices.compute_fast_in(fast)
        model = open_checkpoint(checkpoints / "compressed").model
        assert {p.dtype for p in model.parameters()} == {getattr(torch, fast)}

    def test_that_is_said_is_taken_however_slow(self, checkpoints, devices):
        devices.compute_fast_in("float32")
        for dtype in ("bfloat16", torch.bfloat16):
            assert open_checkpoint(checkpoints / "compressed", dtype=dtype).model.dtype == torch.bfloat16
        assert devices.asked == []

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"dtype": "float16", "torch_dtype": None}, torch.float16),
            ({"dtype": None, "torch_dtype": "float16"}, torch.float16),
            ({"dtype": None, "torch_dtype": None}, torch.bfloat16),  # as the weights are stored
            ({"dtype": "auto", "torch_dtype": None}, torch.bfloat16),
        ],
    )
    def test_of_a_checkpoint_is_its_configs_or_its_weights(self, config, expected, checkpoints, tmp_path, devices):
        copy = shutil.copytree(checkpoints / "base", tmp_path / "copy")
        content = json.loads((copy / "config.json").read_text()) | config
        content = {key: value for key, value in content.items() if value is not None}
        (copy / "config.json").write_text(json.dumps(content))
        assert declared_dtype(copy, read_shards(copy)) == expected

    @pytest.mark.parametrize("fast", ["bfloat16", "float32"])
    def test_is_also_what_4_bits_are_computed_in(self, fast, checkpoints, devices, monkeypatch):
        pytest.importorskip("bitsandbytes")
        devices.compute_fast_in(fast)
        asked = []
        monkeypatch.setattr(
            harness.AutoModelForImageTextToText, "from_pretrained", lambda *args, **options: asked.append(options)
        )
        with pytest.raises(AttributeError):  # nothing was loaded
            open_checkpoint(checkpoints / "compressed", quantize="4bit")
        dtype = getattr(torch, fast)
        assert (asked[0]["dtype"], asked[0]["quantization_config"].bnb_4bit_compute_dtype) == (dtype, dtype)


def test_visual_tokens_are_those_that_the_language_model_saw(checkpoints):
    examples = list(lab_questions(5, seed=1))
    checkpoint = open_checkpoint(checkpoints / "compressed", dtype="float32")
    conversations = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.turns[0].question}]}]
        for example in examples
    ]
    _, kept = harness._generate(checkpoint, conversations, [example.image for example in examples])
    inputs = checkpoint.encode(conversations, [example.image for example in examples])
    provenance = checkpoint.model(**inputs, output_compression=True).compression
    assert kept == [len(image.weights) for image in provenance]


class TestDialogues:
    @pytest.fixture
    def seen(self, monkeypatch):
        """Conversations as they are asked; every answer is "turn <number>", and right in the first turn only."""
        conversations = []

        def answer(checkpoint, asked, images, *_):
            conversations.append(json.loads(json.dumps(asked)))
            turn = (len(asked[0]) + 1) // 2
            examples = [next(e for e in examples_ if e.image.tobytes() == image.tobytes()) for image in images]
            answers = [e.turns[0].answers[0] if turn == 1 else f"turn {turn}" for e in examples]
            return answers, [5] * len(asked)

        examples_ = list(lab_dialogues(4, seed=0))
        monkeypatch.setattr(harness, "_generate", answer)
        return conversations

    def test_the_models_own_answers_stay_in_the_conversation(self, seen, checkpoints):
        quietly(checkpoints / "base", "lab-dialogue", limit=4, batch_size=4)
        assert [len(batch[0]) for batch in seen] == [1, 3, 5]
        for first, second, third in zip(*seen):
            assert third[:3] == second and second[:1] == first
            assert [message["role"] for message in third] == ["user", "assistant"] * 2 + ["user"]
            assert [part["type"] for message in third for part in message["content"]] == ["image"] + ["text"] * 5
            assert third[3]["content"][0]["text"] == "turn 2"

    def test_every_turn_is_reported(self, seen, checkpoints):
        result = quietly(checkpoints / "base", "lab-dialogue", limit=4, batch_size=3)
        assert [share["value"] for share in result["by_turn"]] == [1, 0, 0]
        assert [share["n"] for share in result["by_turn"]] == [4, 4, 4]
        assert result["n"] == 4 and result["exact_match"]["n"] == 12
        assert result["exact_match"]["value"] == pytest.approx(1 / 3)
        assert result["exact_match"]["interval"] == pytest.approx(wilson_interval(4 / 3, 4))  # dialogues, not turns
        assert result["by_turn"][0]["interval"] == pytest.approx(wilson_interval(4, 4))
        assert result["mean_visual_tokens"] == 5  # an image counts once, not once a turn


def test_the_hash_is_of_the_content_wherever_it_lies(checkpoints, tmp_path):
    def hash_of(folder):
        return harness.Checkpoint("", folder, None, None).content_hash()

    copy = shutil.copytree(checkpoints / "base", tmp_path / "copy")
    assert hash_of(copy) == hash_of(checkpoints / "base") and len(hash_of(copy)) == 16
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert hash_of(copy) != hash_of(checkpoints / "base")


class TestThePageOfResults:
    """`results.py` makes it of the files that the harness wrote."""

    @pytest.fixture
    def folder(self, checkpoints, tmp_path):
        pytest.importorskip("matplotlib")
        folder = tmp_path / "results"
        for name, settings in (("dynamic", {}), ("four", {"num_visual_tokens": 4})):
            quietly(checkpoints / "compressed", limit=6, settings=settings, output=folder / f"{name}.json")
        quietly(checkpoints / "base", limit=6, output=folder / "base.json")
        quietly(checkpoints / "base", "lab-dialogue", limit=2, output=folder / "dialogue.json")
        return folder

    def test_has_a_row_a_file_and_a_plot_a_task(self, folder, tmp_path):
        (folder / "training.json").write_text('{"tower": {"accuracy": 0.98765, "late": {"steps": 1600}}}')
        written = write_results(folder, tmp_path / "RESULTS.md")
        assert [path.name for path in written] == ["RESULTS.md", "lab-vqa.png", "lab-dialogue.png"]
        page = (tmp_path / "RESULTS.md").read_text()
        lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
        rows = [line for line in lines if line[0] in ("base", "recoverable")]
        assert [rows[0][1], *sorted(row[1] for row in rows[1:3])] == [
            "–",
            "num_visual_tokens=4",
            "num_visual_tokens=null",
        ]
        assert float(rows[1][2]) > float(rows[2][2])  # more tokens first
        assert (rows[0][2], rows[0][4]) == ("9.0", "6")
        for path in folder.glob("*.json"):
            if path.name != "training.json":
                assert json.loads(path.read_text())["command"] in page
        assert "| accuracy | 0.9877 |" in page and "| late: steps | 1600 |" in page
        assert "](results/lab-vqa.png)" in page
        assert "have variant=official" in page  # what all rows share is said once

    def test_begins_with_the_introduction_that_lies_beside_the_results(self, folder, tmp_path):
        (folder / "introduction.md").write_text("Scenes are drawn.\n")
        write_results(folder, tmp_path / "RESULTS.md")
        assert "95 % (Wilson). Scenes are drawn.\n\n## lab-vqa" in (tmp_path / "RESULTS.md").read_text()

    def test_pools_the_seeds_of_a_row(self, checkpoints, folder, tmp_path):
        quietly(checkpoints / "base", limit=6, seed=1, output=folder / "base-1.json")
        write_results(folder, tmp_path / "RESULTS.md")
        lines = [line.strip("| ").split(" | ") for line in (tmp_path / "RESULTS.md").read_text().splitlines()]
        (row,) = (line for line in lines if line[0] == "base" and "turn" not in line[-1] and "lab-vqa" in line[-1])
        results = [json.loads((folder / name).read_text())["exact_match"] for name in ("base.json", "base-1.json")]
        share = 100 * sum(result["value"] * result["n"] for result in results) / 12
        assert row[3].startswith(f"{share:.1f} [")
        assert row[4:6] == ["12", "0, 1"]

    def test_says_where_the_kept_patches_lie(self, folder, tmp_path):
        shares = {"asked": 0.25, "objects": 0.5, "objects_by_chance": 0.4, "n": 7, "seed": 0}
        (folder / "kept.json").write_text(json.dumps({"command": "a command", "a checkpoint": shares}))
        write_results(folder, tmp_path / "RESULTS.md")
        assert "| a checkpoint | 25.0 | 50.0 | 40.0 | 7 | 0 |" in (tmp_path / "RESULTS.md").read_text()

    def test_says_what_compression_matrices_are_like(self, folder, tmp_path):
        numbers = {"entropy": 0.25, "collapse": 2, "distinct": 0.5, "n": 7, "seed": 0}
        content = {"command": "a command", "matrices": {"tiles": numbers, "one tile": {**numbers, "objects": 0.75}}}
        (folder / "matrices.json").write_text(json.dumps(content))
        write_results(folder, tmp_path / "RESULTS.md")
        page = (tmp_path / "RESULTS.md").read_text()
        assert "| tiles | 0.250 | 2.00 | 50.0 |  | 7 | 0 |" in page
        assert "| one tile | 0.250 | 2.00 | 50.0 | 75.0 | 7 | 0 |" in page

    def test_draws_types_over_budgets_and_rows_without_an_image(self, checkpoints, folder, tmp_path):
        result = json.loads((folder / "four.json").read_text())
        for tokens in (1, 2, 4):
            compression = {"method": "etc", "num_visual_tokens": tokens, "trained_tokens": tokens}
            other = {
                **result,
                "method": "etc",
                "label": "ETC",
                "compression": compression,
                "mean_visual_tokens": tokens,
            }
            (folder / f"etc-{tokens}.json").write_text(json.dumps(other))
        quietly(checkpoints / "base", "lab-vqa-blind", limit=2, output=folder / "blind.json")
        written = [path.name for path in write_results(folder, tmp_path / "RESULTS.md")]
        assert written == ["RESULTS.md", "lab-vqa.png", "lab-vqa-etc.png", "lab-dialogue.png", "lab-vqa-blind.png"]
        assert "](results/lab-vqa-etc.png)" in (tmp_path / "RESULTS.md").read_text()

    def test_is_the_same_each_time(self, folder, tmp_path):
        first, second = ([path.read_bytes() for path in write_results(folder, tmp_path / "R.md")] for _ in range(2))
        assert first == second

    @pytest.mark.parametrize(("content", "complaint"), [("{", "as JSON"), ("[]", "no JSON object"), ("{}", "lacks")])
    def test_names_a_file_that_is_no_result(self, content, complaint, tmp_path):
        (tmp_path / "notes.json").write_text(content)
        with pytest.raises(FoveateError, match=f"notes.json .*{complaint}"):
            write_results(tmp_path, tmp_path / "R.md")

    def test_needs_results(self, tmp_path):
        with pytest.raises(FoveateError, match="no results"):
            write_results(tmp_path, tmp_path / "R.md")


def test_the_benchmark_of_the_compression_accounts_for_every_part():
    shapes = Shapes(
        width=32, layers=2, heads=2, image_size=56, text_width=32, text_layers=1, text_heads=2, projection=16
    )
    result = benchmark(shapes, batch_size=2, dtype=torch.float32, repeats=2, progress=False)
    parts = result["parts"]
    for variant, account in result["compression"].items():
        names = ["visual scores", "text similarity", f"assignment, {variant}", f"tokens, {variant}"]
        assert account["milliseconds"] == pytest.approx(sum(parts[name] for name in names))
        assert account["share"] == pytest.approx(account["milliseconds"] / parts["vision tower"])
        assert 1 <= account["mean_visual_tokens"] <= 16
    assert json.loads(json.dumps(result)) == result


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            ({"task": "vqa"}, "no task 'vqa': choose one of lab-vqa, lab-dialogue"),
            ({"limit": 0}, "limit is 0"),
            ({"seed": -1}, "seed is -1"),
            ({"batch_size": 0}, "batch size is 0"),
            ({"output": os.curdir}, "is a folder"),
            ({"dtype": "float31"}, "no dtype 'float31'"),
            ({"dtype": "nn"}, "no dtype 'nn'"),
            ({"device": "abacus"}, "no device 'abacus'"),
            ({"data": os.curdir}, "lab-vqa reads no files"),
            ({"images": os.curdir}, "lab-vqa reads no files"),
            ({"task": "mt-gqa"}, "--data names the folder with testdev_balanced_questions.json"),
        ],
    )
    def test_is_refused_before_anything_is_computed(self, arguments, complaint, checkpoints, monkeypatch):
        monkeypatch.setattr(harness, "_ask_batch", None)
        with pytest.raises(FoveateError, match=complaint):
            evaluate(checkpoints / "compressed", progress=False, **arguments)

    def test_settings_of_a_base(self, checkpoints):
        with pytest.raises(FoveateError, match="doesn't compress"):
            quietly(checkpoints / "base", settings={"variant": "paper"})

    def test_an_unknown_setting(self, checkpoints):
        with pytest.raises(ValueError, match="Unknown compression setting 'colour'"):
            quietly(checkpoints / "compressed", settings={"colour": "red"})

    def test_a_checkpoint_that_is_no_image_text_model(self, checkpoints):
        with pytest.raises(FoveateError, match="can't be loaded as an image-text model") as caught:
            quietly(checkpoints / "clip")
        assert "\n" not in str(caught.value)

    def test_a_damaged_checkpoint(self, checkpoints, tmp_path):
        copy = shutil.copytree(checkpoints / "compressed", tmp_path / "copy")
        weights = max(copy.glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-10])
        with pytest.raises(FoveateError, match="truncated"):
            quietly(copy)

    def test_a_full_disk_leaves_nothing_behind(self, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(FoveateError, match="No space left"):
            harness.write_json({"n": 1}, tmp_path / "result.json")
        assert os.listdir(tmp_path) == []
