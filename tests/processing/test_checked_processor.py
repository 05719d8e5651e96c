"""Pictures as people have them: what every processor makes of odd modes, sizes and formats."""

import io

import numpy as np
import pytest
from PIL import Image

from foveate.processing import base as checked_processor
from foveate.processing.base import MAX_ASPECT_RATIO, readable


def noise(mode="RGB", size=(40, 30)):
    return Image.effect_noise(size, 90).convert(mode)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA", "YCbCr", "F"])
def test_any_mode_becomes_rgb(mode):
    found = readable(noise(mode))
    assert (found.mode, found.size) == ("RGB", (40, 30))
    assert len(np.unique(np.asarray(found))) > 1


@pytest.mark.parametrize("factor", [1, 257])
def test_16_bit_grey_is_scaled_not_clipped(factor):
    """8-bit values in 16 bits as well as the full range."""
    values = np.tile(np.arange(0, 256, 4, dtype=np.uint16), (64, 1))
    found = readable(Image.fromarray(values * factor))
    np.testing.assert_array_equal(np.asarray(found)[..., 0], values)


def test_of_an_animation_the_first_frame_is_read_and_that_is_said_once(monkeypatch):
    said = []
    monkeypatch.setattr(checked_processor.logger, "warning_once", said.append)
    file = io.BytesIO()
    first, second = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    first.save(file, "GIF", save_all=True, append_images=[second])
    animation = Image.open(file)
    animation.seek(1)
    assert readable(animation).getpixel((5, 5)) == (255, 0, 0)
    assert said == ["An image has several frames: the first is read, the others aren't."]
    readable(noise())
    assert len(said) == 1


def test_a_rotation_in_the_exif_data_is_undone():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    noise().save(file, "JPEG", exif=exif)
    assert readable(Image.open(file)).size == (30, 40)


def test_a_path_stands_for_its_picture(tmp_path):
    noise().save(tmp_path / "picture.png")
    assert readable(str(tmp_path / "picture.png")).size == (40, 30)


@pytest.mark.parametrize("size", [(0, 30), (30, 0), (0, 0)])
def test_an_image_without_area_is_refused(size):
    with pytest.raises(ValueError, match="there is nothing in it to see"):
        readable(Image.new("RGB", size))


@pytest.mark.parametrize("size", [(1, MAX_ASPECT_RATIO + 1), (3030, 30)])
def test_an_image_too_narrow_to_be_seen_is_refused(size):
    with pytest.raises(ValueError, match="crop it first"):
        readable(Image.new("RGB", size))
    assert readable(Image.new("RGB", (3000, 30))).size == (3000, 30)
