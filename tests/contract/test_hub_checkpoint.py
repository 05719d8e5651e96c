"""Contract 1 and 3: a checkpoint loads and answers where foveate is not installed, and where it is."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from foveate import convert

from ..conftest import SETTINGS
from .conftest import ROWS, prompt_for


pytestmark = pytest.mark.contract_core

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
    import torch
    import transformers
    from PIL import Image
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

    folder, picture, prompt = sys.argv[1:]
    trusted = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **trusted)
    processor = AutoProcessor.from_pretrained(folder, **trusted)
    AutoModel.from_pretrained(folder, **trusted)
    autos = [AutoModelForImageTextToText]
    if transformers.__version__.startswith("4."):
        autos.append(transformers.AutoModelForVision2Seq)
    image, found = Image.open(picture), {"class": type(processor).__name__}
    for auto in autos:
        model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **trusted)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        ids = model.eval().generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        found["ids"] = ids[0].tolist()
    model.save_pretrained(folder + "-again")
    processor.save_pretrained(folder + "-again")
    ask = pipeline("image-text-to-text", model=folder, dtype=torch.float32, **trusted)
    limits = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    plain = ask(text=prompt, images=image, generate_kwargs=limits, return_tensors=True)
    found["plain"] = torch.as_tensor(plain[0]["generated_token_ids"]).tolist()
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what is it"}]}]
    found["chat"] = ask(text=chat, generate_kwargs=limits, return_full_text=False)[0]["generated_text"]
    assert "foveate" not in sys.modules
    print("FOUND" + json.dumps(found))
    """
)


def run_stranger(folder, tmp_path, row=ROWS[0]):
    row.images[0].save(tmp_path / "picture.png")
    script = tmp_path / "stranger.py"
    script.write_text(STRANGER)
    prompt = prompt_for(AutoProcessor.from_pretrained(folder), row.prompt)
    command = [sys.executable, "-P", str(script), str(folder), str(tmp_path / "picture.png"), prompt]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.rpartition("FOUND")[2])


def expected_ids(folder, row=ROWS[0]):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=row.images[0], text=prompt_for(processor, row.prompt), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    return ids[0].tolist()


def test_a_converted_checkpoint_answers_where_foveate_is_not_installed(checkpoint, tmp_path):
    """By the Auto classes and the pipeline, with plain text and with a chat; and what it saves is one again."""
    expected = expected_ids(checkpoint)
    found = run_stranger(checkpoint, tmp_path)
    assert found["ids"] == expected
    assert found["plain"] == expected
    assert isinstance(found["chat"], str)
    again = checkpoint.parent / f"{checkpoint.name}-again"
    assert expected_ids(again) == expected
    assert run_stranger(again, tmp_path)["ids"] == expected


def test_what_the_package_saves_answers_where_foveate_is_not_installed(checkpoint, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "saved")
    assert run_stranger(tmp_path / "saved", tmp_path)["ids"] == expected_ids(checkpoint)


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


def test_the_adapter_layout_gives_the_same_model(
    method_and_backbone, base_folder, text_encoder_folder, checkpoint, tmp_path
):
    """Of a folder without the base's weights, where foveate is installed and where it isn't; what it saves is whole."""
    method, _ = method_and_backbone
    settings = SETTINGS.get(method.name)
    small = convert(base_folder, tmp_path / "small", method.name, text_encoder_folder, settings, layout="adapter")
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
    assert run_stranger(small, tmp_path)["ids"] == expected_ids(checkpoint)
    again = small.parent / f"{small.name}-again"
    assert "base_model_name_or_path" not in json.loads((again / "config.json").read_text())
    assert expected_ids(again) == expected_ids(checkpoint)


def test_another_methods_checkpoint_is_refused(method_and_backbone):
    _, backbone = method_and_backbone
    with pytest.raises(ValueError, match="load it with the Auto classes"):
        backbone.config_class(compression={"method": "another"})
