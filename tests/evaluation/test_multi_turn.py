"""Dialogues from published files, and turns that go on with the cache."""

import copy
import json
import shutil
from itertools import islice

import pytest
import torch

from foveate.conversion.convert import convert
from foveate.errors import FoveateError
from foveate.evaluation import harness
from foveate.evaluation.harness import evaluate, open_checkpoint
from foveate.evaluation.multi_turn import CachedTurns
from foveate.evaluation.published_dialogues import (
    GQA_QUESTIONS,
    SUFFIX,
    VQA_ANNOTATIONS,
    VQA_QUESTIONS,
    mt_gqa,
    mt_vqa_v2,
)
from foveate.evaluation.results import read_results, table, write_results
from foveate.evaluation.tasks import find_task
from foveate.lab.scenes import draw_scene, sample_scene
from foveate.lab.tasks import lab_dialogues
from foveate.modeling.compatibility import CACHE, cache_argument, cache_of


PEOPLE = ("Two.",) * 4 + ("3",) * 6


@pytest.fixture
def gqa(tmp_path):
    """Seven questions about image n0, three about n1, two about n2, in mixed order."""
    rows = {}
    for number, image in enumerate([0, 1, 0, 2, 0, 0, 1, 2, 0, 0, 1, 0]):
        rows[f"2{number:02d}"] = {
            "imageId": f"n{image}",
            "question": f"Question {number}?",
            "answer": f"answer {number}",
            "types": {"structural": "query" if number % 2 else "verify"},
            "isBalanced": True,
        }
    write(tmp_path / "gqa" / GQA_QUESTIONS, rows)
    for image in range(3):
        save_image(tmp_path / "gqa" / "images" / f"n{image}.jpg", image)
    return tmp_path / "gqa"


@pytest.fixture
def vqa(tmp_path):
    """Three questions about each of four images, and one more about the first."""
    questions, annotations = [], []
    for number, image in enumerate([7, 7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10, 10]):
        questions.append({"image_id": image, "question": f"Question {number}?", "question_id": number})
        people = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(PEOPLE, start=1)]
        annotations.append({"question_id": number, "image_id": image, "answer_type": "number", "answers": people})
    write(tmp_path / "vqa" / VQA_QUESTIONS, {"info": {}, "questions": questions})
    write(tmp_path / "vqa" / VQA_ANNOTATIONS, {"info": {}, "annotations": annotations[::-1]})
    for image in (7, 8, 9, 10):
        save_image(tmp_path / "vqa" / "val2014" / f"COCO_val2014_{image:012d}.jpg", image)
    return tmp_path / "vqa"


