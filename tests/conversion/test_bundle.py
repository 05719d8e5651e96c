"""The hub bundle: flat, self-contained, the same bytes each time."""

import ast
import itertools
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

from foveate.conversion.bundle import bundle_files, entry_modules, flat_name, write_bundle
from foveate.errors import FoveateError
from foveate.registry import pairs

from ..helpers.remote_code import forbidden_uses


CONFIG_CLASSES = [backbone.config_class for backbone in pairs()]
ALLOWED_PACKAGES = {"safetensors", "huggingface_hub", "numpy", "PIL", "torch", "transformers"}
_packages = itertools.count()

#: What the search for network, file writing and foreign code finds in the bundles, and why it may be there: each is
#: something that the user asks for by a call of that name, and none happens by loading or running a model.
ALLOWED = {
    ("modeling_core_compressed_image", "", "save_file"): "imported for the next",
    ("modeling_core_compressed_image", "CompressedImage.save", "save_file"): "writes the one file that the user names",
    (
        "modeling_core_base",
        "_unlink_shared_weights",
        "unlink",
    ): "of `save_pretrained`: its folder's links, not what "
    "they lead to, so that writing doesn't change the base's files",
    ("processing_base", "", "load_image"): "imported for the next",
    ("processing_base", "readable", "load_image"): "Transformers' own, for an image that the user gives as an "
    "address; every processor of Transformers does the same",
    ("processing_question", "QuestionProcessorMixin.save_pretrained", "save_pretrained"): "the second tokenizer, where "
    "the user saves the processor",
    ("processing_question", "QuestionProcessorMixin._load_question_tokenizer", "from_pretrained"): "the second "
    "tokenizer, from where the user loads the processor",
    ("modeling_core_loading", "", "cached_file"): "imported for the next",
    (
        "modeling_core_loading",
        "_read_tensors",
        "cached_file",
    ): "a base's weights, from where Transformers would load "
    "them, where the user loads a checkpoint that names its base",
    ("modeling_core_loading", "_read_tensors.find", "cached_file"): "the same",
    ("modeling_core_loading", "read_generation_config", "from_pretrained"): "the base's, likewise",
    (
        "modeling_core_base",
        "SavedCompressionMixin.from_pretrained",
        "from_pretrained",
    ): "of the class itself, where the user calls it",
}


@pytest.fixture
def house(tmp_path, monkeypatch):
    """Makes a package of the given files ("modeling/a.py": source, in which it is called `house`) and returns its
    name."""

    def build(files: dict[str, str]) -> str:
        name = f"house{next(_packages)}"
        for path, source in files.items():
            file = tmp_path / "packages" / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source.replace("house.", f"{name}."), newline="")
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
            file = flat / f"{flat_name(entry)}.py"
            direct = set(get_relative_imports(file))
            for module in direct:
                assert set(get_relative_imports(flat / f"{module}.py")) <= direct | {file.stem}

    def test_is_the_same_for_the_classes_of_the_model(self, config_class, flat):
        backbone = next(backbone for backbone in pairs() if backbone.config_class is config_class)
        files = write_bundle(config_class, flat)
        assert write_bundle(backbone.model_class, flat) == write_bundle(backbone.generation_class, flat) == files

    def test_reaches_no_network_writes_no_file_and_runs_no_other_code(self, config_class):
        for name, code in bundle_files(config_class).items():
            for (scope, what), line in forbidden_uses(code.decode()).items():
                assert (name.removesuffix(".py"), scope, what) in ALLOWED, f"{name}, line {line}: {what}"

    def test_has_the_same_bytes_each_time(self, config_class, tmp_path):
        written = []
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            files = write_bundle(config_class, tmp_path / name)
            written.append({file.name: file.read_bytes() for file in files})
        assert written[0] == written[1]


def test_nothing_is_allowed_that_is_not_there():
    files = {name: code for config_class in CONFIG_CLASSES for name, code in bundle_files(config_class).items()}
    found = {
        (name.removesuffix(".py"), *place) for name, code in files.items() for place in forbidden_uses(code.decode())
    }
    assert found >= ALLOWED.keys()


