"""LLaVA-Meteor: views against the stock tower, the fusion against a slow reference, the experts, the gate, counts."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from foveate import convert
from foveate.errors import FoveateError
from foveate.modeling.compatibility import visual_tokens_of
from foveate.modeling.layers.slices import SliceGrid, SliceLayout, slice_grid_of
from foveate.modeling.methods import meteor
from foveate.modeling.methods.meteor_algorithm import FlashGlobalFusion, encode_views, local_means, native_scores

from ..helpers.batches import picture
from ..helpers.tiny_checkpoints import IMAGE_TOKEN_ID, write_llava


pytestmark = pytest.mark.contract_core
SIZES = [(42, 42), (84, 126), (20, 200), (130, 40), (14, 14)]  # height, width


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meteor")
    base = write_llava(folder / "base", dtype=torch.float32)
    out = convert(base, folder / "out", "meteor", settings={"num_visual_tokens": 4})
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    return SimpleNamespace(base=base, folder=out, model=model, processor=AutoProcessor.from_pretrained(out))


@pytest.fixture
def model(made):
    """The model as it was converted, whatever a test does to it."""
    model = copy.deepcopy(made.model)
    yield model
    made.processor.set_compression(made.model.config.compression)


@pytest.fixture
def trained(model):
    """As after some training: nothing is zero any more."""
    torch.manual_seed(0)
    for parameter in model.model.compressor.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs_of(made, sizes, seed=0):
    pictures = [picture(seed + index, size) for index, size in enumerate(sizes)]
    texts = ["USER: <image> what is it ASSISTANT:"] * len(sizes)
    return made.processor(images=pictures, text=texts, padding=True, return_tensors="pt")


def images_of(inputs):
    return {name: inputs[name] for name in ("pixel_values", "image_sizes")}


def layout_of(*shapes):
    return SliceLayout([SliceGrid(shape) for shape in shapes], torch.device("cpu"))


# The views


@torch.no_grad()
def test_squares_of_the_towers_size_with_all_patches_are_the_stock_models(made, model):
    stock, processor = (auto.from_pretrained(made.base) for auto in (AutoModelForImageTextToText, AutoProcessor))
    pictures = [picture(0, (42, 42)), picture(1, (42, 42))]
    texts = ["USER: <image> what is it ASSISTANT:", "USER: what <image> is it red ASSISTANT:"]
    theirs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    model.set_compression(made.processor, keep_ratio=1.0)
    ours = made.processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    expected = stock.float().eval()(**theirs).logits
    torch.testing.assert_close(model(**ours).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(3, 3), (2, 5), (6, 1)])
def test_a_view_is_encoded_as_the_stock_tower_interpolates(made, model, shape):
    """And what its class token looks at is the row of the attention matrix that the eager kernel gives."""
    rows, columns = shape
    pixels = torch.randn(1, 3, 14 * rows, 14 * columns)
    patches = pixels.view(3, rows, 14, columns, 14).permute(1, 3, 0, 2, 4).reshape(1, rows * columns, -1)
    stock = AutoModelForImageTextToText.from_pretrained(made.base, dtype=torch.float32, attn_implementation="eager")
    tower = stock.eval().model.vision_tower
    theirs = tower(pixels, interpolate_pos_encoding=True, output_hidden_states=True, output_attentions=True)
    features, looked = encode_views(model.model.vision_tower, patches, layout_of(shape), 2, look=True)
    torch.testing.assert_close(features, theirs.hidden_states[2][:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(looked, theirs.attentions[1].mean(1)[:, 0, 1:], atol=1e-6, rtol=1e-5)
    plain, nothing = encode_views(model.model.vision_tower, patches, layout_of(shape), 2, look=False)
    torch.testing.assert_close(plain, features, atol=1e-6, rtol=1e-6)
    assert nothing is None


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_views_of_several_shapes_in_one_batch_give_what_each_gives_alone(made, trained, kernel):
    trained.model.vision_tower.set_attn_implementation(kernel)
    batch = images_of(inputs_of(made, SIZES))
    together = trained.model.compress_images(batch)
    for index, tokens in enumerate(together.tokens.split(together.lengths)):
        alone = trained.model.compress_images(images_of(inputs_of(made, SIZES[index : index + 1], seed=index)))
        assert [together.lengths[index]] == alone.lengths
        torch.testing.assert_close(tokens, alone.tokens, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_lies_in_the_padding_reaches_nothing(made, trained):
    batch = images_of(inputs_of(made, SIZES))
    expected = trained.model.compress_images(batch).tokens
    for image, size in enumerate(SIZES):
        shapes = slice_grid_of(trained.config, size).shapes
        batch["pixel_values"][image, len(shapes) :] = 50.0
        for view, (rows, columns) in enumerate(shapes):
            batch["pixel_values"][image, view, rows * columns :] = 50.0
    torch.testing.assert_close(trained.model.compress_images(batch).tokens, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_processor_and_model_count_the_same_on_200_sizes(made, model):
    random = np.random.default_rng(1)
    limits = np.log([[14, 4000], [14, 4000]])
    sizes = [(14, 14), (300, 4000), (4000, 300), (4000, 40)]
    while len(sizes) < 200:
        height, width = (int(x) for x in np.exp(random.uniform(limits[:, 0], limits[:, 1])))
        if max(height, width) <= 100 * min(height, width):
            sizes.append((height, width))
    counted = made.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
    for first in range(0, 200, 25):
        some = sizes[first : first + 25]
        images = [Image.effect_noise((width, height), 90) for height, width in some]
        inputs = made.processor(images=images, text=["<image> what"] * 25, padding=True, return_tensors="pt")
        written = (inputs["input_ids"] == IMAGE_TOKEN_ID).sum(1).tolist()
        assert written == counted[first : first + 25]
        assert written == model.count_placeholders(inputs).tolist()
        assert written == model.model.compress_images(images_of(inputs)).lengths
    assert len(set(counted)) >= 5


@torch.no_grad()
def test_commas_and_newlines_stand_between_the_slices(made, trained):
    """84 × 126 pixels: the overview, then two rows of three slices."""
    output = trained(**inputs_of(made, [(84, 126)]), output_compression=True)
    (image,) = output.compression
    grid = slice_grid_of(trained.config, (84, 126))
    assert (grid.rows, grid.columns) == (2, 3)
    settings, embed = trained.config.compression, trained.get_input_embeddings()
    of_view = ["t"] * 4
    expected = of_view + of_view + [",", *of_view] * 2 + ["\n", *of_view] + [",", *of_view] * 2
    assert ["t" if role == 1 else "?" for role in image.roles.tolist()] == [
        "t" if sign == "t" else "?" for sign in expected
    ]
    for place, sign in enumerate(expected):
        if sign != "t":
            token = settings.comma_token_id if sign == "," else settings.newline_token_id
            assert torch.equal(visual_tokens_of(output)[place], embed(torch.tensor(token)))
    ids = made.processor.tokenizer.convert_tokens_to_ids([",", "\n"])
    assert ids == [settings.comma_token_id, settings.newline_token_id]
    patches = image.weights[image.roles == 1].argmax(1).view(7, 4)
    assert (patches.diff(dim=1) > 0).all(), "in the order of the picture"
    starts = torch.tensor([0, *np.cumsum([rows * columns for rows, columns in grid.shapes])])
    assert ((patches >= starts[:-1, None]) & (patches < starts[1:, None])).all(), "K of every view"


# The fusion


def reference_fusion(fusion, features, shape, local):
    """As the method page says it, patch by patch."""
    rows, columns = shape
    read = fusion.norm(features)
    means = []
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        around = [
            read[r * columns + c]
            for r in range(max(0, row - 1), min(rows, row + 2))
            for c in range(max(0, column - 1), min(columns, column + 2))
        ]
        means.append(torch.stack(around).mean(0))
    middle, ins = rows * columns // 2, fusion.norm(fusion.instruction)
    fused, instruction = features.clone(), fusion.instruction.clone()
    for mixer, order in (
        (fusion.forward_mixer, list(range(rows * columns))),
        (fusion.backward_mixer, list(range(rows * columns))[::-1]),
    ):
        sequence, names = [], []
        before = [index for index in order if (index < middle) == (order[0] < middle)]
        for index in [*before, "INS", *order[len(before) :]]:
            if index == "INS":
                sequence.append(ins)
            else:
                sequence += [means[index], read[index]] if local else [read[index]]
            names += ["mean", index] if local and index != "INS" else [index]
        mixed = mixer(torch.stack(sequence)[None])[0]
        for name, value in zip(names, mixed, strict=True):
            if name == "INS":
                instruction = instruction + value
            elif name != "mean":
                fused[name] = fused[name] + value
    return fused, instruction


@torch.no_grad()
@pytest.mark.parametrize("local", [True, False])
def test_the_fusion_is_the_slow_reference(local):
    torch.manual_seed(0)
    fusion = FlashGlobalFusion(16, 4)
    fusion.reset_parameters()
    for parameter in (fusion.instruction, fusion.forward_mixer.out_proj.weight, fusion.backward_mixer.out_proj.weight):
        torch.nn.init.normal_(parameter, std=0.5)
    shapes = [(3, 4), (5, 3), (1, 7), (2, 2)]
    features = torch.randn(4, 15, 16)
    fused, instruction = fusion(features, layout_of(*shapes), local=local)
    for view, (rows, columns) in enumerate(shapes):
        expected = reference_fusion(fusion, features[view, : rows * columns], (rows, columns), local)
        torch.testing.assert_close(fused[view, : rows * columns], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(instruction[view], expected[1], atol=1e-5, rtol=1e-5)


def test_the_local_mean_is_a_pooling_where_one_view_is_alone():
    features = torch.randn(1, 35, 8)
    expected = torch.nn.functional.avg_pool2d(
        features.view(1, 5, 7, 8).permute(0, 3, 1, 2), 3, stride=1, padding=1, count_include_pad=False
    )
    torch.testing.assert_close(local_means(features, layout_of((5, 7)))[0], expected[0].flatten(1).T)


def test_the_scan_can_be_the_single_one(made, trained):
    images = images_of(inputs_of(made, SIZES))
    with torch.no_grad():
        local = trained.model.compress_images(images).tokens
        trained.set_compression(scan="single")
        single = trained.model.compress_images(images).tokens
    assert not torch.allclose(local, single, atol=1e-3)


# The experts


@torch.no_grad()
def test_a_fresh_model_is_plain_selection_by_the_visual_expert(made, model):
    inputs = inputs_of(made, SIZES)
    output = model(**inputs, output_compression=True)
    tokens = visual_tokens_of(output).split([len(image.weights) for image in output.compression])
    model.set_compression(made.processor, keep_ratio=1.0)
    full = model.model.compress_images(images_of(inputs), trace=True)
    everything = full.tokens.split(full.lengths)
    for image, found, whole, all_of_it, size in zip(
        output.compression, tokens, full.provenance, everything, SIZES, strict=True
    ):
        scores = dict(image.scores)
        kept = image.weights[image.roles == 1].argmax(1)
        first = 0
        for rows, columns in slice_grid_of(model.config, size).shapes:
            view = scores["visual expert"][first : first + rows * columns]
            best = view.topk(min(4, rows * columns)).indices.sort().values + first
            assert torch.equal(kept[(kept >= first) & (kept < first + rows * columns)], best)
            native = scores["native expert"][first : first + rows * columns]
            torch.testing.assert_close(native, torch.full_like(native, 1 / len(native)), msg="it has no preference")
            torch.testing.assert_close(view.sum(), torch.tensor(1.0))
            first += rows * columns
        torch.testing.assert_close(found[image.roles == 1], all_of_it[whole.roles == 1][kept], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_is_kept_is_what_both_experts_say_together(made, trained, share):
    trained.set_compression(visual_share=share)
    output = trained(**inputs_of(made, [(42, 42)]), output_compression=True)
    (image,) = output.compression
    scores = dict(image.scores)
    importance = share * scores["visual expert"] + (1 - share) * scores["native expert"]
    assert torch.equal(image.weights.argmax(1), importance.topk(4).indices.sort().values)
    if share == 0:
        assert not torch.equal(image.weights.argmax(1), scores["visual expert"].topk(4).indices.sort().values)


def test_an_expert_without_a_say_is_not_asked(made, trained, monkeypatch):
    asked = []
    for name in ("class_scores", "native_scores"):
        original = getattr(meteor, name)
        monkeypatch.setattr(meteor, name, lambda *args, n=name, f=original: asked.append(n) or f(*args))
    inputs = inputs_of(made, SIZES)
    for settings, expected in (
        ({"visual_share": 0.5}, ["class_scores", "native_scores"]),
        ({"visual_share": 1.0}, ["class_scores"]),
        ({"visual_share": 0.0}, ["native_scores"]),
        ({"keep_ratio": 1.0}, []),
    ):
        asked.clear()
        trained.set_compression(**settings)
        with torch.no_grad():
            trained.model.compress_images(images_of(inputs))
        assert asked == expected


def test_only_kept_tokens_are_projected(made, model):
    projected = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: projected.append(args[0].shape))
    with torch.no_grad():
        model(**inputs_of(made, [(42, 42), (42, 42)]))
    assert projected == [(2, 4, 64)]


def test_no_attention_matrix_is_kept(made, model, monkeypatch):
    """One row of it is computed, at one layer."""
    import foveate.modeling.methods.meteor_algorithm as encoder

    rows, original = [], encoder.class_correlation
    monkeypatch.setattr(
        encoder,
        "class_correlation",
        lambda query, keys, present: rows.append(query.shape[2]) or original(query, keys, present),
    )
    with torch.no_grad():
        model(**inputs_of(made, SIZES))
    assert rows == [1]


def test_the_gate_changes_no_value_and_gives_the_instruction_token_its_gradient(made, trained):
    images = images_of(inputs_of(made, [(42, 42)]))
    settings, inner = trained.config.compression, trained.model
    with torch.no_grad():
        plain = inner.compress_images(images).tokens
    found = inner.compress_images(images, trace=True)
    assert torch.equal(plain, found.tokens.detach())

    # Analytic: a token's share of the importance that was kept scales it.
    weight = torch.randn_like(plain)
    (gradient,) = torch.autograd.grad((found.tokens * weight).sum(), inner.compressor.instruction)
    layout = layout_of((3, 3))
    features, looked = encode_views(inner.vision_tower, images["pixel_values"][0, :1], layout, 2, look=True)
    fused, instruction = inner.compressor(features, layout, local=True)
    importance = settings.visual_share * looked / looked.sum() + 0.2 * native_scores(fused, instruction)
    kept = found.provenance[0].weights.argmax(1)
    share = importance[0, kept] / importance[0, kept].sum()
    tokens = fused[0, kept]
    projected = inner.multi_modal_projector(tokens)
    torch.testing.assert_close(projected, plain, atol=1e-5, rtol=1e-5)
    (slope,) = torch.autograd.grad((projected * weight).sum(), tokens, retain_graph=True)
    by_value = torch.autograd.grad(tokens, inner.compressor.instruction, slope, retain_graph=True)[0]
    by_share = torch.autograd.grad(share, inner.compressor.instruction, (slope * tokens).sum(-1).detach())[0]
    torch.testing.assert_close(gradient, by_value + by_share, atol=1e-5, rtol=1e-4)
    assert by_share.abs().max() > 1e-6


def test_the_native_expert_can_be_let_in_slowly(made, trained):
    images = images_of(inputs_of(made, [(42, 42)]))
    trained.set_compression(visual_share=0.1)
    kept = {}
    for warmup in (0.0, 0.5, 1.0):
        trained.model.native_warmup = warmup
        with torch.no_grad():
            (image,) = trained.model.compress_images(images, trace=True).provenance
        scores = dict(image.scores)
        importance = 0.1 * scores["visual expert"] + warmup * 0.9 * scores["native expert"]
        kept[warmup] = image.weights.argmax(1)
        assert torch.equal(kept[warmup], importance.topk(4).indices.sort().values)
    assert not torch.equal(kept[0.0], kept[1.0])


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"visual_share": 1.5}, "from 0 to 1"),
        ({"scan": "double"}, "'local-to-single', 'single'"),
        ({"max_slices": 0}, "max_slices"),
        ({"num_visual_tokens": 31}, "choose at most 30"),
        ({"comma_token_id": 9999}, "counted from 0"),
    ],
)
def test_a_wrong_setting_is_refused_in_a_sentence(made, tmp_path, settings, message):
    with pytest.raises(FoveateError, match=message):
        convert(made.base, tmp_path / "out", "meteor", settings=settings)
    assert not (tmp_path / "out").exists()


def test_the_size_of_the_states_is_a_matter_of_weights(model):
    with pytest.raises(ValueError, match="convert the base again"):
        model.set_compression(state_size=8)


def test_fewer_slices_are_known_to_both_sides_by_one_call(made, model):
    model.set_compression(made.processor, max_slices=2)
    inputs = inputs_of(made, SIZES)
    with torch.no_grad():
        model(**inputs)
    assert inputs["pixel_values"].shape[1] == 3


def test_a_layer_before_all_layers_has_no_attention_to_look_at(made):
    config = made.model.config.to_dict()
    with pytest.raises(ValueError, match="vision_feature_layer"):
        type(made.model.config)(**{**config, "vision_feature_layer": 0})
