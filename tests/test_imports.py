"""Folders import one way, down DESIGN's list, and no module is in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

_LOW = frozenset({"errors", "units", "__version__"})
_MODELS = _LOW | {"configuration", "modeling"}
_CARDS = _MODELS | {"processing", "registry", "families"}
_CONVERSION = _CARDS | {"hub_cards"}

#: What the modules of a folder may import of the package beside their own folder. The lab, the command, the package's
#: front and `registration` may import all of it.
MAY_IMPORT = {
    "configuration": _LOW,
    "modeling": _LOW | {"configuration"},
    "processing": _MODELS,
    "hub_cards": _CARDS,
    "conversion": _CONVERSION,
    "training": _CONVERSION | {"conversion", "plugins"},
    "evaluation": _CONVERSION | {"conversion", "plugins"},
}

FOLDERS = (*MAY_IMPORT, "lab", "foveate")


def files_of(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def nodes_of(path: Path) -> Iterator[ast.AST]:
    """Every node of a file, in functions too, but for what only a type checker reads."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting.extend(node.orelse)
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name ("foveate.modeling.core.exact.ExactModelMixin") of what a file imports of the package."""
    for node in nodes_of(path):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.relative_to(ROOT)}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "foveate")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "foveate" else parts
    return ".".join(("foveate", *(part for part in parts if part != "__init__")))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_is_below_it(folder):
    wrong = []
    for path in files_of(folder):
        for line, imported in imports_of(path):
            target = imported.split(".")[1] if "." in imported else imported
            if target != folder and target not in MAY_IMPORT[folder]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {folder} must not import {imported}")
    assert not wrong, "\n".join(wrong)


def test_modules_import_each_other_in_no_circle():
    modules = {module_of(path): path for folder in FOLDERS for path in files_of(folder)}
    imports = {
        module: {
            found
            for _, name in imports_of(path)
            for found in (name, name.rpartition(".")[0])
            if found in modules and found != module
        }
        for module, path in modules.items()
    }
    assert sum(map(len, imports.values())) > len(modules)
    while free := [module for module, others in imports.items() if not others & imports.keys()]:
        for module in free:
            del imports[module]
    assert not imports, f"a circle through, or above, {', '.join(sorted(imports))}"
