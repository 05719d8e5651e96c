"""Published models as configurations without weights, by name: what `foveate flops --shape` counts.

The numbers are those of the `config.json` of llava-hf's checkpoints on the hub (llava-1.5-7b-hf, llava-1.5-13b-hf,
llava-v1.6-vicuna-7b-hf, llava-v1.6-vicuna-13b-hf, llava-v1.6-mistral-7b-hf), of Qwen/Qwen3-VL-2B-Instruct, and of
openai/clip-vit-large-patch14-336.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MistralConfig,
    Qwen3VLConfig,
)

from foveate.errors import FoveateError, bad_input
from foveate.registry import METHODS, Pair, pairs_of


_VISION: dict[str, Any] = {
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
_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
_MISTRAL = {**_7B, "intermediate_size": 14336, "num_key_value_heads": 8}
_VOCABULARY = 32064
_QWEN_VISION: dict[str, Any] = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "out_hidden_size": 2048,
    "deepstack_visual_indexes": [5, 11, 17],
}
_QWEN_2B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

#: Config classes of model and language model, and the language model's numbers.
SHAPES: dict[str, tuple[type, Any, dict[str, int]]] = {
    "llava-1.5-7b": (LlavaConfig, LlamaConfig, _7B),
    "llava-1.5-13b": (LlavaConfig, LlamaConfig, _13B),
    "llava-next-vicuna-7b": (LlavaNextConfig, LlamaConfig, _7B),
    "llava-next-vicuna-13b": (LlavaNextConfig, LlamaConfig, _13B),
    "llava-next-mistral-7b": (LlavaNextConfig, MistralConfig, _MISTRAL),
    "qwen3-vl-2b": (Qwen3VLConfig, Qwen3VLConfig.sub_configs["text_config"], _QWEN_2B),
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
    config_class, text_class, text = SHAPES[name]
    fields: dict[str, Any] = {"dtype": torch.float16}
    if config_class is Qwen3VLConfig:
        # Dictionaries: 4.57 takes no configs.
        fields = {"dtype": torch.bfloat16, "vision_config": _QWEN_VISION, "text_config": dict(text)}
        fields["tie_word_embeddings"] = True
    else:
        fields["vision_config"] = CLIPVisionConfig(**_VISION)
        fields["text_config"] = text_class(vocab_size=_VOCABULARY, **text)
    if issubclass(config_class, LlavaNextConfig):
        fields["image_grid_pinpoints"] = _PINPOINTS
    if method is None:
        if settings:
            raise FoveateError(
                f"{name} doesn't compress, so there is no {', '.join(settings)} to set: name a --method."
            )
        return config_class(**fields)
    backbone = _backbone(name, config_class, method)
    if "question_config" in backbone.config_class.sub_configs:  # type: ignore[attr-defined]
        fields["question_config"] = CLIPTextConfig(**_QUESTION)
    with bad_input():
        return backbone.config_class(**fields, compression={"method": method, **(settings or {})})


def _backbone(name: str, config_class: Any, method: str) -> Pair:
    if method not in METHODS:
        raise FoveateError(f"There is no method '{method}': choose one of {', '.join(METHODS)}.")
    backbones = {backbone.base_model_type: backbone for backbone in pairs_of(method)}
    if config_class.model_type not in backbones:
        raise FoveateError(
            f"{name} is a '{config_class.model_type}' model: the method '{method}' compresses {', '.join(backbones)}."
        )
    return backbones[config_class.model_type]
