"""`foveate_manifest.json`: what a checkpoint consists of, with checksums, so that anyone can see whether it still does.

Listed is every file that is loaded. The card, the records of a training and what a hub or a file system adds are not:
people edit them, and nothing runs them. The list has neither dates nor places, so the same checkpoint has the same.

Conversion copies or links a base's weights without reading them, and so does the list. A weight file is known by its
size and by `sampled_sha256`, over its header (names, shapes and places of all tensors) and 64 KiB from each of 64
places spread over it: any training or conversion of dtype changes that. Whole weight files are hashed (`sha256`) from
the smallest on, up to 512 MB in all, which is what a method adds and less than a second's work. `complete` adds the
others, for a checkpoint that goes to the hub and is read as a whole anyway.

`card` has a digest of each line of the card as it was written: `foveate upgrade` tells by it what was edited since.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from foveate.errors import FoveateError
from foveate.hub_cards.card_lines import line_digests
from foveate.hub_cards.names import CARD_FILE, is_hub_id
from foveate.hub_cards.training_records import LOG_FILE, RECIPE_FILE


MANIFEST_FILE = "foveate_manifest.json"

#: What readers get beside a checkpoint; not listed.
RECORDS = (CARD_FILE, RECIPE_FILE, LOG_FILE, "LICENSE", "NOTICE")

#: Folders and files that are none of the checkpoint's: curves of a training, what the hub and its client leave.
LEFT_OUT = ("runs", ".git", ".gitattributes", ".cache")

WEIGHTS = ".safetensors"
_HASHED_WHOLE = 512_000_000  # bytes of weights in all, the smallest files first
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 65_536
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_CHUNK_BYTES = 1 << 20


def write_manifest(folder: Path, base_name: str) -> None:
    """Writes the list into a checkpoint that is complete but for it."""
    method = json.loads((folder / "config.json").read_text(encoding="utf-8"))["compression"]["method"]
    card = folder / CARD_FILE
    lines = card.read_text(encoding="utf-8") if card.is_file() else None
    content = new_manifest(method, base_name, describe_files(folder, listed_files(folder)), lines)
    (folder / MANIFEST_FILE).write_text(to_json(content), encoding="utf-8")


def new_manifest(method: str, base_name: str, files: Mapping[str, Any], card: str | None) -> dict[str, Any]:
    """The list of a checkpoint.

    Args:
        method: of the config's `compression` block.
        base_name: what it was converted from: a hub id, or the name of a folder.
        files: an entry a file, as [`describe_files`] makes them.
        card: as this version writes it; `None` where there is none.
    """
    content = {
        "foveate": package_version(),
        "method": method,
        "base": base_name if is_hub_id(base_name) else Path(base_name).name,
        "files": dict(files),
    }
    return content if card is None else {**content, "card": " ".join(line_digests(card))}


def note_card(folder: Path) -> None:
    """Writes into a checkpoint's list, where there is one, that its card is now as this version wrote it."""
    try:
        manifest = read_manifest(folder)
    except FoveateError:  # `verify` says it
        return
    if manifest is not None:
        manifest["card"] = " ".join(line_digests((folder / CARD_FILE).read_text(encoding="utf-8")))
        (folder / MANIFEST_FILE).write_text(to_json(manifest), encoding="utf-8")


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
    if path.suffix == WEIGHTS and "sampled_sha256" in entry:
        if entry["sampled_sha256"] != sampled_sha256_of(path):
            return True
        if not full:
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


def is_newer(version: str) -> bool:
    """Whether a version of foveate is newer than the installed one."""
    try:
        return Version(version) > Version(package_version())
    except InvalidVersion:
        return False


def package_version() -> str:
    from foveate import __version__  # which the package has only when it is imported

    return __version__


def describe_files(
    folder: Path, names: Iterable[str], known: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Entries of a list.

    Args:
        folder: the checkpoint.
        names: its files.
        known: entries that are right already, whose files are not read again.
    """
    known = known or {}
    entries = {name: known.get(name) or {"size": (folder / name).stat().st_size} for name in names}
    whole = 0
    for name in sorted(entries, key=lambda name: (entries[name]["size"], name)):
        path, entry = folder / name, entries[name]
        if path.suffix == WEIGHTS:
            whole += entry["size"]
        if name in known:
            continue
        if path.suffix == WEIGHTS:
            entry["sampled_sha256"] = sampled_sha256_of(path)
        if path.suffix != WEIGHTS or whole <= _HASHED_WHOLE:
            entry["sha256"] = sha256_of(path)
    return entries
