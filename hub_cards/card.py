"""The model card of a converted or trained checkpoint: what it is, how to use it, and what is known of it.

Whatever a card says is read from the checkpoint: its config, its training recipe, the account of its config, and the
result files that it is given. What nobody knows is not made up: "not evaluated", "not stated".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

from foveate.configuration.tested_versions import TESTED_TRANSFORMERS
from foveate.errors import FoveateError
from foveate.hub_cards.compression_table import table_of
from foveate.hub_cards.evaluation_files import Evaluation, read_evaluations
from foveate.hub_cards.manifest import note_card
from foveate.hub_cards.method_texts import ORIGINS
from foveate.hub_cards.names import CARD_FILE, is_hub_id
from foveate.hub_cards.training_records import earlier_stages
from foveate.modeling.core.loading import BASE_FIELDS
from foveate.registry import METHODS, Method


TEMPLATE = Path(__file__).with_name("card_template.md")

#: What stands in a card's examples for the checkpoint's place, until it has one on the hub.
PLACE = "PATH_OR_ID"

_LICENSE_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class CardFacts:
    """What a card is written of.

    Attributes:
        config: the checkpoint's `config.json`.
        base_name: what it was converted from: a hub id, or the name of a folder.
        license_fields: of the card's metadata.
        results: evaluations of these weights.
        training: the stages that it was trained with.
        adapter: the folder in the checkpoint that holds LoRA weights which are not merged.
        table: what compression saves.
    """

    config: Mapping[str, Any]
    method: Method
    base_name: str
    license_fields: Mapping[str, str]
    results: Sequence[Evaluation]
    training: Mapping[int, Mapping[str, Any]]
    adapter: str | None
    table: str


def write_card(
    folder: Path, base_name: str | None = None, source: Path | None = None, evaluations: Iterable[Path] = ()
) -> None:
    """Writes `README.md` into a checkpoint. Where there is a list of its files, it then knows the card's lines.

    Args:
        folder: the checkpoint, with all that it consists of.
        base_name: what it was converted from: a hub id, or the name of a folder; `None`: what the card there is says.
        source: the checkpoint that it was made from, whose card says which license it is under; `None`: itself.
        evaluations: result files that `foveate evaluate` wrote of it.

    Raises:
        FoveateError: no compressed checkpoint, or a result file that is none or is another checkpoint's.
    """
    card = render_card(read_facts(folder, base_name, source, evaluations))
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    note_card(folder)


def read_facts(
    folder: Path, base_name: str | None = None, source: Path | None = None, evaluations: Iterable[Path] = ()
) -> CardFacts:
    """Reads what a card is written of. Arguments and errors are [`write_card`]'s."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        method = METHODS[config["compression"]["method"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FoveateError(f"{folder} is no checkpoint of a method of foveate's: convert its base first.") from error
    results = read_evaluations(evaluations, folder)
    base_name = base_name or read_base_name(folder)
    base_name = base_name if is_hub_id(base_name) else Path(base_name).name
    return CardFacts(
        config=config,
        method=method,
        base_name=base_name,
        license_fields=_read_license(source or folder, base_name),
        results=results,
        training=earlier_stages(folder),
        adapter=_adapter_of(folder),
        table=table_of(folder),
    )


def render_card(facts: CardFacts) -> str:
    """The card as this version writes it."""
    method, training = facts.method, facts.training
    origin = None if training else ORIGINS.get(str(facts.config.get("trained_by")))
    return render_template(
        TEMPLATE,
        facts,
        title=f"{facts.base_name} with {method.title}",
        method=_named(method),
        summary=method.summary,
        state=origin[0] if origin else _state(method, training),
        last_tested=".".join(TESTED_TRANSFORMERS[-1].split(".")[:2]),
        untrained=method.needs_training and not training and not origin,
        stages=[_stage_line(number, stage) for number, stage in sorted(training.items())],
        limits=(*(origin or ())[1:], *method.limits),
        license=_license_line(facts.license_fields),
    )


