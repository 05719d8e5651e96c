"""The command `foveate`, run in this process."""

import os

from typer.testing import CliRunner

from foveate.cli import app


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def assert_refused(complaint: str, *words) -> None:
    """One line on stderr, nothing on stdout, status 2, and nothing left in the current folder."""
    before = sorted(os.listdir())
    found = run(*words)
    assert found.exit_code == 2, found.output
    assert found.stdout == ""
    assert found.stderr.startswith("foveate: ") and found.stderr.count("\n") == 1
    assert complaint in found.stderr
    assert "Traceback" not in found.output
    assert sorted(os.listdir()) == before
