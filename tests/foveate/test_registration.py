"""`import foveate` is light, and after it Transformers' Auto classes know every model, whatever was imported first."""

import copy
import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoModelForImageTextToText

import foveate
from foveate.modeling.core.declarations import ClassReference
from foveate.registration import StandIn
from foveate.registry import pairs

from ..helpers.tiny_checkpoints import write_llava


MODEL = "LlavaBaselineForConditionalGeneration"

#: How a process may get to a checkpoint of the method `sample` (`folder`), or of `meteor` (`sliced`), and the class
#: that it has to find. Nowhere is remote code trusted.
ORDERS = {
    "foveate, then an Auto class": (
        """
        import foveate
        from transformers import AutoModelForImageTextToText
        found = AutoModelForImageTextToText.from_pretrained(folder)
        """,
        MODEL,
    ),
    "an Auto class, then foveate": (
        """
        from transformers import AutoModelForImageTextToText
        import foveate
        found = AutoModelForImageTextToText.from_pretrained(folder)
        """,
        MODEL,
    ),
    "Transformers, then foveate": (
        """
        import transformers
        import foveate
        found = transformers.AutoModel.from_pretrained(folder)
        """,
        "LlavaBaselineModel",
    ),
    "only AutoConfig": (
        """
        import foveate
        from transformers import AutoConfig
        found = AutoConfig.from_pretrained(folder)
        assert "foveate.modeling.core.base" not in sys.modules
        """,
        "LlavaBaselineConfig",
    ),
    "AutoConfig by the model type": (
        """
        from transformers import AutoConfig
        import foveate
        found = AutoConfig.for_model("llava_baseline")
        """,
        "LlavaBaselineConfig",
    ),
    "only AutoProcessor": (
        """
        import foveate
        from transformers import AutoProcessor
        found = AutoProcessor.from_pretrained(folder)
        """,
        "LlavaBaselineProcessor",
    ),
    "only AutoImageProcessor": (
        """
        import foveate
        from transformers import AutoImageProcessor
        found = AutoImageProcessor.from_pretrained(sliced)
        """,
        "LlavaMeteorImageProcessor",
    ),
    "AutoProcessor with an image processor of its own": (
        """
        from transformers import AutoProcessor
        import foveate
        found = AutoProcessor.from_pretrained(sliced).image_processor
        """,
        "LlavaMeteorImageProcessor",
    ),
    "a pipeline": (
        """
        import foveate
        from transformers import pipeline
        found = pipeline("image-text-to-text", model=folder).model
        """,
        MODEL,
    ),
    "a stock model that imports the Auto classes while it is imported": (
        """
        import foveate
        import transformers.models.llava.modeling_llava
        from transformers import AutoModelForImageTextToText
        found = AutoModelForImageTextToText.from_pretrained(folder)
        """,
        MODEL,
    ),
    "a module of ours": (
        """
        import foveate.modeling.modeling_llava_baseline
        from transformers import AutoModelForImageTextToText
        found = AutoModelForImageTextToText.from_pretrained(folder)
        assert found.code_writer is not None
        """,
        MODEL,
    ),
    "a config of ours": (
        """
        from foveate.configuration.configuration_llava_baseline import LlavaBaselineConfig
        from transformers import AutoModelForImageTextToText
        found = AutoModelForImageTextToText.from_config(LlavaBaselineConfig.from_pretrained(folder))
        """,
        MODEL,
    ),
    "a config of ours, pickled": (
        """
        import json, pickle
        config = pickle.loads(bytes.fromhex(pickled))
        from transformers import AutoModelForImageTextToText
        found = AutoModelForImageTextToText.from_config(config)
        """,
        MODEL,
    ),
    "a name of foveate": (
        """
        from transformers import AutoModelForImageTextToText
        from foveate import LlavaBaselineConfig
        found = AutoModelForImageTextToText.from_config(LlavaBaselineConfig.from_pretrained(folder))
        assert type(found) is __import__("foveate").LlavaBaselineForConditionalGeneration
        """,
        MODEL,
    ),
    "the registry": (
        """
        from foveate.registry import pairs_of
        config = pairs_of("sample")[0].config_class.from_pretrained(folder)
        from transformers import AutoModel
        found = AutoModel.from_config(config)
        """,
        "LlavaBaselineModel",
    ),
    "many threads": (
        """
        import threading
        import foveate
        import transformers  # which can't be imported first by many threads, with or without foveate

        def by_auto_class():
            from transformers import AutoModelForImageTextToText
            return AutoModelForImageTextToText

        def by_stock_model():
            import transformers.models.llava.modeling_llava
            return by_auto_class()

        def by_our_model():
            import foveate.modeling.modeling_llava_baseline
            return by_auto_class()

        def by_another_of_ours():
            import foveate.modeling.modeling_llava_metacompress
            return by_auto_class()

        def by_name():
            return foveate.LlavaBaselineForConditionalGeneration

        def run(way):
            start.wait()
            model, info = way().from_pretrained(folder, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"], info
            results.append(model)

        sys.setswitchinterval(1e-5)
        ways, results = 2 * [by_auto_class, by_stock_model, by_our_model, by_another_of_ours, by_name], []
        start = threading.Barrier(len(ways))
        threads = [threading.Thread(target=run, args=(way,)) for way in ways]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert len(results) == len(ways) and len({type(result) for result in results}) == 1
        found = results[0]
        """,
        MODEL,
    ),
}

