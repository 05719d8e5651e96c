"""The measurements behind `lab/RESULTS.md`: `python -m foveate.lab.experiments` (part of `make results`).

Every measurement is one call of the evaluation harness, whose result is a file of `lab/results/`; what is already there
is not measured again. Checkpoints of trained methods are trained first (`trainings.py`). A later method adds its rows
to `MEASUREMENTS`.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from foveate.conversion.convert import convert
from foveate.evaluation.harness import evaluate
from foveate.lab.trainings import Training, trained_checkpoint, trained_shard
from foveate.registry import pairs_of


RESULTS = Path(__file__).resolve().parent / "results"
WORK = Path(__file__).resolve().parent / "work"
WEIGHTS = Path(__file__).resolve().parent / "weights"
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
        base: the lab's base model that it is about.
        reuse_cache: whether later turns go on with the cache of the first.
        seed: of the test scenes, beside the training's.
        dtype: of the model.
        quantize: as `foveate evaluate` takes it.
    """

    name: str
    label: str
    task: str = "lab-vqa"
    method: str | None = "recoverable"
    settings: dict[str, Any] = field(default_factory=dict)
    same_tokens_as: str | None = None
    training: Training | None = None
    shipped: str | None = None
    base: str = "tiny-llava"
    reuse_cache: bool = False
    seed: int = 0
    dtype: str = "float32"
    quantize: str | None = None


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
        Measurement(name + suffix, label, task, training=training, shipped=f"tiny-llava-{name}")
        for suffix, label, task in (
            ("", "QG-VTC, as shipped", "lab-vqa"),
            ("-dialogue", "QG-VTC, by each question", "lab-dialogue"),
        )
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

# MetaCompress's Figure 3: several turns on one cache, at reductions by 50 to 95 %.
_REDUCTIONS = {50: 0.5, 70: 0.3, 90: 0.1, 95: 0.05}
_NARROW = {"key_width": 64}  # of MetaCompress; the lab's language models are 192 wide
_DIALOGUES = {"tiny-llava": "lab-dialogue", "tiny-llava-next": "lab-next-dialogue"}
_ON_NEXT = {"data": "lab-next:8192", "batch_size": 12, "max_steps": 100}  # images of five times as many tokens


def _turns(base: str, name: str, label: str, **fields: Any) -> Measurement:
    """Dialogues on one cache."""
    prefix = "next" if base == "tiny-llava-next" else "turns"
    return Measurement(f"{prefix}-{name}", label, _DIALOGUES[base], base=base, reuse_cache=True, **fields)


def _baselines(base: str, num_seeds: int) -> list[Measurement]:
    """The paper's baselines; random pruning with several seeds, each asked about other test scenes."""
    rows = []
    for reduction, keep_ratio in _REDUCTIONS.items():
        for seed in range(num_seeds):
            settings = {"keep_ratio": keep_ratio, "seed": seed}
            name = f"random-{reduction}-seed{seed}"
            rows.append(_turns(base, name, "Random", method="random", settings=settings, seed=seed))
        for method in ("sample", "spatial"):
            settings = {"keep_ratio": keep_ratio}
            rows.append(_turns(base, f"{method}-{reduction}", method.capitalize(), method=method, settings=settings))
    return rows


def _metacompress(
    base: str, reduction: int, label: str = "MetaCompress", name: str = "", changes: dict[str, Any] | None = None
) -> Measurement:
    settings, changes, prefix = {"keep_ratio": _REDUCTIONS[reduction], **_NARROW}, changes or {}, ""
    if base == "tiny-llava-next":
        changes, prefix = {**_ON_NEXT, **changes}, "next-"
    training = Training(f"{prefix}metacompress-{reduction}{name}-seed0", "metacompress", settings, 0, changes)
    shipped = None if name or prefix else f"{base}-metacompress-{reduction}"
    return _turns(base, f"metacompress-{reduction}{name}", label, training=training, shipped=shipped)


def _question_guided(reduction: int) -> list[Measurement]:
    """Recoverable, guided by the first question, and QG-VTC by the first alone or by each; the trained QG-VTC whose
    budget is nearest, set to this one."""
    tokens = max(1, round(144 * _REDUCTIONS[reduction]))
    trained = min((72, 36, 18), key=lambda budget: abs(budget - tokens))
    training = Training(f"qg-vtc-{trained}-seed0", "qg-vtc", {"num_visual_tokens": trained})
    fields = {
        "settings": {"num_visual_tokens": tokens},
        "training": training,
        "shipped": f"tiny-llava-qg-vtc-{trained}",
    }
    first = _turns("tiny-llava", f"qg-vtc-{reduction}-first", "QG-VTC, by the first question", **fields)
    return [
        _turns("tiny-llava", f"recoverable-{reduction}", "Recoverable", settings=fields["settings"]),
        first,
        replace(first, name=f"turns-qg-vtc-{reduction}-each", label="QG-VTC, by each question", reuse_cache=False),
    ]


