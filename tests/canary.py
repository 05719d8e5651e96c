"""What `make canary` runs in an environment with the newest of everything: imports, the demo, the contract's core.

`--requirements TRANSFORMERS` prints what to install: all that setup.cfg names, without its bounds. Else everything is
tried, and the last line says on which versions, and whether all is well.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement


EXTRAS = ("test", "train", "quant", "import", "eval")
TOLD = ("transformers", "huggingface-hub", "torch", "peft", "accelerate", "bitsandbytes", "tokenizers")
ROOT = Path(__file__).parent.parent

IMPORT_ALL = """
import importlib, pkgutil, warnings
warnings.simplefilter("error", FutureWarning)
import foveate
rooms = ("configuration", "processing", "modeling", "conversion", "hub_cards", "training", "evaluation", "lab")
for room in rooms:
    package = importlib.import_module(f"foveate.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
"""


def requirements(transformers: str) -> list[str]:
    """Names of all packages that foveate and its extras need; for Transformers what is given."""
    found = {}
    for line in requires("foveate") or ():
        requirement = Requirement(line)
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS)
        if wanted and requirement.name != "foveate":
            found[requirement.name] = requirement.name
    found["transformers"] = transformers
    return sorted(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requirements", metavar="TRANSFORMERS")
    arguments = parser.parse_args()
    if arguments.requirements:
        print(*requirements(arguments.requirements), sep="\n")
        return 0
    python = sys.executable
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            "import of every module": [python, "-c", IMPORT_ALL],
            "demo": [python, "-m", "foveate", "demo", folder],
            "contract core": [
                *(python, "-m", "pytest", "-m", "contract_core", "--numprocesses", "auto", "--dist", "loadgroup"),
                str(ROOT / "tests"),
            ],
        }
        failed = [name for name, command in steps.items() if subprocess.run(command, cwd=ROOT).returncode]
    versions = ", ".join(f"{name} {version(name)}" for name in TOLD)
    print(f"Canary: {'FAILED in ' + ', '.join(failed) if failed else 'all is well'} on {versions}.")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
