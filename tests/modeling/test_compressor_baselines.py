"""The training-free baselines: which tokens each takes, and that nothing else in the batch has a say."""

import math
from itertools import pairwise

import pytest
import torch

from foveate.modeling.core.exact import Mixture, Selection
from foveate.modeling.methods.baselines import image_keys, random_positions, sample_positions, stretch_matrix


CPU = torch.device("cpu")
LENGTHS = [(24, 5), (24, 8), (24, 23), (7, 3), (576, 58), (2928, 293), (9, 9), (1, 1), (2, 1), (24, 1)]  # n, m


def make_sequences(batch, length, width=6):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0))


def keys_of(number):
    return torch.randint(-(2**62), 2**62, (number,), generator=torch.Generator().manual_seed(1))


# Random


@pytest.mark.parametrize(("length", "number"), LENGTHS)
def test_random_positions_are_different_ones_in_rising_order(length, number):
    positions = random_positions(keys_of(8), length, number, seed=0)
    assert positions.shape == (8, number)
    assert (positions.diff(dim=1) > 0).all()
    assert (positions >= 0).all() and (positions < length).all()


def test_random_positions_follow_from_key_and_seed_alone():
    keys = keys_of(6)
    together = random_positions(keys, 60, 20, seed=3)
    torch.manual_seed(123)  # global state has no say
    for index in range(6):
        assert torch.equal(random_positions(keys[index : index + 1], 60, 20, seed=3)[0], together[index])
    assert torch.equal(random_positions(keys.flip(0), 60, 20, seed=3), together.flip(0))


@pytest.mark.parametrize("keys", [torch.arange(50), keys_of(50)], ids=["neighbours", "far apart"])
def test_other_keys_and_other_seeds_give_others(keys):
    """Two choices have as many in common as chance has it: m²/n."""
    found = torch.stack([random_positions(keys, 100, 20, seed) for seed in (0, 1, 2)])
    chosen = torch.zeros(3, 50, 100).scatter(2, found, 1.0)
    by_key = chosen @ chosen.mT
    by_seed = chosen.transpose(0, 1) @ chosen.permute(1, 2, 0)
    for common in (by_key, by_seed):
        size = common.shape[1]
        others = common[:, ~torch.eye(size, dtype=torch.bool)]
        assert others.max() < 20
        assert float(others.mean()) == pytest.approx(4, abs=0.4)


def test_random_positions_are_about_uniform():
    """Each position is taken by m/n of the images, and so is each pair of neighbours by its share."""
    number = 20000
    chosen = torch.zeros(number, 40).scatter(1, random_positions(torch.arange(number), 40, 10, seed=0), 1.0)
    margin = 5 * math.sqrt(0.25 * 0.75 / number)  # 5 standard deviations
    torch.testing.assert_close(chosen.mean(0), torch.full((40,), 0.25), atol=margin, rtol=0)
    pairs = (chosen[:, 1:] * chosen[:, :-1]).mean(0)
    torch.testing.assert_close(pairs, torch.full((39,), 10 * 9 / (40 * 39)), atol=margin, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_images_key_is_of_its_own_pixels_and_absent_tiles_dont_count(dtype):
    images = torch.randn(4, 3, 3, 8, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    images[1, 2] = 0
    keys = image_keys(images)
    assert len(set(keys.tolist())) == 4
    assert torch.equal(image_keys(images.clone()), keys)
    assert torch.equal(image_keys(images[1:2]), keys[1:2])
    assert torch.equal(image_keys(images[1:2, :2]), keys[1:2])
    images[0, 0, 0, 0, 0] += 1
    assert (image_keys(images) != keys).tolist() == [True, False, False, False]


# Equidistant


@pytest.mark.parametrize(("length", "number"), LENGTHS)
def test_sampling_takes_one_token_a_stride(length, number):
    expected = [math.floor(i * length / number) for i in range(number)]
    assert sample_positions(length, number, CPU).tolist() == expected


# Spatial


@pytest.mark.parametrize(("length", "number"), LENGTHS)
def test_stretches_divide_the_sequence_and_are_averaged(length, number):
    starts = [*sample_positions(length, number, CPU).tolist(), length]
    sequences = make_sequences(2, length)
    expected = torch.stack([sequences[:, a:b].mean(1) for a, b in pairwise(starts)], dim=1)
    matrix = stretch_matrix(length, number, CPU)
    torch.testing.assert_close(Mixture(matrix.expand(2, -1, -1)).apply(sequences), expected)
    assert ((matrix > 0).sum(0) == 1).all(), "every token goes into one mean"
    torch.testing.assert_close(matrix.sum(1), torch.ones(number))
    sizes = (matrix > 0).sum(1)
    assert sizes.max() - sizes.min() <= 1


# All


@pytest.mark.parametrize("length", [1, 9, 24])
def test_all_leave_a_sequence_as_it_is_at_its_full_length(length):
    sequences, every = make_sequences(3, length), torch.arange(length)
    assert torch.equal(random_positions(keys_of(3), length, length, seed=0), every.expand(3, -1))
    assert torch.equal(sample_positions(length, length, CPU), every)
    assert torch.equal(stretch_matrix(length, length, CPU), torch.eye(length))
    assert torch.equal(Selection(every.expand(3, -1)).apply(sequences), sequences)


def test_tokens_are_taken_from_the_image_that_their_positions_are_of():
    sequences = make_sequences(3, 10)
    positions = torch.tensor([[0, 2], [1, 9], [3, 4]])
    expected = torch.stack([sequence[rows] for sequence, rows in zip(sequences, positions)])
    choice = Selection(positions)
    assert torch.equal(choice.apply(sequences), expected)
    torch.testing.assert_close(choice.weights(10) @ sequences, expected)
    places = torch.stack([torch.arange(10) // 5, torch.arange(10) % 5], dim=1).expand(3, -1, -1)
    assert torch.equal(choice.apply(places)[0], torch.tensor([[0, 0], [0, 2]]))
    middle = Mixture(torch.full((3, 1, 10), 0.1)).apply(places)
    assert middle.dtype == torch.int64 and middle[0].tolist() == [[0, 2]], "places are rounded to whole numbers"
