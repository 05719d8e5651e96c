"""The selective state space of Mamba (Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"), in
plain PyTorch: the scan (Section 3.2) and the block around it (Figure 3).

The sequence is cut into chunks that run side by side, so that Python loops over the positions of one chunk only. A
first pass finds the state that each chunk ends with if it starts from nothing; handed on from chunk to chunk, these
give every chunk its true start; a second pass computes the outputs. Only decays are ever multiplied, never divided by,
so any step size is safe.

B: sequences, L: positions, D: channels, N: size of a channel's state, K: chunks, T: positions of a chunk. States are
(·, N, D): the long dimension last, as vector instructions want it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from foveate.modeling.compatibility import fused_selective_scan


def selective_scan(
    inputs: torch.Tensor,
    steps: torch.Tensor,
    decay_rates: torch.Tensor,
    input_weights: torch.Tensor,
    output_weights: torch.Tensor,
    num_chunks: int | None = None,
) -> torch.Tensor:
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_t, y_t = C_t · h_t, from h_0 = 0.

    Args:
        inputs: x, (B, L, D).
        steps: Δ, (B, L, D), not negative.
        decay_rates: A, (D, N), negative.
        input_weights: B, (B, L, N).
        output_weights: C, (B, L, N).
        num_chunks: K, which changes the speed alone; `None`: what suits shape and device, or the fused kernel of
            `mamba_ssm` where that is installed.

    Returns:
        y, (B, L, D) float32, as the state is.
    """
    tensors = (inputs, steps, decay_rates, input_weights, output_weights)
    if num_chunks is None and inputs.is_cuda and (fused_scan := fused_selective_scan()) is not None:
        x, delta, a, b, c = (tensor.float() for tensor in tensors)
        return fused_scan(x.mT, delta.mT, a, b.mT, c.mT).mT
    if num_chunks is None:
        num_chunks = choose_num_chunks(inputs, decay_rates.shape[1])
    # Chunks of one length, none of them all padding.
    length = -(-inputs.shape[1] // num_chunks)
    num_chunks = -(-inputs.shape[1] // length)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return SelectiveScan.apply(*tensors, num_chunks)
    return _scan(*tensors, num_chunks)[0]


def choose_num_chunks(inputs: torch.Tensor, state_size: int) -> int:
    """K for inputs (B, L, D).

    Chunks cost a second pass. On a CPU they pay only where a step is so little work that calls from Python take most of
    the time, or some threads have none; measured: at fewer than 2^14 elements of state.
    """
    batch, length, width = inputs.shape
    if inputs.device.type == "cpu" and batch * width * state_size >= 2**14 * torch.get_num_threads():
        return 1
    return round(length**0.5)


class SelectiveScan(torch.autograd.Function):
    """`selective_scan` with a backward that keeps no states but a few; the last argument is K."""

    @staticmethod
    def forward(ctx, inputs, steps, decay_rates, input_weights, output_weights, num_chunks):
        tensors = (inputs, steps, decay_rates, input_weights, output_weights)
        outputs, snapshots = _scan(*tensors, num_chunks, keep_snapshots=True)
        ctx.save_for_backward(*tensors, snapshots)
        ctx.num_chunks = num_chunks
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs):
        *tensors, snapshots = ctx.saved_tensors
        grads = _scan_backward(grad_outputs, *tensors, snapshots, ctx.num_chunks)
        return *(grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors)), None


