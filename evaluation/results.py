"""`python -m foveate.evaluation.results`: tables and plots of the lab's results, from the JSON files alone.

It reads every file of `lab/results/`: what `foveate evaluate --json` wrote, `training*.json`, the lab's own accounts of
its trainings, `kept.json`, where the kept patches lie, `matrices.json`, what compression matrices are like, and
`introduction.md`, which says how the checkpoints that commands name are made. It writes `lab/RESULTS.md` and the plots
beside the files. A new method adds files, not code.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from foveate.conversion.shipped import lab_directory
from foveate.errors import FoveateError
from foveate.evaluation.metrics import METRICS, wilson_interval
from foveate.evaluation.tasks import all_tasks
from foveate.registry import METHODS


LAB_FOLDER = lab_directory()
TRAININGS = {
    "training.json": "Training of the lab model",
    "training-next.json": "Training of the model for tiles",
    "training-qwen3vl.json": "Training of the Qwen3-VL model",
}
KEPT_FILE, MATRICES_FILE = "kept.json", "matrices.json"
INTRODUCTION_FILE = "introduction.md"
_HEAD = """# Results

Made by `python -m foveate.evaluation.results` from the files in `{folder}/`; don't edit by hand. Answers are compared
exactly; intervals are 95 % (Wilson)."""
# Settings: of the budget, and of what is drawn at random.
_BUDGETS, _SEED = ("num_visual_tokens", "keep_ratio", "trained_tokens"), "seed"
_NEEDED = {
    "command",
    "task",
    "n",
    "seed",
    "label",
    "method",
    "compression",
    "by_type",
    "mean_visual_tokens",
}


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results that `evaluate` wrote into a folder, bases first, then by method, label, visual tokens and seed.

    Raises:
        FoveateError: a file that is not such a result.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        if path.name in (*TRAININGS, KEPT_FILE, MATRICES_FILE):
            continue
        result = _read(path)
        missing = sorted(_NEEDED - set(result))
        missing += [] if METRICS.keys() & result.keys() else ["exact_match"]
        if missing:
            raise FoveateError(f"{path} is no result of `foveate evaluate`: it lacks '{missing[0]}'.")
        results.append(result)
    return sorted(results, key=_order)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FoveateError(f"{path} can't be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise FoveateError(f"{path} can't be read: it holds no JSON object.")
    return content


def _order(result: dict[str, Any]) -> tuple:
    is_compressed = result["compression"] is not None
    return is_compressed, result["method"], result["label"], -result["mean_visual_tokens"], result["seed"]


def _task_order(task: str) -> tuple[int, str]:
    return ([*all_tasks(), task].index(task), task)


def metric_of(result: dict[str, Any]) -> str:
    """The name in `METRICS` that a result has its score under."""
    return next(name for name in METRICS if name in result)


# Tables


def task_section(task: str, results: list[dict[str, Any]], plot_link: str) -> str:
    """The plot, the table and what all its rows share, in Markdown.

    Args:
        task: what all `results` are of.
        plot_link: where the plot is, seen from the page.
    """
    known = all_tasks()
    title = f"{task}: {known[task].title}" if task in known else task
    notes = [f"Measured with {'; '.join(sorted({_versions(result) for result in results}))}."]
    for method in _methods([result for result in results if result["compression"]]):
        common = _common_settings([result for result in results if result["method"] == method])
        if common.keys() - {"method"}:
            notes.append(f"All rows of the method {method} have {_settings(common)}.")
    if any("by_turn" in result and "reuse_cache" in result for result in results):
        notes.append("Intervals over several turns count dialogues, not turns, as independent.")
    return "\n".join([f"## {title}\n", f"![{task}]({plot_link})\n", table(results), " ".join(notes) + "\n"])


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, a row a result of one task; settings that all rows of a method share are left out."""
    score = METRICS[metric_of(results[0])].title
    pooled = pool_seeds(results)
    shared = {method: _common_settings([r for r in results if r["method"] == method]) for method in _methods(results)}
    facts = pd.DataFrame(
        {
            "method": _escape(result["label"]),
            "settings": _settings(_own_settings(result, shared[result["method"]])),
            "visual tokens": f"{result['mean_visual_tokens']:.1f}",
            f"{score}, %": _share(result[metric_of(result)]),
            "n": str(result["n"]),
            "seed": ", ".join(map(str, result["seeds"])),
        }
        for result in pooled
    )
    turns = pd.DataFrame(
        {f"turn {turn}": _share(share) for turn, share in enumerate(result.get("by_turn", ()), start=1)}
        for result in pooled
    )
    types = pd.DataFrame({name: _share(share) for name, share in result["by_type"].items()} for result in pooled)
    commands = pd.DataFrame({"command": f"`{_escape(result['command'])}`"} for result in pooled)
    return to_markdown(pd.concat([facts, turns, types, commands], axis=1))


