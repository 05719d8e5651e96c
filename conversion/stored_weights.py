"""A checkpoint's tensors, safetensors or pickled, of which one at a time, or a piece of one, is in memory."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from foveate.conversion.checkpoints import download, fetch_weights, read_json, read_shards
from foveate.conversion.safetensors_stream import DTYPE_NAMES, DTYPES, StreamedTensor
from foveate.errors import FoveateError, first_sentence


_PICKLED_SHARDS = "pytorch_model-*.bin"
_PIECE = 1 << 21  # values


@dataclass(frozen=True)
class Entry:
    """What is known of a tensor before it is read.

    Attributes:
        dtype: `None` for one that holds no floating-point numbers.
    """

    path: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredWeights:
    """Tensors of a checkpoint by name.

    Attributes:
        name: of the checkpoint, as the user calls it.
    """

    name: str
    entries: dict[str, Entry]

    def read(self, name: str) -> torch.Tensor:
        """A tensor's values.

        The file is mapped for this tensor alone: whatever has been read of a mapped file counts as the process's
        memory until it is unmapped, which would be the whole checkpoint in the end.
        """
        path = self.entries[name].path
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        return _map_pickled(path)[name]

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor's values, flat, so many after the other that another dtype of them takes a few megabytes."""
        yield from self.read(name).reshape(-1).split(_PIECE)

    def stream(self, name: str, new_name: str, dtype: torch.dtype) -> StreamedTensor:
        """A tensor under another name, and as another dtype."""
        return StreamedTensor(new_name, dtype, self.entries[name].shape, lambda: self.pieces(name))

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises `FoveateError` where there is no such tensor of this shape."""
        if name not in self.entries:
            raise FoveateError(f"{self.name} lacks the tensor {name}: download it again, or take one that is whole.")
        entry = self.entries[name]
        if entry.shape != shape:
            raise FoveateError(
                f"{self.name}'s {name} is {entry.shape}, and {shape} is needed by its config: they don't go together."
            )
        if entry.dtype is None:
            raise FoveateError(f"{self.name}'s {name} holds no floating-point numbers: take weights not quantised.")


def open_weights(name: str | Path, folder: Path) -> StoredWeights:
    """Finds a checkpoint's tensors; nothing but names, shapes and dtypes is read.

    Args:
        name: as given to `find_stored_checkpoint`; from the hub, the weights are downloaded.
        folder: what it returned.

    Raises:
        FoveateError: no weights, a file that is missing or damaged, or a pickle that holds more than tensors or is
            from before PyTorch 1.6, which can't be read one tensor at a time.
    """
    fetch_weights(name, folder, pickled=True)
    if any((folder / file).exists() for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        entries = {
            key: Entry(shard.path, DTYPES.get(tensor.dtype), tensor.shape)
            for shard in read_shards(folder)
            for key, tensor in shard.tensors.items()
        }
        return StoredWeights(str(name), entries)
    if (folder / WEIGHTS_NAME).exists():
        return StoredWeights(str(name), _list_pickled([folder / WEIGHTS_NAME]))
    index = folder / WEIGHTS_INDEX_NAME
    if not index.exists():
        raise FoveateError(
            f"{folder} has no weights: none of {SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME} and their indexes is there."
        )
    weight_map = read_json(index).get("weight_map") or {}
    files = sorted(set(weight_map.values()))
    if not files or any(Path(file).name != file for file in files):
        raise FoveateError(f"{index} has no usable weight_map: download it again.")
    if not Path(name).expanduser().is_dir():
        download(name, [_PICKLED_SHARDS], folder.name)
    entries = _list_pickled(folder / file for file in files)
    if missing := sorted(weight_map.keys() - entries.keys()):
        raise FoveateError(f"{folder} lacks the tensor {missing[0]} that its index lists: download it again.")
    return StoredWeights(str(name), entries)


def _list_pickled(paths: Iterable[Path]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for path in paths:
        for name, tensor in _map_pickled(path).items():
            if name in entries:
                raise FoveateError(f"{path} holds the tensor {name}, and another file does: download them again.")
            dtype = tensor.dtype if tensor.dtype in DTYPE_NAMES else None
            entries[name] = Entry(path, dtype, tuple(tensor.shape))
    return entries


def _map_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped: their values are read where they are used."""
    if not path.is_file():
        raise FoveateError(f"{path} is missing, though the index lists it: download it again.")
    if not zipfile.is_zipfile(path):
        raise FoveateError(
            f"{path} is no archive as PyTorch writes them since 1.6: it is damaged, so download it again, or older, "
            "and can't be read one tensor at a time, so load and save it with PyTorch."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise FoveateError(
            f"{path} holds more than plain tensors, which is not read, since it might run code: save the weights alone."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise FoveateError(f"{path} can't be read ({first_sentence(error).rstrip('.')}): download it again.") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise FoveateError(f"{path} holds something else than tensors by name: it is no checkpoint's weight file.")
    return content
