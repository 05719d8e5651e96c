"""One question about one image: the answer, and what compression saves beside the uncompressed model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from foveate.errors import FoveateError
from foveate.evaluation.examples import DrawnPicture, PictureSource
from foveate.evaluation.harness import Checkpoint, open_checkpoint, require_writable, visual_tokens_kept
from foveate.evaluation.picture import SeenImage, draw_compression, pixels_of_patches, seen_image, seen_slices
from foveate.modeling.compatibility import cache_of, iterate_cache_tensors
from foveate.modeling.core.account import kv_bytes_by_account
from foveate.modeling.core.outputs import TokenProvenance
from foveate.modeling.core.precision import dtype_name
from foveate.modeling.layers.tiles import TileGrid, TileLayout, tile_grid
from foveate.plugins import PICTURES_GROUP, find_plugin


_NUM_TIMINGS = 3


@dataclass(frozen=True)
class Answer:
    """What [`ask`] found out. Times are medians after a warm-up, measured side by side in one process.

    Attributes:
        answer: the model's words.
        visual_tokens_before, visual_tokens_after: of the image in the language model, without and with compression.
        time_to_first_token: seconds from model inputs to the first token, vision tower and text encoder included.
        kv_bytes: size of the KV cache after the prompt.
        kv_bytes_uncompressed: what an uncompressed model's cache holds by account, from the config and the tokens.
        dtype, device: what was computed in, and on which kind of device; of the base as well.
        base_answer, base_visual_tokens, base_time_to_first_token, base_kv_bytes: of the base that was compared with,
            else `None`.
        picture: the file that shows what became of each patch, else `None`.
    """

    question: str
    answer: str
    visual_tokens_before: int
    visual_tokens_after: int
    time_to_first_token: float
    kv_bytes: int
    kv_bytes_uncompressed: int
    dtype: str
    device: str
    base_answer: str | None = None
    base_visual_tokens: int | None = None
    base_time_to_first_token: float | None = None
    base_kv_bytes: int | None = None
    picture: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def ask(
    checkpoint: str | Path,
    image: str | Path | Image.Image,
    question: str,
    compare: str | Path | None = None,
    show: str | Path | None = None,
    max_new_tokens: int = 32,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> Answer:
    """Asks a checkpoint a question about an image.

    Args:
        checkpoint: a folder, a hub id, or `lab:NAME`; compressed, or a base.
        image: a path, a picture, or `lab:NUMBER`, `lab-next:NUMBER` or `lab-sliced:NUMBER` for a test scene of the lab.
        question: what to ask; it also guides the compression where the method is guided.
        compare: a checkpoint of the uncompressed model that is asked and timed as well, in the same dtype.
        show: where to save a picture of what became of each patch.
        max_new_tokens: longest answer.
        dtype, device: as in [`open_checkpoint`].

    Raises:
        FoveateError: no question, an image that can't be read, a checkpoint that can't be loaded, a picture that can't
            be saved under that name, an image in which nothing could be seen.
    """
    if not question.strip():
        raise FoveateError("There is no question: say what you want to know about the image.")
    if max_new_tokens < 1:
        raise FoveateError(f"max_new_tokens is {max_new_tokens}: it has to be at least 1.")
    if show is not None:
        _require_picture_name(Path(show))
    picture = open_image(image)
    asked = _Asked(open_checkpoint(checkpoint, dtype=dtype, device=device), picture, question)
    base = None
    if compare is not None:
        base = _Asked(open_checkpoint(compare, dtype=asked.model.dtype, device=device), picture, question)

    times = _times_to_first_token([asked, base] if base else [asked])
    before = asked.visual_tokens_before
    answer = asked.answer(max_new_tokens)
    if show is not None:
        drawn = draw_compression(asked.seen(), asked.provenance(), question, answer)
        Path(show).parent.mkdir(parents=True, exist_ok=True)
        drawn.save(show)
    return Answer(
        question=question,
        answer=answer,
        visual_tokens_before=before,
        visual_tokens_after=asked.visual_tokens,
        time_to_first_token=times[0],
        kv_bytes=asked.kv_bytes,
        kv_bytes_uncompressed=kv_bytes_by_account(
            asked.model.config.text_config, asked.num_text_tokens + before, asked.model.dtype
        ),
        dtype=dtype_name(asked.model.dtype),
        device=asked.model.device.type,
        base_answer=base.answer(max_new_tokens) if base else None,
        base_visual_tokens=base.visual_tokens if base else None,
        base_time_to_first_token=times[1] if base else None,
        base_kv_bytes=base.kv_bytes if base else None,
        picture=str(show) if show is not None else None,
    )


def _require_picture_name(path: Path) -> None:
    if path.suffix.lower() not in Image.registered_extensions():
        raise FoveateError(f"{path} is no name for a picture: let it end in .png.")
    require_writable(path)


class _Asked:
    """A checkpoint with the inputs of one question."""

    def __init__(self, checkpoint: Checkpoint, image: Image.Image, question: str):
        self.checkpoint, self.model, self.image = checkpoint, checkpoint.model, image
        content = [{"type": "image"}, {"type": "text", "text": question}]
        self.inputs = checkpoint.encode([[{"role": "user", "content": content}]], [image])
        self.kv_bytes = self.visual_tokens = 0  # known after the first token

    @property
    def is_placeholder(self) -> torch.Tensor:
        """(1, prompt length) bool."""
        return self.inputs["input_ids"] == self.model.config.image_token_id

    @property
    def num_text_tokens(self) -> int:
        return int((~self.is_placeholder).sum())

    @property
    def visual_tokens_before(self) -> int:
        if self.checkpoint.is_compressed:
            return self.checkpoint.uncompressed_visual_tokens(self.image)
        return int(self.is_placeholder.sum())

    @property
    def grid(self) -> TileGrid | None:
        """Of the image's tiles; `None` where the backbone has no tiles."""
        config = self.model.config
        if not hasattr(config, "image_grid_pinpoints"):
            return None
        vision, size = config.vision_config, self.inputs["image_sizes"][0].tolist()
        return tile_grid(size, config.image_grid_pinpoints, vision.image_size, vision.patch_size)

    def generate(self, max_new_tokens: int) -> Any:
        pad = self.checkpoint.processor.tokenizer.pad_token_id
        return self.model.generate(
            **self.inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            return_dict_in_generate=True,
        )

    def first_token(self) -> float:
        """Seconds to the first token. What the prompt left in the cache is counted on the way."""
        start = time.perf_counter()
        output = self.generate(1)
        output.sequences.cpu()  # waits for the device
        seconds = time.perf_counter() - start
        cache: Any = cache_of(output)
        self.kv_bytes = sum(tensor.nbytes for tensor in iterate_cache_tensors(cache))
        self.visual_tokens = int(visual_tokens_kept(cache, self.is_placeholder))
        return seconds

    def answer(self, max_new_tokens: int) -> str:
        sequences = self.generate(max_new_tokens).sequences
        return self.checkpoint.decode(sequences, self.inputs["input_ids"].shape[1])[0]

    def seen(self) -> SeenImage:
        """The image as the vision tower sees it; where it merges patches, each is a merged token."""
        image_processor, vision = self.checkpoint.processor.image_processor, self.model.config.vision_config
        if "image_grid_thw" in self.inputs:
            patches, grid_thw = self.inputs["pixel_values"], self.inputs["image_grid_thw"][0]
            pixels = pixels_of_patches(patches, grid_thw, image_processor)
            return seen_image(pixels, image_processor, vision.patch_size * vision.spatial_merge_size)
        if hasattr(image_processor, "grid_of"):
            grid = image_processor.grid_of(self.inputs["image_sizes"][0].tolist())
            return seen_slices(self.inputs["pixel_values"], image_processor, grid)
        return seen_image(self.inputs["pixel_values"], image_processor, vision.patch_size, self.grid)

    def provenance(self) -> TokenProvenance:
        """What the visual tokens are made of; in a model that doesn't compress, each of one patch."""
        if self.checkpoint.is_compressed:
            return self.model(**self.inputs, output_compression=True, logits_to_keep=1).compression[0]
        return _uncompressed_provenance(int(self.is_placeholder.sum()), self.grid)


