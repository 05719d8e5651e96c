"""The picture shows what the provenance says, for any method."""

import pytest
import torch
from PIL import Image

from foveate.evaluation import picture as drawing
from foveate.evaluation.picture import draw_compression, shown_image
from foveate.modeling.compressed_model import TokenProvenance


ROLE_NAMES = ("dropped", "kept by sight", "recovered", "merged")
SIDE, GREY = 14, 140


def provenance(kept=(), recovered=(), merged=(), patches=16) -> TokenProvenance:
    """Tokens of one patch each, then tokens of several; `merged` are lists of patches, the strongest first."""
    rows, roles = [], []
    for role, group in ((1, [[p] for p in kept]), (2, [[p] for p in recovered]), (3, merged)):
        for token in group:
            row = torch.zeros(patches)
            row[list(token)] = torch.linspace(1, 0.5, len(token))
            rows.append(row)
            roles.append(role)
    return TokenProvenance(torch.stack(rows), torch.tensor(roles), ROLE_NAMES)


def draw(found: TokenProvenance, question="what is it", answer="red") -> Image.Image:
    return draw_compression(Image.new("RGB", (4 * SIDE, 4 * SIDE), (GREY,) * 3), found, SIDE, question, answer)


def patch_colour(drawn: Image.Image, patch: int) -> tuple[int, int, int]:
    """A pixel a quarter inside a patch of the right panel: beside a dot, within an outline."""
    side = drawing.PANEL // 4
    left, top = 2 * drawing.MARGIN + 4 * side, drawing.MARGIN + 2 * 32 + 14
    return drawn.getpixel((left + patch % 4 * side + side // 4, top + patch // 4 * side + side // 4))


def test_every_patch_shows_what_became_of_it():
    drawn = draw(provenance(kept=[0, 5], recovered=[10], merged=[[3, 7], [12, 13, 14]]))
    for patch in (0, 5, 10):
        assert patch_colour(drawn, patch) == (GREY,) * 3
    for patch in (1, 2, 15):
        assert max(patch_colour(drawn, patch)) < 50
    assert patch_colour(drawn, 3) == patch_colour(drawn, 7) != patch_colour(drawn, 12)
    assert patch_colour(drawn, 12) == patch_colour(drawn, 13) == patch_colour(drawn, 14)
    assert len(set(patch_colour(drawn, 3))) > 1  # a hue


def test_the_legend_counts():
    legend = drawing._legend(drawing._read(provenance([0, 5], [10], [[3, 7], [12, 13, 14]])), ROLE_NAMES)
    assert [text for *_, text in legend] == [
        "kept by sight: 2 tokens",
        "recovered: 1 token",
        "merged, a colour each: 5 patches in 2 tokens",
        "dropped: 8 patches",
    ]


def test_a_token_that_holds_most_of_the_image_has_no_centre_and_no_hue():
    found = provenance(kept=[0], merged=[[1, 2], [*range(3, 16), 2]])
    reading = drawing._read(found)
    assert reading.is_rest == [False, True]
    assert [text for *_, text in drawing._legend(reading, ROLE_NAMES)][-1] == "all the rest: 13 patches in 1 token"
    draw(found)


def test_a_patch_in_two_tokens_is_shown_in_the_one_that_holds_more_of_it():
    reading = drawing._read(provenance(kept=[0], merged=[[1, 2, 3], [3, 2]]))
    assert reading.owner == {1: 0, 2: 0, 3: 1}
    assert reading.merged == [1, 3]


def test_a_cluster_of_one_patch_is_still_merged():
    reading = drawing._read(provenance(kept=[0], merged=[[1, 2], [3]]))
    assert reading.kept == {1: [0]}
    assert reading.merged == [1, 3]


@pytest.mark.parametrize("found", [provenance(kept=range(16)), provenance(merged=[range(16)]), provenance(kept=[3])])
def test_extremes(found):
    assert draw(found).width == draw(provenance(kept=[1], recovered=[2], merged=[[3, 4]])).width


def test_a_long_question_is_wrapped_and_a_very_long_one_is_cut():
    short, long, endless = (draw(provenance(kept=[1]), "what " * n).height for n in (1, 40, 10_000))
    assert short < long <= endless < short + 100


def test_an_image_that_is_not_square():
    image = Image.new("RGB", (6 * SIDE, 2 * SIDE))
    drawn = draw_compression(image, provenance(kept=[0], patches=12), SIDE, "what", "red")
    assert drawn.width > 2 * drawn.height


def test_another_images_provenance():
    with pytest.raises(ValueError, match="4 × 4 patches, the provenance is of 9"):
        draw(provenance(kept=[0], patches=9))


def test_the_image_is_as_the_tower_saw_it():
    class ImageProcessor:
        image_mean, image_std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]

    pixels = torch.rand(3, 4, 5)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (ImageProcessor.image_mean, ImageProcessor.image_std)
    )
    shown = shown_image(((pixels - mean) / std)[None], ImageProcessor)
    assert shown.size == (5, 4)
    assert shown.getpixel((2, 1)) == tuple((255 * pixels[:, 1, 2]).round().int().tolist())