_NO_CLIP, _SHORT = {"max_grad_value": None}, {"max_steps": 100}

MULTI_TURN = [
    *[_turns(base, "base", "uncompressed", method=None) for base in _DIALOGUES],
    *[_metacompress(base, reduction) for base in _DIALOGUES for reduction in _REDUCTIONS],
    *_baselines("tiny-llava", 3),
    *_baselines("tiny-llava-next", 1),
    *[row for reduction in _REDUCTIONS for row in _question_guided(reduction)],
    # Table 3 and 6: the terms of the loss, and clipping, which goes with the last; in half as many steps.
    *[
        _metacompress("tiny-llava", 90, label, name, {f"distillation.{term}": 0 for term in without} | limits | _SHORT)
        for label, name, without, limits in (
            ("pred", "-pred", ("entropy", "collapse"), _NO_CLIP),
            ("pred + entropy", "-entropy", ("collapse",), _NO_CLIP),
            ("pred + collapse", "-collapse", ("entropy",), _NO_CLIP),
            ("pred + collapse + clip", "-clip", ("entropy",), {}),
            ("pred + entropy + collapse + clip", "-all", (), {}),
            # Not in the paper: is it the terms, or the clipping?
            ("pred + clip", "-pred-clipped", ("entropy", "collapse"), {}),
            ("pred + entropy + clip", "-entropy-clipped", ("collapse",), {}),
        )
    ],
    _turns(
        "tiny-llava",
        "metacompress-90-untrained",
        "MetaCompress, as it begins",
        method="metacompress",
        settings={"keep_ratio": 0.1, **_NARROW},
    ),
]

# ETC's Tables 1 and 2, its ablations, and Figure 4: how much each type of question needs.
_ETC_BASES = {"tiny-llava": ("", ""), "tiny-qwen3vl": ("qwen3vl-", "Qwen3-VL: ")}
_ETC_TOKENS = (1, 2, 4, 8)


def _etc(
    base: str, tokens: int, label: str = "ETC, VID", name: str = "", changes: dict[str, Any] | None = None
) -> Measurement:
    prefix, title = _ETC_BASES[base]
    training = Training(f"{prefix}etc-{tokens}{name}-seed0", "etc", {"num_visual_tokens": tokens}, 0, changes or {})
    return Measurement(f"{prefix}etc-{tokens}{name}", title + label, training=training, base=base)


ETC = [
    *[
        Measurement(f"{prefix}blind", f"{title}no image", "lab-vqa-blind", method=None, base=base)
        for base, (prefix, title) in _ETC_BASES.items()
    ],
    *[_etc(base, tokens) for base in _ETC_BASES for tokens in _ETC_TOKENS],
    *[
        _etc(base, 1, label, name, changes)
        for base in _ETC_BASES
        for label, name, changes in (
            ("ETC, no auxiliary loss", "-none", {"auxiliary.loss": "none"}),
            ("ETC, MSE", "-mse", {"auxiliary.loss": "mse"}),
            ("ETC, VID, α = 0", "-alpha-0", {"auxiliary.alpha": 0.0}),
            ("ETC, VID, α = 1", "-alpha-1", {"auxiliary.alpha": 1.0}),
        )
    ],
    *[
        Measurement(
            f"{prefix}{method}-{tokens}",
            title + method.capitalize(),
            method=method,
            settings={"num_visual_tokens": tokens},
            base=base,
        )
        for base, (prefix, title) in _ETC_BASES.items()
        for method in ("random", "sample")
        for tokens in _ETC_TOKENS
    ],
]


# LLaVA-Meteor's Table 1, and its ablations of the scan, the experts and λ, on images of up to seven views.
_METEOR_ABLATED = 16  # tokens a view


def _meteor_shipped(tokens: int) -> Measurement:
    training = Training(f"meteor-{tokens}-seed0", "meteor", {"num_visual_tokens": tokens})
    name = f"meteor-{tokens}"
    return Measurement(name, "Meteor, as shipped", "lab-sliced-vqa", training=training, shipped=f"tiny-llava-{name}")


def _meteor(name: str, label: str, seeds: int = 1, **settings: Any) -> list[Measurement]:
    """LLaVA-Meteor trained with these settings, once a seed."""
    settings = {"num_visual_tokens": _METEOR_ABLATED, **settings}
    trainings = [
        Training(f"meteor-{_METEOR_ABLATED}{name}-seed{seed}", "meteor", settings, seed) for seed in range(seeds)
    ]
    return [
        Measurement(training.name, f"Meteor, {label}", "lab-sliced-vqa", training=training) for training in trainings
    ]


