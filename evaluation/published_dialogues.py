"""Dialogues of three turns from the published files of VQA-v2 and GQA, in the manner of MT-VQA-v2 and MT-GQA (Wang et
al., "Rethinking Token Reduction for Large Vision-Language Models"): each image's questions in the file's order, cut
into threes; what is left over is dropped.

The files are read from any local copy. Images are opened one by one, as they are asked about.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveate.errors import FoveateError
from foveate.evaluation.examples import Example, Turn


NUM_TURNS = 3
#: What LLaVA's evaluation of both datasets adds to a question.
SUFFIX = "\nAnswer the question using a single word or phrase."
VQA_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
VQA_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
GQA_QUESTIONS = "testdev_balanced_questions.json"


@dataclass(frozen=True)
class Dialogue:
    """Questions about an image that is not open yet; `name` says for people which they are."""

    name: str
    image: Path
    turns: tuple[Turn, ...]

    def open(self) -> Example:
        """Raises `OSError` or `ValueError` where the image is missing or can't be read."""
        with Image.open(self.image) as image:
            return Example(image.convert("RGB"), self.turns)


class PublishedDialogues:
    """The dialogues of a dataset that are asked, in an order that a seed chooses; each one's image is opened when its
    turn comes.

    Args:
        dialogues: all there are.
        number: how many to ask, the first of the order; `None`: all.
        seed: chooses the order.
        skip_missing: pass over dialogues whose image is missing or can't be read, and take the next ones in place of
            the missing; else they are errors.

    Attributes:
        skipped: names of the dialogues that were passed over so far.

    Raises:
        FoveateError: an image of a dialogue to ask is missing, or all are; later, one that can't be read.
    """

    def __init__(self, dialogues: list[Dialogue], number: int | None, seed: int, skip_missing: bool = False):
        self.skip_missing = skip_missing
        self.skipped: list[str] = []
        self.chosen: list[Dialogue] = []
        for index in np.random.default_rng(seed).permutation(len(dialogues)).tolist():
            if len(self.chosen) == number:
                break
            dialogue = dialogues[index]
            if dialogue.image.is_file():
                self.chosen.append(dialogue)
            else:
                self._pass_over(dialogue, f"there is no image {dialogue.image}")
        self._require(len(self.chosen))

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[Example]:
        opened = 0
        for dialogue in self.chosen:
            try:
                example = dialogue.open()
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                self._pass_over(dialogue, f"the image {dialogue.image} can't be read ({error})")
            else:
                opened += 1
                yield example
        self._require(opened)

    def _require(self, found: int) -> None:
        if not found:
            raise FoveateError(
                f"None of {len(self.skipped)} dialogues has an image that can be read (the first: {self.skipped[0]}): "
                "--images names the folder with the images."
            )

    def _pass_over(self, dialogue: Dialogue, reason: str) -> None:
        if not self.skip_missing:
            raise FoveateError(
                f"{dialogue.name}: {reason}; --images names the folder with the images, and --skip-missing leaves such "
                "dialogues out."
            )
        self.skipped.append(dialogue.name)


def mt_vqa_v2(
    number: int | None, seed: int, data: Path, images: Path | None = None, skip_missing: bool = False
) -> PublishedDialogues:
    """Dialogues of VQA-v2's validation part.

    Args:
        number, seed, skip_missing: as in [`PublishedDialogues`].
        data: the folder with `v2_OpenEnded_mscoco_val2014_questions.json` and `v2_mscoco_val2014_annotations.json`.
        images: the folder with `COCO_val2014_{image_id:012d}.jpg`; `val2014` in `data`, if `None`.

    Raises:
        FoveateError: a file or folder that is missing or not in the published format, a row without an image or answer.
    """
    folder = _image_folder(data, VQA_QUESTIONS, images, "val2014")
    questions = _Rows(data / VQA_QUESTIONS, "questions")
    annotations = _Rows(data / VQA_ANNOTATIONS, "annotations")
    answered = {row.get("question_id"): row for row in annotations.rows}

    def read(row: dict[str, Any]) -> _Question:
        name = questions.name_of(row.get("question_id"))
        image = questions.need(row, "image_id", int, name)
        annotation = answered.get(row.get("question_id"))
        if annotation is None:
            raise FoveateError(f"{name} has no annotation in {annotations.path}: the files are not of one release.")
        answers = annotations.need(annotation, "answers", list, annotations.name_of(row["question_id"]))
        if not answers or not all(isinstance(answer, str) for answer in answers):
            raise FoveateError(f"{annotations.name_of(row['question_id'])} has no list of people's answers.")
        question = questions.need(row, "question", str, name)
        turn = Turn(question + SUFFIX, tuple(answers), str(annotation.get("answer_type", "question")))
        return _Question(str(row["question_id"]), folder / f"COCO_val2014_{image:012d}.jpg", turn)

    return PublishedDialogues(_cut(questions, map(read, questions.rows)), number, seed, skip_missing)


