"""ETC's objective: beside answering, the compressed tokens learn to give back what the text looks at in the image.

The decoder that reads them belongs to training alone; no checkpoint holds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.modeling.layers.decoder_attention import attention_over, watched_attention
from foveate.modeling.methods.etc_algorithm import ImageColumns, locate_columns
from foveate.training.recipe import AuxiliaryRecipe


#: What the decoder is called where it trains beside a model.
AUXILIARY = "auxiliary"
_SMALLEST_VARIANCE = 1e-6


class VisualDecoder(nn.Module):
    """μ and σ² of Section 3.4: from M compressed tokens to what stands for n visual ones.

    Args:
        width: of the language model.
        rank: of the bottleneck.
    """

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.narrow, self.widen = nn.Linear(width, rank), nn.Linear(rank, width)
        self.s = nn.Parameter(torch.zeros(()))

    @property
    def variance(self) -> Tensor:
        """σ² (Eq. 17), one for all."""
        return F.softplus(self.s) + _SMALLEST_VARIANCE

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(images, M, width), and n of each image → (images, longest n, width), of no meaning beyond an image's n."""
        stretched = stretch(tokens, lengths)
        stretched = stretched + position_code(stretched.shape[1], stretched.shape[2], tokens.device)
        return self.widen(F.gelu(self.narrow(stretched)))


