"""LLaVA-Meteor's images: of any size, cut into views that are cut into patches."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.processing_utils import MultiModalData

from foveate.modeling.compatibility import AsksForPlaceholdersMixin
from foveate.modeling.layers.slices import SliceGrid, slice_grid
from foveate.processing.base import CompressionProcessorMixin


class MeteorProcessorMixin(CompressionProcessorMixin, AsksForPlaceholdersMixin):
    """Mixed into a processor, before its backbone's: as many placeholders as an image's views keep tokens, and one for
    every separator between slices.

    Args:
        num_visual_tokens: K, of every view; `None`: all its patches.
        others: as in `LlavaProcessor`.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        num_visual_tokens=None,
        **kwargs,
    ):
        self.num_visual_tokens = num_visual_tokens
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
        )

    def set_compression(self, settings):
        self.num_visual_tokens = settings.num_visual_tokens
        self.image_processor.max_slices = settings.max_slices

    def count_placeholders(self, image_size) -> int:
        """Columns of an image of (height, width) pixels."""
        grid = self.image_processor.grid_of(image_size)
        return grid.num_tokens(self.num_visual_tokens or grid.num_patches)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        return self.image_token * self.count_placeholders(image_inputs["image_sizes"][image_idx])

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        if image_sizes is None:
            return MultiModalData()
        counts = [self.count_placeholders(size) for size in image_sizes]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))


class LlavaMeteorImageProcessor(BaseImageProcessor):
    """Cuts images into views (`image_slices.py`), each resized to whole patches, and views into their patches.

    Args:
        view_size: side in pixels of the square whose area every view has, which is the vision tower's own.
        patch_size: side of a patch in pixels.
        max_slices: most slices of an image, beside the view of the whole.
        resample: filter of the resizing, as PIL numbers them; bicubic by default.
        rescale_factor, image_mean, image_std: as in `CLIPImageProcessor`.
    """

    model_input_names = ["pixel_values", "image_sizes"]

    def __init__(
        self,
        view_size: int = 336,
        patch_size: int = 14,
        max_slices: int = 6,
        resample: int = Image.Resampling.BICUBIC,
        rescale_factor: float = 1 / 255,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.view_size, self.patch_size, self.max_slices = view_size, patch_size, max_slices
        self.resample, self.rescale_factor = int(resample), rescale_factor
        self.image_mean = list(OPENAI_CLIP_MEAN if image_mean is None else image_mean)
        self.image_std = list(OPENAI_CLIP_STD if image_std is None else image_std)
        self.auto_map = {"AutoImageProcessor": f"processing_meteor.{type(self).__name__}"}

    @classmethod
    def of_stock(cls, stock: Any, config: Any) -> LlavaMeteorImageProcessor:
        """The one that goes with a base's image processor and a model's config."""
        names = ("resample", "rescale_factor", "image_mean", "image_std")
        return cls(
            view_size=config.vision_config.image_size,
            patch_size=config.vision_config.patch_size,
            max_slices=config.compression.max_slices,
            **{name: getattr(stock, name) for name in names if getattr(stock, name, None) is not None},
        )

    def grid_of(self, image_size: tuple[int, int]) -> SliceGrid:
        """The views of an image of (height, width) pixels."""
        return slice_grid(image_size, self.view_size, self.patch_size, self.max_slices)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs) -> BatchFeature:
        """
        Args:
            images: one image or a list of them: PIL, or arrays of 8-bit values or of floats from 0 to 1.

        Returns:
            `pixel_values` (images, most views, most patches, 3 · patch_size²), an image's own views first, their
            patches row after row, zeros beyond them; `image_sizes` (images, 2), height and width in pixels.
        """
        images = [_to_rgb(image) for image in (images if isinstance(images, (list, tuple)) else [images])]
        sizes = [(image.height, image.width) for image in images]
        grids = [self.grid_of(size) for size in sizes]
        most_views = max(grid.num_views for grid in grids)
        most_patches = max(rows * columns for grid in grids for rows, columns in grid.shapes)
        pixels = np.zeros((len(images), most_views, most_patches, 3 * self.patch_size**2), dtype=np.float32)
        for place, image, grid in zip(pixels, images, grids):
            overview = self._cut(image, 1, 1, grid.overview)
            place[:1, : overview.shape[1]] = overview
            if grid.num_slices:
                slices = self._cut(image, grid.rows, grid.columns, grid.slice_shape)
                place[1 : grid.num_views, : slices.shape[1]] = slices
        return BatchFeature({"pixel_values": pixels, "image_sizes": sizes}, tensor_type=return_tensors)

    def _cut(self, image: Image.Image, rows: int, columns: int, shape: tuple[int, int]) -> np.ndarray:
        """(views, patches, values of a patch in the order channel, row, column) of a grid of views of this shape."""
        side, (height, width) = self.patch_size, shape
        resized = image.resize((columns * width * side, rows * height * side), self.resample)
        values: np.ndarray = np.asarray(resized, dtype=np.float32) * self.rescale_factor
        values = (values - np.asarray(self.image_mean, np.float32)) / np.asarray(self.image_std, np.float32)
        cut = values.reshape(rows, height, side, columns, width, side, 3)
        return cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, height * width, 3 * side**2)

    def put_together(self, views: np.ndarray, rows: int, columns: int, shape: tuple[int, int]) -> np.ndarray:
        """The picture that a grid of views was cut from, (height, width, 3) from 0 to 1: the other way round."""
        side, (height, width) = self.patch_size, shape
        cut = views.reshape(rows, columns, height, width, 3, side, side).transpose(0, 2, 5, 1, 3, 6, 4)
        whole = cut.reshape(rows * height * side, columns * width * side, 3)
        return whole * np.asarray(self.image_std, np.float32) + np.asarray(self.image_mean, np.float32)


def _to_rgb(image: Any) -> Image.Image:
    image = image if isinstance(image, Image.Image) else to_pil_image(image)
    return image if image.mode == "RGB" else image.convert("RGB")