def write(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def save_image(path, index) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_scene(sample_scene("test", index)).save(path)


def change(path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def questions_of(dialogues) -> list[list[int]]:
    return [[int(turn.question.split()[1].split("?")[0]) for turn in example.turns] for example in dialogues]


class TestDialogues:
    def test_are_an_images_questions_in_the_files_order_cut_into_threes(self, gqa):
        found = questions_of(mt_gqa(None, 0, gqa))
        assert sorted(found) == [[0, 2, 4], [1, 6, 10], [5, 8, 9]]

    def test_ask_as_the_published_evaluation_does(self, gqa):
        turns = {turn.question: turn for example in mt_gqa(None, 0, gqa) for turn in example.turns}
        turn = turns["Question 6?" + SUFFIX]
        assert SUFFIX == "\nAnswer the question using a single word or phrase."
        assert (turn.answers, turn.type) == (("answer 6",), "verify")

    def test_of_vqa_have_what_people_answered(self, vqa):
        examples = list(mt_vqa_v2(None, 0, vqa))
        assert sorted(questions_of(examples)) == [[0, 1, 2], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
        assert {(turn.answers, turn.type) for example in examples for turn in example.turns} == {(PEOPLE, "number")}

    def test_belong_to_their_images(self, vqa):
        for example in mt_vqa_v2(None, 0, vqa):
            (number, *_), *_ = questions_of([example])
            image = {0: 7, 4: 8, 7: 9, 10: 10}[number]
            drawn = torch.tensor(list(draw_scene(sample_scene("test", image)).resize((8, 8)).tobytes()))
            assert (torch.tensor(list(example.image.resize((8, 8)).tobytes())) - drawn).abs().max() < 30

    def test_come_in_an_order_of_the_seed_of_which_a_limit_takes_the_first(self, vqa):
        orders = [questions_of(mt_vqa_v2(None, seed, vqa)) for seed in (0, 0, 1, 2)]
        assert orders[0] == orders[1] and len({str(order) for order in orders}) > 1
        assert questions_of(mt_vqa_v2(2, 0, vqa)) == orders[0][:2]
        assert len(mt_vqa_v2(2, 0, vqa)) == 2 and len(mt_vqa_v2(99, 0, vqa)) == 4

    def test_images_are_opened_one_by_one(self, vqa):
        dialogues = mt_vqa_v2(None, 0, vqa)
        first = next(iter(dialogues))
        shutil.rmtree(vqa / "val2014")
        assert first.image.mode == "RGB"
        with pytest.raises(FoveateError, match="can't be read"):
            list(islice(dialogues, 2))

    def test_images_may_lie_elsewhere(self, gqa, tmp_path):
        shutil.move(gqa / "images", tmp_path / "elsewhere")
        assert len(list(mt_gqa(None, 0, gqa, tmp_path / "elsewhere"))) == 3


class TestAMissingImage:
    def test_stops_with_the_row_and_the_file(self, gqa):
        (gqa / "images" / "n1.jpg").unlink()
        with pytest.raises(FoveateError, match=r"questions 201, 206, 210: there is no image .*n1\.jpg.*--skip-missing"):
            mt_gqa(None, 0, gqa)

    def test_does_not_matter_where_it_is_not_asked_about(self, gqa):
        (gqa / "images" / "n2.jpg").unlink()
        assert len(list(mt_gqa(None, 0, gqa))) == 3

    def test_is_skipped_where_that_is_wanted_and_another_is_asked(self, vqa):
        everything = questions_of(mt_vqa_v2(None, 0, vqa))
        image = {0: 7, 4: 8, 7: 9, 10: 10}[everything[1][0]]
        (vqa / "val2014" / f"COCO_val2014_{image:012d}.jpg").unlink()
        dialogues = mt_vqa_v2(2, 0, vqa, skip_missing=True)
        assert questions_of(dialogues) == [everything[0], everything[2]]
        (name,) = dialogues.skipped
        assert name.endswith(f"questions {', '.join(map(str, everything[1]))}")

    def test_one_that_is_damaged_is_skipped_as_well(self, vqa):
        (vqa / "val2014" / "COCO_val2014_000000000008.jpg").write_bytes(b"no picture")
        dialogues = mt_vqa_v2(None, 0, vqa, skip_missing=True)
        assert len(questions_of(dialogues)) == 3 and len(dialogues.skipped) == 1

    def test_of_all_dialogues_is_an_error(self, gqa):
        for path in (gqa / "images").iterdir():
            path.unlink()
        with pytest.raises(FoveateError, match="None of 3 dialogues has an image"):
            mt_gqa(None, 0, gqa, skip_missing=True)


class TestBadFiles:
    @pytest.mark.parametrize("skip_missing", [True, False])
    @pytest.mark.parametrize("image", [None, "absent", ""])
    def test_a_question_without_an_image(self, image, skip_missing, gqa):
        def edit(rows):
            rows["206"]["imageId"] = image
            if image == "absent":
                del rows["206"]["imageId"]

        change(gqa / GQA_QUESTIONS, edit)
        with pytest.raises(FoveateError, match="question 206 has no image, so there is nothing to ask about"):
            mt_gqa(None, 0, gqa, skip_missing=skip_missing)

    def test_a_question_of_vqa_without_an_image(self, vqa):
        change(vqa / VQA_QUESTIONS, lambda content: content["questions"][5].pop("image_id"))
        with pytest.raises(FoveateError, match="question 5 has no image"):
            mt_vqa_v2(None, 0, vqa)

    def test_a_question_without_an_answer(self, gqa, vqa):
        change(gqa / GQA_QUESTIONS, lambda rows: rows["203"].pop("answer"))
        with pytest.raises(FoveateError, match="question 203 has no answer"):
            mt_gqa(None, 0, gqa)
        change(vqa / VQA_ANNOTATIONS, lambda content: content["annotations"].pop())
        with pytest.raises(FoveateError, match="question 0 has no annotation in"):
            mt_vqa_v2(None, 0, vqa)

    @pytest.mark.parametrize("answers", [[], "two", [{"answer": "two"}], None])
    def test_an_annotation_without_peoples_answers(self, answers, vqa):
        change(vqa / VQA_ANNOTATIONS, lambda content: content["annotations"][0].update(answers=answers))
        with pytest.raises(FoveateError, match=r"question 12 has no (list of people's )?answers"):
            mt_vqa_v2(None, 0, vqa)

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [("{", "can't be read as JSON"), ("[]", "published format"), ("{}", "format"), ('{"1": 2}', "format")],
    )
    def test_of_another_format(self, content, complaint, gqa, vqa):
        (gqa / GQA_QUESTIONS).write_text(content)
        with pytest.raises(FoveateError, match=f"testdev_balanced_questions.*{complaint}"):
            mt_gqa(None, 0, gqa)
        (vqa / VQA_QUESTIONS).write_text(content)
        with pytest.raises(FoveateError, match=f"v2_OpenEnded_mscoco_val2014_questions.*{complaint}"):
            mt_vqa_v2(None, 0, vqa)

    def test_that_are_missing(self, gqa, vqa, tmp_path):
        (vqa / VQA_ANNOTATIONS).unlink()
        with pytest.raises(FoveateError, match=r"no file .*annotations\.json: --data names"):
            mt_vqa_v2(None, 0, vqa)
        shutil.rmtree(gqa / "images")
        with pytest.raises(FoveateError, match=r"no folder .*images: --images names"):
            mt_gqa(None, 0, gqa)
        with pytest.raises(FoveateError, match=r"no folder .*nowhere: --data names"):
            mt_gqa(None, 0, tmp_path / "nowhere")

    def test_without_three_questions_about_an_image(self, gqa):
        change(gqa / GQA_QUESTIONS, lambda rows: [rows.pop(key) for key in list(rows)[2:]])
        with pytest.raises(FoveateError, match="no image with 3 questions"):
            mt_gqa(None, 0, gqa)


class TestEvaluation:
    def test_of_gqa_counts_exact_matches(self, gqa, checkpoints):
        result = evaluate(checkpoints / "base", "mt-gqa", data=gqa, batch_size=2, progress=False, dtype="float32")
        assert (result["n"], result["exact_match"]["n"]) == (3, 9)
        assert [share["n"] for share in result["by_turn"]] == [3, 3, 3]
        assert set(result["by_type"]) == {"query", "verify"}
        assert result["reuse_cache"] is False and "skipped" not in result

    def test_of_vqa_takes_the_mean_of_peoples_agreement(self, vqa, checkpoints, monkeypatch, tmp_path):
        def answer(checkpoint, asked, images, *_):
            turn = (len(asked[0]) + 1) // 2
            return [("2", "three", "four")[turn - 1]] * len(asked), [5] * len(asked)

        monkeypatch.setattr(harness, "_generate", answer)
        (vqa / "val2014" / "COCO_val2014_000000000008.jpg").unlink()
        options = {"data": vqa, "skip_missing": True, "reuse_cache": True, "progress": False, "dtype": "float32"}
        for seed in (0, 1):
            output = tmp_path / "results" / f"{seed}.json"
            result = evaluate(checkpoints / "base", "mt-vqa-v2", seed=seed, output=output, **options)
        assert [mean["value"] for mean in result["by_turn"]] == [1, 1, 0]
        assert result["vqa_accuracy"]["value"] == pytest.approx(2 / 3)
        assert (result["n"], result["vqa_accuracy"]["n"], result["reuse_cache"]) == (3, 9, True)
        assert result["skipped"]["n"] == 1 and result["skipped"]["names"][0].endswith("questions 4, 5, 6")
        for word in ("--reuse-cache", f"--data {vqa}", "--skip-missing"):
            assert word in result["command"]
        results = read_results(tmp_path / "results")
        assert "VQA accuracy, %" in table(results) and "| 66.7 [" in table(results)
        assert "reuse_cache=true" in table(results) and "| 0, 1 |" in table(results)  # two seeds are one row

    def test_pages_of_results_tell_runs_with_and_without_the_cache_apart(self, checkpoints, tmp_path):
        pytest.importorskip("matplotlib")
        for reuse in (False, True):
            output = tmp_path / "results" / f"{reuse}.json"
            evaluate(checkpoints / "base", "lab-dialogue", 2, output=output, reuse_cache=reuse, progress=False)
        write_results(tmp_path / "results", tmp_path / "R.md")
        page = (tmp_path / "R.md").read_text()
        assert page.count("| base | ") == 2 and page.count("| reuse_cache=true |") == 1
        assert "count dialogues, not turns, as independent" in page


# On the cache


@pytest.fixture(scope="module")
def trained_recoverable(tmp_path_factory):
    return convert("lab:tiny-llava", tmp_path_factory.mktemp("lab") / "recoverable", method="recoverable")


@pytest.fixture(scope="module")
def opened(trained_recoverable, checkpoints):
    """Names → checkpoints: trained ones of the lab, whose answers end early, and random ones, which go on and on."""
    folders = {
        "lab": "lab:tiny-llava",
        "lab-recoverable": trained_recoverable,
        "lab-qg-vtc": "lab:tiny-llava-qg-vtc-18",
        "random": checkpoints / "base",
        "random-recoverable": checkpoints / "compressed",
    }
    found: dict = {}

    def get(name):
        if name not in found:
            found[name] = open_checkpoint(folders[name], dtype="float32")
        return found[name]

    return get


@pytest.fixture
def ask(monkeypatch):
    """(checkpoint, examples, reuse_cache) → answers by turn; what `generate` was given is in `ask.given`."""
    given, answers = [], []
    decode = harness.Checkpoint.decode
    monkeypatch.setattr(harness.Checkpoint, "decode", lambda *args: answers.append(decode(*args)) or answers[-1])

    def run(checkpoint, examples, reuse_cache):
        given.clear(), answers.clear()
        model_class = type(checkpoint.model)
        generate = model_class.generate
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_class, "generate", lambda self, **kw: given.append(kw) or generate(self, **kw))
            harness._ask_batch(checkpoint, find_task("lab-dialogue"), examples, harness._Tally(), reuse_cache)
        return list(answers)

    run.given = given
    return run


@pytest.fixture(scope="module")
def examples():
    return list(lab_dialogues(12, seed=0))


class TestTheCache:
    @pytest.mark.parametrize("name", ["lab", "lab-recoverable", "random", "random-recoverable"])
    def test_gives_the_answers_of_a_fresh_run(self, name, opened, ask, examples):
        fresh = ask(opened(name), examples, False)
        assert ask(opened(name), examples, True) == fresh
        lengths = {len(opened(name).processor.tokenizer(answer)["input_ids"]) for answer in fresh[0]}
        assert len(lengths) > 1  # what is to be told apart

    @pytest.mark.parametrize("name", ["lab", "lab-recoverable"])
    def test_goes_on_where_the_template_does_not_write_the_end_of_an_answer(self, name, opened, ask, examples):
        checkpoint = copy.copy(opened(name))
        processor = copy.copy(checkpoint.processor)
        assert "'</s>'" in processor.chat_template
        processor.chat_template = processor.chat_template.replace("'</s>'", "' '")
        object.__setattr__(checkpoint, "processor", processor)
        fresh = ask(checkpoint, examples, False)
        assert ask(checkpoint, examples, True) == fresh
        assert not ask.given[1]["attention_mask"].all()

    @pytest.mark.parametrize("name", ["lab", "lab-recoverable", "lab-qg-vtc"])
    def test_an_image_is_encoded_once(self, name, opened, ask, examples):
        vision_tower, calls = opened(name).model.model.vision_tower, []
        patches = next(m for m in vision_tower.modules() if isinstance(m, torch.nn.Conv2d))
        hook = patches.register_forward_hook(lambda *_: calls.append(1))
        try:
            ask(opened(name), examples, True)
            assert len(calls) == 1
            assert ["pixel_values" in inputs for inputs in ask.given] == [True, False, False]
            ask(opened(name), examples, False)
            assert len(calls) == 4
        finally:
            hook.remove()

    def test_keeps_what_the_first_question_chose(self, opened, ask, examples):
        """QG-VTC: fresh runs are guided by each question, a cache by the first."""
        checkpoint = opened("lab-qg-vtc")
        ask(checkpoint, examples, False)
        guides = [inputs["question_input_ids"] for inputs in ask.given]
        assert not torch.equal(guides[0], guides[1])
        first = ask(checkpoint, examples, True)
        assert all("question_input_ids" not in inputs for inputs in ask.given[1:])
        # A fresh run in which the first question guides each turn says the same.
        asked = [[turn.question for turn in example.turns] for example in examples]
        encode = harness.Checkpoint.encode

        def encode_by_first(self, conversations, images):
            inputs = encode(self, conversations, images)
            if len(conversations[0]) > 1:
                guide = self.processor._tokenize_questions([questions[0] for questions in asked], "pt")
                inputs.update({f"question_{key}": guide[key] for key in ("input_ids", "attention_mask")})
            return inputs

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(harness.Checkpoint, "encode", encode_by_first)
            assert ask(checkpoint, examples, False) == first

    @pytest.mark.parametrize("name", ["lab", "lab-recoverable"])
    def test_dialogues_may_end_earlier_than_others(self, name, opened, ask, examples):
        lengths = (1, 3, 2, 3)
        ragged = [type(e)(e.image, e.turns[:length]) for e, length in zip(examples, lengths)]
        fresh = ask(opened(name), ragged, False)
        assert [len(answers) for answers in fresh] == [4, 3, 2]
        assert ask(opened(name), ragged, True) == fresh

    def test_does_not_go_on_where_the_template_moves_the_image(self):
        """It would be encoded nowhere."""
        turns = CachedTurns(1, image_token_id=9, pad_token_id=0)
        mask = torch.ones(1, 4, dtype=torch.long)
        output = type("Output", (), {"sequences": torch.tensor([[1, 9, 5, 6, 7]]), **cache_argument(object())})
        turns.remember({"attention_mask": mask}, output)
        with pytest.raises(FoveateError, match="leave --reuse-cache out"):
            turns.go_on({"input_ids": torch.tensor([[1, 2, 9, 5, 6, 7]]), "attention_mask": torch.ones(1, 6)})


def test_columns_are_kept_up_to_where_a_fresh_tokenisation_differs():
    """By hand, two rows: the first answered "7 2" and a pad, which the template writes as "7 3"; the second "8 8 2"."""
    turns = CachedTurns(2, image_token_id=9, pad_token_id=0)
    prompts = {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    sequences = torch.tensor([[0, 1, 9, 7, 2, 0], [1, 9, 5, 8, 8, 2]])
    turns.remember(prompts, type("Output", (), {"sequences": sequences, **cache_argument("a cache")}))
    fresh = {
        "input_ids": torch.tensor([[0, 0, 0, 1, 9, 7, 3, 4], [1, 9, 5, 8, 8, 2, 4, 4]]),
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8]),
    }
    inputs = turns.go_on(fresh)
    assert inputs["input_ids"].tolist() == [[0, 1, 9, 7, 2, 0, 3, 4], [1, 9, 5, 8, 8, 2, 4, 4]]
    assert inputs["attention_mask"].tolist() == [[0, 1, 1, 1, 0, 0, 1, 1], [1] * 8]
    assert inputs[CACHE] == "a cache"


