"""`foveate merge`: a whole checkpoint of one that leaves its base out or has LoRA weights beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers import AutoModelForImageTextToText
from transformers.utils import CONFIG_NAME

from foveate.conversion.atomic_folder import atomic_folder, require_free
from foveate.conversion.checkpoints import fetch_weights, read_config
from foveate.conversion.merged_weights import copy_small_files, merge_lora
from foveate.conversion.shards import find_checkpoint
from foveate.errors import FoveateError, first_sentence
from foveate.hub_cards.card import read_base_name, write_card
from foveate.hub_cards.manifest import write_manifest
from foveate.hub_cards.training_records import ADAPTER_FOLDER, LOG_FILE, RECIPE_FILE
from foveate.modeling.core.loading import BASE_FIELDS


_SMALL_FILES_BYTES = 32_000_000


def merge(checkpoint: str | Path, out: str | Path) -> Path:
    """Makes a whole checkpoint of one in the adapter layout, and of one with LoRA weights beside it.

    Args:
        checkpoint: folder or hub id.
        out: the folder to write. It appears when it is complete, or not at all.

    Returns:
        The absolute path of `out`.

    Raises:
        FoveateError: `out` exists, there is nothing to merge, the base is not where the checkpoint says, PEFT is
            needed and not installed.
    """
    out = Path(os.path.abspath(Path(out).expanduser()))
    require_free(out)
    source = find_checkpoint(checkpoint)
    config, has_lora = read_config(source), (source / ADAPTER_FOLDER).is_dir()
    base = config.get(BASE_FIELDS[0])
    if base is None and not has_lora:
        raise FoveateError(f"{checkpoint} is whole: there is nothing to merge.")
    fetch_weights(checkpoint, source)
    try:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto")
    except Exception as error:  # loaders raise many kinds
        raise FoveateError(f"{checkpoint} can't be loaded: {first_sentence(error)}") from error
    if has_lora:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise FoveateError("LoRA weights need PEFT: pip install 'foveate[train]'.") from error
        model = merge_lora(PeftModel.from_pretrained(model, source, subfolder=ADAPTER_FOLDER))
    num_bytes = sum(parameter.nbytes for parameter in model.parameters()) + _SMALL_FILES_BYTES
    with atomic_folder(out, num_bytes) as folder:
        model.save_pretrained(folder)
        copy_small_files(source, folder)
        whole = {key: value for key, value in config.items() if key not in BASE_FIELDS}
        (folder / CONFIG_NAME).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name in (RECIPE_FILE, LOG_FILE):
            if (source / name).is_file():
                (folder / name).write_bytes((source / name).read_bytes())
        for path in folder.glob("*.safetensors"):  # safetensors lets the owner alone read what it writes
            path.chmod((folder / CONFIG_NAME).stat().st_mode)
        base_name = read_base_name(source)
        write_card(folder, base_name, source)
        write_manifest(folder, base_name)
    return out