def mt_gqa(
    number: int | None, seed: int, data: Path, images: Path | None = None, skip_missing: bool = False
) -> PublishedDialogues:
    """Dialogues of GQA's balanced testdev part.

    Args:
        number, seed, skip_missing: as in [`PublishedDialogues`].
        data: the folder with `testdev_balanced_questions.json`.
        images: the folder with `{imageId}.jpg`; `images` in `data`, if `None`.

    Raises:
        FoveateError: a file or folder that is missing or not in the published format, a row without an image or answer.
    """
    folder = _image_folder(data, GQA_QUESTIONS, images, "images")
    questions = _Rows(data / GQA_QUESTIONS)

    def read(row: dict[str, Any]) -> _Question:
        name = questions.name_of(row["question_id"])
        image, question, answer = (questions.need(row, key, str, name) for key in ("imageId", "question", "answer"))
        types = row.get("types")
        kind = types.get("structural", "question") if isinstance(types, dict) else "question"
        return _Question(row["question_id"], folder / f"{image}.jpg", Turn(question + SUFFIX, (answer,), str(kind)))

    return PublishedDialogues(_cut(questions, map(read, questions.rows)), number, seed, skip_missing)


@dataclass(frozen=True)
class _Question:
    id: str
    image: Path
    turn: Turn


def _cut(source: _Rows, questions: Iterable[_Question]) -> list[Dialogue]:
    by_image: dict[Path, list[_Question]] = {}
    for question in questions:
        by_image.setdefault(question.image, []).append(question)
    dialogues = []
    for image, asked in by_image.items():
        for start in range(0, len(asked) - NUM_TURNS + 1, NUM_TURNS):
            turns = asked[start : start + NUM_TURNS]
            name = f"{source.path}, questions {', '.join(question.id for question in turns)}"
            dialogues.append(Dialogue(name, image, tuple(question.turn for question in turns)))
    if not dialogues:
        raise FoveateError(f"{source.path} has no image with {NUM_TURNS} questions, so there is no dialogue to ask.")
    return dialogues


# Files


class _Rows:
    """The rows of a published file.

    Args:
        path: the file.
        key: of the list that holds them; `None` where the file is an object of them by their id, which becomes their
            `question_id`.

    Raises:
        FoveateError: no such file, no JSON, another format.
    """

    def __init__(self, path: Path, key: str | None = None):
        self.path = path
        content = _read_json(path)
        rows: Any = content.get(key) if isinstance(content, dict) and key is not None else content
        if key is None and isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values()):
            rows = [{**row, "question_id": id_} for id_, row in rows.items()]
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            wanted = f"a list '{key}' of rows" if key else "rows by their id"
            raise FoveateError(f"{path} is not in the published format, an object with {wanted}: download it again.")
        self.rows: list[dict[str, Any]] = rows

    def name_of(self, question_id: Any) -> str:
        return f"{self.path}, question {question_id}"

    @staticmethod
    def need(row: dict[str, Any], key: str, kind: type, name: str) -> Any:
        """A field of a row. Raises `FoveateError` where it isn't there or of another kind."""
        value = row.get(key)
        if not isinstance(value, kind) or value == "":
            missing = "image, so there is nothing to ask about" if key in ("image_id", "imageId") else key
            raise FoveateError(f"{name} has no {missing} ('{key}' is {value!r}): correct the row or take it out.")
        return value


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FoveateError(f"There is no file {path}: --data names the folder with the dataset's files as published.")
    try:
        return json.loads(path.read_bytes(), object_hook=_text_of_an_answer)
    except (OSError, ValueError) as error:
        raise FoveateError(f"{path} can't be read as JSON ({error}): download it again.") from error


def _text_of_an_answer(content: dict[str, Any]) -> Any:
    """VQA-v2's two million answers of people are kept as their texts alone."""
    return content["answer"] if content.keys() == {"answer", "answer_confidence", "answer_id"} else content


def _image_folder(data: Path, file: str, images: Path | None, usual: str) -> Path:
    if not data.is_dir():
        raise FoveateError(f"There is no folder {data}: --data names the one with {file}.")
    folder = data / usual if images is None else images
    if not folder.is_dir():
        raise FoveateError(f"There is no folder {folder}: --images names the one with the images.")
    return folder