def _uncompressed_provenance(num_tokens: int, grid: TileGrid | None) -> TokenProvenance:
    """Each token is a patch, but for the newlines that end the rows of a grid; padding is in no token."""
    role_names = "dropped", "kept", "end of a row"
    if grid is None:
        return TokenProvenance(torch.eye(num_tokens), torch.ones(num_tokens, dtype=torch.long), role_names)
    patches = torch.arange(grid.side**2).expand(grid.num_tiles, -1)
    order = TileLayout([grid], torch.device("cpu")).order(patches)  # newlines are counted after all patches
    weights = torch.eye(patches.numel() + grid.num_newlines)[order, : patches.numel()]
    return TokenProvenance(weights, 2 - weights.any(1).long(), role_names)


def _times_to_first_token(asked: Iterable[_Asked]) -> list[float]:
    """Median seconds of each; they take turns, so that what else the machine does falls on all of them."""
    rounds = [[one.first_token() for one in asked] for _ in range(1 + _NUM_TIMINGS)][1:]
    return [statistics.median(times) for times in zip(*rounds)]


def open_image(image: str | Path | Image.Image) -> Image.Image:
    """A picture the right way up, from a path, `lab:NUMBER`, a larger scene (`lab-next:NUMBER`, `lab-sliced:NUMBER`) or
    a picture.

    Raises:
        FoveateError: there is no such file, or it is not an image, or a damaged one.
    """
    if isinstance(image, str) and (drawn := draw_picture(image)) is not None:
        return drawn.image
    try:
        picture = image if isinstance(image, Image.Image) else Image.open(Path(image).expanduser())
        return ImageOps.exif_transpose(picture)  # reads it to the end
    except UnidentifiedImageError as error:
        raise FoveateError(f"{image} is not an image in a format that can be read.") from error
    except Image.DecompressionBombError as error:
        raise FoveateError(f"{image} has too many pixels to be opened safely: make it smaller first.") from error
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: what Pillow calls a broken PNG
        reason = getattr(error, "strerror", None) or error
        raise FoveateError(f"The image {image} can't be read: {reason}.") from error


def draw_picture(name: str) -> DrawnPicture | None:
    """What is plugged in under `NAME:NUMBER` (see `plugins.py`); `None` where that names no picture to draw.

    Raises:
        FoveateError: it does, but for the number.
    """
    world, colon, number = name.partition(":")
    source: PictureSource | None = find_plugin(PICTURES_GROUP, world) if colon else None
    if source is None:
        return None
    if not number.isdecimal():
        raise FoveateError(f"{name} is no {source.title}: give a number, for instance {world}:0.")
    return source.draw(int(number))
