"""Which images go with which columns: `generate` hands all inputs around by rows, but images are counted one by one."""

from __future__ import annotations

from typing import Any

import torch

from foveate.modeling.compatibility import CACHE, MixedIn, cache_argument, take_image_features, takes_cache
from foveate.modeling.core.outputs import WITH_PLACES, Images


class ImageInputsMixin(MixedIn):
    """Mixed into a model that generates, before the Transformers class.

    Every step gets the images whose placeholders it runs on, and every copy of a row (beams, several sequences) keeps
    its own images, however many each row has. Holds for raw images and for ones that `generate` has encoded already
    (`mm_encoder_outputs`, Transformers ≥ 5.23).
    """

    def count_placeholders(self, images: Images) -> torch.Tensor:
        """Columns that each image takes, (images,), from the inputs of uncompressed images."""
        return self.model.count_placeholders(images)

    def take_images(self, images: dict[str, Any], chosen: torch.Tensor) -> dict[str, Any]:
        """The inputs of some images, (indices,), at least one."""
        return self.model.take_images(images, chosen)

    def uncompressed_lengths(self, images: Images) -> list[int]:
        """Visual tokens of each image without compression, from its inputs."""
        return [sum(lengths) + between for lengths, between in self.model.crop_lengths(images)]

    @takes_cache
    def prepare_inputs_for_generation(self, input_ids, cache=None, **kwargs):
        images = {name: kwargs.pop(name, None) for name in self.image_inputs}
        encoded = kwargs.pop("mm_encoder_outputs", None)
        inputs = super().prepare_inputs_for_generation(input_ids, **cache_argument(cache), **kwargs)
        past = 0 if cache is None else cache.get_seq_length()
        is_decoding = past > 0 and inputs.get("input_ids") is not None and inputs["input_ids"].shape[1] == 1
        if is_decoding:
            return inputs
        if (counts := self._placeholders_of(images)) is not None:
            chosen = self._images_not_cached(input_ids, past, counts)
            inputs.update(self._take(images, chosen))
        if encoded and encoded.get("image") is not None:
            features = encoded["image"].pooler_output
            chosen = self._images_not_cached(input_ids, past, _lengths(features, input_ids))
            inputs["mm_encoder_outputs"] = _take_encoded(encoded, chosen)
        return inputs

    def _placeholders_of(self, images: dict[str, Any]) -> torch.Tensor | None:
        """How many columns each image takes, (images,); `None` without images."""
        if images[self.image_inputs[0]] is not None:
            return self.count_placeholders(images)
        compressed = images.get("compressed_images")
        return None if compressed is None else torch.tensor([image.num_placeholders for image in compressed])

    def _take(self, images: dict[str, Any], chosen: torch.Tensor | None) -> dict[str, Any]:
        if chosen is None:
            return images
        return self.take_images(images, chosen) if len(chosen) else dict.fromkeys(images)

    def _images_not_cached(self, input_ids: torch.Tensor, past: int, counts: torch.Tensor) -> torch.Tensor | None:
        """Indices of the images whose placeholders lie in columns that the cache does not hold; `None`: all of them.

        Images of all columns may be given, or of the new ones alone.
        """
        if past == 0:
            return None
        is_placeholder = self._is_placeholder(input_ids)
        given, in_all, in_cache = (int(x.sum()) for x in (counts, is_placeholder, is_placeholder[:, :past]))
        if given == in_all:
            _, first_columns = locate_images(is_placeholder, counts)
            return (first_columns >= past).nonzero()[:, 0]
        if given == in_cache != in_all - in_cache:
            # None is new: what looks like a placeholder after them was guessed by an assistant model.
            return counts.new_empty(0)
        return None  # the new ones alone (or the forward pass will complain)

    def _is_placeholder(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids == self.config.image_token_id

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        if expand_size == 1 or input_ids is None:
            return super()._expand_inputs_for_generation(
                expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
            )
        images = {name: model_kwargs.pop(name, None) for name in self.image_inputs}
        encoded = model_kwargs.pop("mm_encoder_outputs", None)
        cache = model_kwargs.get(CACHE)
        past = 0 if cache is None else cache.get_seq_length()
        if (counts := self._placeholders_of(images)) is not None:
            chosen = self._repeated_images(input_ids, past, counts, expand_size)
            images = self._take(images, chosen)
        if encoded and encoded.get("image") is not None:
            counts = _lengths(encoded["image"].pooler_output, input_ids)
            encoded = _take_encoded(encoded, self._repeated_images(input_ids, past, counts, expand_size))
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        model_kwargs.update({name: value for name, value in images.items() if value is not None})
        if encoded is not None:
            model_kwargs["mm_encoder_outputs"] = encoded
        return input_ids, model_kwargs

    def _repeated_images(
        self, input_ids: torch.Tensor, past: int, counts: torch.Tensor, repeats: int
    ) -> torch.Tensor | None:
        """Indices that repeat the images of each row as `repeat_interleave(repeats)` repeats the rows."""
        is_placeholder = self._is_placeholder(input_ids)
        if int(is_placeholder.sum()) != int(counts.sum()):  # images of the new columns alone
            is_placeholder[:, :past] = False
        if int(is_placeholder.sum()) != int(counts.sum()):
            return None  # the forward pass will say what is wrong
        rows, _ = locate_images(is_placeholder, counts)
        copies = torch.arange(repeats, device=rows.device)
        order = (rows[None] * repeats + copies[:, None]).flatten().argsort(stable=True)
        return order % max(1, len(rows))


def locate_images(is_placeholder: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each image's first placeholder.

    Args:
        is_placeholder: (rows, columns) bool, as many as `counts` sums to.
        counts: (images,), placeholders of each image, images row after row.
    """
    places = is_placeholder.flatten().nonzero()[:, 0]
    counts = counts.to(places.device)
    first = places[counts.cumsum(0) - counts]
    return first // is_placeholder.shape[1], first % is_placeholder.shape[1]


def _lengths(features: list[torch.Tensor], input_ids: torch.Tensor) -> torch.Tensor:
    return torch.tensor([len(tokens) for tokens in features], device=input_ids.device)


def _take_encoded(encoded: dict[str, Any], chosen: torch.Tensor | None) -> dict[str, Any] | None:
    if chosen is None:
        return encoded
    if len(chosen) == 0:
        return None
    return {**encoded, "image": take_image_features(encoded["image"], chosen.tolist(), WITH_PLACES)}
