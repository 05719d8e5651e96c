"""The picture shows what the provenance says, for any method."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from foveate.evaluation import picture as drawing
from foveate.evaluation.picture import SeenImage, View, draw_compression, seen_image, seen_slices
from foveate.lab.scenes import draw_scene, sample_scene
from foveate.modeling.core.outputs import TokenProvenance
from foveate.modeling.layers.tiles import TileGrid, tile_grid
from foveate.processing.meteor import LlavaMeteorImageProcessor


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


def grey(columns=4, rows=4) -> SeenImage:
    image = Image.new("RGB", (columns * SIDE, rows * SIDE), (GREY,) * 3)
    return SeenImage((View(image, torch.arange(rows * columns).view(rows, columns)),), rows * columns)


def draw(found: TokenProvenance, question="what is it", answer="red") -> Image.Image:
    return draw_compression(grey(), found, question, answer)


def read(found: TokenProvenance) -> list:
    return drawing._read_panels(found, torch.arange(found.weights.shape[1]))


def read_only(found: TokenProvenance):
    [(_, reading)] = read(found)
    return reading


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
    legend = drawing._legend(read_only(provenance([0, 5], [10], [[3, 7], [12, 13, 14]])), ROLE_NAMES)
    assert [text for *_, text in legend] == [
        "kept by sight: 2 tokens",
        "recovered: 1 token",
        "merged, a colour each: 5 patches in 2 tokens",
        "dropped: 8 patches",
    ]


def test_a_token_that_holds_most_of_the_image_has_no_centre_and_no_hue():
    found = provenance(kept=[0], merged=[[1, 2], [*range(3, 16), 2]])
    reading = read_only(found)
    assert reading.is_rest == [False, True]
    assert [text for *_, text in drawing._legend(reading, ROLE_NAMES)][-1] == "all the rest: 13 patches in 1 token"
    draw(found)


def test_a_patch_in_two_tokens_is_shown_in_the_one_that_holds_more_of_it():
    reading = read_only(provenance(kept=[0], merged=[[1, 2, 3], [3, 2]]))
    assert reading.owner == {1: 0, 2: 0, 3: 1}
    assert reading.merged == [1, 3]


def test_a_cluster_of_one_patch_is_still_merged():
    reading = read_only(provenance(kept=[0], merged=[[1, 2], [3]]))
    assert reading.kept == {1: [0]}
    assert reading.merged == [1, 3]


@pytest.mark.parametrize("found", [provenance(kept=range(16)), provenance(merged=[range(16)]), provenance(kept=[3])])
def test_extremes(found):
    assert draw(found).width == draw(provenance(kept=[1], recovered=[2], merged=[[3, 4]])).width


def test_a_long_question_is_wrapped_and_a_very_long_one_is_cut():
    short, long, endless = (draw(provenance(kept=[1]), "what " * n).height for n in (1, 40, 10_000))
    assert short < long <= endless < short + 100


def test_an_image_that_is_not_square():
    drawn = draw_compression(grey(columns=6, rows=2), provenance(kept=[0], patches=12), "what", "red")
    assert drawn.width > 2 * drawn.height


def test_another_images_provenance():
    with pytest.raises(ValueError, match="has 16 patches, the provenance is of 9"):
        draw(provenance(kept=[0], patches=9))


class InSteps:
    """16 patches in three steps, with recycling: the tokens that are left hold some of every patch but patch 15."""

    left = [0, 2, 5, 7, 8, 10, 11, 13], [2, 5, 7, 10], [5, 10]

    @classmethod
    def provenance(cls, newlines=0) -> TokenProvenance:
        weights = torch.full((2 + newlines, 16), 0.1)
        weights[:, 15], weights[2:] = 0, 0
        weights[0, 10], weights[1, 5] = 1, 1  # tokens stand in another order than patches
        weights[:2, 3] = 1.5  # recycled twice: more of it than of the token's own patch
        weights[0, 5] = weights[1, 10] = 0  # what is kept is never recycled
        steps = tuple((f"layer {layer}", torch.tensor(left)) for layer, left in zip((12, 14, 16), cls.left))
        return TokenProvenance(weights, torch.tensor([1, 2] + [3] * newlines), ROLE_NAMES, steps)


class TestOneStepAfterTheOther:
    def test_each_has_a_panel_with_the_patches_that_it_left(self):
        panels = read(InSteps.provenance())
        assert [caption for caption, _ in panels] == [
            "layer 12: 8 of 16 patches",
            "layer 14: 4 of 16 patches",
            "layer 16: 2 of 16 patches",
        ]
        for (_, reading), left in zip(panels, InSteps.left):
            assert sorted(set(range(16)) - set(reading.dark)) == left

    def test_the_last_outlines_each_tokens_own_patch_and_nothing_is_a_tint(self):
        *earlier, (_, last) = read(InSteps.provenance())
        assert last.kept == {1: [10], 2: [5]}
        assert not last.merged and not last.owner
        assert not any(reading.kept for _, reading in earlier)

    def test_the_legend_tells_what_is_recycled_from_what_is_gone(self):
        assert [text for *_, text in drawing._legend(read(InSteps.provenance())[-1][1], ROLE_NAMES)] == [
            "kept by sight: 1 token",
            "recovered: 1 token",
            "discarded, merged into kept tokens: 13 patches",
            "dropped: 1 patch",
        ]

    def test_they_stand_in_a_row_after_the_plain_image(self):
        drawn = draw(InSteps.provenance())
        side, top = drawing.SMALL_PANEL // 4, drawing.MARGIN + 2 * 32 + 14
        assert drawn.width == drawing.MARGIN + 4 * (4 * side + drawing.MARGIN)
        for panel, left in enumerate([range(16), *InSteps.left]):
            for patch in range(16):
                x = drawing.MARGIN + panel * (4 * side + drawing.MARGIN) + patch % 4 * side + side // 2
                (red, *_) = drawn.getpixel((x, top + patch // 4 * side + side // 2))
                assert red == GREY if patch in left else red < 50

    @pytest.mark.parametrize(("num_steps", "rows"), [(2, 1), (3, 1), (4, 2), (6, 2), (7, 2), (8, 3)])
    def test_rows_have_four_panels_at_most(self, num_steps, rows):
        found = InSteps.provenance()
        found.steps = tuple((f"layer {step}", torch.tensor(InSteps.left[2])) for step in range(num_steps))
        row = drawing.SMALL_PANEL + 50
        frame = draw(InSteps.provenance()).height - row
        assert draw(found).height == frame + rows * row

    def test_a_caption_that_is_wider_than_its_panel_has_room(self):
        found = InSteps.provenance()
        found.steps = tuple((f"a step with a very long name, {name}", left) for name, left in found.steps)
        narrow = draw_compression(grey(columns=1, rows=16), found, "what", "red")
        assert narrow.width > 3 * 300


def test_patches_that_qwens_processor_cut_are_put_together():
    """As the vision tower sees it: with a side that is rounded to whole merged tokens."""
    from transformers import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(patch_size=14, merge_size=2, size={"shortest_edge": 28**2, "longest_edge": 10**6})
    scene = draw_scene(sample_scene("test", 0)).resize((112, 168))
    inputs = processor(images=[scene], return_tensors="pt")
    pixels = drawing.pixels_of_patches(inputs["pixel_values"], inputs["image_grid_thw"][0], processor)
    [view] = seen_image(pixels, processor, 28).views
    assert view.patches.tolist() == torch.arange(24).view(6, 4).tolist()
    torch.testing.assert_close(*(torch.tensor(np.array(image)) for image in (view.image, scene)), atol=1, rtol=0)


class TestTiles:
    @pytest.fixture(params=[(3, 5), (7, 3), (4, 4)])  # height and width in tiles of 2 × 2 patches, pixels are a tenth
    def grid(self, request) -> TileGrid:
        size = [10 * length for length in request.param]
        return tile_grid(size, [[28, 56], [56, 28], [56, 56]], tile_size=28, patch_size=14)

    @pytest.fixture
    def tiles(self, grid) -> torch.Tensor:
        """Every patch has its own number as its grey value; one tile more, as in a batch."""
        numbers = torch.arange(4.0 * (grid.num_tiles + 1)).view(-1, 2, 2) / 255
        return numbers.repeat_interleave(14, 1).repeat_interleave(14, 2)[None, :, None].expand(-1, -1, 3, -1, -1)

    class ImageProcessor:
        image_mean, image_std = [0, 0, 0], [1, 1, 1]

    def test_are_put_together_with_their_patches_and_without_padding(self, grid, tiles):
        seen = seen_image(tiles, self.ImageProcessor, 14, grid)
        overview, whole = seen.views
        assert seen.num_patches == 4 * grid.num_tiles
        assert overview.patches.tolist() == [[0, 1], [2, 3]]
        assert whole.patches.shape == (grid.bottom - grid.top, grid.right - grid.left)
        for view in seen.views:
            assert view.image.size == (14 * view.patches.shape[1], 14 * view.patches.shape[0])
            for row, numbers in enumerate(view.patches.tolist()):
                for column, number in enumerate(numbers):
                    assert view.image.getpixel((14 * column + 7, 14 * row + 7)) == (number,) * 3

    def test_are_drawn_side_by_side_and_the_padding_is_not_counted(self):
        grid = TileGrid(side=2, rows=2, columns=2, top=1, bottom=3, left=0, right=4)  # half of it is padding
        pixels = torch.full((1, 5, 3, 28, 28), GREY / 255)
        found = TokenProvenance(torch.eye(20)[[1, 6]], torch.tensor([1, 1]), ROLE_NAMES)
        found.steps = (("layer 1", torch.tensor([1, 4, 6])), ("layer 2", torch.tensor([1, 6])))  # 4 is padding
        seen = seen_image(pixels, self.ImageProcessor, 14, grid)
        shown = torch.cat([view.patches.flatten() for view in seen.views])
        panels = drawing._read_panels(found, shown)
        assert [caption for caption, _ in panels] == ["layer 1: 2 of 12 patches", "layer 2: 2 of 12 patches"]
        assert [shown[patch] for patch in panels[-1][1].kept[1]] == [1, 6]
        panel = 2 * drawing.SMALL_PANEL + drawing._GAP
        assert draw_compression(seen, found, "what", "red").width == 3 * drawing.MARGIN + 2 * panel

    def test_a_newline_is_made_of_no_patch(self):
        for found in (InSteps.provenance(newlines=3), provenance(kept=[4, 5])):
            if not found.steps:
                found.weights = torch.cat([found.weights, torch.zeros(3, 16)])
                found.roles = torch.cat([found.roles, torch.full((3,), 3)])
            reading = read(found)[-1][1]
            assert reading.of_no_patch == {3: 3}
            assert all(0 not in patches for patches in reading.kept.values())
            assert drawing._legend(reading, ROLE_NAMES)[-1][-1] == "merged, of no patch: 3 tokens"
            draw(found)


class TestSlices:
    @pytest.fixture
    def processor(self) -> LlavaMeteorImageProcessor:
        return LlavaMeteorImageProcessor(view_size=28, patch_size=SIDE, max_slices=6)

    @pytest.mark.parametrize(("size", "slices"), [((28, 28), None), ((84, 56), (2, 3)), ((30, 70), (2, 1))])
    def test_are_put_together_with_their_patches_and_without_padding(self, processor, size, slices):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
        batch = processor([image, Image.new("RGB", (50, 90))], return_tensors="pt")  # views and patches of padding
        pixels, grid = batch["pixel_values"], processor.grid_of(size[::-1])
        seen = seen_slices(pixels[:1], processor, grid)
        assert [view.slices for view in seen.views] == [(1, 1), *([slices] if slices else [])]
        patches = torch.cat([pixels[0, view, : rows * columns] for view, (rows, columns) in enumerate(grid.shapes)])
        assert seen.num_patches == len(patches)
        for view in seen.views:
            assert view.image.size == (SIDE * view.patches.shape[1], SIDE * view.patches.shape[0])
            resized = image.resize(view.image.size, Image.Resampling.BICUBIC)
            np.testing.assert_allclose(np.array(view.image, int), np.array(resized, int), atol=1)
            cut = processor._cut(resized, 1, 1, view.patches.shape)[0]
            torch.testing.assert_close(patches[view.patches.flatten()], torch.tensor(cut))
        assert sorted(torch.cat([view.patches.flatten() for view in seen.views]).tolist()) == [*range(len(patches))]

    @staticmethod
    def sliced() -> SeenImage:
        """An overview of 2 × 2 patches, and two slices of 2 × 2 side by side."""
        overview, slices = (grey(columns, 2).views[0].image for columns in (2, 4))
        numbers = torch.tensor([[4, 5, 8, 9], [6, 7, 10, 11]])
        return SeenImage((View(overview, torch.tensor([[0, 1], [2, 3]])), View(slices, numbers, (1, 2))), 12, "slices")

    def test_every_expert_has_a_panel_before_the_tokens(self, monkeypatch):
        drawn, compose = [], drawing._compose
        monkeypatch.setattr(drawing, "_compose", lambda *a: drawn.append(a) or compose(*a))
        found = provenance(kept=[0, 9], patches=12)
        draw_compression(self.sliced(), found, "what", "red")
        found.scores = (("one", torch.rand(12)), ("another", torch.rand(12)))
        draw_compression(self.sliced(), found, "what", "red")
        (plain, captions, *_, legend), (panels, with_experts, *_, longer) = drawn
        assert captions == ["overview and slices: 12 patches", "2 visual tokens"]
        assert with_experts == [captions[0], "one", "another", captions[1]]
        assert [plain[0].tobytes(), plain[1].tobytes()] == [panels[0].tobytes(), panels[3].tobytes()]
        assert longer[:-1] == legend and longer[-1][-1].startswith("an expert's score")

    def test_the_highest_score_of_a_view_is_the_hottest(self):
        *_, whole = self.sliced().views
        scores = torch.tensor([[0.1, 0.0, 0.4, 0.0], [0.05, 0.0, 0.0, 0.0]])
        heat = drawing._heat_map(whole.image, scores, whole)
        dark, *_, light = (ImageColor.getrgb(colour) for colour in drawing.HEAT)
        of_patches = np.array(heat)[SIDE // 2 :: SIDE, SIDE // 2 :: SIDE].astype(float)
        shades = (of_patches - (1 - drawing._HEAT) * GREY) / drawing._HEAT  # what was laid over the grey
        for place in ((0, 0), (0, 2)):
            assert shades[place] == pytest.approx(light, abs=2)
        for place in ((0, 1), (0, 3), (1, 3)):
            assert shades[place] == pytest.approx(dark, abs=2)
        assert dark[0] + 20 < shades[1, 0, 0] < light[0]

    def test_an_expert_that_gives_a_view_nothing(self):
        found = provenance(kept=[0], patches=12)
        found.scores = (("one", torch.zeros(12)),)
        draw_compression(self.sliced(), found, "what", "red")

    def test_a_line_is_between_slices_alone(self):
        [panel] = drawing._draw_panels(self.sliced().views, [None])
        row = np.array(panel)[panel.height // 8, :, 0].astype(int)
        overview, whole = row[: drawing.PANEL], row[drawing.PANEL + drawing._GAP :]
        assert (overview == GREY).all()
        line = (abs(whole - GREY) > 20).nonzero()[0]
        assert len(line) and (abs(line - len(whole) / 2) < 4).all()

    def test_patches_of_slices_are_large_enough_to_be_told_apart(self):
        [view] = grey(columns=2, rows=100).views
        for slices, side in (((1, 1), drawing.SMALL_PANEL // 100), ((2, 1), drawing._SLICED)):
            *_, panel = drawing._draw_panels((View(view.image, view.patches, slices),), [None] * 4)
            assert panel.size == (2 * side, 100 * side)


def test_the_image_is_as_the_tower_saw_it():
    class ImageProcessor:
        image_mean, image_std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]

    pixels = torch.rand(3, 4, 5)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (ImageProcessor.image_mean, ImageProcessor.image_std)
    )
    (view,) = seen_image(((pixels - mean) / std)[None], ImageProcessor, patch_size=2).views
    assert view.image.size == (4, 4)  # whole patches
    assert view.patches.tolist() == [[0, 1], [2, 3]]
    assert view.image.getpixel((2, 1)) == tuple((255 * pixels[:, 1, 2]).round().int().tolist())
