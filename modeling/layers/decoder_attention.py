"""A few rows of the language model's attention, computed beside its fused kernel from the layer's own weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def attention_over(
    attention: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
) -> torch.Tensor:
    """Attention of chosen queries to chosen keys and to nothing else.

    Args:
        attention: a layer's attention as in Llama or Qwen3.
        hidden_states: (batch, columns, width), what it gets.
        position_embeddings: cosines and sines, (batch, columns, head width).
        rows: (images,), the row of each image.
        queries, keys: (images, queries) and (images, keys), columns in that row, −1 for padding.

    Returns:
        (images, queries, keys) float32, the softmax over an image's keys, the mean over heads; 0 where a key or a query
        is padding.
    """
    head_width, groups = attention.head_dim, attention.num_key_value_groups
    cosines, sines = (table.expand(len(hidden_states), -1, -1) for table in position_embeddings)

    def project(name: str, columns: torch.Tensor) -> torch.Tensor:
        index = rows[:, None], columns.clamp(min=0)
        states = getattr(attention, f"{name}_proj")(hidden_states[index])
        states = states.unflatten(-1, (-1, head_width))
        if (norm := getattr(attention, f"{name}_norm", None)) is not None:
            states = norm(states)
        states = states.transpose(1, 2)  # (images, heads, columns, head width)
        return apply_rotary_pos_emb(states, states, cosines[index], sines[index])[0]

    scores = project("q", queries) @ project("k", keys).repeat_interleave(groups, 1).transpose(-1, -2)
    scores = (scores.float() * attention.scaling).masked_fill((keys < 0)[:, None, None], float("-inf"))
    return scores.softmax(-1).mean(1) * (queries >= 0)[..., None]


@contextmanager
def watched_attention(layers: list[Any], watch: Callable[..., None]) -> Iterator[None]:
    """Calls `watch(attention, hidden_states, position_embeddings)` whenever the attention of one of these decoder
    layers is about to run."""

    def before(attention: Any, args: tuple, kwargs: dict) -> None:
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        watch(attention, hidden_states, kwargs["position_embeddings"])

    hooks = [layer.self_attn.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
