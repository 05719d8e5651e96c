"""Checkpoints in the layouts of LLaVA's and VoCo-LLaMA's own repositories: what comes out computes what they compute,
in flat memory, or is refused with one sentence."""

import errno
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import TrainerSpec
from torch.nn import functional
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)
from typer.testing import CliRunner

from foveate import LlavaETCForConditionalGeneration, convert, import_original
from foveate.cli import app
from foveate.conversion import checkpoints, original_llava
from foveate.conversion.safetensors_stream import StreamedTensor, write_checkpoint_weights
from foveate.conversion.sentencepiece_model import llama_tokenizer
from foveate.conversion.verify import verify
from foveate.errors import FoveateError
from foveate.hub_cards.card import write_card

from ..helpers.original_checkpoints import (
    PATCHES,
    VOCABULARY,
    WIDTH,
    save_pickled,
    vocabulary,
    write_original,
    write_sentencepiece,
)
from ..helpers.tiny_checkpoints import write_clip, write_llava


pytestmark = pytest.mark.filterwarnings("ignore:.*use_fast.*")

CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]}]
PROMPT = "USER: <image>\nwhat colour is it? ASSISTANT:"


def load_pickled(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.bin")) for k, v in torch.load(path, weights_only=True).items()}


def load_written(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    clip = write_clip(folder / "clip")
    write_original(folder / "llava", clip)
    write_original(folder / "voco", clip, voco=True)
    return folder


@pytest.fixture
def llava(originals, tmp_path) -> Path:
    """An original of the test's own."""
    return shutil.copytree(originals / "llava", tmp_path / "in" / "llava")


@pytest.fixture
def voco(originals, tmp_path) -> Path:
    return shutil.copytree(originals / "voco", tmp_path / "in" / "voco")


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "imported"


@pytest.fixture(scope="module")
def imported(originals, tmp_path_factory) -> Path:
    return import_original(originals / "llava", tmp_path_factory.mktemp("imported") / "llava")


@pytest.fixture(scope="module")
def imported_voco(originals, tmp_path_factory) -> Path:
    return import_original(originals / "voco", tmp_path_factory.mktemp("imported") / "voco", num_visual_tokens=2)


def edit_json(path: Path, **changes) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def picture() -> Image.Image:
    return Image.effect_noise((42, 42), 80).convert("RGB")


class OriginalModel:
    """LLaVA by its tensors' original names: a Llama, a CLIP and two linear layers."""

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor] | None = None):
        config = json.loads((folder / "config.json").read_text())
        self.tensors = tensors or load_pickled(folder)
        fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        self.llama = LlamaForCausalLM(
            LlamaConfig(**{f: config[f] for f in fields}, rms_norm_eps=config["rms_norm_eps"])
        )
        own = {k: v for k, v in self.tensors.items() if "mm_projector" not in k and "inv_freq" not in k}
        self.llama.load_state_dict(own)
        self.llama.eval()
        self.clip = CLIPVisionModel.from_pretrained(config["mm_vision_tower"]).eval()
        self.layer = config["mm_vision_select_layer"]

    def see(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(1, 3, height, width) → (patches, width)."""
        features = self.clip(pixel_values, output_hidden_states=True).hidden_states[self.layer][0, 1:]
        first, last = (
            [self.tensors[f"model.mm_projector.{number}.{part}"] for part in ("weight", "bias")] for number in "02"
        )
        return functional.linear(functional.gelu(functional.linear(features, *first)), *last)

    def embed(self, ids: list[int]) -> torch.Tensor:
        return self.tensors["model.embed_tokens.weight"][ids]

    def run(self, embeddings: list[torch.Tensor], mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.llama(inputs_embeds=torch.cat(embeddings)[None], attention_mask=mask).logits[0]


class TestAnImportedLlava:
    @torch.no_grad()
    def test_has_the_logits_of_the_original(self, originals, imported):
        """From the words and the picture on, each tokenised and seen as the original does it."""
        original = OriginalModel(originals / "llava")
        model, info = AutoModelForImageTextToText.from_pretrained(
            imported, output_loading_info=True, dtype=torch.float32
        )
        assert not any(info.values()), info
        assert isinstance(model, LlavaForConditionalGeneration)
        inputs = AutoProcessor.from_pretrained(imported)(text=PROMPT, images=picture(), return_tensors="pt")
        tokenizer = SentencePieceProcessor(str(originals / "llava" / "tokenizer.model"))
        before, after = [1, *tokenizer.encode("USER: ")], tokenizer.encode("\nwhat colour is it? ASSISTANT:")
        image_id = model.config.image_token_index if hasattr(model.config, "image_token_index") else VOCABULARY
        assert inputs.input_ids[0].tolist() == [*before, *[image_id] * PATCHES, *after]
        expected = original.run([original.embed(before), original.see(inputs.pixel_values), original.embed(after)])
        found = model(**inputs).logits[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(found[:, :VOCABULARY], expected, atol=1e-5, rtol=0)
        # What is new is never the likeliest.
        assert (found[:, VOCABULARY:] < expected.max(-1, keepdim=True).values).all()

    def test_is_laid_out_as_llava_hf_does_it(self, originals, imported):
        stored, written = load_pickled(originals / "llava"), load_written(imported)
        rows = -(-(VOCABULARY + 2) // 64) * 64
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            new = written.pop(f"language_model.{name}")
            old = stored.pop(name)
            assert new.shape == (rows, WIDTH)
            assert torch.equal(new[:VOCABULARY], old)
            torch.testing.assert_close(new[VOCABULARY:], old.mean(0).expand(rows - VOCABULARY, -1))
        for number, name in (("0", "linear_1"), ("2", "linear_2")):
            for part in ("weight", "bias"):
                stored[f"multi_modal_projector.{name}.{part}"] = stored.pop(f"model.mm_projector.{number}.{part}")
        expected = {k if k.startswith("multi") else f"language_model.{k}": v for k, v in stored.items()}
        expected.pop("language_model.model.layers.0.self_attn.rotary_emb.inv_freq")
        clip = load_file(originals / "clip" / "model.safetensors")
        expected |= {f"vision_tower.{k}": v for k, v in clip.items() if k.startswith("vision_model.")}
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[key], expected[key]) for key in expected)
        config = json.loads((imported / "config.json").read_text())
        assert config["image_token_index"] == VOCABULARY
        assert config["pad_token_id"] == VOCABULARY + 1
        assert config["text_config"]["vocab_size"] == rows
        assert (config["image_seq_length"], config["vision_feature_select_strategy"]) == (PATCHES, "default")
        assert "temperature" not in (imported / "generation_config.json").read_text()

    def test_speaks_as_llava_hf_does(self, imported):
        processor = AutoProcessor.from_pretrained(imported)
        again = [*CHAT, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}, CHAT[0]]
        prompt = processor.apply_chat_template(again, add_generation_prompt=True)
        question = "USER: <image>\nwhat colour is it? "
        assert prompt == f"{question}ASSISTANT: red {question}ASSISTANT:"
        tokenizer = processor.tokenizer
        assert (
            tokenizer.decode(tokenizer("what colour is it?").input_ids, skip_special_tokens=True)
            == "what colour is it?"
        )
        assert (tokenizer.pad_token_id, tokenizer.padding_side) == (VOCABULARY + 1, "left")
        batch = processor(text=[PROMPT, f"{PROMPT} is"], images=[picture()] * 2, padding=True, return_tensors="pt")
        assert batch.attention_mask[0, 0] == 0

    @pytest.mark.parametrize("method", ["sample", "recoverable"])
    def test_is_a_base_for_convert(self, method, originals, imported, out):
        encoder = originals / "clip" if method == "recoverable" else None
        convert(imported, out, method, encoder, {"num_visual_tokens": 4})
        model = AutoModelForImageTextToText.from_pretrained(out)
        inputs = AutoProcessor.from_pretrained(out).apply_chat_template(
            [{"role": "user", "content": [{"type": "image", "image": picture()}, CHAT[0]["content"][1]]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1

    def test_is_the_same_of_safetensors_and_of_one_file(self, llava, imported, out):
        tensors = load_pickled(llava)
        for path in llava.glob("pytorch_model*"):
            path.unlink()
        torch.save(tensors, llava / "pytorch_model.bin")
        expected = (imported / "model.safetensors").read_bytes()
        assert (import_original(llava, out) / "model.safetensors").read_bytes() == expected
        (llava / "pytorch_model.bin").unlink()
        save_file(tensors, llava / "model.safetensors", metadata={"format": "pt"})
        assert (import_original(llava, out.with_name("b")) / "model.safetensors").read_bytes() == expected

    @torch.no_grad()
    def test_takes_the_vision_tower_that_is_within(self, llava, imported, out):
        tensors = load_pickled(llava)
        tower = {k: v for k, v in load_written(imported).items() if k.startswith("vision_tower.")}
        inside = {f"model.vision_tower.{k}": torch.rand_like(v) for k, v in tower.items()}
        save_pickled(
            llava,
            tensors
            | inside
            | {"model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(10)},
        )
        written = load_written(import_original(llava, out))
        assert all(torch.equal(written[k], inside[f"model.vision_tower.{k}"]) for k in tower)

    def test_runs_the_tower_in_the_dtype_of_the_language_model(self, llava, out):
        save_pickled(llava, {k: v.bfloat16() for k, v in load_pickled(llava).items()})
        written = load_written(import_original(llava, out))
        assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"

    def test_takes_another_vision_tower_by_name(self, originals, llava, out):
        edit_json(llava / "config.json", mm_vision_tower="/nowhere/clip")
        import_original(llava, out, vision_tower=originals / "clip")
        assert (out / "model.safetensors").exists()

    def test_comes_from_the_hub_with_all_its_shards(self, llava, imported, out, monkeypatch):
        asked = []

        def download(name, revision, allow_patterns):
            asked.append((name, revision, allow_patterns))
            return str(llava)

        monkeypatch.setattr(checkpoints, "snapshot_download", download)
        written = import_original("liuhaotian/llava", out) / "model.safetensors"
        assert written.read_bytes() == (imported / "model.safetensors").read_bytes()
        assert {name for name, _, _ in asked} == {"liuhaotian/llava"}
        assert ("liuhaotian/llava", "llava", ["pytorch_model-*.bin"]) in asked


class TestAnImportedVoCoLlama:
    def test_has_the_row_of_voco_in_every_compressed_token(self, originals, imported_voco):
        row = load_pickled(originals / "voco")["model.embed_tokens.weight"][VOCABULARY]
        written = load_written(imported_voco)
        assert torch.equal(written["compressor.embeddings"], row.expand(2, -1))
        compression = json.loads((imported_voco / "config.json").read_text())["compression"]
        assert (compression["num_visual_tokens"], compression["trained_tokens"]) == (2, 2)

    @torch.no_grad()
    @pytest.mark.parametrize("number", [1, 2])
    def test_has_the_logits_of_a_masked_run_of_the_original(self, number, originals, imported_voco):
        original = OriginalModel(originals / "voco")
        model, info = AutoModelForImageTextToText.from_pretrained(
            imported_voco, output_loading_info=True, dtype=torch.float32
        )
        assert not any(info.values()), info
        assert isinstance(model, LlavaETCForConditionalGeneration)
        processor = AutoProcessor.from_pretrained(imported_voco)
        model.set_compression(processor=processor, num_visual_tokens=number)
        prompt = processor.apply_chat_template(CHAT, add_generation_prompt=True)
        inputs = processor(text=prompt, images=picture(), return_tensors="pt")
        tokenizer = SentencePieceProcessor(str(originals / "voco" / "tokenizer.model"))
        before, after = [1], tokenizer.encode(prompt.removeprefix("<image>"))
        parts = [original.embed(before), original.see(inputs.pixel_values)]
        parts += [original.embed([VOCABULARY] * number), original.embed(after)]
        length = sum(map(len, parts))
        assert inputs.input_ids.shape == (1, length)
        image, text = slice(1, 1 + PATCHES), 1 + PATCHES + number
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        allowed[text:, image] = False
        mask = torch.zeros(1, 1, length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)
        expected = original.run(parts, mask)
        found = model(**inputs).logits[0, :, : VOCABULARY + 1]
        torch.testing.assert_close(found[text:], expected[text:], atol=1e-5, rtol=0)
        # The mask matters, and so does the row.
        assert (original.run(parts)[text:] - expected[text:]).abs().max() > 1e-3
        parts[2] = original.embed([5] * number)
        assert (original.run(parts, mask)[text:] - expected[text:]).abs().max() > 1e-3

    def test_is_asked_as_it_was_trained(self, imported_voco):
        processor = AutoProcessor.from_pretrained(imported_voco)
        prompt = processor.apply_chat_template(CHAT, add_generation_prompt=True)
        assert re.fullmatch(r"<image>\nA chat .* of the image\. The .* questions\. USER: what .*\? ASSISTANT:", prompt)

    def test_says_what_it_is_and_is_as_written(self, imported_voco, tmp_path):
        card = (imported_voco / "README.md").read_text()
        assert "trained by VoCo-LLaMA" in card and "untrained" not in card
        again = shutil.copytree(imported_voco, tmp_path / "again")
        (again / "README.md").unlink()
        AutoModelForImageTextToText.from_pretrained(again).save_pretrained(again)
        write_card(again, "voco", imported_voco)
        assert (again / "README.md").read_text() == card
        assert "license: llama2" in card and "# voco with" in card
        assert verify(imported_voco, full=True).as_written
        assert all(path.stat().st_nlink == 1 for path in imported_voco.glob("*.safetensors"))
        assert not [path.name for path in imported_voco.iterdir() if path.is_dir()]

    def test_is_made_where_a_file_system_has_no_links(self, voco, imported_voco, out, monkeypatch):
        def refuse(*_):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(os, "link", refuse)
        import_original(voco, out, num_visual_tokens=2)
        assert {path.name for path in out.iterdir()} == {path.name for path in imported_voco.iterdir()}
        assert all((out / p.name).read_bytes() == p.read_bytes() for p in imported_voco.glob("*.safetensors"))

    def test_needs_its_number_of_tokens_and_llava_has_none(self, llava, voco, out):
        assert_refused(out, "how many <voco> tokens an image has.*--num-visual-tokens", voco)
        assert_refused(out, "is no VoCo-LLaMA", llava, num_visual_tokens=2)
        assert_refused(out, "num_visual_tokens must be a whole number", voco, num_visual_tokens=0)


class TestTheTokenizer:
    @pytest.mark.parametrize(
        "text", ["what colour is it?", "USER: what", "  what   is", "", "whatwhat hat", "é 🦎\n\nwhat", "AAAA SESE"]
    )
    def test_joins_as_sentencepiece_does(self, text, originals):
        path = originals / "llava" / "tokenizer.model"
        tokenizer, expected = llama_tokenizer(path), SentencePieceProcessor(str(path)).encode(text)
        assert tokenizer.encode(text).ids == [1, *expected]
        assert tokenizer.decode(expected) == text

    @pytest.mark.parametrize("seed", range(5))
    def test_joins_the_best_first(self, seed, tmp_path):
        """Where most neighbours could join with either side: pieces that were put together at random."""
        draw = random.Random(seed)
        letters = list("abcdefgh▁")
        joined = []
        while len(joined) < 60:
            text = "".join(draw.choices([*letters, *joined], k=2))
            if text not in joined and len(set(text)) == len(text):  # one with repeats can be made in equal ways
                joined.append(text)
        entries = vocabulary(joined, letters)
        write_sentencepiece(tmp_path / "tokenizer.model", entries=entries)
        tokenizer = llama_tokenizer(tmp_path / "tokenizer.model")
        original = SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
        for text in ("".join(draw.choices("abcdefgh ", k=30)) for _ in range(40)):
            assert tokenizer.encode(text).ids == [1, *original.encode(text)]

    def test_says_what_reads_it(self, originals, monkeypatch):
        monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
        with pytest.raises(FoveateError, match=r"pip install 'foveate\[import\]'"):
            llama_tokenizer(originals / "llava" / "tokenizer.model")


def test_large_checkpoints_are_several_files(tmp_path):
    made = {"a": torch.randn(10, 5), "b": torch.randn(3).half(), "c": torch.randn(7), "d": torch.randn(()).bfloat16()}
    streamed = [StreamedTensor(k, v.dtype, tuple(v.shape), lambda v=v: [v]) for k, v in made.items()]
    write_checkpoint_weights(tmp_path, streamed, max_shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in made.values())
    assert list(index["weight_map"].values()) == ["model-00001-of-00002.safetensors"] + 3 * [
        "model-00002-of-00002.safetensors"
    ]
    for key, name in index["weight_map"].items():
        with safe_open(tmp_path / name, framework="pt") as file:
            assert torch.equal(file.get_tensor(key), made[key]) and file.metadata() == {"format": "pt"}


class TestMemory:
    """Peak of a process that imports checkpoints of 200 MB whose largest tensor is 17 MB."""

    SCRIPT = """
import resource, sys
from foveate import import_original
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
import_original(sys.argv[1], sys.argv[1] + "-out")  # what is imported late
before = peak()
for name in sys.argv[2:]:
    import_original(name, name + "-out")
print(peak() - before)
"""

    @pytest.mark.skipif(sys.platform != "linux", reason="counts what is mapped as Linux does")
    def test_does_not_grow_with_the_checkpoint(self, llava, tmp_path):
        large = shutil.copytree(llava, tmp_path / "large")
        edit_json(large / "config.json", hidden_size=512, intermediate_size=8192, num_hidden_layers=4)
        config = json.loads((large / "config.json").read_text())
        with torch.device("meta"):
            fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            shapes = LlamaForCausalLM(LlamaConfig(**{name: config[name] for name in fields})).state_dict()
        tensors = {name: torch.ones(tensor.shape) for name, tensor in shapes.items()}
        tensors |= {
            "model.mm_projector.0.weight": torch.ones(512, 64),
            "model.mm_projector.2.weight": torch.ones(512, 512),
        }
        tensors |= {f"model.mm_projector.{number}.bias": torch.ones(512) for number in "02"}
        save_pickled(large, tensors)
        safe = tmp_path / "safe"
        shutil.copytree(large, safe, ignore=shutil.ignore_patterns("pytorch_model*"))
        save_file(tensors, safe / "model.safetensors")
        command = [sys.executable, "-c", self.SCRIPT, str(llava), str(large), str(safe)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        for folder in (large, safe):
            written = tmp_path / f"{folder.name}-out" / "model.safetensors"
            assert written.stat().st_size > 200e6
        assert float(result.stdout) < 60


def assert_refused(out: Path, complaint: str, *args, **kwargs) -> None:
    """One sentence, and nothing left where the checkpoint would have been."""
    with pytest.raises(FoveateError, match=complaint) as caught:
        import_original(*args[:1], out, *args[1:], **kwargs)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert not os.listdir(out.parent)


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"model_type": "llama", "mm_projector_type": None}, "is no LLaVA-1.5 .*model_type 'llama'"),
            ({"model_type": "llava_mistral"}, "is no LLaVA-1.5 .*'llava_mistral'"),
            ({"mm_projector_type": "linear"}, "a projector of the type 'linear'"),
            ({"mm_patch_merge_type": "spatial_unpad"}, "as LLaVA-NeXT does"),
            ({"mm_use_im_start_end": True}, "tokens around its images"),
            ({"mm_vision_select_feature": "all"}, "takes 'all' from its vision tower"),
            ({"mm_hidden_size": 1024}, "clip is 64 wide, .* of 1024.*--vision-tower"),
            ({"mm_vision_tower": "/nowhere/clip"}, "vision tower is not found: /nowhere/clip .*--vision-tower"),
            ({"vocab_size": 100}, "tokenizer has .* tokens and its model 100"),
            ({"intermediate_size": 97}, r"is \(96, 48\), and \(97, 48\) is needed"),
            ({"num_attention_heads": "many"}, "The config of .* can't be read"),
        ],
    )
    def test_a_config(self, changes, complaint, llava, out):
        edit_json(llava / "config.json", **changes)
        assert_refused(out, complaint, llava)

    def test_a_checkpoint_in_transformers_own_layout(self, out, tmp_path):
        assert_refused(out, "in Transformers' own layout already", write_llava(tmp_path / "in" / "hf"))

    def test_a_vision_tower_that_is_none(self, llava, out):
        assert_refused(out, "llava is a 'llava' checkpoint: the vision tower has to be a 'clip'", llava, llava)

    @pytest.mark.parametrize(
        ("name", "complaint"),
        [
            ("model.mm_projector.", "has no projector"),
            ("model.mm_projector.2.bias", "lacks the tensor model.mm_projector.2.bias"),
            ("lm_head.weight", "lacks the tensor lm_head.weight"),
        ],
    )
    def test_a_tensor_that_is_missing(self, name, complaint, llava, out):
        save_pickled(llava, {k: v for k, v in load_pickled(llava).items() if not k.startswith(name)})
        assert_refused(out, complaint, llava)

    def test_a_tensor_that_would_be_lost(self, llava, out):
        save_pickled(llava, load_pickled(llava) | {"model.image_newline": torch.rand(WIDTH)})
        assert_refused(out, "has a tensor model.image_newline", llava)

    def test_numbers_that_are_not_floating(self, llava, out):
        tensors = load_pickled(llava)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
        save_pickled(llava, tensors)
        assert_refused(out, "lm_head.weight holds no floating-point numbers", llava)

    def test_a_shard_that_is_missing_or_damaged(self, llava, out):
        path = llava / "pytorch_model-00002-of-00002.bin"
        content = path.read_bytes()
        path.write_bytes(content[:-200])
        assert_refused(out, "00002-of-00002.bin is no archive", llava)
        path.unlink()
        assert_refused(out, "00002-of-00002.bin is missing, though the index lists it", llava)
        for file in llava.glob("pytorch_model*"):
            file.unlink()
        assert_refused(out, "has no weights", llava)

    def test_an_index_that_lists_more_or_elsewhere(self, llava, out):
        index = llava / "pytorch_model.bin.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        edit_json(index, weight_map={**weight_map, "model.more": "pytorch_model-00001-of-00002.bin"})
        assert_refused(out, "lacks the tensor model.more", llava)
        edit_json(index, weight_map={"model.more": "../pytorch_model.bin"})
        assert_refused(out, "no usable weight_map", llava)

    def test_a_pickle_from_before_archives(self, llava, out):
        tensors = load_pickled(llava)
        for file in llava.glob("pytorch_model*"):
            file.unlink()
        torch.save(tensors, llava / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        assert_refused(out, "load and save it with PyTorch", llava)

    @pytest.mark.parametrize("content", ["code", "numbers"])
    def test_a_pickle_of_more_than_tensors(self, content, llava, out, tmp_path):
        class Attack:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        path = llava / "pytorch_model-00002-of-00002.bin"
        torch.save({"lm_head.weight": Attack() if content == "code" else 1}, path, pickle_module=pickle)
        assert_refused(out, "more than plain tensors" if content == "code" else "something else than tensors", llava)
        assert not (tmp_path / "ran").exists()

    def test_a_tokenizer_that_is_missing_or_damaged(self, llava, out):
        path = llava / "tokenizer.model"
        path.write_bytes(path.read_bytes()[:100])
        assert_refused(out, "tokenizer.model is damaged", llava)
        write_sentencepiece(path, TrainerSpec.UNIGRAM)
        assert_refused(out, "is no byte pair encoding", llava)
        path.unlink()
        assert_refused(out, "has no tokenizer", llava)

    def test_tokens_that_are_not_where_their_file_says(self, voco, out):
        edit_json(voco / "added_tokens.json", **{"<voco>": 7})
        assert_refused(out, "says that its token <voco> is 7", voco)

    def test_a_place_that_is_taken(self, llava, out):
        out.mkdir()
        (out / "file").touch()
        with pytest.raises(FoveateError, match="exists already"):
            import_original(llava, out)
        assert os.listdir(out) == ["file"]

    @pytest.mark.parametrize("step", ["write_checkpoint_weights", "write_manifest"])
    def test_nothing_is_left_of_one_that_was_broken_off(self, step, voco, out, monkeypatch):
        def end(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(original_llava, step, end)
        with pytest.raises(KeyboardInterrupt):
            import_original(voco, out, num_visual_tokens=2)
        assert not os.listdir(out.parent)


def test_the_command(originals, llava, out):
    result = CliRunner().invoke(app, ["import", str(llava), str(out), "--vision-tower", str(originals / "clip")])
    assert result.exit_code == 0 and result.output.startswith(f"Wrote {out} (")
    (llava / "tokenizer.model").unlink()
    result = CliRunner().invoke(app, ["import", str(llava), str(out.with_name("other"))])
    assert result.exit_code == 2 and "has no tokenizer" in result.output
