"""What compression saves, for a card: a table by account, from a checkpoint's config alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from foveate.errors import FoveateError
from foveate.modeling.core.account import (
    DEFAULT_TEXT_TOKENS,
    Account,
    account_of,
    default_image_size,
    require_known_towers,
)
from foveate.registry import pair_of_model_type
from foveate.units import show_flops, show_size


_PIXEL_LIMITS = (256**2, 4096**2)  # of the published processors


def table_of(folder: Path) -> str:
    """Visual tokens, FLOPs and KV cache of an image beside the uncompressed model's, at three sizes where sizes differ:
    a Markdown table, or a sentence that says why there is none.

    Args:
        folder: a compressed checkpoint; its `config.json` and its processor's limits are read.
    """
    config = read_compressed_config(folder)
    try:
        require_known_towers(config)
        title = "any" if not _has_sizes(config) else "{}x{}"
        rows = [_row(config, size, title.format(*size)) for size in image_sizes(config, folder)]
    except FoveateError as error:
        return f"Not accounted for: {error}"
    head = [
        "| image, pixels | visual tokens | FLOPs of the prompt | KV cache of the image |",
        "| --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *rows])


def read_compressed_config(folder: Path) -> Any:
    """The config of a compressed checkpoint, by its own class. Raises `FoveateError`."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    pair = pair_of_model_type(content.get("model_type"))
    if pair is None:
        raise FoveateError(f"{folder} is no compressed checkpoint: its model_type is '{content.get('model_type')}'.")
    return pair.config_class.from_dict(content)


def image_sizes(config: Any, folder: Path) -> list[tuple[int, int]]:
    """Sizes (width, height) that show what a checkpoint does: one where it makes every image the same size; squares
    between its processor's limits where an image keeps its size; else one tile or view, two and four of them."""
    width, height = default_image_size(config)
    if _keeps_size(config):
        least, most = _pixel_limits(folder)
        side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
        wanted = [(least * (most / least) ** (quarter / 4)) ** 0.5 for quarter in (1, 2, 3)]
        # The largest has to be within the limit, so sides are rounded down; limits this close show fewer sizes.
        sides = sorted({max(side, int(pixels / side + 1e-6) * side) for pixels in wanted})
        return [(pixels, pixels) for pixels in sides]
    return [(width, height), (2 * width, height), (2 * width, 2 * height)] if _has_sizes(config) else [(width, height)]


def _keeps_size(config: Any) -> bool:
    """Whether an image runs at its own size, within limits."""
    return hasattr(config.vision_config, "spatial_merge_size")


def _has_sizes(config: Any) -> bool:
    return (
        _keeps_size(config)
        or hasattr(config, "image_grid_pinpoints")
        or getattr(config, "image_processor", None) is not None
    )


def _pixel_limits(folder: Path) -> tuple[int, int]:
    """Fewest and most pixels of an image, as the checkpoint's image processor has them."""
    for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            size = content.get("image_processor", content).get("size") or {}
            if size.get("shortest_edge") and size.get("longest_edge"):
                return size["shortest_edge"], size["longest_edge"]
    return _PIXEL_LIMITS


def _row(config: Any, size: tuple[int, int], title: str) -> str:
    model = account_of(config, size, DEFAULT_TEXT_TOKENS)
    base = account_of(config, size, DEFAULT_TEXT_TOKENS, uncompressed=True)
    at_most = "at most " if model.at_most else ""

    def beside(show: Callable[[int], str], mine: int, theirs: int) -> str:
        share = f"{mine / theirs:.1%}" if mine * 1000 >= theirs else f"{mine / theirs:.2%}"
        return f"{at_most}{show(mine)} of {show(theirs)} ({share})"

    cells = [
        beside(str, model.visual_tokens, base.visual_tokens),
        beside(show_flops, model.total, base.total),
        beside(show_size, _image_bytes(model), _image_bytes(base)),
    ]
    return f"| {title} | {' | '.join(cells)} |"


def _image_bytes(account: Account) -> int:
    """The image's share of the prompt's KV cache, in which all tokens weigh the same."""
    return account.kv_bytes * account.visual_tokens // (account.visual_tokens + DEFAULT_TEXT_TOKENS)
