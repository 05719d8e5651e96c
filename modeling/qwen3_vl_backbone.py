"""What models on Qwen3-VL share, whatever their method: how images come in, and where they lie."""

from __future__ import annotations

import torch
from transformers import GenerationMixin, Qwen3VLModel

from .compatibility import stock_deepstack_features


class Qwen3VLModelMixin:
    """Mixed into a model without a head, before its method's mixin."""

    visual_inputs = ("pixel_values", "image_grid_thw")

    def read_images(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """What the stock model reads of images.

        Args:
            pixel_values: (patches of all images, patch values).
            image_grid_thw: (images, 3), each image's patches in time (1), height and width.

        Returns:
            Visual tokens of each image, (n, width); for each layer of DeepStack what is added after it, (tokens of all
            images, width); and (images, 2), height and width of each image in tokens.
        """
        if image_grid_thw is None:
            raise ValueError("pixel_values need image_grid_thw: pass what the processor returns.")
        sequences, deepstack = stock_deepstack_features(
            Qwen3VLModel, self, pixel_values=pixel_values, image_grid_thw=image_grid_thw
        )
        return sequences, deepstack, image_grid_thw[:, 1:] // self.config.vision_config.spatial_merge_size  # type: ignore[attr-defined]

    def _position_ids(self, positions: torch.Tensor) -> torch.Tensor:
        return positions.expand(3, -1, -1)


class Qwen3VLGenerationMixin:
    """Mixed into the model with a head, before its method's mixin."""

    image_inputs = ("pixel_values", "image_grid_thw", "compressed_images")

    def take_images(self, images, chosen):
        """The patches of all images lie in one tensor."""
        grids, pixels = images.get("image_grid_thw"), images.get("pixel_values")
        if grids is None or pixels is None:
            return super().take_images(images, chosen)  # type: ignore[misc]
        pieces = pixels.split(grids.prod(-1).tolist())
        taken = torch.cat([pieces[index] for index in chosen.tolist()])
        return {**images, "pixel_values": taken, "image_grid_thw": grids[chosen.to(grids.device)]}

    def count_placeholders(self, images: dict[str, torch.Tensor]) -> torch.Tensor:
        grids, merge = images["image_grid_thw"], self.config.vision_config.spatial_merge_size  # type: ignore[attr-defined]
        settings = self.config.compression  # type: ignore[attr-defined]
        counts = [settings.count_placeholders(length) for length in (grids.prod(-1) // merge**2).tolist()]
        return torch.tensor(counts, device=grids.device)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        # Newer 5.x lay out the grids of images here, uncompressed; `forward` does it itself.
        return GenerationMixin._prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs)  # type: ignore[arg-type]


def refuse_videos(pixel_values_videos: torch.Tensor | None) -> None:
    if pixel_values_videos is not None:
        raise ValueError("This model takes images, not videos yet: pass single frames as images.")
