"""What tells one checkpoint's weights from another's, for results that are recorded of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers.utils import CONFIG_NAME


def content_hash(folder: Path) -> str:
    """The first 16 hex digits of a SHA-256 over a checkpoint's config and weight files, wherever they lie."""
    digest = hashlib.sha256()
    for path in [folder / CONFIG_NAME, *sorted(folder.glob("*.safetensors"))]:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]
