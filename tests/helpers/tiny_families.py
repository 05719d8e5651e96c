"""Stock vision-language families of Transformers, tiny: a random model and its real processor, nothing downloaded."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    FEATURE_EXTRACTOR_MAPPING,
    IMAGE_PROCESSOR_MAPPING,
    PROCESSOR_MAPPING,
    VIDEO_PROCESSOR_MAPPING,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)


#: Side of a vision patch in pixels, unless a family needs another.
PATCH = 4
#: Side of a tile: 36 patches, which most families merge to 9 visual tokens.
TILE = 6 * PATCH
TEXT_WIDTH, VISION_WIDTH = 64, 32
#: (height, width) of pictures that show what a family does: most that can cut a picture cut one of these into tiles,
#: and where pictures keep their size no two of them have the same number of visual tokens.
PICTURE_SIZES = ((24, 40), (64, 40), (24, 24))

WORDS = (
    *("a", "all", "an", "and", "answer", "any", "are", "big", "blue", "book", "box", "by", "car", "cat", "circle"),
    *("colour", "dog", "few", "from", "green", "how", "in", "is", "it", "large", "left", "line", "many", "no", "of"),
    *("on", "or", "picture", "red", "right", "see", "shape", "show", "sky", "small", "square", "that", "the", "there"),
    *("this", "to", "top", "tree", "two", "under", "what", "where", "which", "white", "who", "word", "yes"),
)


@dataclass(frozen=True)
class TinyFamily:
    """One stock family, tiny."""

    model_type: str
    #: A stock config, whose token ids are those of the processor's tokenizer.
    make_config: Callable[[], Any]
    #: The family's own processor class, with its own image processor and a tokenizer built here.
    make_processor: Callable[[], Any]
    #: The first minor of Transformers that has the family, of those foveate is tested with from 5.19 on.
    since: str = "5.19"
    #: What a call of the processor needs besides text, images and padding, to fit the tiny config and to cut tiles.
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: Which form a batch's images may have: "nested" (a list for every row) and "flat" (one list for the batch).
    layouts: tuple[str, ...] = ("nested", "flat")
    #: Whether the processor takes a batch without any image; rows without one beside others all of them take.
    text_only: bool = True
    #: Why the stock model itself doesn't run, on which Transformers; empty where it does.
    stock_failure: str = ""

    def arrange(self, rows: Iterable[Iterable[Image.Image]]) -> list[Any]:
        """A batch's images, row for row, as the processor takes them."""
        nested = [list(row) for row in rows]
        return nested if "nested" in self.layouts else [image for row in nested for image in row]


def make_stock_model(family: TinyFamily, seed: int = 0) -> Any:
    """The family's stock model in float32 and evaluation mode; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(family.make_config(), dtype=torch.float32)
    _draw_weights(model, seed)
    return model.eval()


def make_prompt(processor: Any, num_images: int, text: str, between: str = "\n") -> str:
    """A prompt as a user writes it: an image token, with what belongs around it, for each image, and the text.

    `between` follows each image, as in most chat templates; with an empty one, placeholders of neighbours can touch.
    """
    image = _AS_WRITTEN.get(type(processor).__name__, "{}").format(processor.image_token)
    return (image + between) * num_images + " " + text


def pictures(sizes: Iterable[tuple[int, int]] = PICTURE_SIZES, seed: int = 0) -> list[Image.Image]:
    """Pictures of the given (height, width) in pixels: noise at several scales, so that no two patches look alike."""
    generator = np.random.default_rng(seed)
    return [_picture(height, width, generator) for height, width in sizes]


def words_only(processor: Any) -> dict[str, list[int]]:
    """Arguments of `generate` that keep a random model from writing placeholders and other special tokens."""
    return {"suppress_tokens": sorted(processor.tokenizer.get_added_vocab().values())}


def make_tokenizer(named: Mapping[str, str], more: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few hundred tokens, in which each of `WORDS` is one token and any text comes back.

    `named` are special tokens that processors read as attributes (`image_token`, and with it `image_token_id`); `more`
    are special tokens that they know by their text.
    """
    special = list(dict.fromkeys([*_BASIC.values(), *named.values(), *more]))
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in ["ĊĊ", *(f"Ġ{word}" for word in WORDS)]:
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary:
                vocabulary.append(word[: end + 1])
                merges.append((word[:end], word[end]))
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **_BASIC,
        additional_special_tokens=list(more),
        model_specific_special_tokens=dict(named),
        model_max_length=4096,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


