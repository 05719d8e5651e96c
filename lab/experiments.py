"""The measurements behind `lab/RESULTS.md`: `python -m foveate.lab.experiments` (part of `make results`).

Every measurement is one call of the evaluation harness, whose result is a file of `lab/results/`; what is already there
for the same weights and settings is not measured again. A later method adds its rows to `MEASUREMENTS`.
"""

from __future__ import annotations

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


RESULTS = Path(__file__).parent / "results"
WORK = Path(__file__).parent / "work" / "converted"
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
    """

    name: str
    label: str
    task: str = "lab-vqa"
    method: str | None = "recoverable"
    settings: dict[str, Any] = field(default_factory=dict)
    same_tokens_as: str | None = None


def _variants(tokens: int) -> list[Measurement]:
    return [
        Measurement(
            f"recoverable-{variant}-{tokens}",
            f"Recoverable, {variant}, fixed budget",
            settings={"variant": variant, "num_visual_tokens": tokens},
        )
        for variant in ("official", "paper")
    ]


_FILTER_ALONE = {"text_recovery": False, "secondary_recovery": False}

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
]


def main(
    seed: int = 0, limit: int | None = None, results: Path = RESULTS, base: str = "lab:tiny-llava", again: bool = False
) -> None:
    """Measures what is not yet measured. Paths are relative to the folder it runs in, as the results' commands say."""
    results, work = Path(os.path.relpath(results)), Path(os.path.relpath(WORK))
    results.mkdir(parents=True, exist_ok=True)
    converted: dict[str, Path] = {}
    for row in MEASUREMENTS:
        path = results / f"{row.name}.json"
        if path.exists() and not again:
            continue
        if row.method and row.method not in converted:
            converted[row.method] = work / row.method
            shutil.rmtree(converted[row.method], ignore_errors=True)
            convert(base, converted[row.method], method=row.method)
        settings = dict(row.settings)
        if row.same_tokens_as:
            mean = json.loads((results / f"{row.same_tokens_as}.json").read_text())["mean_visual_tokens"]
            settings["num_visual_tokens"] = max(1, round(mean))
        console.print(f"{row.label} on {row.task} {settings}")
        evaluate(
            converted[row.method] if row.method else base,
            task=row.task,
            limit=limit,
            seed=seed,
            settings=settings or None,
            output=path,
            method_label=row.label,
            dtype="float32",
        )


if __name__ == "__main__":
    typer.run(main)
