"""What a question-guided method takes from a CLIP checkpoint: its text tower, projections and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPConfig

from ..errors import FoveateError, first_sentence
from .checkpoints import fetch_weights, find_checkpoint, read_config, read_tensors, require_tokenizer


QUESTION_ENCODER = "question_encoder"

#: Modules of a compressed model whose parameters come from CLIP. The first holds text tower and text projection.
CLIP_MODULES = (QUESTION_ENCODER, "visual_projection")


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP checkpoint whose text tower will read the question.

    Attributes:
        name: as the user calls it.
        config: a `CLIPTextConfig` with the `projection_dim` of the whole.
    """

    name: str
    folder: Path
    config: Any
    tokenizer: Any

    def read_parameters(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Parameters of a compressed model, read by key, without building the CLIP model.

        Args:
            shapes: by the names that they have in the compressed model.
            dtype: what they are converted to.

        Raises:
            FoveateError: weights that are damaged, incomplete or of another shape.
        """
        fetch_weights(self.name, self.folder, pickled=True)
        stored = read_tensors(self.folder, [_clip_name(name) for name in shapes], dtype)
        parameters = {}
        for name, shape in shapes.items():
            clip_name = _clip_name(name)
            tensor = stored.get(clip_name)
            if tensor is None:
                raise FoveateError(
                    f"{self.name} has no '{clip_name}': the text encoder has to be a whole CLIP checkpoint, with both "
                    "projections, not one tower alone."
                )
            if tuple(tensor.shape) != shape:
                raise FoveateError(
                    f"{self.name}'s {clip_name} is {tuple(tensor.shape)}, and {shape} is needed: take the CLIP that "
                    "the base's vision tower came from."
                )
            parameters[name] = tensor
        return parameters


def open_text_encoder(name: str | Path) -> TextEncoder:
    """Reads config and tokenizer of a CLIP checkpoint; its weights wait for `read_parameters`.

    Raises:
        FoveateError: there is no such checkpoint, or it is no CLIP.
    """
    folder = find_checkpoint(name)
    model_type = read_config(folder).get("model_type")
    if model_type != "clip":
        raise FoveateError(
            f"{name} is a '{model_type}' checkpoint: the text encoder has to be a whole 'clip' one, with projections."
        )
    require_tokenizer(name, folder)
    try:
        clip_config = CLIPConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise FoveateError(f"{name}'s config or tokenizer can't be read: {first_sentence(error)}") from error
    config = clip_config.text_config
    if len(tokenizer) > config.vocab_size:
        raise FoveateError(
            f"{name}'s tokenizer has {len(tokenizer)} tokens and its model {config.vocab_size}: they don't go together."
        )
    config.projection_dim = clip_config.projection_dim
    return TextEncoder(str(name), folder, config, tokenizer)


def _clip_name(name: str) -> str:
    return name.removeprefix(f"{QUESTION_ENCODER}.")