_BASIC = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

#: Processors whose users put more than the image token.
_AS_WRITTEN = {
    "Qwen2VLProcessor": "<|vision_start|>{}<|vision_end|>",
    "Qwen2_5_VLProcessor": "<|vision_start|>{}<|vision_end|>",
    "Qwen3VLProcessor": "<|vision_start|>{}<|vision_end|>",
    "Glm4vProcessor": "<|begin_of_image|>{}<|end_of_image|>",
    "Glm46VProcessor": "<|begin_of_image|>{}<|end_of_image|>",
    "PaddleOCRVLProcessor": "<|IMAGE_START|>{}<|IMAGE_END|>",
    "Ernie4_5_VLMoeProcessor": "<|IMAGE_START|>{}<|IMAGE_END|>",
    "GotOcr2Processor": "<img>{}</img>",
}


def _picture(height: int, width: int, generator: np.random.Generator) -> Image.Image:
    total = np.zeros((height, width, 3))
    for cell in (1, 3, 8):
        coarse = generator.integers(0, 256, (-(-height // cell), -(-width // cell), 3), dtype=np.uint8)
        total += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    low, high = total.min(), total.max()
    return Image.fromarray(((total - low) * (255 / (high - low))).astype(np.uint8))


@torch.no_grad()
def _draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Weights of a size that lets every layer matter, which the stock initialisation's are not at this width."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {id(module.weight): module for module in model.modules() if hasattr(module, "weight")}
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        module = matrices.get(id(parameter))
        if parameter.ndim < 2:  # norms, biases and gates: near what they are, so that no norm's weight is zero
            parameter.add_(noise, alpha=0.1)
        elif isinstance(module, torch.nn.Embedding):
            parameter.copy_(noise * 0.3)
        elif isinstance(module, torch.nn.modules.conv._ConvNd):  # patches should weigh more than their positions
            parameter.copy_(noise * (2 * parameter[0].numel() ** -0.5))
        elif name.endswith("in_proj_weight"):  # else the queries of a resampler all see the same, the mean
            parameter.copy_(noise * (3 * parameter.shape[-1] ** -0.5))
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)


#: What the config of a language model or of a vision tower is given where it has the field.
_TEXT = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_VISION = {
    "hidden_size": VISION_WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "head_dim": 16,
    "image_size": TILE,
    "patch_size": PATCH,
    "out_hidden_size": TEXT_WIDTH,
    "initializer_range": 0.2,
}
_USUAL = {"text_config": _TEXT, "vision_config": _VISION}


def _filled(config_class: type, usual: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    """A config with those of the usual values that it has a field for, and its own."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{**{name: value for name, value in usual.items() if name in fields}, **own})


@lru_cache
def _default_config(model_type: str) -> Any:
    return CONFIG_MAPPING[model_type]()


def _config(model_type: str, make_processor: Callable[[], Any], ids: Mapping[str, str | list[str]], **own: Any) -> Any:
    """A config whose parts (`own` values that are dictionaries for a part of the config) are filled in."""
    default, tokenizer, own = _default_config(model_type), make_processor().tokenizer, deepcopy(own)
    tokens = {
        **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), len(tokenizer)),
        **{name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        "vocabulary_map": tokenizer.get_vocab(),
    }
    for name, part_class in default.sub_configs.items():
        part = getattr(default, name, None)
        if part is not None or name in own:
            usual = {**_USUAL.get(name, {}), **(tokens if name == "text_config" else {})}
            own[name] = _filled(part_class if part is None else type(part), usual, own.get(name, {}))
    own.update({name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()})
    usual = tokens if "text_config" in default.sub_configs else {**_TEXT, **tokens}
    return _filled(type(default), usual, own)


def _processor(
    model_type: str,
    named: Mapping[str, str],
    more: Iterable[str],
    images: Mapping[str, Any],
    videos: Mapping[str, Any],
    borrows: str,
    **own: Any,
) -> Any:
    """The processor class that Transformers' Auto classes name for a family, of the parts that they name."""
    processor_class, lender = PROCESSOR_MAPPING[type(_default_config(model_type))], type(_default_config(borrows))
    module = sys.modules[processor_class.__module__]
    if vars(module).get("num2words", str) is None:  # a package that only videos' texts need, and every call insists on
        module.num2words = str
    images, videos = deepcopy((images, videos))
    makers = {
        "tokenizer": lambda: make_tokenizer(named, more),
        "image_processor": lambda: IMAGE_PROCESSOR_MAPPING[lender]["torchvision"](**images),
        "video_processor": lambda: VIDEO_PROCESSOR_MAPPING[lender]["torchvision"](**videos),
        "feature_extractor": lambda: FEATURE_EXTRACTOR_MAPPING[lender](),
    }
    return processor_class(**{part: makers[part]() for part in processor_class.get_attributes()}, **own)


def _family(
    model_type: str,
    named: Mapping[str, str],
    *,
    more: Iterable[str] = (),
    ids: Mapping[str, str | list[str]] | None = None,
    images: Mapping[str, Any] | None = None,
    videos: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    borrows: str | None = None,
    traits: Mapping[str, Any] | None = None,
    **config: Any,
) -> TinyFamily:
    """A line of the table.

    Args:
        named: special tokens by the tokenizer's attribute for them
        more: special tokens without one
        ids: fields of the config that hold ids of tokens, with the tokens; a named image token's is there anyway
        images, videos, processor: arguments of the image processor, of the video processor (as `images` where there
            are none) and of the processor
        borrows: the family whose image and video processor this one has, where the Auto classes don't say
        traits: of `TinyFamily`, where they aren't the usual ones
        config: fields of the config, and of its parts as dictionaries
    """
    images = images or {}
    make_processor = partial(
        _processor,
        model_type,
        named,
        tuple(more),
        images,
        images if videos is None else videos,
        borrows or model_type,
        **(processor or {}),
    )
    image_ids = {"image_token_id": named["image_token"]} if "image_token" in named else {}
    make_config = partial(_config, model_type, make_processor, {**image_ids, **(ids or {})}, **config)
    return TinyFamily(model_type, make_config, make_processor, **(traits or {}))


_SQUARE = {"height": TILE, "width": TILE}
_IMAGE = {"image_token": "<image>"}
_VIDEO = {"video_token": "<video>"}
_NESTED = {"layouts": ("nested",)}
_GRID = range(1, 7)  # the rows and columns of tiles that Idefics 3 has tokens for


def _ids(named: Mapping[str, str], *names: str) -> dict[str, str]:
    return {f"{name}_id": named[name] for name in names}


def _pixels(least: int, most: int, side: int = 2 * PATCH) -> dict[str, int]:
    """Sizes between so many and so many visual tokens, each of which stands for a square of `side` pixels."""
    return {"shortest_edge": least * side**2, "longest_edge": most * side**2}


def _mrope(*section: int, **more: Any) -> dict[str, Any]:
    """Rotary positions in time, height and width, of which each has so many frequencies."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **more}}


# LLaVA and its descendants: 16 visual tokens a tile, which nothing merges.
_SIDE = 4 * PATCH
_SMALL = {"height": _SIDE, "width": _SIDE}
_PINPOINTS = [[rows * _SIDE, columns * _SIDE] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
_CLIP = {"size": {"shortest_edge": _SIDE}, "crop_size": _SMALL}
_LLAVA = {
    "images": _CLIP,
    "processor": {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    "vision_config": {"image_size": _SIDE},
}
_LLAVA_NEXT = {
    **_LLAVA,
    "images": {**_CLIP, "image_grid_pinpoints": _PINPOINTS},
    "image_grid_pinpoints": _PINPOINTS,
}

# Images of free size. A visual token stands for 2 × 2 patches.
_QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_FREE_SIZE = {"size": _pixels(4, 40), "patch_size": PATCH, "merge_size": 2}
_QWEN_VL = {"ids": _ids(_QWEN, *_QWEN), "images": _FREE_SIZE}
_DEEPSTACK = {"num_position_embeddings": 36, "deepstack_visual_indexes": [0]}
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_QWEN_3_5 = {
    **_QWEN_VL,
    "text_config": {**_LINEAR_AND_FULL, **_mrope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.5)},
    "vision_config": {"num_position_embeddings": 36},
}
_EXPERTS = {"num_experts": 4}
_GLM = {
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "image_start_token": "<|begin_of_image|>",
    "image_end_token": "<|end_of_image|>",
    "video_start_token": "<|begin_of_video|>",
    "video_end_token": "<|end_of_video|>",
}
_GLM_V = {
    "ids": _ids(_GLM, *_GLM),
    # Pixels are counted in the two frames that an image is repeated to.
    "images": {**_FREE_SIZE, "size": _pixels(8, 80)},
    "text_config": _mrope(2, 1, 1, partial_rotary_factor=0.5),
}

_SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
_TILES = {"size": _SQUARE, "crop_to_patches": True, "max_patches": 4}
_IDEFICS_3 = {
    "images": {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}},
    "processor": {"image_seq_len": 9},
    "more": [
        "<fake_token_around_image>",
        "<global-img>",
        "<end_of_utterance>",
        *(f"<row_{row}_col_{column}>" for row in _GRID for column in _GRID),
    ],
}
_INTERN = {
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    **_VIDEO,
}
_GEMMA_3 = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
_GEMMA_4 = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}
_PIXTRAL = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
_COHERE = {
    "image_token": "<|IMG_PATCH|>",
    "boi_token": "<|START_OF_IMG|>",
    "eoi_token": "<|END_OF_IMG|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
}
_OVIS = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
_LFM = {
    "image_token": "<image>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail_token": "<|img_thumbnail|>",
}
_MINICPM = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
_PADDLE = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|IMAGE_START|>",
    "vision_end_token": "<|IMAGE_END|>",
}
_AYA = {
    "start_of_img_token": "<|START_OF_IMG|>",
    "end_of_img_token": "<|END_OF_IMG|>",
    "img_patch_token": "<|IMG_PATCH|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
}
_LIGHT_ON = {
    "image_token": "<|image_pad|>",
    "image_break_token": "<|vision_pad|>",
    "image_end_token": "<|vision_end|>",
}
_ERNIE = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}
# A code's number in letters, between the marks that the model finds codes by.
_CHAMELEON_CODES = [f"IMGIMG{str(code).translate(str.maketrans('0123456789', 'ABCDEFGHIJ'))}Z" for code in range(32)]
_LLAMA_4 = [
    "<|image|>",
    "<|patch|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
]
_ARIA_SIDE, _ARIA_QUERIES = 490, 8  # the smaller of the two sides that the image processor accepts

_FAMILIES = [
    _family("llava", _IMAGE, **_LLAVA, image_seq_length=16),
    _family("llava_next", _IMAGE, **_LLAVA_NEXT),
    _family(
        "llava_onevision",
        {**_IMAGE, **_VIDEO},
        ids={"video_token_id": "<video>"},
        images={"size": _SMALL, "image_grid_pinpoints": _PINPOINTS},
        videos={"size": _SMALL},
        processor={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        vision_config={"image_size": _SIDE, "vision_use_head": False},
        image_grid_pinpoints=_PINPOINTS,
    ),
    _family("vipllava", _IMAGE, **_LLAVA, vision_feature_layers=[-1, -2], image_seq_length=16),
    _family(
        "internvl",
        _INTERN,
        ids={"image_token_id": "<IMG_CONTEXT>"},
        images=_TILES,
        videos={"size": _SQUARE},
        processor={"image_seq_length": 9},
        image_seq_length=9,
        vision_config={"image_size": [TILE, TILE], "patch_size": [PATCH, PATCH]},
    ),
    _family(
        "qwen2_vl",
        _QWEN,
        **_QWEN_VL,
        text_config=_mrope(4, 2, 2),
        vision_config={"embed_dim": VISION_WIDTH, "hidden_size": TEXT_WIDTH},
    ),
    _family(
        "qwen2_5_vl",
        _QWEN,
        **_QWEN_VL,
        text_config=_mrope(4, 2, 2),
        vision_config={"window_size": 4 * PATCH, "fullatt_block_indexes": [1]},
    ),
    _family(
        "qwen3_vl",
        _QWEN,
        **_QWEN_VL,
        text_config=_mrope(4, 2, 2, mrope_interleaved=True),
        vision_config=_DEEPSTACK,
    ),
    _family(
        "qwen3_vl_moe",
        _QWEN,
        **_QWEN_VL,
        borrows="qwen3_vl",
        text_config={**_EXPERTS, **_mrope(4, 2, 2, mrope_interleaved=True)},
        vision_config=_DEEPSTACK,
    ),
    _family("qwen3_5", _QWEN, **_QWEN_3_5),
    _family("qwen3_5_moe", _QWEN, **{**_QWEN_3_5, "text_config": {**_EXPERTS, **_QWEN_3_5["text_config"]}}),
    _family(
        "gemma3",
        _GEMMA_3,
        ids=_ids(_GEMMA_3, "boi_token", "eoi_token"),
        traits=_NESTED,
        images={"size": _SQUARE},
        processor={"image_seq_length": 9},
        mm_tokens_per_image=9,
        text_config={**_SLIDING_AND_FULL, "query_pre_attn_scalar": 16},
        vision_config={"vision_use_head": False},
    ),
    _family(
        "gemma4",
        _GEMMA_4,
        more=["<|video|>"],
        ids={
            **_ids(_GEMMA_4, "boi_token", "eoi_token", "audio_token", "boa_token"),
            "eoa_token_index": "<audio|>",
            "video_token_id": "<|video|>",
        },
        traits=_NESTED,
        # Pictures are scaled to as many tokens as fit into the least that the image processor accepts.
        images={"patch_size": PATCH, "max_soft_tokens": 70},
        processor={"image_seq_length": 70},
        text_config={**_SLIDING_AND_FULL, "hidden_size_per_layer_input": 8, "global_head_dim": 32},
        vision_config={"position_embedding_size": 256},
    ),
    _family(
        "paligemma",
        _IMAGE,
        traits={"text_only": False},
        images={"size": _SMALL, "image_seq_length": 16},
        projection_dim=TEXT_WIDTH,
        hidden_size=TEXT_WIDTH,
        vision_config={"image_size": _SIDE, "projection_dim": TEXT_WIDTH, "vision_use_head": False},
    ),
    _family(
        "mistral3",
        _PIXTRAL,
        images={"size": {"longest_edge": 2 * TILE}, "patch_size": 2 * PATCH},
        processor={"patch_size": PATCH, "spatial_merge_size": 2},
        vision_config={"image_size": 2 * TILE},
    ),
    _family("idefics3", {}, ids={"image_token_id": "<image>"}, **_IDEFICS_3),
    _family("smolvlm", _IMAGE, **_IDEFICS_3, traits=_NESTED),
    _family(
        "aria",
        _IMAGE,
        images={"max_image_size": _ARIA_SIDE, "split_image": True},
        processor={"size_conversion": {_ARIA_SIDE: _ARIA_QUERIES}},
        traits={"call": {"max_image_size": _ARIA_SIDE, "split_image": True}},
        projector_patch_to_query_dict={49: _ARIA_QUERIES},
        text_config={"moe_num_experts": 4, "intermediate_size": 32},
        vision_config={"image_size": _ARIA_SIDE, "patch_size": 70},
    ),
    _family(
        "cohere2_vision",
        _COHERE,
        # The processor takes the square of the image processor's patch for the number of a tile's tokens.
        images={"size": {"height": 32, "width": 32}, "max_patches": 4, "patch_size": 4},
        alignment_intermediate_size=64,
        text_config=_SLIDING_AND_FULL,
        vision_config={"image_size": 32, "vision_use_head": False},
    ),
    _family(
        "ovis2",
        {},
        more=["<image>", "<IMG_ATOM>", *_OVIS],
        ids={"image_token_id": "<IMG_ATOM>", "visual_indicator_token_ids": _OVIS},
        images=_TILES,
        processor={"image_seq_length": 9},
        hidden_size=TEXT_WIDTH,
        vision_config={"vocab_size": 64, "hidden_stride": 2},
    ),
    _family(
        "lfm2_vl",
        _LFM,
        more=[f"<|img_row_{row}_col_{column}|>" for row in _GRID for column in _GRID],
        traits=_NESTED,
        images={
            "encoder_patch_size": PATCH,
            "tile_size": TILE,
            "min_image_tokens": 4,
            "max_image_tokens": 16,
            "max_tiles": 4,
        },
        projector_hidden_size=64,
        text_config={"layer_types": ["conv", "full_attention"]},
        vision_config={"num_patches": 36, "vision_use_head": False},
    ),
    _family("glm4v", _GLM, **_GLM_V),
    _family("glm46v", _GLM, **_GLM_V),
    _family(
        "minicpmv4_6",
        _MINICPM,
        ids={"video_token_id": "<|video_pad|>"},
        images={"patch_size": PATCH, "scale_resolution": 2 * TILE, "max_slice_nums": 4},
        text_config={**_LINEAR_AND_FULL, **_mrope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.5)},
        insert_layer_id=0,
        image_size=2 * TILE,
        vision_config={"image_size": 2 * TILE},
    ),
    _family(
        "paddleocr_vl",
        _PADDLE,
        ids=_ids(_PADDLE, "video_token", "vision_start_token", "vision_end_token"),
        images=_FREE_SIZE,
        text_config=_mrope(4, 2, 2),
    ),
    _family(
        "video_llama_3",
        {**_IMAGE, **_VIDEO},
        ids={"video_token_id": "<video>"},
        # Nothing is merged in an image, so that its patches are larger.
        images={"size": _pixels(4, 40), "patch_size": 2 * PATCH},
        vision_config={"patch_size": 2 * PATCH},
    ),
    _family(
        "idefics2",
        {**_IMAGE, "image_boundary_token": "<fake_token_around_image>"},
        more=["<end_of_utterance>"],
        images={"size": {"shortest_edge": TILE, "longest_edge": 2 * TILE}, "do_image_splitting": True},
        processor={"image_seq_len": 8},
        vision_config={"image_size": 2 * TILE},
        perceiver_config={
            "hidden_size": TEXT_WIDTH,
            "resampler_n_latents": 8,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        },
    ),
    _family(
        "got_ocr2",
        {},
        more=["<imgpad>", "<img>", "</img>", "<|im_start|>", "<|im_end|>"],
        ids={"image_token_id": "<imgpad>"},
        images={"size": {"height": 64, "width": 64}},
        traits={
            "layouts": ("flat",),
            "text_only": False,
            "call": {"num_image_tokens": 16, "crop_to_patches": True, "max_patches": 4},
        },
        image_seq_length=16,
        vision_config={
            "image_size": 64,
            "output_channels": 16,
            "mlp_dim": 64,
            "window_size": 4,
            "global_attn_indexes": [1],
        },
    ),
    _family(
        "aya_vision",
        {},
        more=[*_AYA.values(), "<image>", "TILE_GLOBAL", *(f"TILE_{index}" for index in range(1, 13)), "TILE"],
        ids={"image_token_id": "<|IMG_PATCH|>"},
        images=_TILES,
        processor={"patch_size": PATCH, "img_size": TILE, "downsample_factor": 2},
        text_config=_SLIDING_AND_FULL,
        vision_config={"vision_use_head": False},
    ),
    _family(
        "lighton_ocr",
        _LIGHT_ON,
        images={"size": {"longest_edge": 2 * TILE}, "patch_size": 2 * PATCH},
        processor={"patch_size": PATCH, "spatial_merge_size": 2},
        vision_config={"image_size": 2 * TILE},
    ),
    _family(
        "llava_next_video",
        {**_IMAGE, **_VIDEO},
        ids={"video_token_id": "<video>"},
        **_LLAVA_NEXT,
        videos=_CLIP,
    ),
    _family(
        "ernie4_5_vl_moe",
        _ERNIE,
        ids=_ids(_ERNIE, *_ERNIE),
        images=_FREE_SIZE,
        videos={**_FREE_SIZE, "draw_on_frames": False},  # which takes a font that isn't there
        text_config={"moe_intermediate_size": [32, 32], "moe_num_experts": 4, "moe_k": 2, **_mrope(3, 3, 2)},
    ),
    _family(
        "glm4v_moe",
        _GLM,
        **{**_GLM_V, "text_config": {**_GLM_V["text_config"], "n_routed_experts": 4}},
        borrows="glm4v",
    ),
    _family(
        "deepseek_vl",
        _IMAGE,
        images={"size": _SMALL},
        processor={"num_image_tokens": 16},
        vision_config={"image_size": _SIDE, "vision_use_head": False},
    ),
    _family(
        "janus",
        {**_IMAGE, "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"},
        images={"size": _SMALL},
        processor={"num_image_tokens": 16},
        vision_config={"image_size": _SIDE, "projection_dim": TEXT_WIDTH, "num_image_tokens": 16},
        vq_config={
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_embeddings": 16,
            "latent_channels": 32,
            "num_patches": 4,
            "projection_dim": TEXT_WIDTH,
            "image_token_embed_dim": TEXT_WIDTH,
        },
    ),
    _family(
        "chameleon",
        {**_IMAGE, "sep_token": "<reserved08706>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"},
        more=_CHAMELEON_CODES,
        images={"size": {"shortest_edge": _SIDE}, "crop_size": _SMALL},
        processor={"image_seq_length": 16},
        vq_config={
            "embed_dim": 16,
            "num_embeddings": len(_CHAMELEON_CODES),
            "latent_channels": 16,
            "resolution": _SIDE,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
        },
    ),
    _family(
        "llama4",
        {},
        more=_LLAMA_4,
        traits={"stock_failure": "5.24 reads image_outputs of the language model's outputs, which have none"},
        ids={"image_token_id": "<|patch|>", "boi_token_id": "<|image_start|>", "eoi_token_id": "<|image_end|>"},
        images={"size": _SQUARE, "max_patches": 4},
        processor={"patch_size": PATCH},
        text_config={
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "moe_layers": [1],
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 512,
        },
        vision_config={
            "intermediate_size": 128,  # the width of a patch after 2 × 2 were shuffled into one
            "vision_output_dim": TEXT_WIDTH,
            "projector_input_dim": TEXT_WIDTH,
            "projector_output_dim": TEXT_WIDTH,
        },
    ),
]

FAMILIES: dict[str, TinyFamily] = {family.model_type: family for family in _FAMILIES}
