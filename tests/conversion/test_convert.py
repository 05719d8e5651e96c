"""Conversion: the base's bytes, the method's parameters, all or nothing, and one sentence for bad input."""

import errno
import filecmp
import json
import os
import pickle
import shutil
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from foveate.conversion import checkpoints, file_copy, stored_weights
from foveate.conversion import convert as convert_module
from foveate.conversion.convert import convert
from foveate.conversion.file_copy import copy_file, copy_files
from foveate.errors import FoveateError

from ..helpers.tiny_checkpoints import split_in_shards, write_clip, write_llava


pytestmark = pytest.mark.filterwarnings("ignore:.*use_fast.*")


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    write_llava(folder / "base")
    write_clip(folder / "clip")
    return folder


@pytest.fixture
def base(originals, tmp_path) -> Path:
    """A base checkpoint of the test's own, in a folder of its own."""
    return shutil.copytree(originals / "base", tmp_path / "in" / "base")


@pytest.fixture
def clip(originals, tmp_path) -> Path:
    return shutil.copytree(originals / "clip", tmp_path / "in" / "clip")


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "converted"


def stored_keys(folder: Path) -> dict[str, str]:
    """Key → file, as the files themselves say."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path.name))
    return found


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def drop_tensors(path: Path, start: str) -> None:
    tensors = {key: tensor for key, tensor in load_file(path).items() if not key.startswith(start)}
    save_file(tensors, path, metadata={"format": "pt"})


def assert_refused(out: Path, complaint: str, *args, **kwargs) -> None:
    """One sentence, and nothing left where the checkpoint would have been."""
    before = sorted(os.listdir(out.parent))
    with pytest.raises(FoveateError, match=complaint) as caught:
        convert(*args, **kwargs)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert sorted(os.listdir(out.parent)) == before


class TestAConvertedCheckpoint:
    @pytest.mark.parametrize("number_of_shards", [1, 2])
    def test_holds_the_bytes_of_the_base_and_a_small_file_more(self, number_of_shards, base, clip, out):
        if number_of_shards == 2:
            split_in_shards(base)
        convert(base, out, text_encoder=clip)
        base_files, files = sorted(base.glob("*.safetensors")), sorted(out.glob("*.safetensors"))
        assert len(base_files) == number_of_shards and len(files) == number_of_shards + 1
        for original, copied in zip(base_files, files):
            assert filecmp.cmp(original, copied, shallow=False)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == stored_keys(out)
        assert not (out / "model.safetensors").exists()  # Transformers would read it and nothing else
        sizes = (tensor.nbytes for path in files for tensor in load_file(path).values())
        assert index["metadata"]["total_size"] == sum(sizes)

    @pytest.mark.parametrize("piece", [1 << 21, 7])  # the second is not a whole share of any tensor's values
    def test_holds_the_text_encoder_under_new_names_in_the_dtype_of_the_base(self, piece, base, clip, out, monkeypatch):
        monkeypatch.setattr(stored_weights, "_PIECE", piece)
        convert(base, out, text_encoder=clip)
        new = load_file(max(out.glob("*.safetensors")))
        source = load_file(clip / "model.safetensors")
        expected = {f"question_encoder.{key}": value for key, value in source.items() if key.startswith("text_")}
        expected["visual_projection.weight"] = source["visual_projection.weight"]
        assert new.keys() == expected.keys()
        for key, value in new.items():
            assert value.dtype == torch.bfloat16
            assert torch.equal(value, expected[key].bfloat16())

    def test_loads_with_no_key_missing_or_unexpected(self, base, clip, out):
        convert(base, out, text_encoder=clip)
        model, info = AutoModelForImageTextToText.from_pretrained(
            out, output_loading_info=True, dtype=torch.bfloat16, trust_remote_code=True
        )
        assert not any(info.values()), info
        processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
        assert processor.question_tokenizer.model_max_length == 77
        assert len(processor.question_tokenizer) != len(processor.tokenizer)
        # The base's embeddings arrived where the language model looks for them.
        embeddings = load_file(base / "model.safetensors")["language_model.model.embed_tokens.weight"]
        assert torch.equal(model.get_input_embeddings().weight, embeddings)

    def test_keeps_the_config_of_the_base_as_published(self, base, clip, out):
        edit_json(base / "config.json", torch_dtype="bfloat16", dtype=None, an_old_field=1)
        convert(base, out, text_encoder=clip, settings={"lof_neighbors": 5})
        published, written = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
        replaced = {"model_type": "llava_recoverable", "architectures": ["LlavaRecoverableForConditionalGeneration"]}
        assert written.items() >= {**published, **replaced}.items()
        assert written.keys() - published.keys() == {"auto_map", "compression", "question_config"}
        assert written["compression"]["method"] == "recoverable"
        assert written["compression"]["lof_neighbors"] == 5
        assert written["question_config"]["hidden_size"] == 64
        assert written["question_config"]["projection_dim"] == 32

    def test_has_the_files_of_base_and_text_encoder_that_it_needs(self, base, clip, out):
        (base / "secret.txt").write_text("not the model's")
        convert(base, out, text_encoder=clip)
        assert filecmp.cmp(base / "generation_config.json", out / "generation_config.json", shallow=False)
        for source, copy in ((base, out), (clip, out / "question_tokenizer")):
            for name in ("tokenizer.json", "tokenizer_config.json"):  # as published: all versions read them
                assert filecmp.cmp(source / name, copy / name, shallow=False)
        assert (out / "modeling_llava_recoverable.py").exists()
        assert not (out / "secret.txt").exists()

    def test_can_be_read_by_whoever_can_read_its_folder(self, base, clip, out):
        convert(base, out, text_encoder=clip)
        modes = {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir() if path.is_file()}
        assert modes == {0o666 & ~current_umask()}
        assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~current_umask()

    def test_is_the_same_each_time(self, base, clip, out):
        folders = [convert(base, out.with_name(name), text_encoder=clip) for name in ("first", "second")]
        first, second = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders)
        assert first == second


def test_a_text_encoder_that_was_only_published_as_a_pickle(base, clip, out):
    tensors = load_file(clip / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # old versions saved this buffer
    torch.save(tensors, clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    convert(base, out, text_encoder=clip)
    new = stored_keys(out)
    assert "question_encoder.text_projection.weight" in new
    assert "question_encoder.text_model.embeddings.position_ids" not in new


class TestABaseOnTheHub:
    """With a hub that gives what it is asked for from folders here."""

    @pytest.fixture
    def hub(self, base, clip, tmp_path, monkeypatch) -> list[tuple[str, str | None, list[str]]]:
        asked = []

        def snapshot_download(name, revision=None, allow_patterns=()):
            source, target = {"org/base": base, "org/clip": clip}[name], tmp_path / "cache" / name / "c0ffee"
            target.mkdir(parents=True, exist_ok=True)
            for path in source.iterdir():
                if any(path.match(pattern) for pattern in allow_patterns):
                    shutil.copyfile(path, target / path.name)
            asked.append((name, revision, [path.name for path in target.iterdir()]))
            return str(target)

        monkeypatch.setattr(checkpoints, "snapshot_download", snapshot_download)
        return asked

    def test_small_files_come_first_and_the_weights_are_of_the_same_commit(self, hub, out):
        convert("org/base", out, text_encoder="org/clip")
        names, revisions, files = zip(*hub)
        assert names == ("org/base", "org/clip", "org/base", "org/clip")
        assert revisions == (None, None, "c0ffee", "c0ffee")
        assert [any("safetensors" in Path(name).suffix for name in found) for found in files] == [
            False,
            False,
            True,
            True,
        ]
        assert (out / "config.json").exists()

    def test_no_weights_are_fetched_for_what_can_not_be_converted(self, hub, out):
        assert_refused(out, "Unknown", "org/base", out, text_encoder="org/clip", settings={"magic": 1})
        assert len(hub) == 2

    def test_a_pickle_is_fetched_where_there_is_nothing_else(self, hub, clip, out):
        torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
        (clip / "model.safetensors").unlink()
        convert("org/base", out, text_encoder="org/clip")
        assert "pytorch_model.bin" in hub[-1][2] and "pytorch_model.bin" not in hub[-2][2]


def test_a_base_of_the_lab_goes_with_the_text_encoder_of_the_lab(base, clip, out, monkeypatch):
    monkeypatch.setattr(checkpoints, "shipped_folder", {"tiny-llava": base, "tiny-clip": clip}.__getitem__)
    convert("lab:tiny-llava", out)
    assert "visual_projection.weight" in stored_keys(out)


def test_a_model_that_the_lab_does_not_have(out):
    assert_refused(out, "The lab has no checkpoint 'huge-llava'", "lab:huge-llava", out)


def test_out_may_be_an_empty_folder_or_lie_in_folders_that_are_not_there_yet(base, clip, out, monkeypatch):
    out.mkdir()
    assert convert(base, out, text_encoder=clip) == out
    monkeypatch.chdir(out.parent)
    assert convert(base, "a/b", text_encoder=clip) == out.parent / "a" / "b"
    assert (out.parent / "a" / "b" / "config.json").exists()


def test_the_config_of_a_base_may_say_little(base, clip, out):
    """Published configs leave out what is the default."""
    edit_json(base / "config.json", vision_feature_layer=None, projector_hidden_act=None, image_seq_length=None)
    convert(base, out, text_encoder=clip)
    assert "vision_feature_layer" not in json.loads((out / "config.json").read_text())


class TestOutThatExists:
    def test_a_folder_with_something_in_it(self, base, clip, out):
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        assert_refused(out, "exists already and is not empty", base, out, text_encoder=clip)
        assert (out / "notes.txt").read_text() == "mine"

    def test_a_file(self, base, clip, out):
        out.write_text("mine")
        assert_refused(out, "exists already and is not a folder", base, out, text_encoder=clip)

    def test_a_link_to_nowhere(self, base, clip, out):
        out.symlink_to(out.parent / "nowhere")
        assert_refused(out, "exists already", base, out, text_encoder=clip)

    def test_the_base_itself(self, base, clip):
        assert_refused(base, "exists already", base, base, text_encoder=clip)

    def test_a_file_where_a_folder_above_it_should_be(self, base, clip, out):
        out.write_text("mine")
        assert_refused(out, "can't be written", base, out / "below", text_encoder=clip)


class TestABaseThatIsNotFit:
    def test_nothing_of_that_name(self, out):
        assert_refused(out, "neither a folder nor a model on the hub", "nobody/nothing-of-that-name", out)

    def test_a_file(self, base, out):
        assert_refused(out, "is a file", base / "config.json", out)

    def test_a_folder_without_a_config(self, base, clip, out):
        (base / "config.json").unlink()
        assert_refused(out, "has no config.json", base, out, text_encoder=clip)

    def test_a_config_that_is_not_json(self, base, clip, out):
        (base / "config.json").write_text('{"model_type": "lla')
        assert_refused(out, "can't be read as JSON", base, out, text_encoder=clip)

    @pytest.mark.parametrize(
        ("model_type", "sentence"),
        [("qwen2_vl", "'qwen2_vl'.*compresses llava"), (None, "its config has no model_type")],
    )
    def test_another_model(self, model_type, sentence, base, clip, out):
        edit_json(base / "config.json", model_type=model_type)
        assert_refused(out, sentence, base, out, text_encoder=clip)

    def test_the_layout_of_the_original_llava_repository(self, base, clip, out):
        edit_json(base / "config.json", vision_config=None, text_config=None)
        assert_refused(out, "llava-hf", base, out, text_encoder=clip)

    def test_one_that_is_compressed_already(self, base, clip, out):
        convert(base, out, text_encoder=clip)
        assert_refused(out, "compressed already .'llava_recoverable'", out, out.with_name("again"), text_encoder=clip)

    def test_another_vision_tower(self, base, clip, out):
        config = json.loads((base / "config.json").read_text())
        edit_json(base / "config.json", vision_config={**config["vision_config"], "model_type": "siglip_vision_model"})
        assert_refused(out, "sees with a 'siglip_vision_model'", base, out, text_encoder=clip)

    def test_weights_that_are_not_named_as_published(self, base, clip, out):
        path = base / "model.safetensors"
        renamed = {key.replace("vision_tower.vision_model.", "vision_tower."): t for key, t in load_file(path).items()}
        save_file(renamed, path, metadata={"format": "pt"})
        assert_refused(out, "'vision_tower.vision_model.…'.*'vision_tower.e", base, out, text_encoder=clip)

    def test_no_weights(self, base, clip, out):
        (base / "model.safetensors").unlink()
        assert_refused(out, "has no weights", base, out, text_encoder=clip)
        (base / "pytorch_model.bin").touch()
        assert_refused(out, "pickled weights only", base, out, text_encoder=clip)

    def test_no_processor(self, base, clip, out):
        for name in ("processor_config.json", "preprocessor_config.json"):
            (base / name).unlink(missing_ok=True)
        assert_refused(out, "processor can't be read", base, out, text_encoder=clip)

    def test_no_tokenizer(self, base, clip, out):
        (base / "tokenizer.json").unlink()
        assert_refused(out, "has no tokenizer", base, out, text_encoder=clip)


class TestADamagedFile:
    def test_cut_in_its_tensors(self, base, clip, out):
        path = base / "model.safetensors"
        size = path.stat().st_size
        os.truncate(path, size - 100)
        assert_refused(
            out,
            f"model.safetensors is truncated: expected {size} bytes, found {size - 100}",
            base,
            out,
            text_encoder=clip,
        )

    @pytest.mark.parametrize("size", [0, 5, 500])
    def test_cut_in_its_header(self, size, base, clip, out):
        os.truncate(base / "model.safetensors", size)
        assert_refused(out, f"truncated: expected at least .* found {size}", base, out, text_encoder=clip)

    def test_one_of_several(self, base, clip, out):
        path = split_in_shards(base) / "model-00002-of-00002.safetensors"
        os.truncate(path, path.stat().st_size - 1)
        assert_refused(out, "model-00002-of-00002.safetensors is truncated", base, out, text_encoder=clip)

    def test_of_the_text_encoder(self, base, clip, out):
        os.truncate(clip / "model.safetensors", 3000)
        assert_refused(out, "clip/model.safetensors is truncated", base, out, text_encoder=clip)

    def test_longer_than_its_header_says(self, base, clip, out):
        with (base / "model.safetensors").open("ab") as file:
            file.write(b"more")
        assert_refused(out, "not a valid safetensors file", base, out, text_encoder=clip)

    def test_a_git_lfs_pointer(self, base, clip, out):
        (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        assert_refused(out, "Git LFS pointer", base, out, text_encoder=clip)

    def test_a_shard_that_is_missing(self, base, clip, out):
        (split_in_shards(base) / "model-00001-of-00002.safetensors").unlink()
        assert_refused(out, "model-00001-of-00002.safetensors is missing", base, out, text_encoder=clip)

    def test_a_tensor_that_the_index_lists_and_no_shard_has(self, base, clip, out):
        drop_tensors(split_in_shards(base) / "model-00001-of-00002.safetensors", "language_model.lm_head")
        assert_refused(out, "lacks the tensor language_model.lm_head.weight", base, out, text_encoder=clip)

    def test_an_index_that_points_out_of_the_folder(self, base, clip, out):
        index = split_in_shards(base) / "model.safetensors.index.json"
        edit_json(index, weight_map={"language_model.model.x": "../clip/model.safetensors"})
        assert_refused(out, "no usable weight_map", base, out, text_encoder=clip)


class TestATextEncoderThatIsNotFit:
    @pytest.mark.parametrize(
        "key", ["visual_projection.weight", "text_projection.weight", "text_model.encoder.layers.1."]
    )
    def test_without_a_part(self, key, base, clip, out):
        drop_tensors(clip / "model.safetensors", key)
        assert_refused(out, f"has no '{key}", base, out, text_encoder=clip)

    def test_one_tower_alone(self, base, clip, out):
        edit_json(clip / "config.json", model_type="clip_text_model")
        assert_refused(out, "is a 'clip_text_model' checkpoint", base, out, text_encoder=clip)

    def test_of_another_vision_tower(self, base, out, tmp_path):
        clip = write_clip(tmp_path / "in" / "wide", hidden_size=32)
        assert_refused(
            out, r"visual_projection.weight is \(32, 32\), and \(32, 64\) is needed", base, out, text_encoder=clip
        )

    def test_none_named_for_a_vision_tower_that_is_not_known(self, base, out):
        assert_refused(out, "--text-encoder", base, out)

    def test_a_tokenizer_of_another_model(self, base, clip, out):
        shutil.copyfile(base / "tokenizer.json", clip / "tokenizer.json")
        assert_refused(out, "tokenizer has 15 tokens and its model 8", base, out, text_encoder=clip)

    def test_no_tokenizer(self, base, clip, out):
        (clip / "tokenizer.json").unlink()
        assert_refused(out, "has no tokenizer", base, out, text_encoder=clip)

    def test_weights_that_are_quantised(self, base, clip, out):
        tensors = load_file(clip / "model.safetensors")
        tensors["visual_projection.weight"] = tensors["visual_projection.weight"].to(torch.int8)
        save_file(tensors, clip / "model.safetensors")
        assert_refused(out, "visual_projection.weight holds no floating-point numbers", base, out, text_encoder=clip)

    def test_a_pickle_that_would_run_code(self, base, clip, out, tmp_path):
        class Attack:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        (clip / "model.safetensors").unlink()
        torch.save({"logit_scale": Attack()}, clip / "pytorch_model.bin", pickle_module=pickle)
        assert_refused(out, "more than plain tensors", base, out, text_encoder=clip)
        (clip / "pytorch_model.bin").write_bytes(pickle.dumps(Attack(), protocol=2))
        assert_refused(out, "no archive as PyTorch writes them", base, out, text_encoder=clip)
        assert not (tmp_path / "ran").exists()


class TestSettings:
    def test_an_unknown_method(self, base, clip, out):
        assert_refused(out, "no method 'magic': choose one of .*recoverable", base, out, "magic", text_encoder=clip)

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            ({"num_tokens": 5}, "Unknown compression setting 'num_tokens'"),
            ({"num_visual_tokens": 10}, "only 9 patches"),
            ({"num_visual_tokens": "many"}, "num_visual_tokens must be a whole number"),
            ({"variant": "mine"}, "variant must be one of"),
        ],
    )
    def test_a_setting_that_is_unknown_or_wrong(self, settings, complaint, base, clip, out):
        assert_refused(out, complaint, base, out, text_encoder=clip, settings=settings)


class TestNothingIsLeftBehind:
    def no_space(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")

    @pytest.mark.parametrize("step", ["shutil.copyfile", "write_bundle", "_write_config"])
    def test_when_the_disk_is_full_at_some_step(self, step, base, clip, out, monkeypatch):
        monkeypatch.setattr(f"{convert_module.__name__}.{step}", self.no_space)
        assert_refused(out, "No space left on the device that holds .* about [0-9]+ MB", base, out, text_encoder=clip)

    @pytest.mark.parametrize("error", [SafetensorError, Exception])  # safetensors' and tokenizers'
    def test_when_the_disk_is_full_as_libraries_in_rust_say_it(self, error, base, clip, out, monkeypatch):
        def no_space(base, encoder, processor, folder):
            (folder / "tokenizer.json").write_bytes(b"half")
            raise error("Error while serializing: I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(convert_module, "_write_processor", no_space)
        assert_refused(out, "No space left on the device", base, out, text_encoder=clip)

    def test_when_the_disk_would_be_full(self, base, clip, out, monkeypatch):
        usage = shutil.disk_usage(out.parent)._replace(free=1_500_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        monkeypatch.setattr(convert_module, "_write_weights", lambda *args: pytest.fail("written all the same"))
        assert_refused(out, "needs about .* MB, and 2 MB are free", base, out, text_encoder=clip)

    def test_in_folders_that_were_made_for_it(self, base, clip, out, monkeypatch):
        monkeypatch.setattr(convert_module, "write_bundle", self.no_space)
        assert_refused(out, "No space left", base, out / "deep" / "down", text_encoder=clip)

    def test_where_writing_is_not_allowed(self, base, clip, out, monkeypatch):
        def denied(*args, **kwargs):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "file")

        monkeypatch.setattr(Path, "mkdir", denied)
        assert_refused(out, "can't be written: Permission denied .file.", base, out, text_encoder=clip)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
    def test_when_something_else_ends_it(self, error, base, clip, out, monkeypatch):
        def end(*args, **kwargs):
            raise error

        monkeypatch.setattr(convert_module, "_write_config", end)
        with pytest.raises(error):
            convert(base, out, text_encoder=clip)
        assert not os.listdir(out.parent)

    def test_and_nothing_has_the_name_before_the_end(self, base, clip, out, monkeypatch):
        seen = []
        monkeypatch.setattr(convert_module, "write_bundle", lambda *args: seen.extend(os.listdir(out.parent)))
        convert(base, out, text_encoder=clip)
        assert len(seen) == 1 and seen[0].startswith(f".{out.name}.partial-")
        assert os.listdir(out.parent) == [out.name]


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class TestLinkedWeights:
    def test_are_the_very_files_of_the_base(self, base, clip, out):
        convert(base, out, text_encoder=clip, link=True)
        (original,) = base.glob("*.safetensors")
        linked, new = sorted(out.glob("*.safetensors"))
        assert linked.samefile(original)
        assert new.stat().st_nlink == 1
        AutoModelForImageTextToText.from_pretrained(out)

    def test_follow_the_symbolic_links_of_the_hubs_cache(self, base, clip, out, tmp_path):
        (original,) = base.glob("*.safetensors")
        blob = tmp_path / "blob"
        original.rename(blob)
        original.symlink_to(blob)
        convert(base, out, text_encoder=clip, link=True)
        linked = min(out.glob("*.safetensors"))
        assert linked.samefile(blob) and not linked.is_symlink()

    def test_are_left_as_they_were_by_save_pretrained(self, base, clip, out):
        """Of a model that was loaded from there, into the very folder: the base's bytes stay."""
        convert(base, out, text_encoder=clip, link=True)
        (original,) = base.glob("*.safetensors")
        before = original.read_bytes()
        model = AutoModelForImageTextToText.from_pretrained(out)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        model.save_pretrained(out)
        assert original.read_bytes() == before
        assert all(path.stat().st_nlink == 1 for path in out.glob("*.safetensors"))
        again = AutoModelForImageTextToText.from_pretrained(out)
        assert not again.lm_head.weight.any()

    def test_a_file_system_without_links_is_said(self, base, clip, out, monkeypatch):
        def refuse(*_):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(os, "link", refuse)
        assert_refused(out, "leave --link out", base, out, text_encoder=clip, link=True)


