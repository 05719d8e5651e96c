"""The account of FLOPs and KV bytes: equal to what PyTorch counts, and to what the QG-VTC paper prints."""

import dataclasses
import functools
import itertools
import json
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from typer.testing import CliRunner

from foveate.cli import app
from foveate.conversion.bundle import bundle_files
from foveate.errors import FoveateError
from foveate.evaluation.flops import encoder_ratio, flops
from foveate.evaluation.shapes import SHAPES, config_of_shape
from foveate.modeling.core.account import (
    account_of,
    count_image,
    count_without_compression,
    default_image_size,
    image_inputs,
    model_without_values,
    prefill_flops,
)
from foveate.modeling.layers import selective_scan
from foveate.registry import METHODS, pairs

from ..helpers.batches import prompt_for
from ..helpers.closed_forms import closed_forms


PROMPT = "USER: <image> what is it ASSISTANT:"
PAPER_LAYERS = [12, 14, 16, 18, 20, 22]

#: Budgets of a method that compresses an image's sequence; a fixed one takes the place of the ratio.
BUDGETS = [
    {"num_visual_tokens": 4, "keep_ratio": None},
    {"num_visual_tokens": 9, "keep_ratio": None},
    {"keep_ratio": 0.1},
    {"keep_ratio": 0.6},
    {"keep_ratio": 1.0},
]

#: Settings that change what is computed; a method that is not named goes through with its budget alone.
SETTINGS = {
    "recoverable": [
        {"num_visual_tokens": 6},
        {"num_visual_tokens": 6, "variant": "paper"},
        {"num_visual_tokens": 6, "text_recovery": False},
        {"num_visual_tokens": 6, "variant": "paper", "text_recovery": False, "secondary_recovery": False},
        {"num_visual_tokens": 9},
    ],
    "qg-vtc": [
        {"num_visual_tokens": 4},
        {"num_visual_tokens": 4, "recycle": False},
        {"num_visual_tokens": 3, "guidance": "cls", "layers": [0, 1]},
        {"num_visual_tokens": 3, "guidance": "cls", "recycle": False, "layers": [0]},
        {"num_visual_tokens": 9},
    ],
    "meteor": [
        {"num_visual_tokens": 4},
        {"num_visual_tokens": 4, "scan": "single"},
        {"num_visual_tokens": 4, "visual_share": 1},
        {"num_visual_tokens": 4, "visual_share": 0},
        {"num_visual_tokens": 9, "max_slices": 6},
        {"num_visual_tokens": 12, "max_slices": 6},
    ],
    **dict.fromkeys(("metacompress", "random", "sample", "spatial"), BUDGETS),
}


@contextmanager
def counting():
    """PyTorch's counter; older versions don't know the CPU's fused attention kernel, so attention is two products."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


@pytest.fixture(autouse=True)
def scans_in_one_piece(monkeypatch):
    """How a scan is cut for speed, and with how much padding, is the device's."""
    monkeypatch.setattr(selective_scan, "choose_num_chunks", lambda *_: 1)


def measure(model, processor, size=(60, 42)) -> tuple[FlopCounterMode, int, int]:
    """What PyTorch counts of a forward pass, the number of text tokens, and that of all placeholders."""
    inputs = processor(images=Image.new("RGB", size, "red"), text=prompt_for(processor, PROMPT), return_tensors="pt")
    if getattr(model.config, "compression", None) and model.config.compression.method == "etc":
        inputs = image_first(inputs, model.config.image_token_id)
    with counting() as counter:
        model(**inputs, logits_to_keep=1)
    placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
    return counter, inputs["input_ids"].shape[1] - placeholders, placeholders


def image_first(inputs, image_token_id: int):
    """The prompt as the account has it, where what precedes an image makes a difference."""
    ids = inputs["input_ids"]
    return {**inputs, "input_ids": torch.cat([ids[ids == image_token_id], ids[ids != image_token_id]])[None]}


def keeps_size(config) -> bool:
    return hasattr(config.vision_config, "spatial_merge_size")


def sizes_of(config) -> list[tuple[int, int]]:
    """Pictures in pixels, as they are after resizing; one without slices where images are cut into such."""
    if keeps_size(config):
        return [(84, 56), (56, 56)]
    return [(60, 42), (100, 20), *([(40, 30), (126, 80)] if getattr(config, "image_processor", None) else [])]


