"""What the models of the training-free baselines share, whatever their backbone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from foveate.modeling.core.sequence import SequenceModelMixin
from foveate.modeling.methods.baselines_algorithm import (
    image_keys,
    pool_stretches,
    random_positions,
    sample_positions,
    stretch_matrix,
    take_positions,
)


class BaselineModelMixin(SequenceModelMixin):
    """Mixed into a model without a head, before its backbone's mixin."""

    def image_keys(self, pixel_values, num_images):
        if self.config.compression.method != "random" or pixel_values is None:  # type: ignore[attr-defined]
            return super().image_keys(pixel_values, num_images)
        return image_keys(pixel_values)

    def compress_sequences(self, sequences, num_tokens, keys, trace):
        settings, (batch, length, _) = self.config.compression, sequences.shape  # type: ignore[attr-defined]
        if settings.method == "spatial":
            matrix = stretch_matrix(length, num_tokens, sequences.device) if trace else None
            matrices = matrix.expand(batch, -1, -1) if trace else None
            return pool_stretches(sequences, num_tokens), matrices, 2
        if settings.method == "random":
            positions = random_positions(keys.to(sequences.device), length, num_tokens, settings.seed)
        else:
            positions = sample_positions(length, num_tokens, sequences.device)
        tokens = take_positions(sequences, positions)
        if not trace:
            return tokens, None, 1
        return tokens, F.one_hot(positions, length).to(torch.float32).expand(batch, -1, -1), 1
