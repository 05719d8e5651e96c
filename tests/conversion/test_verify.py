"""`verify`: what a folder is, from its list of files and from the code that the installed version writes."""

import json
import shutil

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from foveate import __version__
from foveate.conversion.verify import verify
from foveate.errors import FoveateError
from foveate.hub_cards import manifest
from foveate.hub_cards.manifest import MANIFEST_FILE, complete, sha256_of, write_manifest


def edit_manifest(folder, **changes):
    content = json.loads((folder / MANIFEST_FILE).read_text())
    content.update(changes)
    (folder / MANIFEST_FILE).write_text(json.dumps(content))


def forge(folder):
    """Lists the files as they are now, which anyone can do."""
    write_manifest(folder, "base")


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("full", [False, True])
def test_what_conversion_wrote_is_as_written(full, written):
    found = verify(written, full)
    assert found.as_written and found.same_code and not found.findings
    assert found.verdict == f"as foveate {__version__} wrote it: sample on base."
    assert found.num_files == len([path for path in written.rglob("*") if path.is_file()]) - 2
    assert bool(found.not_whole) != full


def test_the_list_tells_nothing_of_the_machine_or_the_day(written, copy):
    before = (written / MANIFEST_FILE).read_bytes()
    forge(copy)
    assert (copy / MANIFEST_FILE).read_bytes() == before
    assert str(written.parent).encode() not in before
    content = json.loads(before)
    assert content.keys() == {"foveate", "method", "base", "files", "card"}
    assert MANIFEST_FILE not in content["files"] and "README.md" not in content["files"]
    assert all(sha256_of(written / name) == entry["sha256"] for name, entry in content["files"].items())


def test_a_card_and_what_the_hub_leaves_may_change(copy):
    (copy / "README.md").write_text("# Mine")
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "CACHEDIR.TAG").write_text("")
    assert verify(copy).as_written


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "modeling_llava_baseline.py"])
def test_a_changed_file(name, copy):
    with (copy / name).open("a") as file:
        file.write("\n")
    found = verify(copy)
    assert not found.as_written and found.findings == {"changed": (name,)}
    assert found.verdict == f"not as foveate {__version__} wrote it."


def test_changed_weights(copy):
    flip(max(copy.glob("*.safetensors")), -1)
    assert verify(copy).findings["changed"]


def test_a_missing_file_and_one_that_does_not_belong(copy):
    (copy / "config.json").rename(copy / "config.json.bak")
    shutil.copy(copy / "config.json.bak", copy / "config.json")
    (copy / "chat_template.jinja").unlink()
    (copy / "broken.json").symlink_to(copy / "nowhere")
    assert verify(copy).findings == {
        "missing": ("chat_template.jinja",),
        "doesn't belong": ("broken.json", "config.json.bak"),
    }


def test_code_is_compared_with_this_version_whatever_the_list_says(copy):
    (copy / "extra.py").write_text("import os")
    with (copy / "modeling_llava_baseline.py").open("a") as file:
        file.write("import os\n")
    forge(copy)
    found = verify(copy)
    assert not found.as_written and not found.same_code
    assert found.findings == {"changed": ("modeling_llava_baseline.py",), "doesn't belong": ("extra.py",)}


def test_code_in_another_repository(copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"]["AutoModel"] = "someone/else--modeling.Model"
    path.write_text(json.dumps(config))
    forge(copy)
    assert verify(copy).findings == {"code elsewhere": ("config.json: someone/else--modeling.Model",)}


def test_another_version(copy):
    edit_manifest(copy, foveate="0.0.1")
    assert verify(copy).as_written, "its code is the same"
    (copy / "modeling_llava_baseline.py").write_text("# as it was then\n")
    forge(copy)
    edit_manifest(copy, foveate="0.0.1")
    found = verify(copy)
    assert not found.as_written and not found.findings and found.upgrade_due
    assert "written by another version, foveate 0.0.1" in found.verdict
    assert found.verdict.endswith(f"`foveate upgrade {copy}` brings it up to date.")
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert verify(copy).findings == {"changed": ("config.json",)}
    assert not verify(copy).upgrade_due, "an upgrade would refuse it"


def test_another_state_of_the_same_version(copy):
    (copy / "modeling_llava_baseline.py").write_text("# as it was then\n")
    assert not verify(copy).upgrade_due, "changed since it was listed"
    forge(copy)
    found = verify(copy)
    assert found.upgrade_due and not found.as_written
    assert found.verdict.startswith(
        f"files are as listed, but its code is not that of the installed foveate {__version__}"
    )
    assert found.findings == {"changed": ("modeling_llava_baseline.py",)}


def test_what_transformers_saves(written, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(written)
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(written).save_pretrained(tmp_path)
    found = verify(tmp_path)
    assert not found.as_written and found.same_code and not found.findings
    assert found.verdict.startswith("saved by Transformers") and found.verdict.endswith(f"{__version__}'s: yes.")
    (tmp_path / "modeling_llava_baseline.py").write_text("import os")
    assert verify(tmp_path).verdict.endswith(f"no; `foveate upgrade {tmp_path}` brings it up to date.")
    assert verify(tmp_path).upgrade_due and not found.upgrade_due


def test_other_folders(licensed_base, tmp_path, copy):
    assert "has no config.json" in verify(tmp_path).verdict
    assert "model_type is 'llava'" in verify(licensed_base).verdict
    (copy / MANIFEST_FILE).write_text("{}")
    assert "no list of a checkpoint's files" in verify(copy).verdict
    edit_manifest(copy, foveate="1", method="x", base="y", files={"../other": {"size": 1}, "config.json": None})
    assert "no list of a checkpoint's files" in verify(copy).verdict
    edit_manifest(copy, files={"../other": {"size": 1}})
    assert "../other" in verify(copy).missing, "nothing outside the folder is read"
    with pytest.raises(FoveateError, match="is no folder"):
        verify(tmp_path / "nowhere")


class TestLargeWeights:
    """With samples and limits so small that the tiny weights are large."""

    @pytest.fixture
    def large(self, copy, monkeypatch):
        monkeypatch.setattr(manifest, "_SAMPLE_BYTES", 16)
        monkeypatch.setattr(manifest, "_NUM_SAMPLES", 4)
        forge(copy)
        return copy

    def between_samples(self, folder):
        weights = max(folder.glob("*.safetensors"))
        return weights, weights.stat().st_size * 5 // 6

    def test_samples_are_quick_and_full_is_sure(self, large):
        flip(*self.between_samples(large))
        assert verify(large).as_written
        assert not verify(large, full=True).as_written

    @pytest.mark.parametrize("position", [8, -1])
    def test_header_and_ends_are_always_read(self, position, large):
        flip(max(large.glob("*.safetensors")), position)
        assert not verify(large).as_written

    def test_what_is_not_hashed_whole_is_said(self, large, monkeypatch):
        monkeypatch.setattr(manifest, "_HASHED_WHOLE", 0)
        forge(large)
        weights, position = self.between_samples(large)
        listed = json.loads((large / MANIFEST_FILE).read_text())
        assert "sha256" not in listed["files"][weights.name]
        assert verify(large, full=True).not_whole == (weights.name,)
        (large / MANIFEST_FILE).write_text(manifest.to_json(complete(listed, large)))
        assert verify(large, full=True).not_whole == ()
        flip(weights, position)
        assert not verify(large, full=True).as_written