def to_markdown(frame: pd.DataFrame) -> str:
    """A frame of texts as a Markdown table; what is missing is left empty.

    `DataFrame.to_markdown` requires another package and pads every column to its longest command.
    """
    titles = "|".join(f" {title} " if title else " " for title in frame.columns)
    rows = frame.fillna("").itertuples(index=False, name=None)
    lines = [f"|{titles}|", "|" + " --- |" * frame.shape[1], *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def pool_seeds(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result for all that differ in their seed alone: `seeds` in place of the one, shares of all answers."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        compression = {key: value for key, value in (result["compression"] or {}).items() if key != _SEED}
        what = [result["label"], compression, result["method"], result.get("reuse_cache", False)]
        key = json.dumps(what, sort_keys=True)
        groups.setdefault(key, []).append(result)
    return [_pooled(group) for group in groups.values()]


def _pooled(group: list[dict[str, Any]]) -> dict[str, Any]:
    first, metric = group[0], metric_of(group[0])
    types = dict.fromkeys(name for result in group for name in result["by_type"])
    pooled = {
        **first,
        "seeds": [result["seed"] for result in group],
        "n": sum(result["n"] for result in group),
        "mean_visual_tokens": sum(result["mean_visual_tokens"] * result["n"] for result in group)
        / sum(result["n"] for result in group),
        metric: _pool([result[metric] for result in group]),
        "by_type": {name: _pool([r["by_type"][name] for r in group if name in r["by_type"]]) for name in types},
    }
    if "by_turn" in first:
        pooled["by_turn"] = [_pool(list(shares)) for shares in zip(*(result["by_turn"] for result in group))]
    return pooled


def _pool(shares: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs that are independent of each other. Shares of right answers are counted together; where an interval is of
    another kind, half-widths add up as standard errors do."""
    number = sum(share["n"] for share in shares)
    if all(map(_is_counted, shares)):
        hits = sum(round(share["value"] * share["n"]) for share in shares)
        return {"value": hits / number, "interval": list(wilson_interval(hits, number)), "n": number}
    if len(shares) == 1:
        return shares[0]
    value = sum(share["value"] * share["n"] for share in shares) / number
    halves = [(share["interval"][1] - share["interval"][0]) / 2 * share["n"] / number for share in shares]
    half = math.hypot(*halves)
    return {"value": value, "interval": [max(0.0, value - half), min(1.0, value + half)], "n": number}


def _is_counted(share: dict[str, Any]) -> bool:
    """Whether its interval is Wilson's of right answers among `n`."""
    hits = round(share["value"] * share["n"])
    expected = (hits / share["n"], *wilson_interval(hits, share["n"]))
    found = (share["value"], *share["interval"])
    return all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(found, expected))


def _own_settings(result: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """What a result's row says of its settings: not the seed, which has a column, nor what its method's rows share."""
    own = {k: v for k, v in (result["compression"] or {}).items() if k not in shared and k != _SEED}
    return own | ({"reuse_cache": True} if result.get("reuse_cache") else {})


def _methods(results: list[dict[str, Any]]) -> list[str]:
    """Each once, in the order in which they come."""
    return list(dict.fromkeys(result["method"] for result in results))


def _common_settings(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the compression of all results has alike."""
    first, *others = (result["compression"] or {} for result in results)
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def _share(share: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in share["interval"])
    return f"{100 * share['value']:.1f} [{low:.1f}, {high:.1f}]"


def _settings(settings: dict[str, Any]) -> str:
    words = [f"{key}={_escape(value)}" for key, value in settings.items() if key != "method"]
    return ", ".join(words) or "–"


def _escape(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value)).replace("|", r"\|").replace("\n", " ")


def training_section(title: str, content: dict[str, Any]) -> str:
    """The lab's account of a training, in Markdown: a table for each stage or other group of numbers."""
    single = {key: value for key, value in content.items() if not isinstance(value, dict)}
    groups = {"": single, **{key: value for key, value in content.items() if isinstance(value, dict)}}
    parts = [f"## {title}\n"]
    for name, values in groups.items():
        rows = [(key.replace("_", " "), _number(value)) for key, value in _flat(values)]
        if rows:
            heading = [f"### {name.replace('_', ' ').capitalize()}\n"] if name else []
            parts += [*heading, to_markdown(pd.DataFrame(rows, columns=["", ""]))]
    return "\n".join(parts)


def kept_section(content: dict[str, Any]) -> str:
    """Where the patches lie that checkpoints keep, in Markdown: what `python -m foveate.lab.kept` wrote."""
    rows = [
        {
            "checkpoint": _escape(name),
            "asked about, %": f"{100 * shares['asked']:.1f}",
            "any object, %": f"{100 * shares['objects']:.1f}",
            "any object, by chance": f"{100 * shares['objects_by_chance']:.1f}",
            "n": str(shares["n"]),
            "seed": str(shares["seed"]),
        }
        for name, shares in content.items()
        if name != "command"
    ]
    parts = [
        "## Where the kept patches lie\n",
        "Share of the kept patches in the grid cell of the object asked about (by chance: 11.1 %), and in a cell with "
        f"any object; means over test scenes. `{content['command']}`\n",
        to_markdown(pd.DataFrame(rows)),
    ]
    return "\n".join(parts)


def matrices_section(content: dict[str, Any], picture: str | None) -> str:
    """What compression matrices are like, in Markdown: what `python -m foveate.lab.matrices` wrote."""
    rows = [
        {
            "checkpoint": _escape(name),
            "entropy": f"{found['entropy']:.3f}",
            "on one source": f"{found['collapse']:.2f}",
            "distinct sources, %": f"{100 * found['distinct']:.1f}",
            "on objects, %": f"{100 * found['objects']:.1f}" if "objects" in found else "",
            "n": str(found["n"]),
            "seed": str(found["seed"]),
        }
        for name, found in content["matrices"].items()
    ]
    parts = [
        "## Compression matrices\n",
        *([f"![compression matrices]({picture})\n"] if picture else []),
        "Means over test scenes: entropy of a row in nats; how many tokens hang on the source that is used most; the "
        "share of tokens whose strongest source no other token has; and the share of strongest sources in a cell with "
        f"an object (56 % by chance). `{content['command']}`\n",
        to_markdown(pd.DataFrame(rows)),
    ]
    return "\n".join(parts)


def _flat(values: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """Groups within groups become "outer: inner"; a share with its interval stays whole."""
    for key, value in values.items():
        if isinstance(value, dict) and not {"value", "interval"} <= value.keys():
            yield from ((f"{key}: {inner}", found) for inner, found in _flat(value))
        else:
            yield key, value


def _number(value: Any) -> str:
    if isinstance(value, dict):
        return f"{_share(value)} %"
    if isinstance(value, float):
        return f"{value:.4g}"
    return _escape(value)


# Plots


def plot(task: str, results: list[dict[str, Any]], path: Path) -> None:
    """The score over the mean number of visual tokens, with intervals, a colour a label; a base is a dashed line too.

    Args:
        task: the title.
        results: of one task.
        path: the PNG to write, the same bytes for the same results.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = list(dict.fromkeys(result["label"] for result in results))
    many = len(labels) > 8  # then the legend stands beside the plot
    figure, axes = plt.subplots(figsize=(11 if many else 7, 5.5 if many else 4.5), dpi=110, layout="constrained")
    for index, label in enumerate(labels):
        runs = [result for result in results if result["label"] == label]
        is_base = runs[0]["compression"] is None
        colour = "#444444" if is_base else plt.get_cmap("tab20")(2 * index % 20 + index // 10 % 2)
        _draw_runs(axes, label, runs, colour)
        if is_base:
            value = runs[0][metric_of(runs[0])]["value"]
            axes.axhline(100 * value, color=colour, linestyle="--", linewidth=1, zorder=0)
    if all(result["mean_visual_tokens"] for result in results):  # none, without an image, has no logarithm
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(
        title=task,
        xlabel="visual tokens an image (mean)",
        ylabel=f"{METRICS[metric_of(results[0])].title}, % (95 % interval)",
    )
    axes.grid(alpha=0.25)
    if many:
        figure.legend(frameon=False, loc="outside right upper")
    else:
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def plot_types(results: list[dict[str, Any]], path: Path) -> bool:
    """The score of each type of question over the number of visual tokens, a panel a label that has several budgets;
    says whether there is one.

    Args:
        results: of one method and task.
        path: the PNG to write, the same bytes for the same results.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs_of: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        runs_of.setdefault(result["label"], []).append(result)
    panels = {label: pool_seeds(runs) for label, runs in runs_of.items() if _num_budgets(runs) > 2}
    if not panels:
        return False
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4), dpi=110, layout="constrained", sharey=True, squeeze=False
    )
    for (label, runs), panel in zip(panels.items(), axes[0]):
        runs = sorted(runs, key=lambda run: run["mean_visual_tokens"])
        tokens = [run["mean_visual_tokens"] for run in runs]
        for name in runs[0]["by_type"]:
            shares = [run["by_type"][name] for run in runs]
            values = [100 * share["value"] for share in shares]
            bounds = zip(*([100 * abs(share["value"] - bound) for bound in share["interval"]] for share in shares))
            panel.errorbar(
                tokens, values, yerr=list(bounds), label=name, fmt="o-", capsize=3, markersize=4, linewidth=1
            )
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set(title=label, xlabel="visual tokens an image")
        panel.grid(alpha=0.25)
    axes[0][0].set_ylabel("right answers, % (95 % interval)")
    axes[0][-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))  # beside: lines go everywhere
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    return True


def _num_budgets(runs: list[dict[str, Any]]) -> int:
    return len({run["mean_visual_tokens"] for run in runs}) if _differ_in_budget_alone(runs) else 0


def _draw_runs(axes: Any, label: str, runs: list[dict[str, Any]], colour: Any) -> None:
    points = []
    for run in pool_seeds(runs):
        score = run[metric_of(run)]
        value, (low, high) = score["value"], score["interval"]
        points.append((run["mean_visual_tokens"], 100 * value, 100 * (value - low), 100 * (high - value)))
    tokens, values, below, above = zip(*sorted(points))
    line = "o-" if _differ_in_budget_alone(runs) else "o"
    axes.errorbar(
        tokens, values, yerr=(below, above), label=label, color=colour, fmt=line, capsize=3, markersize=5, linewidth=1
    )


def _differ_in_budget_alone(runs: list[dict[str, Any]]) -> bool:
    """Whether there is a curve: one method at several budgets."""
    others = [
        {key: value for key, value in (run["compression"] or {}).items() if key not in (*_BUDGETS, _SEED)}
        for run in runs
    ]
    return all(other == others[0] for other in others)


def write_results(folder: Path = LAB_FOLDER / "results", out: Path = LAB_FOLDER / "RESULTS.md") -> list[Path]:
    """Writes the page and a plot for each task.

    Args:
        folder: where the JSON files are; the plots go there too.
        out: the page.

    Returns:
        The files written.

    Raises:
        FoveateError: there is nothing to report, or a file that can't be read.
    """
    results, trainings = read_results(folder), [name for name in TRAININGS if (folder / name).exists()]
    if not results and not trainings:
        raise FoveateError(
            f"There are no results in {folder}: run `foveate evaluate … --json {folder}/NAME.json` first."
        )
    shown = folder.relative_to(out.parent).as_posix() if folder.is_relative_to(out.parent) else folder.as_posix()
    head = _HEAD.format(folder=shown)
    if (folder / INTRODUCTION_FILE).exists():
        head += " " + (folder / INTRODUCTION_FILE).read_text(encoding="utf-8").rstrip()
    parts, plots = [f"{head}\n"], []
    parts += [training_section(TRAININGS[name], _read(folder / name)) for name in trainings]
    for task in sorted({result["task"] for result in results}, key=_task_order):
        of_task = [result for result in results if result["task"] == task]
        plots.append(folder / f"{task}.png")
        plot(task, of_task, plots[-1])
        parts.append(task_section(task, of_task, f"{shown}/{plots[-1].name}"))
        for method in filter(_differs_by_question_type, _methods(of_task)):
            by_type = folder / f"{task}-{method}.png"
            if plot_types([result for result in of_task if result["method"] == method], by_type):
                plots.append(by_type)
                parts.append(f"![{task}, by type of question]({shown}/{by_type.name})\n")
    if (folder / KEPT_FILE).exists():
        parts.append(kept_section(_read(folder / KEPT_FILE)))
    if (folder / MATRICES_FILE).exists():
        picture = (folder / MATRICES_FILE).with_suffix(".png")
        shown_picture = f"{shown}/{picture.name}" if picture.exists() else None
        parts.append(matrices_section(_read(folder / MATRICES_FILE), shown_picture))
    out.write_text("\n".join(parts), encoding="utf-8")
    return [out, *plots]


def _differs_by_question_type(method: str) -> bool:
    """What the method declares; a base, and a method that is not known here, declare nothing."""
    return method in METHODS and METHODS[method].differs_by_question_type


def _versions(result: dict[str, Any]) -> str:
    found = {**result.get("versions", {}), "dtype": result.get("dtype", "?")}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m foveate.evaluation.results", description=__doc__)
    parser.add_argument("--results", type=Path, default=LAB_FOLDER / "results", help="folder of the JSON files")
    parser.add_argument("--out", type=Path, default=LAB_FOLDER / "RESULTS.md", help="page to write")
    arguments = parser.parse_args()
    try:
        for path in write_results(arguments.results, arguments.out):
            print(f"Wrote {path}")
    except FoveateError as error:
        parser.exit(2, f"foveate: {error}\n")


if __name__ == "__main__":
    main()