@pytest.mark.parametrize(
    ("source", "use"),
    [
        ("import subprocess", "import subprocess"),
        ("def f():\n    import socket", "import socket"),
        ("from urllib.request import Request", "import urllib.request"),
        ("import requests, math", "import requests"),
        ("from http.client import HTTPConnection", "import http.client"),
        ("import huggingface_hub", "import huggingface_hub"),
        ("import importlib.util", "import importlib.util"),
        ("import pickle", "import pickle"),
        ("import shutil", "import shutil"),
        ("import ctypes", "import ctypes"),
        ("import sys", "import sys"),
        ("import os\nos.system('ls')", "system"),
        ("import os\nos.remove('x')", "os.remove"),
        ("import os\nos.execv('x', [])", "os.execv"),
        ("import os\nos.environ['HF_TOKEN']", "os.environ"),
        ("from os import remove as tidy", "remove"),
        ("from inspect import currentframe", "currentframe"),
        ("import inspect\ninspect.getmodule(f)", "inspect.getmodule"),
        ("import os\nlibrary = os", "os passed around"),
        ("import os\ngetattr(os, 'sys' + 'tem')", "os passed around"),
        ("open('x', 'w').close()", "open"),
        ("read = open", "open"),
        ("open('x', mode)", "open"),
        ("open('x', mode='a')", "open"),
        ("open('x', **{'mode': 'a'})", "open"),
        ("from pathlib import Path\nPath('x').write_text('')", "write_text"),
        ("from pathlib import Path\nPath('x').open('w')", "open"),
        ("from pathlib import Path\nPath('x').replace('y')", "replace"),
        ("from pathlib import Path\ngetattr(Path('x'), 'write_bytes')", "write_bytes"),
        ("exec('1')", "exec"),
        ("eval('1')", "eval"),
        ("compile('1', '', 'eval')", "compile"),
        ("__import__('os')", "__import__"),
        ("print(globals())", "globals"),
        ("__builtins__['eval']", "__builtins__"),
        ("().__class__.__base__.__subclasses__()", "__subclasses__"),
        ("import json\njson.dump({}, None)", "dump"),
        ("import torch\ntorch.save({}, 'x')", "save"),
        ("import torch\ntorch.load('x')", "load"),
        ("import torch\ntorch.hub.load('a', 'b')", "hub"),
        ("import torch.utils.cpp_extension", "import torch.utils.cpp_extension"),
        ("from torch import hub", "hub"),
        ("from transformers.utils.hub import cached_file", "cached_file"),
        ("from transformers import AutoModel\nAutoModel.from_pretrained('x')", "from_pretrained"),
        ("from safetensors.torch import save_file as keep", "save_file"),
        ("import numpy as np\nnp.memmap('x')", "memmap"),
        ("class A:\n    def f(self):\n        self.model.push_to_hub('x')", "push_to_hub"),
    ],
)
def test_what_a_bundle_must_not_do_is_found(source, use):
    assert use in {what for _, what in forbidden_uses(source)}


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "import os\nos.path.join('a', 'b')",
        "'a'.replace('a', 'b')",
        "import json\nwith open('x', encoding='utf-8') as file:\n    json.load(file)",
        "model.eval()",
        "import dataclasses\ndataclasses.replace(x, a=1)",
        "import torch\nfrom torch import nn\ntorch.zeros(1), nn.Linear",
        "class A:\n    def save_pretrained(self, *args):\n        super().save_pretrained(*args)",
    ],
)
def test_what_a_bundle_may_do_is_not(source):
    assert not forbidden_uses(source)


def test_nothing_but_the_place_of_an_import_changes(house, flat):
    source = (
        '"""Ünïcode, and a line that\nfrom .elsewhere is not an import."""\r\n'
        "from house.configuration.settings import (  # why\n    A,\n    B as C,\n)\n"
        "\tx = 1\n".replace("\t", "")
        + "def late():\n    from house.modeling.helper import help_out\n    return help_out, A, C\n"
        "if x:\n    from house.processing.deep.words import split"  # no newline at the end
    )
    name = house(
        {
            "modeling/model.py": source,
            "modeling/helper.py": "def help_out(): ...\n",
            "configuration/settings.py": "A = B = 1\n",
            "processing/deep/words.py": "split = str.split\n",
        }
    )
    files = write_bundle([f"{name}.modeling.model"], flat)
    names = ["configuration_settings", "modeling_helper", "modeling_model", "processing_deep_words"]
    assert [file.stem for file in files] == names
    expected = source
    for place in ("configuration.settings", "modeling.helper", "processing.deep.words"):
        expected = expected.replace(f"house.{place}", f".{place.replace('.', '_')}")
    assert (flat / "modeling_model.py").read_bytes() == expected.encode()


def test_an_entry_names_what_its_imports_import(house, flat):
    name = house(
        {
            "modeling/model.py": "from house.modeling.middle import x\n",
            "modeling/middle.py": "from house.modeling.deep import x\n",
            "modeling/deep.py": "x = 1\n",
        }
    )
    write_bundle([f"{name}.modeling.model"], flat)
    assert set(get_relative_imports(flat / "modeling_model.py")) == {"modeling_middle", "modeling_deep"}
    assert (flat / "modeling_middle.py").read_text() == "from .modeling_deep import x\n"
    compile((flat / "modeling_model.py").read_text(), "modeling_model.py", "exec")


def test_modules_that_import_each_other(house, flat):
    files = {"modeling/a.py": "from house.modeling.b import x\n"}
    name = house({**files, "modeling/b.py": "def f():\n    from house.modeling.a import y\n"})
    assert len(write_bundle([f"{name}.modeling.a"], flat)) == 2


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("from {package}.conversion.convert import convert", "only modules in .* folders"),
        ("def late():\n    from {package}.training.recipe import x", "only modules in .* folders"),
        ("from {package}.configuration import settings", "import from the module itself"),
        ("from {package} import registry", "import from the module itself"),
        ("from {package}.modeling.nowhere import x", "no source of that name"),
        ("x = 1; from {package}.modeling.other import y", "on a line of its own"),
        ("from {package}.modeling.other import y; from {package}.modeling.third import z", "on a line of its own"),
        ("from \\\n  {package}.modeling.other import y", "on a line of its own"),
        ("import {package}.modeling.other", "imports .* as a whole"),
        ("from .other import y", "relative import"),
        ("from . import other", "relative import"),
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
    source = "from house.modeling.deep_common import x\nfrom house.modeling.deep.common import y\n"
    files = {f"modeling/{place}.py": "x = y = 1\n" for place in ("deep_common", "deep/common")}
    # One is `modeling_deep_common` by its folders, the other by its name.
    name = house({"modeling/model.py": source, **files})
    with pytest.raises(FoveateError, match="same file in a bundle"):
        write_bundle([f"{name}.modeling.model"], flat)
    assert not list(flat.iterdir())
