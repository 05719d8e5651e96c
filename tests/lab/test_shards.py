"""Trained methods as shards of the lab's base: what is put together is what was trained."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from foveate import evaluate, lab_folder
from foveate.conversion.shards import compose
from foveate.lab.experiments import MEASUREMENTS
from foveate.lab.scenes import draw_scene, sample_scene
from foveate.lab.trainings import RECIPES, Training, trained_shard


SHIPPED = sorted({row.shipped for row in MEASUREMENTS if row.shipped})


def logits_of(model, folder):
    processor = AutoProcessor.from_pretrained(folder)
    picture = draw_scene(sample_scene("validation", 3))
    inputs = processor(
        images=[picture], text=["USER: <image>\nHow many stars are there? ASSISTANT:"], return_tensors="pt"
    )
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_shard_gives_back_the_trained_model(tmp_path, monkeypatch):
    import yaml
    from peft import PeftModel

    recipe = yaml.safe_load((RECIPES / "qg-vtc.yaml").read_text())
    for stage in recipe["stages"].values():
        stage.update(batch_size=2, max_steps=2, data="lab:4", workers=0)
    (tmp_path / "qg-vtc.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr("foveate.lab.trainings.RECIPES", tmp_path)
    shard = trained_shard(Training("tiny", "qg-vtc", {"num_visual_tokens": 18}), "lab:tiny-llava", tmp_path)
    out = compose(shard, tmp_path / "tiny")
    composed = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny-stage2", dtype=torch.float32)
    trained = PeftModel.from_pretrained(trained, tmp_path / "tiny-stage2" / "adapter").eval()
    found, expected = logits_of(composed, out), logits_of(trained, out)
    assert (found - expected).norm() / expected.norm() < 0.02  # bfloat16
    untrained = AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny-stage0", dtype=torch.float32).eval()
    assert (logits_of(untrained, out) - expected).norm() > 3 * (found - expected).norm()


def test_a_shard_without_adapters(tmp_path, monkeypatch):
    """MetaCompress trains its matrices' generator alone."""
    import yaml

    recipe = yaml.safe_load((RECIPES / "metacompress.yaml").read_text())
    recipe["stages"][1].update(batch_size=2, max_steps=2, data="lab:4", workers=0)
    (tmp_path / "metacompress.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr("foveate.lab.trainings.RECIPES", tmp_path)
    settings = {"keep_ratio": 0.25, "key_width": 8}
    shard = trained_shard(Training("tiny", "metacompress", settings), "lab:tiny-llava", tmp_path)
    assert sorted(path.name for path in shard.iterdir()) == ["shard.json", "trained.safetensors"]
    out = compose(shard, tmp_path / "tiny")
    composed, trained, untrained = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).model.compressor.w_q
        for folder in (out, tmp_path / "tiny-stage1", tmp_path / "tiny-stage0")
    )
    torch.testing.assert_close(composed, trained)
    assert not torch.equal(composed, untrained)


@pytest.mark.parametrize("base", ["tiny-llava", "tiny-qwen3vl"])
def test_a_shard_of_a_whole_language_model(base, tmp_path, monkeypatch):
    """ETC's, with embeddings that are tied or not, on names of every layout."""
    import yaml

    name = f"etc-{base}.yaml"
    recipe = yaml.safe_load((RECIPES / name).read_text())
    recipe["stages"][1].update(batch_size=2, max_steps=2, data="lab:4", workers=0)
    (tmp_path / name).write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr("foveate.lab.trainings.RECIPES", tmp_path)
    shard = trained_shard(Training("tiny", "etc", {"num_visual_tokens": 2}), f"lab:{base}", tmp_path)
    out = compose(shard, tmp_path / "tiny")
    composed, trained, untrained = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (out, tmp_path / "tiny-stage1", tmp_path / "tiny-stage0")
    )
    assert composed.keys() == trained.keys()
    for key, tensor in trained.items():
        torch.testing.assert_close(composed[key], tensor, atol=1e-6, rtol=1e-2, msg=key)  # bfloat16
    changed = {key for key, tensor in trained.items() if not torch.equal(tensor, untrained[key])}
    assert any(".mlp." in key for key in changed) and any("embed_tokens" in key for key in changed)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_is_small_and_answers(name):
    """Far above what guessing gives; the measured accuracy is in lab/RESULTS.md."""
    from foveate.lab.experiments import WEIGHTS

    in_slices = "-meteor-" in name
    limit = 1_500_000 if in_slices else 1_000_000  # Meteor's trains a projector, two blocks and adapters twice as wide
    assert sum(path.stat().st_size for path in (WEIGHTS / name).rglob("*") if path.is_file()) < limit
    result = evaluate(
        f"lab:{name}", "lab-sliced-vqa" if in_slices else "lab-vqa", limit=60, dtype="float32", progress=False
    )
    if not in_slices:
        settings = AutoConfig.from_pretrained(lab_folder(name)).compression
        assert result["mean_visual_tokens"] == settings.count_tokens(144)
    assert result["mean_visual_tokens"] < 0.51 * result["base_visual_tokens"]
    assert result["exact_match"]["value"] > (0.4 if name.endswith("-95") else 0.6)
    assert lab_folder(name) == lab_folder(name), "put together once a process"
