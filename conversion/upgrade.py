"""`foveate upgrade`: the installed version's code in a checkpoint that another version wrote.

Rewritten are the files of code, the references to them (`auto_map`), what the card states and nobody edited, and the
list of files. Weights, tokenizers, adapters and the records of a training stay as they are; settings too. Everything is
worked out before anything is written: a checkpoint is refused with one sentence, or upgraded as a whole.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from foveate.conversion.atomic_folder import atomic_folder, replaced_folder, require_free, sweep_partials, write_anew
from foveate.conversion.bundle import bundle_files
from foveate.conversion.checkpoints import read_config, read_json
from foveate.conversion.file_copy import copy_files
from foveate.conversion.shipped import LAB_PREFIX
from foveate.conversion.verify import config_class_of
from foveate.errors import FoveateError, first_sentence
from foveate.hub_cards.card import PLACE, read_base_name, read_facts, render_card
from foveate.hub_cards.card_lines import line_digests, merge_card
from foveate.hub_cards.manifest import (
    LEFT_OUT,
    MANIFEST_FILE,
    RECORDS,
    describe_files,
    differs,
    is_newer,
    listed_files,
    new_manifest,
    package_version,
    read_manifest,
    to_json,
)
from foveate.hub_cards.names import CARD_FILE, is_hub_id
from foveate.hub_cards.released_card import released_card


#: Files in which Transformers looks up which code serves which Auto class.
_REFERRING = (
    CONFIG_NAME,
    PROCESSOR_NAME,
    IMAGE_PROCESSOR_NAME,
    "video_preprocessor_config.json",
    "tokenizer_config.json",
)
_CODE = ".py"
_MAX_NAMED = 3
_SMALL_FILES_BYTES = 1_000_000  # what an upgrade writes: code, a card, a list


@dataclass(frozen=True)
class Upgrade:
    """What an upgrade did.

    Attributes:
        place: the folder, or the address on the hub.
        before: the version whose code and list it had; `None` where it had no list of files.
        after: the version that it has now.
        written: files that were changed or are new, by name.
        removed: files of code that no longer belong.
        edited: files of code that were not as their list said, and were written anew or removed.
        kept_passages: how many passages of the card state what this version states otherwise, and stay because they
            were edited.
        left: files of other code, with `force`, which Transformers doesn't load.
    """

    place: str
    before: str | None
    after: str
    written: tuple[str, ...]
    removed: tuple[str, ...]
    edited: tuple[str, ...]
    kept_passages: int
    left: tuple[str, ...] = ()

    @property
    def is_change(self) -> bool:
        return bool(self.written or self.removed)

    @property
    def findings(self) -> dict[str, tuple[str, ...]]:
        """Files by what became of them."""
        kinds = {
            "written": self.written,
            "removed": self.removed,
            "was edited, and replaced": self.edited,
            "other code, left there": self.left,
        }
        return {kind: names for kind, names in kinds.items() if names}


@dataclass(frozen=True)
class _Plan:
    """What is to be written.

    Attributes:
        files: content by name, of those alone that it changes.
        upgrade: what is told of it.
    """

    files: Mapping[str, bytes]
    upgrade: Upgrade


def upgrade(
    checkpoint: str | Path,
    out: str | Path | None = None,
    *,
    push: bool = False,
    force: bool = False,
    api: HfApi | None = None,
) -> Upgrade:
    """Brings a checkpoint's code, card and list of files up to date with the installed version.

    Args:
        checkpoint: a folder, upgraded in place, all at once; or a hub id, with `out` or `push`.
        out: a new folder for the upgraded checkpoint, which leaves the other as it is.
        push: upgrade a repository on the hub by one commit; its weights are not downloaded.
        force: also where files other than code and card are not as the list of files says, or where there is code that
            no checkpoint of foveate's has; the new list says of all files what they are.
        api: the hub and the token; `None`: as `huggingface_hub` is set up.

    Raises:
        FoveateError: no checkpoint that foveate or Transformers wrote, one that was changed, a folder that can't be
            written to, a hub that refuses. The checkpoint is as it was then.
    """
    name = str(checkpoint)
    if name.startswith(LAB_PREFIX):
        raise FoveateError(f"{name} ships with foveate, and is always up to date.")
    if push and out is not None:
        raise FoveateError("--out writes a folder and --push a commit on the hub: give one of them.")
    folder = Path(checkpoint).expanduser()
    path = Path(os.path.realpath(folder))
    sweep_partials(path)
    if not folder.is_dir():
        return _upgrade_of_hub(name, out, push, force, api or HfApi())
    if push:
        raise FoveateError(
            f"{name} is a folder, and --push is for a repository on the hub: upgrade the folder, then "
            f"`foveate push {name} USER/NAME`, or give USER/NAME here."
        )
    if out is None:
        _require_replaceable(name, path)
    plan = _plan(name, path, {}, force)
    if out is not None:
        return _upgrade_copy(path, _absolute(out), plan)
    if plan.upgrade.is_change:
        with replaced_folder(path) as fresh:
            _write(plan, fresh)
    return plan.upgrade


def _upgrade_copy(folder: Path, out: Path, plan: _Plan) -> Upgrade:
    kept = [name for name in _files_of(folder) if name not in plan.upgrade.removed and name not in plan.files]
    num_bytes = sum((folder / name).stat().st_size for name in kept) + _SMALL_FILES_BYTES
    with atomic_folder(out, num_bytes) as fresh:
        for name in (*kept, *plan.files):
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        copy_files({folder / name: fresh / name for name in kept})
        _write(plan, fresh)
    return replace(plan.upgrade, place=str(out))


def _files_of(folder: Path) -> list[str]:
    """What a copy of a checkpoint has to have: what a hub or a file system added stays where it is."""
    beside = (name for name in (MANIFEST_FILE, *RECORDS) if (folder / name).is_file())
    return sorted({*(name for name in listed_files(folder) if (folder / name).is_file()), *beside})


def _write(plan: _Plan, folder: Path) -> None:
    for name, content in plan.files.items():
        write_anew(folder / name, content)
    for name in plan.upgrade.removed:
        (folder / name).unlink(missing_ok=True)


def _absolute(out: str | Path) -> Path:
    path = Path(os.path.abspath(Path(out).expanduser()))
    require_free(path)
    return path


def _require_replaceable(name: str, folder: Path) -> None:
    """Raises `FoveateError` for a folder that another one can't take the place of."""
    out = "give --out OUT for an upgraded copy"
    if folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir():
        raise FoveateError(f"{name} is the cache's copy of a repository on the hub: {out}.")
    if os.path.ismount(folder):
        raise FoveateError(f"{name} is where a file system is mounted, and can't be replaced as a whole: {out}.")
    if Path.cwd().is_relative_to(folder):
        raise FoveateError(
            f"{name} is replaced as a whole, and you are in it: go elsewhere (`cd {folder.parent}`) and give its path, "
            f"or {out}."
        )


