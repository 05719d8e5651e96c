"""The algorithm of QG-VTC (Li et al., "QG-VTC: Question-Guided Visual Token Compression in MLLMs for Efficient VQA"):
fewer and fewer patches run through CLIP's vision tower (paper, Figure 2).

At a compressing layer the question ranks the patches (Eq. 4), the best stay in their original order, and what the
others hold is recycled into them by attention (Eq. 5). Attention weights are computed at compressing layers alone,
there for the rows that are kept alone, and only where they are recycled; everything else runs on the fused kernel.

B: crops of images, h: heads, n: patches that enter the layer, k: patches that it keeps, m = n − k: patches that it
discards, d: width. A row or column of tokens has the class token in front: 1 + n, or 1 + k, of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from foveate.modeling.compatibility import clip_embeddings, clip_layers, run_attention, run_clip_layer
from foveate.modeling.layers.clip import (
    attention_rows,
    choose_tokens,
    class_correlation,
    split_heads,
    straight_through_gate,
)


def token_schedule(num_patches: int, num_visual_tokens: int, num_steps: int) -> list[int]:
    """Patches left after each of `num_steps` compressing layers: equal steps down to `num_visual_tokens` (Table 1)."""
    dropped = num_patches - num_visual_tokens
    return [num_patches - round(step * dropped / num_steps) for step in range(1, num_steps + 1)]


def question_correlation(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Correlation of the question with every patch (Eq. 4).

    Args:
        query: (B, d), the question's class token by the layer's own W_Q.
        keys: (B, n, d), the patches' keys, heads concatenated.

    Returns:
        (B, n) float32, each row sums to 1. In float32 because it is for ranking: bfloat16 would make ties.
    """
    scores = (keys.float() @ query.float()[..., None])[..., 0]
    return (scores * keys.shape[-1] ** -0.5).softmax(-1)


