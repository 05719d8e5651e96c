"""Contract 1 and 3: a checkpoint loads and answers where foveate is not installed, and where it is."""

import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from foveate import convert

from ..conftest import SETTINGS, chosen_classes, pair_id
from ..helpers import deprecations
from ..helpers.batches import ROWS, prompt_for


pytestmark = [pytest.mark.contract_core, pytest.mark.one_process]

#: A process without foveate, which takes the checkpoints that it is given one after the other.
STRANGER = textwrap.dedent(
    """
    import sys

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "foveate":
                raise ModuleNotFoundError("foveate is not installed here")

    sys.meta_path.insert(0, Hidden())
    sys.path[:] = [entry for entry in sys.path if entry]
    import json
    import traceback
    import warnings
    import torch
    import transformers
    from PIL import Image
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

    refuse_deprecated_names()
    warnings.simplefilter("error", FutureWarning)
    warnings.filterwarnings("ignore", "The class `AutoModelForVision2Seq` is deprecated")
    torch.set_num_threads(1)
    trusted = {"trust_remote_code": True}
    limits = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    autos = [AutoModelForImageTextToText]
    if transformers.__version__.startswith("4."):
        autos.append(transformers.AutoModelForVision2Seq)

    def answer(folder, picture, prompt):
        config = AutoConfig.from_pretrained(folder, **trusted)
        processor = AutoProcessor.from_pretrained(folder, **trusted)
        AutoModel.from_pretrained(folder, **trusted)
        image, found = Image.open(picture), {"class": type(processor).__name__}
        for auto in autos:
            model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **trusted)
            assert not info["missing_keys"] and not info["unexpected_keys"], info
            inputs = processor(images=image, text=prompt, return_tensors="pt")
            ids = model.eval().generate(**inputs, **limits)
            found["ids"] = ids[0].tolist()
        model.save_pretrained(folder + "-again")
        processor.save_pretrained(folder + "-again")
        ask = pipeline("image-text-to-text", model=folder, dtype=torch.float32, **trusted)
        plain = ask(text=prompt, images=image, generate_kwargs=limits, return_tensors=True)
        found["plain"] = torch.as_tensor(plain[0]["generated_token_ids"]).tolist()
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "what is it"}]
        chat = ask(text=[{"role": "user", "content": content}], generate_kwargs=limits, return_full_text=False)
        found["chat"] = chat[0]["generated_text"]
        return found

    found = {}
    for folder, picture, prompt in json.load(open(sys.argv[1])):
        try:
            found[folder] = answer(folder, picture, prompt)
        except Exception:
            found[folder] = {"error": traceback.format_exc()}
    assert "foveate" not in sys.modules
    json.dump(found, open(sys.argv[2], "w"))
    """
)


def run_without_foveate(folders, tmp_path, row=ROWS[0]) -> dict[str, dict]:
    """What a process without foveate finds of checkpoints, by folder: the ids that it generates in several ways, and
    a copy, `FOLDER-again`, that it saves; or the traceback of its `error`."""
    tmp_path.mkdir(exist_ok=True)
    row.images[0].save(tmp_path / "picture.png")
    script, tasks, found = (tmp_path / name for name in ("without_foveate.py", "tasks.json", "found.json"))
    script.write_text(Path(deprecations.__file__).read_text() + STRANGER)
    prompts = [prompt_for(AutoProcessor.from_pretrained(folder), row.prompt) for folder in folders]
    tasks.write_text(json.dumps([[str(f), str(tmp_path / "picture.png"), p] for f, p in zip(folders, prompts)]))
    command = [sys.executable, "-P", str(script), str(tasks), str(found)]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(found.read_text())


def expected_ids(folder, row=ROWS[0]):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=row.images[0], text=prompt_for(processor, row.prompt), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    return ids[0].tolist()


@dataclass
class Checkpoints:
    """Checkpoints of one model class: converted, saved by the package, and converted in the adapter layout."""

    converted: Path
    saved: Path
    small: Path


@pytest.fixture(scope="session")
def checkpoints(tiny_checkpoint, tmp_path_factory, request) -> dict[str, Checkpoints]:
    """Of every model class, by its name."""
    made, root = {}, tmp_path_factory.mktemp("hub")
    for method, backbone in chosen_classes(request.config):
        tiny, name = tiny_checkpoint(method, backbone), pair_id(method, backbone)
        saved = root / f"{name}-saved"
        AutoModelForImageTextToText.from_pretrained(tiny.folder, dtype=torch.float32).save_pretrained(saved)
        AutoProcessor.from_pretrained(tiny.folder).save_pretrained(saved)
        settings = SETTINGS.get(method.name)
        small = convert(tiny.base, root / f"{name}-small", method.name, tiny.text_encoder, settings, layout="adapter")
        made[name] = Checkpoints(tiny.folder, saved, small)
    return made


