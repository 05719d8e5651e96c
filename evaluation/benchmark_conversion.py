"""`python -m foveate.evaluation.benchmark_conversion`: converting a checkpoint of real size, beside plain `cp`.

A checkpoint of LLaVA-1.5-7B's shape (14 GB of random bytes in three files, and a CLIP for the question) is made on the
fly, converted in processes of their own, by copy and by links, and deleted at the end, with all that was made of it.
Other such processes are killed at random moments: each may leave nothing, or the whole checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageTextToText, CLIPConfig, CLIPModel

from ..conversion.checkpoints import VOCABULARY_FILES, read_shards
from ..errors import FoveateError
from ..lab import lab_folder
from .shapes import config_of_shape


SHAPE, NUM_SHARDS = "llava-1.5-7b", 3
CLIP_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
MEMORY_TARGET, LINK_TARGET, COPY_TARGET = 600e6, 5.0, 5.0  # bytes; seconds; seconds beyond `cp`
_PUBLISHED = (  # how Transformers names a module, and how published checkpoints do
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
_LIBRARIES = "from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin"  # torch comes with them
_TICK = 0.02  # seconds between two looks at a process
_BLOCK = np.random.default_rng(0).bytes(1 << 24)


def make_base(folder: Path, config: Any, num_shards: int = NUM_SHARDS) -> None:
    """A LLaVA of this config with random bytes for weights, bfloat16, under the published names; with the lab's
    processor."""
    shutil.copytree(lab_folder("tiny-llava"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    shapes = {_published(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = list(shapes)
    weight_map = {}
    for index in range(num_shards):
        file = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[index * len(names) // num_shards : (index + 1) * len(names) // num_shards]
        write_random(folder / file, {name: shapes[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)


def make_clip(folder: Path, vision_config: Any, text: Mapping[str, int]) -> None:
    """A CLIP with random bytes for weights, this vision tower, and the lab's tokenizer."""
    shutil.copytree(lab_folder("tiny-clip"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tokens = json.loads((folder / "config.json").read_text())["text_config"]
    ids = {name: tokens[name] for name in tokens if name.endswith("_token_id") or name == "vocab_size"}
    config = CLIPConfig(text_config={**ids, **text}, vision_config=vision_config.to_dict(), projection_dim=768)
    with torch.device("meta"):
        model = CLIPModel(config)
    write_random(folder / "model.safetensors", {name: tuple(t.shape) for name, t in model.state_dict().items()})
    config.save_pretrained(folder)


def _published(name: str) -> str:
    start, published = next((pair for pair in _PUBLISHED if name.startswith(pair[0])), ("", ""))
    return published + name.removeprefix(start)


def write_random(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 tensors, written as it goes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = end
        while left > 0:
            left -= file.write(_BLOCK[: min(left, len(_BLOCK))])


def run(command: list[str], kill_after: float | None = None) -> dict[str, Any]:
    """Runs a process to its end, or kills it.

    Returns:
        `seconds`, `peak_bytes` (most memory that was resident), `own_bytes` (most of it that no file backs, which the
        system could drop when memory is short), `killed`.

    Raises:
        FoveateError: it failed.
    """
    # Its words go to a file, for a pipe that nobody reads fills up.
    with tempfile.TemporaryFile() as words:
        started, peak_bytes, own_bytes, killed = time.perf_counter(), 0, 0, False
        process = subprocess.Popen(command, stdout=words, stderr=words)
        while process.poll() is None:
            resident, own = _memory(process.pid)
            peak_bytes, own_bytes = max(peak_bytes, resident), max(own_bytes, own)
            if kill_after is not None and not killed and time.perf_counter() - started > kill_after:
                process.kill()
                killed = True
            time.sleep(_TICK)
        seconds = time.perf_counter() - started
        if process.returncode not in (0, -signal.SIGKILL):
            words.seek(0)
            raise FoveateError(f"{' '.join(command)} failed: {words.read().decode(errors='replace')[-500:]}")
    return {
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "own_bytes": own_bytes,
        "killed": process.returncode != 0,
    }


def _memory(pid: int) -> tuple[int, int]:
    """Most bytes that were resident so far, and those now that no file backs. (What the system tells of a process that
    has ended begins with what its parent had.)"""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended, or there is no /proc
        return 0, 0
    kilobytes = {line.split()[0]: int(line.split()[1]) for line in status.splitlines() if line.endswith(" kB")}
    return 1024 * kilobytes.get("VmHWM:", 0), 1024 * kilobytes.get("RssAnon:", 0)


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint is there with all its weights."""
    shards = read_shards(folder)
    return (
        len(shards) > 1 and (folder / "config.json").is_file() and any((folder / n).exists() for n in VOCABULARY_FILES)
    )


def benchmark(
    work: Path, config: Any = None, method: str = "recoverable", kills: int = 20, text: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Measures conversion of a checkpoint that is made in `work`, an empty folder, and deleted.

    Args:
        work: where about twice the checkpoint's size is free.
        config: of the base; LLaVA-1.5-7B's if `None`.
        method: a name in `foveate.registry.METHODS`.
        kills: processes that are killed at random moments.
        text: fields of the text encoder's config, for methods that read the question.
    """
    base, clip, out = work / "base", work / "clip", work / "out"
    config = config or config_of_shape(SHAPE)
    make_base(base, config)
    command = [sys.executable, "-m", "foveate", "convert", str(base), str(out), "--method", method]
    if method in ("recoverable", "qg-vtc"):
        make_clip(clip, config.vision_config, text or CLIP_TEXT)
        command += ["--text-encoder", str(clip)]
    files = [str(shard.path) for shard in read_shards(base)]
    found: dict[str, Any] = {"base_bytes": sum(shard.num_bytes for shard in read_shards(base))}
    # What a process holds, and takes, before it has converted anything: the libraries, and foveate with them.
    package = f"import {__package__.rpartition('.')[0]}"
    run([sys.executable, "-c", package])  # the files that are imported come from the disk's cache from now on
    found["libraries"] = run([sys.executable, "-c", _LIBRARIES])
    found["import"] = run([sys.executable, "-c", package])
    (work / "cp").mkdir()
    os.sync()
    found["cp"] = run(["cp", *files, str(work / "cp")])
    shutil.rmtree(work / "cp")
    for name, option in (("copy", []), ("link", ["--link"])):
        os.sync()
        found[name] = run([*command, *option])
        found[f"{name}_is_whole"] = is_whole(out)
        shutil.rmtree(out)
    chance, outcomes = random.Random(0), []
    for _ in range(kills):
        killed = run(command, kill_after=chance.uniform(0.1, 1.1) * found["copy"]["seconds"])["killed"]
        outcomes.append(_outcome(work, out, killed))
    return {**found, "kills": outcomes, "method": method}


def _outcome(work: Path, out: Path, killed: bool) -> str:
    """What a conversion left: "nothing", "whole" or, if it was not killed in time, "finished"; else "half"."""
    deadline = time.monotonic() + 60
    while any(path.name.startswith(".out.") for path in work.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    rest = {path.name for path in work.iterdir()} - {"base", "clip"}
    if not rest:
        return "nothing"
    found = "whole" if rest == {"out"} and is_whole(out) else "half"
    shutil.rmtree(out, ignore_errors=True)
    return found if killed else "finished"


def _print(result: dict[str, Any]) -> None:
    table = Table("", "seconds", "peak memory", "without mapped files", box=None, pad_edge=False)
    names = {
        "cp": "cp",
        "libraries": "import torch and Transformers",
        "import": "import foveate",
        "copy": "foveate convert",
        "link": "foveate convert --link",
    }
    for name, words in names.items():
        part = result[name]
        table.add_row(
            words,
            f"{part['seconds']:.1f}",
            f"{part['peak_bytes'] / 1e6:.0f} MB",
            f"{part['own_bytes'] / 1e6:.0f} MB",
        )
    Console().print(table)
    killed = [outcome for outcome in result["kills"] if outcome != "finished"]
    counts = ", ".join(f"{outcome} {killed.count(outcome)}" for outcome in ("nothing", "whole", "half"))
    print(f"A base of {result['base_bytes'] / 1e9:.1f} GB, method {result['method']}.", end=" ")
    print(f"Targets: {MEMORY_TARGET / 1e6:.0f} MB; --link {LINK_TARGET:.0f} s; by copy cp + {COPY_TARGET:.0f} s.")
    print(f"Left by {len(killed)} that were killed: {counts}; {len(result['kills']) - len(killed)} had ended before.")
    print(f"Command: {result['command']}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m foveate.evaluation.benchmark_conversion", description=__doc__)
    parser.add_argument("--method", default="recoverable")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--work", type=Path, help="a folder on the file system to measure")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        result = benchmark(Path(work), method=arguments.method, kills=arguments.kills)
    result["command"] = " ".join([parser.prog, *sys.argv[1:]])
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)


if __name__ == "__main__":
    main()
