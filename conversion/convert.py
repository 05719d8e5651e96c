"""Base checkpoint → compressed checkpoint that loads anywhere, without loading the base's weights.

The base's weight files are copied byte for byte under the published names of their tensors; what the method adds goes
into one small file more, and one index lists all. Config, processor, the model's code and the card lie beside them.
What a method adds is what its model has and the base's has not, so a new method needs nothing here.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from foveate.conversion.atomic_folder import atomic_folder, require_free
from foveate.conversion.bundle import write_bundle
from foveate.conversion.checkpoints import (
    TOKENIZER_FILES,
    Shard,
    fetch_weights,
    find_stored_checkpoint,
    read_config,
    read_shards,
    require_tokenizer,
    stored_dtype,
)
from foveate.conversion.file_copy import copy_files, link_file
from foveate.conversion.safetensors_stream import StreamedTensor, write_safetensors
from foveate.conversion.shipped import LAB_PREFIX, TEXT_ENCODERS_THAT_SHIP
from foveate.conversion.text_encoder import CLIP_MODULES, TextEncoder, open_text_encoder
from foveate.errors import FoveateError, bad_input, first_sentence
from foveate.families import stock_families, writes_placeholders
from foveate.hub_cards.card import write_card
from foveate.hub_cards.manifest import write_manifest
from foveate.modeling.core.loading import BASE_FIELDS
from foveate.processing.question import QUESTION_TOKENIZER_FOLDER, common_start
from foveate.registry import METHODS, Pair, require_pair


#: CLIP checkpoints that vision towers of base models came from, by (width, layers, image side, patch side).
TEXT_ENCODERS = {(1024, 24, 336, 14): "openai/clip-vit-large-patch14-336"}

#: How the weights of a base model's checkpoint are named on the hub: what the names begin with.
_LLAVA_NAMES = ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector.")
PUBLISHED_NAMES = {
    "llava": _LLAVA_NAMES,
    "llava_next": (*_LLAVA_NAMES, "image_newline"),
    "qwen3_vl": ("model.language_model.", "model.visual."),
}

LAYOUTS = ("full", "adapter")

_SMALL_FILES_BYTES = 32_000_000  # tokenizers, config, code, card: a generous guess


@dataclass(frozen=True)
class BaseCheckpoint:
    """A checkpoint to convert.

    Attributes:
        name: as the user calls it.
        config_dict: its `config.json` as it stands.
        config: the same as Transformers reads it.
    """

    name: str
    folder: Path
    config_dict: dict[str, Any]
    config: Any


def convert(
    base: str | Path,
    out: str | Path,
    method: str = "recoverable",
    text_encoder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    keep_ratio: float | None = None,
    *,
    layout: str = "full",
    link: bool = False,
    progress: bool = False,
) -> Path:
    """Makes a checkpoint of a base model into one with visual token compression.

    Args:
        base: folder or hub id of a checkpoint in Transformers' own layout (llava-hf's for LLaVA), or `lab:tiny-llava`.
        out: the folder to write. It appears when it is complete, or not at all.
        method: a name in `foveate.registry.METHODS`.
        text_encoder: folder or hub id of the CLIP checkpoint whose text tower reads the question, for methods that do.
            `None` takes the one that the base's vision tower came from, where that is known.
        settings: fields of the config's `compression` block, for instance `{"num_visual_tokens": 64}`.
        keep_ratio: in (0, 1], sets the budget to this share of an image's tokens.
        layout: "full", or "adapter": only what the method adds, and where the base is, which loading reads in its
            place.
        link: make hard links to the base's weight files instead of copies. Both folders have the same files then: a
            write into one of them changes the other, but for `save_pretrained` of a compressed model, which makes new
            ones.
        progress: show a bar while weights are copied.

    Returns:
        The absolute path of `out`.

    Raises:
        FoveateError: `out` exists, a base or text encoder that is not fit or is damaged, an unknown method or setting,
            a full disk. Nothing is left behind then.
    """
    out = Path(os.path.abspath(Path(out).expanduser()))
    require_free(out)
    if layout not in LAYOUTS:
        raise FoveateError(f"There is no layout '{layout}': choose one of {', '.join(LAYOUTS)}.")
    if layout == "adapter" and link:
        raise FoveateError("The adapter layout holds no weights of the base: there is nothing to link, leave it out.")
    # Small files first: what they tell need not wait for a download of the weights.
    source, pair = _open_base(base, method)
    encoder = _open_text_encoder(source, pair, method, text_encoder)
    stock_processor = _open_processor(source)
    config = _make_config(source, pair, encoder, stock_processor, {"method": method, **(settings or {})}, keep_ratio)
    processor = make_processor(stock_processor, pair, encoder, config)

    shards = _read_base_weights(source)
    new = _stream_or_draw_parameters(source, pair, encoder, config, stored_dtype(shards))

    copied = [] if layout == "adapter" else shards
    num_bytes = (0 if link else sum(shard.num_bytes for shard in copied)) + _num_bytes(new) + _SMALL_FILES_BYTES
    with atomic_folder(out, num_bytes) as folder:
        if layout == "adapter":
            if new:
                write_safetensors(folder / SAFE_WEIGHTS_NAME, new)
        else:
            _write_weights(shards, new, folder, link, progress)
        _write_config(source, config, folder, _address_of(source) if layout == "adapter" else {})
        _write_processor(source, encoder, processor, folder)
        write_bundle(pair.config_class, folder)
        write_card(folder, source.name, source.folder)
        write_manifest(folder, source.name)
    return out


def _open_base(name: str | Path, method: str) -> tuple[BaseCheckpoint, Pair]:
    """The base checkpoint, without its weights, and the registry's entry for its kind."""
    if method not in METHODS:
        raise FoveateError(f"There is no method '{method}': choose one of {', '.join(METHODS)}.")
    folder = find_stored_checkpoint(name)
    config_dict = read_config(folder)
    pair = _choose_pair(name, config_dict, method)
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise FoveateError(f"{name}'s config can't be read: {first_sentence(error)}") from error
    return BaseCheckpoint(str(name), folder, config_dict, config), pair


