"""Everything that depends on the version of Transformers, and nothing else.

Supported are 4.57.6 and 5.16 up to the newest. Each piece says which versions it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward
from transformers.utils.import_utils import is_mamba_ssm_available


try:  # ≥ 5.0: checkpoint keys are renamed by a table, which custom classes have to join
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import WeightRenaming
except ImportError:  # 4.57: by the class attribute `_checkpoint_conversion_mapping`
    register_checkpoint_conversion_mapping = None

#: 4.57 has a class of its own, ≥ 5.0 dropped it.
AutoModelForVision2Seq = getattr(transformers, "AutoModelForVision2Seq", transformers.AutoModelForImageTextToText)

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5


def register_key_mapping(model_class: type, generation_class: type, base_model_type: str, own_keys: tuple[str, ...]):
    """Lets a custom class read and write the published names of its base model's weights.

    The base's weights are on disk as the hub has them (`language_model.model.…`, `vision_tower.vision_model.…`), the
    method's own (`own_keys`: first parts of their names) beside them at top level.
    """
    if register_checkpoint_conversion_mapping is None:  # 4.57
        generation_class._checkpoint_conversion_mapping = {
            **generation_class._checkpoint_conversion_mapping,
            **{f"^{key}": f"model.{key}" for key in own_keys},
        }
        return
    model_type = generation_class.config_class.model_type
    renamings = get_checkpoint_conversion_mapping(base_model_type)
    # The stock table leaves it to the order of events whether `vision_model.` is written; published names have it.
    renamings = [renaming for renaming in renamings if renaming.source_patterns != ["^vision_tower"]]
    renamings += [WeightRenaming(r"^vision_tower\.vision_model", "model.vision_tower")]
    renamings += [WeightRenaming(source_patterns=f"^{key}", target_patterns=f"model.{key}") for key in own_keys]
    register_checkpoint_conversion_mapping(model_type, renamings, overwrite=True)
    base_class_name = next(
        c.__name__ for c in model_class.__mro__ if c is not model_class and c.__name__.endswith("Model")
    )
    class_renamings = get_checkpoint_conversion_mapping(base_class_name)
    if class_renamings is not None:
        register_checkpoint_conversion_mapping(model_class.__name__, class_renamings, overwrite=True)


def clip_embeddings(vision_tower: nn.Module, *images: Any) -> torch.Tensor:
    """Input of the first layer of a `CLIPVisionModel`, (images, patches + 1, width), of what its embeddings take."""
    tower = getattr(vision_tower, "vision_model", vision_tower)  # 4.57 keeps it one level down
    return tower.pre_layrnorm(tower.embeddings(*images))


def clip_layers(vision_tower: nn.Module) -> nn.ModuleList:
    """Encoder layers of a `CLIPVisionModel`."""
    return getattr(vision_tower, "vision_model", vision_tower).encoder.layers


def replace_clip_embeddings(vision_tower: nn.Module, make: Callable[[Any], nn.Module]) -> None:
    """Gives a `CLIPVisionModel` other embeddings, with parameters of the same names."""
    tower = getattr(vision_tower, "vision_model", vision_tower)  # 4.57 keeps it one level down
    tower.embeddings = make(tower.embeddings.config)


def padding_mask(vision_tower: nn.Module, present: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What tells the kernel of a `CLIPVisionModel` which tokens, (images, tokens) bool, are not padding: FlashAttention
    takes them as they are, the others what is added to the scores. One row for all queries, which broadcasts."""
    if "flash" in vision_tower.config._attn_implementation:
        return present
    mask = torch.zeros(present.shape, dtype=dtype, device=present.device)
    return mask.masked_fill(~present, torch.finfo(dtype).min)[:, None, None]