def of_vision(counter: FlopCounterMode, config) -> tuple[int, int]:
    """Of the vision tower and of what projects its patches."""
    if not keeps_size(config):
        return of_module(counter, ".vision_tower"), of_module(counter, ".multi_modal_projector")
    mergers = of_module(counter, ".visual.merger") + sum(
        of_module(counter, f".deepstack_merger_list.{layer}")
        for layer in range(len(config.vision_config.deepstack_visual_indexes))
    )
    return of_module(counter, ".visual") - mergers, mergers


def of_module(counter: FlopCounterMode, ending: str) -> int:
    counts = counter.get_flop_counts()
    return sum(sum(ops.values()) for name, ops in counts.items() if name.endswith(ending))


def of_prefill(counter: FlopCounterMode) -> int:
    """Without the rotary angles, which older versions of Transformers compute by an outer product."""
    parts = of_module(counter, ".language_model") + of_module(counter, ".lm_head")
    return parts - of_module(counter, ".rotary_emb")


def of_all(counter: FlopCounterMode) -> int:
    return counter.get_total_flops() - of_module(counter, ".rotary_emb")


class TestEqualsWhatPyTorchCounts:
    def test_of_every_part_of_a_stock_model(self, base_folder):
        model = AutoModelForImageTextToText.from_pretrained(base_folder).eval()
        size = sizes_of(model.config)[0]
        counter, text_tokens, placeholders = measure(model, AutoProcessor.from_pretrained(base_folder), size)
        found = account_of(model.config, size, text_tokens)
        assert (found.vision_tower, found.projector) == of_vision(counter, model.config)
        assert found.llm_prefill == of_prefill(counter)
        assert found.total == of_all(counter)
        assert found.visual_tokens == placeholders
        assert found.text_encoder == found.compressor == 0

    def test_of_every_method_and_backbone(self, method_and_backbone, checkpoint):
        method, _ = method_and_backbone
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        model.requires_grad_(False)  # views of parameters break the counter's hooks, even without gradients
        processor = AutoProcessor.from_pretrained(checkpoint)
        original = dataclasses.asdict(model.config.compression)
        changes = SETTINGS.get(method.name, [{"num_visual_tokens": 4}])
        for settings, size in itertools.product(changes, sizes_of(model.config)):
            model.set_compression(processor, **{**original, **settings})
            counter, text_tokens, _ = measure(model, processor, size)
            found = account_of(model.config, size, text_tokens)
            of_question = sum(of_module(counter, f".question_encoder.text_{part}") for part in ("model", "projection"))
            assert found.text_encoder == of_question, settings
            assert found.projector == of_vision(counter, model.config)[1], settings
            assert found.llm_prefill == of_prefill(counter), settings
            assert found.total == of_all(counter), settings
            assert not found.at_most

    def test_of_grouped_query_attention(self):
        config = LlamaConfig(
            vocab_size=11,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
        )
        with counting() as counter:
            LlamaForCausalLM(config)(torch.arange(7)[None], logits_to_keep=1)
        assert prefill_flops(config, [(7, 7)]) == of_all(counter)

    @pytest.mark.parametrize("size", [(42, 42), (84, 84), (100, 20), (20, 100), (61, 80), (13, 7), (500, 11)])
    def test_of_the_tiles_of_llava_next(self, size, tiny_llava_next):
        model = tiny_llava_next
        shape = image_inputs(model.config, size)["pixel_values"].shape
        tiles, number = torch.zeros(shape), account_of(model.config, size, text_tokens=2).visual_tokens
        ids = torch.tensor([[1, *[model.config.image_token_id] * number, 2]])
        with counting() as counter:  # it complains where the number is wrong
            model(ids, pixel_values=tiles, image_sizes=torch.tensor([[size[1], size[0]]]), logits_to_keep=1)
        assert account_of(model.config, size, text_tokens=2).total == of_all(counter)


