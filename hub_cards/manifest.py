"""`foveate_manifest.json`: what a checkpoint consists of, with checksums, so that anyone can see whether it still does.

Listed is every file that is loaded. The card, the records of a training and what a hub or a file system adds are not:
people edit them, and nothing runs them. The list has neither dates nor places, so the same checkpoint has the same.

Conversion copies or links a base's weights without reading them, and so does the list. A weight file is known by its
size and by `sampled_sha256`, over its header (names, shapes and places of all tensors) and 64 KiB from each of 64
places spread over it: any training or conversion of dtype changes that. Whole weight files are hashed (`sha256`) from
the smallest on, up to 512 MB in all, which is what a method adds and less than a second's work. `complete` adds the
others, for a checkpoint that goes to the hub and is read as a whole anyway.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import FoveateError
from ..training.recipe import RECIPE_FILE
from .card import CARD_FILE, is_hub_id


MANIFEST_FILE = "foveate_manifest.json"

#: What readers get beside a checkpoint; not listed.
RECORDS = (CARD_FILE, RECIPE_FILE, "training_log.json", "LICENSE", "NOTICE")

#: Folders and files that are none of the checkpoint's: curves of a training, what the hub and its client leave.
LEFT_OUT = ("runs", ".git", ".gitattributes", ".cache")

WEIGHTS = ".safetensors"
_HASHED_WHOLE = 512_000_000  # bytes of weights in all, the smallest files first
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 65_536
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_CHUNK_BYTES = 1 << 20


def write_manifest(folder: Path, base_name: str) -> None:
    """Writes the list into a checkpoint that is complete but for it."""
    content = {
        "foveate": __version__,
        "method": json.loads((folder / "config.json").read_text(encoding="utf-8"))["compression"]["method"],
        "base": base_name if is_hub_id(base_name) else Path(base_name).name,
        "files": _describe_all(folder),
    }
    (folder / MANIFEST_FILE).write_text(to_json(content), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The list of a checkpoint; `None` where there is none. Raises `FoveateError` for a file that is no such list."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = content["files"]
        if all(isinstance(content[name], str) for name in ("foveate", "method", "base")) and all(
            isinstance(entry.get("size"), int) for entry in files.values()
        ):
            return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise FoveateError(f"{path} is no list of a checkpoint's files: it is damaged, or not foveate's.")


def complete(manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The list with a whole hash of every file. Reads those that have none yet."""
    files = {
        name: {**entry, "sha256": entry.get("sha256") or sha256_of(folder / name)}
        for name, entry in manifest["files"].items()
    }
    return {**manifest, "files": files}


def to_json(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2, sort_keys=True) + "\n"


def listed_files(folder: Path) -> list[str]:
    """Files of a checkpoint that a list has to have, "/" between folders, sorted."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(
        name.as_posix()
        for name in names
        if name.parts[0] not in LEFT_OUT and name.as_posix() not in (MANIFEST_FILE, *RECORDS)
    )


def differs(path: Path, entry: dict[str, Any], full: bool) -> bool:
    """Whether a file is not what the list says of it.

    Args:
        full: read weight files whole, where the list has their hash; else their samples.
    """
    if path.stat().st_size != entry["size"]:
        return True
    if path.suffix == WEIGHTS and entry.get("sampled_sha256") != sampled_sha256_of(path):
        return True
    if path.suffix == WEIGHTS and not full:
        return False
    return "sha256" in entry and entry["sha256"] != sha256_of(path)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def header_of(path: Path) -> bytes:
    """What stands before the tensors of a safetensors file: names, shapes and places, after 8 bytes with its length."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), _MAX_HEADER_BYTES))


def sampled_sha256_of(path: Path) -> str:
    """SHA-256 over a safetensors file's header and 64 KiB from each of 64 places, from its first to its last bytes."""
    digest = hashlib.sha256(header_of(path))
    size = path.stat().st_size
    with path.open("rb") as file:
        last = max(0, size - _SAMPLE_BYTES)
        for sample in range(_NUM_SAMPLES):
            file.seek(last * sample // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _describe_all(folder: Path) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for name in listed_files(folder):
        entries[name] = {"size": (folder / name).stat().st_size}
    whole = 0
    for name in sorted(entries, key=lambda name: (entries[name]["size"], name)):
        path, entry = folder / name, entries[name]
        if path.suffix == WEIGHTS:
            entry["sampled_sha256"] = sampled_sha256_of(path)
            whole += entry["size"]
        if path.suffix != WEIGHTS or whole <= _HASHED_WHOLE:
            entry["sha256"] = sha256_of(path)
    return entries
