"""Checkpoints as their authors' repositories write them → the layout that Transformers and foveate read.

LLaVA-1.5 (`liuhaotian/llava-v1.5-7b`): a Llama with `model.mm_projector.…` beside it, its vision tower named in the
config and mostly not among the weights, sentencepiece's tokenizer without a token for the image. It becomes what the
llava-hf models on the hub are. Tensors keep their values, and the language model's and projector's their dtype; the
vision tower takes the language model's, in which LLaVA runs it. `<image>` and `<pad>` follow the vocabulary, and the
embedding's and head's rows are filled up to a multiple of 64. What is new is the mean of the old rows: the row of
`<image>` is never read, and the new tokens' logits are a mean of the old ones', so never the largest. (llava-hf draws
them around it.)

As in llava-hf's checkpoints, an image's short side is scaled to the tower's and the middle cut out. LLaVA's own
evaluation (`image_aspect_ratio: "pad"`) pads it to a square first, with the mean colour: for that, pad pictures before
they go to the processor.

VoCo-LLaMA (https://arxiv.org/abs/2406.12275) is a LLaVA-1.5 with `<voco>` behind its vocabulary, M of which stand after
an image; the text that follows attends to them, never to the image. That is ETC's bottleneck, so it becomes a
`LlavaETC` whose M compressed tokens all begin as the row of `<voco>`. M is in none of its files (its code says 2). Two
things differ: the line break that VoCo-LLaMA has between image and `<voco>`, which no answer sees, is left out; and in
its own mask later text doesn't see the start token before the image, which ETC lets it see.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from foveate.configuration.compression import require_positive_int
from foveate.conversion.atomic_folder import atomic_folder, require_free
from foveate.conversion.checkpoints import find_stored_checkpoint, read_config, read_json, require_tokenizer
from foveate.conversion.convert import convert
from foveate.conversion.safetensors_stream import StreamedTensor, write_checkpoint_weights, write_safetensors
from foveate.conversion.sentencepiece_model import llama_tokenizer
from foveate.conversion.stored_weights import StoredWeights, open_weights
from foveate.errors import FoveateError, bad_input, first_sentence
from foveate.hub_cards.card import write_card
from foveate.hub_cards.manifest import write_manifest
from foveate.hub_cards.names import CARD_FILE


IMAGE_TOKEN, PAD_TOKEN, VOCO_TOKEN = "<image>", "<pad>", "<voco>"

#: Chats in the words of llava-hf's LLaVA-1.5.
LLAVA_CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] != 'system' -%}{{ message['role'] | upper + ': ' }}{%- endif -%}
    {%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] + ' ' }}{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""

#: Chats as VoCo-LLaMA was trained: the first message's images before everything, and no line breaks after that.
VOCO_CHAT_TEMPLATE = """\
{%- for part in messages[0]['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{{ 'A chat between a curious user and an artificial intelligence assistant of the image. ' -}}
{{ "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
{%- for message in messages -%}
    {%- set first = loop.first -%}
    {%- if message['role'] != 'system' -%}{{ message['role'] | upper + ': ' }}{%- endif -%}
    {%- for part in message['content'] if part['type'] == 'image' and not first -%}{{ '<image>\\n' }}{%- endfor -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}
        {{ part['text'] | replace('\\n', '') + ('</s>' if message['role'] == 'assistant' else ' ') }}
    {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""

_MODEL_TYPES = ("llava", "llava_llama")
_ROWS = 64  # the embedding's number of rows is a multiple of it
_SMALL_FILES_BYTES = 32_000_000
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TOWER = "model.vision_tower.vision_tower."
_PROJECTOR = {"model.mm_projector.0.": "linear_1", "model.mm_projector.2.": "linear_2"}
_NOT_PARAMETERS = (".rotary_emb.inv_freq", ".embeddings.position_ids")  # old versions of Transformers stored them
_STRATEGIES = {"patch": "default", "cls_patch": "full"}

_LLAMA_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "bos_token_id",
    "eos_token_id",
)
_CLIP_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)


@dataclass(frozen=True)
class VisionTower:
    """A CLIP checkpoint that LLaVA sees with; `fields` are its `CLIPVisionConfig`'s."""

    name: str
    folder: Path
    fields: dict[str, Any]


@dataclass(frozen=True)
class OriginalLlava:
    """A checkpoint in its authors' layout, without its weights.

    Attributes:
        name: as the user calls it.
        config: its `config.json` as it stands.
        tokenizer: its own, with `<image>` and `<pad>` added.
        tokenizer_config: its `tokenizer_config.json`.
        rows: of the embedding to be.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    tower: VisionTower
    tokenizer: Tokenizer
    tokenizer_config: dict[str, Any]
    rows: int

    @property
    def voco_id(self) -> int | None:
        """Which row of the embedding is `<voco>`'s; `None` for one that is not VoCo-LLaMA's."""
        return self.tokenizer.token_to_id(VOCO_TOKEN)

    @property
    def text_fields(self) -> dict[str, Any]:
        """The fields of its `LlamaConfig`, with the vocabulary as it was."""
        return {name: self.config[name] for name in (*_LLAMA_FIELDS, "vocab_size") if name in self.config}


def import_original(
    source: str | Path,
    out: str | Path,
    vision_tower: str | Path | None = None,
    num_visual_tokens: int | None = None,
) -> Path:
    """Makes a checkpoint of LLaVA's own repository into one that Transformers loads, or one of VoCo-LLaMA's into a
    `LlavaETC`. No more than one tensor is in memory at a time.

    Args:
        source: folder or hub id of a checkpoint with Llama as its language model, weights pickled or safetensors.
        out: the folder to write. It appears when it is complete, or not at all.
        vision_tower: folder or hub id of the CLIP checkpoint that it sees with; `None`: the one that its config names.
            Its weights are read only where the checkpoint has none of the tower.
        num_visual_tokens: M, for VoCo-LLaMA, whose files don't say it.

    Returns:
        The absolute path of `out`.

    Raises:
        FoveateError: `out` exists, a checkpoint that is no LLaVA-1.5 or is incomplete or damaged, a vision tower that
            isn't found or has another width, pickled files with more than tensors, a full disk. Nothing is left behind
            then.
    """
    out = Path(os.path.abspath(Path(out).expanduser()))
    require_free(out)
    with bad_input():
        require_positive_int("num_visual_tokens", num_visual_tokens, optional=True)
    original = _open_original(source, vision_tower)
    if original.voco_id is None and num_visual_tokens is not None:
        raise FoveateError(
            f"{source} has no {VOCO_TOKEN} token, so it is no VoCo-LLaMA: leave the number of visual tokens out, and "
            "give it to `foveate convert` afterwards."
        )
    if original.voco_id is not None and num_visual_tokens is None:
        raise FoveateError(
            f"{source} is a VoCo-LLaMA and doesn't say how many {VOCO_TOKEN} tokens an image has: give the number that "
            "it was trained with (--num-visual-tokens; 2 in its published code)."
        )
    weights = open_weights(source, original.folder)
    tensors = _plan_tensors(original, weights)
    num_bytes = sum(tensor.num_bytes for tensor in tensors) + _SMALL_FILES_BYTES
    with atomic_folder(out, num_bytes) as folder:
        if num_visual_tokens is None:
            _write_llava(original, tensors, folder)
        else:
            base = folder / "base"
            base.mkdir()
            _write_llava(original, tensors, base)
            settings = {"num_visual_tokens": num_visual_tokens}
            compressed = convert(base, folder / "etc", "etc", settings=settings, link=_has_links(base))
            _fill_compressed_tokens(original, weights, compressed)
            shutil.rmtree(base)
            for path in list(compressed.iterdir()):
                path.rename(folder / path.name)
            compressed.rmdir()
    return out


def _open_original(source: str | Path, vision_tower: str | Path | None) -> OriginalLlava:
    folder = find_stored_checkpoint(source)
    config = read_config(folder)
    _require_llava(source, config)
    tower = _open_tower(source, config, vision_tower)
    vocab_size = config.get("vocab_size", 32000)  # Llama's own, where the config leaves it out
    tokenizer, tokenizer_config = _open_tokenizer(source, folder)
    if tokenizer.get_vocab_size() > vocab_size:
        raise FoveateError(
            f"{source}'s tokenizer has {tokenizer.get_vocab_size()} tokens and its model {vocab_size}: they don't go "
            "together."
        )
    for token in (IMAGE_TOKEN, PAD_TOKEN):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
    rows = max(vocab_size, -(-tokenizer.get_vocab_size() // _ROWS) * _ROWS)
    return OriginalLlava(
        str(source), folder, {**config, "vocab_size": vocab_size}, tower, tokenizer, tokenizer_config, rows
    )


def _require_llava(source: str | Path, config: dict[str, Any]) -> None:
    """Raises `FoveateError` for what is no LLaVA-1.5 in its authors' layout."""
    model_type = config.get("model_type")
    if isinstance(config.get("vision_config"), dict):
        raise FoveateError(f"{source} is in Transformers' own layout already: give it to `foveate convert` as it is.")
    if model_type not in _MODEL_TYPES or "mm_projector_type" not in config or not config.get("mm_vision_tower"):
        raise FoveateError(
            f"{source} is no LLaVA-1.5 of the original repository (its config has model_type '{model_type}', and there "
            "have to be mm_vision_tower and mm_projector_type): only those, with Llama inside, are imported."
        )
    projector = config["mm_projector_type"]
    if projector != "mlp2x_gelu":
        raise FoveateError(
            f"{source} has a projector of the type '{projector}': Transformers' LLaVA has 'mlp2x_gelu' alone, as "
            "LLaVA-1.5 has."
        )
    merge, aspect = config.get("mm_patch_merge_type", "flat"), config.get("image_aspect_ratio")
    if merge != "flat" or aspect == "anyres":
        raise FoveateError(f"{source} cuts images into tiles, as LLaVA-NeXT does: take its llava-hf checkpoint.")
    if config.get("mm_use_im_start_end"):
        raise FoveateError(f"{source} puts tokens around its images (mm_use_im_start_end), which LLaVA-1.5 doesn't.")
    if config.get("mm_vision_select_feature", "patch") not in _STRATEGIES:
        raise FoveateError(
            f"{source} takes '{config['mm_vision_select_feature']}' from its vision tower: LLaVA takes "
            f"{' or '.join(map(repr, _STRATEGIES))}."
        )


def _open_tower(source: str | Path, config: dict[str, Any], name: str | Path | None) -> VisionTower:
    """The CLIP that the user names or the config does."""
    name = name or config["mm_vision_tower"]
    try:
        folder = find_stored_checkpoint(name)
    except FoveateError as error:
        raise FoveateError(
            f"{source}'s vision tower is not found: {str(error).rstrip('.')}, or name it with --vision-tower."
        ) from error
    found = read_config(folder)
    fields = found.get("vision_config") if found.get("model_type") == "clip" else found
    if found.get("model_type") not in ("clip", "clip_vision_model") or not isinstance(fields, dict):
        raise FoveateError(f"{name} is a '{found.get('model_type')}' checkpoint: the vision tower has to be a 'clip'.")
    fields = {key: fields[key] for key in _CLIP_FIELDS if key in fields}
    width, needed = fields.get("hidden_size"), config.get("mm_hidden_size", fields.get("hidden_size"))
    if width != needed:
        raise FoveateError(
            f"{name} is {width} wide, and {source} was trained with a vision tower of {needed}: name another with "
            "--vision-tower."
        )
    return VisionTower(str(name), folder, fields)


def _open_tokenizer(source: str | Path, folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer with the tokens that were added to it, and its config; empty where there is none."""
    require_tokenizer(source, folder)
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    if (folder / "tokenizer.json").exists():
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:
            raise FoveateError(f"{source}'s tokenizer can't be read: {first_sentence(error)}") from error
    elif (folder / "tokenizer.model").exists():
        tokenizer = llama_tokenizer(folder / "tokenizer.model", _text_of(config.get("bos_token"), "<s>"))
    else:
        raise FoveateError(f"{source} has no tokenizer that Llama's could be: neither tokenizer.model nor .json.")
    added = {int(number): _text_of(token) for number, token in config.get("added_tokens_decoder", {}).items()}
    if (folder / "added_tokens.json").exists():
        added |= {number: token for token, number in read_json(folder / "added_tokens.json").items()}
    for number, token in sorted(added.items()):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
        if tokenizer.token_to_id(token) != number:
            raise FoveateError(
                f"{source} says that its token {token} is {number}, and by its vocabulary it is "
                f"{tokenizer.token_to_id(token)}: its files don't go together."
            )
    return tokenizer, config


def _text_of(token: Any, default: str = "") -> str:
    """A special token, which tokenizer configs write as text or with its properties."""
    return (token["content"] if isinstance(token, dict) else token) or default


def _plan_tensors(original: OriginalLlava, weights: StoredWeights) -> list[StreamedTensor]:
    """All tensors of the checkpoint to be, under llava-hf's names. Raises `FoveateError` for one that is missing, is of
    another shape, or is of no use to LLaVA-1.5."""
    config = original.config
    try:
        with torch.device("meta"):  # models without memory
            language_model = LlamaForCausalLM(LlamaConfig(**original.text_fields))
            vision_model = CLIPVisionModel(CLIPVisionConfig(**original.tower.fields))
    except Exception as error:
        raise FoveateError(
            f"The config of {original.name} or of its vision tower can't be read: {first_sentence(error)}"
        ) from error
    width, tower_width = config["hidden_size"], original.tower.fields["hidden_size"]
    projector = {
        "model.mm_projector.0.weight": (width, tower_width),
        "model.mm_projector.0.bias": (width,),
        "model.mm_projector.2.weight": (width, width),
        "model.mm_projector.2.bias": (width,),
    }
    if not any(name.startswith("model.mm_projector.") for name in weights.entries):
        raise FoveateError(
            f"{original.name} has no projector (no weights named model.mm_projector.…): it is a language model alone."
        )
    language = {name: tuple(tensor.shape) for name, tensor in language_model.state_dict().items()}
    for name, shape in (language | projector).items():
        weights.require(name, shape)
    dtype = weights.entries[_EMBEDDINGS].dtype or torch.float32
    planned = [_stream_language(weights, name, original.rows) for name in language]
    for name in projector:
        start = next(start for start in _PROJECTOR if name.startswith(start))
        new_name = f"multi_modal_projector.{_PROJECTOR[start]}.{name.removeprefix(start)}"
        planned.append(weights.stream(name, new_name, weights.entries[name].dtype or dtype))
    inside = any(name.startswith(_TOWER) for name in weights.entries)
    tower, prefix = (weights, _TOWER) if inside else (open_weights(original.tower.name, original.tower.folder), "")
    for name, tensor in vision_model.state_dict().items():
        published = "vision_model." + name.removeprefix("vision_model.")  # some versions leave it out in memory
        tower.require(prefix + published, tuple(tensor.shape))
        planned.append(tower.stream(prefix + published, f"vision_tower.{published}", dtype))
    known = language.keys() | projector.keys()
    for name in sorted(weights.entries.keys() - known):
        if not name.startswith(_TOWER) and not name.endswith(_NOT_PARAMETERS):
            raise FoveateError(f"{original.name} has a tensor {name}, which LLaVA-1.5 hasn't: it would be lost.")
    return planned


def _stream_language(weights: StoredWeights, name: str, rows: int) -> StreamedTensor:
    entry = weights.entries[name]
    dtype = entry.dtype or torch.float32
    if name not in (_EMBEDDINGS, _HEAD):
        return weights.stream(name, f"language_model.{name}", dtype)

    def read() -> Iterator[torch.Tensor]:
        stored = weights.read(name)
        yield stored
        if rows > len(stored):
            yield _mean_row(stored).to(dtype).expand(rows - len(stored), -1)

    return StreamedTensor(f"language_model.{name}", dtype, (rows, entry.shape[1]), read)


def _mean_row(matrix: torch.Tensor, piece: int = 1024) -> torch.Tensor:
    """(rows, width) → (width,), in double precision, of which few rows at a time are in memory."""
    total = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for start in range(0, len(matrix), piece):
        total += matrix[start : start + piece].double().sum(0)
    return total / len(matrix)


def _write_llava(original: OriginalLlava, tensors: list[StreamedTensor], folder: Path) -> None:
    """Writes the whole checkpoint in llava-hf's layout into an existing folder."""
    config, tokenizer = original.config, original.tokenizer
    image_id, pad_id = tokenizer.token_to_id(IMAGE_TOKEN), tokenizer.token_to_id(PAD_TOKEN)
    tower = original.tower.fields
    strategy = _STRATEGIES[config.get("mm_vision_select_feature", "patch")]
    patches = (tower["image_size"] // tower["patch_size"]) ** 2
    embeddings = next(tensor for tensor in tensors if tensor.name.endswith(_EMBEDDINGS))
    llava = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {
            "model_type": "llama",
            **original.text_fields,
            "vocab_size": original.rows,
            "pad_token_id": pad_id,
        },
        "vision_config": {"model_type": "clip_vision_model", **tower},
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": strategy,
        "image_token_index": image_id,
        "image_seq_length": patches + (strategy == "full"),
        "ignore_index": -100,
        "pad_token_id": pad_id,
        "tie_word_embeddings": False,
        "torch_dtype": str(embeddings.dtype).removeprefix("torch."),
    }
    # Llama's own numbers, where the config leaves them out.
    ends = {name: config.get(name, number) for name, number in (("bos_token_id", 1), ("eos_token_id", 2))}
    of_image = {
        "patch_size": tower["patch_size"],
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": 1,  # CLIP's class token
        "image_token": IMAGE_TOKEN,
        "processor_class": "LlavaProcessor",
    }
    template = LLAVA_CHAT_TEMPLATE if original.voco_id is None else VOCO_CHAT_TEMPLATE
    _write_json(llava, folder / CONFIG_NAME)
    _write_json({**ends, "pad_token_id": pad_id}, folder / GENERATION_CONFIG_NAME)
    _write_json(of_image, folder / "processor_config.json")
    _write_json(_image_processor_of(original.tower), folder / "preprocessor_config.json")
    _write_json(_tokenizer_config_of(original), folder / "tokenizer_config.json")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    if (original.folder / CARD_FILE).exists():  # it says which license the weights are under
        shutil.copyfile(original.folder / CARD_FILE, folder / CARD_FILE)
    write_checkpoint_weights(folder, tensors)


def _image_processor_of(tower: VisionTower) -> dict[str, Any]:
    """CLIP's image processor as it was published, or, where the folder has none, as every CLIP has it."""
    side = tower.fields["image_size"]
    fields: dict[str, Any] = {
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
    published = tower.folder / "preprocessor_config.json"
    if published.exists():
        stated = read_json(published)
        fields |= {name: stated[name] for name in fields if name in stated}
    if isinstance(fields["size"], int):  # as they were first published
        fields["size"] = {"shortest_edge": fields["size"]}
    if isinstance(fields["crop_size"], int):
        fields["crop_size"] = {"height": fields["crop_size"], "width": fields["crop_size"]}
    return {**fields, "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}


def _tokenizer_config_of(original: OriginalLlava) -> dict[str, Any]:
    """In the form that every version reads as it stands, with `tokenizer.json` beside it."""
    stated = original.tokenizer_config
    names = (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    longest = stated.get("model_max_length") or original.config.get("max_position_embeddings", 2048)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: _text_of(stated.get(name), default) for name, default in names},
        "pad_token": PAD_TOKEN,
        "additional_special_tokens": [IMAGE_TOKEN] + [VOCO_TOKEN] * (original.voco_id is not None),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": longest,
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
    }


def _has_links(folder: Path) -> bool:
    """Whether the file system of a checkpoint has hard links, so that weights needn't be there twice for a while."""
    try:
        os.link(folder / CONFIG_NAME, folder / "link")
    except OSError:
        return False
    (folder / "link").unlink()
    return True


def _fill_compressed_tokens(original: OriginalLlava, weights: StoredWeights, folder: Path) -> None:
    """Makes every compressed token of a fresh `LlavaETC` the row of `<voco>`, and says in its config whose it is."""
    name = "compressor.embeddings"
    path = folder / read_json(folder / SAFE_WEIGHTS_INDEX_NAME)["weight_map"][name]
    config = read_json(folder / CONFIG_NAME)
    number = config["compression"]["trained_tokens"]
    path.unlink()
    row = weights.read(_EMBEDDINGS)[original.voco_id].clone()
    rows = row.expand(number, -1)
    write_safetensors(path, [StreamedTensor(name, rows.dtype, tuple(rows.shape), lambda: [rows])])
    _write_json({**config, "trained_by": "voco-llama"}, folder / CONFIG_NAME)
    write_card(folder, original.name, original.folder)
    write_manifest(folder, original.name)


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
