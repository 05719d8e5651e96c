"""The slicing as a pure function, and the image processor that cuts by it."""

import numpy as np
import pytest
from PIL import Image

from foveate.configuration.meteor import largest_view
from foveate.evaluation.shapes import config_of_shape
from foveate.modeling.layers.slices import slice_grid
from foveate.processing.base import MAX_ASPECT_RATIO
from foveate.processing.meteor import LlavaMeteorImageProcessor


def grid_of(height: int, width: int, view_size: int = 336, max_slices: int = 6):
    return slice_grid((height, width), view_size, 14, max_slices)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (336, 336, 0, 0),  # the area of a view: the overview is all
        (14, 14, 0, 0),
        (100, 900, 0, 0),
        (337, 336, 2, 1),
        (672, 672, 2, 2),
        (1008, 672, 3, 2),  # the largest that is read at its own resolution
        (672, 1008, 2, 3),
        (300, 4000, 1, 6),
        (4000, 300, 6, 1),
        (4000, 4000, 3, 2),  # 2 × 2 is no grid of 5 or 6 slices, and 2 × 3 is as far from square
        (500, 400, 2, 1),
    ],
)
def test_the_grid_of_known_sizes(height, width, rows, columns):
    grid = grid_of(height, width)
    assert (grid.rows, grid.columns) == (rows, columns)


def test_the_slices_of_the_largest_image_are_square_views():
    grid = grid_of(672, 1008)
    assert grid.slice_shape == (24, 24)
    assert grid.overview == (20, 29)
    assert grid.num_views == 7
    assert grid.num_separators == 5
    assert grid.num_tokens(144) == 7 * 144 + 5
    assert grid.num_tokens(10_000) == grid.num_patches + 5


@pytest.fixture(scope="module")
def sizes():
    random = np.random.default_rng(0)
    found = []
    while len(found) < 500:
        height, width = (int(x) for x in np.exp(random.uniform(0, np.log(5000), 2)))
        if max(height, width) <= MAX_ASPECT_RATIO * min(height, width):
            found.append((height, width))
    return found


def test_every_view_has_about_one_area_and_nearly_the_aspect_of_what_it_shows(sizes):
    most = largest_view(config_of_shape("llava-1.5-7b", "meteor"))
    for height, width in sizes:
        grid = grid_of(height, width)
        assert 0 <= grid.num_slices <= 6
        assert grid.num_slices != 1
        assert grid.num_slices == 0 or height * width > 336**2
        for (rows, columns), aspect in (
            (grid.overview, height / width),
            (grid.slice_shape, height / max(1, grid.rows) / (width / max(1, grid.columns))),
        ):
            if rows:
                assert 576 * 0.79 <= rows * columns <= most
                ideal = 24 * aspect**0.5, 24 / aspect**0.5
                assert abs(rows - ideal[0]) <= 0.5 + 1e-9
                assert abs(columns - ideal[1]) <= 0.5 + 1e-9


def test_fewer_slices_are_allowed_and_the_aspect_still_decides():
    assert grid_of(672, 1008, max_slices=1).num_slices == 0
    assert grid_of(672, 1008, max_slices=2).columns == 2
    assert grid_of(1008, 672, max_slices=3).rows in (2, 3)


def test_the_pixels_of_views_are_the_resized_picture_cut_up():
    """Put together again they are the picture, and a view of the tower's own size is not resized at all."""
    picture = Image.effect_noise((84, 126), 90).convert("RGB")
    processor = LlavaMeteorImageProcessor(view_size=42)
    grid = processor.grid_of((126, 84))
    assert (grid.rows, grid.columns, grid.slice_shape) == (3, 2, (3, 3))
    pixels = processor(picture, return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 7, max(9, grid.overview[0] * grid.overview[1]), 3 * 14**2)
    again = processor.put_together(pixels[0, 1:7, :9], 3, 2, (3, 3))
    np.testing.assert_allclose(again * 255, np.asarray(picture), atol=1e-3)
    values = np.asarray(picture, dtype=np.float32)[:14, 42:56] / 255  # the first patch of the second slice
    normed = (values - np.float32(processor.image_mean)) / np.float32(processor.image_std)
    np.testing.assert_allclose(pixels[0, 2, 0], normed.transpose(2, 0, 1).ravel(), atol=1e-6)


def test_images_of_several_sizes_are_padded_with_zeros():
    processor = LlavaMeteorImageProcessor(view_size=42)
    pictures = [Image.effect_noise(size, 90) for size in ((42, 42), (126, 84), (200, 30))]
    together = processor(pictures, return_tensors="np")
    assert together["image_sizes"].tolist() == [[42, 42], [84, 126], [30, 200]]
    for index, picture in enumerate(pictures):
        alone = processor(picture, return_tensors="np")["pixel_values"][0]
        views, patches = alone.shape[:2]
        np.testing.assert_array_equal(together["pixel_values"][index, :views, :patches], alone)
        assert not together["pixel_values"][index, views:].any()
        assert not together["pixel_values"][index, :, patches:].any()


@pytest.mark.parametrize("kind", ["array", "channels first", "floats", "tensor"])
def test_arrays_are_read_as_pictures_are(kind):
    import torch

    picture = Image.effect_noise((60, 80), 90).convert("RGB")
    values = np.asarray(picture)
    given = {
        "array": values,
        "channels first": values.transpose(2, 0, 1),
        "floats": values.astype(np.float32) / 255,
        "tensor": torch.tensor(values).permute(2, 0, 1),
    }[kind]
    processor = LlavaMeteorImageProcessor(view_size=42)
    found, expected = (processor(image, return_tensors="np") for image in (given, picture))
    np.testing.assert_allclose(found["pixel_values"], expected["pixel_values"], atol=0.02)
    assert found["image_sizes"].tolist() == expected["image_sizes"].tolist()
