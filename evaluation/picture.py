"""A picture of what became of each patch: the image on the left, the same with its visual tokens on the right.

It is drawn from the tokens' provenance alone, so it knows no method: a token of one patch is an outline in the colour
of its role, a token of many patches a tint over them with a dot on the strongest, and what went into no token is dark.
"""

from __future__ import annotations

import colorsys
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ..modeling.compressed_model import TokenProvenance


PANEL, MARGIN = 560, 28  # pixels; a panel is at most this wide or high
INK, ACCENT, PAPER = "#1c2330", "#2563a8", "#ffffff"
OUTLINES = ("#ffb000", "#19c3e6", "#ff5cc8", "#9be564")  # a role each, in the order of the roles
REST = "#46536b"  # tint of a token that holds most of the image
DARK = "#101010"  # of a patch that is in no token
_DARK, _TINT, _REST = 0.8, 0.5, 0.66  # how much of a patch they cover
_LONGEST_TITLE = 240  # characters of question and of answer
_FINE = 2  # everything is drawn this much larger, then made smaller: smooth edges


@dataclass(frozen=True)
class _Reading:
    """What the picture shows, read from a provenance.

    Attributes:
        kept: role → patches, a token each.
        merged: for each merged token its strongest patch.
        owner: patch → index in `merged` of the token that holds the most of it.
        is_rest: for each merged token, whether it holds most of the image.
        dropped: patches in no token.
    """

    kept: dict[int, list[int]]
    merged: list[int]
    owner: dict[int, int]
    is_rest: list[bool]
    dropped: list[int]


def _read(provenance: TokenProvenance) -> _Reading:
    weights, roles = provenance.weights.float().cpu(), provenance.roles.cpu()
    patches_of = (weights > 0).sum(1)  # (tokens,)
    merging_roles = set(roles[patches_of > 1].tolist())
    is_merged = torch.tensor([role in merging_roles for role in roles.tolist()], dtype=torch.bool)
    kept: dict[int, list[int]] = {}
    for role, patch in zip(roles[~is_merged].tolist(), weights[~is_merged].argmax(1).tolist()):
        kept.setdefault(role, []).append(patch)
    merged = weights[is_merged]  # (merged tokens, patches)
    alone = {patch for patches in kept.values() for patch in patches}
    held = [patch for patch in (merged > 0).any(0).nonzero()[:, 0].tolist() if patch not in alone]
    return _Reading(
        kept=dict(sorted(kept.items())),
        merged=merged.argmax(1).tolist(),
        owner={patch: int(merged[:, patch].argmax()) for patch in held},
        is_rest=(patches_of[is_merged] > weights.shape[1] / 2).tolist(),
        dropped=(weights.sum(0) == 0).nonzero()[:, 0].tolist(),
    )


