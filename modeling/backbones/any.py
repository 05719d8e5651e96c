"""A backbone by the doors that vision-language models of Transformers have in common: images come in through
`get_image_features`, and the stock `forward` runs on embeddings in which their tokens stand at the placeholders."""

from __future__ import annotations

from typing import Any

import torch

from foveate.modeling.compatibility import image_fields, stock_image_sequences, without_cache_positions
from foveate.modeling.core.base import CompressedModelMixin, stock_class
from foveate.modeling.core.outputs import CompressedModelOutputWithPast, Images, TokenProvenance, VisualTokens
from foveate.modeling.layers.crops import Crops


class AnyBackboneMixin(CompressedModelMixin):
    """Mixed into a model without a head, between a method's mixin and the Transformers class. This one serves where an
    image is encoded as a whole, and always has the same number of patches."""

    @property
    def num_deepstack_layers(self) -> int:
        """Layers of the language model that read something of the visual tokens besides."""
        return 0

    def read_images(self, images: Images) -> VisualTokens:
        """The stock model's visual tokens."""
        given = {name: images[name] for name in self.visual_inputs}
        sequences = stock_image_sequences(stock_class(type(self)), self, **given)
        return VisualTokens(torch.cat(sequences), [len(tokens) for tokens in sequences])

    def crop_lengths(self, images: Images) -> list[tuple[list[int], int]]:
        """For each image the visual tokens of its crops without compression, and how many separators stand between
        them."""
        pixel_values, num_patches = images["pixel_values"], self.config.num_patches
        embeds = images.get("image_embeds") if pixel_values is None else None
        number = len(pixel_values) if embeds is None else len(embeds) // num_patches
        return [([num_patches], 0)] * number

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

    def run_with_images(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        images: VisualTokens | None,
        **kwargs: Any,
    ) -> CompressedModelOutputWithPast:
        """Puts visual tokens in their columns, and lets the stock model run on the rest.

        Args:
            input_ids: (batch, columns), or `None` where placeholders are known by their embeddings.
            inputs_embeds: (batch, columns, width).
            images: `None` for text alone.
            kwargs: for the stock `forward`.
        """
        if images is not None:
            tokens = images.tokens.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(self._columns_of(tokens, input_ids, inputs_embeds), tokens)
            images.tokens = tokens
        output = super().forward(inputs_embeds=inputs_embeds, return_dict=True, **kwargs)
        return CompressedModelOutputWithPast(
            **output,
            **image_fields(None if images is None else images.tokens.split(images.lengths)),
            compression=None if images is None else images.provenance,
        )


def _entries(value: Any, chosen: torch.Tensor) -> Any:
    return value[chosen.to(value.device)] if torch.is_tensor(value) else [value[index] for index in chosen.tolist()]
