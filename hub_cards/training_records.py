"""What a training leaves in a checkpoint beside its weights: the names of these files, and the stages they tell of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from foveate.errors import FoveateError


RECIPE_FILE = "training_recipe.yaml"
LOG_FILE = "training_log.json"

#: The folder of LoRA weights that were not merged.
ADAPTER_FOLDER = "adapter"


def earlier_stages(folder: Path) -> dict[int, dict[str, Any]]:
    """The stages that a checkpoint was trained with; empty where nothing is known of that."""
    path = folder / RECIPE_FILE
    return dict(read_yaml(path).get("stages") or {}) if path.is_file() else {}


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe's content. Raises `FoveateError` where there is no such file, or it holds no YAML keys."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FoveateError(f"There is no recipe file {path}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FoveateError(f"{path} can't be read as YAML ({error}).") from error
    if not isinstance(content, dict):
        raise FoveateError(f"{path} is no recipe: it holds no keys.")
    return content
