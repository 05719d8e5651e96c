"""LLaVA-NeXT with QG-VTC (Li et al., "QG-VTC: Question-Guided Visual Token Compression in MLLMs for Efficient VQA"):
every tile of an image is compressed with the same question.

The tokens that are left stand where they stood, in the rows of the grid, and every row keeps the newline token that
ends it. Padding is discarded before anything else, so the number of tokens follows from the image's size.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import LlavaNextPreTrainedModel

from foveate.configuration.configuration_llava_next_qgvtc import LlavaNextQGVTCConfig
from foveate.modeling.compatibility import register_key_mapping
from foveate.modeling.core.base import TokenProvenance
from foveate.modeling.core.exact import CompressedImages
from foveate.modeling.layers.tile_layout import TileLayout, tile_grid_of
from foveate.modeling.methods.qgvtc import ROLE_NAMES, QGVTCGenerationMixin, QGVTCModelMixin


class LlavaNextQGVTCModel(QGVTCModelMixin, LlavaNextModel):
    """The question's text encoder, the guided vision tower, the projector and the language model."""

    config_class = LlavaNextQGVTCConfig

    def __init__(self, config: LlavaNextQGVTCConfig):
        super().__init__(config)
        self._add_question_modules(config)
        self.post_init()

    def compress_images(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        *,
        trace: bool = False,
    ) -> CompressedImages:
        """Encodes images, every tile of each compressed by its question.

        Args:
            pixel_values: (images, most tiles, 3, height, width), an image's own tiles first.
            image_sizes: (images, 2), height and width in pixels.
            question_input_ids, question_attention_mask: (images, 77), from the processor.
            trace: whether to say what the tokens are made of.
        """
        layout = TileLayout([tile_grid_of(self.config, size) for size in image_sizes.tolist()], pixel_values.device)
        tiles = pixel_values.flatten(0, 1)[layout.rows_of_tiles(pixel_values.shape[1])]
        encoded = self._encode_images(
            tiles,
            question_input_ids,
            question_attention_mask,
            per_image=layout.image_of_tile,
            selectable=layout.is_image(),
            trace=trace,
        )
        order = layout.order(encoded.positions)
        tokens = self.multi_modal_projector(encoded.features).flatten(0, 1)
        newlines = self.image_newline.to(tokens)[None].expand(layout.num_newlines, -1)
        counts = [grid.num_tokens(self.config.compression.num_visual_tokens) for grid in layout.grids]
        provenance = self._provenance(layout, encoded, order, counts) if trace else None
        return CompressedImages(torch.cat([tokens, newlines])[order], counts, provenance)

    def _provenance(self, layout, encoded, order, counts) -> list[TokenProvenance]:
        """Of every image; its patches are those of all its tiles, tile after tile. A newline is made of none."""
        num_patches, found, first_tile = self.config.num_patches, [], 0
        num_tokens = encoded.positions.shape[1]
        for grid, chosen in zip(layout.grids, order.split(counts)):
            tiles = slice(first_tile, first_tile + grid.num_tiles)
            of_tiles = torch.block_diag(*encoded.weights[tiles])  # (tiles · M, tiles · patches)
            index = chosen - first_tile * num_tokens
            is_newline = chosen >= layout.num_tiles * num_tokens
            weights = of_tiles[index.masked_fill(is_newline, 0)].masked_fill(is_newline[:, None], 0)
            roles = torch.full_like(index, self._role()).masked_fill(is_newline, len(ROLE_NAMES) - 1)
            offsets = torch.arange(grid.num_tiles, device=order.device)[:, None] * num_patches
            steps = tuple((f"layer {layer}", (kept[tiles] + offsets).flatten()) for layer, kept in encoded.steps)
            found.append(TokenProvenance(weights, roles, ROLE_NAMES, steps))
            first_tile += grid.num_tiles
        return found


class LlavaNextQGVTCForConditionalGeneration(QGVTCGenerationMixin, LlavaNextForConditionalGeneration):
    """[`LlavaNextQGVTCModel`] with a language modeling head."""

    config_class = LlavaNextQGVTCConfig

    def __init__(self, config: LlavaNextQGVTCConfig):
        LlavaNextPreTrainedModel.__init__(self, config)  # not the stock class's: it would build the stock model first
        self.model = LlavaNextQGVTCModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def count_placeholders(self, images: dict[str, torch.Tensor]) -> torch.Tensor:
        number = self.config.compression.num_visual_tokens
        counts = [tile_grid_of(self.config, size).num_tokens(number) for size in images["image_sizes"].tolist()]
        return torch.tensor(counts, device=images["pixel_values"].device)


register_key_mapping(
    LlavaNextQGVTCModel,
    LlavaNextQGVTCForConditionalGeneration,
    base_model_type="llava_next",
    own_keys=("question_encoder", "question_projector"),
)

__all__ = ["LlavaNextQGVTCForConditionalGeneration", "LlavaNextQGVTCModel"]
