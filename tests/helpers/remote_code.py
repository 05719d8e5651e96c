"""What remote code must not do: reach the network, write files, run other code. Found in its syntax tree.

Python can hide anything from such a search; the code of this project has no reason to, so whatever the search can't
follow (a module passed around, a builtin by another name) counts as found.
"""

from __future__ import annotations

import ast


#: Packages that code may import from, and the standard library's modules among them. `safetensors`, `numpy` and `PIL`
#: come with Transformers or with reading images at all.
PACKAGES = {"torch", "transformers", "safetensors", "numpy", "PIL"}
HARMLESS = {
    "__future__", "abc", "collections", "contextlib", "copy", "dataclasses", "enum", "functools", "hashlib", "inspect",
    "itertools", "json", "math", "operator", "os", "pathlib", "re", "typing", "warnings",
}  # fmt: skip

#: Of these, what must not be imported.
FORBIDDEN_MODULES = (
    "torch.hub", "torch.distributed", "torch.multiprocessing", "torch.package", "torch.serialization",
    "torch.utils.cpp_extension", "transformers.dynamic_module_utils", "transformers.utils.hub",
)  # fmt: skip

#: Of these modules, what may be used: the rest of `os` runs programs and writes, that of `inspect` reaches everything.
HARMLESS_PARTS = {"os": {"PathLike", "fspath", "path"}, "inspect": {"Parameter", "Signature", "signature"}}

#: Builtins that run code, open files or lead to whatever else there is.
BUILTINS = {
    "__builtins__", "__import__", "__loader__", "__spec__", "breakpoint", "compile", "eval", "exec", "globals", "input",
    "locals", "open",
}  # fmt: skip

#: Attributes and imported names, of whatever object.
NAMES = {
    # writing
    "chmod", "dump", "hardlink_to", "makedirs", "memmap", "mkdir", "open", "push_to_hub", "rename", "rmdir", "rmtree",
    "save", "save_file", "save_pretrained", "symlink_to", "tofile", "touch", "truncate", "unlink", "write",
    "write_bytes", "write_text", "writelines",
    # reading what can run code, and fetching
    "cached_file", "from_pretrained", "hf_hub_download", "hub", "load", "load_image", "load_library",
    "load_state_dict_from_url", "load_url", "requests", "snapshot_download", "urlopen",
    # running
    "__builtins__", "__code__", "__globals__", "__import__", "__loader__", "__subclasses__", "cpp_extension",
    "eval_str", "exec", "exec_module", "fork", "import_module", "popen", "run_path", "spawn", "system",
}  # fmt: skip


def forbidden_uses(code: str) -> dict[tuple[str, str], int]:
    """Where and what: {("Class.function", "name"): line}; "" for a module's own level."""
    walker = _Walker()
    walker.visit(ast.parse(code))
    return walker.found


class _Walker(ast.NodeVisitor):
    def __init__(self):
        self.scope: list[str] = []
        self.modules: set[str] = set()
        self.imported: dict[str, str] = {}  # what is imported of `NAMES`, by the name that it has here
        self.found: dict[tuple[str, str], int] = {}

    def report(self, node: ast.AST, what: str) -> None:
        self.found.setdefault((".".join(self.scope), what), node.lineno)

    def visit_scope(self, node) -> None:
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()

    visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = visit_scope  # noqa: N815

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.check_module(node, alias.name)
            self.modules.add(alias.asname or alias.name.partition(".")[0])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            return  # of the bundle, which is searched as well
        self.check_module(node, node.module or "")
        for alias in node.names:
            self.check_module(node, f"{node.module}.{alias.name}", is_name=True)
            parts = HARMLESS_PARTS.get(node.module or "")
            if alias.name in NAMES or (parts is not None and alias.name not in parts):
                self.report(node, alias.name)
                self.imported[alias.asname or alias.name] = alias.name

    def check_module(self, node: ast.AST, module: str, is_name: bool = False) -> None:
        if not is_name and module.partition(".")[0] not in PACKAGES | HARMLESS:
            self.report(node, f"import {module}")
        if any(module == forbidden or module.startswith(f"{forbidden}.") for forbidden in FORBIDDEN_MODULES):
            self.report(node, f"import {module}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        parts = HARMLESS_PARTS.get(node.value.id) if isinstance(node.value, ast.Name) else None
        if node.attr in NAMES and not _is_of_super(node.value) and ast.unparse(node) != "json.load":
            self.report(node, node.attr)
        elif (parts is not None and node.attr not in parts) or f"{ast.unparse(node)}" in FORBIDDEN_MODULES:
            self.report(node, ast.unparse(node))
        if not isinstance(node.value, ast.Name) or node.value.id not in self.modules:
            self.visit(node.value)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in BUILTINS:
            self.report(node, node.id)
        elif node.id in self.imported:
            self.report(node, self.imported[node.id])
        elif node.id in self.modules:
            self.report(node, f"{node.id} passed around")

    def visit_Call(self, node: ast.Call) -> None:
        # `str.replace` takes two; with one it is a path's, which overwrites a file.
        is_replace = isinstance(node.func, ast.Attribute) and node.func.attr == "replace"
        if is_replace and len(node.args) == 1 and not node.keywords:
            self.report(node, "replace")
        # A name put together at run time could be any of those above.
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and name.value in NAMES | BUILTINS:
                self.report(node, str(name.value))
        if _is_reading(node):
            for part in (*node.args, *node.keywords):
                self.visit(part)
        else:
            self.generic_visit(node)


def _is_reading(node: ast.Call) -> bool:
    """Whether a call opens a file to read it, by a mode that is written there."""
    if not isinstance(node.func, ast.Name) or node.func.id != "open" or len(node.args) > 2:
        return False
    modes = [*node.args[1:], *(keyword.value for keyword in node.keywords if keyword.arg in ("mode", None))]
    return all(isinstance(mode, ast.Constant) and mode.value in ("r", "rb", "rt") for mode in modes)


def _is_of_super(node: ast.AST) -> bool:
    """`super().save_pretrained` in a method of that name does what the caller asked Transformers to do."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