def test_hidden_columns_of_a_logical_cache_are_as_if_they_had_not_been(checkpoints):
    """What comes after them sees a cache without them, positions included."""
    checkpoint = open_checkpoint(checkpoints / "compressed", dtype="float32")
    examples = list(lab_dialogues(2, seed=0))
    conversations = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.turns[0].question}]}]
        for example in examples
    ]
    inputs = checkpoint.encode(conversations, [example.image for example in examples])
    extra, hidden = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]]), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    later = torch.tensor([[6, 7], [8, 5]])

    def logits(visible: torch.Tensor, hide: bool) -> torch.Tensor:
        mask = torch.cat([inputs["attention_mask"], visible], dim=1)
        visual = {key: inputs[key] for key in inputs if key not in ("input_ids", "attention_mask")}
        ids = torch.cat([inputs["input_ids"], extra], dim=1)
        with torch.inference_mode():
            cache = cache_of(checkpoint.model(input_ids=ids, attention_mask=mask, **visual))
            if hide:
                mask = torch.cat([inputs["attention_mask"], hidden], dim=1)
                cache.hide(mask)
            mask = torch.cat([mask, torch.ones_like(later)], dim=1)
            return checkpoint.model(input_ids=later, attention_mask=mask, **cache_argument(cache)).logits

    expected = logits(hidden, hide=False)  # never there
    assert torch.allclose(logits(torch.ones_like(extra), hide=True), expected, atol=1e-5)
    assert not torch.allclose(logits(torch.ones_like(extra), hide=False), expected, atol=1e-3)
