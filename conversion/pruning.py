"""What of the package's modules a bundle needs: the definitions that its entries reach, and no others.

A definition is a statement at the top of a module. It is reached by its name: from an entry, or from another statement
that is kept. Statements that define nothing (a docstring, a call) are kept with their module. What is kept, stays as it
is written, with the comments above it; an import keeps the names that are used.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


_LINE_LENGTH = 120


@dataclass
class _Statement:
    """A statement at the top of a module.

    Attributes:
        node: its syntax tree.
        lines: where it and what stands above it are in the source: the first line of the gap, its own first line, and
            the line after its last.
        defines: the names that it gives the module.
        uses: the names that it reads, from wherever.
        wanted: of an import, the names that are used.
    """

    node: ast.stmt
    lines: tuple[int, int, int]
    defines: frozenset[str]
    uses: frozenset[str]
    is_kept: bool = False
    wanted: set[str] = field(default_factory=set)


def prune(sources: Mapping[str, bytes], entries: Iterable[str]) -> dict[str, bytes]:
    """Sources with what the entries reach.

    Args:
        sources: of modules by full name, all that the entries import within the package.
        entries: names of modules that are kept whole.

    Returns:
        The modules of which something is reached.
    """
    modules = {name: _statements(source) for name, source in sources.items()}
    entered: set[str] = set()
    waiting: list[tuple[str, str | None]] = [(entry, None) for entry in entries]
    while waiting:
        module, name = waiting.pop()
        if module not in modules:
            continue
        is_first = module not in entered
        entered.add(module)
        for statement in modules[module]:
            is_wanted = name is None or name in statement.defines or (is_first and not statement.defines)
            if is_wanted:
                waiting += _keep(statement, module, name)
    return {name: _written(sources[name], modules[name]) for name in sources if name in entered}


def _keep(statement: _Statement, module: str, name: str | None) -> list[tuple[str, str | None]]:
    """Keeps a statement; returns what it reaches: names of modules."""
    if isinstance(statement.node, ast.ImportFrom):
        names = {alias.asname or alias.name: alias.name for alias in statement.node.names}
        new = (names.keys() if name is None else {name} & names.keys()) - statement.wanted
        statement.is_kept = True
        statement.wanted |= new
        return [(str(statement.node.module), names[one]) for one in new]
    if statement.is_kept:
        return []
    statement.is_kept = True
    late = (node for node in ast.walk(statement.node) if isinstance(node, ast.ImportFrom))
    return [
        *((module, used) for used in statement.uses),
        *((str(node.module), alias.name) for node in late for alias in node.names),
    ]


def _statements(source: bytes) -> list[_Statement]:
    found, end = [], 0
    for node in ast.parse(source).body:
        first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))]) - 1
        last = int(node.end_lineno or node.lineno)
        names = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
        is_future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        defines = frozenset() if is_future else frozenset(_defined([node]))
        found.append(_Statement(node, (end, first, last), defines, frozenset(names)))
        end = last
    return found


def _defined(nodes: Iterable[ast.AST]) -> set[str]:
    """The names that statements define in their module, those within an `if` or a `try` among them."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            found |= {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
        else:
            found |= _defined(ast.iter_child_nodes(node))
    return found


def _written(source: bytes, statements: list[_Statement]) -> bytes:
    lines = source.splitlines(keepends=True)
    parts: list[bytes] = []
    for statement in statements:
        if not statement.is_kept:
            continue
        gap, first, end = statement.lines
        parts += lines[gap:first]
        node = statement.node
        if isinstance(node, ast.ImportFrom) and 0 < len(statement.wanted) < len(node.names):
            parts.append(_import_of(node, statement.wanted).encode())
        else:
            parts += lines[first:end]
    return b"".join(parts)


def _import_of(node: ast.ImportFrom, wanted: set[str]) -> str:
    """An import of some of its names, as ruff formats it."""
    names = [ast.unparse(alias) for alias in node.names if (alias.asname or alias.name) in wanted]
    line = f"from {node.module} import {', '.join(names)}\n"
    if len(line) <= _LINE_LENGTH + 1:
        return line
    return f"from {node.module} import (\n" + "".join(f"    {name},\n" for name in names) + ")\n"