@pytest.fixture(scope="module")
def tiny_llava_next():
    """A random LLaVA-NeXT of 9 patches a tile, up to 2 × 2 or 1 × 3 tiles."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=42, patch_size=14),
        text_config=LlamaConfig(**sizes, vocab_size=20),
        image_token_index=5,
        image_grid_pinpoints=[[42, 84], [84, 42], [84, 84], [126, 42], [42, 126]],
    )
    return LlavaNextForConditionalGeneration(config).eval()


class TestThePaper:
    """QG-VTC, Eq. 6 with Table 3, and Table 5."""

    @pytest.mark.parametrize(
        ("layers", "ratio"),
        [
            (PAPER_LAYERS, 77.36),
            ([1, 3, 5, 7, 9, 11], 36.83),
            ([12, 13, 14, 15, 16, 17], 68.41),
            ([17, 18, 19, 20, 21, 22], 86.84),
            ([12], 59.47),
            ([16], 74.21),
            ([20], 88.95),
        ],
    )
    def test_every_ratio_of_table_3(self, layers, ratio):
        assert encoder_ratio(layers, num_visual_tokens=72) == pytest.approx(ratio, abs=0.01)

    @pytest.mark.parametrize(("num_visual_tokens", "share"), [(576, 1), (144, 0.399), (72, 0.300)])
    def test_the_shares_of_table_5(self, num_visual_tokens, share):
        """At the mean text length of its samples, for which see `test_the_ten_samples_of_table_5`."""
        settings = {"num_visual_tokens": num_visual_tokens, "layers": PAPER_LAYERS}
        found = flops(shape="llava-1.5-7b", method="qg-vtc", settings=settings, text_tokens=125).to_dict()
        assert found["share"]["total"] == pytest.approx(share, abs=0.015)
        assert found["base"]["total"] == pytest.approx(9.67e12, rel=0.015)

    @pytest.mark.parametrize("sample", range(10))
    def test_the_ten_samples_of_table_5(self, sample):
        """Without the language model's attention products, and with its head on all positions, the baseline's cell
        says how long the text was, and the other five cells follow, to 0.25 points."""

        def cost(num_visual_tokens: int, text_tokens: int) -> float:
            before, text = before_the_language_model(num_visual_tokens)
            tokens = num_visual_tokens + text_tokens
            attention = 4 * tokens**2 * text.hidden_size * text.num_hidden_layers
            return (
                before + llava_prefill(tokens) - attention + 2 * (tokens - 1) * text.hidden_size * text.vocab_size
            ) / 1e12

        baseline = TABLE_5[576][sample]
        text_tokens = min(range(60, 240), key=lambda length: abs(cost(576, length) - baseline))
        for number, row in TABLE_5.items():
            assert cost(number, text_tokens) == pytest.approx(row[sample], abs=0.0025 * baseline)


@functools.cache
def before_the_language_model(num_visual_tokens: int):
    """FLOPs of an image by QG-VTC, or by the stock model at 576 tokens; and the language model's config."""
    settings = {"num_visual_tokens": num_visual_tokens, "layers": PAPER_LAYERS}
    config = config_of_shape("llava-1.5-7b", "qg-vtc", settings)
    found = account_of(config, (336, 336), text_tokens=1, uncompressed=num_visual_tokens == 576)
    return found.total - found.llm_prefill, config.text_config


@functools.cache
def llava_prefill(tokens: int) -> int:
    return prefill_flops(config_of_shape("llava-1.5-7b").text_config, [(tokens, tokens)])


#: Table 5: TFLOPs of ten samples by the number of visual tokens.
TABLE_5 = {
    576: [9.11, 9.52, 11.01, 11.04, 8.98, 8.92, 8.95, 11.07, 9.10, 8.99],
    144: [3.30, 3.71, 5.20, 5.23, 3.17, 3.12, 3.14, 5.26, 3.29, 3.18],
    120: [2.98, 3.39, 4.88, 4.91, 2.85, 2.80, 2.82, 4.94, 2.97, 2.86],
    96: [2.66, 3.07, 4.57, 4.59, 2.53, 2.48, 2.50, 4.62, 2.65, 2.54],
    72: [2.34, 2.75, 4.25, 4.27, 2.21, 2.16, 2.18, 4.30, 2.33, 2.22],
    36: [1.86, 2.27, 3.77, 3.79, 1.73, 1.68, 1.71, 3.82, 1.85, 1.75],
}


