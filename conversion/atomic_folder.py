"""A folder that appears under its name when it is complete, or not at all; and one that changes as a whole.

What is not complete is in a hidden folder beside the target, `.NAME.partial-XXXXXXXX`: the folder to be in `new`, one
that is being replaced in `old`, and a lock that the system takes back when the process ends, whatever it dies of. The
next run for the same target removes such a folder whose lock nobody holds. A lock's file is named after the machine,
since some network file systems lock on one machine alone: what another machine left stays there, and so does what was
left where there are no locks (Windows, some network file systems).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import platform
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foveate.conversion.file_copy import CANT_LINK, copy_file
from foveate.errors import FoveateError


try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_HERE, _RENAME_EXCHANGE = -100, 2  # Linux's AT_FDCWD, and the flag of `renameat2`
_NEW, _OLD = "new", "old"  # in a partial folder


def require_free(out: Path) -> None:
    """Raises `FoveateError` if `out` is there already. An empty folder may be."""
    if not os.path.lexists(out) or (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        return
    kind = "and is not empty" if out.is_dir() else "and is not a folder"
    raise FoveateError(f"{out} exists already {kind}: choose another name or remove it first.")


@contextmanager
def atomic_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """Gives a new folder beside `out` that is renamed to `out` at the end.

    If the block ends with any exception, an interrupt among them, the folder is removed and nothing is left behind. If
    the process is killed, a hidden folder stays beside `out`, which the next run for `out` removes.

    Args:
        out: absolute path of the folder to be; folders above it are made.
        num_bytes: about how much will be written.

    Raises:
        FoveateError: `out` exists, the disk is full or would be, or the place can't be written to.
    """
    sweep_partials(out)
    require_free(out)
    missing = [folder for folder in out.parents if not folder.exists()]  # the deepest first
    existing = next(folder for folder in out.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise FoveateError(_no_space(out, num_bytes, f", and {_megabytes(free)} MB are free"))
    try:
        with _partial_folder(out) as partial:
            new = partial / _NEW
            new.mkdir()
            yield new
            _sync(new)
            os.rename(new, out)
    except BaseException as error:
        for folder in missing:
            _remove_if_empty(folder)
        if (told := _told_user(error, out, num_bytes)) is not None:
            raise told from error
        raise


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Gives a copy of a folder, to be changed, that takes the folder's place at the end.

    The copy's files are hard links to the folder's own, so that weights take neither time nor room: a file is changed
    by [`write_anew`], which doesn't write into what both have. The two change places at once where the system can do
    that (Linux), else by two renames, between which the end of the process leaves the folder in a hidden one beside
    it; [`sweep_partials`] gives it its name back. If the block ends with an exception, or the process is killed, the
    folder is as it was, or, if the places were changed already, as it is to be.

    Args:
        folder: absolute path without symbolic links.

    Raises:
        FoveateError: the disk is full, or the place can't be written to.
    """
    try:
        with _partial_folder(folder) as partial:
            new = partial / _NEW
            _link_tree(folder, new)
            yield new
            _sync(new)
            _change_places(folder, new, partial / _OLD)
    except OSError as error:
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        raise _told_user(error, folder, num_bytes) from error  # type: ignore[misc]


def write_anew(path: Path, content: bytes) -> None:
    """Writes a file that has no other name: one that is there is taken away first, and leaves its mode and owner."""
    before = path.stat() if path.exists() else None
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    if before is not None:
        path.chmod(stat.S_IMODE(before.st_mode))
        _give_to(path, before)


def sweep_partials(target: Path) -> None:
    """Removes what runs for `target` that were killed on this machine left beside it. One that was killed between the
    two renames of [`replaced_folder`] is undone: the folder gets its name back."""
    if fcntl is None:
        return
    for partial in sorted(target.parent.glob(f".{glob.escape(target.name)}.partial-????????")):
        with contextlib.suppress(OSError):  # it is in use, or another user's, or another run sweeps it too
            if not _lock_of(partial).exists():
                partial.rmdir()  # empty, if the run was killed before it made the lock; another machine's is not
                continue
            with _lock_of(partial).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(partial, target)


@contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    """Gives a new folder beside `target` that no other run sweeps, and removes it."""
    while True:
        partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
        try:
            partial.mkdir(parents=True)
            with _held_lock(partial):
                if partial.exists():  # not swept before it was locked
                    yield partial
                    return
        finally:
            _remove(partial, target)


@contextmanager
def _held_lock(partial: Path) -> Iterator[None]:
    """Makes and holds the lock of a new partial folder, where there are locks."""
    if fcntl is None:
        yield
        return
    try:
        lock = _lock_of(partial).open("x")
    except FileNotFoundError:  # the folder was swept
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # the file system has no locks: without this file nobody takes the folder for a leftover
            _lock_of(partial).unlink(missing_ok=True)
        yield


def _lock_of(partial: Path) -> Path:
    return partial / f"{platform.node()}.lock"


def _remove(partial: Path, target: Path) -> None:
    """The lock goes last, so that the next run removes what an interrupt leaves. What was to be replaced is never
    removed before something else has its name."""
    if (partial / _OLD).exists() and not os.path.lexists(target):
        os.rename(partial / _OLD, target)
    for name in (_NEW, _OLD):
        shutil.rmtree(partial / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        _lock_of(partial).unlink(missing_ok=True)
        partial.rmdir()


def _link_tree(source: Path, target: Path) -> None:
    """A new folder with hard links to the files of another; copies, where the file system has no such links."""
    target.mkdir()
    for entry in os.scandir(source):
        name = target / entry.name
        if entry.is_symlink():
            name.symlink_to(os.readlink(entry.path))
        elif entry.is_dir():
            _link_tree(Path(entry.path), name)
        else:
            try:
                os.link(entry.path, name)
            except OSError as error:
                if error.errno not in CANT_LINK:
                    raise
                copy_file(Path(entry.path), name)
                shutil.copystat(entry.path, name)
    shutil.copystat(source, target)
    _give_to(target, source.stat())


def _give_to(path: Path, owner: os.stat_result) -> None:
    """The owner and group of another file, where this process may give them."""
    with contextlib.suppress(OSError, AttributeError):  # Windows has no such function
        os.chown(path, owner.st_uid, owner.st_gid)


def _change_places(folder: Path, new: Path, aside: Path) -> None:
    """Exchanges two folders. Where that takes two renames, `folder` ends up at `aside`."""
    if _exchange(folder, new):
        _sync_path(folder.parent)
        return
    os.rename(folder, aside)
    os.rename(new, folder)


def _exchange(folder: Path, other: Path) -> bool:
    """Exchanges two folders at once; whether the system and the file system can do that."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    if rename(_HERE, os.fsencode(folder), _HERE, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(number, os.strerror(number), str(folder))


def _told_user(error: BaseException, out: Path, num_bytes: int) -> FoveateError | None:
    """What to tell the user about an error while a folder was written; `None` for one that is not the system's."""
    if _is_disk_full(error):
        return FoveateError(_no_space(out, num_bytes))
    if isinstance(error, OSError):
        file = f" ({error.filename})" if error.filename else ""
        return FoveateError(f"{out} can't be written: {error.strerror or error}{file}.")
    return None


def _sync(folder: Path) -> None:
    """Small files reach the disk before the name does. Weights are left to the system, for time's sake: if the power
    fails before they are written, their size doesn't fit their header, which every reader checks."""
    for path in folder.rglob("*"):
        if path.suffix != ".safetensors" and not path.is_symlink():
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
