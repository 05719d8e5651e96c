"""`foveate push`: a checkpoint to the hub, and nothing else.

What is uploaded are the files that foveate lists, the card and the records of a training. A folder with anything more
in it is refused: a pickle runs code when it is loaded, a link or a path tells of the machine, a token gives it away.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi

from foveate.conversion.checkpoints import read_config, read_shards
from foveate.conversion.verify import Verification, verify
from foveate.errors import FoveateError, first_sentence
from foveate.hub_cards.card import PLACE
from foveate.hub_cards.manifest import (
    LEFT_OUT,
    MANIFEST_FILE,
    RECORDS,
    WEIGHTS,
    complete,
    header_of,
    listed_files,
    package_version,
    read_manifest,
    to_json,
)
from foveate.hub_cards.names import CARD_FILE
from foveate.modeling.core.loading import BASE_FIELDS


_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_BELONGING = (WEIGHTS, ".json", ".py", ".jinja", ".txt", ".model")
_MAGIC = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")  # what a pickle begins with, and a zip file, as torch.save writes
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
_ABSOLUTE = re.compile(r"(/|~|[A-Za-z]:[\\/]|\\\\|file:)")
_DEEP_ABSOLUTE = re.compile(r"(/|~\w*/|[A-Za-z]:[\\/]|\\\\|file:)[^\s/]+[/\\]\S*$")  # a path, not a token as "/"
_OF_A_PLACE = re.compile(r"path|name|dir|folder|file|data|images|model")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")  # a token may look like a path
_MAX_NAMED = 3


@dataclass(frozen=True)
class Upload:
    """What goes to the hub.

    Attributes:
        sizes: bytes of every file, by its name in the repository.
        left_out: what lies in the folder and stays there.
        verification: what `verify` said of it.
        url: where it is, or would be.
    """

    folder: Path
    repo_id: str
    sizes: dict[str, int]
    left_out: tuple[str, ...]
    verification: Verification
    url: str


def push(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    dry_run: bool = False,
    force: bool = False,
    api: HfApi | None = None,
) -> Upload:
    """Uploads a checkpoint in one commit, after looking at every file of it.

    On the hub the card's examples name the repository, and the list of files has a whole hash of every file. The folder
    stays as it is.

    Args:
        repo_id: "user/name"; made where it isn't there.
        private: make it private, if it is made.
        dry_run: look at everything, and upload nothing.
        force: also a folder that `verify` doesn't find as written, one that Transformers saved, for instance.
        api: the hub and the token; `None`: as `huggingface_hub` is set up.

    Raises:
        FoveateError: a folder with something in it that must not be uploaded, one that is not as written, a name that
            is none, or a hub that refuses.
    """
    api = api or HfApi()
    folder = Path(folder).expanduser()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise FoveateError(f"'{repo_id}' is no name of a repository: write user/name.")
    found = verify(folder, full=not dry_run)  # says first whether there is a folder
    names = [*listed_files(folder), *(name for name in (MANIFEST_FILE, *RECORDS) if _is_there(folder / name))]
    if refused := [f"{name} {complaint}" for name in names for complaint in _complaints(folder, name)]:
        more = f", and {len(refused) - _MAX_NAMED} more" if len(refused) > _MAX_NAMED else ""
        raise FoveateError(f"{folder} can't be pushed: {'; '.join(refused[:_MAX_NAMED])}{more}.")
    if found.upgrade_due and not force:
        raise FoveateError(
            f"{folder} is not pushed, as its code is not that of foveate {package_version()}: bring it up to date with "
            f"`foveate upgrade {folder}`, or --force it."
        )
    if not found.as_written and not force:
        raise FoveateError(
            f"{folder} is not pushed, as it is {found.verdict.rstrip('.')}: see `foveate verify {folder}`, or "
            "--force it."
        )
    if not _is_there(folder / CARD_FILE):
        raise FoveateError(f"{folder} has no card: write one with `foveate card {folder}`.")
    # A damaged file is found before half of the others are on the hub. In the adapter layout there may be none.
    if BASE_FIELDS[0] not in read_config(folder) or any(folder.glob(f"*{WEIGHTS}")):
        read_shards(folder)

    sizes = {name: (folder / name).stat().st_size for name in sorted(names)}
    left_out = tuple(name for name in LEFT_OUT if _is_there(folder / name))
    upload = Upload(folder, repo_id, sizes, left_out, found, f"{api.endpoint}/{repo_id}")
    if not dry_run:
        _upload(upload, private, api)
    return upload


def _upload(upload: Upload, private: bool, api: HfApi) -> None:
    changed = _as_published(upload)
    operations = [CommitOperationAdd(name, changed.get(name, upload.folder / name)) for name in upload.sizes]
    try:
        # Nothing is said of privacy but that it is wanted: an organisation may have a rule of its own.
        api.create_repo(upload.repo_id, private=private or None, exist_ok=True)
        api.create_commit(upload.repo_id, operations, commit_message="Upload by foveate")
    except Exception as error:  # the client raises many kinds, and others from version to version
        raise FoveateError(
            f"{upload.repo_id} can't be pushed to {api.endpoint} ({type(error).__name__}: "
            f"{first_sentence(error).rstrip('.')}): check the name and the network, and log in with `hf auth login`."
        ) from error


def _as_published(upload: Upload) -> dict[str, bytes]:
    """The files that say on the hub what they couldn't say before: the card where it lies, the list all hashes."""
    card = (upload.folder / CARD_FILE).read_text(encoding="utf-8").replace(PLACE, upload.repo_id)
    published = {CARD_FILE: card.encode()}
    manifest = read_manifest(upload.folder)
    if manifest is not None and upload.verification.as_written:
        published[MANIFEST_FILE] = to_json(complete(manifest, upload.folder)).encode()
    return published


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


# What is refused


def _complaints(folder: Path, name: str) -> Iterator[str]:
    """What is wrong with a file, to be read after its name."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        yield "is a link out of the folder"
        return
    if not path.is_file():
        yield "is no file"
        return
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix.lower() in _PICKLES or _MAGIC.match(start):
        yield "is a pickle or an archive, which can run code: save weights as safetensors"
        return
    if path.suffix not in _BELONGING and name not in RECORDS:
        yield "is no part of a checkpoint: move it elsewhere"
    yield from _complaints_of_text(path, name)


def _complaints_of_text(path: Path, name: str) -> Iterator[str]:
    content = path.read_bytes() if path.suffix != WEIGHTS else header_of(path)
    if _TOKEN.search(content):
        yield "has a token of the hub in it: take it out, and revoke it where others may have seen it"
    if path.name in _VOCABULARIES or path.suffix not in (".json", ".yaml"):
        return
    try:
        parsed = yaml.safe_load(content) if path.suffix == ".yaml" else json.loads(content)
    except (ValueError, yaml.YAMLError):
        yield "can't be read"
        return
    for place, value in _strings_by_key(parsed, ""):
        pattern = _ABSOLUTE if _OF_A_PLACE.search(place.lower()) else _DEEP_ABSOLUTE
        if pattern.match(value):
            yield f"has a path of this machine in it ({place}: {value}): write a name instead"


def _strings_by_key(content: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every string of a JSON content with the key that it stands under."""
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, dict):
        for name, value in content.items():
            yield from _strings_by_key(value, str(name))
    elif isinstance(content, list):
        for value in content:
            yield from _strings_by_key(value, key)