def _choose_pair(name: str | Path, config_dict: dict[str, Any], method: str) -> Pair:
    """The registry's entry for a method and a base's `model_type`."""
    model_type = config_dict.get("model_type")
    if "compression" in config_dict:
        raise FoveateError(f"{name} is compressed already ('{model_type}'): convert the base that it came from.")
    if not model_type:
        raise FoveateError(f"{name} is of no known kind: its config has no model_type.")
    if "mm_vision_tower" in config_dict:
        raise FoveateError(
            f"{name} is an original LLaVA ('{model_type}'): `foveate import {name} OUT` makes one of it."
        )
    pair = require_pair(method, model_type, str(name))
    if "vision_config" in pair.config_class.sub_configs and not isinstance(config_dict.get("vision_config"), dict):
        raise FoveateError(
            f"{name} calls itself '{model_type}' but has no vision_config: it has to be in Transformers' own "
            f"layout (for LLaVA, the llava-hf models on the hub; `foveate import {name} OUT` makes one of an original)."
        )
    return pair


def _open_text_encoder(base: BaseCheckpoint, pair: Pair, method: str, name: str | Path | None) -> TextEncoder | None:
    """The text encoder that the user names or that goes with the base; `None` for a method that reads no question."""
    if "question_config" not in pair.config_class.sub_configs:
        if name is not None:
            raise FoveateError(f"The method '{method}' reads no question: leave the text encoder {name} out.")
        return None
    tower = base.config.vision_config.model_type
    if tower != "clip_vision_model":
        raise FoveateError(f"{base.name} sees with a '{tower}': the method '{method}' needs a 'clip_vision_model'.")
    return open_text_encoder(name or _default_text_encoder(base))


def _default_text_encoder(base: BaseCheckpoint) -> str:
    that_ship = {LAB_PREFIX + llava: LAB_PREFIX + clip for llava, clip in TEXT_ENCODERS_THAT_SHIP.items()}
    if base.name in that_ship:
        return that_ship[base.name]
    tower = base.config.vision_config
    shape = (tower.hidden_size, tower.num_hidden_layers, tower.image_size, tower.patch_size)
    if shape not in TEXT_ENCODERS:
        raise FoveateError(
            f"Which CLIP {base.name}'s vision tower came from is not known: name its checkpoint with --text-encoder."
        )
    return TEXT_ENCODERS[shape]


