"""Reading checkpoints: where they are, their config, and their tensors by key, without building a model.

A checkpoint is named by a folder, a model id on the Hugging Face hub, or `lab:NAME` for what ships with foveate.
Everything is checked here, before anything is written: what can't be converted is refused with one sentence.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from foveate.conversion.safetensors_stream import DTYPES
from foveate.conversion.shipped import LAB_PREFIX, SHARD_FILE, shipped_folder
from foveate.errors import FoveateError


#: Files that make a tokenizer, of whatever kind; it has at least one of the first.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "README.md"]  # the card says which license it is under
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """What a safetensors header says of a tensor.

    Attributes:
        dtype: the format's name for it ("BF16").
    """

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """A safetensors file whose header fits its size."""

    path: Path
    tensors: dict[str, StoredTensor]

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    @property
    def num_tensor_bytes(self) -> int:
        """Size of all tensors, which fill the file behind its header."""
        return self.num_bytes - 8 - _header_bytes(self.path)


def find_stored_checkpoint(name: str | Path) -> Path:
    """The folder of a checkpoint that is stored as a whole, as every base and text encoder is; from the hub, with its
    small files only (see `fetch_weights`). `shards.find_checkpoint` also finds what ships as a shard.

    Args:
        name: a folder, a hub id, or `lab:NAME`. The hub is asked as `huggingface_hub` is set up (offline, token).

    Raises:
        FoveateError: there is no such folder, and the hub and its cache don't have it either; or it ships as a shard.
    """
    if str(name).startswith(LAB_PREFIX):
        folder = shipped_folder(str(name).removeprefix(LAB_PREFIX))
        if (folder / SHARD_FILE).exists():
            base = read_json(folder / SHARD_FILE)["base"]
            raise FoveateError(f"{name} is compressed already: take the base that it came from, {base}.")
        return folder
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FoveateError(f"{name} is a file: give the folder of the checkpoint that it is part of.")
    return download(name, _SMALL_FILES)


def fetch_weights(name: str | Path, folder: Path, pickled: bool = False) -> None:
    """Downloads the weights of a checkpoint that was found on the hub; does nothing for others.

    Args:
        name: as given to `find_stored_checkpoint`.
        folder: what it returned.
        pickled: where the hub has no safetensors, take `pytorch_model.bin`.
    """
    if str(name).startswith(LAB_PREFIX) or Path(name).expanduser().is_dir():
        return
    commit = folder.name  # the hub's cache names a snapshot so
    download(name, ["*.safetensors"], commit)
    if pickled and not _has_safetensors(folder):
        download(name, [WEIGHTS_NAME], commit)


def download(name: str | Path, patterns: list[str], commit: str | None = None) -> Path:
    """Files of a model on the hub, by patterns of their names: the folder in the cache. Raises `FoveateError`."""
    try:
        return Path(snapshot_download(str(name), revision=commit, allow_patterns=patterns))
    except Exception as error:  # the client raises many kinds, and others from version to version
        raise FoveateError(
            f"{name} is neither a folder nor a model on the hub that is cached here or can be fetched now "
            f"({type(error).__name__}): check the name and the network."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's `config.json` as it stands. Raises `FoveateError` where there is none or it is not JSON."""
    return read_json(folder / CONFIG_NAME, f"{folder} is not a checkpoint: it has no {CONFIG_NAME}.")


def require_tokenizer(name: str | Path, folder: Path) -> None:
    """Raises `FoveateError` where a checkpoint has no tokenizer: Transformers 5 would make an empty one."""
    if not any((folder / file).exists() for file in VOCABULARY_FILES):
        raise FoveateError(f"{name} has no tokenizer: none of {', '.join(VOCABULARY_FILES)} is there.")


