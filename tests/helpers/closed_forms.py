"""The account of a model in closed forms, written from what each method computes: the slow reference of
`foveate.modeling.core.account`, which counts. FLOPs are 2 × the multiply-adds of a matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from foveate.modeling.layers.slices import slice_grid_of
from foveate.modeling.layers.tiles import tile_grid
from foveate.modeling.methods.meteor_algorithm import FlashGlobalFusion
from foveate.modeling.methods.qgvtc_algorithm import token_schedule


def closed_forms(config: Any, image_size: tuple[int, int], text_tokens: int) -> dict[str, int]:
    """FLOPs of the parts, and visual tokens, of a config, compressed or not."""
    method = getattr(getattr(config, "compression", None), "method", None)
    found = {"text_encoder": 0, "compressor": 0, **_stock(config, image_size)}
    of_method = {
        "qg-vtc": _qgvtc,
        "recoverable": _recoverable,
        "meteor": _meteor,
        "metacompress": _metacompress,
        "spatial": _spatial,
        "sample": _sample,
        "random": _sample,
        "etc": _etc,
        None: lambda *_: {},
    }
    found |= of_method[method](config, found, image_size)
    tokens = text_tokens + found["visual_tokens"]
    read = found.pop("read_tokens", None)
    passes = [(tokens, tokens)] if read is None else [(read, read), (text_tokens, tokens)]
    return {**found, "llm_prefill": prefill(config.text_config, passes)}


def layer(config: Any, queries: int, keys: int | None = None, mlp: int | None = None) -> int:
    """An encoder layer, of a tower for images or text: tokens through the query and output projections, through the
    keys' and values', and through the MLP."""
    keys, mlp, width = keys or queries, mlp or queries, config.hidden_size
    return 4 * width * ((queries + keys) * width + queries * keys + mlp * config.intermediate_size)


def prefill(config: Any, passes: Sequence[tuple[int, int]]) -> int:
    """A language model on tokens that attend to tokens, its head on the last alone."""
    width = config.hidden_size
    head_width = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_width, config.num_key_value_heads * head_width
    of_layer = 0
    for asking, asked in passes:
        of_layer += asking * (2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size)
        of_layer += 2 * asking * asked * queries
    return 2 * (config.num_hidden_layers * of_layer + width * config.vocab_size)


def _stock(config: Any, image_size: tuple[int, int]) -> dict[str, int]:
    vision = config.vision_config
    if hasattr(vision, "spatial_merge_size"):
        merge, side = vision.spatial_merge_size, vision.patch_size * vision.spatial_merge_size
        tokens = max(1, round(image_size[0] / side)) * max(1, round(image_size[1] / side))
        merged, values = vision.hidden_size * merge**2, vision.in_channels * vision.temporal_patch_size
        mergers = 1 + len(vision.deepstack_visual_indexes)
        return {
            "vision_tower": _embedding(vision, tokens * merge**2, values)
            + vision.depth * layer(vision, tokens * merge**2),
            "projector": 2 * tokens * mergers * merged * (merged + vision.out_hidden_size),
            "visual_tokens": tokens,
        }
    tiles, visual_tokens, patches = 1, _patches(config), _patches(config)
    if hasattr(config, "image_grid_pinpoints"):
        grid = tile_grid(image_size[::-1], config.image_grid_pinpoints, vision.image_size, vision.patch_size)
        tiles, visual_tokens = grid.num_tiles, grid.num_tokens(patches)
    return {
        "vision_tower": tiles * _tower(config, vision.num_hidden_layers),
        "projector": tiles * _projector(config, patches),
        "visual_tokens": visual_tokens,
        "tiles": tiles,
    }


def _patches(config: Any) -> int:
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def _embedding(vision: Any, patches: int, values: int) -> int:
    return 2 * patches * values * vision.patch_size**2 * vision.hidden_size


def _tower(config: Any, layers: int) -> int:
    vision, patches = config.vision_config, _patches(config)
    return _embedding(vision, patches, vision.num_channels) + layers * layer(vision, 1 + patches)


def _projector(config: Any, tokens: int) -> int:
    width = config.text_config.hidden_size
    return 2 * tokens * (config.vision_config.hidden_size * width + width * width)


def _text_encoder(config: Any) -> int:
    return config.num_hidden_layers * layer(config, config.max_position_embeddings)


def _running(config: Any) -> int:
    """Layers of the tower up to the features' one."""
    return config.vision_feature_layer % (config.vision_config.num_hidden_layers + 1)


def _sample(config: Any, stock: dict[str, int], _) -> dict[str, int]:
    return {"visual_tokens": config.compression.count_tokens(stock["visual_tokens"])}


def _spatial(config: Any, stock: dict[str, int], _) -> dict[str, int]:
    """Means of all that belongs to a token: what DeepStack adds to it, and its place, go with it."""
    length, kept = stock["visual_tokens"], config.compression.count_tokens(stock["visual_tokens"])
    width = config.text_config.hidden_size
    if hasattr(config.vision_config, "deepstack_visual_indexes"):
        width += width * len(config.vision_config.deepstack_visual_indexes) + 3  # axes of its place
    return {"visual_tokens": kept, "compressor": 2 * kept * length * width if kept < length else 0}