@pytest.fixture(scope="session")
def answers_without_foveate(checkpoints, tmp_path_factory) -> dict[str, dict]:
    """What processes without foveate find of them all, and, in a second one, of what the first saved."""
    root = tmp_path_factory.mktemp("without_foveate")
    folders = [folder for made in checkpoints.values() for folder in (made.converted, made.saved, made.small)]
    first = run_without_foveate(folders, root / "first")
    again = [Path(f"{folder}-again") for folder in folders if "error" not in first[str(folder)]]
    return first | run_without_foveate(again, root / "second")


@pytest.fixture
def own(checkpoints, method_and_backbone) -> Checkpoints:
    return checkpoints[pair_id(*method_and_backbone)]


@pytest.fixture
def answer_of(answers_without_foveate):
    """Folder → what was found of it."""

    def find(folder) -> dict:
        found = answers_without_foveate[str(folder)]
        assert "error" not in found, found["error"]
        return found

    return find


def test_a_converted_checkpoint_answers_where_foveate_is_not_installed(own, answer_of):
    """By the Auto classes and the pipeline, with plain text and with a chat; and what it saves is one again."""
    expected = expected_ids(own.converted)
    found = answer_of(own.converted)
    assert found["ids"] == expected
    assert found["plain"] == expected
    assert isinstance(found["chat"], str)
    again = f"{own.converted}-again"
    assert expected_ids(again) == expected
    assert answer_of(again)["ids"] == expected


def test_what_the_package_saves_answers_where_foveate_is_not_installed(own, answer_of):
    assert answer_of(own.saved)["ids"] == expected_ids(own.converted)


def test_with_foveate_imported_no_remote_code_is_needed(method_and_backbone, checkpoint):
    _, backbone = method_and_backbone
    assert type(AutoConfig.from_pretrained(checkpoint)) is backbone.config_class
    assert type(AutoProcessor.from_pretrained(checkpoint)) is backbone.processor_class
    assert type(AutoModel.from_pretrained(checkpoint)) is backbone.model_class
    assert type(AutoModelForImageTextToText.from_pretrained(checkpoint)) is backbone.generation_class


def test_automodelforvision2seq_works_on_every_version(method_and_backbone, checkpoint):
    from foveate import AutoModelForVision2Seq

    _, backbone = method_and_backbone
    assert type(AutoModelForVision2Seq.from_pretrained(checkpoint)) is backbone.generation_class
    auto_map = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert {"AutoModelForImageTextToText", "AutoModelForVision2Seq"} <= auto_map.keys()


def test_weights_are_saved_under_the_published_names(checkpoint, base_folder, tmp_path):
    from safetensors import safe_open

    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    with (
        safe_open(tmp_path / "model.safetensors", "pt") as saved,
        safe_open(base_folder / "model.safetensors", "pt") as base,
    ):
        assert set(base.keys()) <= set(saved.keys())
        assert all(torch.equal(saved.get_tensor(key), base.get_tensor(key)) for key in set(base.keys()))
        keys = set(saved.keys())
    assert keys == json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"].keys()


def test_the_adapter_layout_gives_the_same_model(own, base_folder, checkpoint, answer_of):
    """Of a folder without the base's weights, where foveate is installed and where it isn't; what it saves is whole."""
    small = own.small
    whole = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    base = sum(path.stat().st_size for path in base_folder.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in small.glob("*.safetensors")) <= whole - base
    model, info = AutoModelForImageTextToText.from_pretrained(small, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.generation_config.to_dict() == type(model).from_pretrained(checkpoint).generation_config.to_dict()
    assert answer_of(small)["ids"] == expected_ids(checkpoint)
    again = small.parent / f"{small.name}-again"
    assert "base_model_name_or_path" not in json.loads((again / "config.json").read_text())
    assert expected_ids(again) == expected_ids(checkpoint)


def test_another_methods_checkpoint_is_refused(method_and_backbone):
    _, backbone = method_and_backbone
    with pytest.raises(ValueError, match="load it with the Auto classes"):
        backbone.config_class(compression={"method": "another"})