def _make_config(
    base: BaseCheckpoint,
    pair: Pair,
    encoder: TextEncoder | None,
    stock_processor: Any,
    compression: dict[str, Any],
    keep_ratio: float | None,
) -> Any:
    """The compressed model's config; its class checks the settings."""
    fields = {key: value for key, value in base.config_dict.items() if key != "model_type"}
    if encoder:
        fields["question_config"] = encoder.config.to_dict()
    with bad_input():
        from_tokenizer = pair.config_class.settings_class.settings_from_tokenizer(
            stock_processor.tokenizer, compression
        )
        compression = {**from_tokenizer, **compression}
        config = pair.config_class.from_dict({**fields, "compression": compression})
        if keep_ratio is not None:
            config.change_compression(keep_ratio)
    return config


def _open_processor(base: BaseCheckpoint) -> Any:
    require_tokenizer(base.name, base.folder)
    try:
        return AutoProcessor.from_pretrained(base.folder)
    except Exception as error:
        raise FoveateError(f"{base.name}'s processor can't be read: {first_sentence(error)}") from error


def make_processor(stock: Any, pair: Pair, encoder: TextEncoder | None, config: Any) -> Any:
    """The method's processor, of the parts and arguments of the base's, and the question's tokenizer."""
    if pair.base_model_type in stock_families() and not writes_placeholders(pair.base_model_type):
        raise FoveateError(
            f"The processor of a '{pair.base_model_type}' does not write placeholders by replace_image_token, the door "
            "through which fewer are written: `foveate.compress` takes the model alone."
        )
    names = inspect.signature(pair.processor_class.__init__).parameters
    arguments = {name: getattr(stock, name) for name in names if name != "self" and hasattr(stock, name)}
    if encoder:
        arguments["question_tokenizer"] = encoder.tokenizer
    with bad_input():
        if pair.image_processor_class is not None:
            arguments["image_processor"] = pair.image_processor_class.of_stock(stock.image_processor, config)
        processor = pair.processor_class(**arguments)
        if hasattr(processor, "placeholder"):
            processor.placeholder = processor.tokenizer.convert_ids_to_tokens(config.image_token_id)
        processor.set_compression(config.compression)
    return processor


def _read_base_weights(base: BaseCheckpoint) -> list[Shard]:
    """The base's weight files, checked. Tensors are copied, never renamed, so they have to be named as on the hub."""
    fetch_weights(base.name, base.folder)
    shards = read_shards(base.folder)
    keys = sorted(key for shard in shards for key in shard.tensors)
    for prefix in PUBLISHED_NAMES.get(base.config.model_type, ()):
        if not any(key.startswith(prefix) for key in keys):
            nearest = max(keys, key=lambda key: len(common_start(prefix, key)), default="none")
            raise FoveateError(
                f"{base.name} has no weights named '{prefix}…', as published '{base.config.model_type}' checkpoints "
                f"have (it has '{nearest}'): rename them first."
            )
    return shards


def _stream_or_draw_parameters(
    base: BaseCheckpoint, pair: Pair, encoder: TextEncoder | None, config: Any, dtype: torch.dtype
) -> list[StreamedTensor]:
    """What the method's model has and the base's has not: from CLIP, or, where the method trains it, drawn as the
    model itself begins (seed 0)."""
    with torch.device("meta"):  # models without memory
        stock, compressed = AutoModel.from_config(base.config), pair.model_class(config)
    of_stock = {name.partition(".")[0] for name in stock.state_dict()}
    added = {name: t for name, t in compressed.state_dict().items() if name.partition(".")[0] not in of_stock}
    from_clip = {name: tuple(t.shape) for name, t in added.items() if name.partition(".")[0] in CLIP_MODULES}
    parameters = encoder.stream_parameters(from_clip, dtype) if encoder else []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in sorted({name.partition(".")[0] for name in added.keys() - from_clip.keys()}):
            drawn = getattr(compressed, module).to_empty(device="cpu")
            drawn.apply(compressed._init_weights)
            parameters += [
                StreamedTensor(f"{module}.{name}", dtype, tuple(tensor.shape), partial(iter, (tensor,)))
                for name, tensor in drawn.state_dict().items()
            ]
    if pair.model_class.publishes_short_names:
        return parameters
    return [replace(tensor, name=f"model.{tensor.name}") for tensor in parameters]