def recycle(kept: torch.Tensor, discarded: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Adds what the discarded tokens hold to the kept ones, by attention (Eq. 5).

    Args:
        kept: (B, 1 + k, d), after the layer's attention and residual.
        discarded: (B, m, d), likewise.
        weights: (B, 1 + k, m), the attention that the kept pay to the discarded, mean over the heads.
    """
    return torch.baddbmm(kept, weights.to(kept.dtype), discarded)


@dataclass
class EncodedCrops:
    """Output of the compressed vision tower; M tokens a crop.

    Args:
        features: (crops, M, width), the class token left out.
        positions: (crops, M), the patch that each token was.
        weights: (crops, M, patches), what each token is made of, when it was asked for.
        steps: for each compressing layer its index and the patches that it kept, (crops, k), when asked for.
    """

    features: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor | None = None
    steps: list[tuple[int, torch.Tensor]] = field(default_factory=list)


@dataclass
class _Step:
    """What a compressing layer did; indices count the patches that entered it, `weights` is (B, k, m) or `None`."""

    hidden: torch.Tensor
    kept: torch.Tensor
    discarded: torch.Tensor
    weights: torch.Tensor | None


def encode_crops(
    vision_tower: Any,
    pixel_values: torch.Tensor,
    settings: Any,
    feature_layer: int,
    text_class: torch.Tensor | None = None,
    has_question: torch.Tensor | None = None,
    selectable: torch.Tensor | None = None,
    trace: bool = False,
    checkpoint_activations: bool = False,
) -> EncodedCrops:
    """Encodes crops of images into `settings.num_visual_tokens` tokens each; layers after `feature_layer` don't run.

    Args:
        vision_tower: a `CLIPVisionModel`.
        pixel_values: (crops, 3, height, width).
        settings: a [`QGVTCSettings`], resolved for the model.
        feature_layer: how many layers run.
        text_class: (crops, width), the question's class token in the vision tower's space; `None`: the image's own
            class token guides.
        has_question: (crops,) bool, where `text_class` means something; `None`: everywhere.
        selectable: (crops, patches) bool, the patches that are not padding.
        trace: whether to note what the tokens are made of.
        checkpoint_activations: whether the compressing layers are computed again in the backward pass.
    """
    hidden = clip_embeddings(vision_tower, pixel_values)
    num_patches = hidden.shape[1] - 1
    left = dict(zip(settings.layers, token_schedule(num_patches, settings.num_visual_tokens, len(settings.layers))))
    positions = torch.arange(num_patches, device=hidden.device).expand(len(hidden), -1)
    encoded = EncodedCrops(hidden, positions)
    if trace:
        encoded.weights = torch.eye(num_patches, device=hidden.device).expand(len(hidden), -1, -1)
    for index, layer in enumerate(clip_layers(vision_tower)[:feature_layer]):
        number = left.get(index, hidden.shape[1] - 1)
        if number == hidden.shape[1] - 1:
            hidden = run_clip_layer(layer, hidden)
            continue
        run = partial(_compress, layer, number=number, recycling=settings.recycle)
        allowed = None if selectable is None else selectable.gather(1, encoded.positions)
        arguments = hidden, text_class, has_question, allowed
        step = checkpoint(run, *arguments, use_reentrant=False) if checkpoint_activations else run(*arguments)
        hidden = step.hidden
        if trace:
            encoded.weights = _compose(encoded.weights, step)  # type: ignore[arg-type]
            encoded.steps.append((index, encoded.positions.gather(1, step.kept)))
        encoded.positions = encoded.positions.gather(1, step.kept)
    encoded.features = hidden[:, 1:]
    return encoded


def _compress(
    layer: Any,
    hidden: torch.Tensor,
    text_class: torch.Tensor | None,
    has_question: torch.Tensor | None,
    selectable: torch.Tensor | None,
    number: int,
    recycling: bool,
) -> _Step:
    """One compressing layer on (B, 1 + n, d), which leaves (B, 1 + number, d)."""
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    keys, values = attention.k_proj(normed), attention.v_proj(normed)
    # Without recycling nobody reads the discarded rows of the attention, so their queries aren't computed either.
    queries = attention.q_proj(normed if recycling else normed[:, :1])

    correlation = _correlation(attention, queries[:, :1], text_class, has_question, keys)
    kept, discarded = choose_tokens(correlation, number, selectable)
    class_token = torch.zeros_like(kept[:, :1])  # it always stays
    order = torch.cat([class_token, kept + 1, discarded + 1], dim=1)
    images, rows = torch.arange(len(order), device=order.device)[:, None], 1 + number
    weights = None
    if recycling:
        # Attention is blind to the order of its keys. With the kept in front, rows and columns are slices from here on.
        hidden, queries, keys, values = (x[images, order] for x in (hidden, queries, keys, values))
        queries, keys, values = (split_heads(x, attention) for x in (queries, keys, values))
        attended = attention_rows(queries[:, :, :rows], keys)  # (B, h, 1 + k, 1 + n)
        weights = attended[..., rows:].mean(1)  # (B, 1 + k, m); of all columns, it would cost as much as the products
        tokens = hidden[:, :rows] + attention.out_proj((attended @ values).transpose(1, 2).flatten(2))
        others = attention.out_proj(run_attention(attention, queries[:, :, rows:], keys, values))
        tokens = recycle(tokens, hidden[:, rows:] + others, weights)
    else:
        queries = attention.q_proj(normed[images, order[:, :rows]])
        queries, keys, values = (split_heads(x, attention) for x in (queries, keys, values))
        tokens = hidden[images, order[:, :rows]] + attention.out_proj(run_attention(attention, queries, keys, values))
    if correlation.requires_grad:
        gated = straight_through_gate(tokens[:, 1:], correlation.gather(1, kept))
        tokens = torch.cat([tokens[:, :1], gated], dim=1)
    tokens = tokens + layer.mlp(layer.layer_norm2(tokens))
    return _Step(tokens, kept, discarded, None if weights is None else weights[:, 1:])


def _correlation(
    attention: Any,
    class_query: torch.Tensor,
    text_class: torch.Tensor | None,
    has_question: torch.Tensor | None,
    keys: torch.Tensor,
) -> torch.Tensor:
    """(B, n), from keys (B, 1 + n, d): by the question where there is one, else by the image's class token."""
    by_question = None
    if text_class is not None:
        by_question = question_correlation(attention.q_proj(text_class), keys[:, 1:])
        if has_question is None:
            return by_question
    with torch.no_grad():  # the choice has no gradient, and nothing else reads it
        by_class = class_correlation(split_heads(class_query, attention), split_heads(keys, attention))
    if by_question is None or has_question is None:
        return by_class
    return torch.where(has_question[:, None], by_question, by_class)


def _compose(weights: torch.Tensor, step: _Step) -> torch.Tensor:
    """(B, n, patches) → (B, k, patches): what the tokens that a layer leaves are made of."""
    images = torch.arange(len(weights), device=weights.device)[:, None]
    composed = weights[images, step.kept]
    if step.weights is None:
        return composed
    return recycle(composed, weights[images, step.discarded], step.weights.to(weights.dtype))
