"""Checkpoints that hold only what a base model has not, and name the base: megabytes on a hub instead of gigabytes."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file


#: Fields of such a checkpoint's config: the base's folder or hub id, and its commit there.
BASE_FIELDS = ("base_model_name_or_path", "base_model_revision")

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that say where and how files are found."""
    return {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}


def base_of(name: str | os.PathLike, config: Any, kwargs: dict[str, Any]) -> tuple[str, str | None] | None:
    """The base that a checkpoint names, and its commit; `None` for a checkpoint that is whole.

    Args:
        name: folder or hub id of the checkpoint.
        config: as given to `from_pretrained`.
        kwargs: its other arguments.
    """
    if isinstance(config, PretrainedConfig):
        fields = vars(config)
    else:
        fields, _ = PretrainedConfig.get_config_dict(config or name, **hub_arguments(kwargs))
    base, revision = (fields.get(field) for field in BASE_FIELDS)
    return None if base is None else (base, revision)


def forget_base(model: Any) -> None:
    """A loaded model is whole, and saves itself whole."""
    for field in BASE_FIELDS:
        vars(model.config).pop(field, None)


def read_all_tensors(
    name: str | os.PathLike, base: tuple[str, str | None], kwargs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The base's tensors with the checkpoint's own over them, as they are stored; on the CPU they stay on disk until
    they are read.

    Raises:
        OSError: the base, or its weights, are not there.
    """
    hub = hub_arguments(kwargs)
    of_base = {key: hub[key] for key in hub if key not in ("revision", "subfolder")}
    tensors = _read_tensors(base[0], {**of_base, "revision": base[1]})
    if not tensors:
        raise OSError(
            f"{name} holds only what was added to {base[0]}, where no safetensors weights are found: put the base "
            "there, or set base_model_name_or_path in config.json to where it is."
        )
    return {**tensors, **_read_tensors(name, hub)}


def _read_tensors(name: str | os.PathLike, hub: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of all safetensors files of a folder or hub id; empty if there are none."""

    def find(file: str) -> str | None:
        try:
            return cached_file(name, file, **hub)
        except OSError:  # neither a folder nor a repository with such a file
            return None

    whole, index = find(SAFE_WEIGHTS_NAME), find(SAFE_WEIGHTS_INDEX_NAME)
    files = [whole] if whole is not None else []
    if whole is None and index is not None:
        with open(index, encoding="utf-8") as file:
            files = [
                str(cached_file(name, shard, **hub)) for shard in sorted(set(json.load(file)["weight_map"].values()))
            ]
    tensors = {}
    for path in files:
        with safe_open(path, "pt") as file:
            tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return tensors


def read_generation_config(name: str | os.PathLike, kwargs: dict[str, Any]) -> GenerationConfig | None:
    """A checkpoint's own, where it has one."""
    try:
        return GenerationConfig.from_pretrained(name, **hub_arguments(kwargs))
    except OSError:
        return None
