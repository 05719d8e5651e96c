"""Mistral 3 and its like: an image is rows of patches in a prompt, with a token of text between them."""

from __future__ import annotations

import torch

from foveate.modeling.backbones.any import AnyBackboneMixin
from foveate.modeling.core.declarations import Backbone
from foveate.modeling.core.outputs import Images, VisualTokens
from foveate.modeling.layers.rows import tokens_of_rows


class Mistral3BackboneMixin(AnyBackboneMixin):
    """On Mistral 3. An image is compressed as a whole, and its tokens are spread over the rows by their number."""

    def finish_images(self, compressed: VisualTokens, images: Images) -> VisualTokens:
        """Each row of an image as one, where it matters in which it lies."""
        if not self.keeps_places:
            return compressed
        patch = self.config.vision_config.patch_size * self.config.spatial_merge_size
        places, lengths, extents = [], [], []
        for (rows, columns), in_image in zip(
            (images["image_sizes"] // patch).tolist(),
            compressed.places.split(compressed.lengths),  # type: ignore[union-attr]
        ):
            counts = tokens_of_rows(len(in_image), rows)
            full = [row for row, count in enumerate(counts) if count]
            starts = torch.tensor([row * (columns + 1) for row in full for _ in range(counts[row])])
            # A token of text after every row counts, too, and so do rows that nothing is left of.
            places.append(in_image + in_image // columns - starts.to(in_image)[:, None])
            lengths += [counts[row] for row in full]
            extents += [(below - row) * (columns + 1) - 1 for row, below in zip(full, [*full[1:], rows])]
        compressed.places, compressed.lengths = torch.cat(places), lengths
        compressed.extents = torch.tensor(extents)
        return compressed


BACKBONES = (
    Backbone(
        model_type="mistral3",
        stem="Mistral3",
        title="Mistral 3",
        mixin=Mistral3BackboneMixin,
        stock={"processor": "PixtralProcessor"},
    ),
    Backbone(
        model_type="mistral_large4",
        stem="MistralLarge4",
        title="Mistral Large 4",
        mixin=Mistral3BackboneMixin,
        stock={"processor": "PixtralProcessor"},
    ),
)
