"""Copies of large files, shared with the original where the file system can do that, and hard links."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import BinaryIO

from foveate.errors import FoveateError


# Linux's FICLONE. `os.copy_file_range`, which makes reflinks by itself, takes longer where there are none: two files of
# 2 GB on ext4 3.4 s, and these pieces 2.5 s (median of 5, two files at a time, written through to the disk).
_CLONE = 0x40049409
_PIECE = 1 << 22  # bytes between two calls of `advance`
_AT_ONCE = 2  # files: one core alone moves bytes more slowly than a fast disk takes them
CANT_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)


def copy_files(copies: Mapping[Path, Path], advance: Callable[[int], object] = lambda _: None) -> None:
    """Copies files, two at a time.

    Args:
        copies: existing files, and the new one that each is copied to.
        advance: called with the number of bytes that were just copied, from several threads.
    """
    stopped = threading.Event()

    def advance_or_stop(count: int) -> None:
        if stopped.is_set():
            raise InterruptedError
        advance(count)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        waiting = [pool.submit(copy_file, source, target, advance_or_stop) for source, target in copies.items()]
        try:
            for copy in as_completed(waiting):
                copy.result()
        except BaseException:  # an interrupt from the keyboard too: nobody waits for gigabytes then
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
        piece = memoryview(bytearray(_PIECE))
        while copied := original.readinto(piece):
            copy.write(piece[:copied])
            advance(copied)


def _reflink(original: BinaryIO, copy: BinaryIO) -> bool:
    """Whether it could be done."""
    try:
        import fcntl  # not on Windows

        fcntl.ioctl(copy.fileno(), _CLONE, original.fileno())
    except (ImportError, OSError):
        return False
    return True


def link_file(source: Path, target: Path) -> None:
    """Makes a hard link: two names of one file, which a write changes under both.

    Raises:
        FoveateError: the two are not on one file system, or it has no links.
    """
    try:
        os.link(os.path.realpath(source), target)  # the hub's cache holds symbolic links
    except OSError as error:
        if error.errno not in CANT_LINK:
            raise
        raise FoveateError(
            f"{source} can't be linked from the new folder ({error.strerror}): leave --link out, to copy it."
        ) from error