class TestCopies:
    def test_are_pieces_where_there_are_no_reflinks(self, tmp_path, monkeypatch):
        monkeypatch.setattr(file_copy, "_PIECE", 1000)
        (tmp_path / "source").write_bytes(os.urandom(2500))
        counted = []
        copy_file(tmp_path / "source", tmp_path / "target", counted.append)
        assert filecmp.cmp(tmp_path / "source", tmp_path / "target", shallow=False)
        assert counted == [1000, 1000, 500] or counted == [2500]  # a file system with reflinks

    def test_share_the_originals_blocks_where_there_are(self, tmp_path, monkeypatch):
        monkeypatch.setattr(file_copy, "_reflink", lambda original, copy: copy.write(original.read()) > 0)
        (tmp_path / "source").write_bytes(b"weights")
        counted = []
        copy_file(tmp_path / "source", tmp_path / "target", counted.append)
        assert (tmp_path / "target").read_bytes() == b"weights"
        assert counted == [7]

    def test_of_several_files_are_made_at_once(self, tmp_path):
        """Each waits in its first piece for the other's."""
        both = threading.Barrier(2, timeout=60)
        copies = {tmp_path / f"source{index}": tmp_path / f"target{index}" for index in range(2)}
        for source in copies:
            source.write_bytes(os.urandom(2500))
        copy_files(copies, lambda count: both.wait())
        for source, target in copies.items():
            assert filecmp.cmp(source, target, shallow=False)

    def test_end_with_the_first_that_fails(self, tmp_path, monkeypatch):
        """The others don't go on to their ends."""
        monkeypatch.setattr(file_copy, "_PIECE", 10)
        monkeypatch.setattr(file_copy, "_reflink", lambda original, copy: False)
        (tmp_path / "long").write_bytes(bytes(100_000))
        seen = []
        copies = {tmp_path / "long": tmp_path / "copy", tmp_path / "missing": tmp_path / "other"}
        with pytest.raises(FileNotFoundError):
            copy_files(copies, lambda count: (seen.append(count), time.sleep(0.01)))
        assert (tmp_path / "copy").stat().st_size < 100_000
        assert len(seen) < 10_000

    def test_never_replace_a_file(self, tmp_path):
        for name in ("source", "target"):
            (tmp_path / name).write_text(name)
        with pytest.raises(FileExistsError):
            copy_file(tmp_path / "source", tmp_path / "target")