def run_clip_layer(layer: nn.Module, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """One encoder layer of CLIP on (batch, tokens, width), all tokens attending to all that `padding_mask` leaves."""
    if TRANSFORMERS_5:
        return layer(hidden_states, mask)
    return layer(hidden_states, mask, None)[0]  # 4.57: also a causal mask; a tuple comes back


def run_attention(
    attention: nn.Module,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel that a `CLIPAttention` is set to, on (batch, heads, tokens, head width), all queries attending to all
    keys that `padding_mask` leaves; (batch, queries, width). In 4.57 `ALL_ATTENTION_FUNCTIONS` doesn't know the eager
    one."""
    implementation = attention.config._attn_implementation
    kernel = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    mixed, _ = kernel(
        attention, queries, keys, values, mask, scaling=attention.scale, dropout=0.0, is_causal=attention.is_causal
    )
    return mixed.flatten(2)


def image_features_output(tokens_per_image: list[torch.Tensor]):
    """What `get_image_features` returns: a list of (tokens, width) in 4.57, an output object around it in ≥ 5.0."""
    if not TRANSFORMERS_5:
        return tokens_per_image
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=tokens_per_image)


def stock_image_sequences(stock_class: type, model: nn.Module, **images) -> list[torch.Tensor]:
    """The visual tokens that a stock class gives a model of each image, (tokens, width): the other way round."""
    features = stock_class.get_image_features(model, **images)
    return list(getattr(features, "pooler_output", features))


def stock_deepstack_features(
    stock_class: type, model: nn.Module, **images
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The visual tokens that a stock Qwen3-VL gives a model of each image, (tokens, width), and for each of the first
    layers what is added there, (tokens of all images, width). 4.57 returns a tuple; the newest 5.x split the latter by
    images too."""
    features = stock_class.get_image_features(model, **images)
    if isinstance(features, tuple):
        return list(features[0]), list(features[1])
    layers = features.deepstack_features
    return list(features.pooler_output), [x if torch.is_tensor(x) else torch.cat(list(x)) for x in layers]


def checkpoints_activations(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on; the newest 5.x give it another name."""
    name = "is_activation_checkpointing"
    return getattr(model, name if hasattr(type(model), name) else "is_gradient_checkpointing")


def remove_from_cache(cache: Cache, count: int) -> None:
    """Removes the last `count` entries of every layer of a cache."""
    cache.crop(-count)  # a negative number means "remove" in 4.57 and ≥ 5.0 alike


def fused_selective_scan() -> Callable[..., torch.Tensor] | None:
    """The kernel of `mamba_ssm`, where it is installed, as Transformers' Mamba calls it; it takes x and Δ (batch,
    channels, positions), A, and B and C (batch, states, positions). ≥ 5.0 gives it another name."""
    if not is_mamba_ssm_available():
        return None
    from transformers.models.mamba import modeling_mamba

    name = "mamba_selective_scan" if TRANSFORMERS_5 else "selective_scan_fn"
    return getattr(modeling_mamba, name)


def cache_positions(past: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What the language model has to be told of the cache. 4.57 else counts the keys that are not zero, of which a
    static cache with padding has too few; ≥ 5.0 keeps count itself and takes no such argument."""
    return {} if TRANSFORMERS_5 else {"cache_position": torch.arange(past, past + length, device=device)}


def write_to_cache(
    cache: Cache, keys: torch.Tensor, values: torch.Tensor, layer: int, past: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Appends entries, (batch, heads, new, head width), to a layer that holds `past` of them; returns what the layer
    gives to attend to. In 4.57 a static cache has to be told where they go."""
    positions = cache_positions(past, keys.shape[2], keys.device)
    return cache.update(keys, values, layer, *([positions] if positions else []))


def length_after_crop(length: int, argument: int) -> int:
    """What `Cache.crop(argument)` leaves of `length` entries: a negative number says how many to remove; 0 or more is
    how many to keep in 4.57, while ≥ 5.0 knows only 0, for none to remove."""
    if argument < 0 or TRANSFORMERS_5:
        return max(0, length - abs(argument))
    return min(length, argument)


def iterate_cache_tensors(cache: Cache) -> Iterator[torch.Tensor]:
    """The key and value tensors that a cache holds, layer by layer."""
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            if tensor is not None:
                yield tensor
