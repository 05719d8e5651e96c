"""Safetensors files written in flat memory: the header first, then the bytes of one tensor after the other.

`safetensors.serialize_file` and `safetensors.torch.save_file` take all tensors of a file in memory, 5 GB of them; these
are read when they are written. So the header is made here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from foveate.errors import FoveateError


#: The format's names of the dtypes that weights are stored in.
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is read when it is written.

    Attributes:
        name: in the file.
        read: gives its values, in pieces that make it up one after the other.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Iterable[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_checkpoint_weights(
    folder: Path, tensors: Sequence[StreamedTensor], max_shard_bytes: int = _MAX_SHARD_BYTES
) -> None:
    """Writes tensors as a checkpoint's weight files: one, or several with an index.

    Args:
        folder: an existing folder without weights.
        tensors: in the order that they are put into files.
        max_shard_bytes: a file holds no more, but for one that holds a larger tensor alone.

    Raises:
        FoveateError: a tensor that is not as long as it said it was.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        by_name,  # type: ignore[arg-type]  # only the two functions look at what is split
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, [by_name[name] for name in names])
    if not split.is_sharded:
        return
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Sequence[StreamedTensor]) -> None:
    """Writes one new file. Raises `FoveateError` for a tensor that is not as long as it said it was."""
    # The widest dtype first, so that every tensor begins where its values may lie in memory.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            written = sum(file.write(_bytes_of(piece, tensor.dtype)) for piece in tensor.read())
            if written != tensor.num_bytes:
                raise FoveateError(f"{tensor.name} has {written} bytes and not {tensor.num_bytes}: read it again.")


def _bytes_of(piece: torch.Tensor, dtype: torch.dtype) -> memoryview:
    values = piece.detach().to(dtype).contiguous().reshape(-1)
    return values.view(torch.uint8).numpy().data
