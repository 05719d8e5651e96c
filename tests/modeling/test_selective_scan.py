"""The scan against a literal loop, the block against Transformers' Mamba, and what both promise."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from foveate.modeling.layers.selective_scan import SelectiveStateSpace, choose_num_chunks, selective_scan


BATCH, WIDTH, STATE = 2, 6, 4
CHUNKS = [1, 2, 3, 5, 11, 100]


def reference(inputs, steps, decay_rates, input_weights, output_weights):
    state = inputs.new_zeros(len(inputs), *decay_rates.shape)
    outputs = []
    for t in range(inputs.shape[1]):
        decay = (steps[:, t, :, None] * decay_rates).exp()
        state = decay * state + (steps[:, t] * inputs[:, t])[..., None] * input_weights[:, t, None]
        outputs.append((state * output_weights[:, t, None]).sum(-1))
    return torch.stack(outputs, 1)


def arguments(length=11, dtype=torch.float32):
    """Of the scan, with decays from nearly 0 to nearly 1."""
    generator = torch.Generator().manual_seed(length)
    inputs, steps = torch.randn(2, BATCH, length, WIDTH, generator=generator, dtype=dtype)
    weights = torch.randn(2, BATCH, length, STATE, generator=generator, dtype=dtype)
    rates = -0.05 - torch.rand(WIDTH, STATE, generator=generator, dtype=dtype)
    return [inputs, steps.exp(), rates, *weights]


def gradients(function, tensors, grad_outputs):
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = function(*tensors)
    return outputs.detach(), torch.autograd.grad(outputs, tensors, grad_outputs.to(outputs))


@pytest.mark.parametrize("length", [1, 2, 10, 11])
@pytest.mark.parametrize("num_chunks", [None, *CHUNKS])
def test_it_computes_what_the_literal_loop_computes(length, num_chunks):
    tensors = arguments(length)
    expected = reference(*(tensor.double() for tensor in tensors)).float()
    with torch.no_grad():
        torch.testing.assert_close(selective_scan(*tensors, num_chunks), expected, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(selective_scan(*tensors, num_chunks), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 11, 23])
@pytest.mark.parametrize("num_chunks", [None, *CHUNKS])
def test_its_gradients_are_those_of_the_literal_loop(length, num_chunks):
    tensors = arguments(length)
    grad_outputs = torch.randn(BATCH, length, WIDTH, generator=torch.Generator().manual_seed(0))
    outputs, found = gradients(lambda *t: selective_scan(*t, num_chunks), tensors, grad_outputs)
    values, expected = gradients(reference, [tensor.double() for tensor in tensors], grad_outputs)
    torch.testing.assert_close(outputs, values.float(), atol=1e-5, rtol=1e-5)
    for gradient, right in zip(found, expected):
        torch.testing.assert_close(gradient, right.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_half_precision_is_computed_in_float32_and_gets_its_gradients_back_in_kind(num_chunks):
    tensors = [tensor.bfloat16() for tensor in arguments()]
    grad_outputs = torch.ones(BATCH, 11, WIDTH)
    outputs, found = gradients(lambda *t: selective_scan(*t, num_chunks), tensors, grad_outputs)
    values, expected = gradients(reference, [tensor.double() for tensor in tensors], grad_outputs)
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs, values.float(), atol=1e-5, rtol=1e-5)
    for gradient, right in zip(found, expected):
        torch.testing.assert_close(gradient, right.bfloat16(), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("rate", [1e-6, 1e3, 1e6])
@pytest.mark.parametrize("num_chunks", [1, 4])
def test_any_step_is_safe(rate, num_chunks):
    inputs, steps, _, *weights = arguments()
    tensors = [inputs, steps, torch.full((WIDTH, STATE), -rate), *weights]
    grad_outputs = torch.ones_like(inputs)
    outputs, found = gradients(lambda *t: selective_scan(*t, num_chunks), tensors, grad_outputs)
    values, expected = gradients(reference, [tensor.double() for tensor in tensors], grad_outputs)
    torch.testing.assert_close(outputs, values.float(), atol=1e-5, rtol=1e-5)
    for gradient, right in zip(found, expected):
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient, right.float(), atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("num_chunks", CHUNKS)
def test_what_comes_after_changes_nothing_before_it(num_chunks):
    tensors = arguments(11)
    changed = [tensor.clone() for tensor in tensors]
    for index in (0, 1, 3, 4):
        changed[index][:, 7:] = 1.0
    before, after = (selective_scan(*those, num_chunks) for those in (tensors, changed))
    torch.testing.assert_close(after[:, :7], before[:, :7], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(after[:, 7:], before[:, 7:])


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("num_chunks", [1, 5])
def test_the_states_of_all_positions_are_never_there_together(num_chunks):
    tensors = arguments(100)
    with torch.no_grad(), LargestTensor() as largest:
        selective_scan(*tensors, num_chunks)
    assert largest.elements == tensors[0].numel()
    tensors = [tensor.requires_grad_() for tensor in tensors]
    with LargestTensor() as largest:
        selective_scan(*tensors, num_chunks).sum().backward()
    assert largest.elements < 100 * BATCH * WIDTH * STATE / 3


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_its_output_may_be_changed_in_place(batch, num_chunks):
    inputs, steps, rates, *weights = arguments(6)
    inputs, steps, *weights = (tensor[:batch] for tensor in (inputs, steps, *weights))
    outputs = selective_scan(inputs.requires_grad_(), steps, rates, *weights, num_chunks)
    outputs += 1
    outputs.sum().backward()
    assert inputs.grad.isfinite().all()


def test_chunks_are_for_steps_of_little_work(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert choose_num_chunks(torch.empty(2, 1153, 1024, device="meta"), 16) == 34
    assert choose_num_chunks(torch.empty(2, 1153, 8), 16) == 34
    assert choose_num_chunks(torch.empty(2, 4, 1024), 16) == 1


@pytest.fixture(scope="module", params=[(32, 4), (40, 16)], ids=["rank 2", "rank 3, not a multiple"])
def mixer(request):
    torch.manual_seed(0)
    width, state_size = request.param
    config = MambaConfig(hidden_size=width, state_size=state_size, expand=1, conv_kernel=4, num_hidden_layers=1)
    mixer = MambaMixer(config, 0).eval()
    with torch.no_grad():
        # Where nothing is 0 or alike, on any version.
        mixer.A_log.copy_(torch.randn_like(mixer.A_log))
        mixer.D.copy_(torch.randn_like(mixer.D))
        mixer.dt_proj.bias.copy_(torch.randn_like(mixer.dt_proj.bias))
    return mixer


def block_like(mixer):
    config = mixer.config
    block = SelectiveStateSpace(config.hidden_size, config.state_size, config.expand, config.conv_kernel)
    block.load_state_dict(mixer.state_dict())
    return block


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, 13])
def test_the_block_is_transformers_mamba(mixer, length):
    tokens = torch.randn(2, length, mixer.hidden_size, generator=torch.Generator().manual_seed(1))
    block = block_like(mixer)
    torch.testing.assert_close(block(tokens), mixer(tokens), atol=1e-5, rtol=1e-5)
    mixer.load_state_dict(block.state_dict())  # and the other way


def test_the_blocks_gradients_are_those_of_transformers_mamba(mixer):
    tokens = torch.randn(2, 13, mixer.hidden_size, generator=torch.Generator().manual_seed(1))
    block = block_like(mixer)
    expected = dict(zip(dict(mixer.named_parameters()), torch.autograd.grad(mixer(tokens).sum(), mixer.parameters())))
    block(tokens).sum().backward()
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


def test_the_block_trains_under_checkpointing_with_the_same_gradients(mixer):
    tokens = torch.randn(2, 13, mixer.hidden_size, generator=torch.Generator().manual_seed(1))
    block = block_like(mixer)
    plain = torch.autograd.grad(block(tokens).square().sum(), block.parameters())
    outputs = checkpoint(block, tokens, use_reentrant=False)
    again = torch.autograd.grad(outputs.square().sum(), block.parameters())
    for first, second in zip(plain, again):
        assert torch.equal(first, second)


def test_the_block_runs_in_bfloat16_and_under_autocast(mixer):
    tokens = torch.randn(2, 13, mixer.hidden_size, generator=torch.Generator().manual_seed(1))
    block = block_like(mixer)
    expected = block(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = block(tokens)
    half = block.bfloat16()(tokens.bfloat16())
    half.sum().backward()
    assert (mixed.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())
    scale = expected.std().item()
    torch.testing.assert_close(mixed, expected, atol=0.1 * scale, rtol=0.1)
    torch.testing.assert_close(half.float(), expected, atol=0.1 * scale, rtol=0.1)


def test_a_block_begins_as_mamba_does_and_as_nothing():
    torch.manual_seed(0)
    block = SelectiveStateSpace(32, state_size=4, expand=2)
    for parameter in block.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    block.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in block.parameters())
    assert torch.equal(block(torch.randn(2, 5, 32)), torch.zeros(2, 5, 32))
    torch.testing.assert_close(block.A_log.exp(), torch.arange(1.0, 5.0).expand(64, 4))
    assert torch.equal(block.D, torch.ones(64))
    steps = torch.nn.functional.softplus(block.dt_proj.bias)
    assert steps.min() >= 0.00099
    assert steps.max() <= 0.101
    assert steps.max() > 10 * steps.min()
    assert 0.5 < block.dt_proj.weight.abs().max() / 2**-0.5 <= 1
    block(torch.randn(2, 5, 32)).sum().backward()
    assert block.out_proj.weight.grad.abs().sum() > 0  # or it would never begin


def test_what_loading_has_read_is_left_as_it_is():
    block = SelectiveStateSpace(32)
    for parameter in (block.A_log, block.dt_proj.bias):
        torch.nn.init.constant_(parameter, 7.0)
        parameter._is_hf_initialized = True
    block.reset_parameters()
    assert (block.A_log == 7).all()
    assert (block.dt_proj.bias == 7).all()