def _write_weights(shards: list[Shard], new: list[StreamedTensor], folder: Path, link: bool, progress: bool) -> None:
    """Copies or links the base's weight files, writes one for the new parameters, and the index of all.

    The files are numbered as Transformers numbers shards, so that a later `save_pretrained` into the folder replaces
    them all.
    """
    number = len(shards) + bool(new)
    names = [f"model-{index:05d}-of-{number:05d}.safetensors" for index in range(1, number + 1)]
    copies = {shard.path: folder / name for shard, name in zip(shards, names)}
    if link:
        for source, target in copies.items():
            link_file(source, target)
    else:
        with _progress_bar(sum(shard.num_bytes for shard in shards), progress) as advance:
            copy_files(copies, advance)
    weight_map = {tensor: name for shard, name in zip(shards, names) for tensor in shard.tensors}
    added = [tensor.name for tensor in new]
    if clash := sorted(weight_map.keys() & set(added)):
        raise FoveateError(f"The base has a tensor {clash[0]} already: is it a compressed model's?")
    if new:
        write_safetensors(folder / names[-1], new)
        weight_map.update(dict.fromkeys(added, names[-1]))
    total_size = sum(shard.num_tensor_bytes for shard in shards) + _num_bytes(new)
    _write_json({"metadata": {"total_size": total_size}, "weight_map": weight_map}, folder / SAFE_WEIGHTS_INDEX_NAME)


@contextmanager
def _progress_bar(num_bytes: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """Gives what is called with every number of bytes that was copied."""
    console = Console(stderr=True)
    if not (shown and console.is_terminal):  # rich 14.0 ends a line of a bar that is disabled, too
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("copying weights", total=num_bytes)
        yield lambda count: bar.advance(task, count)


def _address_of(base: BaseCheckpoint) -> dict[str, Any]:
    """Where a checkpoint in the adapter layout finds its base: the hub id and commit, or the folder's path."""
    if base.folder.parent.name == "snapshots":  # of the hub's cache
        return dict(zip(BASE_FIELDS, (base.name, base.folder.name)))
    return {BASE_FIELDS[0]: os.path.abspath(base.folder)}


def _write_config(base: BaseCheckpoint, config: Any, folder: Path, more: Mapping[str, Any]) -> None:
    """Writes the base's `config.json` as it stands, with what the method adds and `more`, and its generation config.

    A config that Transformers 5 writes says some things (rotary embeddings, for one) in a way that 4.57 doesn't read.
    As the base was published, every version reads it.
    """
    fields = config.to_diff_dict()
    added = set(fields) - set(base.config.to_dict())
    written = {**base.config_dict, **{key: fields[key] for key in added}, **more, "model_type": config.model_type}
    written["architectures"] = [config.auto_map["AutoModelForImageTextToText"].rpartition(".")[2]]
    _write_json(written, folder / CONFIG_NAME)
    _copy_if_there([GENERATION_CONFIG_NAME], base.folder, folder)


def _write_processor(base: BaseCheckpoint, encoder: TextEncoder | None, processor: Any, folder: Path) -> None:
    """Saves the processor; its tokenizers as they were published: 4.57 can't read what 5 writes of them."""
    processor.save_pretrained(folder)
    _copy_if_there(TOKENIZER_FILES, base.folder, folder)
    if encoder:
        _copy_if_there(TOKENIZER_FILES, encoder.folder, folder / QUESTION_TOKENIZER_FOLDER)


def _copy_if_there(names: Iterable[str], source: Path, folder: Path) -> None:
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _num_bytes(tensors: Iterable[StreamedTensor]) -> int:
    return sum(tensor.num_bytes for tensor in tensors)