class TestShapes:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_have_the_published_number_of_tokens_and_bytes(self, shape):
        found = flops(shape=shape).to_dict()
        # LLaVA-NeXT, 336 × 336: two tiles unpadded, their newlines, overview; Qwen3-VL, 1024 × 1024.
        tokens = 1176 if "next" in shape else 1024 if "qwen" in shape else 576
        assert found["visual_tokens"] == tokens
        text = config_of_shape(shape).text_config
        assert found["kv_bytes"] == (tokens + 60) * text.num_hidden_layers * 4 * text.num_key_value_heads * 128
        assert found["share"] == {"total": 1, "kv_bytes": 1}

    @pytest.mark.parametrize(
        ("size", "tokens", "of_all_patches"), [((336, 336), 144, 576), ((672, 1008), 7 * 144 + 5, 580 + 6 * 576 + 5)]
    )
    def test_slices_stand_beside_the_one_square_of_the_stock_model(self, size, tokens, of_all_patches):
        found = flops(shape="llava-1.5-7b", method="meteor", image_size=size)
        assert (found.model.visual_tokens, found.base.visual_tokens) == (tokens, 576)
        assert found.base == flops(shape="llava-1.5-7b", image_size=size).model
        model = model_without_values(config_of_shape("llava-1.5-7b", "meteor"))
        assert count_without_compression(model, size) == of_all_patches

    def test_a_budget_that_the_image_chooses_is_an_upper_bound(self):
        bound = flops(shape="llava-1.5-7b", method="recoverable").model
        fixed = flops(shape="llava-1.5-7b", method="recoverable", settings={"num_visual_tokens": 64}).model
        assert bound.at_most and bound.visual_tokens == 576
        assert not fixed.at_most and fixed.visual_tokens == 64 and fixed.total < bound.total

    @pytest.mark.parametrize("method", ["metacompress", "random", "sample", "spatial"])
    def test_a_sequence_keeps_its_share_of_all_that_the_image_has(self, method):
        settings = {"keep_ratio": 0.1}
        found = flops(shape="llava-next-vicuna-7b", method=method, settings=settings, image_size=(672, 672)).to_dict()
        tokens = 5 * 576 + 48  # overview, 2 × 2 tiles without padding, newlines
        assert found["method"] == method  # the baselines share a model type
        assert (found["base"]["visual_tokens"], found["visual_tokens"]) == (tokens, round(0.1 * tokens))
        for part in ("vision_tower", "projector", "text_encoder"):
            assert found[part] == found["base"][part]
        assert (found["compressor"] > 0) == (method in ("metacompress", "spatial"))


def run(*words):
    return CliRunner().invoke(app, ["flops", *map(str, words)])


class TestTheCommand:
    def test_prints_the_encoder_ratio(self):
        words = ("--encoder-ratio", "--layers", "12,14,16,18,20,22", "--num-visual-tokens", 72)
        assert run(*words, "--json").stdout == '{"R": 77.36}\n'
        assert run(*words).stdout == "R = 77.36 %\n"

    def test_prints_json_and_nothing_else(self, checkpoints):
        words = (checkpoints / "compressed", "--num-visual-tokens", 4, "--text-tokens", 9, "--image-size", "60x42")
        found = json.loads(run(*words, "--json").stdout)
        parts = ("vision_tower", "text_encoder", "compressor", "projector", "llm_prefill")
        assert found["total"] == sum(found[part] for part in parts)
        assert (found["visual_tokens"], found["base"]["visual_tokens"], found["text_tokens"]) == (4, 9, 9)
        assert found["kv_bytes"] == found["base"]["kv_bytes"] * 13 // 18
        assert found["image_size"] == [60, 42]

    def test_prints_a_table(self):
        found = run("--shape", "llava-1.5-7b", "--method", "qg-vtc", "--set", "recycle=false")
        assert found.exit_code == 0, found.output
        for name in ("vision tower", "text encoder", "compressor", "projector", "LLM prefill", "total", "KV cache"):
            assert name in found.stdout
        assert "text encoder" in run("--shape", "llava-1.5-7b").stdout

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            ((), "neither a checkpoint nor a shape"),
            (("x", "--shape", "llava-1.5-7b"), "both a checkpoint and a shape"),
            (("nobody/nothing",), "neither a folder nor a model on the hub"),
            (("--shape", "llava-2-1b"), "choose one of llava-1.5-7b"),
            (("x", "--method", "qg-vtc"), "--method goes with --shape"),
            (("--shape", "llava-1.5-7b", "--method", "magic"), "no method 'magic'"),
            (("--shape", "llava-next-vicuna-7b", "--method", "recoverable"), "compresses llava."),
            (("--shape", "llava-1.5-7b", "--num-visual-tokens", 72), "name a --method"),
            (("lab:tiny-llava", "--num-visual-tokens", 72), "doesn't compress"),
            (("lab:tiny-clip",), "'clip' model"),
            (("--shape", "llava-1.5-7b", "--method", "qg-vtc", "--num-visual-tokens", 577), "at most 576"),
            (("--shape", "llava-1.5-7b", "--method", "qg-vtc", "--num-visual-tokens", -1), "at least 1"),
            (("--shape", "llava-1.5-7b", "--method", "qg-vtc", "--layers", "22,12"), "rising order"),
            (("--shape", "llava-1.5-7b", "--method", "qg-vtc", "--layers", "12;14"), "numbers with commas"),
            (("--shape", "llava-1.5-7b", "--image-size", "336"), "WIDTHxHEIGHT"),
            (("--shape", "llava-1.5-7b", "--image-size", "-3x4"), "WIDTHxHEIGHT"),
            (("--shape", "llava-1.5-7b", "--image-size", "0x4"), "can't be seen"),
            (("--shape", "llava-1.5-7b", "--text-tokens", 0), "at least 1"),
            (("--encoder-ratio",), "takes --layers and --num-visual-tokens"),
            (("--encoder-ratio", "--layers", "12,24", "--num-visual-tokens", 72), "at most 23"),
            (("--encoder-ratio", "--layers", "12", "--num-visual-tokens", 600), "from 1 to 576"),
        ],
    )
    def test_answers_bad_input_with_one_line(self, words, complaint):
        found = run(*words)
        assert found.exit_code == 2, found.output
        assert found.stdout == "" and found.stderr.startswith("foveate: ") and found.stderr.count("\n") == 1
        assert complaint in found.stderr


