"""An image that was compressed once, to be asked about again and again: in memory, or as one small file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@dataclass
class CompressedImage:
    """What stands for an image in the language model.

    Args:
        method: of the model that made it.
        num_placeholders: columns that the image takes in a prompt.
        embeddings: (tokens, width), visual tokens for the language model to read; or `None`, and instead:
        keys, values: (layers, heads, tokens, head width), what the language model has made of the compressed tokens.
            They belong to the text that came before the image.
        prefix: (length,), the ids of that text.
        before: digest of the image before it in that text, "" for the first.
        extent: how far the text after it is from where it begins, where position ids need that.
        deepstack: (layers, tokens, width), what is added in the first layers of a language model that reads such.
        stacked: whether the model has the tokens of several images in one tensor.
        places: (tokens, dimensions), where every token lies in the image, where position ids need that.
    """

    method: str
    num_placeholders: int
    embeddings: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    prefix: torch.Tensor | None = None
    before: str = ""
    extent: int | None = None
    deepstack: torch.Tensor | None = None
    places: torch.Tensor | None = None
    stacked: bool = False

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    @property
    def num_tokens(self) -> int:
        """Tokens that the language model holds of it."""
        return len(self.embeddings) if self.keys is None else self.keys.shape[2]  # type: ignore[arg-type]

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def digest(self) -> str:
        """Of its content and of what came before it."""
        content = hashlib.sha256(self.before.encode())
        for tensor in self.tensors.values():
            content.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return content.hexdigest()

    def require(self, method: str, fits: bool) -> None:
        """Raises `ValueError` if it is not of a model of this method and of the shapes that fit."""
        if self.method != method or not fits:
            raise ValueError(f"The image was compressed by another model (by '{self.method}'): compress it again.")

    def to(self, device: torch.device | str) -> CompressedImage:
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return CompressedImage(**{**{field.name: getattr(self, field.name) for field in fields(self)}, **moved})

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        facts = {name: getattr(self, name) for name in ("method", "num_placeholders", "before", "extent", "stacked")}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, path, metadata={"format": "pt", "compressed_image": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> CompressedImage:
        """Reads what `save` wrote. Raises `ValueError` for any other file."""
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["compressed_image"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is not a compressed image: write it with `CompressedImage.save`.") from error
        if (grid := facts.pop("grid", None)) is not None:  # 0.1 wrote height and width, of ETC
            facts["extent"] = max(grid)
        return cls(**facts, **tensors)
