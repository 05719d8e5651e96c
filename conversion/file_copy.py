"""Copies of large files, shared with the original where the file system can do that, and hard links."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ..errors import FoveateError


_CLONE = 0x40049409  # Linux's FICLONE
_PIECE = 1 << 26  # bytes between two calls of `advance`
_CANT_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)


def copy_file(source: Path, target: Path, advance: Callable[[int], object] = lambda _: None) -> None:
    """Copies a file: as a reflink, which shares the original's blocks until one of the two is written to, where the
    file system has those; else piece by piece, in flat memory.

    Args:
        source: an existing file.
        target: a new one.
        advance: called with the number of bytes that were just copied.
    """
    with source.open("rb") as original, target.open("xb") as copy:
        if _reflink(original, copy):
            advance(source.stat().st_size)
            return
        while copied := _copy_piece(original, copy):
            advance(copied)


def _reflink(original: BinaryIO, copy: BinaryIO) -> bool:
    """Whether it could be done."""
    try:
        import fcntl  # not on Windows

        fcntl.ioctl(copy.fileno(), _CLONE, original.fileno())
    except (ImportError, OSError):
        return False
    return True


def _copy_piece(original: BinaryIO, copy: BinaryIO) -> int:
    """Bytes copied from where both files are, 0 at the end."""
    if hasattr(os, "sendfile") and os.uname().sysname == "Linux":  # elsewhere it writes to sockets only
        return os.sendfile(copy.fileno(), original.fileno(), None, _PIECE)
    return copy.write(original.read(_PIECE))


def link_file(source: Path, target: Path) -> None:
    """Makes a hard link: two names of one file, which a write changes under both.

    Raises:
        FoveateError: the two are not on one file system, or it has no links.
    """
    try:
        os.link(os.path.realpath(source), target)  # the hub's cache holds symbolic links
    except OSError as error:
        if error.errno not in _CANT_LINK:
            raise
        raise FoveateError(
            f"{source} can't be linked to {target.parent.parent} ({error.strerror}): leave --link out, to copy it."
        ) from error
