"""A backbone by the doors that vision-language models of Transformers have in common.

1. Images come in through `get_image_features`, whose tokens the stock `forward` puts at their placeholders.
2. The processor writes the placeholders (`processing/any.py`).
3. Where positions have several axes (M-RoPE), `get_rope_index` lays an image out.
"""

from __future__ import annotations

from inspect import signature as signature_of
from typing import Any

import torch

from foveate.modeling.compatibility import are_stacked, deepstack_layers, image_sequences, without_cache_positions
from foveate.modeling.core.base import CompressedModelMixin, stock_class
from foveate.modeling.core.outputs import Images, TokenProvenance, VisualTokens
from foveate.modeling.layers.crops import Crops


class AnyBackboneMixin(CompressedModelMixin):
    """Mixed into a model without a head, between a method's mixin and the Transformers class."""

    @property
    def num_deepstack_layers(self) -> int:
        """Layers of the language model that read something of the visual tokens besides."""
        return len(getattr(getattr(self.config, "vision_config", None), "deepstack_visual_indexes", ()))

    @property
    def crop_length(self) -> int | None:
        """Visual tokens of a tile, where the stock model gives those of several tiles as one."""
        return None

    @property
    def num_position_axes(self) -> int:
        """Numbers that a position consists of."""
        return 3 if hasattr(stock_class(type(self)), "get_rope_index") else 1

    @property
    def keeps_places(self) -> bool:
        """Whether a token keeps the place that it has in the uncompressed image: as the settings say, or else where
        the picture has rows and columns of positions."""
        given = getattr(self.config.compression, "positions", None)
        return self.num_position_axes > 1 if given is None else given == "original"

    @property
    def lays_out_positions(self) -> bool:
        """Whether position ids have to be made, since counting columns is not right."""
        return self.keeps_places or self.num_position_axes > 1

    def read_images(self, images: Images) -> VisualTokens:
        """The stock model's visual tokens."""
        given = {name: images[name] for name in self.visual_inputs if images.get(name) is not None}
        features = stock_class(type(self)).get_image_features(self, **given)
        sequences = image_sequences(features)
        if self.crop_length is not None:
            sequences = [tile for tiles in sequences for tile in tiles.split(self.crop_length) if len(tile)]
        lengths = [len(tokens) for tokens in sequences]
        found = VisualTokens(torch.cat(sequences), lengths, deepstack_layers(features), output=features)
        found.stacked = are_stacked(features)
        if self.keeps_places:
            found.places, found.extents = self.lay_out(lengths, images)
        return found

    def pixels_of(self, images: Images, number: int) -> Any:
        """The pixels that each image's tokens are of, one entry an image: a tensor, or several where sizes differ.

        Args:
            number: of images, as the stock model counts them.
        """
        pixels = images["pixel_values"]
        grids, sizes = images.get("image_grid_thw"), images.get("target_sizes")
        if grids is not None:  # the patches of all images lie in one tensor
            pixels = pixels.split(grids.prod(-1).tolist())
        elif sizes is not None:  # likewise, side by side
            pixels = pixels.split((sizes.prod(-1) * pixels.shape[-2]).tolist(), dim=-1)
        elif len(pixels) != number and pixels.dim() == 5:  # tiles of each row, filled up with empty ones
            tiles = pixels.flatten(0, 1)
            pixels = tiles[tiles.flatten(1).any(1)]
        if len(pixels) != number:
            raise ValueError(
                f"Which pixels each of the {number} images has is not known of this model, and the method "
                f"'{self.config.compression.method}' draws by them: choose another one, 'sample' for instance."
            )
        return pixels

    def lay_out(self, lengths: list[int], images: Images) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the tokens of images lie, counted from where each begins, (tokens of all images, axes), and how far
        from there the text goes on, (images,); as the stock model has it.

        Args:
            lengths: visual tokens of each image without compression.
            images: what the processor returns for them.
        """
        layout = [images.get(name) for name in self.visual_inputs[1:]]
        device = next((value.device for value in layout if torch.is_tensor(value)), torch.device("cpu"))
        number = torch.tensor(lengths, device=device)
        column = torch.arange(max(lengths) + 2, device=device).expand(len(lengths), -1)
        if self.num_position_axes == 1:
            return column[column < number[:, None]][:, None], number
        # Every image alone in a row: what opens an image, its placeholders, and a column of text.
        is_image, is_there = (column > 0) & (column <= number[:, None]), column <= number[:, None] + 1
        special = {getattr(self.config, f"{name}_token_id", None) for name in ("image", "video", "vision_start")}
        text = next(index for index in range(4) if index not in special)
        opening = getattr(self.config, "vision_start_token_id", None)
        row = torch.where(is_image, self.config.image_token_id, text)
        row[:, 0] = text if opening is None else opening
        inputs = {
            "input_ids": row,
            "mm_token_type_ids": is_image.int(),
            "attention_mask": is_there.long(),
            **dict(zip(self.visual_inputs[1:], layout)),
        }
        stock = stock_class(type(self))
        known = signature_of(stock.get_rope_index).parameters
        taken = {name: value for name, value in inputs.items() if name in known}
        positions = stock.get_rope_index(self, **taken)[0] - 1  # the image begins at 1
        return positions[:, is_image].T.long(), positions[0].long().gather(1, number[:, None] + 1)[:, 0]

    def finish_images(self, compressed: VisualTokens, images: Images) -> VisualTokens:
        """What else has to be done with the tokens of images that were compressed."""
        return compressed

    def crop_lengths(self, images: Images) -> list[tuple[list[int], int]]:
        """For each image the visual tokens of its crops without compression, and how many separators stand between
        them, from its inputs alone; of backbones where that is known. Raises `ValueError` where it isn't."""
        raise ValueError(
            f"How many visual tokens an image of a '{self.config.model_type}' has without compression is not known "
            "from its inputs, which training by distillation and evaluation need: LLaVA-1.5, LLaVA-NeXT, Qwen3-VL tell."
        )

    @property
    def counts_images(self) -> bool:
        """Whether `crop_lengths` is known."""
        return type(self).crop_lengths is not AnyBackboneMixin.crop_lengths

    def count_placeholders(self, images: Images) -> torch.Tensor:
        """Columns that each image takes in a prompt, (images,)."""
        settings = self.config.compression
        counts = [settings.count_placeholders(*lengths, num_separators=n) for lengths, n in self.crop_lengths(images)]
        return torch.tensor(counts, device=images["pixel_values"].device)

    def without_unread_inputs(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call that are the language model's, where the model lays out columns by itself."""
        return without_cache_positions(arguments)

    def take_images(self, images: dict[str, Any], chosen: torch.Tensor) -> dict[str, Any]:
        """The inputs of some images, (indices,), at least one."""
        return {name: None if value is None else _entries(value, chosen) for name, value in images.items()}

    def patches_of(self, matrices: list[torch.Tensor], images: Images) -> list[torch.Tensor]:
        """(m, n) over the visual tokens of each image → (m, patches) over its patches."""
        return matrices

    def cut_images(self, images: Images) -> Crops:
        """The pictures that the vision tower sees."""
        return Crops(images["pixel_values"])

    def join_crops(self, crops: Crops, features: torch.Tensor, positions: torch.Tensor) -> VisualTokens:
        """Projects what is left of each crop, and puts it in the order in which the language model reads it.

        Args:
            crops: from `cut_images`.
            features: (crops, M, width of the vision tower).
            positions: (crops, M), the patch that each was.
        """
        tokens = self.multi_modal_projector(features)
        return VisualTokens(tokens.flatten(0, 1), [tokens.shape[1]] * len(tokens))

    def join_provenance(
        self,
        crops: Crops,
        positions: torch.Tensor,
        weights: torch.Tensor,
        steps: list[tuple[int, torch.Tensor]],
        role: int,
        role_names: tuple[str, ...],
    ) -> list[TokenProvenance]:
        """Of every image; its patches are those of all its crops, crop after crop.

        Args:
            crops, positions: as in `join_crops`.
            weights: (crops, M, patches).
            steps: for each layer that compresses its index and the patches that it kept, (crops, k).
            role: of what is kept, in `role_names`; a separator's is the last.
        """
        roles = torch.full_like(positions[0], role)
        return [
            TokenProvenance(of_image, roles, role_names, tuple((f"layer {layer}", kept[i]) for layer, kept in steps))
            for i, of_image in enumerate(weights)
        ]


def _entries(value: Any, chosen: torch.Tensor) -> Any:
    return value[chosen.to(value.device)] if torch.is_tensor(value) else [value[index] for index in chosen.tolist()]
