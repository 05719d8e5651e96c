"""The generator of compression matrices against its slow reference, where it begins, and what loading leaves of it."""

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText

from foveate import convert
from foveate.modeling.core.exact import Mixture
from foveate.modeling.methods.metacompress import MetaCompressor, pool_sequence, sinusoidal_positions

from ..helpers.tiny_checkpoints import write_llava, write_llava_next
from . import reference_metacompress as reference


LENGTHS = [(24, 5), (24, 8), (24, 23), (7, 3), (13, 6), (9, 9), (1, 1), (2, 1), (24, 1)]  # n, m


def compress(compressor, sequences, number):
    """The tokens that are left, and the matrices that they are made by."""
    mixture = Mixture(compressor(sequences, number))
    return mixture.apply(sequences), mixture.matrices


def make_compressor(width=20, key_width=6, trained=True, dtype=torch.float32):
    """As it begins, or with weights of no pattern, as after training."""
    torch.manual_seed(0)
    compressor = MetaCompressor(width, key_width)
    compressor.reset_parameters()
    if trained:
        for parameter in compressor.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return compressor.to(dtype)


def make_sequences(batch, length, width=20, dtype=torch.float32):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("length", "number"), LENGTHS)
def test_it_computes_what_the_reference_computes(length, number, trained):
    compressor, sequences = make_compressor(trained=trained), make_sequences(3, length)
    tokens, matrices = compress(compressor, sequences, number)
    assert tokens.shape == (3, number, 20) and matrices.shape == (3, number, length)
    torch.testing.assert_close(matrices.sum(-1), torch.ones(3, number))
    for sequence, found, matrix in zip(sequences, tokens, matrices):
        expected, expected_matrix = reference.compress(sequence, number, *compressor.parameters())
        torch.testing.assert_close(matrix.double(), expected_matrix, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("length", "number"), [*LENGTHS, (576, 58), (2928, 293), (576, 575)])
def test_pooling_takes_the_windows_of_the_reference(length, number):
    (sequence,) = make_sequences(1, length, width=3)
    torch.testing.assert_close(pool_sequence(sequence[None], number)[0], reference.pool(sequence, number))


@pytest.mark.parametrize("width", [1, 2, 7, 20])
def test_positions_are_sines_and_cosines_in_turn(width):
    found = sinusoidal_positions(300, width, torch.device("cpu"))
    torch.testing.assert_close(found.double(), reference.positions(300, width), atol=5e-5, rtol=0)


def test_it_begins_as_a_pooling_by_one_projection():
    """W_q = W_k of variance 1 / d_c, ω = 1; on wide features that are not alike, each row of P is on its window."""
    compressor = make_compressor(width=2048, key_width=256, trained=False)
    assert torch.equal(compressor.w_q, compressor.w_k)
    assert torch.equal(compressor.omega, torch.ones(256))
    assert float(compressor.w_q.detach().std()) == pytest.approx(256**-0.5, rel=0.01)
    with torch.no_grad():
        _, (matrix,) = compress(compressor, make_sequences(1, 96, width=2048), 16)
    window = 6 * torch.arange(16)[:, None] + torch.arange(3)
    assert float(matrix.gather(1, window).sum(1).min()) > 0.99


@torch.no_grad()
def test_a_batch_gives_each_sequence_what_it_gets_alone():
    compressor, sequences = make_compressor(), make_sequences(5, 30)
    tokens, matrices = compress(compressor, sequences, 7)
    for index in range(5):
        alone, matrix = compress(compressor, sequences[index : index + 1], 7)
        torch.testing.assert_close(tokens[index : index + 1], alone)
        torch.testing.assert_close(matrices[index : index + 1], matrix)


@torch.no_grad()
@pytest.mark.parametrize("trained", [False, True])
def test_bf16_follows_fp32(trained):
    compressor = make_compressor(width=64, key_width=16, trained=trained, dtype=torch.bfloat16)
    sequences = 0.3 * make_sequences(2, 40, width=64, dtype=torch.bfloat16)
    tokens, matrices = compress(compressor, sequences, 8)
    expected, expected_matrices = compress(compressor.float(), sequences.float(), 8)
    assert tokens.dtype == torch.bfloat16 and matrices.dtype == torch.float32
    torch.testing.assert_close(matrices.sum(-1), torch.ones(2, 8))
    torch.testing.assert_close(matrices, expected_matrices, atol=0.05, rtol=0.05)
    torch.testing.assert_close(tokens.float(), expected, atol=0.05, rtol=0.05)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 0.3), (torch.bfloat16, 1.0), (torch.float16, 16.0)])
def test_scores_are_as_fine_as_float32_has_them(dtype, scale):
    """bfloat16 would round them by a tenth and more; those of long tokens are beyond float16's range."""
    compressor = make_compressor(width=1024, key_width=256, trained=False, dtype=dtype)
    sequences = scale * make_sequences(2, 48, width=1024, dtype=dtype)
    tokens, matrices = compress(compressor, sequences, 8)
    _, expected = compress(compressor.float(), sequences.float(), 8)
    assert tokens.isfinite().all()
    torch.testing.assert_close(matrices, expected, atol=0.015, rtol=0)


def test_every_parameter_gets_a_gradient():
    compressor = make_compressor(trained=False)
    tokens, matrices = compress(compressor, make_sequences(2, 24), 5)
    (tokens.square().mean() + matrices.square().mean()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in compressor.parameters())


# The model around it


@pytest.fixture(scope="module", params=[write_llava, write_llava_next], ids=["llava", "llava_next"])
def folders(request, tmp_path_factory):
    """A base and what it is converted to."""
    folder = tmp_path_factory.mktemp("metacompress")
    base = request.param(folder / "base", dtype=torch.float32)
    return base, convert(base, folder / "out", "metacompress", settings={"key_width": 16})


def test_a_converted_model_begins_as_the_method_says(folders):
    compressor = AutoModelForImageTextToText.from_pretrained(folders[1]).model.compressor
    assert torch.equal(compressor.w_q, compressor.w_k)
    assert torch.equal(compressor.omega, torch.ones(16))
    assert float(compressor.w_q.detach().std()) == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText])
def test_loading_leaves_trained_weights_as_they_are(folders, auto_class, tmp_path):
    model = auto_class.from_pretrained(folders[1])
    compressor = getattr(model, "model", model).compressor
    for parameter in compressor.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    again, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found = getattr(again, "model", again).compressor
    assert not torch.equal(found.w_q, found.w_k)
    for name, parameter in compressor.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name


def test_a_base_loaded_into_the_class_gets_a_compressor_that_begins_as_the_method_says(folders):
    base, out = folders
    model_class = type(AutoModelForImageTextToText.from_pretrained(out))
    model, info = model_class.from_pretrained(
        base, config=model_class.config_class.from_pretrained(out), output_loading_info=True
    )
    assert {name.rpartition(".")[2] for name in info["missing_keys"]} == {"w_q", "w_k", "omega"}
    compressor = model.model.compressor
    assert torch.equal(compressor.w_q, compressor.w_k)
    assert torch.equal(compressor.omega, torch.ones(16))