#: Each order runs in a fork of a process that has imported what takes Transformers long to import.
SCRIPT = """
import json, os, sys, traceback
import accelerate, huggingface_hub, PIL.Image, sklearn.metrics, tokenizers, torch.distributed.tensor, torchvision.io

torch.set_num_threads(1)
folder, sliced, pickled = sys.argv[1:]
assert not {"foveate", "transformers"} & sys.modules.keys()
for name, code in json.load(sys.stdin).items():
    sys.stdout.flush()
    child = os.fork()
    if not child:
        space = {"sys": sys, "folder": folder, "sliced": sliced, "pickled": pickled}
        try:
            exec(code, space)
            found = f"{type(space['found']).__module__}.{type(space['found']).__name__}"
        except BaseException:
            found = traceback.format_exc()
        print("FOUND" + json.dumps([name, found]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of `sample` and one of `meteor`."""
    folder = tmp_path_factory.mktemp("registration")
    base = write_llava(folder / "base")
    return [foveate.convert(base, folder / method, method) for method in ("sample", "meteor")]


@pytest.fixture(scope="module")
def found(folders):
    """By name of an order, the class that was found, with its module; or a traceback."""
    pickled = pickle.dumps(foveate.LlavaBaselineConfig.from_pretrained(folders[0])).hex()
    orders = {name: textwrap.dedent(code) for name, (code, _) in ORDERS.items()}
    command = [sys.executable, "-c", SCRIPT, *map(str, folders), pickled]
    run = subprocess.run(command, input=json.dumps(orders), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(line.removeprefix("FOUND")) for line in run.stdout.splitlines() if line.startswith("FOUND"))


@pytest.mark.parametrize("order", ORDERS)
def test_the_auto_classes_find_it_by(order, found):
    name = found[order].rpartition(".")[2]
    assert name == ORDERS[order][1], found[order]
    assert found[order].startswith("foveate."), "it came from remote code"


