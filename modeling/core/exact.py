"""What models share whose number of visual tokens is known before the vision tower runs.

The processor writes exactly that many placeholders, so everything of the stock model but its images stays: its
`forward`, with or without a head, its caches, its `generate`, serving engines that count placeholders. Compression
happens inside `get_image_features`, which is the door that pre-encoding and serving engines use.

The stock `forward` could call it by itself, but hands on neither the inputs that guide a method nor what compressed
images hold. So the one `forward` below encodes, and lets the stock one run the rest.

Methods that compress the visual tokens of an image right before the language model ([`SequenceModelMixin`]) say with
which weights the m that are left are made of the n. Whatever else belongs to a token (what DeepStack adds, its place in
the image) goes the same way. Nothing of it depends on the prompt, so the tokens serve every later turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from foveate.configuration.compression import VIDEOS_ARE_NOT_TAKEN
from foveate.modeling.compatibility import (
    CACHE,
    PositionsByModelMixin,
    cache_of,
    deepstack_layers,
    image_features_output,
    image_sequences,
    missing_image_fields,
    takes_encoded_images,
)
from foveate.modeling.core.base import CompressedGenerationMixin, CompressedModelMixin, stock_class
from foveate.modeling.core.compressed_image import CompressedImage
from foveate.modeling.core.image_inputs import ImageInputsMixin
from foveate.modeling.core.outputs import (
    WITH_PLACES,
    WITH_PROVENANCE,
    EncodedImages,
    Images,
    TokenProvenance,
    VisualTokens,
    extended,
    is_extended,
)
from foveate.modeling.core.positions import keep_next_positions, lay_out_columns, lay_out_images, next_positions


_VIDEOS = ("pixel_values_videos", "video_grid_thw")


class ExactGenerationMixin(ImageInputsMixin, CompressedGenerationMixin, PositionsByModelMixin):
    """Mixed into the model with a head, before the Transformers class."""

    @property
    def lays_out_positions(self) -> bool:
        return self.model.lays_out_positions

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # `generate` has to know which columns an image takes. Where inputs do not tell, and it has not encoded images
        # already, they are encoded here.
        if not self.model.counts_images and model_kwargs.get(self.image_inputs[0]) is not None:
            with torch.no_grad():
                self.model.encode_inputs(model_kwargs)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def _placeholders_of(self, images):
        pixels = images[self.image_inputs[0]]
        if isinstance(pixels, EncodedImages):
            return torch.tensor(pixels.tokens.lengths)
        return super()._placeholders_of(images)

    def _take(self, images, chosen):
        pixels = images[self.image_inputs[0]]
        if chosen is None or not isinstance(pixels, EncodedImages):
            return super()._take(images, chosen)
        return {**images, self.image_inputs[0]: pixels.take(chosen.tolist()) if len(chosen) else None}

    def forward(self, output_compression: bool | None = None, return_dict: bool | None = None, **kwargs):
        """
        Args:
            output_compression: also return where each visual token comes from.
            kwargs: as in the model without a head, and as in the stock class.
        """
        # Images are encoded by the model without a head, for what offloads weights brings them when it is called; the
        # stock class makes its output of what it knows, so what became of them comes beside it.
        found = _FoundImages(bool(output_compression))
        output = super().forward(**kwargs, output_compression=found, return_dict=True)
        return self._returned(found.add_to(output), return_dict)


@dataclass
class _FoundImages:
    """What became of the images of a call.

    Args:
        trace: whether to say what their tokens are made of.
        tokens: `None` for text alone.
    """

    trace: bool
    tokens: VisualTokens | None = None

    def add_to(self, output: Any) -> Any:
        """A stock model's output, with it."""
        fields: dict[str, Any] = dict.fromkeys(WITH_PROVENANCE)
        if self.tokens is not None:
            fields = {"compression": self.tokens.provenance, **missing_image_fields(output, self.tokens.tokens)}
        if torch.compiler.is_compiling() and not is_extended(type(output), tuple(fields)):
            return output  # no class can be made now, and the stock one does not say what it returns
        return extended(type(output), tuple(fields))(**output, **fields)