# On the hub


def _upgrade_of_hub(name: str, out: str | Path | None, push: bool, force: bool, api: HfApi) -> Upgrade:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise FoveateError(f"{name} is neither a folder nor a name on the hub (USER/NAME).")
    if out is None and not push:
        raise FoveateError(
            f"There is no folder {name}; if it is on the hub, --out OUT writes an upgraded copy, and --push upgrades "
            "it there by one commit."
        )
    target = None if out is None else _absolute(out)
    with _hub_errors(name, api):
        info = api.model_info(name, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    if target is not None:
        with atomic_folder(target, sum(sizes.values()) + _SMALL_FILES_BYTES) as fresh:
            with _hub_errors(name, api):
                api.snapshot_download(name, revision=info.sha, local_dir=fresh)
            shutil.rmtree(fresh / ".cache", ignore_errors=True)
            plan = _plan(name, fresh, {}, force)
            _write(plan, fresh)
        return replace(plan.upgrade, place=str(target))
    # Files in large file storage have a hash there; all others are small.
    large = {
        sibling.rfilename: {"size": sibling.size, "sha256": sibling.lfs.sha256}
        for sibling in info.siblings or []
        if sibling.lfs and Path(sibling.rfilename).parts[0] not in LEFT_OUT
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        small = [file for file in sizes if file not in large]
        with _hub_errors(name, api):
            api.snapshot_download(name, revision=info.sha, local_dir=folder, allow_patterns=small)
        plan = _plan(name, folder, large, force)
        if plan.upgrade.is_change:
            with _hub_errors(name, api):
                _commit(name, plan, str(info.sha), api)
    return replace(plan.upgrade, place=f"{api.endpoint}/{name}")


def _commit(name: str, plan: _Plan, parent: str, api: HfApi) -> None:
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(file, content) for file, content in plan.files.items()
    ]
    operations += [CommitOperationDelete(file) for file in plan.upgrade.removed]
    message = f"Upgrade code, card and list of files to foveate {package_version()}"
    # Refused where the repository has changed in the meantime.
    api.create_commit(name, operations, commit_message=message, parent_commit=parent)


@contextmanager
def _hub_errors(name: str, api: HfApi) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the client raises many kinds, and others from version to version
        raise FoveateError(
            f"{name} can't be upgraded from {api.endpoint} ({type(error).__name__}: "
            f"{first_sentence(error).rstrip('.')}): check the name and the network, and log in with `hf auth login`."
        ) from error


# What is to be written


def _plan(name: str, folder: Path, large: Mapping[str, dict[str, Any]], force: bool) -> _Plan:
    """Works out an upgrade.

    Args:
        name: the checkpoint, as the user calls it.
        folder: where its files are, but for those of `large`.
        large: size and hash of files that are on the hub alone.
        force: as in [`upgrade`].

    Raises:
        FoveateError: as [`upgrade`] does.
    """
    try:
        config_class: Any = config_class_of(folder)
        config = read_config(folder)
        manifest = read_manifest(folder)
        try:
            config_class.from_dict(config)
        except ValueError as error:
            raise FoveateError(f"{folder}'s config can't be read: {first_sentence(error)}") from error
        if manifest is not None and is_newer(manifest["foveate"]):
            raise FoveateError(
                f"{name} was written by foveate {manifest['foveate']}, and the installed {package_version()} has older "
                "code: `pip install --upgrade foveate` first."
            )
        present = sorted({*listed_files(folder), *large})
        listed = {} if manifest is None else manifest["files"]
        own_code = set(listed) if manifest is not None else _reached_code(folder, present)
        own_code = {file for file in own_code if file.endswith(_CODE)}
        unlisted = _unlisted_changes(folder, present, large, None if manifest is None else listed, own_code)
        if unlisted and not force:
            raise FoveateError(_refusal(name, unlisted))
        return _plan_files(name, folder, present, large, config_class, manifest, own_code, unlisted)
    except FoveateError as error:
        if name == str(folder):
            raise
        raise FoveateError(str(error).replace(str(folder), name)) from error


def _unlisted_changes(
    folder: Path,
    present: list[str],
    large: Mapping[str, dict[str, Any]],
    listed: Mapping[str, dict[str, Any]] | None,
    own_code: set[str],
) -> dict[str, list[str]]:
    """What an upgrade would bless silently, by kind: all but the checkpoint's own code, which is written anew."""
    found = {"code that foveate did not write": [n for n in present if n.endswith(_CODE) and n not in own_code]}
    if listed is not None:
        others = [file for file in present if not file.endswith(_CODE)]
        found["changed"] = [n for n in others if n in listed and _is_changed(folder, n, listed[n], large)]
        found["missing"] = sorted(n for n in listed.keys() - set(present) if not n.endswith(_CODE))
        found["not listed"] = [file for file in others if file not in listed]
    return {kind: names for kind, names in found.items() if names}


def _is_changed(
    folder: Path, file: str, entry: Mapping[str, Any], large: Mapping[str, dict[str, Any]], full: bool = False
) -> bool:
    if file in large:
        return any(entry.get(key, value) != value for key, value in large[file].items())
    return not (folder / file).is_file() or differs(folder / file, dict(entry), full)


def _refusal(name: str, unlisted: Mapping[str, list[str]]) -> str:
    words = []
    for kind, names in unlisted.items():
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        words.append(f"{kind}: {', '.join(names[:_MAX_NAMED])}{more}")
    return (
        f"{name} is not upgraded, as it is not what was written ({'; '.join(words)}): look at these files, or --force "
        "the upgrade, which lists all files as they are."
    )


def _reached_code(folder: Path, present: list[str]) -> set[str]:
    """Files of code that a checkpoint without a list loads: those of its `auto_map`s, and what they import."""
    references = [
        reference
        for file in _REFERRING
        if (folder / file).is_file()
        for auto_map in _auto_maps(read_json(folder / file))
        for reference in auto_map.values()
        if isinstance(reference, str)
    ]
    waiting = [f"{reference.rpartition('--')[2].partition('.')[0]}{_CODE}" for reference in references]
    reached: set[str] = set()
    while waiting:
        file = waiting.pop()
        if file in present and file not in reached:
            reached.add(file)
            waiting += [f"{module}{_CODE}" for module in _imported(folder / file)]
    return reached


def _imported(path: Path) -> Iterator[str]:
    """Modules beside a file that it imports; none where it is no Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            yield node.module


def _auto_maps(content: Any) -> Iterator[dict[str, Any]]:
    """Every `auto_map` of a JSON content; a processor's parts have their own."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "auto_map" and isinstance(value, dict):
                yield value
            else:
                yield from _auto_maps(value)


def _plan_files(
    name: str,
    folder: Path,
    present: list[str],
    large: Mapping[str, dict[str, Any]],
    config_class: Any,
    manifest: dict[str, Any] | None,
    own_code: set[str],
    unlisted: Mapping[str, list[str]],
) -> _Plan:
    code = bundle_files(config_class)
    files: dict[str, bytes] = {**code, **_rewritten_references(folder, config_class)}
    has_card = (folder / CARD_FILE).is_file()
    base_name = read_base_name(folder) if has_card else Path(name).name
    if manifest is not None:
        base_name = manifest["base"]
    facts = replace(read_facts(folder, base_name), results=())
    card, kept_passages = None, 0
    if has_card:
        card = render_card(facts)
        present_card = (folder / CARD_FILE).read_bytes().decode()
        written = (manifest or {}).get("card")
        before = written.split(" ") if written else line_digests(released_card(facts, present_card))
        merged, kept_passages = _merged_card(before, present_card, card)
        files[CARD_FILE] = merged.encode()
    removed = tuple(sorted(own_code & set(present) - code.keys()))

    # What stays as it is keeps its entry; what differs from it, by `force`, gets a new one.
    remaining = {file for file in present if file not in removed}
    listed = {} if manifest is None else manifest["files"]
    known = {file: {**listed.get(file, {}), **large[file]} for file in large if file in remaining}
    for file in set(unlisted.get("changed", ())) & known.keys():
        known[file] = large[file]
    for file in remaining - known.keys() - set(unlisted.get("changed", ())):
        if file in listed and file not in files:
            known[file] = listed[file]
    for file, content in files.items():
        if file not in RECORDS:
            known[file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    entries = describe_files(folder, remaining | known.keys(), known)
    method = facts.config["compression"]["method"]
    files[MANIFEST_FILE] = to_json(new_manifest(method, base_name, entries, card)).encode()

    written_files = {file: content for file, content in files.items() if not _holds(folder / file, content)}
    edited = [n for n in own_code & set(present) if n in listed and _is_changed(folder, n, listed[n], large)]
    return _Plan(
        dict(sorted(written_files.items())),
        Upgrade(
            place=name,
            before=None if manifest is None else manifest["foveate"],
            after=package_version(),
            written=tuple(sorted(written_files)),
            removed=removed,
            edited=tuple(sorted(edited)),
            kept_passages=kept_passages,
            left=tuple(file for file in present if file.endswith(_CODE) and file not in own_code | code.keys()),
        ),
    )


def _rewritten_references(folder: Path, config_class: Any) -> dict[str, bytes]:
    """The files that refer to code, as this version refers to it."""
    references = config_class.remote_code_map()
    rewritten = {}
    for file in _REFERRING:
        if not (folder / file).is_file():
            continue
        text = (folder / file).read_text(encoding="utf-8")
        content = read_json(folder / file)
        for auto_map in _auto_maps(content):
            auto_map.update({auto: references[auto] for auto in auto_map.keys() & references.keys()})
        if file == CONFIG_NAME:
            before = content.get("auto_map")
            content["auto_map"] = {**(before if isinstance(before, dict) else {}), **references}
        if content != json.loads(text):
            rewritten[file] = (json.dumps(content, indent=2, ensure_ascii=text.isascii()) + "\n").encode()
    return rewritten


def _merged_card(written: list[str], present: str, new: str) -> tuple[str, int]:
    """The card with what this version states, and how many edited passages state otherwise. A card on the hub names
    its repository in its examples, where one in a folder has a placeholder."""
    found = re.search(r'from_pretrained\("([^"]+)", dtype="auto", trust_remote_code=True\)', present)
    place = found.group(1) if found and is_hub_id(found.group(1)) else PLACE
    neutral = re.sub(rf"(?<![\w/-]){re.escape(place)}(?![\w/-])", PLACE, present)
    merged = merge_card(written, neutral, new)
    return merged.text.replace(PLACE, place), merged.num_kept


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content
