"""What compression matrices are like, and their picture."""

import pytest
from PIL import Image

from foveate import FoveateError, convert
from foveate.lab.matrices import main, measure


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("matrices") / "out"
    return convert("lab:tiny-llava", out, "metacompress", settings={"key_width": 8}, keep_ratio=0.1)


def test_numbers_and_a_picture(checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    main([str(checkpoint)], tmp_path / "matrices.png", tmp_path / "matrices.json", limit=3)
    assert Image.open(tmp_path / "matrices.png").width > 400
    found = measure(checkpoint, 3)
    assert 1 <= found["collapse"] <= 14
    assert 1 / 14 <= found["distinct"] <= 1
    assert 0 <= found["objects"] <= 1


def test_a_method_without_matrices_is_refused(tmp_path):
    out = convert("lab:tiny-llava", tmp_path / "out", "sample")
    with pytest.raises(FoveateError, match="makes no compression matrices"):
        measure(out, 1)
