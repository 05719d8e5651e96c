"""What models share whose number of visual tokens is known before the vision tower runs.

The processor writes exactly that many placeholders, so logical and physical columns are the same, and everything of the
stock model but its images stays: stock caches, stock `generate`, serving engines that count placeholders. Compression
happens inside `get_image_features`, which is the door that pre-encoding and serving engines use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from foveate.modeling.compatibility import image_features_output, image_fields
from foveate.modeling.core.base import (
    CompressedGenerationMixin,
    CompressedModelMixin,
    CompressedModelOutputWithPast,
    TokenProvenance,
)
from foveate.modeling.core.compressed_image import CompressedImage
from foveate.modeling.core.image_inputs import ImageInputsMixin


@dataclass
class CompressedImages:
    """Visual tokens of a batch of images.

    Args:
        tokens: (tokens of all images, width of the language model), image after image.
        counts: tokens of each image.
        provenance: one an image, when it was asked for.
    """

    tokens: torch.Tensor
    counts: list[int]
    provenance: list[TokenProvenance] | None = None


class ExactCountModelMixin(CompressedModelMixin):
    """Mixed into a model without a head, before the Transformers class."""

    #: Inputs of `compress_images` that images come in.
    visual_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)

    def compress_images(self, pixel_values: torch.Tensor, *, trace: bool = False, **images) -> CompressedImages:
        """Encodes and compresses images.

        Args:
            pixel_values: as the processor gives them.
            trace: whether to say what the tokens are made of.
            images: what else the processor gives for each image.
        """
        raise NotImplementedError

    def _image_features(self, **images):
        """What `get_image_features` returns in this version of Transformers: a (tokens, width) tensor an image."""
        compressed = self.compress_images(**images)
        return image_features_output(list(compressed.tokens.split(compressed.counts)))

    def _forward(
        self,
        images: dict[str, Any],
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        mm_encoder_outputs: dict[str, Any] | None,
        output_compression: bool,
        sequences: list[torch.Tensor] | None = None,
        **kwargs,
    ) -> CompressedModelOutputWithPast:
        """Puts the compressed visual tokens in their columns, and lets the stock model run on the rest. `sequences`:
        the tokens of each image, (tokens, width), where they are there already."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Specify exactly one of input_ids and inputs_embeds.")
        encoded = (mm_encoder_outputs or {}).get("image")
        has_images = any(images[name] is not None and len(images[name]) > 0 for name in self.visual_inputs)
        if has_images + (encoded is not None) + (sequences is not None) > 1:
            raise ValueError("Pass one of pixel_values, mm_encoder_outputs and compressed_images.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # type: ignore[attr-defined]
        provenance = None
        if encoded is not None:
            sequences = list(encoded.pooler_output)
        elif has_images:
            compressed = self.compress_images(**images, trace=output_compression)
            sequences, provenance = list(compressed.tokens.split(compressed.counts)), compressed.provenance
        if sequences is not None:
            tokens = torch.cat(sequences).to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(self._columns_of(tokens, input_ids, inputs_embeds), tokens)
        # The stock forward pass is left without images: it runs the language model.
        output = super().forward(inputs_embeds=inputs_embeds, return_dict=True, **kwargs)  # type: ignore[misc]
        return CompressedModelOutputWithPast(**output, **image_fields(sequences), compression=provenance)

    def _columns_of(
        self, tokens: torch.Tensor, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        """(batch, columns, 1) bool, where the visual tokens go. Raises `ValueError` where their numbers differ."""
        image_token_id = self.config.image_token_id  # type: ignore[attr-defined]
        if input_ids is not None:
            is_placeholder = input_ids == image_token_id
        else:
            token = torch.tensor(image_token_id, device=inputs_embeds.device)
            is_placeholder = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)  # type: ignore[attr-defined]
        found = int(is_placeholder.sum())
        if found != len(tokens):
            raise ValueError(
                f"The images have {len(tokens)} visual tokens after compression, but input_ids has {found} placeholder "
                "tokens: let the processor write them, with the same compression settings as the model "
                "(set_compression changes both), and pass exactly the images that they stand for."
            )
        return is_placeholder[..., None]


class PromptAgnosticModelMixin(ExactCountModelMixin):
    """Mixed into a model without a head whose visual tokens depend on no text, before the Transformers class: images
    can be compressed once, and asked about often."""

    def compress(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
    ) -> list[CompressedImage]:
        """Reads images once, for any number of questions in any process: their tokens depend on no text.

        Args:
            pixel_values, image_sizes: from the processor; what else it returns is not looked at.

        Returns:
            One an image. `generate` and `forward` take them as `compressed_images`, the processor as `images`.
        """
        with torch.no_grad():
            compressed = self.compress_images(pixel_values, image_sizes)  # type: ignore[misc]
        return self._as_compressed_images(compressed)

    def _as_compressed_images(self, compressed: CompressedImages) -> list[CompressedImage]:
        tokens = compressed.tokens.split(compressed.counts)
        return [
            CompressedImage(self.config.compression.method, len(found), embeddings=found.clone())  # type: ignore[attr-defined]
            for found in tokens
        ]

    def _width(self) -> int:
        """Of what `compress_images` gives."""
        return self.config.text_config.hidden_size  # type: ignore[attr-defined]

    def _sequences_of(self, images: list[CompressedImage] | None) -> list[torch.Tensor] | None:
        """The tokens, (tokens, width), of images that were compressed before."""
        if images is None:
            return None
        method, width = self.config.compression.method, self._width()  # type: ignore[attr-defined]
        for image in images:
            image.require(method, image.embeddings is not None and image.embeddings.shape[1] == width)
        return [image.embeddings for image in images]  # type: ignore[misc]


class ExactCountGenerationMixin(ImageInputsMixin, CompressedGenerationMixin):
    """Mixed into the model with a head, before the Transformers class."""
