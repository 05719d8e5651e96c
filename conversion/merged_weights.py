"""What a whole checkpoint is made of: adapters merged into a model's weights, and its small files as they were."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from foveate.hub_cards.manifest import MANIFEST_FILE
from foveate.hub_cards.training_records import ADAPTER_FOLDER, LOG_FILE


def merge_lora(peft_model: Any) -> Any:
    """The model with its adapters merged into the linear layers that they stand beside, added in float32."""
    from peft.tuners.lora import LoraLayer

    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            weight: Any = module.get_base_layer().weight
            dtype = weight.dtype
            weight.data = weight.data.float()
            module.merge()
            weight.data = weight.data.to(dtype)
    return peft_model.unload()


def copy_small_files(source: Path, folder: Path) -> None:
    """Config, processor and tokenizers as they were: every version of Transformers reads what conversion wrote, which
    isn't true of what the newest writes of the same."""
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        is_config = path.suffix in (".json", ".jinja", ".txt", ".model") and not path.name.endswith(".index.json")
        if path.is_file() and is_config and place.parts[0] not in (ADAPTER_FOLDER, "runs", LOG_FILE, MANIFEST_FILE):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / place)
