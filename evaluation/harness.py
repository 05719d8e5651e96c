"""The one harness that every method's results go through: a checkpoint answers the questions of a task.

A task (`tasks.py`) is a stream of examples, an image and the turns asked about it. Answers come from batched
greedy decoding and are scored by the task's metric. What comes out is a dictionary fit for JSON, from which
`results.py` makes tables and plots; all of it but `timing` is the same when the same command runs again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import secrets
import shlex
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TorchAoConfig

from foveate.conversion.checkpoints import declared_dtype, fetch_weights, read_shards
from foveate.conversion.shards import find_checkpoint
from foveate.errors import FoveateError, bad_input, first_sentence
from foveate.evaluation.examples import Example
from foveate.evaluation.metrics import METRICS, mean_of
from foveate.evaluation.multi_turn import CachedTurns
from foveate.evaluation.published_dialogues import PublishedDialogues
from foveate.evaluation.tasks import MAX_NEW_TOKENS, Task, find_task
from foveate.hub_cards.content_hash import content_hash
from foveate.modeling.compatibility import cache_of
from foveate.modeling.core.account import count_without_compression
from foveate.modeling.core.base import SavedCompressionMixin
from foveate.modeling.core.cache import LogicalCache
from foveate.modeling.core.precision import dtype_name, fast_dtype


DEFAULT_BATCH_SIZE = 32
SKIPPED_NAMED = 5


def _int8_weights() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


#: Ways to load a model with narrower weights: the package that each needs, and its config by the dtype to compute in.
QUANTIZATIONS: dict[str, tuple[str, Callable[[torch.dtype], Any]]] = {
    "8bit": ("bitsandbytes", lambda dtype: BitsAndBytesConfig(load_in_8bit=True)),
    "4bit": (
        "bitsandbytes",
        lambda dtype: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
    ),
    "int8": ("torchao", lambda dtype: _int8_weights()),
}


# The checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint, compressed or not.

    Attributes:
        name: as the user calls it.
        folder: where its files are.
        model, processor: ready to run; the processor pads on the left.
    """

    name: str
    folder: Path
    model: Any
    processor: Any

    @property
    def is_compressed(self) -> bool:
        return isinstance(self.model, SavedCompressionMixin)

    @property
    def settings(self) -> dict[str, Any] | None:
        """The `compression` block as it is now; `None` for a model without."""
        return self.model.config.compression.to_dict() if self.is_compressed else None

    @property
    def method(self) -> str:
        """Name of the method, "none" for a model without."""
        return self.settings["method"] if self.settings else "none"

    def encode(self, conversations: list[list[dict[str, Any]]], images: list[Image.Image]) -> Any:
        """Model inputs of chats with the turn of the assistant opened, and of all their images."""
        prompts = self.processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
        with bad_input():
            inputs = self.processor(images=images or None, text=prompts, padding=True, return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    def cached_turns(self, num_rows: int) -> CachedTurns:
        """Nothing cached yet, of a batch of `num_rows` dialogues."""
        return CachedTurns(num_rows, self.model.config.image_token_id, self.processor.tokenizer.pad_token_id)

    def decode(self, sequences: torch.Tensor, prompt_length: int) -> list[str]:
        """The texts after the prompts, which `generate` returns in front of them."""
        answers = self.processor.batch_decode(sequences[:, prompt_length:], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def uncompressed_visual_tokens(self, image: Image.Image) -> int:
        """Tokens that a compressed model would have of an image of which nothing is left out."""
        merge = getattr(self.model.config.vision_config, "spatial_merge_size", None)
        if merge is not None:  # limits of an image's size are the processor's
            return self.processor.image_processor.get_number_of_image_patches(*image.size[::-1], {}) // merge**2
        return count_without_compression(self.model.model, image.size)

    def content_hash(self) -> str:
        """As results record it (see [`content_hash`])."""
        return content_hash(self.folder)


def open_checkpoint(
    name: str | Path,
    settings: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    quantize: str | None = None,
) -> Checkpoint:
    """Loads a compressed checkpoint or a base for evaluation.

    Args:
        name: a folder, a hub id, or `lab:NAME`.
        settings: changes to the compression, as `set_compression` takes them.
        dtype: "auto" takes the checkpoint's own where the device computes fast in it, else what it computes fast in
            (see [`fast_dtype`]).
        device: `None` takes the GPU when there is one.
        quantize: a name in `QUANTIZATIONS`; compressed models leave out what sees and what compresses.

    Raises:
        FoveateError: there is no such checkpoint, it is damaged or not an image-text model, settings for a model that
            doesn't compress, don't exist or are out of range, an unknown quantisation or one whose package is not
            installed.
    """
    device, wanted = _device(device), _dtype(dtype)
    folder = find_checkpoint(name)
    fetch_weights(name, folder)
    shards = read_shards(folder)  # a truncated file is told apart here, before a loader trips over it
    used = wanted or fast_dtype(device, declared_dtype(folder, shards))
    model: Any
    quantization: dict[str, Any] = {}
    if quantize is not None:
        quantization = {"quantization_config": _quantization(quantize, used), "device_map": device}
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=used, **quantization)
        processor = AutoProcessor.from_pretrained(folder)
    except Exception as error:  # loaders raise many kinds; a config can be wrong in any way
        raise FoveateError(f"{name} can't be loaded as an image-text model: {first_sentence(error)}") from error
    processor.tokenizer.padding_side = "left"
    model = model.eval() if quantize is not None else model.eval().to(device)
    checkpoint = Checkpoint(str(name), folder, model, processor)
    if settings and not checkpoint.is_compressed:
        raise FoveateError(f"{name} doesn't compress, so there is no {', '.join(settings)} to set: convert it first.")
    if settings:
        with bad_input():
            model.set_compression(processor, **settings)
    return checkpoint


def _quantization(name: str, dtype: torch.dtype) -> Any:
    if name not in QUANTIZATIONS:
        raise FoveateError(f"There is no quantisation '{name}': choose one of {', '.join(QUANTIZATIONS)}.")
    package, make = QUANTIZATIONS[name]
    if importlib.util.find_spec(package) is None:
        raise FoveateError(f"{name} needs {package}, which is not installed: pip install {package}")
    return make(dtype)


def _dtype(name: str | torch.dtype) -> torch.dtype | None:
    """What a user calls a dtype; `None` for "auto". Raises `FoveateError`."""
    if name == "auto":
        return None
    found = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise FoveateError(f"There is no dtype '{name}': choose auto, float32, bfloat16 or float16.")
    return found


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # no such name, or no such device in this machine or build
        raise FoveateError(f"There is no device '{device}' here: leave it out, or choose cpu.") from error


def visual_tokens_kept(cache: Any, is_placeholder: torch.Tensor) -> torch.Tensor:
    """How many visual tokens of each row the language model kept, read from the cache that a prompt left behind.

    Args:
        cache: the KV cache after `generate`, of a compressed model or a stock one.
        is_placeholder: (rows, prompt length) bool.

    Returns:
        (rows,) int64.
    """
    if not isinstance(cache, LogicalCache) or cache.source is None:
        return is_placeholder.sum(1)
    length = is_placeholder.shape[1]
    in_prompt = (cache.source >= 0) & (cache.source < length)
    return (is_placeholder.gather(1, cache.source.clamp(0, length - 1)) & in_prompt).sum(1)


# Asking


@dataclass
class _Tally:
    """What was found out so far, an entry a question and, for the tokens, an entry an image."""

    scores: list[float] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    visual_tokens: list[int] = field(default_factory=list)
    base_visual_tokens: list[int] = field(default_factory=list)

    def accuracies(self, metric: str) -> dict[str, Any]:
        """The scores of a result. Where several are of one dialogue, intervals don't take them for independent; single
        questions, and each turn, have Wilson's interval where an answer is right or wrong (see [`mean_of`])."""
        found: dict[str, Any] = {
            metric: mean_of(self.scores, self.examples),
            "by_type": self._means_by(self.types),
        }
        if max(self.turns) > 0:
            found["by_turn"] = list(self._means_by(self.turns).values())
        return found

    def _means_by(self, keys: list) -> dict[Any, Any]:
        groups: dict[Any, tuple[list[float], list[int]]] = {}
        for key, score, example in zip(keys, self.scores, self.examples):
            scores, examples = groups.setdefault(key, ([], []))
            scores.append(score)
            examples.append(example)
        return {key: mean_of(*group) for key, group in groups.items()}


@torch.inference_mode()
def _ask_batch(checkpoint: Checkpoint, task: Task, examples: list[Example], tally: _Tally, reuse_cache: bool) -> None:
    """Asks a batch of examples turn by turn; the model's own answers stay in the conversation."""
    conversations: list[list[dict[str, Any]]] = [[] for _ in examples]
    score, first = METRICS[task.metric].score, len(tally.visual_tokens)
    cached = checkpoint.cached_turns(len(examples)) if reuse_cache else None
    for turn in range(max(len(example.turns) for example in examples)):
        rows = [row for row, example in enumerate(examples) if turn < len(example.turns)]
        for row in rows:
            picture = [{"type": "image"}] if turn == 0 and examples[row].image is not None else []
            text = {"type": "text", "text": examples[row].turns[turn].question}
            conversations[row].append({"role": "user", "content": [*picture, text]})
        if cached is not None:
            cached.keep(rows)
        answers, visual_tokens = _generate(
            checkpoint,
            [conversations[row] for row in rows],
            [image for row in rows if (image := examples[row].image) is not None],
            task.max_new_tokens,
            cached,
        )
        if turn == 0:
            tally.visual_tokens += visual_tokens
            images = [example.image for example in examples] if checkpoint.is_compressed else []
            tally.base_visual_tokens += [
                0 if image is None else checkpoint.uncompressed_visual_tokens(image) for image in images
            ]
        for row, answer in zip(rows, answers):
            asked = examples[row].turns[turn]
            conversations[row].append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            tally.scores.append(score(answer, asked.answers))
            tally.examples.append(first + row)
            tally.types.append(asked.type)
            tally.turns.append(turn)


def _generate(
    checkpoint: Checkpoint,
    conversations: list,
    images: list[Image.Image],
    max_new_tokens: int = MAX_NEW_TOKENS,
    cached: CachedTurns | None = None,
) -> tuple[list[str], list[int]]:
    """Answers, and the number of visual tokens of each row; with `cached`, on the turns before and for those after."""
    inputs = checkpoint.encode(conversations, images)
    if cached is not None:
        inputs = cached.go_on(inputs)
    output = checkpoint.model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=checkpoint.processor.tokenizer.pad_token_id,
        return_dict_in_generate=True,
    )
    if cached is not None:
        cached.remember(inputs, output)
    is_placeholder = inputs["input_ids"] == checkpoint.model.config.image_token_id
    kept = visual_tokens_kept(cache_of(output), is_placeholder)
    return checkpoint.decode(output.sequences, is_placeholder.shape[1]), kept.tolist()


