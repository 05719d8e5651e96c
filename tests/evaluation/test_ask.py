"""Asking one question: the same answer as from Transformers, honest numbers, any image that can be seen."""

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import convert
from foveate.errors import FoveateError
from foveate.evaluation import picture as drawing
from foveate.evaluation.ask import ask, kv_bytes_by_account, open_image
from foveate.evaluation.harness import evaluate, open_checkpoint
from foveate.lab.large_scenes import draw_large_scene
from foveate.lab.scenes import draw_scene, sample_scene
from foveate.modeling.methods.qgvtc import QGVTCModelMixin

from ..helpers.tiny_checkpoints import write_clip, write_llava, write_llava_next


QUESTION = "what colour is it"


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return draw_scene(sample_scene("test", 3))


class TestAnAnswer:
    def test_is_what_the_model_generates(self, checkpoints, picture):
        found = ask(checkpoints / "compressed", picture, QUESTION, max_new_tokens=5)
        checkpoint = open_checkpoint(checkpoints / "compressed")
        inputs = checkpoint.processor(images=picture, text=f"USER: <image> {QUESTION} ASSISTANT:", return_tensors="pt")
        inputs = inputs.to(dtype=checkpoint.model.dtype)
        sequences = checkpoint.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert found.answer == checkpoint.decode(sequences, inputs["input_ids"].shape[1])[0]

    def test_counts_tokens_and_bytes(self, checkpoints, picture):
        found = ask(checkpoints / "compressed", picture, QUESTION, compare=checkpoints / "base", max_new_tokens=2)
        assert found.visual_tokens_before == 9
        assert 1 <= found.visual_tokens_after < 9
        assert found.base_kv_bytes == found.kv_bytes_uncompressed  # the account is what is measured
        a_token = found.base_kv_bytes // 18  # 9 patches, 9 tokens of text
        assert found.kv_bytes == found.base_kv_bytes - a_token * (9 - found.visual_tokens_after)
        assert found.time_to_first_token > 0 and found.base_time_to_first_token > 0
        assert isinstance(found.base_answer, str)
        assert found.base_visual_tokens == 9

    @pytest.mark.parametrize("fast", ["bfloat16", "float32"])
    def test_and_the_base_are_computed_in_what_the_device_is_fast_in(self, fast, checkpoints, picture, devices):
        devices.compute_fast_in(fast)
        found = ask(checkpoints / "compressed", picture, QUESTION, compare=checkpoints / "base", max_new_tokens=1)
        assert (found.dtype, found.device) == (fast, "cpu")
        assert len(devices.asked) == 1, "the base is in the dtype of the model that it is compared with"
        text_config = open_checkpoint(checkpoints / "base").model.config.text_config
        assert found.base_kv_bytes == kv_bytes_by_account(text_config, 18, getattr(torch, fast))
        assert found.to_dict()["dtype"] == fast

    def test_needs_no_base(self, checkpoints, picture):
        found = ask(checkpoints / "compressed", picture, QUESTION, max_new_tokens=2)
        assert found.base_answer is found.base_kv_bytes is found.base_time_to_first_token is found.picture is None
        assert found.kv_bytes < found.kv_bytes_uncompressed
        assert found.to_dict()["kv_bytes"] == found.kv_bytes

    def test_of_a_base_saves_nothing(self, checkpoints, picture, tmp_path):
        found = ask(checkpoints / "base", picture, QUESTION, max_new_tokens=2, show=tmp_path / "base.png")
        assert found.visual_tokens_before == found.visual_tokens_after == 9
        assert found.kv_bytes == found.kv_bytes_uncompressed

    def test_comes_with_a_picture(self, checkpoints, picture, tmp_path):
        path = tmp_path / "new" / "shown.png"
        assert ask(checkpoints / "compressed", picture, QUESTION, show=path, max_new_tokens=2).picture == str(path)
        assert min(Image.open(path).size) > 300


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def exact(request, tmp_path_factory):
    """A base and what QG-VTC makes of it: 9 patches an image or tile, 4 of which are kept in two steps."""
    folder = tmp_path_factory.mktemp(request.param)
    base = {"llava": write_llava, "llava_next": write_llava_next}[request.param](folder / "base")
    settings = {"num_visual_tokens": 4, "layers": [0, 1]}
    return base, convert(base, folder / "out", "qg-vtc", write_clip(folder / "clip"), settings)


