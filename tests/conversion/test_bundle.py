"""The hub bundle: flat, self-contained, the same bytes each time."""

import ast
import itertools
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

from foveate.conversion.bundle import entry_modules, write_bundle
from foveate.errors import FoveateError
from foveate.registry import backbones


CONFIG_CLASSES = [backbone.config_class for backbone in backbones()]
ALLOWED_PACKAGES = {"safetensors", "huggingface_hub", "numpy", "PIL", "torch", "transformers"}
_packages = itertools.count()


@pytest.fixture
def house(tmp_path, monkeypatch):
    """Makes a package with rooms of the given files ("modeling/a.py": source) and returns its name."""

    def build(files: dict[str, str]) -> str:
        name = f"house{next(_packages)}"
        for path, source in files.items():
            file = tmp_path / "packages" / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source, newline="")
        monkeypatch.syspath_prepend(tmp_path / "packages")
        return name

    return build


@pytest.fixture
def flat(tmp_path) -> Path:
    folder = tmp_path / "flat"
    folder.mkdir()
    return folder


def imported_packages(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("config_class", CONFIG_CLASSES, ids=lambda config_class: config_class.__name__)
class TestTheBundleOfEveryModel:
    def test_is_flat_and_complete(self, config_class, flat):
        files = write_bundle(config_class, flat)
        names = {file.stem for file in files}
        assert {reference.split(".")[0] for reference in config_class.remote_code_map().values()} <= names
        assert sorted(flat.iterdir()) == files
        for file in files:
            relative = {
                (node.level, node.module)
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.ImportFrom) and node.level
            }
            assert {level for level, _ in relative} <= {1}
            assert {module for _, module in relative} <= names
            # Transformers looks for imports by a pattern in the text: it has to see those there are, and no others.
            assert set(get_relative_imports(file)) == {module for _, module in relative}

    def test_imports_only_what_a_user_of_transformers_has(self, config_class, flat):
        for file in write_bundle(config_class, flat):
            imported = imported_packages(ast.parse(file.read_text()))
            assert imported <= ALLOWED_PACKAGES | set(sys.stdlib_module_names), file.name

    def test_is_found_whole_from_each_entry_in_one_step(self, config_class, flat):
        write_bundle(config_class, flat)
        for entry in entry_modules(config_class):
            file = flat / f"{entry.rpartition('.')[2]}.py"
            direct = set(get_relative_imports(file))
            for module in direct:
                assert set(get_relative_imports(flat / f"{module}.py")) <= direct | {file.stem}

    def test_is_the_same_for_the_classes_of_the_model(self, config_class, flat):
        backbone = next(backbone for backbone in backbones() if backbone.config_class is config_class)
        files = write_bundle(config_class, flat)
        assert write_bundle(backbone.model_class, flat) == write_bundle(backbone.generation_class, flat) == files

    def test_has_the_same_bytes_each_time(self, config_class, tmp_path):
        written = []
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            files = write_bundle(config_class, tmp_path / name)
            written.append({file.name: file.read_bytes() for file in files})
        assert written[0] == written[1]


def test_nothing_but_the_place_of_an_import_changes(house, flat):
    source = (
        '"""Ünïcode, and a line that\nfrom .elsewhere is not an import."""\r\n'
        "from ..configuration.settings import (  # why\n    A,\n    B as C,\n)\n"
        "\tx = 1\n".replace("\t", "")
        + "def late():\n    from .helper import help_out\n    return help_out, A, C\n"
        "if x:\n    from ..processing.words import split"  # no newline at the end
    )
    name = house(
        {
            "modeling/model.py": source,
            "modeling/helper.py": "def help_out(): ...\n",
            "configuration/settings.py": "A = B = 1\n",
            "processing/words.py": "split = str.split\n",
        }
    )
    files = write_bundle([f"{name}.modeling.model"], flat)
    assert [file.name for file in files] == ["helper.py", "model.py", "settings.py", "words.py"]
    expected = source.replace("..configuration.settings", ".settings").replace("..processing.words", ".words")
    assert (flat / "model.py").read_bytes() == expected.encode()


def test_an_entry_names_what_its_imports_import(house, flat):
    name = house(
        {
            "modeling/model.py": "from .middle import x\n",
            "modeling/middle.py": "from .deep import x\n",
            "modeling/deep.py": "x = 1\n",
        }
    )
    write_bundle([f"{name}.modeling.model"], flat)
    assert set(get_relative_imports(flat / "model.py")) == {"middle", "deep"}
    assert (flat / "middle.py").read_text() == "from .deep import x\n"
    compile((flat / "model.py").read_text(), "model.py", "exec")


def test_modules_that_import_each_other(house, flat):
    name = house({"modeling/a.py": "from .b import x\n", "modeling/b.py": "def f():\n    from .a import y\n"})
    assert len(write_bundle([f"{name}.modeling.a"], flat)) == 2


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("from ..conversion.convert import convert", "only modules in .* rooms"),
        ("def late():\n    from ..training.recipe import x", "only modules in .* rooms"),
        ("from ..configuration import settings", "import from the module itself"),
        ("from . import other", "import from the module itself"),
        ("from .. import registry", "import from the module itself"),
        ("from ...outside.of_all import x", "import from the module itself"),
        ("from .nowhere import x", "no source file"),
        ("x = 1; from .other import y", "on a line of its own"),
        ("from .other import y; from .third import z", "on a line of its own"),
        ("from \\\n  .other import y", "on a line of its own"),
        ("import {package}.modeling.other", "imports .* by name"),
        ("from {package}.modeling.other import y", "imports .* by name"),
    ],
)
def test_an_import_that_a_bundle_cannot_have(source, complaint, house, flat):
    files = {"modeling/other.py": "", "modeling/third.py": "", "configuration/settings.py": "", "registry.py": ""}
    name = house({**files, "conversion/convert.py": "", "training/recipe.py": "", "modeling/model.py": ""})
    model = Path(sys.path[0]) / name / "modeling" / "model.py"
    model.write_text(source.replace("{package}", name))
    with pytest.raises(FoveateError, match=complaint) as caught:
        write_bundle([f"{name}.modeling.model"], flat)
    assert "\n" not in str(caught.value)
    assert not list(flat.iterdir())


def test_two_modules_of_one_flat_name(house, flat):
    name = house({"modeling/model.py": "from ..processing.common import x\nfrom .common import y\n"})
    for room in ("modeling", "processing"):
        folder = Path(sys.path[0]) / name / room
        folder.mkdir(exist_ok=True)
        (folder / "common.py").write_text("x = y = 1\n")
    with pytest.raises(FoveateError, match="same file in a bundle"):
        write_bundle([f"{name}.modeling.model"], flat)
    assert not list(flat.iterdir())
