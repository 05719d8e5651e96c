"""What a card says of accuracy: only what a result file of `foveate evaluate` says of these very weights."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from foveate.errors import FoveateError
from foveate.hub_cards.content_hash import content_hash


#: What tables call a metric, by the name that results record a score under.
METRIC_TITLES = {"exact_match": "exact match", "vqa_accuracy": "VQA accuracy"}


@dataclass(frozen=True)
class Evaluation:
    """One result of a checkpoint.

    Args:
        result: the file's content.
        changes: settings of the run that are not the checkpoint's own, and how it was quantised.
    """

    result: Mapping[str, Any]
    changes: Mapping[str, Any]

    @property
    def metric(self) -> str:
        return next(name for name in METRIC_TITLES if name in self.result)

    @property
    def score(self) -> Mapping[str, Any]:
        """`value`, 95 % `interval` and `n`."""
        return self.result[self.metric]

    @property
    def command(self) -> str:
        """What made it, with the names of files and folders in place of paths of the machine it ran on."""
        return shlex.join(_without_place(word) for word in shlex.split(self.result["command"]))

    @property
    def row(self) -> str:
        """A row of a Markdown table."""
        low, high = self.score["interval"]
        task = self.result["task"] + (f" ({self._settings})" if self.changes else "")
        tokens = f"{self.result['mean_visual_tokens']:.1f} of {self.result['base_visual_tokens']:.0f}"
        share, interval = f"{self.score['value']:.1%}", f"{low:.1%} – {high:.1%}"
        return f"| {task} | {METRIC_TITLES[self.metric]} | {share} | {interval} | {self.score['n']} | {tokens} |"

    @property
    def of_metadata(self) -> EvalResult:
        """For the card's `model-index`."""
        return EvalResult(
            task_type="image-text-to-text",
            dataset_type=self.result["task"],
            dataset_name=self.result["task"],
            metric_type=self.metric,
            metric_name=METRIC_TITLES[self.metric],
            metric_value=round(self.score["value"], 4),
            metric_config=self._settings or None,
            metric_args={
                "command": self.command,
                "interval_95": [round(bound, 4) for bound in self.score["interval"]],
                "n": self.score["n"],
                "seed": self.result["seed"],
            },
        )

    @property
    def _settings(self) -> str:
        return ", ".join(f"{key}={json.dumps(value)}" for key, value in sorted(self.changes.items()))


def read_evaluations(files: Iterable[Path], folder: Path) -> list[Evaluation]:
    """Reads result files of a checkpoint, whose weights are read once to see that they are its own.

    Raises:
        FoveateError: a file that is no result of `foveate evaluate`, or one of another checkpoint.
    """
    files = list(files)
    if not files:
        return []
    expected = content_hash(folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["compression"]
    return [_read(file, expected, settings) for file in files]


def _read(file: Path, expected: str, settings: Mapping[str, Any]) -> Evaluation:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        found = result["checkpoint_hash"]
        changes = {key: value for key, value in result["compression"].items() if settings.get(key) != value}
        changes |= {"quantization": result["quantization"]} if "quantization" in result else {}
        evaluation = Evaluation(result, changes)
        _ = evaluation.row, evaluation.of_metadata  # whatever a card takes is there
    except OSError as error:
        raise FoveateError(f"{file} can't be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise FoveateError(
            f"{file} is no result of `foveate evaluate`: write one with `foveate evaluate CKPT --json {file.name}`."
        ) from error
    if found != expected:
        raise FoveateError(
            f"{file} is about another checkpoint ({found}, this one is {expected}): evaluate this one again."
        )
    return evaluation


def _without_place(word: str) -> str:
    option, equals, value = word.partition("=")
    if equals and option.startswith("-"):
        return f"{option}={_without_place(value)}"
    return Path(word).name if word.startswith(("/", "~", ".")) and "/" in word else word
