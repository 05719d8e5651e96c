"""A picture of what became of each patch: the image, then the same with its visual tokens.

It is drawn from the tokens' provenance alone, so it knows no method. Where tokens are made in one step, a token of one
patch is an outline in the colour of its role, a token of many patches a tint over them with a dot on the strongest, and
what went into no token is dark. Where they are made in several, every step has a panel, the patches that it left clear
and the others dark, as in QG-VTC's Figures 4–9, and the last outlines them. What each of several experts thinks of the
patches has a panel of its own before these, a heat map over the greyed image.
"""

from __future__ import annotations

import colorsys
import itertools
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

from foveate.modeling.core.outputs import TokenProvenance
from foveate.modeling.layers.slices import SliceGrid
from foveate.modeling.layers.tiles import TileGrid


PANEL, SMALL_PANEL, MARGIN = 560, 336, 28  # pixels; of a panel, each view is at most this wide or high
_SLICED = 8  # least pixels of a patch of a slice
ACROSS = 4  # most views side by side
_GAP = 8  # pixels between the views of a panel
INK, ACCENT, PAPER = "#1c2330", "#2563a8", "#ffffff"
OUTLINES = ("#ffb000", "#19c3e6", "#ff5cc8", "#9be564")  # a role each, in the order of the roles
REST = "#46536b"  # tint of a token that holds most of the image
DARK = "#101010"  # of a patch that has no token
HEAT = ("#1d1147", "#b5367a", "#fb8861", "#fcfdbf")  # of a patch, from a score of 0 to the highest
_DARK, _TINT, _REST = 0.8, 0.5, 0.66  # how much of a patch they cover
_HEAT = 0.6  # how much of the greyed image a score covers
_HEAT_TEXT = "an expert's score, from 0 to the highest of its view"
_LONGEST_TITLE = 240  # characters of question and of answer
_FINE = 2  # everything is drawn this much larger, then made smaller: smooth edges


@dataclass(frozen=True)
class View:
    """A picture that the vision tower saw, of whole patches.

    Attributes:
        image: without padding.
        patches: (rows, columns), the number of each patch among those of the provenance.
        slices: (rows, columns) of slices that it is put together of, which the tower saw one by one.
    """

    image: Image.Image
    patches: torch.Tensor
    slices: tuple[int, int] = (1, 1)

    @property
    def slice_shape(self) -> tuple[int, int]:
        """(rows, columns) of patches of a slice."""
        return self.patches.shape[0] // self.slices[0], self.patches.shape[1] // self.slices[1]


@dataclass(frozen=True)
class SeenImage:
    """An image as the vision tower saw it.

    Attributes:
        views: one for LLaVA-1.5; for LLaVA-NeXT the overview, and the grid of tiles put together again; for
            LLaVA-Meteor the same, of slices if there are any.
        num_patches: of all tiles, padding included.
        parts: what the second view is put together of.
    """

    views: tuple[View, ...]
    num_patches: int
    parts: str = "tiles"


