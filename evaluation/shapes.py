"""Published models as configurations without weights, by name: what `foveate flops --shape` counts.

The numbers are those of the `config.json` of llava-hf's checkpoints on the hub (llava-1.5-7b-hf, llava-1.5-13b-hf,
llava-v1.6-vicuna-7b-hf, llava-v1.6-vicuna-13b-hf, llava-v1.6-mistral-7b-hf), of Qwen/Qwen3-VL-2B-Instruct, and of
openai/clip-vit-large-patch14-336.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CLIPTextConfig, LlavaConfig, LlavaNextConfig, Qwen3VLConfig

from foveate.errors import FoveateError, bad_input
from foveate.registry import METHODS, Pair, pairs_of


_CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_QUESTION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
_7B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_13B = {**_7B, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
_MISTRAL = {**_7B, "model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8}
_TILES: dict[str, Any] = {
    "dtype": torch.float16,
    "vision_config": _CLIP,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
_QWEN_2B: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "tie_word_embeddings": True,
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [5, 11, 17],
    },
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
    },
}

#: Config class of the stock model, and what it is made of.
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llava-1.5-7b": (LlavaConfig, {"dtype": torch.float16, "vision_config": _CLIP, "text_config": _7B}),
    "llava-1.5-13b": (LlavaConfig, {"dtype": torch.float16, "vision_config": _CLIP, "text_config": _13B}),
    "llava-next-vicuna-7b": (LlavaNextConfig, {**_TILES, "text_config": _7B}),
    "llava-next-vicuna-13b": (LlavaNextConfig, {**_TILES, "text_config": _13B}),
    "llava-next-mistral-7b": (LlavaNextConfig, {**_TILES, "text_config": _MISTRAL}),
    "qwen3-vl-2b": (Qwen3VLConfig, _QWEN_2B),
}


def config_of_shape(name: str, method: str | None = None, settings: Mapping[str, Any] | None = None) -> Any:
    """A config in the checkpoints' own dtype: float16, of Qwen's bfloat16.

    Args:
        name: in `SHAPES`.
        method: in `foveate.registry.METHODS`; `None`: the stock model.
        settings: fields of the `compression` block.

    Raises:
        FoveateError: an unknown shape or method, a method that doesn't have this backbone, settings without a method,
            a setting that doesn't exist or is out of range.
    """
    if name not in SHAPES:
        raise FoveateError(f"There is no shape '{name}': choose one of {', '.join(SHAPES)}.")
    config_class, published = SHAPES[name]
    fields = copy.deepcopy(published)  # configs change what they are made of
    if method is None:
        if settings:
            raise FoveateError(
                f"{name} doesn't compress, so there is no {', '.join(settings)} to set: name a --method."
            )
        return config_class(**fields)
    pair = _pair(name, config_class, method)
    if pair.method.reads_question:
        fields["question_config"] = CLIPTextConfig(**_QUESTION)
    with bad_input():
        return pair.config_class(**fields, compression={"method": method, **(settings or {})})


def _pair(name: str, config_class: Any, method: str) -> Pair:
    if method not in METHODS:
        raise FoveateError(f"There is no method '{method}': choose one of {', '.join(METHODS)}.")
    pairs = {pair.base_model_type: pair for pair in pairs_of(method)}
    if config_class.model_type not in pairs:
        raise FoveateError(
            f"{name} is a '{config_class.model_type}' model: the method '{method}' compresses {', '.join(pairs)}."
        )
    return pairs[config_class.model_type]