class TestEqualsClosedForms:
    """At published shapes, where nothing can be run."""

    SETTINGS = {
        "recoverable": [
            {},
            {"variant": "paper"},
            {"num_visual_tokens": 64},
            {"num_visual_tokens": 64, "variant": "paper", "text_recovery": False},
            {"num_visual_tokens": 64, "secondary_recovery": False},
        ],
        "qg-vtc": [
            {},
            {"num_visual_tokens": 144, "recycle": False},
            {"num_visual_tokens": 72, "guidance": "cls"},
            {"num_visual_tokens": 576},
        ],
        "meteor": [{}, {"scan": "single"}, {"num_visual_tokens": 288}, {"visual_share": 1}, {"visual_share": 0}],
        "etc": [{}, {"num_visual_tokens": 4}],
        "metacompress": [{}, {"keep_ratio": 0.1}, {"keep_ratio": 1.0}],
        "spatial": [{}, {"keep_ratio": 0.1}, {"keep_ratio": 1.0}],
    }

    @pytest.mark.slow
    @pytest.mark.parametrize("size", [None, (672, 672), (1000, 300)])
    @pytest.mark.parametrize("method", [None, *METHODS])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_of_every_part(self, shape, method, size):
        """To 2 parts in 10⁵, of a scan's padding; all but the compressor exactly."""
        if method is not None and SHAPES[shape][0].model_type not in METHODS[method].backbones:
            pytest.skip(f"{method} doesn't compress it")
        for settings in self.SETTINGS.get(method, [{}]):
            config = config_of_shape(shape, method, settings)
            size = size or default_image_size(config)
            found, expected = account_of(config, size, 60), closed_forms(config, size, 60)
            for part in ("vision_tower", "text_encoder", "projector", "llm_prefill", "visual_tokens"):
                assert getattr(found, part) == expected[part], (settings, part)
            assert found.compressor == pytest.approx(expected["compressor"], rel=3e-5), settings


def test_no_account_is_part_of_a_checkpoints_code():
    files = {name for pair in pairs() for name in bundle_files(pair.config_class)}
    assert files and not [name for name in files if "account" in name]


class TestAMethodThatCannotBeCounted:
    """Its number of tokens depends on values, and it declares nothing."""

    def test_is_named(self):
        model = model_without_values(config_of_shape("llava-1.5-7b", "recoverable"))
        with pytest.raises(FoveateError, match=r"'recoverable' costs can't be counted .* declare count_image"):
            count_image(model, image_inputs(model.config, (336, 336)))
