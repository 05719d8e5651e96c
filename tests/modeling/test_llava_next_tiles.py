"""LLaVA-NeXT's tiles: the layout against the stock model's own packing, and the counts against the processor's."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from foveate import convert
from foveate.modeling.compatibility import visual_tokens_of
from foveate.modeling.layers.tiles import tile_grid, tile_grid_of

from ..helpers.tiny_checkpoints import write_clip, write_llava_next


SIZES = [(60, 42), (42, 42), (30, 90), (100, 20), (84, 84), (13, 200)]  # height, width
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("next")
    base = write_llava_next(folder / "base", dtype=torch.float32)
    settings = {"num_visual_tokens": 4, "layers": [0, 1]}
    out = convert(base, folder / "out", "qg-vtc", write_clip(folder / "clip"), settings)
    return [
        (
            AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval(),
            AutoProcessor.from_pretrained(path),
        )
        for path in (base, out)
    ]


def inputs_of(processor, sizes):
    images = [Image.effect_noise((width, height), 80).convert("RGB") for height, width in sizes]
    prompts = ["USER: <image> what is it ASSISTANT:"] * len(sizes)
    return processor(images=images, text=prompts, padding=True, return_tensors="pt")


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_the_uncompressed_sequence_is_the_stock_models(both, size):
    (stock, _), (model, processor) = both
    settings = model.config.compression
    model.set_compression(processor, num_visual_tokens=9)
    inputs = inputs_of(processor, [size])
    theirs = stock(**{k: v for k, v in inputs.items() if not k.startswith("question")})
    torch.testing.assert_close(model(**inputs).logits, theirs.logits, atol=1e-5, rtol=1e-5)
    model.config.compression = settings
    processor.set_compression(settings)


@torch.no_grad()
def test_a_batch_of_sizes_gives_each_image_what_it_gets_alone(both):
    model, processor = both[1]
    batch = inputs_of(processor, SIZES)
    together = model(**batch, output_compression=True)
    tokens = visual_tokens_of(together).split([len(image.weights) for image in together.compression])
    for index, (size, found) in enumerate(zip(SIZES, tokens)):
        names = ["pixel_values", "image_sizes", "question_input_ids", "question_attention_mask"]
        alone = model.model.compress_images({name: batch[name][index : index + 1] for name in names})
        torch.testing.assert_close(found, alone.tokens, atol=1e-5, rtol=1e-5)
        counted = processor._get_num_multimodal_tokens(image_sizes=[size])["num_image_tokens"]
        assert counted == alone.lengths == [int((batch["input_ids"][index] == 4).sum())]


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_no_token_comes_from_the_padding_and_newlines_end_the_rows(both, size):
    model, processor = both[1]
    output = model(**inputs_of(processor, [size]), output_compression=True)
    (image,) = output.compression
    grid = tile_grid_of(model.config, size)
    is_newline = image.roles == len(image.role_names) - 1
    assert int(is_newline.sum()) == grid.num_newlines
    own_patch = image.weights[~is_newline].argmax(1)
    tiles = own_patch // 9
    assert torch.bincount(tiles, minlength=grid.num_tiles).tolist() == [min(4, n) for n in grid.patches_of_tiles()]
    of_grid = own_patch[tiles > 0] - 9
    row = of_grid // 9 // grid.columns * 3 + of_grid % 9 // 3
    column = of_grid // 9 % grid.columns * 3 + of_grid % 3
    assert ((row >= grid.top) & (row < grid.bottom) & (column >= grid.left) & (column < grid.right)).all()
    assert (row.diff() >= 0).all(), "row after row"
    newline = visual_tokens_of(output)[is_newline]
    torch.testing.assert_close(newline, model.model.image_newline.expand_as(newline))


@pytest.mark.parametrize("size", [(480, 640), (1000, 300), (336, 336), (50, 2000)])
def test_the_published_grids_count_as_the_stock_processor_counts(both, size):
    stock = both[0][1]
    grid = tile_grid(size, PINPOINTS, 336, 14)
    unpadded, newlines = stock._get_unpadded_features(*size, 24, 24, grid.rows, grid.columns)
    assert grid.num_tokens(576) == 576 + unpadded + newlines