def run_python(code: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


HEAVY = "print(sorted({'torch', 'transformers', 'numpy', 'PIL', 'huggingface_hub'} & sys.modules.keys()))"


@pytest.mark.parametrize(
    "code",
    [
        "import foveate; dir(foveate); foveate.METHODS['etc']; foveate.__all__",
        "from foveate.registry import pairs; [pair.references for pair in pairs()]",
    ],
)
def test_importing_it_imports_nothing_heavy(code):
    assert run_python(f"import sys; {code}; {HEAVY}") == "[]\n"


def test_a_process_that_loads_no_compressed_model_imports_none():
    code = """
        import sys
        import foveate
        from transformers import AutoModelForImageTextToText, AutoProcessor
        ours = [name for name in sys.modules if name.startswith("foveate.modeling")]
        print(*[name for name in ours if "modeling_" in name or hasattr(sys.modules[name], "torch")])
    """
    assert run_python(code).split() == []


class TestTheNamesOfFoveate:
    def test_are_all_there(self):
        space: dict = {}
        exec("from foveate import *", space)
        assert space.keys() >= set(foveate.__all__)
        assert set(dir(foveate)) >= {*foveate.__all__, "__version__", "conversion", "modeling"}
        assert len(foveate.__all__) == len(set(foveate.__all__))

    def test_are_the_classes_of_the_registry(self):
        for pair in pairs():
            classes = [
                pair.config_class,
                pair.processor_class,
                pair.image_processor_class,
                pair.model_class,
                pair.generation_class,
            ]
            assert [getattr(foveate, c.__name__) for c in classes if c is not None] == [c for c in classes if c]
            named = "AutoImageProcessor" in pair.config_class.remote_code_map()
            assert ("image_processor" in pair.references) == named, pair.model_type

    def test_have_their_modules(self):
        from foveate.conversion.convert import convert
        from foveate.evaluation.ask import ask

        assert (foveate.convert, foveate.ask) == (convert, ask)
        assert foveate.conversion.convert.convert is convert

    def test_others_are_refused(self):
        with pytest.raises(AttributeError, match="has no attribute 'LlavaMagicModel'"):
            foveate.LlavaMagicModel  # noqa: B018
        with pytest.raises(ImportError):
            from foveate import nothing  # noqa: F401

    def test_can_be_pickled(self, folders):
        config = foveate.LlavaBaselineConfig.from_pretrained(folders[0])
        assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
        for thing in (foveate.LlavaBaselineModel, foveate.convert, foveate.METHODS["sample"]):
            assert pickle.loads(pickle.dumps(thing)) == thing


class TestAStandIn:
    @pytest.fixture
    def stand_in(self):
        reference = ClassReference("foveate.configuration.configuration_llava_baseline", "LlavaBaselineConfig")
        return StandIn(reference.name, (), {"__module__": reference.module, "reference": reference})

    def test_is_used_as_the_class(self, stand_in):
        assert type(stand_in()) is foveate.LlavaBaselineConfig
        assert stand_in.model_type == "llava_baseline"
        assert isinstance(stand_in(), stand_in) and not isinstance(1, stand_in)
        assert issubclass(foveate.LlavaBaselineConfig, stand_in) and not issubclass(int, stand_in)
        assert (stand_in.__name__, stand_in.__module__) == (
            "LlavaBaselineConfig",
            foveate.LlavaBaselineConfig.__module__,
        )

    def test_is_pickled_and_copied(self, stand_in):
        assert pickle.loads(pickle.dumps(stand_in)) is foveate.LlavaBaselineConfig
        assert copy.deepcopy({"key": stand_in})["key"] is stand_in

    def test_imports_nothing_before_it_is_used(self):
        code = """
            import sys
            from foveate.registration import StandIn
            from foveate.modeling.core.declarations import ClassReference
            sys.modules.pop("decimal", None)
            lazy = StandIn("Decimal", (), {"reference": ClassReference("decimal", "Decimal")})
            assert issubclass(lazy, object) and repr(lazy) and {lazy: 1} and lazy.__name__ == "Decimal"
            print("decimal" in sys.modules)
            print(lazy("1.5") + lazy.from_float(0.5))
        """
        assert run_python(code) == "False\n2.0\n"


def test_sources_can_be_read():
    """By tools such as `inspect` and `traceback`, which ask the loader that a module names: of a watched module, and of
    one that has no file."""
    import inspect

    from foveate.configuration import configuration_llava_baseline as made
    from foveate.modeling.core import base as watched

    for module in (made, watched):
        assert module.__loader__ is module.__spec__.loader
    assert type(watched.__loader__).__name__ == "SourceFileLoader"
    assert "class SavedCompressionMixin" in inspect.getsource(watched)
    assert "class LlavaBaselineConfig" in inspect.getsource(made)
    assert 'model_type = "llava_baseline"' in inspect.getsource(foveate.LlavaBaselineConfig)


def test_what_any_model_saves_has_its_code(folders, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(folders[0], dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_llava_baseline.py").exists()
