"""What methods share that compress the visual tokens of an image right before the language model: the stock model up to
there, then m of every image's n.

Nothing of it depends on the prompt or on an attention matrix, so the tokens serve every later turn. A method says with
which weights the m are made of the n; whatever else belongs to a token (what DeepStack adds, its place in the image)
goes the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from foveate.modeling.core.exact import PromptAgnosticModelMixin
from foveate.modeling.core.outputs import Images, TokenProvenance, VisualTokens


ROLE_NAMES = ("discarded", "kept", "merged")


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
                TokenProvenance(found, torch.full((len(found),), role, device=found.device), ROLE_NAMES)
                for found, role in zip(of_patches, roles)
            ]
        return compressed

    def _choose(self, sequences: torch.Tensor, num_tokens: int, keys: torch.Tensor) -> Selection | Mixture:
        if num_tokens == sequences.shape[1]:
            everything = torch.arange(num_tokens, device=sequences.device)
            return Selection(everything.expand(len(sequences), -1))
        return self.choose_tokens(sequences, num_tokens, keys)