def render_template(template: Path, facts: CardFacts, title: str, **words: Any) -> str:
    """A card by a template, with the facts that are no words, and `words` that say the others."""
    license_fields: dict[str, Any] = dict(facts.license_fields)
    data = ModelCardData(
        base_model=facts.base_name if is_hub_id(facts.base_name) else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["foveate", facts.method.name, "visual-token-compression"],
        model_name=title if facts.results else None,
        eval_results=[result.of_metadata for result in facts.results] or None,
        **license_fields,
    )
    variables = {
        "missing_base": facts.base_name if BASE_FIELDS[0] in facts.config else None,
        "table": facts.table,
        "results": facts.results,
        "adapter": facts.adapter,
        "place": PLACE,
        "settings": json.dumps(facts.config["compression"], indent=2, sort_keys=True),
        "has_text_encoder": "question_config" in facts.config,
        **words,
    }
    card = ModelCard.from_template(data, template_path=str(template), title=title, **variables)
    return f"{card}\n"


def read_base_name(folder: Path) -> str:
    """What a checkpoint was converted from, as its card says; the name of its folder where it has none."""
    try:
        card = (folder / CARD_FILE).read_text(encoding="utf-8")
    except OSError:
        return folder.name
    found = re.search(r"^base_model: (\S+)$", card, re.MULTILINE) or re.search(r"^# (.+) with ", card, re.MULTILINE)
    return found.group(1) if found else folder.name


def _read_license(source: Path, base_name: str) -> dict[str, str]:
    """The license fields of a checkpoint's card; empty where it has none, or one that can't be read.

    A link to a file beside the base's card would lead nowhere from another place: it becomes the file's address on the
    hub, or is left out where there is none.
    """
    try:
        stated = metadata_load(source / CARD_FILE) or {}
    except Exception:  # someone else's card can be wrong in any way
        return {}
    fields = {name: stated[name] for name in _LICENSE_FIELDS if isinstance(stated.get(name), str)}
    link = fields.get("license_link")
    if link is not None and "://" not in link:
        del fields["license_link"]
        if is_hub_id(base_name):
            fields["license_link"] = f"https://huggingface.co/{base_name}/blob/main/{link.removeprefix('./')}"
    return fields


def _license_line(fields: Mapping[str, str]) -> str:
    if not fields:
        return "not stated by the base's card: ask whoever published the base before you publish this"
    name = fields.get("license_name") or fields.get("license", "")
    link = fields.get("license_link")
    return f"the base's, [{name}]({link})" if link else f"the base's, `{name}`"


def _adapter_of(folder: Path) -> str | None:
    """The folder in a checkpoint that holds LoRA weights which are not merged."""
    found = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    return found[0] if found else None


def _named(method: Method) -> str:
    """The method with its paper's address, or title."""
    is_address = method.paper.startswith("https://")
    return f"[{method.title}]({method.paper})" if is_address else f"{method.title} (“{method.paper}”)"


def _state(method: Method, training: Mapping[int, Mapping[str, Any]]) -> str:
    if training:
        return f"trained (stage {' and '.join(map(str, sorted(training)))}, see below)"
    return "untrained: its new parameters are freshly initialised" if method.needs_training else "training-free"


def _stage_line(number: int, stage: Mapping[str, Any]) -> str:
    """One stage of a training, for readers."""
    rates = [f"{module} (learning rate {rate:g})" for module, rate in stage["learning_rate"].items()]
    if lora := stage.get("lora"):
        rates.append(f"LoRA on {lora['target']} (r {lora['r']}, α {lora['alpha']:g}, {lora['learning_rate']:g})")
    length = f"{stage['max_steps']} steps" if stage.get("max_steps") else f"{stage['epochs']:g} epoch(s)"
    return (
        f"Stage {number}, {stage['title']}: {', '.join(rates)}; {Path(stage['data']).name}, {length}, "
        f"{stage['batch_size']} examples a device and step."
    )
