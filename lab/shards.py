"""Trained methods on the lab's base, as small shards: only what training changed, put together with the base when it is
asked for.

A shard is a folder of `lab/weights/`: `shard.json` (base, method, settings), `trained.safetensors` (the modules that
trained as a whole, bfloat16) and `adapter/` (low-rank adapters in PEFT's format).
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
    from ..conversion.checkpoints import read_shards, read_tensors
    from ..training.recipe import earlier_stages

    modules = {module for stage in earlier_stages(trained).values() for module in stage["learning_rate"]}
    names = [name for file in read_shards(trained) for name in file.tensors if name.partition(".")[0] in modules]
    shard.mkdir(parents=True)
    save_file(read_tensors(trained, names, torch.bfloat16), shard / _TRAINED_FILE, metadata={"format": "pt"})
    (shard / _ADAPTER).mkdir()
    adapter = {
        name: tensor.bfloat16() for name, tensor in load_file(trained / _ADAPTER / "adapter_model.safetensors").items()
    }
    save_file(adapter, shard / _ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter_config = json.loads((trained / _ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    adapter_config["base_model_name_or_path"] = base
    (shard / _ADAPTER / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2, sort_keys=True) + "\n")
    compression = json.loads((trained / "config.json").read_text(encoding="utf-8"))["compression"]
    content = {"base": base, "compression": compression}
    (shard / SHARD_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return shard


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

    from ..conversion.convert import convert
    from ..errors import FoveateError

    try:
        from peft import PeftModel
    except ImportError as error:
        raise FoveateError(f"{shard.name} needs PEFT, which is not installed: pip install 'foveate[train]'.") from error
    from ..training.train import copy_small_files, merge_lora

    content = json.loads((shard / SHARD_FILE).read_text(encoding="utf-8"))
    compression = dict(content["compression"])
    converted = out.with_name(f"{out.name}-untrained")
    shutil.rmtree(converted, ignore_errors=True)
    convert(content["base"], converted, compression.pop("method"), settings=compression)
    model = AutoModelForImageTextToText.from_pretrained(converted, dtype="auto")
    parameters = dict(model.model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(shard / _TRAINED_FILE).items():
            parameters[name].copy_(tensor)
    model = merge_lora(PeftModel.from_pretrained(model, shard / _ADAPTER))
    model.save_pretrained(out)
    copy_small_files(converted, out)
    shutil.rmtree(converted)
    return out
