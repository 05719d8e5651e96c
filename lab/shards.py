"""Trained methods on the lab's base, as small shards: only what training changed, put together with the base when it is
asked for.

A shard is a folder of `lab/weights/`: `shard.json` (base, method, settings), `trained.safetensors` (the modules that
trained as a whole, bfloat16) and, for a method that trains them, `adapter/` (low-rank adapters in PEFT's format).
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


SHARD_FILE, _TRAINED_FILE, _ADAPTER = "shard.json", "trained.safetensors", "adapter"


def write_shard(trained: Path, shard: Path, base: str) -> Path:
    """Takes what training changed out of a checkpoint that `foveate train --keep-adapter` wrote.

    Args:
        trained: the checkpoint.
        shard: the folder to write.
        base: what it was converted from, "lab:NAME".
    """
    from foveate.conversion.safetensors_stream import write_safetensors
    from foveate.conversion.stored_weights import open_weights
    from foveate.hub_cards.training_records import earlier_stages

    modules = {module for stage in earlier_stages(trained).values() for module in stage["learning_rate"]}
    weights = open_weights(trained, trained)
    names = [name for name in weights.entries if any(f".{module}." in f".{name}" for module in modules)]
    shard.mkdir(parents=True)
    write_safetensors(shard / _TRAINED_FILE, [weights.stream(name, name, torch.bfloat16) for name in names])
    if (trained / _ADAPTER).is_dir():
        _write_adapter(trained / _ADAPTER, shard / _ADAPTER, base)
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
    from transformers import AutoModelForImageTextToText

    from foveate.conversion.convert import convert
    from foveate.training.merge import copy_small_files

    content = json.loads((shard / SHARD_FILE).read_text(encoding="utf-8"))
    compression = dict(content["compression"])
    converted = out.with_name(f"{out.name}-untrained")
    shutil.rmtree(converted, ignore_errors=True)
    convert(content["base"], converted, compression.pop("method"), settings=compression)
    trained = load_file(shard / _TRAINED_FILE)
    for path in sorted(converted.glob("*.safetensors")):
        tensors = {name: trained.pop(name, tensor) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    model = AutoModelForImageTextToText.from_pretrained(converted, dtype="auto")
    if (shard / _ADAPTER).is_dir():
        model = _with_adapter(model, shard)
    model.save_pretrained(out)
    copy_small_files(converted, out)
    shutil.rmtree(converted)
    return out


def _with_adapter(model, shard: Path):
    from foveate.errors import FoveateError
    from foveate.training.merge import merge_lora

    try:
        from peft import PeftModel
    except ImportError as error:
        raise FoveateError(f"{shard.name} needs PEFT, which is not installed: pip install 'foveate[train]'.") from error
    return merge_lora(PeftModel.from_pretrained(model, shard / _ADAPTER))
