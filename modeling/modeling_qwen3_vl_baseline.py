"""Qwen3-VL with a training-free baseline: random pruning, equidistant sampling or spatial
pooling.

What is taken of a visual token is taken of all that belongs to it: of what DeepStack adds in the first layers, and of
its place in the image's grid, which a mean rounds.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Cache, Qwen3VLForConditionalGeneration, Qwen3VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLPreTrainedModel

from foveate.configuration.configuration_qwen3_vl_baseline import Qwen3VLBaselineConfig
from foveate.modeling.backbones.qwen_vl import Qwen3VLGenerationMixin, Qwen3VLModelMixin
from foveate.modeling.compatibility import image_fields, without_cache_positions
from foveate.modeling.core.base import CompressedGenerationMixin, CompressedModelOutputWithPast
from foveate.modeling.core.compressed_image import CompressedImage
from foveate.modeling.core.deferred import LogicalGenerationMixin
from foveate.modeling.core.exact import CompressedImages
from foveate.modeling.core.image_inputs import ImageInputsMixin, locate_images
from foveate.modeling.core.placed import PlacedModelMixin
from foveate.modeling.core.positions import grid_positions
from foveate.modeling.methods.baselines import BaselineModelMixin


class Qwen3VLBaselineModel(Qwen3VLModelMixin, BaselineModelMixin, PlacedModelMixin, Qwen3VLModel):
    """The stock model, with fewer tokens an image."""

    config_class = Qwen3VLBaselineConfig

    def read_sequences(self, pixel_values, image_grid_thw):
        """Of each image (n, width · (1 + layers of DeepStack) + 4): its visual tokens, what is added to them in the
        first layers, their row and column, and its grid's height and width."""
        sequences, deepstack, grids = self.read_images(pixel_values, image_grid_thw)
        lengths = [len(tokens) for tokens in sequences]
        number = torch.tensor(lengths, device=grids.device)
        grid = grids.repeat_interleave(number, 0)
        offset = torch.arange(len(grid), device=grids.device) - (number.cumsum(0) - number).repeat_interleave(number)
        places = torch.stack([offset // grid[:, 1], offset % grid[:, 1]], dim=1)
        tokens = torch.cat(sequences)
        # float32: bfloat16 has no room for places beyond 256.
        joined = torch.cat([tokens.float(), *(layer.float() for layer in deepstack), places.to(tokens.device)], dim=1)
        joined = torch.cat([joined, grid.to(joined)], dim=1)
        return list(joined.split(lengths))

    def compress_images(self, pixel_values=None, image_grid_thw=None, *, trace=False) -> CompressedImages:
        """Encodes images and compresses their sequences; tokens as in `read_sequences`."""
        sequences = self.read_sequences(pixel_values, image_grid_thw)
        images = pixel_values.split(image_grid_thw.prod(-1).tolist())
        keys = torch.cat([self.image_keys(patches[None], 1) for patches in images])
        return self._compress(sequences, keys, trace, None)

    def get_image_features(self, pixel_values, image_grid_thw=None, **kwargs):
        """The stock model's, uncompressed: what DeepStack adds and the places of tokens belong to them."""
        return Qwen3VLModel.get_image_features(self, pixel_values, image_grid_thw, **kwargs)

    def compress(
        self, input_ids=None, attention_mask=None, *, pixel_values, image_grid_thw, **_
    ) -> list[CompressedImage]:
        """As in [`SequenceModelMixin`]; an image's embeddings bring along what DeepStack adds to them, and places."""
        with torch.no_grad():
            compressed = self.compress_images(pixel_values, image_grid_thw)
        return self._as_compressed_images(compressed)

    def _width(self) -> int:
        return self.config.text_config.hidden_size * (1 + len(self.config.vision_config.deepstack_visual_indexes)) + 4

    def _run_prompt(
        self,
        images: dict[str, torch.Tensor | None],
        compressed_images: list[CompressedImage] | None,
        *,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        output_compression: bool,
        **kwargs,
    ) -> CompressedModelOutputWithPast:
        kwargs = without_cache_positions(kwargs)
        inputs_embeds, present, logical = self._open_columns(input_ids, inputs_embeds, attention_mask, cache, use_cache)
        has_images = images["pixel_values"] is not None
        if has_images and compressed_images is not None:
            raise ValueError("Pass pixel_values or compressed_images, not both.")
        if compressed_images is not None:
            sequences = self._sequences_of(compressed_images)
            tokens = torch.cat(sequences).to(inputs_embeds.device)
            compressed = CompressedImages(tokens, [len(tokens) for tokens in sequences])
        elif has_images:
            compressed = self.compress_images(**images, trace=output_compression)
        else:
            self._check_text_alone(input_ids, logical)
            return self._run_columns(inputs_embeds, present, logical, **kwargs)
        columns = self._columns_of(compressed.tokens, input_ids, inputs_embeds)
        placed = compressed.tokens[:, -4:].round().long()
        positions = self._positions(columns[..., 0], present, compressed.counts, placed)
        tokens, *deepstack = (
            compressed.tokens[:, :-4]
            .to(inputs_embeds.dtype)
            .chunk(1 + len(self.config.vision_config.deepstack_visual_indexes), dim=1)
        )
        output = self._run_columns(
            inputs_embeds.masked_scatter(columns, tokens),
            present,
            logical,
            positions,
            visual_pos_masks=columns[..., 0],
            deepstack_visual_embeds=deepstack,
            **kwargs,
        )
        return CompressedModelOutputWithPast(
            **output, **image_fields(tokens.split(compressed.counts)), compression=compressed.provenance
        )

    @staticmethod
    def _positions(
        is_visual: torch.Tensor, present: torch.Tensor | None, counts: list[int], placed: torch.Tensor
    ) -> torch.Tensor:
        """(3, batch, columns).

        Args:
            is_visual: (batch, columns) bool.
            present: likewise, or `None` for all.
            counts: tokens of each image.
            placed: (tokens, 4), row, column, and height and width of the grid.
        """
        number = torch.tensor(counts, device=placed.device)
        rows, first = locate_images(is_visual, number)
        extents = torch.zeros_like(is_visual, dtype=torch.int64)
        ends = number.cumsum(0) - 1
        extents[rows, first + number - 1] = placed[ends, 2:].amax(1)
        places = torch.zeros((2, *is_visual.shape), dtype=torch.int64, device=placed.device)
        places[:, is_visual] = placed[:, :2].T
        there = torch.ones_like(is_visual) if present is None else present
        return grid_positions(there, is_visual, places, extents)


class Qwen3VLBaselineForConditionalGeneration(
    Qwen3VLGenerationMixin,
    LogicalGenerationMixin,
    ImageInputsMixin,
    CompressedGenerationMixin,
    Qwen3VLForConditionalGeneration,
):
    """[`Qwen3VLBaselineModel`] with a language modeling head."""

    config_class = Qwen3VLBaselineConfig

    def __init__(self, config: Qwen3VLBaselineConfig):
        Qwen3VLPreTrainedModel.__init__(self, config)  # not the stock class's: it would build the stock model first
        self.model = Qwen3VLBaselineModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def compress(self, *args, **kwargs) -> list[CompressedImage]:
        return self.model.compress(*args, **kwargs)


__all__ = ["Qwen3VLBaselineForConditionalGeneration", "Qwen3VLBaselineModel"]
