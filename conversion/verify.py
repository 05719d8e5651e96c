"""Whether a folder is what this project wrote: its files as listed, its code as the installed version writes it.

The code is compared with what `write_bundle` would write now, not with the list, which anyone can write: that says
whether `trust_remote_code=True` runs this project's code. Checksums say whether anything else has changed since. They
are no signature: weights and settings are as the one who last wrote the list left them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.conversion.bundle import bundle_files
from foveate.conversion.checkpoints import read_config
from foveate.errors import FoveateError
from foveate.hub_cards.manifest import WEIGHTS, differs, is_newer, listed_files, package_version, read_manifest
from foveate.registry import pair_of_model_type


_WAY_OUT = "`foveate upgrade {}` brings it up to date."


@dataclass(frozen=True)
class Verification:
    """What was found out about a folder.

    Attributes:
        as_written: whether all of it is as this project wrote it.
        verdict: a sentence.
        upgrade_due: whether all files are as their list says, but the code is not the installed version's, so that
            `foveate upgrade` brings it up to date.
        same_code: whether its code is the installed version's.
        changed, missing, foreign: files that are not as written, that are not there, and that don't belong there.
        elsewhere: references to code in other repositories, which Transformers would fetch and run.
        num_files, num_weights: how many listed files were compared, and how many of them hold weights.
        not_whole: weight files of which header and samples were compared, not all bytes.
    """

    folder: Path
    as_written: bool
    verdict: str
    upgrade_due: bool = False
    same_code: bool = False
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    num_files: int = 0
    num_weights: int = 0
    not_whole: tuple[str, ...] = ()

    @property
    def findings(self) -> dict[str, tuple[str, ...]]:
        """What is wrong, by kind."""
        kinds = {
            "changed": self.changed,
            "missing": self.missing,
            "doesn't belong": self.foreign,
            "code elsewhere": self.elsewhere,
        }
        return {kind: names for kind, names in kinds.items() if names}


def verify(folder: str | Path, full: bool = False) -> Verification:
    """Compares a folder with what this project writes.

    Args:
        full: also read weight files whole, where the list has their hash; else their sizes, headers and samples are
            compared, which takes a moment whatever their size.

    Raises:
        FoveateError: there is no such folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FoveateError(f"{folder} is no folder: give one that a checkpoint lies in, or download it first.")
    try:
        expected = bundle_files(config_class_of(folder))
        manifest = read_manifest(folder)
    except FoveateError as error:
        return Verification(folder, False, f"not a checkpoint that foveate wrote: {error}")
    present = listed_files(folder)
    code = _compare_code(folder, present, expected)
    elsewhere = tuple(_code_elsewhere(folder, present))
    if manifest is None:
        due = any(code) and not elsewhere
        verdict = (
            "saved by Transformers, not by foveate (it has no list of files); "
            f"its code is foveate {package_version()}'s: {'no' if any(code) or elsewhere else 'yes'}"
            f"{'; ' + _WAY_OUT.format(folder) if due else '.'}"
        )
        changed, missing, added = map(tuple, code)
        return Verification(folder, False, verdict, due, not any(code), changed, missing, added, elsewhere=elsewhere)
    return _compare_files(folder, present, manifest, code, elsewhere, full)


def config_class_of(folder: Path) -> type:
    """The config class that a folder's `config.json` asks for. Raises `FoveateError` where it is none of ours."""
    model_type = read_config(folder).get("model_type")
    pair = pair_of_model_type(model_type)
    if pair is None:
        raise FoveateError(f"its model_type is '{model_type}', which is no compressed model's.")
    return pair.config_class


def _compare_code(
    folder: Path, present: Iterable[str], expected: dict[str, bytes]
) -> tuple[list[str], list[str], list[str]]:
    """Files of code that differ from the installed version's, that are not there, and that it doesn't have."""
    there = {name for name in present if name.endswith(".py")}
    changed = [name for name, code in expected.items() if name in there and (folder / name).read_bytes() != code]
    return changed, sorted(expected.keys() - there), sorted(there - expected.keys())


def _compare_files(
    folder: Path,
    present: list[str],
    manifest: dict[str, Any],
    code: tuple[list[str], list[str], list[str]],
    elsewhere: tuple[str, ...],
    full: bool,
) -> Verification:
    listed, version = manifest["files"], manifest["foveate"]
    there = [name for name in present if (folder / name).is_file()]  # a link may lead nowhere
    changed = {name for name in there if name in listed and differs(folder / name, listed[name], full)}
    missing, foreign = listed.keys() - set(there), set(present) - listed.keys()
    as_listed = not (changed or missing or foreign or elsewhere)
    newer = is_newer(version)
    due = as_listed and any(code) and not newer
    same_version = version == package_version()
    if same_version or not any(code):
        changed, missing, foreign = (kind.union(more) for kind, more in zip((changed, missing, foreign), code))
    as_written = as_listed and not any(code)
    if as_written:
        verdict = f"as foveate {version} wrote it: {manifest['method']} on {manifest['base']}."
    elif not as_listed:
        verdict = f"not as foveate {version} wrote it."
    elif newer:
        verdict = (
            f"written by a newer version, foveate {version}: files are as it listed them, but {package_version()} is "
            "installed, so only that version can tell whether the code is its own; `pip install --upgrade foveate`."
        )
    elif same_version:
        verdict = (
            f"files are as listed, but its code is not that of the installed foveate {version}: another state of "
            f"{version} wrote it, or its list was changed as well; {_WAY_OUT.format(folder)}"
        )
    else:
        verdict = (
            f"written by another version, foveate {version}: files are as it listed them, but its code is not that of "
            f"{package_version()}, so only that version can tell whether it is its own; {_WAY_OUT.format(folder)}"
        )
    weights = [name for name in listed if name.endswith(WEIGHTS)]
    return Verification(
        folder,
        as_written,
        verdict,
        due,
        not any(code),
        tuple(sorted(changed)),
        tuple(sorted(missing)),
        tuple(sorted(foreign)),
        elsewhere,
        len(listed),
        len(weights),
        tuple(sorted(name for name in weights if not full or "sha256" not in listed[name])),
    )


def _code_elsewhere(folder: Path, present: Iterable[str]) -> Iterator[str]:
    """References of an `auto_map` that name a repository ("user/name--module.Class")."""
    for name in present:
        if name.endswith(".json"):
            try:
                auto_map = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map")
            except (OSError, ValueError, AttributeError):
                continue  # not read by Transformers either, or not an object
            yield from (f"{name}: {reference}" for reference in _strings(auto_map) if "--" in reference)


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, (list, dict)):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _strings(part)
