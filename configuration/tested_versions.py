"""The versions of Transformers that this code was tested with, and one sentence where a newer one is installed.

The file is part of every checkpoint's remote code. `compression_settings`, which a checkpoint's config loads first,
calls it when it is imported. Nothing is imported here that a later Transformers could lack, so the sentence comes
before an error that it explains.
"""

from __future__ import annotations

import re

import transformers
from transformers.utils import logging


#: Every version that the tests run on, the oldest first. `setup.cfg` excludes the first minor after the last of them.
TESTED_TRANSFORMERS = ("4.57.6", "5.19.0", "5.24.0")


def warn_if_untested() -> None:
    """Says once a process, by Transformers' logger, that the installed Transformers is newer than the tested ones."""
    sentence = untested_sentence(transformers.__version__, __name__)
    if sentence is not None:
        # Transformers loads this file anew for each class of a checkpoint: the logger's fixed name makes it once.
        logging.get_logger("transformers.foveate").warning_once(sentence)


def untested_sentence(installed: str, module: str) -> str | None:
    """What to tell the user about a version of Transformers; `None` for one that is not newer than the tested ones.

    Args:
        installed: the version, for instance "5.25.0.dev0".
        module: full name of this module, which says whether it was loaded from a checkpoint or from the package.
    """
    first, last = (_minor_of(version) for version in (TESTED_TRANSFORMERS[0], TESTED_TRANSFORMERS[-1]))
    found = _minor_of(installed)
    if found is None or last is None or first is None or found <= last:
        return None
    in_package = module.partition(".")[0] == "foveate"
    subject = "This version of foveate" if in_package else "This checkpoint's code"
    way_out = "pip install --upgrade foveate" if in_package else "foveate upgrade CKPT"
    what = "looks for a newer one" if in_package else "brings the code up to date"
    return (
        f"{subject} was tested with Transformers {first[0]}.{first[1]} to {last[0]}.{last[1]} and is untested with the "
        f"installed {installed}: `{way_out}` {what}."
    )


def _minor_of(version: str) -> tuple[int, int] | None:
    """`"5.25.0.dev0"` → (5, 25); `None` for what has no such beginning."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers.group(1)), int(numbers.group(2))) if numbers else None
