"""A folder that appears under its name when it is complete, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import FoveateError


_FULL = (errno.ENOSPC, errno.EDQUOT)


def require_free(out: Path) -> None:
    """Raises `FoveateError` if `out` is there already. An empty folder may be."""
    if not os.path.lexists(out) or (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        return
    kind = "and is not empty" if out.is_dir() else "and is not a folder"
    raise FoveateError(f"{out} exists already {kind}: choose another name or remove it first.")


@contextmanager
def atomic_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """Gives a new folder beside `out` that is renamed to `out` at the end.

    If the block ends with any exception, an interrupt among them, the folder is removed and nothing is left behind; and
    so it is if the process is killed.

    Args:
        out: absolute path of the folder to be; folders above it are made.
        num_bytes: about how much will be written.

    Raises:
        FoveateError: `out` exists, the disk is full or would be, or the place can't be written to.
    """
    require_free(out)
    missing = [folder for folder in out.parents if not folder.exists()]  # the deepest first
    existing = next(folder for folder in out.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise FoveateError(_no_space(out, num_bytes, f", and {_megabytes(free)} MB are free"))
    partial = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    try:
        # Watched before it is there: no moment is left in which it would stay.
        with _removed_if_killed(partial, missing):
            partial.mkdir(parents=True)
            yield partial
            _sync(partial)
            os.rename(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in missing:
            _remove_if_empty(folder)
        if _is_disk_full(error):
            raise FoveateError(_no_space(out, num_bytes)) from error
        if isinstance(error, OSError):
            file = f" ({error.filename})" if error.filename else ""
            raise FoveateError(f"{out} can't be written: {error.strerror or error}{file}.") from error
        raise


@contextmanager
def _removed_if_killed(folder: Path, parents: Sequence[Path]) -> Iterator[None]:
    """A process that waits for the end of this one, whatever it dies of, and removes the folder if it is there, and
    those of `parents` (the deepest first) that are empty."""
    shell = shutil.which("sh")
    if shell is None:
        yield
        return
    clean = 'cat > /dev/null; rm -rf -- "$1"; shift; for parent; do rmdir -- "$parent" 2> /dev/null; done'
    command = [shell, "-c", clean, "sh", str(folder), *map(str, parents)]
    # In a session of its own: an interrupt from the keyboard goes to all processes of this one.
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as watcher:
        try:
            yield
        finally:
            if watcher.stdin is not None:
                watcher.stdin.close()


def _sync(folder: Path) -> None:
    """Small files reach the disk before the name does. Weights are left to the system, for time's sake: if the power
    fails before they are written, their size doesn't fit their header, which every reader checks."""
    for path in folder.rglob("*"):
        if path.suffix != ".safetensors":
            _sync_path(path)
    _sync_path(folder)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # someone else uses it by now
        folder.rmdir()


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    # Safetensors and tokenizers, written in Rust, carry the system's error as text only.
    return any(f"(os error {number})" in str(error) for number in _FULL)


def _no_space(out: Path, num_bytes: int, more: str = "") -> str:
    return f"No space left on the device that holds {out}: the checkpoint needs about {_megabytes(num_bytes)} MB{more}."


def _megabytes(num_bytes: int) -> int:
    return -(-num_bytes // 10**6)
