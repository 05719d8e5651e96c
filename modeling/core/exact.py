"""What models share whose number of visual tokens is known before the vision tower runs.

The processor writes exactly that many placeholders, so logical and physical columns are the same, and everything of the
stock model but its images stays: stock caches, stock `generate`, serving engines that count placeholders. Compression
happens inside `get_image_features`, which is the door that pre-encoding and serving engines use.

The stock `forward` could call it by itself, but hands on neither the inputs that guide a method nor what compressed
images hold, and before 5.23 it takes no encoded images: so the one `forward` below encodes, and lets the stock one run
the rest.

Methods that compress the visual tokens of an image right before the language model ([`SequenceModelMixin`]) say with
which weights the m that are left are made of the n. Whatever else belongs to a token (what DeepStack adds, its place in
the image) goes the same way. Nothing of it depends on the prompt, so the tokens serve every later turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from foveate.modeling.compatibility import image_features_output
from foveate.modeling.core.base import CompressedGenerationMixin, CompressedModelMixin
from foveate.modeling.core.compressed_image import CompressedImage
from foveate.modeling.core.image_inputs import ImageInputsMixin
from foveate.modeling.core.outputs import CompressedModelOutputWithPast, Images, TokenProvenance, VisualTokens


class ExactGenerationMixin(ImageInputsMixin, CompressedGenerationMixin):
    """Mixed into the model with a head, before the Transformers class."""


class ExactModelMixin(CompressedModelMixin):
    """Mixed into a model without a head, before its backbone's mixin. A method brings `compress_images`."""

    def compress_images(self, images: Images, trace: bool = False) -> VisualTokens:
        """Encodes and compresses images.

        Args:
            images: what the processor returns for them, by name.
            trace: whether to say what the tokens are made of.
        """
        raise NotImplementedError

    def get_image_features(self, **images):
        """The compressed visual tokens, one (tokens, width) tensor an image, in the form that this version of
        Transformers gives its own models' image features."""
        compressed = self.compress_images(images)
        return image_features_output(list(compressed.tokens.split(compressed.lengths)), compressed.deepstack)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        output_compression: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CompressedModelOutputWithPast | tuple:
        """
        Args:
            input_ids: (batch, length), with as many placeholders an image as it has tokens after compression.
            mm_encoder_outputs: what `get_image_features` gave, under "image", in place of `pixel_values`.
            output_compression: also return where each visual token comes from.
            kwargs: the images of all rows, row after row, as the processor returns them (`visual_inputs`,
                `guiding_inputs`), or what stands in their place (`image_substitutes`); and as in the stock class.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Specify exactly one of input_ids and inputs_embeds.")
        images = {name: kwargs.pop(name, None) for name in (*self.visual_inputs, *self.guiding_inputs)}
        substitutes = {name: kwargs.pop(name, None) for name in self.image_substitutes}
        encoded = (mm_encoder_outputs or {}).get("image")
        self._check_inputs([images["pixel_values"], encoded, *substitutes.values()])
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        compressed = None
        if encoded is not None:
            sequences = list(encoded.pooler_output)
            compressed = VisualTokens(torch.cat(sequences), [len(tokens) for tokens in sequences])
        elif substitutes.get("compressed_images") is not None:
            compressed = self.join_compressed_images(substitutes["compressed_images"])
        elif images["pixel_values"] is not None or any(given is not None for given in substitutes.values()):
            compressed = self.compress_images({**images, **substitutes}, bool(output_compression))
        output = self.run_with_images(input_ids, inputs_embeds, compressed, **kwargs)
        return self._returned(output, return_dict)

    def _check_inputs(self, images: list[Any]) -> None:
        if sum(given is not None for given in images) > 1:
            raise ValueError("Pass one of pixel_values, mm_encoder_outputs and compressed_images.")

    def _columns_of(
        self, tokens: torch.Tensor, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        """(batch, columns, 1) bool, where the visual tokens go. Raises `ValueError` where their numbers differ."""
        is_placeholder = self._find_placeholders(input_ids, inputs_embeds)
        found = int(is_placeholder.sum())
        if found != len(tokens):
            raise ValueError(
                f"The images have {len(tokens)} visual tokens after compression, but input_ids has {found} placeholder "
                "tokens: let the processor write them, with the same compression settings as the model "
                "(set_compression changes both), and pass exactly the images that they stand for."
            )
        return is_placeholder[..., None]

    def join_compressed_images(self, images: list[CompressedImage]) -> VisualTokens:
        """The tokens of images that were compressed before."""
        raise NotImplementedError


class PromptAgnosticModelMixin(ExactModelMixin):
    """Mixed into a model without a head whose visual tokens depend on no text, before its backbone's mixin: images can
    be compressed once, and asked about often."""

    image_substitutes: ClassVar[tuple[str, ...]] = ("compressed_images",)

    def compress(self, input_ids=None, attention_mask=None, **inputs: Any) -> list[CompressedImage]:
        """Reads images once, for any number of questions in any process: their tokens depend on no text.

        Args:
            inputs: from the processor; what else it returns is not looked at.

        Returns:
            One an image. `generate` and `forward` take them as `compressed_images`, the processor as `images`.
        """
        images = {name: inputs.get(name) for name in self.visual_inputs}
        if images["pixel_values"] is None:
            raise ValueError("There is no image to compress: pass what the processor returns for prompts with images.")
        with torch.no_grad():
            found = self.compress_images(images)
        parts: dict[str, Any] = {"embeddings": found.tokens.split(found.lengths)}
        if found.deepstack:
            parts["deepstack"] = torch.stack(found.deepstack).split(found.lengths, dim=1)
        if found.places is not None:
            parts["places"] = found.places.split(found.lengths)
        grids = [None] * len(found.lengths) if found.grids is None else [tuple(grid) for grid in found.grids.tolist()]
        method = self.config.compression.method
        return [
            CompressedImage(method, length, grid=grid, **{name: part[index].clone() for name, part in parts.items()})
            for index, (length, grid) in enumerate(zip(found.lengths, grids))
        ]

    def join_compressed_images(self, images: list[CompressedImage]) -> VisualTokens:
        method, width = self.config.compression.method, self.config.get_text_config().hidden_size
        layers = self.num_deepstack_layers
        for image in images:
            fits = image.embeddings is not None and image.embeddings.shape[1] == width
            image.require(method, fits and (0 if image.deepstack is None else len(image.deepstack)) == layers)
        parts: dict[str, list[Any]] = {
            name: [getattr(image, name) for image in images] for name in ("embeddings", "deepstack", "places")
        }
        joined = VisualTokens(torch.cat(parts["embeddings"]), [image.num_tokens for image in images])
        if layers:
            joined.deepstack = list(torch.cat(parts["deepstack"], dim=1))
            joined.places = torch.cat(parts["places"])
            joined.grids = torch.tensor([image.grid for image in images])
        return joined


@dataclass
class Selection:
    """m of n tokens.

    Args:
        positions: (B, m), which ones, in the order in which they are read.
    """

    positions: torch.Tensor
    role = 1

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """(B, n, width) → (B, m, width)."""
        return values.gather(1, self.positions[..., None].expand(-1, -1, values.shape[2]))

    def weights(self, length: int) -> torch.Tensor:
        """(B, m, n) float32."""
        return F.one_hot(self.positions, length).to(torch.float32)


@dataclass
class Mixture:
    """m mixtures of n tokens.

    Args:
        matrices: (B, m, n) float32, not negative, rows that sum to 1.
    """

    matrices: torch.Tensor
    role = 2

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """(B, n, width) → (B, m, width); whole numbers are rounded to the nearest."""
        if values.is_floating_point():
            return self.matrices.to(values.dtype) @ values
        return (self.matrices @ values.to(self.matrices.dtype)).round().to(values.dtype)

    def weights(self, length: int) -> torch.Tensor:
        return self.matrices


class SequenceModelMixin(PromptAgnosticModelMixin):
    """Mixed into a model without a head, before its backbone's mixin. A method brings `choose_tokens`."""

    image_substitutes = ("image_embeds", "compressed_images")
    role_names = ("discarded", "kept", "merged")

    def choose_tokens(self, sequences: torch.Tensor, num_tokens: int, keys: torch.Tensor) -> Selection | Mixture:
        """Compresses images of one length.

        Args:
            sequences: (B, n, width).
            num_tokens: m < n.
            keys: (B,), a number for every image, for methods that draw at random.
        """
        raise NotImplementedError

    def image_keys(self, images: Images, num_images: int) -> torch.Tensor:
        """See `choose_tokens`; zeros where nothing is random."""
        return torch.zeros(num_images, dtype=torch.int64)

    def compress_images(self, images: Images, trace: bool = False) -> VisualTokens:
        """Encodes images and compresses their visual tokens.

        Args:
            images: what the processor returns for them, by name; or, in place of pixels, `image_embeds`, (tokens of all
                images, width), the visual tokens of a run without compression.
            trace: whether to say what the tokens are made of.
        """
        if (embeds := images.get("image_embeds")) is not None:
            read = VisualTokens(embeds, [sum(lengths) + between for lengths, between in self.crop_lengths(images)])
        else:
            read = self.read_images(images)
        lengths = read.lengths
        counts = [self.config.compression.count_tokens(length) for length in lengths]
        if counts == lengths and not trace:  # nothing to compress: the stock model
            return read
        keys = self.image_keys(images, len(lengths))
        parts = [read.tokens, *read.deepstack, *([] if read.places is None else [read.places])]
        made: list[list] = [[None] * len(lengths) for _ in parts]
        weights, roles = [None] * len(lengths), [1] * len(lengths)
        split = [part.split(lengths) for part in parts]
        # Images of one length go together, so that no matrix is larger than needed.
        for length in dict.fromkeys(lengths):
            members = [image for image, other in enumerate(lengths) if other == length]
            stacked = [torch.stack([sequences[image] for image in members]) for sequences in split]
            choice = self._choose(stacked[0], counts[members[0]], keys[members])
            matrices = choice.weights(length) if trace else members
            for found, values in zip(made, stacked):
                for image, tokens in zip(members, choice.apply(values)):
                    found[image] = tokens
            for image, matrix in zip(members, matrices):
                weights[image], roles[image] = matrix, choice.role
        tokens, *rest = (torch.cat(found) for found in made)
        places = rest.pop() if read.places is not None else None
        compressed = VisualTokens(tokens, counts, rest, places, read.grids)
        if trace:
            of_patches = self.patches_of(weights, images)
            compressed.provenance = [
                TokenProvenance(found, torch.full((len(found),), role, device=found.device), self.role_names)
                for found, role in zip(of_patches, roles)
            ]
        return compressed

    def _choose(self, sequences: torch.Tensor, num_tokens: int, keys: torch.Tensor) -> Selection | Mixture:
        if num_tokens == sequences.shape[1]:
            everything = torch.arange(num_tokens, device=sequences.device)
            return Selection(everything.expand(len(sequences), -1))
        return self.choose_tokens(sequences, num_tokens, keys)