def stretch(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Linear interpolation along the tokens, (images, M, width) → (images, longest n, width): the first stays first,
    the last becomes an image's n-th."""
    last = tokens.shape[1] - 1
    places = torch.arange(int(lengths.max()), device=tokens.device) / (lengths[:, None] - 1).clamp(min=1) * last
    below = places.floor().clamp(max=last)
    share = (places - below).clamp(0, 1)[..., None].to(tokens.dtype)
    index = below.long()[..., None].expand(-1, -1, tokens.shape[2])
    return torch.lerp(tokens.gather(1, index), tokens.gather(1, (index + 1).clamp(max=last)), share)


def position_code(length: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines, interleaved, (length, width) float32."""
    places = torch.arange(length, device=device)[:, None]
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    return torch.stack([(places * rates).sin(), (places * rates).cos()], dim=-1).flatten(1)[:, :width]


def looked_at(attention: Tensor, text: Tensor, visual: Tensor) -> Tensor:
    """ã (Eq. 9 and 10): the mean attention of the text to each visual token, from 0 to 1 within an image.

    Args:
        attention: (images, text, visual), the mean over heads.
        text, visual: (images, text) and (images, visual) bool, what is no padding.

    Returns:
        (images, visual).
    """
    mean = attention.sum(1) / text.sum(1, keepdim=True).clamp(min=1)
    least = mean.masked_fill(~visual, torch.inf).amin(1, keepdim=True)
    most = mean.masked_fill(~visual, -torch.inf).amax(1, keepdim=True)
    return ((mean - least) / (most - least).clamp(min=torch.finfo(mean.dtype).tiny)).masked_fill(~visual, 0)


def distillation_loss(target: Tensor, mean: Tensor, variance: Tensor | None, lengths: Tensor) -> Tensor:
    """L_VID (Eq. 16): Σ over positions and features of log σ + (S − μ)² / 2σ², the mean over images; without a variance
    the half of the squared error.

    Args:
        target, mean: S and μ, (images, longest n, width).
        variance: σ².
        lengths: (images,), n.
    """
    there = torch.arange(target.shape[1], device=target.device) < lengths[:, None]
    squares = ((target - mean).square().sum(-1) * there).sum(1)
    if variance is None:
        return squares.mean() / 2
    return (squares / (2 * variance) + 0.5 * variance.log() * lengths * target.shape[2]).mean()


class VisualDistillation:
    """The loss of a batch.

    Args:
        model: an ETC model, unwrapped. Its `auxiliary` becomes the decoder, which trains with it.
        recipe: of the term beside the answers' loss.
    """

    def __init__(self, model: Any, recipe: AuxiliaryRecipe):
        self.model, self.recipe = model, recipe
        layers = model.model.language_model.layers
        self.layer = recipe.layer if recipe.layer > 0 else len(layers) + 1 + recipe.layer
        if not 1 <= self.layer <= len(layers):
            raise FoveateError(
                f"auxiliary.layer must be from 1 to {len(layers)}, or from -1 for the last, not {recipe.layer}."
            )
        #: The terms of the last batch, for the log.
        self.terms: dict[str, Tensor] = {}

    @staticmethod
    def prepare(model: Any, recipe: AuxiliaryRecipe) -> None:
        """Adds what trains beside the model."""
        if recipe.loss != "none":
            model.auxiliary = VisualDecoder(model.config.text_config.hidden_size, recipe.rank)

    def __call__(self, wrapped: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """
        Args:
            wrapped: the model as whoever trains it calls it (DDP, FSDP).
            inputs: a batch of the collator's.
        """
        columns = self._columns(inputs) if self.recipe.loss != "none" else None
        if columns is None:
            output = wrapped(**inputs)
            self.terms = {"answer": output.loss.detach()}
            return output.loss
        rows, visual, text, compressed = self._places(columns, inputs["input_ids"].device)
        found: list[Tensor] = []

        @torch.no_grad()
        def watch(attention, hidden_states, position_embeddings) -> None:
            if not found:  # gradient checkpointing runs the layer twice
                found.append(attention_over(attention, hidden_states, position_embeddings, rows, text, visual))

        attended = self.recipe.alpha > 0
        layers = [self.model.model.language_model.layers[self.layer - 1]] if attended else []
        with watched_attention(layers, watch):
            output = wrapped(**inputs, output_hidden_states=True)
        states = output.hidden_states[self.layer]
        index = rows[:, None]
        features = states[index, visual.clamp(min=0)].detach().float()  # S gets no gradient
        weights = looked_at(found[0], text >= 0, visual >= 0)[..., None] if attended else 0.0
        target = ((1 - self.recipe.alpha) + self.recipe.alpha * weights) * features
        lengths = columns.lengths.to(rows.device)
        decoder = self.model.auxiliary
        mean = decoder(states[index, compressed].float(), lengths)
        variance = decoder.variance if self.recipe.loss == "vid" else None
        auxiliary = distillation_loss(target, mean, variance, lengths)
        if variance is None:
            auxiliary = auxiliary + 0 * decoder.s  # every parameter has a gradient, as DDP expects
        self.terms = {"answer": output.loss.detach(), "auxiliary": auxiliary.detach()}
        return output.loss + self.recipe.weight * auxiliary

    def _columns(self, inputs: Mapping[str, Tensor]) -> ImageColumns | None:
        images = {name: inputs[name] for name in self.model.image_inputs if name in inputs}
        if not images:
            return None
        number = self.model.config.compression.num_visual_tokens
        lengths = (self.model.count_placeholders(images) - number).tolist()
        is_placeholder = inputs["input_ids"] == self.model.config.image_token_id
        return locate_columns(is_placeholder.cpu(), inputs["attention_mask"].bool().cpu(), lengths, number)

    @staticmethod
    def _places(columns: ImageColumns, device: torch.device) -> tuple[Tensor, ...]:
        """For each image its row, and the columns of its visual tokens, of the text after it and of its compressed
        tokens, (images, …), −1 for padding."""
        places = torch.arange(columns.present.shape[1])
        end = columns.first + columns.lengths + columns.num_compressed
        is_text = (columns.present & (columns.image < 0))[columns.rows] & (places >= end[:, None])
        used = is_text.any(0).nonzero()[:, 0]
        text = torch.where(is_text[:, used], places[used], -1)
        if text.shape[1] == 0:
            text = torch.full((len(columns.rows), 1), -1)
        found = columns.rows, columns.columns_of(compressed=False), text, columns.columns_of(compressed=True)
        return tuple(tensor.to(device) for tensor in found)
