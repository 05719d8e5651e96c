"""Processes that are killed at a chosen step of what they write."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path


_STEPS = ("open", "os.link", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod")
_WITHOUT_PATH = ("ctypes.call_function", "fcntl.flock")


def run_and_kill(place: Path, step: int, run: Callable[[], object]) -> bool:
    """Runs something in a fork of this process, which is killed (SIGKILL) right before step number `step`.

    Args:
        place: what is written below it counts as a step.

    Returns:
        Whether there was such a step.
    """
    if (child := os.fork()) == 0:
        count = 0

        def kill_at(event, arguments):
            nonlocal count
            relevant = event in _WITHOUT_PATH or (event in _STEPS and str(place) in str(arguments[0]))
            # Whole folders are removed by names relative to an open folder.
            relevant = relevant or (event in ("os.remove", "os.rmdir") and arguments[1] != -1)
            if relevant and event == "open":
                relevant = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))  # reading is no step
            if relevant:
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        try:
            sys.addaudithook(kill_at)
            run()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