def _metacompress(config: Any, stock: dict[str, int], _) -> dict[str, int]:
    length, kept = stock["visual_tokens"], config.compression.count_tokens(stock["visual_tokens"])
    width, key_width = config.text_config.hidden_size, config.compression.key_width
    of_matrix = (kept + length) * width * key_width + kept * length * (key_width + width)  # Eq. 6 to 8, P·X
    return {"visual_tokens": kept, "compressor": 2 * of_matrix if kept < length else 0}


def _etc(config: Any, stock: dict[str, int], _) -> dict[str, int]:
    number = config.compression.num_visual_tokens
    return {"visual_tokens": number, "read_tokens": stock["visual_tokens"] + number}


def _qgvtc(config: Any, stock: dict[str, int], image_size: tuple[int, int]) -> dict[str, int]:
    settings, vision, patches = config.compression, config.vision_config, _patches(config)
    width, number = vision.hidden_size, settings.num_visual_tokens
    by_question = settings.guidance == "question" and number < patches
    left = dict(zip(settings.layers, token_schedule(patches, number, len(settings.layers))))
    tower, own, entering = _embedding(vision, patches, vision.num_channels), 0, patches
    for index in range(_running(config)):
        kept = left.get(index, entering)
        # Recycling reads the attention of the discarded tokens too; the MLP runs on the kept ones alone.
        tower += layer(vision, 1 + (entering if settings.recycle else kept), 1 + entering, 1 + kept)
        if kept == entering:
            continue
        own += (1 + entering) * width  # the class token's correlation, for images without a question
        own += by_question * (width * width + entering * width)  # Eq. 4: the question's query, its correlation
        # Eq. 5; else the class token's query, before it is known what is kept
        own += (1 + kept) * (entering - kept) * width if settings.recycle else width * width
        entering = kept
    question, tiles, visual_tokens = config.question_config, stock["tiles"], number
    if hasattr(config, "image_grid_pinpoints"):
        grid = tile_grid(image_size[::-1], config.image_grid_pinpoints, vision.image_size, vision.patch_size)
        visual_tokens = grid.num_tokens(number)
    of_question = question.hidden_size * width + width * width
    return {
        "vision_tower": tiles * tower,
        "compressor": 2 * (tiles * own + by_question * of_question),
        "text_encoder": by_question * _text_encoder(question),
        "projector": tiles * _projector(config, number),
        "visual_tokens": visual_tokens,
    }


def _recoverable(config: Any, _, __) -> dict[str, int]:
    settings, vision, question, patches = (
        config.compression,
        config.vision_config,
        config.question_config,
        _patches(config),
    )
    width, projection, layers = vision.hidden_size, question.projection_dim, vision.num_hidden_layers
    uses_text = settings.text_recovery or (settings.secondary_recovery and settings.variant == "official")
    own = width * width * (patches + 2) + width * (patches + 1)  # last layer's keys, CLS's query, Eq. 1
    own += uses_text * (patches * width * projection + patches * projection)  # Eq. 2
    number, merged = settings.num_visual_tokens or patches, 0
    if settings.secondary_recovery:
        fixed = settings.num_visual_tokens is not None
        merged = number * (patches - number) // (5 * patches) if fixed else patches - 1
    own += 2 * merged * patches * width  # similarity to the cluster centres, weighted sums
    return {
        "vision_tower": _tower(config, layers if uses_text or _running(config) == layers else layers - 1),
        "compressor": 2 * own,
        "text_encoder": uses_text * (_text_encoder(question) + 2 * question.hidden_size * projection),
        "projector": _projector(config, number),
        "visual_tokens": number,
    }


def _meteor(config: Any, _, image_size: tuple[int, int]) -> dict[str, int]:
    """A scan counts by its one product, of every position's state with its C."""
    settings, vision = config.compression, config.vision_config
    grid = slice_grid_of(config, image_size[::-1])
    patches = max(rows * columns for rows, columns in grid.shapes)
    kept, length = min(settings.num_visual_tokens, patches), patches * (1 + (settings.scan == "local-to-single")) + 1
    with torch.device("meta"):
        fusion = FlashGlobalFusion(vision.hidden_size, settings.state_size)
    own = 0
    for mixer in (fusion.forward_mixer, fusion.backward_mixer):
        linear = sum(module.weight.numel() for module in mixer.modules() if isinstance(module, nn.Linear))
        own += length * (linear + mixer.A_log.numel())
        own += (length + mixer.conv1d.padding[0]) * mixer.conv1d.weight.numel()  # pads on both sides
    if kept < patches:
        own += (settings.visual_share > 0) * (1 + patches) * vision.hidden_size
        own += (settings.visual_share < 1) * patches * vision.hidden_size
    of_layers = _running(config) * layer(vision, 1 + patches)
    return {
        "vision_tower": grid.num_views * (_embedding(vision, patches, vision.num_channels) + of_layers),
        "compressor": 2 * grid.num_views * own,
        "projector": grid.num_views * _projector(config, kept),
        "visual_tokens": grid.num_tokens(settings.num_visual_tokens),
    }
