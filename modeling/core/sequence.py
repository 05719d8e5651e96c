"""What models share that compress the projected sequence of an image right before the language model: the stock model
up to there, then m tokens of every image's n.

Nothing of it depends on the prompt or on an attention matrix, so the tokens serve every later turn.
"""

from __future__ import annotations

import torch
from transformers import Cache, LlavaModel, LlavaNextModel

from foveate.modeling.compatibility import cache_argument, stock_image_sequences, takes_cache
from foveate.modeling.core.base import CompressedCausalLMOutputWithPast, CompressedModelOutputWithPast, TokenProvenance
from foveate.modeling.core.compressed_image import CompressedImage
from foveate.modeling.core.exact import CompressedImages, ExactCountGenerationMixin, PromptAgnosticModelMixin
from foveate.modeling.layers.tile_layout import TileLayout, tile_grid_of


ROLE_NAMES = ("discarded", "kept", "merged")


class SequenceModelMixin(PromptAgnosticModelMixin):
    """Mixed into a model without a head, before the Transformers class. A backbone brings `read_sequences`,
    `sequence_lengths` and, where a sequence holds more than one image's patches in their order, `patches_of`; a method
    brings `compress_sequences`."""

    visual_inputs = ("pixel_values", "image_embeds")

    def read_sequences(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> list[torch.Tensor]:
        """The stock model's visual tokens of each image, (n, width)."""
        raise NotImplementedError

    def sequence_lengths(self, num_tokens: int, image_sizes: torch.Tensor | None) -> list[int]:
        """n of each image, of `num_tokens` in all."""
        raise NotImplementedError

    def compress_sequences(
        self, sequences: torch.Tensor, num_tokens: int, keys: torch.Tensor, trace: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """Compresses images of one length.

        Args:
            sequences: (B, n, width).
            num_tokens: m < n.
            keys: (B,), a number for every image, for methods that draw at random.
            trace: whether the matrices are wanted.

        Returns:
            (B, m, width), the matrices (B, m, n), and the role of such tokens in `ROLE_NAMES`.
        """
        raise NotImplementedError

    def image_keys(self, pixel_values: torch.Tensor | None, num_images: int) -> torch.Tensor:
        """See `compress_sequences`; zeros where nothing is random."""
        return torch.zeros(num_images, dtype=torch.int64)

    def patches_of(self, matrices: list[torch.Tensor], image_sizes: torch.Tensor | None) -> list[torch.Tensor]:
        """(m, n) over the sequence of each image → (m, patches) over its patches."""
        return matrices

    def compress_images(
        self,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        *,
        trace: bool = False,
    ) -> CompressedImages:
        """Encodes images and compresses their sequences.

        Args:
            pixel_values: (images, 3, height, width); LLaVA-NeXT: (images, most tiles, 3, height, width).
            image_sizes: (images, 2), height and width in pixels, for LLaVA-NeXT.
            image_embeds: (tokens of all images, width), the visual tokens of a run without compression, in place of
                `pixel_values`.
            trace: whether to say what the tokens are made of.
        """
        if image_embeds is not None:
            sequences = list(image_embeds.split(self.sequence_lengths(len(image_embeds), image_sizes)))
        else:
            sequences = self.read_sequences(pixel_values, image_sizes)
        keys = self.image_keys(pixel_values, len(sequences))
        return self._compress(sequences, keys, trace, image_sizes)

    def _compress(
        self, sequences: list[torch.Tensor], keys: torch.Tensor, trace: bool, image_sizes: torch.Tensor | None
    ) -> CompressedImages:
        lengths = [len(sequence) for sequence in sequences]
        counts = [self.config.compression.count_tokens(length) for length in lengths]  # type: ignore[attr-defined]
        if counts == lengths and not trace:  # nothing to compress: the stock model
            return CompressedImages(torch.cat(sequences), counts)
        # Images of one length go together, so that no matrix is larger than needed.
        tokens, matrices, roles = ([None] * len(sequences) for _ in range(3))
        for length in dict.fromkeys(lengths):
            members = [image for image, other in enumerate(lengths) if other == length]
            stacked = torch.stack([sequences[image] for image in members])
            if counts[members[0]] == length:
                made, found, role = stacked, _identity(stacked) if trace else None, 1
            else:
                made, found, role = self.compress_sequences(stacked, counts[members[0]], keys[members], trace)
            for place, image in enumerate(members):
                tokens[image], roles[image] = made[place], role
                matrices[image] = found[place] if found is not None else None
        provenance = None
        if trace:
            weights = self.patches_of(matrices, image_sizes)
            provenance = [
                TokenProvenance(of_image, torch.full((len(of_image),), role, device=of_image.device), ROLE_NAMES)
                for of_image, role in zip(weights, roles)
            ]
        return CompressedImages(torch.cat(tokens), counts, provenance)

    def get_image_features(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **kwargs):
        """The compressed visual tokens, one (tokens, width) tensor an image, in the form that this version of
        Transformers gives its own models' image features."""
        return self._image_features(pixel_values=pixel_values, image_sizes=image_sizes)

    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_embeds: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict | None = None,
        compressed_images: list[CompressedImage] | None = None,
        output_compression: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CompressedModelOutputWithPast | tuple:
        """
        Args:
            input_ids: (batch, length), with as many placeholders an image as it has tokens after compression.
            pixel_values, image_sizes, image_embeds: as in `compress_images`, the images of all rows, row after row.
            mm_encoder_outputs: what `get_image_features` gave, under "image", in place of `pixel_values`.
            compressed_images: what `compress` returned, in place of `pixel_values`.
            output_compression: also return where each visual token comes from.
        """
        output = self._forward(
            {"pixel_values": pixel_values, "image_sizes": image_sizes, "image_embeds": image_embeds},
            input_ids,
            inputs_embeds,
            mm_encoder_outputs,
            output_compression,
            sequences=self._sequences_of(compressed_images),
            attention_mask=attention_mask,
            position_ids=position_ids,
            **cache_argument(cache),
            **kwargs,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict  # type: ignore[attr-defined]
        return output if return_dict else output.to_tuple()


class SequenceGenerationMixin(ExactCountGenerationMixin):
    """Mixed into the model with a head, before the Transformers class."""

    image_inputs = ("pixel_values", "image_sizes", "compressed_images")

    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        compressed_images: list[CompressedImage] | None = None,
        output_compression: bool = False,
        return_dict: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> CompressedCausalLMOutputWithPast | tuple:
        """
        Args:
            labels: (batch, length), −100 where no loss is wanted.
            logits_to_keep: the number of last columns (0: all), or their indices.
            others: as in the model without a head.
        """
        output = self.model(  # type: ignore[attr-defined]
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            image_embeds=image_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            compressed_images=compressed_images,
            output_compression=output_compression,
            return_dict=True,
            **kwargs,
        )
        return self._with_head(output, labels, logits_to_keep, return_dict, num_items_in_batch)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs):
        return self.model.get_image_features(pixel_values, **kwargs)  # type: ignore[attr-defined]

    def compress(self, *args, **kwargs) -> list[CompressedImage]:
        return self.model.compress(*args, **kwargs)  # type: ignore[attr-defined]

    def uncompressed_lengths(self, images: dict[str, torch.Tensor]) -> list[int]:
        """n of each image, from its inputs."""
        total = len(images["pixel_values"]) * self.config.num_patches  # type: ignore[attr-defined]
        return self.model.sequence_lengths(total, images.get("image_sizes"))  # type: ignore[attr-defined]

    def count_placeholders(self, images: dict[str, torch.Tensor]) -> torch.Tensor:
        lengths, settings = self.uncompressed_lengths(images), self.config.compression  # type: ignore[attr-defined]
        return torch.tensor([settings.count_tokens(n) for n in lengths], device=images["pixel_values"].device)


def _identity(sequences: torch.Tensor) -> torch.Tensor:
    batch, length, _ = sequences.shape
    return torch.eye(length, device=sequences.device).expand(batch, -1, -1)


# The backbones


class LlavaSequenceMixin(SequenceModelMixin):
    """On LLaVA-1.5: all images are of one size, their patches in order."""

    def read_sequences(self, pixel_values, image_sizes):
        return stock_image_sequences(LlavaModel, self, pixel_values=pixel_values)

    def sequence_lengths(self, num_tokens, image_sizes):
        num_patches = self.config.num_patches  # type: ignore[attr-defined]
        return [num_patches] * (num_tokens // num_patches)


class LlavaNextSequenceMixin(SequenceModelMixin):
    """On LLaVA-NeXT: the overview, then the rows of the grid of tiles without their padding, a newline at each end."""

    def read_sequences(self, pixel_values, image_sizes):
        return stock_image_sequences(LlavaNextModel, self, pixel_values=pixel_values, image_sizes=image_sizes)

    def sequence_lengths(self, num_tokens, image_sizes):
        num_patches = self.config.num_patches  # type: ignore[attr-defined]
        return [tile_grid_of(self.config, size).num_tokens(num_patches) for size in image_sizes.tolist()]  # type: ignore[attr-defined]

    def patches_of(self, matrices, image_sizes):
        """The patches of all tiles, tile after tile, padding among them; a newline is none."""
        num_patches, device = self.config.num_patches, matrices[0].device  # type: ignore[attr-defined]
        layout = TileLayout([tile_grid_of(self.config, size) for size in image_sizes.tolist()], device)  # type: ignore[attr-defined]
        order = layout.order(torch.arange(num_patches, device=device).expand(layout.num_tiles, -1))
        found, first_tile = [], 0
        for grid, matrix, entries in zip(layout.grids, matrices, order.split([len(m[0]) for m in matrices])):
            weights = matrix.new_zeros(len(matrix), grid.num_tiles * num_patches)
            is_patch = entries < layout.num_tiles * num_patches
            weights[:, entries[is_patch] - first_tile * num_patches] = matrix[:, is_patch]
            found.append(weights)
            first_tile += grid.num_tiles
        return found
