"""Trained methods on a base that ships, as small shards: only what training changed, put together with the base when it
is asked for.

A shard is a folder: `shard.json` (base, method, settings), `trained.safetensors` (the modules that trained as a whole,
bfloat16) and, for a method that trains them, `adapter/` (low-rank adapters in PEFT's format).
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from foveate.conversion.checkpoints import find_stored_checkpoint
from foveate.conversion.convert import convert
from foveate.conversion.merged_weights import copy_small_files, merge_lora
from foveate.conversion.shipped import LAB_PREFIX, SHARD_FILE, shipped_folder
from foveate.errors import FoveateError


TRAINED_FILE, SHARD_ADAPTER = "trained.safetensors", "adapter"


def find_checkpoint(name: str | Path) -> Path:
    """The folder of a checkpoint, as [`find_stored_checkpoint`] finds it; what ships as a shard is put together first.

    Raises:
        FoveateError: as there, or PEFT is needed for a shard's adapters and not installed.
    """
    if str(name).startswith(LAB_PREFIX):
        return lab_folder(str(name).removeprefix(LAB_PREFIX))
    return find_stored_checkpoint(name)


def lab_folder(name: str) -> Path:
    """The folder of a checkpoint that ships with the lab ("tiny-llava", "tiny-clip", or a trained method's, such as
    "tiny-llava-qg-vtc-72", which is put together first). Raises `FoveateError`."""
    folder = shipped_folder(name)
    return composed(folder) if (folder / SHARD_FILE).exists() else folder


@functools.lru_cache
def composed(shard: Path) -> Path:
    """The whole checkpoint of a shard, in a folder that is there as long as the process."""
    work = Path(tempfile.mkdtemp(prefix="foveate-lab-"))
    atexit.register(shutil.rmtree, work, ignore_errors=True)
    return compose(shard, work / shard.name)


def compose(shard: Path, out: Path) -> Path:
    """Writes the whole checkpoint of a shard, with the adapters merged.

    Raises:
        FoveateError: PEFT, which reads the adapters, is not installed.
    """
    content = json.loads((shard / SHARD_FILE).read_text(encoding="utf-8"))
    compression = dict(content["compression"])
    converted = out.with_name(f"{out.name}-untrained")
    shutil.rmtree(converted, ignore_errors=True)
    convert(content["base"], converted, compression.pop("method"), settings=compression)
    trained = load_file(shard / TRAINED_FILE)
    for path in sorted(converted.glob("*.safetensors")):
        tensors = {name: trained.pop(name, tensor) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    model = AutoModelForImageTextToText.from_pretrained(converted, dtype="auto")
    if (shard / SHARD_ADAPTER).is_dir():
        model = _with_adapter(model, shard)
    model.save_pretrained(out)
    copy_small_files(converted, out)
    shutil.rmtree(converted)
    return out


def _with_adapter(model, shard: Path):
    try:
        from peft import PeftModel
    except ImportError as error:
        raise FoveateError(f"{shard.name} needs PEFT, which is not installed: pip install 'foveate[train]'.") from error
    return merge_lora(PeftModel.from_pretrained(model, shard / SHARD_ADAPTER))
