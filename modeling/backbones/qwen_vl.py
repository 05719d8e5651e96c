"""Qwen3-VL: an image has a size of its own, its tokens have places in it (M-RoPE), and the first layers of the language
model read more of them (DeepStack). All of that goes with the tokens that are left."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin

from foveate.modeling.backbones.any import AnyBackboneMixin
from foveate.modeling.compatibility import image_fields, stock_deepstack_features, takes_cache, without_cache_positions
from foveate.modeling.core.base import stock_class
from foveate.modeling.core.declarations import Backbone
from foveate.modeling.core.deferred import DeferredGenerationMixin, OwnPositionsModelMixin, grid_positions
from foveate.modeling.core.image_inputs import locate_images
from foveate.modeling.core.outputs import CompressedModelOutputWithPast, VisualTokens


class Qwen3VLBackboneMixin(AnyBackboneMixin, OwnPositionsModelMixin):
    """On Qwen3-VL. Position ids can't be counted from the columns, so the cache keeps them ([`LogicalCache`])."""

    visual_inputs = ("pixel_values", "image_grid_thw")

    @property
    def num_deepstack_layers(self) -> int:
        return len(self.config.vision_config.deepstack_visual_indexes)

    def read_images(self, images):
        pixel_values, grids = images["pixel_values"], images["image_grid_thw"]
        if grids is None:
            raise ValueError("pixel_values need image_grid_thw: pass what the processor returns.")
        sequences, deepstack = stock_deepstack_features(
            stock_class(type(self)), self, pixel_values=pixel_values, image_grid_thw=grids
        )
        lengths = [len(tokens) for tokens in sequences]
        grids = grids[:, 1:] // self.config.vision_config.spatial_merge_size
        number = torch.tensor(lengths, device=grids.device)
        widths = grids[:, 1].repeat_interleave(number)
        offset = torch.arange(len(widths), device=grids.device) - (number.cumsum(0) - number).repeat_interleave(number)
        places = torch.stack([offset // widths, offset % widths], dim=1)
        return VisualTokens(torch.cat(sequences), lengths, deepstack, places, grids)

    def crop_lengths(self, images):
        merge = self.config.vision_config.spatial_merge_size
        return [([length], 0) for length in (images["image_grid_thw"].prod(-1) // merge**2).tolist()]

    def take_images(self, images, chosen):
        """The patches of all images lie in one tensor."""
        grids, pixels = images.get("image_grid_thw"), images.get("pixel_values")
        if grids is None or pixels is None:
            return super().take_images(images, chosen)
        pieces = pixels.split(grids.prod(-1).tolist())
        taken = torch.cat([pieces[index] for index in chosen.tolist()])
        return {**images, "pixel_values": taken, "image_grid_thw": grids[chosen.to(grids.device)]}

    @takes_cache
    def run_with_images(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        images: VisualTokens | None,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CompressedModelOutputWithPast:
        kwargs = self.without_unread_inputs(kwargs)
        inputs_embeds, present, logical = self._open_columns(None, inputs_embeds, attention_mask, cache, use_cache)
        if images is None:
            self._check_text_alone(input_ids, logical)
            return self._run_columns(inputs_embeds, present, logical, **kwargs)
        device, dtype = inputs_embeds.device, inputs_embeds.dtype
        columns = self._columns_of(images.tokens, input_ids, inputs_embeds)
        images.tokens = images.tokens.to(device, dtype)
        positions = _positions(columns[..., 0], present, images)
        output = self._run_columns(
            inputs_embeds.masked_scatter(columns, images.tokens),
            present,
            logical,
            positions,
            visual_pos_masks=columns[..., 0],
            deepstack_visual_embeds=[layer.to(device, dtype) for layer in images.deepstack],
            **kwargs,
        )
        fields = image_fields(images.tokens.split(images.lengths))
        return CompressedModelOutputWithPast(**output, **fields, compression=images.provenance)

    def without_unread_inputs(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments for the language model. Position ids and token types follow from the columns."""
        if any(arguments.pop(name, None) is not None for name in ("pixel_values_videos", "video_grid_thw")):
            raise ValueError("This model takes images, not videos yet: pass single frames as images.")
        unread = ("position_ids", "mm_token_type_ids")
        return without_cache_positions({name: given for name, given in arguments.items() if name not in unread})

    def _position_ids(self, positions: torch.Tensor) -> torch.Tensor:
        return positions.expand(3, -1, -1)


class Qwen3VLGenerationMixin(DeferredGenerationMixin):
    """Mixed into the model with a head, before its method's mixin."""

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        # Newer 5.x lay out the grids of images here, uncompressed; `forward` does it itself.
        return GenerationMixin._prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs)


def _positions(is_visual: torch.Tensor, present: torch.Tensor | None, images: VisualTokens) -> torch.Tensor:
    """Position ids in time, height and width, (3, batch, columns).

    Args:
        is_visual: (batch, columns) bool.
        present: likewise, or `None` for all.
        images: with places and grids.
    """
    device = is_visual.device
    number = torch.tensor(images.lengths, device=device)
    rows, first = locate_images(is_visual, number)
    extents = torch.zeros_like(is_visual, dtype=torch.int64)
    extents[rows, first + number - 1] = images.grids.to(device).amax(1)  # type: ignore[union-attr]
    places = torch.zeros((2, *is_visual.shape), dtype=torch.int64, device=device)
    places[:, is_visual] = images.places.to(device).T  # type: ignore[union-attr]
    there = torch.ones_like(is_visual) if present is None else present
    return grid_positions(there, is_visual, places, extents)


BACKBONE = Backbone(
    model_type="qwen3_vl",
    stem="Qwen3VL",
    title="Qwen3-VL",
    mixin=Qwen3VLBackboneMixin,
    generation_mixin=Qwen3VLGenerationMixin,
)