def _meteor_asked_at(share: float) -> Measurement:
    """The one that ships, with another λ than it was trained at."""
    row = _meteor_shipped(_METEOR_ABLATED)
    settings, label = {"visual_share": share}, "Meteor, λ changed after training"
    return replace(row, name=f"{row.name}-asked-{100 * share:.0f}", label=label, settings=settings)


METEOR = [
    Measurement("sliced-base", "LLaVA, one square, uncompressed", "lab-sliced-vqa", method=None),
    *[_meteor_shipped(tokens) for tokens in (36, 16, 8)],
    *_meteor("", "local-to-single scan, both experts", 2),
    *_meteor("-single", "single scan, both experts", scan="single"),
    *_meteor("-visual", "local-to-single scan, visual expert", visual_share=1.0),
    *_meteor("-native", "local-to-single scan, native expert", visual_share=0.0),
    *[_meteor_asked_at(share) for share in (0.0, 0.2, 0.4, 0.6, 1.0)],
    Measurement(
        f"meteor-{_METEOR_ABLATED}-untrained",
        "Meteor, as it begins",
        "lab-sliced-vqa",
        method="meteor",
        settings={"num_visual_tokens": _METEOR_ABLATED},
    ),
]


_WEIGHTS = {"bf16": "bfloat16", "8bit": "8 bits", "4bit": "4 bits", "int8": "int8 weights"}


def _quantized(row: Measurement) -> list[Measurement]:
    """A measurement again in bfloat16, and with narrower weights."""
    return [
        replace(
            row,
            name=f"{kind}-{row.name}",
            label=f"{row.label}, {words}",
            dtype="bfloat16",
            quantize=None if kind == "bf16" else kind,
        )
        for kind, words in _WEIGHTS.items()
    ]


# What is left of the answers when weights are narrower.
QUANTIZED = [
    *_quantized(Measurement("recoverable-paper", "Recoverable, paper", settings={"variant": "paper"})),
    *_quantized(_qg_vtc_shipped(36)[0]),
]

MEASUREMENTS = [
    Measurement("base", "LLaVA, uncompressed", method=None),
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
    *MULTI_TURN,
    *ETC,
    *METEOR,
    *QUANTIZED,
    Measurement("next", "LLaVA-NeXT, uncompressed", "lab-next-vqa", method=None, base="tiny-llava-next"),
    Measurement("qwen3vl", "Qwen3-VL, uncompressed", method=None, base="tiny-qwen3vl"),
]


def main(
    seed: int = 0,
    limit: int | None = None,
    results: Path = RESULTS,
    again: bool = False,
    only: str = "*",
) -> None:
    """Measures what is not yet measured, of the rows whose names match `only` ("qg-vtc-18-*").

    Paths are relative to the folder it runs in, as the results' commands say.
    """
    results, work = Path(os.path.relpath(results)), Path(os.path.relpath(WORK))
    results.mkdir(parents=True, exist_ok=True)
    for row in MEASUREMENTS:
        path = results / f"{row.name}.json"
        if not fnmatch.fnmatch(row.name, only) or (path.exists() and not again):
            continue
        settings = dict(row.settings)
        if row.same_tokens_as:
            mean = json.loads((results / f"{row.same_tokens_as}.json").read_text())["mean_visual_tokens"]
            settings["num_visual_tokens"] = max(1, round(mean))
        console.print(f"{row.label} on {row.task} {settings}")
        evaluate(
            _checkpoint(row, work),
            task=row.task,
            limit=limit,
            seed=seed + row.seed + (row.training.seed if row.training else 0),
            settings=settings or None,
            output=path,
            method_label=row.label,
            dtype=row.dtype,
            reuse_cache=row.reuse_cache,
            quantize=row.quantize,
        )


def _checkpoint(row: Measurement, work: Path) -> str | Path:
    """What a row asks: trained, converted, or the base itself."""
    base = f"lab:{row.base}"
    if row.training is not None:
        return _trained(row, base, work / "trained")
    if row.method is None:
        return base
    of_weights = pairs_of(row.method)[0].config_class.settings_class.shape_fields
    shape = tuple((name, row.settings[name]) for name in of_weights if name in row.settings)
    prefix = "" if row.base == "tiny-llava" else f"{row.base}-"
    return _converted(base, row.method, work / "converted" / f"{prefix}{row.method}", shape)


@functools.lru_cache
def _converted(base: str, method: str, out: Path, shape: tuple[tuple[str, Any], ...]) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    convert(base, out, method=method, settings=dict(shape))
    return out


def _trained(row: Measurement, base: str, work: Path) -> str | Path:
    if row.training is None:
        raise ValueError(f"{row.name} names no training.")
    if row.shipped is None:
        return trained_checkpoint(row.training, base, work)
    if not (WEIGHTS / row.shipped).exists():
        shutil.copytree(trained_shard(row.training, base, work), WEIGHTS / row.shipped)
    return f"lab:{row.shipped}"


if __name__ == "__main__":
    typer.run(main)
