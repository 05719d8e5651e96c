"""MetaCompress's objective (Algorithm 1, Eq. 10): a compressed model learns to answer as it does without compression.

Teacher and student are one frozen model: only what makes the compression matrices trains. The image is encoded once, by
the teacher; the language model reads it twice, whole and compressed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from foveate.modeling.compatibility import visual_tokens_of
from foveate.modeling.core.image_inputs import locate_images
from foveate.training.recipe import DistillationRecipe


class Distillation:
    """The loss of a batch.

    Args:
        model: the compressed model, unwrapped; its `model.compressor` makes the matrices.
        weights: of the loss's terms.
    """

    def __init__(self, model: Any, weights: DistillationRecipe):
        self.model, self.weights = model, weights
        #: The terms of the last batch, for the log.
        self.terms: dict[str, Any] = {}

    def __call__(self, wrapped: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            wrapped: the model as whoever trains it calls it (DDP, FSDP).
            inputs: a batch of the collator's, padded on the right.
        """
        text = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        images = {name: value for name, value in inputs.items() if name not in text}
        whole = expand_placeholders(self.model, text, images)
        with torch.no_grad(), uncompressed(self.model):
            teacher, sequences = answer_logits(wrapped, whole, images)
        images = {name: value for name, value in images.items() if name != "pixel_values"}
        with self._matrices() as matrices:
            student, _ = answer_logits(wrapped, text, {**images, "image_embeds": sequences})
        terms = {
            "prediction": prediction_loss(teacher, student),
            "entropy": entropy_loss(matrices),
            "collapse": collapse_loss(matrices),
        }
        self.terms = {name: term.detach() for name, term in terms.items()}
        return sum(getattr(self.weights, name) * term for name, term in terms.items())

    @contextmanager
    def _matrices(self) -> Iterator[list[torch.Tensor]]:
        """Collects the matrices, (B, m, n) for each length of image, that are made meanwhile."""
        found: list[torch.Tensor] = []
        hook = self.model.model.compressor.register_forward_hook(lambda _, __, output: found.append(output))
        try:
            yield found
        finally:
            hook.remove()


@contextmanager
def uncompressed(model: Any) -> Iterator[None]:
    """The compressed model as the stock model that it came from."""
    settings = model.config.compression
    try:
        model.config.change_compression(keep_ratio=1.0)
        yield
    finally:
        model.config.compression = settings


def expand_placeholders(
    model: Any, text: dict[str, torch.Tensor], images: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Texts with as many placeholders an image as it has tokens without compression.

    Args:
        model: the compressed model.
        text: `input_ids`, `attention_mask` and `labels`, padded on the right.
        images: their images' inputs.
    """
    is_placeholder = text["input_ids"] == model.config.image_token_id
    counts = model.count_placeholders(images)
    lengths = torch.tensor(model.uncompressed_lengths(images), device=counts.device)
    repeats = torch.ones_like(text["input_ids"])
    rows, columns = locate_images(is_placeholder, counts)
    repeats[rows, columns] += lengths - counts
    ends = repeats.cumsum(1)
    places = torch.arange(int(ends[:, -1].max()), device=ends.device).expand(len(ends), -1).contiguous()
    source = torch.searchsorted(ends, places, right=True)
    beyond = source >= repeats.shape[1]
    source = source.clamp(max=repeats.shape[1] - 1)
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: text[name].gather(1, source).masked_fill(beyond, padding[name]) for name in text}


def answer_logits(
    model: nn.Module, text: dict[str, torch.Tensor], images: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens of all answers, vocabulary) float32, row after row, at the positions that predict them; and the visual
    tokens."""
    is_answer = text["labels"][:, 1:] != -100
    columns = is_answer.any(0).nonzero()[:, 0]
    output = model(
        input_ids=text["input_ids"],
        attention_mask=text["attention_mask"],
        **images,
        logits_to_keep=columns,
        use_cache=False,
    )
    return output.logits[is_answer[:, columns]].float(), visual_tokens_of(output)


def prediction_loss(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(p_teacher ‖ p_student), the mean over (tokens, vocabulary) logits."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def entropy_loss(matrices: list[torch.Tensor]) -> torch.Tensor:
    """(1/m) Σᵢ H(Pᵢ), the mean over images, in nats; matrices (B, m, n) for each length of image."""
    smallest = torch.finfo(torch.float32).tiny  # where an entry is 0 its gradient is too, not NaN
    of_images = [-(matrix * matrix.clamp(min=smallest).log()).sum(-1).mean(-1) for matrix in matrices]
    return torch.cat(of_images).mean()


def collapse_loss(matrices: list[torch.Tensor]) -> torch.Tensor:
    """max_j Σᵢ P_ij, the mean over images: how many tokens hang on the one source that is used most."""
    return torch.cat([matrix.sum(1).amax(-1) for matrix in matrices]).mean()
