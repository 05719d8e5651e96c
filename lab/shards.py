"""Writes what training changed on the lab's base as a shard (`foveate.conversion.shards` puts it together again)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from foveate.conversion.safetensors_stream import write_safetensors
from foveate.conversion.shards import SHARD_ADAPTER, TRAINED_FILE
from foveate.conversion.shipped import SHARD_FILE
from foveate.conversion.stored_weights import open_weights
from foveate.hub_cards.training_records import ADAPTER_FOLDER, earlier_stages


def write_shard(trained: Path, shard: Path, base: str) -> Path:
    """Takes what training changed out of a checkpoint that `foveate train --keep-adapter` wrote.

    Args:
        trained: the checkpoint.
        shard: the folder to write.
        base: what it was converted from, "lab:NAME".
    """
    modules = {module for stage in earlier_stages(trained).values() for module in stage["learning_rate"]}
    weights = open_weights(trained, trained)
    names = [name for name in weights.entries if any(f".{module}." in f".{name}" for module in modules)]
    shard.mkdir(parents=True)
    write_safetensors(shard / TRAINED_FILE, [weights.stream(name, name, torch.bfloat16) for name in names])
    if (trained / ADAPTER_FOLDER).is_dir():
        _write_adapter(trained / ADAPTER_FOLDER, shard / SHARD_ADAPTER, base)
    compression = json.loads((trained / "config.json").read_text(encoding="utf-8"))["compression"]
    content = {"base": base, "compression": compression}
    (shard / SHARD_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return shard


def _write_adapter(trained: Path, folder: Path, base: str) -> None:
    folder.mkdir()
    adapter = {name: tensor.bfloat16() for name, tensor in load_file(trained / "adapter_model.safetensors").items()}
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
