"""`python -m benchmarks.conversion`: converting a checkpoint of real size, beside plain `cp`.

A checkpoint of LLaVA-1.5-7B's shape (14 GB of random bytes in three files, and a CLIP for the question) is made on the
fly, converted in processes of their own, by copy and by links, and deleted at the end, with all that was made of it.
Other such processes are killed at random moments: each may leave nothing under the checkpoint's name, or all of it.
Then one in its authors' layout, pickled, is made and imported.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
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
from transformers import AutoModelForImageTextToText, CLIPConfig, CLIPModel, LlamaForCausalLM

from foveate.conversion.checkpoints import VOCABULARY_FILES, read_shards
from foveate.conversion.shards import lab_folder
from foveate.errors import FoveateError
from foveate.evaluation.shapes import config_of_shape


SHAPE, NUM_SHARDS = "llava-1.5-7b", 3
CLIP_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
MEMORY_TARGET, LINK_TARGET, COPY_TARGET = 600e6, 5.0, 5.0  # bytes; seconds; seconds beyond `cp`
IMPORT_MEMORY_TARGET = 1.5e9  # bytes
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


def make_original(folder: Path, clip: Path, config: Any, num_shards: int = NUM_SHARDS) -> None:
    """The same as `make_base` in the layout of LLaVA's own repository: pickled, float16, and CLIP by its name; all
    values are the same. A file's tensors are in memory at once."""
    shutil.copytree(lab_folder("tiny-llava"), folder, ignore=shutil.ignore_patterns("*.safetensors", "*.jinja"))
    text, width, tower_width = config.text_config, config.text_config.hidden_size, config.vision_config.hidden_size
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(text).state_dict().items()}
    for number, inputs in (("0", tower_width), ("2", width)):
        shapes |= {
            f"model.mm_projector.{number}.weight": (width, inputs),
            f"model.mm_projector.{number}.bias": (width,),
        }
    names = list(shapes)
    weight_map = {}
    for index in range(num_shards):
        file = f"pytorch_model-{index + 1:05d}-of-{num_shards:05d}.bin"
        part = names[index * len(names) // num_shards : (index + 1) * len(names) // num_shards]
        torch.save({name: torch.full(shapes[name], 0.01, dtype=torch.float16) for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    fields = {
        **text.to_dict(),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_hidden_size": tower_width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(clip),
    }
    (folder / "config.json").write_text(json.dumps(fields, default=str))


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


def is_whole(folder: Path, min_shards: int = 2) -> bool:
    """Whether a checkpoint is there with all its weights, in so many files: a converted one has the base's and its
    own."""
    try:
        shards = read_shards(folder)
    except FoveateError:
        return False
    return (
        len(shards) >= min_shards
        and (folder / "config.json").is_file()
        and any((folder / name).exists() for name in VOCABULARY_FILES)
    )


def benchmark(
    work: Path,
    config: Any = None,
    method: str = "recoverable",
    rounds: int = 3,
    kills: int = 20,
    text: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Measures conversion of a checkpoint that is made in `work`, an empty folder, and deleted.

    Args:
        work: where about twice the checkpoint's size is free.
        config: of the base; LLaVA-1.5-7B's if `None`.
        method: a name in `foveate.registry.METHODS`, of LLaVA-1.5.
        rounds: how often everything is run, in turns.
        kills: processes that are killed at random moments.
        text: fields of the text encoder's config, for methods that read the question.
    """
    base, clip, original, out = work / "base", work / "clip", work / "original", work / "out"
    config = config or config_of_shape(SHAPE)
    make_base(base, config)
    make_clip(clip, config.vision_config, text or CLIP_TEXT)
    foveate = [sys.executable, "-m", "foveate"]
    convert = [*foveate, "convert", str(base), str(out), "--method", method]
    if method in ("recoverable", "qg-vtc"):
        convert += ["--text-encoder", str(clip)]
    commands = {
        # What a process holds, and takes, before it has converted anything: the libraries, and what converts with them.
        "libraries": [sys.executable, "-c", _LIBRARIES],
        "import": [sys.executable, "-c", "from foveate import convert"],
        "cp": ["cp", "-r", str(base), str(out)],
        "copy": convert,
        "link": [*convert, "--link"],
    }
    found: dict[str, Any] = {"method": method, "base_bytes": _num_bytes(base), "runs": {name: [] for name in commands}}
    run(commands["import"])  # the files that are imported come from the disk's cache from now on
    for _ in range(rounds):
        for name, words in commands.items():
            found["runs"][name].append(_run_and_remove(words, out))
    chance, outcomes = random.Random(0), []
    usual = statistics.median(one["seconds"] for one in found["runs"]["copy"])
    for _ in range(kills):
        killed = run(convert, kill_after=chance.uniform(0.1, 1.1) * usual)["killed"]
        outcomes.append(_outcome(work, out, killed))
    shutil.rmtree(base)
    make_original(original, clip, config)
    words = [*foveate, "import", str(original), str(out)]
    found["runs"]["original"] = [_run_and_remove(words, out, min_shards=1)]
    return {**found, "original_bytes": _num_bytes(original), "kills": outcomes}


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _run_and_remove(command: list[str], out: Path, min_shards: int = 2) -> dict[str, Any]:
    """As `run`, when all that was written before is on the disk, with `whole`: whether it left a whole checkpoint."""
    os.sync()
    found = {**run(command), "whole": is_whole(out, min_shards)}
    print(f"{found['seconds']:.1f} s: {' '.join(command)}", file=sys.stderr)
    shutil.rmtree(out, ignore_errors=True)
    return found


def _outcome(work: Path, out: Path, killed: bool) -> str:
    """What a conversion left under its name: "nothing", "whole" or, if it was not killed in time, "finished"; else
    "half". Its hidden folder is removed by the next."""
    rest = {path.name for path in work.iterdir() if not path.name.startswith(".out.partial-")} - {"base", "clip"}
    if not rest:
        return "nothing"
    found = "whole" if rest == {"out"} and is_whole(out) else "half"
    shutil.rmtree(out, ignore_errors=True)
    return found if killed else "finished"


def _print(result: dict[str, Any]) -> None:
    table = Table("", "seconds", "from – to", "peak memory", "not mapped", box=None, pad_edge=False)
    names = {
        "libraries": "import transformers",
        "import": "from foveate import convert",
        "cp": "cp",
        "copy": "foveate convert",
        "link": "foveate convert --link",
        "original": "foveate import",
    }
    for name, words in names.items():
        runs = result["runs"][name]
        seconds = [one["seconds"] for one in runs]
        table.add_row(
            words,
            f"{statistics.median(seconds):.1f}",
            f"{min(seconds):.1f} – {max(seconds):.1f}",
            *(f"{max(one[part] for one in runs) / 1e6:.0f} MB" for part in ("peak_bytes", "own_bytes")),
        )
    Console().print(table)
    killed = [outcome for outcome in result["kills"] if outcome != "finished"]
    counts = ", ".join(f"{outcome} {killed.count(outcome)}" for outcome in ("nothing", "whole", "half"))
    rounds = len(result["runs"]["copy"])
    print(f"A base of {result['base_bytes'] / 1e9:.1f} GB, method {result['method']}, median of {rounds}.", end=" ")
    print(f"Targets: {MEMORY_TARGET / 1e6:.0f} MB; --link {LINK_TARGET:.0f} s; by copy cp + {COPY_TARGET:.0f} s.")
    print(f"An original of {result['original_bytes'] / 1e9:.1f} GB. Target: {IMPORT_MEMORY_TARGET / 1e6:.0f} MB.")
    print(f"Left by {len(killed)} that were killed: {counts}; {len(result['kills']) - len(killed)} had ended before.")
    print(f"Command: {result['command']}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion", description=__doc__)
    parser.add_argument("--method", default="recoverable")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--work", type=Path, help="a folder on the file system to measure")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        result = benchmark(Path(work), method=arguments.method, rounds=arguments.rounds, kills=arguments.kills)
    result["command"] = " ".join([parser.prog, *sys.argv[1:]])
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)


if __name__ == "__main__":
    main()