def shown_image(pixel_values: torch.Tensor, image_processor: Any) -> Image.Image:
    """The picture that the vision tower saw, (1, 3, height, width) of it, with its colours put right again."""
    mean, std = (torch.tensor(getattr(image_processor, f"image_{name}")) for name in ("mean", "std"))
    pixels = pixel_values[0].float().cpu().permute(1, 2, 0) * std + mean
    return Image.fromarray((pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy())


def draw_compression(
    image: Image.Image, provenance: TokenProvenance, patch_size: int, question: str, answer: str
) -> Image.Image:
    """Draws what became of each patch.

    Args:
        image: as the vision tower saw it, so that patches line up.
        provenance: of its visual tokens.
        patch_size: side of a patch in pixels of `image`.
        question, answer: the title.

    Returns:
        A picture of two panels, title and legend.

    Raises:
        ValueError: the provenance is of another number of patches than the image has.
    """
    columns, rows = image.width // patch_size, image.height // patch_size
    num_tokens, num_patches = provenance.weights.shape
    if columns * rows != num_patches:
        raise ValueError(f"The image has {columns} × {rows} patches, the provenance is of {num_patches}.")
    reading = _read(provenance)
    side = max(1, PANEL // max(columns, rows))  # of a drawn patch
    plain = image.crop((0, 0, columns * patch_size, rows * patch_size)).convert("RGB")
    plain = plain.resize((columns * side * _FINE, rows * side * _FINE), Image.Resampling.LANCZOS)
    panels = [plain, _overlay(plain, reading, columns, side * _FINE)]
    panels = [panel.resize((columns * side, rows * side), Image.Resampling.LANCZOS) for panel in panels]
    captions = [_count(num_patches, "patch", "patches"), _count(num_tokens, "visual token", "visual tokens")]
    return _compose(panels, captions, question, answer, _legend(reading, provenance.role_names))


def _overlay(plain: Image.Image, reading: _Reading, columns: int, side: int) -> Image.Image:
    def box(patch: int, inset: float = 0) -> tuple[float, ...]:
        left, top = patch % columns * side, patch // columns * side
        return left + inset, top + inset, left + side - 1 - inset, top + side - 1 - inset

    tints = _tints(reading)
    layer = Image.new("RGBA", plain.size)
    draw = ImageDraw.Draw(layer)
    for patch in reading.dropped:
        draw.rectangle(box(patch), fill=(*ImageColor.getrgb(DARK), int(255 * _DARK)))
    for patch, owner in reading.owner.items():
        draw.rectangle(box(patch), fill=(*tints[owner], int(255 * (_REST if reading.is_rest[owner] else _TINT))))
    panel = Image.alpha_composite(plain.convert("RGBA"), layer)
    draw = ImageDraw.Draw(panel)
    for token, patch in enumerate(reading.merged):
        if not reading.is_rest[token]:  # a sum over everything has no centre
            draw.ellipse(box(patch, 0.3 * side), fill=tints[token], outline="white", width=max(2, side // 16))
    for (_, patches), colour in zip(reading.kept.items(), _outlines()):
        for patch in patches:
            draw.rectangle(box(patch), outline="black", width=max(3, side // 9))
            draw.rectangle(box(patch, max(1, side // 36)), outline=colour, width=max(2, side // 12))
    return panel.convert("RGB")


def _tints(reading: _Reading) -> list[tuple[int, ...]]:
    """A hue for every merged token, neighbours in the list far apart."""
    tints = []
    for index, is_rest in enumerate(reading.is_rest):
        hue = (0.83 + index * 0.618034) % 1
        colour = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, 1.0))
        tints.append(ImageColor.getrgb(REST) if is_rest else colour)
    return tints


def _outlines() -> Iterator[str]:
    return itertools.cycle(OUTLINES)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _legend(reading: _Reading, role_names: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """Rows of (how the swatch looks, its colour, text)."""
    rows = [
        ("outline", colour, f"{role_names[role]}: {_count(len(patches), 'token', 'tokens')}")
        for (role, patches), colour in zip(reading.kept.items(), _outlines())
    ]
    for is_rest, kind, what in ((False, "dot", "merged, a colour each"), (True, "tint", "all the rest")):
        tokens = [token for token, rest in enumerate(reading.is_rest) if rest == is_rest]
        held = sum(owner in tokens for owner in reading.owner.values())
        if tokens:
            colour = "#{:02x}{:02x}{:02x}".format(*_tints(reading)[tokens[0]])
            text = f"{_count(held, 'patch', 'patches')} in {_count(len(tokens), 'token', 'tokens')}"
            rows.append((kind, colour, f"{what}: {text}"))
    if reading.dropped:
        rows.append(("tint", DARK, f"dropped: {_count(len(reading.dropped), 'patch', 'patches')}"))
    return rows


def _compose(
    panels: list[Image.Image], captions: list[str], question: str, answer: str, legend: list[tuple[str, str, str]]
) -> Image.Image:
    """Title, panels side by side with captions, and the legend in two columns."""
    title_font, font, small = (ImageFont.load_default(size) for size in (24, 18, 16))
    width = max(3 * MARGIN + sum(panel.width for panel in panels), 640)
    title = [
        (line, colour)
        for text, colour in ((question, INK), (answer, ACCENT))
        for line in _wrap(textwrap.shorten(text, _LONGEST_TITLE, placeholder=" …"), title_font, width - 2 * MARGIN)
    ]
    panels_top = MARGIN + 32 * len(title) + 14
    legend_top = panels_top + panels[0].height + 50
    height = legend_top + 30 * -(-len(legend) // 2) + MARGIN - 8

    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for row, (line, colour) in enumerate(title):
        draw.text((MARGIN, MARGIN - 4 + 32 * row), line, colour, title_font)
    for index, (panel, caption) in enumerate(zip(panels, captions)):
        left = MARGIN + index * (panel.width + MARGIN)
        canvas.paste(panel, (left, panels_top))
        draw.text((left, panels_top + panel.height + 10), caption, INK, font)
    for index, (kind, colour, text) in enumerate(legend):
        left, top = MARGIN + index % 2 * (width - MARGIN) // 2, legend_top + index // 2 * 30
        _swatch(draw, kind, colour, left, top)
        draw.text((left + 30, top + 1), text, INK, small)
    return canvas


def _swatch(draw: ImageDraw.ImageDraw, kind: str, colour: str, left: int, top: int) -> None:
    box = (left, top, left + 19, top + 19)
    if kind == "outline":
        draw.rectangle(box, outline=colour, width=4)
    elif kind == "dot":
        paler = tuple((part + 255) // 2 for part in ImageColor.getrgb(colour))
        draw.rectangle(box, fill=paler)
        draw.ellipse((left + 5, top + 5, left + 14, top + 14), fill=colour)
    else:
        draw.rectangle(box, fill=colour)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Lines of words that fit the width; a word that is too long stands alone."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
