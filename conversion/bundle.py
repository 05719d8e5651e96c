"""The hub bundle: the code of a model as flat files that load in a process in which foveate is not installed.

In the package the files lie in folders and import each other by full names: `from foveate.modeling.core.cache import
LogicalCache`. A checkpoint's remote code is one flat folder: `from .modeling_core_cache import LogicalCache`. The
bundle is made of the modules that the checkpoint's `auto_map` names, its entries, and of the definitions in others that
they reach (`pruning.py`). What is kept is as it stands in the package, but for the modules' names in imports.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.conversion.pruning import prune
from foveate.errors import FoveateError
from foveate.registry import outside_packages, pair_of_model_type


FOLDERS = ("configuration", "processing", "modeling")

#: An import within the package as it has to be written. Transformers finds the files of a bundle by a pattern of this
#: kind, line by line, so an import in any other form would not be found.
_IMPORT_LINE = re.compile(rb"(?P<indent>\s*)from (?P<module>\w+(?:\.\w+)*) import\b")

_INDIRECT_IMPORTS = """

# Written by foveate's bundle. Transformers 4.57 copies, from a local folder, only the files that this one itself names;
# these are the ones that they import in turn.
if False:
"""


@dataclass(frozen=True)
class FlatModule:
    """A module as it lies in the bundle.

    Attributes:
        name: where it comes from, `foveate.modeling.modeling_x`.
        code: its source with flat imports.
        imports: names of the package's modules that it imports, sorted.
    """

    name: str
    code: bytes
    imports: tuple[str, ...]

    @property
    def flat_name(self) -> str:
        return flat_name(self.name)


def flat_name(module: str) -> str:
    """`foveate.modeling.core.cache` → `modeling_core_cache`, its name in a bundle; a module whose name begins with its
    folder's keeps it."""
    package, *parts = module.split(".")
    if not parts or parts[0] not in FOLDERS:  # of a method from outside
        return "_".join((package, *parts))
    return parts[-1] if f"{parts[0]}_" in f"{parts[-1]}_" else "_".join(parts)


def entry_modules(config_class: type) -> list[str]:
    """Names of the modules that a checkpoint's `auto_map` refers to.

    Args:
        config_class: of a compressed model.
    """
    pair = pair_of_model_type(config_class.model_type)  # type: ignore[attr-defined]
    if pair is None:
        raise FoveateError(f"{config_class.__name__} is not the config of a method that foveate knows.")
    return sorted({reference.module for reference in pair.references.values()})


def write_bundle(entries: type | Iterable[str], folder: str | Path) -> list[Path]:
    """Writes the flat code of a compressed model, or of some modules, and of all that they import within the package.

    Args:
        entries: as in [`bundle_files`].
        folder: an existing folder; files of the same names are replaced.

    Returns:
        The files written, sorted.

    Raises:
        FoveateError: as [`bundle_files`] does; nothing is written then.
    """
    files = bundle_files(entries)
    for name, code in files.items():
        (Path(folder) / name).write_bytes(code)
    return [Path(folder) / name for name in files]


def bundle_files(entries: type | Iterable[str]) -> dict[str, bytes]:
    """The files of a bundle, by name, sorted.

    Args:
        entries: the model's or its config's class, for all that its checkpoint needs; or names of modules that
            Transformers will be pointed at.

    Raises:
        FoveateError: an import that a bundle can't have (of another folder, of the package as a whole, relative, in a
            form that Transformers doesn't recognise), or two modules with the same flat name.
    """
    if isinstance(entries, type):
        entries = entry_modules(getattr(entries, "config_class", None) or entries)
    entry_names = set(entries)
    whole = _collect(entry_names)
    _require_unique_names(whole)
    needed = prune({name: _read_source(name) for name in whole}, entry_names)
    modules = {name: _flatten(name, source) for name, source in needed.items()}
    files = {}
    for name, module in modules.items():
        indirect = _name_indirect_imports(module, modules) if name in entry_names else b""
        files[f"{module.flat_name}.py"] = module.code + indirect
    return dict(sorted(files.items()))


def _collect(names: Iterable[str]) -> dict[str, FlatModule]:
    """Modules by name, with all that they import, directly or not."""
    modules: dict[str, FlatModule] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in modules:
            modules[name] = _flatten(name, _read_source(name))
            waiting.extend(modules[name].imports)
    return modules


def _flatten(name: str, source: bytes) -> FlatModule:
    """A module with its imports from the package rewritten."""
    package, _, place = name.partition(".")
    if ("." not in place or place.split(".")[0] not in FOLDERS) and package not in outside_packages():
        raise FoveateError(
            f"{name} can't be in a bundle: only modules in {package}'s folders {', '.join(FOLDERS)} can."
        )
    packages = {package, "foveate", *outside_packages()}
    lines = source.splitlines(keepends=True)
    imports = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            if whole := packages & {alias.name.split(".")[0] for alias in node.names}:
                raise FoveateError(
                    f"{name}, line {node.lineno}, imports {min(whole)} as a whole, which a bundle can't: write `from "
                    f"{min(whole)}.folder.module import name`."
                )
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise FoveateError(f"{name}, line {node.lineno}, has a relative import: write the module's full name.")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in packages:
            imports.add(node.module)
            lines[node.lineno - 1] = _flat_import(name, node, node.module, lines[node.lineno - 1])
    return FlatModule(name, b"".join(lines), tuple(sorted(imports)))


def _read_source(name: str) -> bytes:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    loader: Any = None if spec is None else spec.loader
    if spec is None or not hasattr(loader, "get_source"):
        raise FoveateError(f"{name} can't be in a bundle: there is no source of that name.")
    if spec.origin and Path(spec.origin).is_file():
        return Path(spec.origin).read_bytes()
    return loader.get_source(name).encode()  # of a pair, which has no file


def _flat_import(name: str, node: ast.ImportFrom, module: str, line: bytes) -> bytes:
    """The line of an import from the package, from the module's flat name instead."""
    match = _IMPORT_LINE.match(line)
    if match is None or match.end("indent") != node.col_offset or match["module"].decode() != module:
        raise FoveateError(
            f"{name}, line {node.lineno}, has an import that Transformers would not find in remote code: write "
            "`from package.folder.module import name` on a line of its own."
        )
    if module.split(".")[0] not in outside_packages() and module.count(".") < 2:
        raise FoveateError(
            f"{name}, line {node.lineno}, imports from {module}, which is no file that a bundle could hold: "
            "import from the module itself."
        )
    start, end = match.span("module")
    return line[:start] + b"." + flat_name(module).encode() + line[end:]


def _require_unique_names(modules: dict[str, FlatModule]) -> None:
    taken: dict[str, str] = {}
    for name, module in sorted(modules.items()):
        other = taken.setdefault(module.flat_name, name)
        if other != name:
            raise FoveateError(f"{other} and {name} would be the same file in a bundle: rename one.")


def _name_indirect_imports(entry: FlatModule, modules: dict[str, FlatModule]) -> bytes:
    """Code that does nothing but let Transformers see which further files an entry module needs; empty if none."""
    reached = _collect_names(entry, modules)
    indirect = sorted(modules[name].flat_name for name in reached - set(entry.imports) - {entry.name})
    if not indirect:
        return b""
    return (_INDIRECT_IMPORTS + "".join(f"    from .{name} import *\n" for name in indirect)).encode()


def _collect_names(entry: FlatModule, modules: dict[str, FlatModule]) -> set[str]:
    """Names of all modules that an entry needs, its own among them."""
    reached, waiting = set(), [entry.name]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting.extend(modules[name].imports)
    return reached
