"""A folder that is there as a whole or not at all, whatever a process that writes it dies of."""

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest

from foveate.conversion import atomic_folder as module
from foveate.conversion.atomic_folder import atomic_folder, sweep_partials

from ..helpers.killed import run_and_kill


pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.skipif(sys.platform == "win32", reason="no fork and no locks"),
]

FILES = [f"{index}.json" for index in range(5)]


def write(out: Path) -> None:
    with atomic_folder(out, 1) as folder:
        for name in FILES:
            (folder / name).write_text("{}")


def leave_partial(out: Path, lock: str | None = None) -> Path:
    """What a killed run leaves; `lock` is its file's name, this machine's own if `None`."""
    partial = out.with_name(f".{out.name}.partial-0123abcd")
    (partial / "new").mkdir(parents=True)
    (partial / "new" / "file").touch()
    (partial / lock if lock else module._lock_of(partial)).touch()
    return partial


class TestAKilledRun:
    def test_leaves_nothing_or_the_whole_and_a_hidden_folder_that_the_next_run_removes(self, tmp_path):
        """By SIGKILL, which no process can handle, at every step."""
        out = tmp_path / "above" / "out"
        seen, step = set(), 0
        while run_and_kill(tmp_path, step, lambda: write(out)):
            left = os.listdir(out.parent) if out.parent.exists() else []
            beside = [name for name in left if name != "out"]
            assert len(beside) <= 1 and all(name.startswith(".out.partial-") for name in beside)
            if "out" in left:
                assert sorted(os.listdir(out)) == FILES
                shutil.rmtree(out)
            seen.add("whole" if "out" in left else "nothing")
            write(out)
            assert os.listdir(out.parent) == ["out"] and sorted(os.listdir(out)) == FILES
            shutil.rmtree(out.parent)
            step += 1
        assert seen == {"nothing", "whole"} and step > 8

    def test_in_a_sweep_is_swept_by_the_next(self, tmp_path):
        out, step = tmp_path / "out", 0
        partial = leave_partial(out)
        while run_and_kill(tmp_path, step, lambda: sweep_partials(out)):
            sweep_partials(out)
            assert os.listdir(tmp_path) == []
            leave_partial(out)
            step += 1
        assert not partial.exists() and step > 4


class TestASweep:
    def test_leaves_a_run_that_goes_on(self, tmp_path):
        out = tmp_path / "out"
        with atomic_folder(out, 1) as folder:
            sweep_partials(out)
            with pytest.raises(RuntimeError), atomic_folder(out, 1):
                raise RuntimeError
            (folder / "file").touch()
        assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["file"]

    def test_leaves_what_is_of_another_machine_or_another_target(self, tmp_path):
        """The lock of a run on another machine may not be seen here."""
        partial = leave_partial(tmp_path / "out", "another-machine.lock")
        other = leave_partial(tmp_path / "out2")
        write(tmp_path / "out")
        assert (partial / "new" / "file").exists() and (other / "new" / "file").exists()

    def test_leaves_all_where_the_system_has_no_locks(self, tmp_path, monkeypatch):
        partial = leave_partial(tmp_path / "out")
        monkeypatch.setattr(module, "fcntl", None)
        write(tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == [partial.name, "out"]

    def test_leaves_a_run_whose_file_system_has_no_locks(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            patch.setattr(module.fcntl, "flock", refuse)
            running = atomic_folder(out, 1)
            folder = running.__enter__()
        sweep_partials(out)
        assert folder.exists()
        running.__exit__(None, None, None)
        assert os.listdir(tmp_path) == ["out"]

    def test_between_making_a_folder_and_locking_it_is_noticed(self, tmp_path, monkeypatch):
        flock, seen = module.fcntl.flock, []

        def sweep_once(file, operation):
            if not seen:
                seen.extend(tmp_path.glob(".out.partial-*"))
                sweep_partials(tmp_path / "out")
            flock(file, operation)

        monkeypatch.setattr(module.fcntl, "flock", sweep_once)
        write(tmp_path / "out")
        assert len(seen) == 1 and os.listdir(tmp_path) == ["out"]
