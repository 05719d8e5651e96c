"""The measurements behind `lab/RESULTS.md`: `python -m foveate.lab.experiments` (part of `make results`).

Every measurement is one call of the evaluation harness, whose result is a file of `lab/results/`; what is already there
is not measured again. Checkpoints of trained methods are trained first (`trainings.py`). A later method adds its rows
to `MEASUREMENTS`.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from ..conversion.convert import convert
from ..evaluation.harness import evaluate
from .trainings import Training, trained_checkpoint, trained_shard


RESULTS = Path(__file__).parent / "results"
WORK = Path(__file__).parent / "work"
WEIGHTS = Path(__file__).parent / "weights"
console = Console()


@dataclass(frozen=True)
class Measurement:
    """One row of the results.

    Args:
        name: of its file.
        label: of its row.
        task: of the harness.
        settings: changes to the compression; `same_tokens_as` fixes the budget at the mean of another measurement.
        method: `None` for the base model itself.
        training: of the checkpoint that is asked, for a method that is trained; its seed also chooses the test scenes,
            so that seeds are independent in both.
        shipped: whether it ships with the lab as "tiny-llava-METHOD-TOKENS", and is asked as such.
    """

    name: str
    label: str
    task: str = "lab-vqa"
    method: str | None = "recoverable"
    settings: dict[str, Any] = field(default_factory=dict)
    same_tokens_as: str | None = None
    training: Training | None = None
    shipped: str | None = None


def _variants(tokens: int) -> list[Measurement]:
    return [
        Measurement(
            f"recoverable-{variant}-{tokens}",
            f"Recoverable, {variant}, fixed budget",
            settings={"variant": variant, "num_visual_tokens": tokens},
        )
        for variant in ("official", "paper")
    ]


def _qg_vtc(
    name: str, label: str, seeds: int = 1, changes: dict[str, Any] | None = None, **settings: Any
) -> list[Measurement]:
    """QG-VTC trained with these settings at an eighth of the tokens, once a seed."""
    settings = {"num_visual_tokens": 18, **settings}
    trainings = [
        Training(f"qg-vtc-18{name}-seed{seed}", "qg-vtc", settings, seed, changes or {}) for seed in range(seeds)
    ]
    return [Measurement(training.name, f"QG-VTC, {label}", training=training) for training in trainings]


def _qg_vtc_shipped(tokens: int) -> list[Measurement]:
    training = Training(f"qg-vtc-{tokens}-seed0", "qg-vtc", {"num_visual_tokens": tokens})
    name = f"qg-vtc-{tokens}"
    return [
        Measurement(name + suffix, "QG-VTC, as shipped", task, training=training, shipped=f"tiny-llava-{name}")
        for suffix, task in (("", "lab-vqa"), ("-dialogue", "lab-dialogue"))
    ]


_FILTER_ALONE = {"text_recovery": False, "secondary_recovery": False}

_FAST = {"learning_rate.question_projector": 2e-3}

QG_VTC = [
    # The paper's Table 2: a half, a quarter, an eighth of the tokens (there a quarter, an eighth, a sixteenth).
    *[row for tokens in (72, 36, 18) for row in _qg_vtc_shipped(tokens)],
    # Table 3, A7 to A9.
    *_qg_vtc("", "question + recycle", 3),
    *_qg_vtc("-question", "question only", recycle=False),
    *_qg_vtc("-recycle", "recycle only", 3, guidance="cls"),
    *_qg_vtc("-neither", "neither", guidance="cls", recycle=False),
    # At four times the rate the question's MLP may leave the objects, and doesn't come back.
    *_qg_vtc("-fast", "question + recycle, MLP at 2e-3", 2, changes=_FAST),
    *_qg_vtc("-question-fast", "question only, MLP at 2e-3", changes=_FAST, recycle=False),
    # A1 to A6: where and in how many steps; the default is every second layer of the second half, 6, 8, 10.
    *[
        row
        for layers in ([1, 3, 5], [6, 7, 8], [8, 9, 10], [6], [8], [10])
        for row in _qg_vtc(f"-layers-{'-'.join(map(str, layers))}", "question + recycle", layers=layers)
    ],
]

MEASUREMENTS = [
    Measurement("base", "LLaVA, uncompressed", method=None),
    Measurement("base-dialogue", "LLaVA, uncompressed", "lab-dialogue", method=None),
    *[
        Measurement(
            f"recoverable-{variant}{suffix}", f"Recoverable, {variant}, dynamic", task, settings={"variant": variant}
        )
        for suffix, task in (("", "lab-vqa"), ("-dialogue", "lab-dialogue"))
        for variant in ("official", "paper")
    ],
    # The variants at equal numbers of tokens.
    *[row for tokens in (7, 14, 29, 58) for row in _variants(tokens)],
    # The paper's Table 1: the dynamic filter, and top-k with the same mean number of tokens.
    Measurement("filter-dynamic", "visual filter alone, dynamic", settings={"variant": "official", **_FILTER_ALONE}),
    Measurement(
        "filter-fixed",
        "visual filter alone, fixed",
        settings={"variant": "official", **_FILTER_ALONE},
        same_tokens_as="filter-dynamic",
    ),
    # Table 2: with the question, and without at the same number of tokens.
    Measurement("text-with", "filter + text", settings={"variant": "official", "secondary_recovery": False}),
    Measurement(
        "text-without",
        "filter alone, as many tokens",
        settings={"variant": "official", **_FILTER_ALONE},
        same_tokens_as="text-with",
    ),
    # Table 3 is "Recoverable, official, dynamic" beside "filter + text".
    *QG_VTC,
]


def main(
    seed: int = 0,
    limit: int | None = None,
    results: Path = RESULTS,
    base: str = "lab:tiny-llava",
    again: bool = False,
    only: str = "*",
) -> None:
    """Measures what is not yet measured, of the rows whose names match `only` ("qg-vtc-18-*").

    Paths are relative to the folder it runs in, as the results' commands say.
    """
    results, work = Path(os.path.relpath(results)), Path(os.path.relpath(WORK))
    results.mkdir(parents=True, exist_ok=True)
    converted: dict[str, Path] = {}
    for row in MEASUREMENTS:
        path = results / f"{row.name}.json"
        if not fnmatch.fnmatch(row.name, only) or (path.exists() and not again):
            continue
        if row.training is not None:
            checkpoint: str | Path = _trained(row, base, work / "trained")
        elif row.method is not None:
            if row.method not in converted:
                converted[row.method] = work / "converted" / row.method
                shutil.rmtree(converted[row.method], ignore_errors=True)
                convert(base, converted[row.method], method=row.method)
            checkpoint = converted[row.method]
        else:
            checkpoint = base
        settings = dict(row.settings)
        if row.same_tokens_as:
            mean = json.loads((results / f"{row.same_tokens_as}.json").read_text())["mean_visual_tokens"]
            settings["num_visual_tokens"] = max(1, round(mean))
        console.print(f"{row.label} on {row.task} {settings}")
        evaluate(
            checkpoint,
            task=row.task,
            limit=limit,
            seed=seed + (row.training.seed if row.training else 0),
            settings=settings or None,
            output=path,
            method_label=row.label,
            dtype="float32",
        )


def _trained(row: Measurement, base: str, work: Path) -> str | Path:
    if row.shipped is None:
        return trained_checkpoint(row.training, base, work)
    if not (WEIGHTS / row.shipped).exists():
        shutil.copytree(trained_shard(row.training, base, work), WEIGHTS / row.shipped)
    return f"lab:{row.shipped}"


if __name__ == "__main__":
    typer.run(main)