@pytest.mark.parametrize("size", [(60, 42), (100, 20), (84, 84)])  # width, height; the second one has padded tiles
class TestWhereTheNumberOfTokensIsKnown:
    def test_it_is_counted_as_the_stock_model_and_the_language_model_count(self, exact, size):
        base, compressed = exact
        found = ask(compressed, Image.new("RGB", size, "red"), QUESTION, compare=base, max_new_tokens=1)
        uncompressed = ask(base, Image.new("RGB", size, "red"), QUESTION, max_new_tokens=1)
        assert found.visual_tokens_before == uncompressed.visual_tokens_before == uncompressed.visual_tokens_after
        assert 4 <= found.visual_tokens_after < found.visual_tokens_before
        assert found.kv_bytes_uncompressed == found.base_kv_bytes == uncompressed.kv_bytes
        a_token = found.base_kv_bytes // (found.visual_tokens_before + 9)
        assert found.base_kv_bytes - found.kv_bytes == a_token * (
            found.visual_tokens_before - found.visual_tokens_after
        )

    def test_the_picture_shows_every_step_of_every_tile(self, exact, size, tmp_path, monkeypatch):
        legends, captions = [], []
        compose = drawing._compose
        monkeypatch.setattr(
            drawing,
            "_compose",
            lambda *a: captions.extend(a[1]) or legends.append([t for *_, t in a[-1]]) or compose(*a),
        )
        for checkpoint in exact:
            found = ask(checkpoint, Image.new("RGB", size, "red"), QUESTION, max_new_tokens=1, show=tmp_path / "a.png")
        assert min(Image.open(tmp_path / "a.png").size) > 300
        assert [caption.partition(":")[0] for caption in captions[-2:]] == ["layer 0", "layer 1"]
        for legend, asked_tokens in zip(legends, (found.visual_tokens_before, found.visual_tokens_after)):
            assert sum(int(text.split()[-2]) for text in legend if "token" in text.split()[-1]) == asked_tokens
        assert legends[1][0].startswith(QGVTCModelMixin.role_names[1])


@pytest.fixture(scope="module")
def sliced(tmp_path_factory):
    """What LLaVA-Meteor makes of a base: 4 of the patches of every view are kept."""
    folder = tmp_path_factory.mktemp("meteor")
    settings = {"num_visual_tokens": 4, "max_slices": 3}
    return convert(write_llava(folder / "base"), folder / "out", "meteor", settings=settings)


@pytest.mark.parametrize(("size", "slices"), [((42, 42), 0), ((42, 84), 2), ((126, 42), 3)])  # width, height
class TestSlices:
    def test_are_counted_beside_all_their_patches(self, sliced, size, slices):
        image, separators = Image.new("RGB", size, "red"), max(0, slices - 1)
        found = ask(sliced, image, QUESTION, max_new_tokens=1)
        assert found.visual_tokens_after == 4 * (1 + slices) + separators
        checkpoint = open_checkpoint(sliced)
        config = checkpoint.model.config
        most = config.compression.largest_budget(config)
        checkpoint.model.set_compression(checkpoint.processor, num_visual_tokens=most)
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        inputs = checkpoint.encode([[{"role": "user", "content": content}]], [image])
        assert found.visual_tokens_before == (inputs["input_ids"] == checkpoint.model.config.image_token_id).sum()
        a_token = found.kv_bytes // (found.visual_tokens_after + 9)
        assert found.kv_bytes_uncompressed == a_token * (found.visual_tokens_before + 9)

    def test_are_shown_with_what_the_experts_say(self, sliced, size, slices, tmp_path, monkeypatch):
        composed, compose = [], drawing._compose
        monkeypatch.setattr(drawing, "_compose", lambda *a: composed.append(a) or compose(*a))
        found = ask(sliced, Image.new("RGB", size, "red"), QUESTION, max_new_tokens=1, show=tmp_path / "a.png")
        [(panels, captions, *_, legend)] = composed
        assert captions[1:] == ["visual expert", "native expert", f"{found.visual_tokens_after} visual tokens"]
        assert captions[0].startswith("overview and slices") == (slices > 0)
        assert len(panels) == 4
        texts = [text for *_, text in legend if text.split()[-1] in ("token", "tokens")]
        assert sum(int(text.split()[-2]) for text in texts) == found.visual_tokens_after