def _scan(
    inputs: torch.Tensor,
    steps: torch.Tensor,
    decay_rates: torch.Tensor,
    input_weights: torch.Tensor,
    output_weights: torch.Tensor,
    num_chunks: int,
    keep_snapshots: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The outputs, (B, L, D), and the states before every √T-th position, (snapshots, K·B, N, D)."""
    delta, driven, b, c = (_cut(tensor, num_chunks) for tensor in (steps, inputs, input_weights, output_weights))
    driven *= delta
    exponents = _exponents(decay_rates)
    state = delta.new_zeros(delta.shape[1], *exponents.shape)
    decay = torch.empty_like(state)
    if num_chunks > 1:
        for delta_t, driven_t, b_t in zip(delta, driven, b):
            state.mul_(_decay(delta_t, exponents, decay)).addcmul_(b_t[..., None], driven_t[:, None])
        state = _hand_over(state, _decay(delta.sum(0), exponents, decay), num_chunks)
    interval = _snapshot_interval(len(delta))
    snapshots = state.new_empty(-(-len(delta) // interval), *state.shape) if keep_snapshots else None
    outputs = torch.empty_like(driven)
    for t, (delta_t, driven_t, b_t, c_t, output) in enumerate(zip(delta, driven, b, c, outputs)):
        if snapshots is not None and t % interval == 0:
            snapshots[t // interval] = state
        state.mul_(_decay(delta_t, exponents, decay)).addcmul_(b_t[..., None], driven_t[:, None])
        torch.bmm(c_t[:, None], state, out=output[:, None])
    return _join(outputs, num_chunks, inputs.shape[1]), snapshots


def _scan_backward(
    grad_outputs: torch.Tensor,
    inputs: torch.Tensor,
    steps: torch.Tensor,
    decay_rates: torch.Tensor,
    input_weights: torch.Tensor,
    output_weights: torch.Tensor,
    snapshots: torch.Tensor,
    num_chunks: int,
) -> list[torch.Tensor]:
    """The gradients of the five inputs in float32.

    g_t, the gradient of h_t, is C_t dy_t + exp(Δ_{t+1} A) g_{t+1}: the same recurrence from the end. What a position
    hands back, exp(Δ_t A) g_t, is `carry`. States are run again from one snapshot at a time.
    """
    sequences = (steps, inputs, input_weights, output_weights, grad_outputs)
    delta, x, b, c, grad_y = (_cut(tensor, num_chunks) for tensor in sequences)
    driven = x * delta
    exponents, rates = _exponents(decay_rates), decay_rates.float().T.contiguous()
    carry = torch.zeros_like(snapshots[0])
    decay, product = torch.empty_like(carry), torch.empty_like(carry)
    if num_chunks > 1:
        for t in reversed(range(len(delta))):
            carry.addcmul_(c[t, ..., None], grad_y[t, :, None]).mul_(_decay(delta[t], exponents, decay))
        carry = _hand_over(carry, _decay(delta.sum(0), exponents, decay), num_chunks, backwards=True)
    grad_delta, grad_driven, grad_b, grad_c = (torch.empty_like(tensor) for tensor in (delta, driven, b, c))
    grad_rates = torch.zeros_like(carry)
    interval = _snapshot_interval(len(delta))
    states = carry.new_empty(interval + 1, *carry.shape)
    for number in reversed(range(len(snapshots))):
        first, end = number * interval, min((number + 1) * interval, len(delta))
        states[0] = snapshots[number]
        for t in range(first, end):
            before, after = states[t - first], states[t - first + 1]
            torch.mul(before, _decay(delta[t], exponents, decay), out=after)
            after.addcmul_(b[t, ..., None], driven[t, :, None])
        for t in reversed(range(first, end)):
            before, after = states[t - first], states[t - first + 1]
            torch.bmm(after, grad_y[t, ..., None], out=grad_c[t, ..., None])
            grad_state = carry.addcmul_(c[t, ..., None], grad_y[t, :, None])
            torch.bmm(grad_state, driven[t, ..., None], out=grad_b[t, ..., None])
            torch.bmm(b[t, :, None], grad_state, out=grad_driven[t, :, None])
            carry.mul_(_decay(delta[t], exponents, decay))
            torch.mul(carry, before, out=product)  # the gradient of Δ_t A
            grad_rates.addcmul_(product, delta[t, :, None])
            torch.sum(product.mul_(rates), 1, out=grad_delta[t])
    grad_delta.addcmul_(grad_driven, x)
    found = (grad_driven.mul_(delta), grad_delta, grad_b, grad_c)
    grad_x, grad_delta, grad_b, grad_c = (_join(grad, num_chunks, inputs.shape[1]) for grad in found)
    return [grad_x, grad_delta, grad_rates.sum(0).T, grad_b, grad_c]


def _cut(sequence: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """(B, L, width) → (T, K·B, width) float32, padded with zeros, through which a state passes unchanged. A step of all
    chunks lies together in memory."""
    padding = -sequence.shape[1] % num_chunks
    if padding:
        sequence = nn.functional.pad(sequence, (0, 0, 0, padding))
    cut = sequence.unflatten(1, (num_chunks, -1)).permute(2, 1, 0, 3)
    return torch.empty(cut.shape, dtype=torch.float32, device=cut.device).copy_(cut).flatten(1, 2)


def _join(cut: torch.Tensor, num_chunks: int, length: int) -> torch.Tensor:
    """The reverse of `_cut`."""
    joined = cut.unflatten(1, (num_chunks, -1)).permute(2, 1, 0, 3).flatten(1, 2)[:, :length]
    return joined.clone(memory_format=torch.contiguous_format)  # a view from a Function could not be changed in place


def _exponents(decay_rates: torch.Tensor) -> torch.Tensor:
    """(D, N) → (N, D), for powers of 2, which on a CPU are three times as fast as `exp`, thirty times in underflow."""
    return (decay_rates.float() * math.log2(math.e)).T.contiguous()


def _decay(delta: torch.Tensor, exponents: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """exp(Δ A), (K·B, N, D), into `out`, for Δ (K·B, D)."""
    return torch.mul(delta[:, None], exponents, out=out).exp2_()


def _hand_over(own: torch.Tensor, decay: torch.Tensor, num_chunks: int, backwards: bool = False) -> torch.Tensor:
    """What each chunk receives from those before it, or behind it.

    Args:
        own: (K·B, N, D), what each chunk ends with if it receives nothing.
        decay: (K·B, N, D), the part of what it receives that comes through.
    """
    own, decay = own.unflatten(0, (num_chunks, -1)), decay.unflatten(0, (num_chunks, -1))
    received = torch.zeros_like(own)
    for source, target in pairwise(reversed(range(num_chunks)) if backwards else range(num_chunks)):
        torch.addcmul(own[source], decay[source], received[source], out=received[target])
    return received.flatten(0, 1)


def _snapshot_interval(length: int) -> int:
    """With √T snapshots, and √T states run again at a time, both are few."""
    return math.isqrt(length - 1) + 1


class SelectiveStateSpace(nn.Module):
    """Mamba's block, without a cache; parameters as in Transformers' `MambaMixer`.

    Args:
        width: of the tokens.
        state_size: N.
        expand: D is this many times the width.
        conv_kernel: positions that the causal convolution sees.
    """

    def __init__(self, width: int, state_size: int = 16, expand: int = 1, conv_kernel: int = 4):
        super().__init__()
        channels, self.state_size, self.rank = expand * width, state_size, math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * channels, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, conv_kernel, groups=channels, padding=conv_kernel - 1)
        self.x_proj = nn.Linear(channels, self.rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(self.rank, channels)
        self.A_log = nn.Parameter(torch.empty(channels, state_size))
        self.D = nn.Parameter(torch.empty(channels))
        self.out_proj = nn.Linear(channels, width, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba's initialisation (Section 3.6), but W_out = 0: beside a residual the block begins as nothing."""
        for module in (self.in_proj, self.conv1d, self.x_proj):
            module.reset_parameters()
        nn.init.zeros_(self.out_proj.weight)
        nn.init.ones_(self.D)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        rates = torch.arange(1, self.state_size + 1, dtype=torch.float32, device=self.A_log.device)
        steps = torch.empty(self.dt_proj.bias.shape, dtype=torch.float32, device=self.dt_proj.bias.device)
        steps.uniform_(math.log(0.001), math.log(0.1)).exp_()
        # The second is the inverse of softplus.
        values = {self.A_log: rates.log(), self.dt_proj.bias: steps + (-torch.expm1(-steps)).log()}
        for parameter, value in values.items():
            if not getattr(parameter, "_is_hf_initialized", False):  # loading leaves what it has read as it is
                parameter.copy_(value.expand_as(parameter))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, L, width) → (B, L, width); each token sees itself and those before it."""
        x, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        x = nn.functional.silu(self.conv1d(x.mT)[..., : hidden_states.shape[1]].mT)
        steps, input_weights, output_weights = self.x_proj(x).split([self.rank, *[self.state_size] * 2], dim=-1)
        steps = nn.functional.softplus(self.dt_proj(steps).float())
        scanned = selective_scan(x, steps, -self.A_log.float().exp(), input_weights, output_weights)
        gated = (scanned + self.D.float() * x) * nn.functional.silu(gate)
        return self.out_proj(gated.to(x.dtype)).to(hidden_states.dtype)