def evaluate(
    checkpoint: str | Path,
    task: str = "lab-vqa",
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    output: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    progress: bool = True,
    method_label: str | None = None,
    reuse_cache: bool = False,
    data: str | Path | None = None,
    images: str | Path | None = None,
    skip_missing: bool = False,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Asks a checkpoint the questions of a task, and counts right answers and visual tokens.

    Args:
        checkpoint: a folder, a hub id, or `lab:NAME`; compressed, or a base to compare with.
        task: the name of one that is built in or plugged in (see `tasks.py`).
        limit: number of examples (questions, or dialogues), the task's own number if `None`.
        seed: chooses other scenes and questions; of a dataset, which dialogues come first.
        batch_size: examples at a time.
        output: a JSON file for the result, written when all is done, or not at all.
        settings: changes to the compression for this run, as `set_compression` takes them.
        dtype, device, quantize: as in [`open_checkpoint`].
        progress: whether to show a bar, on stderr.
        method_label: how tables call the run; the method's name, "base" for a model without, if `None`.
        reuse_cache: whether later turns go on with the cache of those before, so that an image is encoded and
            compressed once, by its first question where a question guides; else every turn is a fresh run, in which
            QG-VTC is guided by the turn's own question.
        data: the folder with a dataset's files, for the tasks that read one.
        images: the folder with its images, if it is not in `data`.
        skip_missing: leave out dialogues whose image is missing or can't be read; else that is an error.

    Returns:
        `command`, `task`, `n` (examples), `seed`, `checkpoint`, `checkpoint_hash`, `label`, `method`, `compression`,
        `dtype` (that it computed in, never "auto"), `reuse_cache`; the task's metric (`exact_match` or
        `vqa_accuracy`), `by_type` and, for dialogues, `by_turn` (each with value, 95 % interval and n; see
        [`mean_of`]); `base_visual_tokens` and `mean_visual_tokens` (an image); with `skip_missing`, `skipped`: the
        number `n` of dialogues left out and the first of their `names`; `versions`; and `timing`.

    Raises:
        FoveateError: bad input, in one sentence; before anything is computed.
    """
    asked = find_task(task)
    number = _check(asked, limit, seed, batch_size, output)
    examples = _examples(task, asked, number, seed, data, images, skip_missing)
    opened = open_checkpoint(checkpoint, settings, dtype, device, quantize)
    tally, start = _Tally(), time.perf_counter()
    with _progress_bar(progress) as bar:
        shown = bar.add_task(task, total=len(examples) if isinstance(examples, PublishedDialogues) else number)
        stream = iter(examples)
        while batch := list(islice(stream, batch_size)):
            _ask_batch(opened, asked, batch, tally, reuse_cache)
            bar.update(shown, advance=len(batch), description=f"{task} {statistics.fmean(tally.scores):.1%}")
    seconds = time.perf_counter() - start

    kept = statistics.fmean(tally.visual_tokens)
    result = {
        "command": _command(
            checkpoint,
            task,
            limit,
            seed,
            batch_size,
            output,
            settings,
            opened.model.dtype,
            method_label,
            reuse_cache,
            data,
            images,
            skip_missing,
            quantize,
        ),
        "task": task,
        "n": len(tally.visual_tokens),
        "seed": seed,
        "checkpoint": str(checkpoint),
        "checkpoint_hash": opened.content_hash(),
        "label": method_label or (opened.method if opened.is_compressed else "base"),
        "method": opened.method,
        "compression": opened.settings,
        "dtype": dtype_name(opened.model.dtype),
        **({} if quantize is None else {"quantization": quantize}),
        "reuse_cache": reuse_cache,
        **tally.accuracies(asked.metric),
        "base_visual_tokens": statistics.fmean(tally.base_visual_tokens or tally.visual_tokens),
        "mean_visual_tokens": kept,
        **_skipped(examples, skip_missing),
        "versions": versions(),
        "timing": {"seconds": round(seconds, 3), "device": opened.model.device.type},
    }
    if output is not None:
        write_json(result, Path(output))
    return result


def _check(task: Task, limit: int | None, seed: int, batch_size: int, output: str | Path | None) -> int | None:
    """The number of examples; raises `FoveateError` for what can be known to be wrong before the model is loaded."""
    number = task.num_examples if limit is None else limit
    for name, value, least in (("limit", number, 1), ("seed", seed, 0), ("batch size", batch_size, 1)):
        if value is not None and value < least:
            raise FoveateError(f"The {name} is {value}: it has to be at least {least}.")
    if output is not None:
        require_writable(Path(output))
    return number


def _examples(
    name: str,
    task: Task,
    number: int | None,
    seed: int,
    data: str | Path | None,
    images: str | Path | None,
    skip_missing: bool,
) -> Iterable[Example]:
    """The stream of a task; raises `FoveateError` for files that are missing or not in their format."""
    if task.reads is None:
        if data is not None or images is not None:
            raise FoveateError(f"The task {name} reads no files: leave --data and --images out.")
        return task.examples(number, seed)
    if data is None:
        raise FoveateError(f"The task {name} reads published files: --data names the folder with {task.reads}.")
    folders = (None if folder is None else Path(folder).expanduser() for folder in (data, images))
    return task.examples(number, seed, *folders, skip_missing)


def _skipped(examples: Iterable[Example], skip_missing: bool) -> dict[str, Any]:
    if not (skip_missing and isinstance(examples, PublishedDialogues)):
        return {}
    return {"skipped": {"n": len(examples.skipped), "names": examples.skipped[:SKIPPED_NAMED]}}


def _progress_bar(enabled: bool) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not enabled)


# What a result says of itself


def _command(
    checkpoint: str | Path,
    task: str,
    limit: int | None,
    seed: int,
    batch_size: int,
    output: str | Path | None,
    settings: Mapping[str, Any] | None,
    dtype: torch.dtype,
    method_label: str | None,
    reuse_cache: bool,
    data: str | Path | None,
    images: str | Path | None,
    skip_missing: bool,
    quantize: str | None,
) -> str:
    """The command line that does the same, on other devices too: it names the dtype that was computed in."""
    words = ["foveate", "evaluate", str(checkpoint), "--task", task]
    words += ["--limit", str(limit)] if limit is not None else []
    words += ["--seed", str(seed)]
    words += [word for key, value in (settings or {}).items() for word in ("--set", f"{key}={_as_option(value)}")]
    words += ["--batch-size", str(batch_size)] if batch_size != DEFAULT_BATCH_SIZE else []
    words += ["--dtype", dtype_name(dtype)]
    words += ["--quantize", quantize] if quantize is not None else []
    words += ["--label", method_label] if method_label else []
    words += ["--reuse-cache"] if reuse_cache else []
    words += ["--data", str(data)] if data is not None else []
    words += ["--images", str(images)] if images is not None else []
    words += ["--skip-missing"] if skip_missing else []
    words += ["--json", str(output)] if output is not None else []
    return shlex.join(words)


def _as_option(value: Any) -> str:
    """A setting as `--set` reads it: JSON, or else plain text."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    foveate = importlib.import_module(__name__.split(".")[0])
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "foveate": foveate.__version__,
    }


def require_writable(path: Path) -> None:
    """Raises `FoveateError` where a file can't be written later."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir():
        raise FoveateError(f"{path} is a folder: give the name of a file.")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise FoveateError(f"{path} can't be written: {folder} is no folder that can be written to.")


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Writes a JSON file that is there as a whole or not at all; folders above it are made. Raises `FoveateError`."""
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise FoveateError(f"{path} can't be written: {error.strerror}.") from error
    finally:
        partial.unlink(missing_ok=True)