def read_shards(folder: Path) -> list[Shard]:
    """The safetensors files of a checkpoint, in the order of their names, each checked against its size.

    Raises:
        FoveateError: no safetensors, a file that is missing, truncated or not safetensors, a tensor that is in no file
            or in two.
    """
    if (folder / SAFE_WEIGHTS_NAME).exists():  # Transformers prefers it to an index as well
        return [_read_shard(folder / SAFE_WEIGHTS_NAME)]
    if not (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        raise FoveateError(_no_safetensors(folder))
    weight_map = read_json(folder / SAFE_WEIGHTS_INDEX_NAME).get("weight_map") or {}
    names = sorted(set(weight_map.values()))
    if not names or any(Path(name).name != name for name in names):
        raise FoveateError(f"{folder / SAFE_WEIGHTS_INDEX_NAME} has no usable weight_map: download it again.")
    shards = [_read_shard(folder / name) for name in names]
    stored = Counter(key for shard in shards for key in shard.tensors)
    if missing := sorted(set(weight_map) - set(stored)):
        raise FoveateError(f"{folder} lacks the tensor {missing[0]} that its index lists: download it again.")
    if twice := [key for key, count in stored.items() if count > 1]:
        raise FoveateError(f"{folder} holds the tensor {min(twice)} in two files: save the checkpoint again.")
    return shards


def stored_dtype(shards: Iterable[Shard]) -> torch.dtype:
    """The floating-point type that most values are stored in."""
    values: Counter[str] = Counter()
    for shard in shards:
        for tensor in shard.tensors.values():
            if tensor.dtype in DTYPES:
                values[tensor.dtype] += math.prod(tensor.shape)
    return DTYPES[values.most_common(1)[0][0]] if values else torch.float32


def declared_dtype(folder: Path, shards: Iterable[Shard]) -> torch.dtype:
    """What Transformers takes for `dtype="auto"`: the dtype that a checkpoint's config names, else its weights'."""
    config = read_config(folder)
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)  # the older name
    return dtype if isinstance(dtype, torch.dtype) else stored_dtype(shards)


def read_json(path: Path, if_missing: str | None = None) -> dict[str, Any]:
    """A JSON object. Raises `FoveateError`; `if_missing` is its sentence where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FoveateError(if_missing or f"{path} is missing.") from None
    except (OSError, ValueError) as error:
        raise FoveateError(f"{path} can't be read as JSON ({error}): download it again.") from error
    if not isinstance(content, dict):
        raise FoveateError(f"{path} can't be read: it holds no JSON object.")
    return content


def _has_safetensors(folder: Path) -> bool:
    return any((folder / name).exists() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def _no_safetensors(folder: Path) -> str:
    if (folder / WEIGHTS_NAME).exists() or (folder / WEIGHTS_INDEX_NAME).exists():
        return f"{folder} has pickled weights only: load it with Transformers and save it as safetensors first."
    return f"{folder} has no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME} is there."


def _read_shard(path: Path) -> Shard:
    """Reads the header of a safetensors file. Raises `FoveateError` where it doesn't fit the file's size."""
    if not path.is_file():
        raise FoveateError(f"{path} is missing, though the index lists it: download it again.")
    try:
        with safe_open(path, framework="pt") as file:  # checks that the tensors end where the file ends
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            return Shard(path, {n: StoredTensor(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()})
    except (SafetensorError, OSError) as error:
        damage = _damage(path) or f"is not a valid safetensors file ({error})"
        raise FoveateError(f"{path} {damage}; download it again.") from error


def _damage(path: Path) -> str | None:
    """What is wrong with a file that safetensors refuses, where its first bytes tell. (The library says neither how
    long a file should be, nor that what it takes for a length is text.)"""
    size, header_bytes = path.stat().st_size, _header_bytes(path)
    if header_bytes > _MAX_HEADER_BYTES:
        return "is not a safetensors file (a Git LFS pointer, perhaps)"
    if size < 8 + header_bytes:
        return f"is truncated: expected at least {8 + header_bytes} bytes, found {size}"
    with path.open("rb") as file:
        file.seek(8)
        try:
            entries = json.loads(file.read(header_bytes))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            expected = 8 + header_bytes + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None
    return f"is truncated: expected {expected} bytes, found {size}" if size < expected else None


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")