class ExactModelMixin(CompressedModelMixin):
    """Mixed into a model without a head, before its backbone's mixin. A method brings `compress_images`."""

    def compress_images(self, images: Images, trace: bool = False) -> VisualTokens:
        """Encodes and compresses images.

        Args:
            images: what the processor returns for them, by name.
            trace: whether to say what the tokens are made of.
        """
        raise NotImplementedError

    def get_image_features(self, return_dict: bool | None = None, **images):
        """The compressed visual tokens, one (tokens, width) tensor an image, in the form that this version of
        Transformers gives its own models' image features."""
        given = images[self.visual_inputs[0]]
        if isinstance(given, EncodedImages):
            return given.features
        features = self._features_of(self.compress_images(images))
        wanted = self.config.return_dict if return_dict is None else return_dict
        return features if wanted or not hasattr(features, "to_tuple") else features.to_tuple()

    def _features_of(self, tokens: VisualTokens) -> Any:
        """Visual tokens as `get_image_features` returns them, with their places if positions are laid out by these."""
        places: dict[str, Any] = {}
        if tokens.places is not None:
            places = {"places": list(tokens.places.split(tokens.lengths)), "extents": list(tokens.extents)}  # type: ignore[arg-type]
        return image_features_output(
            list(tokens.tokens.split(tokens.lengths)),
            tokens.deepstack,
            stock_class(type(self)),
            tokens.output,
            tokens.stacked,
            output_class=lambda known: extended(known, WITH_PLACES) if places else known,
            **places,
        )

    def _read_features(self, features: Any) -> VisualTokens:
        """The other way round."""
        sequences = image_sequences(features)
        found = VisualTokens(torch.cat(sequences), [len(tokens) for tokens in sequences], deepstack_layers(features))
        if getattr(features, "places", None) is not None:
            found.places, found.extents = torch.cat(list(features.places)), torch.stack(list(features.extents))
        elif self.keeps_places:
            raise ValueError(
                "mm_encoder_outputs do not say where each token lies in its image, which the positions need: pass what "
                "get_image_features of this model returns."
            )
        return found

    def encode_inputs(self, inputs: dict[str, Any], trace: bool = False) -> VisualTokens | None:
        """Encodes and compresses the images among the arguments of a call, in which their tokens then stand as a stock
        `forward` takes them.

        Args:
            inputs: by name; images come as the processor returns them (`visual_inputs`, `guiding_inputs`), as what
                stands in their place (`image_substitutes`), or encoded before (`mm_encoder_outputs`).
            trace: whether to say what the tokens are made of.

        Returns:
            The tokens; `None` for text alone.
        """
        images = {name: inputs.pop(name, None) for name in (*self.visual_inputs, *self.guiding_inputs)}
        substitutes = {name: inputs.pop(name, None) for name in self.image_substitutes}
        encoded = dict(inputs.pop("mm_encoder_outputs", None) or {})
        pixels, features = images[self.visual_inputs[0]], encoded.get("image")
        if encoded.get("video") is not None or any(inputs.get(name) is not None for name in _VIDEOS):
            raise ValueError(VIDEOS_ARE_NOT_TAKEN)
        self._check_inputs([pixels, features, *substitutes.values()])
        if isinstance(pixels, EncodedImages):
            tokens, features = pixels.tokens, pixels.features
        elif features is not None:
            tokens = self._read_features(features)
        elif substitutes.get("compressed_images") is not None:
            tokens = self.join_compressed_images(substitutes["compressed_images"])
        elif pixels is not None or any(given is not None for given in substitutes.values()):
            tokens = self.compress_images({**images, **substitutes}, trace)
        else:
            tokens = None
        if tokens is not None:
            features = self._features_of(tokens) if features is None else features
            if takes_encoded_images(stock_class(type(self))):
                encoded["image"] = features
            else:
                inputs[self.visual_inputs[0]] = EncodedImages(tokens, features)
        if encoded:
            inputs["mm_encoder_outputs"] = encoded
        return tokens

    def forward(
        self, output_compression: bool | _FoundImages | None = None, return_dict: bool | None = None, **kwargs: Any
    ) -> Any:
        """
        Args:
            output_compression: also return where each visual token comes from.
            kwargs: `input_ids`, (batch, length), with as many placeholders an image as it has tokens after compression;
                the images of all rows, row after row, in one of the ways of `encode_inputs`; and as in the stock class.
        """
        input_ids: Any = kwargs.get("input_ids")
        inputs_embeds: Any = kwargs.get("inputs_embeds")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Specify exactly one of input_ids and inputs_embeds.")
        found = output_compression
        if not isinstance(found, _FoundImages):
            found = _FoundImages(bool(output_compression))
        found.tokens = images = self.encode_inputs(kwargs, found.trace)
        is_placeholder = None
        if images is not None:
            is_placeholder = self._find_placeholders(input_ids, inputs_embeds)
            self._check_number(images, is_placeholder)
        remember = self._lay_out(kwargs, images, is_placeholder) if self.lays_out_positions else None
        output = super().forward(**kwargs, return_dict=True)
        if remember is not None:
            remember(output)
        return self._returned(found.add_to(output), return_dict)

    def _check_inputs(self, images: list[Any]) -> None:
        if sum(given is not None for given in images) > 1:
            raise ValueError("Pass one of pixel_values, mm_encoder_outputs and compressed_images.")

    def _check_number(self, images: VisualTokens, is_placeholder: torch.Tensor) -> None:
        """Raises `ValueError` where placeholders and tokens differ in number."""
        found = int(is_placeholder.sum())
        if found != len(images.tokens):
            raise ValueError(
                f"The images have {len(images.tokens)} visual tokens after compression, but input_ids has {found} "
                "placeholder tokens: let the processor write them, with the same compression settings as the model "
                "(set_compression changes both), and pass exactly the images that they stand for."
            )

    def _lay_out(
        self, inputs: dict[str, Any], images: VisualTokens | None, is_placeholder: torch.Tensor | None
    ) -> Callable[[Any], None]:
        """Gives a call position ids, if it has none; returns what has the cache in its output remember the next."""
        if inputs.get("position_ids") is not None:
            return lambda output: None
        columns = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        (batch_size, length), device = columns.shape[:2], columns.device
        mask, axes = inputs.get("attention_mask"), self.num_position_axes
        cache = inputs.get(CACHE, inputs.get("past_key_values"))  # the older name is still taken
        mask = mask.to(device).bool() if torch.is_tensor(mask) and mask.dim() == 2 else None
        present = torch.ones(batch_size, length, dtype=torch.bool, device=device) if mask is None else mask[:, -length:]
        if images is None or is_placeholder is None or not self.keeps_places:
            positions, following = lay_out_columns(present)
        else:
            positions, following = lay_out_images(present, is_placeholder, images)
            if cache is None and axes == 1 and inputs.get("attention_mask") is None:
                # Positions with gaps and no mask would be taken for several sequences in one row.
                inputs["attention_mask"] = present.long()
        start = next_positions(cache, None if mask is None else mask[:, :-length], batch_size, device)
        positions = positions + start
        inputs["position_ids"] = positions[0] if axes == 1 else positions.expand(axes, -1, -1)
        return lambda output: keep_next_positions(cache_of(output), mask, start + following)

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
        extents: list[Any] = [None] * len(found.lengths)
        if found.places is not None:
            parts["places"], extents = found.places.split(found.lengths), found.extents.tolist()  # type: ignore[union-attr]
        method = self.config.compression.method
        return [
            CompressedImage(
                method, length, extent=extent, **{name: part[index].clone() for name, part in parts.items()}
            )
            for index, (length, extent) in enumerate(zip(found.lengths, extents))
        ]

    def join_compressed_images(self, images: list[CompressedImage]) -> VisualTokens:
        method, width = self.config.compression.method, self.config.get_text_config().hidden_size
        layers, placed = self.num_deepstack_layers, self.keeps_places
        for image in images:
            fits = image.embeddings is not None and image.embeddings.shape[1] == width
            fits = fits and (0 if image.deepstack is None else len(image.deepstack)) == layers
            image.require(method, fits and (image.places is not None or not placed))
        parts: dict[str, list[Any]] = {
            name: [getattr(image, name) for image in images] for name in ("embeddings", "deepstack", "places")
        }
        joined = VisualTokens(torch.cat(parts["embeddings"]), [image.num_tokens for image in images])
        joined.stacked = images[0].stacked
        if layers:
            joined.deepstack = list(torch.cat(parts["deepstack"], dim=1))
        if placed:
            joined.places, joined.extents = torch.cat(parts["places"]), torch.tensor([image.extent for image in images])
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
            return self.finish_images(read, images)
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
        compressed = VisualTokens(tokens, counts, rest, places, read.extents, output=read.output, stacked=read.stacked)
        if trace:
            of_patches = self.patches_of(weights, images)
            compressed.provenance = [
                TokenProvenance(found, torch.full((len(found),), role, device=found.device), self.role_names)
                for found, role in zip(of_patches, roles)
            ]
        return self.finish_images(compressed, images)

    def _choose(self, sequences: torch.Tensor, num_tokens: int, keys: torch.Tensor) -> Selection | Mixture:
        if num_tokens == sequences.shape[1]:
            everything = torch.arange(num_tokens, device=sequences.device)
            return Selection(everything.expand(len(sequences), -1))
        return self.choose_tokens(sequences, num_tokens, keys)
