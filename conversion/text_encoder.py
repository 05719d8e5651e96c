"""What a question-guided method takes from a CLIP checkpoint: its text tower, projections and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPConfig

from foveate.conversion.checkpoints import find_stored_checkpoint, read_config, require_tokenizer
from foveate.conversion.safetensors_stream import StreamedTensor
from foveate.conversion.stored_weights import open_weights
from foveate.errors import FoveateError, first_sentence


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

    def stream_parameters(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> list[StreamedTensor]:
        """Parameters of a compressed model, to be read by key when they are written, without building the CLIP model.

        Args:
            shapes: by the names that they have in the compressed model.
            dtype: what they are converted to.

        Raises:
            FoveateError: weights that are damaged, incomplete or of another shape.
        """
        stored = open_weights(self.name, self.folder)
        for name, shape in shapes.items():
            entry = stored.entries.get(clip_name := _clip_name(name))
            if entry is None:
                raise FoveateError(
                    f"{self.name} has no '{clip_name}': the text encoder has to be a whole CLIP checkpoint, with both "
                    "projections, not one tower alone."
                )
            if entry.shape != shape:
                raise FoveateError(
                    f"{self.name}'s {clip_name} is {entry.shape}, and {shape} is needed: take the CLIP that "
                    "the base's vision tower came from."
                )
            stored.require(clip_name, shape)
        return [stored.stream(_clip_name(name), name, dtype) for name in shapes]


def open_text_encoder(name: str | Path) -> TextEncoder:
    """Reads config and tokenizer of a CLIP checkpoint; its weights wait for `stream_parameters`.

    Raises:
        FoveateError: there is no such checkpoint, or it is no CLIP.
    """
    folder = find_stored_checkpoint(name)
    model_type = read_config(folder).get("model_type")
    if model_type != "clip":
        raise FoveateError(
            f"{name} is a '{model_type}' checkpoint: the text encoder has to be a whole 'clip' one, with projections."
        )
    require_tokenizer(name, folder)
    try:
        clip_config: Any = CLIPConfig.from_pretrained(folder)
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
