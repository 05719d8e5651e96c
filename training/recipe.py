"""Recipes: what trains, on what, how fast and for how long. A YAML file a method, in `training/recipes/`.

A recipe has stages; each is read into a [`StageRecipe`], whose fields are the keys of the file. The command line
changes single values by their path (`learning_rate.multi_modal_projector=1e-3`), and what then holds is saved with the
trained checkpoint, in the same form.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from foveate.errors import FoveateError
from foveate.hub_cards.training_records import read_yaml


RECIPES = Path(__file__).with_name("recipes")

SCHEDULES = ("cosine", "linear", "constant_with_warmup", "constant")
OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd", "muon": "adamw_torch"}  # Transformers has no Muon: `muon.py`
PRECISIONS = ("auto", "bf16", "fp32")
LAB_EXAMPLES = ("descriptions", "questions")
AUXILIARY_LOSSES = ("vid", "mse", "none")
#: What a recipe can have beside the answers' loss, by its key; a method declares the one that is its own.
OBJECTIVES = ("distillation", "auxiliary", "native_warmup_steps")


@dataclass(frozen=True)
class LoraRecipe:
    """Low-rank adapters beside frozen linear layers.

    Args:
        r, alpha: rank, and the numerator of the scale alpha / r.
        learning_rate: its peak.
        dropout: of the adapters' input, in [0, 1).
        target: the part of the model whose linear layers get them.
    """

    r: int
    alpha: float
    learning_rate: float
    dropout: float = 0.0
    target: str = "language_model"

    def __post_init__(self):
        _whole(self, "r", 1)
        for name in ("alpha", "learning_rate"):
            _number(self, name, above=0)
        _number(self, "dropout", least=0, below=1)


@dataclass(frozen=True)
class DistillationRecipe:
    """The objective of MetaCompress (Eq. 10): to answer as the same model does without compression.

    Args:
        prediction: weight of the divergence of the answers' distributions.
        entropy: weight of the mean entropy of a compression matrix's rows (α_entropy).
        collapse: weight of the largest sum of its columns (α_collapse).
    """

    prediction: float = 1.0
    entropy: float = 1.0
    collapse: float = 1.0

    def __post_init__(self):
        for name in ("prediction", "entropy", "collapse"):
            _number(self, name, least=0)
        if self.prediction == self.entropy == self.collapse == 0:
            raise ValueError("prediction, entropy and collapse are all 0: there would be nothing to learn from.")


@dataclass(frozen=True)
class AuxiliaryRecipe:
    """What ETC learns beside the answers (Section 3.3): to give the image back from its compressed tokens.

    Args:
        loss: "vid" (with a learned variance), "mse", or "none".
        weight: λ.
        alpha: how much more what the text looks at counts, from 0 (all the same) to 1.
        layer: of the language model, where features and attention are read: 1 is the first, −1 the last.
        rank: of the decoder's bottleneck.
    """

    loss: str = "vid"
    weight: float = 1e-5
    alpha: float = 0.6
    layer: int = -1
    rank: int = 8

    def __post_init__(self):
        _choice(self, "loss", AUXILIARY_LOSSES)
        _number(self, "weight", least=0)
        _number(self, "alpha", least=0)
        if self.alpha > 1:
            raise ValueError(f"alpha must be a number from 0 to 1, not {self.alpha!r}.")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer == 0:
            raise ValueError(f"layer must be a whole number other than 0, not {self.layer!r}.")
        _whole(self, "rank", 1)


@dataclass(frozen=True)
class StageRecipe:
    """One stage of training.

    Args:
        title: for readers.
        num_visual_tokens: the budget to train at; `None`: the checkpoint's own.
        native_warmup_steps: steps in which LLaVA-Meteor's native expert rises from no say to all that it has.
        learning_rate: peak rates by the part of the model that trains ("multi_modal_projector"); all else is frozen.
        batch_size: examples a device and step.
        lora: adapters that train as well.
        distillation: learn from the uncompressed model's answers in place of those in the data.
        auxiliary: learn something beside the answers.
        data: `lab`, `lab:NUMBER` (of scenes), `lab-next` and `lab-sliced` (larger scenes, for tiles and for slices) or
            a JSON file in LLaVA's format.
        images: the folder that the file's image paths begin in; the file's own, if `None`.
        lab_examples: what is learned about the lab's scenes.
        lab_turns: questions of a dialogue about one of them.
        dialogues: an example is a whole dialogue; else every question with its answer is one, with the image.
        keep_text_only: train on samples without an image too; else they are left out.
        skip_missing: leave samples out whose image file is not there, instead of refusing to start.
        epochs: passes over the data, where `max_steps` doesn't say otherwise.
        max_steps: steps of the optimizer.
        gradient_accumulation: batches a step.
        optimizer: "adamw", "sgd", or "muon": Muon for the matrices of the language model's layers, AdamW for the rest.
        schedule: of the learning rates, after a linear warm-up.
        warmup_ratio: its share of all steps.
        weight_decay: of the optimizer.
        max_grad_norm: longer gradients are shortened to this; `null`: none are.
        max_grad_value: every entry of a gradient is cut to this, from both sides; `null`: none is.
        max_length: longest sequence in tokens, visual ones among them; longer answers are cut.
        precision: "bf16" computes in bfloat16 and keeps what trains in float32; "fp32" does all in float32; "auto" is
            "bf16" where the device computes fast in bfloat16, else "fp32". What is saved says which it was.
        gradient_checkpointing: `None` means where there is a GPU.
        workers: processes that prepare batches; `None` means 1 without a GPU, 4 with one.
        save_steps: steps between two states from which training can go on.
        logging_steps: steps between two lines of the log.
        seed: chooses the order of the data, the lab's questions and the adapters' initial values.
    """

    title: str
    learning_rate: dict[str, float]
    batch_size: int
    num_visual_tokens: int | None = None
    native_warmup_steps: int | None = None
    lora: LoraRecipe | None = None
    distillation: DistillationRecipe | None = None
    auxiliary: AuxiliaryRecipe | None = None
    data: str = "lab"
    images: str | None = None
    lab_examples: str = "questions"
    lab_turns: int = 6
    dialogues: bool = False
    keep_text_only: bool = False
    skip_missing: bool = False
    epochs: float = 1.0
    max_steps: int | None = None
    gradient_accumulation: int = 1
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    max_grad_value: float | None = None
    max_length: int = 2048
    precision: str = "auto"
    gradient_checkpointing: bool | None = None
    workers: int | None = None
    save_steps: int = 500
    logging_steps: int = 10
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_size", "gradient_accumulation", "max_length", "save_steps", "logging_steps"):
            _whole(self, name, 1)
        _whole(self, "lab_turns", 1)
        for name in ("max_steps", "num_visual_tokens", "native_warmup_steps"):
            _whole(self, name, 1, optional=True)
        _whole(self, "workers", 0, optional=True)
        _whole(self, "seed", 0)
        _number(self, "epochs", above=0)
        _number(self, "warmup_ratio", least=0, below=1)
        _number(self, "weight_decay", least=0)
        for name in ("max_grad_norm", "max_grad_value"):
            if getattr(self, name) is not None:
                _number(self, name, above=0)
        _choice(self, "optimizer", tuple(OPTIMIZERS))
        _choice(self, "schedule", SCHEDULES)
        _choice(self, "precision", PRECISIONS)
        _choice(self, "lab_examples", LAB_EXAMPLES)
        for name in ("dialogues", "keep_text_only", "skip_missing"):
            _choice(self, name, (True, False))
        _choice(self, "gradient_checkpointing", (True, False, None))
        object.__setattr__(self, "learning_rate", self._rates())
        if not self.learning_rate and self.lora is None:
            raise ValueError("nothing would train: learning_rate names no module, and there is no lora.")

    def _rates(self) -> dict[str, float]:
        if not isinstance(self.learning_rate, Mapping):
            raise ValueError(
                f"learning_rate is by module, not {self.learning_rate!r}: give learning_rate.MODULE, for instance "
                "learning_rate.multi_modal_projector."
            )
        rates = {}
        for module, rate in self.learning_rate.items():
            if rate is not None:  # `null` on the command line freezes a module that the recipe trains
                rates[str(module)] = _as_number(f"learning_rate.{module}", rate, above=0)
        return rates

    def to_dict(self) -> dict[str, Any]:
        """As in a recipe file."""
        return dataclasses.asdict(self)


def read_stage(
    method: str,
    stage: int,
    recipe: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    base_model_type: str = "",
) -> StageRecipe:
    """One stage of a method's recipe.

    Args:
        method: a name in `foveate.registry.METHODS`.
        stage: its number in the file.
        recipe: a file in place of the method's own.
        changes: values by their path in the stage, for instance `{"lora.r": 8}`.
        base_model_type: of the checkpoint, where a method has a recipe for each backbone.

    Raises:
        FoveateError: no recipe or stage, a file that is no recipe, an unknown key, a value out of range.
    """
    path = Path(recipe).expanduser() if recipe is not None else _recipe_of(method, base_model_type)
    content = read_yaml(path)
    _require_known(content, ("method", "stages"), path.name)
    if content.get("method") != method:
        raise FoveateError(f"{path} is a recipe for '{content.get('method')}', not for '{method}': choose its own.")
    stages = content.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise FoveateError(f"{path} has no stages: write them under `stages:`, by number.")
    if stage not in stages:
        raise FoveateError(f"{path.name} has no stage {stage}: choose one of {', '.join(map(str, stages))}.")
    return make_stage(stages[stage], changes or {}, f"{path.name}, stage {stage}")


def make_stage(block: Any, changes: Mapping[str, Any], where: str) -> StageRecipe:
    """A stage from the block of a recipe file and changes to it. Raises `FoveateError`, beginning with `where`."""
    if not isinstance(block, dict):
        raise FoveateError(f"{where}, is no block of keys.")
    block = copy.deepcopy(block)
    for key, value in changes.items():
        _change(block, key, value)
    try:
        parts = {"lora": LoraRecipe, "distillation": DistillationRecipe, "auxiliary": AuxiliaryRecipe}
        for key, cls in parts.items():
            if isinstance(block.get(key), dict):
                block[key] = _build(cls, block[key], f"{key}.")
        return _build(StageRecipe, block, "")
    except ValueError as error:
        raise FoveateError(f"{where}: {error}") from error


def write_recipe(method: str, stages: Mapping[int, dict[str, Any]], path: Path) -> None:
    """Writes a recipe file of stages as `StageRecipe.to_dict` gives them."""
    path.write_text(show({"method": method, "stages": dict(stages)}), encoding="utf-8")


def show(content: Mapping[str, Any]) -> str:
    """YAML for people, in the order that it stands in."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _recipe_of(method: str, base_model_type: str) -> Path:
    paths = [RECIPES / f"{method}-{base_model_type}.yaml", RECIPES / f"{method}.yaml"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        known = ", ".join(sorted({read_yaml(file)["method"] for file in RECIPES.glob("*.yaml")}))
        raise FoveateError(
            f"There is no training recipe for '{method}': there is one for {known}; --recipe takes a file of your own."
        )
    return path


def _change(block: dict[str, Any], key: str, value: Any) -> None:
    """Sets `a.b` in nested dictionaries."""
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(block.get(parent), dict):
            block[parent] = {}
        block = block[parent]
    block[last] = value


def _require_known(block: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in block:
        if key not in known:
            raise FoveateError(f"{where}: there is no key '{key}'; the keys are {', '.join(known)}.")


def _build(cls: type, block: dict[str, Any], path: str) -> Any:
    """An instance of a recipe's dataclass. Raises `ValueError` for an unknown or a missing key."""
    fields = dataclasses.fields(cls)
    for key in block:
        if key not in [field.name for field in fields]:
            known = ", ".join(path + field.name for field in fields)
            raise ValueError(f"there is no key '{path}{key}'; the keys are {known}.")
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in block:
            raise ValueError(f"{path}{field.name} is missing.")
    try:
        return cls(**block)
    except ValueError as error:
        raise ValueError(f"{path}{error}") from error


def _whole(instance: Any, name: str, least: int, optional: bool = False) -> None:
    value = getattr(instance, name)
    if value is None and optional:
        return
    if isinstance(value, float) and value.is_integer():
        object.__setattr__(instance, name, int(value))
    elif isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, not {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value!r}.")


def _number(instance: Any, name: str, **limits: float) -> None:
    object.__setattr__(instance, name, _as_number(name, getattr(instance, name), **limits))


def _as_number(
    name: str, value: Any, least: float | None = None, above: float | None = None, below: float | None = None
) -> float:
    """A float; text too, for YAML takes "1e-4" for a text. Raises `ValueError` out of the limits."""
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    inside = (
        (least is None or number >= least) and (above is None or number > above) and (below is None or number < below)
    )
    if not inside or number in (float("inf"), float("-inf")):
        limits = {"at least": least, "above": above, "below": below}
        said = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
        raise ValueError(f"{name} must be a number {said}, not {value!r}.")
    return number


def _choice(instance: Any, name: str, choices: tuple) -> None:
    value = getattr(instance, name)
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        words = {None: "null", True: "true", False: "false"}
        said = ", ".join(words.get(choice, choice) for choice in choices)
        raise ValueError(f"{name} must be one of {said}, not {value!r}.")
