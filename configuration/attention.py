"""Which kinds of attention a language model has, for methods that can't run on all of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def attention_kinds(text_config: Any) -> list[str]:
    """The kinds of a language model's layers, by the names that Transformers has for them, each once.

    Args:
        text_config: the language model's config. Where it doesn't list its layers, they are what a cache takes them
            for.
    """
    if getattr(text_config, "cross_attention_layers", None):
        return ["cross_attention"]
    if not hasattr(text_config, "num_attention_heads"):
        return ["recurrent"]
    # Hybrids of before 5.0 have a list of another name.
    layers = getattr(text_config, "layer_types", None) or getattr(text_config, "layers_block_type", None)
    window = getattr(text_config, "sliding_window", None)
    if layers:
        kinds = {FULL if kind == "attention" else kind for kind in layers}
    elif window is not None:
        kinds = {SLIDING}
    else:
        kinds = {FULL if getattr(text_config, "attention_chunk_size", None) is None else CHUNKED}
    longest = getattr(text_config, "max_position_embeddings", None)
    never_full = window is not None and longest is not None and window >= longest  # no prompt is as long
    if SLIDING in kinds and never_full:
        kinds = kinds - {SLIDING} | {FULL}
    return sorted(kinds)


def require_attention(method: str, text_config: Any, supported: Collection[str] = (FULL,)) -> None:
    """Raises `ValueError` where the language model has layers that the method can't run on."""
    unsupported = [kind for kind in attention_kinds(text_config) if kind not in supported]
    if not unsupported:
        return
    setting = "sliding_window" if unsupported[0] == SLIDING else "attention_chunk_size"
    size = getattr(text_config, setting, None) if unsupported[0] in (SLIDING, CHUNKED) else None
    because = f" (text_config.{setting} is {size})" if size is not None else ""
    raise ValueError(
        f"The method '{method}' supports language models with {' and '.join(supported)} only, but this one has "
        f"layers of {unsupported[0]}{because}: choose another method or another base."
    )