def test_the_harness_counts_slices_as_ask_does(sliced):
    result = evaluate(sliced, task="lab-next-vqa", limit=1, progress=False)
    scene = draw_large_scene(sample_scene("test", 0))
    found = ask(sliced, scene, QUESTION, max_new_tokens=1)
    assert result["base_visual_tokens"] == found.visual_tokens_before
    assert result["mean_visual_tokens"] == found.visual_tokens_after


@pytest.mark.parametrize("exact", ["llava_next"], indirect=True)
def test_the_harness_counts_as_ask_does(exact):
    scene = draw_scene(sample_scene("test", 0))
    result = evaluate(exact[1], limit=2, progress=False)  # all scenes are of one size
    found = ask(exact[1], scene, QUESTION, max_new_tokens=1)
    assert result["base_visual_tokens"] == found.visual_tokens_before
    assert result["mean_visual_tokens"] == found.visual_tokens_after


def test_grouped_query_attention_is_in_the_account():
    class Config:
        num_hidden_layers, num_key_value_heads, num_attention_heads, hidden_size = 32, 8, 32, 4096

    assert kv_bytes_by_account(Config, 600, torch.float16) == 600 * 32 * 2 * 8 * 128 * 2


class TestImages:
    @pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
    def test_any_mode(self, mode, checkpoints, picture, tmp_path):
        if mode == "I;16":
            picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        else:
            picture = picture.convert(mode)
        path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
        picture.save(path)
        assert Image.open(path).mode == mode
        assert ask(checkpoints / "compressed", path, QUESTION, max_new_tokens=1).visual_tokens_after >= 1

    def test_a_single_pixel(self, checkpoints):
        image = Image.new("RGB", (1, 1), "red")
        assert ask(checkpoints / "compressed", image, QUESTION, max_new_tokens=1).visual_tokens_after >= 1

    @pytest.mark.parametrize("size", [(8000, 10), (10, 8000)])
    def test_one_in_which_nothing_can_be_seen(self, size, checkpoints):
        with pytest.raises(ValueError, match="crop it first"):
            ask(checkpoints / "compressed", Image.new("RGB", size), QUESTION)

    def test_a_scene_of_the_lab(self):
        assert open_image("lab:3").tobytes() == draw_scene(sample_scene("test", 3)).tobytes()
        assert open_image("lab-next:3").tobytes() == draw_large_scene(sample_scene("test", 3)).tobytes()

    def test_one_that_lies_on_its_side(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # as cameras say "turn me"
        Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
        assert open_image(tmp_path / "turned.jpg").size == (20, 40)

    @pytest.mark.parametrize("name", ["lab:", "lab:-1", "lab:first", "lab-next:first"])
    def test_no_such_scene(self, name):
        with pytest.raises(FoveateError, match="no scene of the lab"):
            open_image(name)

    def test_no_such_file(self, tmp_path):
        with pytest.raises(FoveateError, match="can't be read: No such file"):
            open_image(tmp_path / "nothing.png")

    def test_a_folder(self, tmp_path):
        with pytest.raises(FoveateError, match="can't be read"):
            open_image(tmp_path)

    def test_a_file_that_is_no_image(self, tmp_path):
        (tmp_path / "notes.png").write_text("no picture")
        with pytest.raises(FoveateError, match="not an image"):
            open_image(tmp_path / "notes.png")

    @pytest.mark.parametrize("name", ["image.png", "image.jpg"])
    def test_a_file_that_ends_early(self, name, picture, tmp_path):
        picture.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(FoveateError, match="can't be read"):
            open_image(tmp_path / name)


class TestBadInput:
    @pytest.mark.parametrize("question", ["", "  \n"])
    def test_no_question(self, question, checkpoints, picture):
        with pytest.raises(FoveateError, match="no question"):
            ask(checkpoints / "compressed", picture, question)

    def test_no_tokens_to_answer_with(self, checkpoints, picture):
        with pytest.raises(FoveateError, match="max_new_tokens is 0"):
            ask(checkpoints / "compressed", picture, QUESTION, max_new_tokens=0)

    def test_a_picture_that_could_not_be_saved_is_known_before_the_work(self, picture, tmp_path):
        (tmp_path / "file").touch()
        for name, complaint in (("shown.xyz", "no name for a picture"), ("file/shown.png", "can't be written")):
            with pytest.raises(FoveateError, match=complaint):
                ask("no checkpoint is looked for yet", picture, QUESTION, show=tmp_path / name)
