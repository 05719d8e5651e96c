"""What checkpoints are asked: tasks by name, those that are built in and those that packages plug in (`plugins.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from foveate.errors import FoveateError
from foveate.evaluation.examples import Example
from foveate.evaluation.published_dialogues import GQA_QUESTIONS, VQA_QUESTIONS, mt_gqa, mt_vqa_v2
from foveate.plugins import TASKS_GROUP, all_plugins, find_plugin


MAX_NEW_TOKENS = 8  # for answers of one to three words


@dataclass(frozen=True)
class Task:
    """What a checkpoint is asked.

    Args:
        title: for readers.
        examples: (number, seed) → at most `number` examples, the same ones each time; with `reads`
            (number, seed, data, images, skip_missing) → a `PublishedDialogues`.
        num_examples: how many are asked where the user names no limit; `None`: all.
        metric: a name in `METRICS`.
        max_new_tokens: the longest answer.
        reads: the published file that the user's folder has to hold; `None` where nothing is read.
    """

    title: str
    examples: Callable[..., Iterable[Example]]
    num_examples: int | None
    metric: str = "exact_match"
    max_new_tokens: int = MAX_NEW_TOKENS
    reads: str | None = None


_BUILT_IN = {
    "mt-vqa-v2": Task(
        "dialogues of three turns made of VQA-v2", mt_vqa_v2, 25_000, "vqa_accuracy", 16, reads=VQA_QUESTIONS
    ),
    "mt-gqa": Task("dialogues of three turns made of GQA", mt_gqa, None, max_new_tokens=16, reads=GQA_QUESTIONS),
}


def find_task(name: str) -> Task:
    """The task of a name. Raises `FoveateError` where there is none."""
    task = _BUILT_IN.get(name) or find_plugin(TASKS_GROUP, name)
    if task is None:
        raise FoveateError(f"There is no task '{name}': choose one of {', '.join(all_tasks())}.")
    return task


def all_tasks() -> dict[str, Task]:
    """Every task by name, those of packages first."""
    return {**all_plugins(TASKS_GROUP), **_BUILT_IN}
