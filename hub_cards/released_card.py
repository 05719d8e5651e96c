"""The card as foveate 0.1.0 wrote it, whose lists of files don't know its lines yet.

`foveate upgrade` compares a card with it, to tell what was edited since. Template and words are that version's, in
`released/`, and stay as they are. Later versions need nothing of the kind: their lists have a digest of every line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from foveate.hub_cards.card import CardFacts, render_template


_FOLDER = Path(__file__).with_name("released")
_TEMPLATE = _FOLDER / "card_0.1.0.md"
_WORDS = _FOLDER / "card_0.1.0.json"

_TABLE_HEAD = "| image, pixels | visual tokens | FLOPs of the prompt | KV cache of the image |"
_TABLE_ROW = re.compile(r"\| (?:any|\d+x\d+) \| (?:[^|]+ of [^|]+ \([\d.]+%\) \|\s*){3}")


def released_card(facts: CardFacts, present: str) -> str:
    """The card of 0.1.0.

    Args:
        facts: of the checkpoint. Its evaluations are left out.
        present: its card as it is. What compression saves is read from it where its table has the form of 0.1.0's:
            the account may have been another one.
    """
    words = json.loads(_WORDS.read_text(encoding="utf-8"))
    of_method, training = words["methods"].get(facts.method.name, {}), facts.training
    origin = None if training else words["origins"].get(facts.config.get("trained_by"))
    untrained = of_method.get("needs_training", False) and not training
    return render_template(
        _TEMPLATE,
        replace(facts, results=(), table=_table_in(present) or facts.table),
        title=f"{facts.base_name} with {of_method.get('title')}",
        method=of_method.get("named"),
        summary=of_method.get("summary"),
        state=origin[0] if origin else _state(untrained, training),
        untrained=untrained and not origin,
        stages=[_stage_line(number, stage) for number, stage in sorted(training.items())],
        limits=(*(origin or ())[1:], *of_method.get("limits", ())),
        license=_license_line(facts.license_fields),
    )


def _table_in(card: str) -> str | None:
    lines = card.splitlines()
    if _TABLE_HEAD not in lines:
        return None
    start = lines.index(_TABLE_HEAD)
    end = start + 2
    while end < len(lines) and _TABLE_ROW.fullmatch(lines[end]):
        end += 1
    return "\n".join(lines[start:end]) if end > start + 2 else None


def _state(untrained: bool, training: Mapping[int, Any]) -> str:
    if training:
        return f"trained (stage {' and '.join(map(str, sorted(training)))}, see below)"
    return "untrained: its new parameters are freshly initialised" if untrained else "training-free"


def _stage_line(number: int, stage: Mapping[str, Any]) -> str:
    rates = [f"{module} (learning rate {rate:g})" for module, rate in stage["learning_rate"].items()]
    if lora := stage.get("lora"):
        rates.append(f"LoRA on {lora['target']} (r {lora['r']}, α {lora['alpha']:g}, {lora['learning_rate']:g})")
    length = f"{stage['max_steps']} steps" if stage.get("max_steps") else f"{stage['epochs']:g} epoch(s)"
    return (
        f"Stage {number}, {stage['title']}: {', '.join(rates)}; {Path(stage['data']).name}, {length}, "
        f"{stage['batch_size']} examples a device and step."
    )


def _license_line(fields: Mapping[str, str]) -> str:
    if not fields:
        return "not stated by the base's card: ask whoever published the base before you publish this"
    name = fields.get("license_name") or fields.get("license", "")
    link = fields.get("license_link")
    return f"the base's, [{name}]({link})" if link else f"the base's, `{name}`"
