"""Checkpoints that hold only what their base has not, as `foveate convert --layout adapter` writes them: training keeps
them so."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from foveate.conversion.checkpoints import fetch_weights, find_stored_checkpoint, read_shards


def leave_base_out(folder: Path, base: str) -> None:
    """Takes every tensor out of a whole checkpoint's weights that its base has just so, and leaves one small file.

    Args:
        folder: the checkpoint, whose config names the base already.
        base: folder or hub id.
    """
    base_folder = find_stored_checkpoint(base)
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
