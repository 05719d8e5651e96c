"""Checkpoints that hold only what their base has not: `foveate convert --layout adapter` writes such, training keeps
them so, and `foveate merge` makes them whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from foveate.conversion.atomic_folder import atomic_folder, require_free
from foveate.conversion.checkpoints import fetch_weights, find_checkpoint, read_config, read_shards
from foveate.errors import FoveateError, first_sentence
from foveate.modeling.core.loading import BASE_FIELDS


_SMALL_FILES_BYTES = 32_000_000


def leave_base_out(folder: Path, base: str) -> None:
    """Takes every tensor out of a whole checkpoint's weights that its base has just so, and leaves one small file.

    Args:
        folder: the checkpoint, whose config names the base already.
        base: folder or hub id.
    """
    base_folder = find_checkpoint(base)
    fetch_weights(base, base_folder)
    file_of = {name: shard.path for shard in read_shards(base_folder) for name in shard.tensors}
    own: dict[str, torch.Tensor] = {}
    shards = read_shards(folder)
    for shard in shards:
        with safe_open(shard.path, "pt") as file:
            for name in shard.tensors:
                tensor = file.get_tensor(name)
                if name not in file_of or not _is_stored(tensor, name, file_of[name]):
                    own[name] = tensor.clone()  # the file goes
    mode = shards[0].path.stat().st_mode
    for path in (*(shard.path for shard in shards), folder / SAFE_WEIGHTS_INDEX_NAME):
        path.unlink(missing_ok=True)
    save_file(own, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / SAFE_WEIGHTS_NAME).chmod(mode)


def _is_stored(tensor: torch.Tensor, name: str, path: Path) -> bool:
    with safe_open(path, "pt") as file:
        other = file.get_tensor(name)
    return other.dtype == tensor.dtype and torch.equal(other, tensor)


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
    from foveate.hub_cards.card import read_base_name, write_card
    from foveate.hub_cards.manifest import write_manifest
    from foveate.training.recipe import RECIPE_FILE
    from foveate.training.train import ADAPTER_FOLDER, LOG_FILE, copy_small_files, merge_lora

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