def seen_image(
    pixel_values: torch.Tensor, image_processor: Any, patch_size: int, grid: TileGrid | None = None
) -> SeenImage:
    """What the vision tower saw of one image, with its colours put right again.

    Args:
        pixel_values: (1, 3, height, width); with a grid (1, tiles, 3, height, width), more tiles than it has allowed.
        image_processor: knows by which mean and deviation they were normalised.
        patch_size: side of a patch in pixels.
        grid: of the tiles, where the image was cut into such.
    """
    mean, std = (torch.tensor(getattr(image_processor, f"image_{name}")) for name in ("mean", "std"))
    tiles = pixel_values.float().cpu().flatten(0, -4).movedim(1, -1) * std + mean  # (tiles, height, width, 3)
    rows, columns = (length // patch_size for length in tiles.shape[1:3])
    tiles = tiles[: grid.num_tiles if grid else 1, : rows * patch_size, : columns * patch_size]
    numbers = torch.arange(len(tiles) * rows * columns).view(-1, rows, columns)
    views = [View(_to_image(tiles[0]), numbers[0])]
    if grid:
        whole = _to_image(_put_together(tiles[1:], grid, patch_size))
        views.append(View(whole, _put_together(numbers[1:], grid, 1)))
    return SeenImage(tuple(views), numbers.numel())


def seen_slices(pixel_values: torch.Tensor, image_processor: Any, grid: SliceGrid) -> SeenImage:
    """What the vision tower saw of one image that LLaVA-Meteor's processor cut into views.

    Args:
        pixel_values: (1, views, patches, values), more views and patches than the image has allowed.
        image_processor: puts the patches of a grid of views together.
        grid: the views of the image.
    """
    pixels, numbers = pixel_values[0].float().cpu(), torch.arange(grid.num_patches)
    views, next_view, next_patch = [], 0, 0
    for slices, shape in (((1, 1), grid.overview), ((grid.rows, grid.columns), grid.slice_shape)):
        count, length = math.prod(slices), math.prod(shape)
        if count:
            cut = pixels[next_view : next_view + count, :length].numpy()
            image = _to_image(torch.from_numpy(image_processor.put_together(cut, *slices, shape)))
            patches = numbers[next_patch : next_patch + count * length].view(count, *shape)
            views.append(View(image, _side_by_side(patches, *slices), slices))
        next_view, next_patch = next_view + count, next_patch + count * length
    return SeenImage(tuple(views), grid.num_patches, "slices")


def pixels_of_patches(patches: torch.Tensor, grid_thw: torch.Tensor, image_processor: Any) -> torch.Tensor:
    """Puts an image together that Qwen's processor cut into patches.

    Args:
        patches: (patches, 3 · frames · side · side), the patches of a merged token one after the other.
        grid_thw: (3,): 1, rows and columns in patches.
        image_processor: knows the sizes of patches and merged tokens.

    Returns:
        (1, 3, height, width), as it was cut.
    """
    _, rows, columns = grid_thw.tolist()
    side, merge, frames = (getattr(image_processor, f"{name}_size") for name in ("patch", "merge", "temporal_patch"))
    cut = patches.view(rows // merge, columns // merge, merge, merge, 3, frames, side, side)[:, :, :, :, :, 0]
    return cut.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, rows * side, columns * side)


def _put_together(tiles: torch.Tensor, grid: TileGrid, scale: int) -> torch.Tensor:
    """(rows · columns, height, width, …) of a grid → the part of the whole that is no padding, at `scale` a patch."""
    whole = _side_by_side(tiles, grid.rows, grid.columns)
    return whole[grid.top * scale : grid.bottom * scale, grid.left * scale : grid.right * scale]


def _side_by_side(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(rows · columns, height, width, …) → (rows · height, columns · width, …)."""
    return tiles.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _to_image(pixels: torch.Tensor) -> Image.Image:
    """(height, width, 3), from 0 to 1."""
    return Image.fromarray((pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy())


@dataclass(frozen=True)
class _Reading:
    """What a panel shows. Patches are numbered as they are shown, view after view, row after row.

    Attributes:
        dark: patches without a token of their own, and in none that is merged.
        absorbed: how many of the dark are a part of tokens that other patches were kept for.
        kept: role → patches, a token each.
        merged: for each merged token its strongest patch.
        owner: patch → index in `merged` of the token that holds the most of it.
        is_rest: for each merged token, whether it holds most of the image.
        of_no_patch: role → tokens that are made of no patch.
    """

    dark: list[int]
    absorbed: int = 0
    kept: dict[int, list[int]] = field(default_factory=dict)
    merged: list[int] = field(default_factory=list)
    owner: dict[int, int] = field(default_factory=dict)
    is_rest: list[bool] = field(default_factory=list)
    of_no_patch: dict[int, int] = field(default_factory=dict)


def _read_panels(provenance: TokenProvenance, shown: torch.Tensor) -> list[tuple[str, _Reading]]:
    """Caption and content of every panel after the first; `shown` are the numbers of the patches that are shown."""
    weights, roles = provenance.weights[:, shown.to(provenance.weights.device)].float().cpu(), provenance.roles.cpu()
    placed = (weights > 0).any(1)
    of_no_patch = {role: int((roles[~placed] == role).sum()) for role in sorted(set(roles[~placed].tolist()))}
    weights, roles, steps = weights[placed], roles[placed], provenance.steps
    if not steps:
        caption = _count(len(provenance.weights), "visual token", "visual tokens")
        return [(caption, _read_tokens(weights, roles, of_no_patch))]
    left = [torch.isin(shown, kept.cpu()) for _, kept in steps]  # (patches shown,) bool
    total = _count(len(shown), "patch", "patches")
    captions = [f"{name}: {int(is_left.sum())} of {total}" for (name, _), is_left in zip(steps, left)]
    readings = [_Reading(_indices(~is_left)) for is_left in left[:-1]]
    readings.append(_read_last_step(weights, roles, left[-1], of_no_patch))
    return list(zip(captions, readings))


def _read_tokens(weights: torch.Tensor, roles: torch.Tensor, of_no_patch: dict[int, int]) -> _Reading:
    """Tokens that were made in one step, from their weights (tokens, patches)."""
    patches_of = (weights > 0).sum(1)  # (tokens,)
    merging_roles = set(roles[patches_of > 1].tolist())
    is_merged = torch.tensor([role in merging_roles for role in roles.tolist()], dtype=torch.bool)
    kept = _by_role(roles[~is_merged], weights[~is_merged].argmax(1))
    merged = weights[is_merged]  # (merged tokens, patches)
    alone = {patch for patches in kept.values() for patch in patches}
    held = [patch for patch in _indices((merged > 0).any(0)) if patch not in alone]
    return _Reading(
        dark=_indices(weights.sum(0) == 0),
        kept=kept,
        merged=merged.argmax(1).tolist(),
        owner={patch: int(merged[:, patch].argmax()) for patch in held},
        is_rest=(patches_of[is_merged] > weights.shape[1] / 2).tolist(),
        of_no_patch=of_no_patch,
    )


def _read_last_step(
    weights: torch.Tensor, roles: torch.Tensor, is_left: torch.Tensor, of_no_patch: dict[int, int]
) -> _Reading:
    """Tokens after the last of several steps. What they took in on the way is in nearly all of them, a little of each:
    it is no tint, and a token is shown at the patch that it was, of those that are left the one it holds."""
    own = is_left.nonzero()[:, 0]
    return _Reading(
        dark=_indices(~is_left),
        absorbed=int(((weights > 0).any(0) & ~is_left).sum()),
        kept=_by_role(roles, own[weights[:, own].argmax(1)]),
        of_no_patch=of_no_patch,
    )


def _by_role(roles: torch.Tensor, patches: torch.Tensor) -> dict[int, list[int]]:
    return {role: patches[roles == role].tolist() for role in sorted(set(roles.tolist()))}


def _indices(mask: torch.Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


def draw_compression(seen: SeenImage, provenance: TokenProvenance, question: str, answer: str) -> Image.Image:
    """Draws what became of each patch.

    Args:
        seen: the image as the vision tower saw it, so that patches line up.
        provenance: of its visual tokens.
        question, answer: the title.

    Returns:
        A picture: the image, a panel for every expert and every step, at most `ACROSS` views side by side, with title
        and legend.

    Raises:
        ValueError: the provenance is of another number of patches than the image has.
    """
    num_patches = provenance.weights.shape[1]
    if seen.num_patches != num_patches:
        raise ValueError(f"The image has {seen.num_patches} patches, the provenance is of {num_patches}.")
    shown = torch.cat([view.patches.flatten() for view in seen.views])
    experts = [(name, score[shown.to(score.device)].float().cpu()) for name, score in provenance.scores]
    panels = _read_panels(provenance, shown)
    shows: list[Any] = [None, *(shown for _, shown in (*experts, *panels))]
    drawn = _draw_panels(seen.views, shows)
    captions = [_count(len(shown), "patch", "patches"), *(caption for caption, _ in (*experts, *panels))]
    if len(seen.views) > 1:
        captions[0] = f"overview and {seen.parts}: {captions[0]}"
    legend = _legend(panels[-1][1], provenance.role_names)
    if experts:
        legend.append(("heat", INK, _HEAT_TEXT))
    return _compose(drawn, captions, max(1, ACROSS // len(seen.views)), question, answer, legend)


def _draw_panels(views: tuple[View, ...], contents: list[_Reading | torch.Tensor | None]) -> list[Image.Image]:
    """Small ones if they are many, but slices no smaller than that their patches can be told apart."""
    length = PANEL if len(contents) * len(views) <= 2 else SMALL_PANEL
    length = max(length, *(_SLICED * max(view.patches.shape) for view in views if view.slices != (1, 1)), 0)
    return [_draw_panel(views, shows, length) for shows in contents]


def _draw_panel(views: tuple[View, ...], shows: _Reading | torch.Tensor | None, length: int) -> Image.Image:
    """The views side by side, each at most `length` wide or high, with what a reading says, or with the heat of scores
    (patches shown,); `None`: plain."""
    pictures, first = [], 0
    for view in views:
        rows, columns = view.patches.shape
        side = max(1, length // max(columns, rows))  # of a drawn patch
        picture = view.image.convert("RGB")
        picture = picture.resize((columns * side * _FINE, rows * side * _FINE), Image.Resampling.LANCZOS)
        if isinstance(shows, torch.Tensor):
            picture = _heat_map(picture, shows[first : first + rows * columns].view(rows, columns), view)
        elif shows is not None:
            picture = _overlay(picture, shows, range(first, first + rows * columns), columns, side * _FINE)
        _draw_borders(picture, view, side * _FINE)
        pictures.append(picture.resize((columns * side, rows * side), Image.Resampling.LANCZOS))
        first += rows * columns
    if len(pictures) == 1:
        return pictures[0]
    width = sum(picture.width + _GAP for picture in pictures) - _GAP
    panel, left = Image.new("RGB", (width, max(picture.height for picture in pictures)), PAPER), 0
    for picture in pictures:
        panel.paste(picture, (left, 0))
        left += picture.width + _GAP
    return panel


def _overlay(plain: Image.Image, reading: _Reading, patches: range, columns: int, side: int) -> Image.Image:
    """One view; `patches` are those that it shows."""

    def box(patch: int, inset: float = 0) -> tuple[float, ...]:
        row, column = divmod(patch - patches.start, columns)
        left, top = column * side, row * side
        return left + inset, top + inset, left + side - 1 - inset, top + side - 1 - inset

    tints = _tints(reading)
    layer = Image.new("RGBA", plain.size)
    draw = ImageDraw.Draw(layer)
    for patch in filter(patches.__contains__, reading.dark):
        draw.rectangle(box(patch), fill=(*ImageColor.getrgb(DARK), int(255 * _DARK)))
    for patch, owner in reading.owner.items():
        if patch in patches:
            cover = _REST if reading.is_rest[owner] else _TINT
            draw.rectangle(box(patch), fill=(*tints[owner], int(255 * cover)))
    panel = Image.alpha_composite(plain.convert("RGBA"), layer)
    draw = ImageDraw.Draw(panel)
    for token, patch in enumerate(reading.merged):
        if patch in patches and not reading.is_rest[token]:  # a sum over everything has no centre
            draw.ellipse(box(patch, 0.3 * side), fill=tints[token], outline="white", width=max(2, side // 16))
    for (_, of_role), colour in zip(reading.kept.items(), _outlines()):
        for patch in filter(patches.__contains__, of_role):
            draw.rectangle(box(patch), outline="black", width=max(3, side // 9))
            draw.rectangle(box(patch, max(1, side // 36)), outline=colour, width=max(2, side // 12))
    return panel.convert("RGB")


def _heat_map(plain: Image.Image, scores: torch.Tensor, view: View) -> Image.Image:
    """One view in grey under the scores (rows, columns) of its patches; the highest of each slice is the hottest."""
    (rows, columns), (height, width) = view.slices, view.slice_shape
    of_slices = scores.view(rows, height, columns, width)
    heat = (of_slices / of_slices.amax((1, 3), keepdim=True).clamp(min=1e-12)).view(scores.shape)
    layer = _to_image(_heat_colours(heat)).resize(plain.size, Image.Resampling.NEAREST)
    grey = ImageOps.autocontrast(ImageOps.grayscale(plain)).convert("RGB")
    return Image.blend(grey, layer, _HEAT)


def _heat_colours(heat: torch.Tensor) -> torch.Tensor:
    """(…,) from 0 to 1 → (…, 3) from 0 to 1."""
    stops = torch.tensor([ImageColor.getrgb(colour) for colour in HEAT]) / 255
    place = heat[..., None] * (len(stops) - 1)
    below = place.long().clamp(max=len(stops) - 2)
    return torch.lerp(stops[below[..., 0]], stops[below[..., 0] + 1], place - below)


def _draw_borders(picture: Image.Image, view: View, side: int) -> None:
    """A thin line between slices; `side` is a patch's."""
    draw, (height, width) = ImageDraw.Draw(picture), view.slice_shape
    for size, colour in ((2 * _FINE, INK), (_FINE, PAPER)):  # seen on light and dark
        for row in range(1, view.slices[0]):
            draw.line((0, row * height * side, picture.width, row * height * side), fill=colour, width=size)
        for column in range(1, view.slices[1]):
            draw.line((column * width * side, 0, column * width * side, picture.height), fill=colour, width=size)


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
    if reading.absorbed:
        absorbed = _count(reading.absorbed, "patch", "patches")
        rows.append(("tint", DARK, f"discarded, merged into kept tokens: {absorbed}"))
    if dropped := len(reading.dark) - reading.absorbed:
        rows.append(("tint", DARK, f"dropped: {_count(dropped, 'patch', 'patches')}"))
    rows += [
        ("none", INK, f"{role_names[role]}, of no patch: {_count(number, 'token', 'tokens')}")
        for role, number in reading.of_no_patch.items()
    ]
    return rows


def _compose(
    panels: list[Image.Image],
    captions: list[str],
    across: int,
    question: str,
    answer: str,
    legend: list[tuple[str, str, str]],
) -> Image.Image:
    """Title, panels of one size with captions in rows of `across`, and the legend in two columns, or one if it must."""
    title_font, font, small = (ImageFont.load_default(size) for size in (24, 18, 16))
    across = min(across, len(panels))
    step_x = MARGIN + max(panels[0].width, *(int(font.getlength(caption)) + 1 for caption in captions))
    step_y = panels[0].height + 50
    width = max(MARGIN + across * step_x, 640)
    title = [
        (line, colour)
        for text, colour in ((question, INK), (answer, ACCENT))
        for line in _wrap(textwrap.shorten(text, _LONGEST_TITLE, placeholder=" …"), title_font, width - 2 * MARGIN)
    ]
    panels_top = MARGIN + 32 * len(title) + 14
    legend_top = panels_top + -(-len(panels) // across) * step_y
    longest = max((small.getlength(text) for *_, text in legend), default=0)
    legend_columns = 2 if longest + 30 + 10 <= (width - MARGIN) // 2 else 1
    height = legend_top + 30 * -(-len(legend) // legend_columns) + MARGIN - 8

    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for row, (line, colour) in enumerate(title):
        draw.text((MARGIN, MARGIN - 4 + 32 * row), line, colour, title_font)
    for index, (panel, caption) in enumerate(zip(panels, captions)):
        left, top = MARGIN + index % across * step_x, panels_top + index // across * step_y
        canvas.paste(panel, (left, top))
        draw.text((left, top + panel.height + 10), caption, INK, font)
    for index, (kind, colour, text) in enumerate(legend):
        row, column = divmod(index, legend_columns)
        left, top = MARGIN + column * (width - MARGIN) // 2, legend_top + row * 30
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
    elif kind == "heat":
        for x, shade in enumerate((255 * _heat_colours(torch.linspace(0, 1, 20))).int().tolist(), start=left):
            draw.line((x, top, x, top + 19), fill=tuple(shade))
    elif kind == "none":
        draw.line((left + 4, top + 10, left + 15, top + 10), fill=colour, width=2)
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
