"""Muon that is fast on any device; and Muon for the matrices inside layers, AdamW for all else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from foveate.modeling.core.precision import fast_dtype


class Muon(torch.optim.Muon):
    """Muon (https://kellerjordan.github.io/posts/muon/) with steps as long as AdamW's at the same rate.

    PyTorch's own orthogonalizes in bfloat16 on every device, which takes 150 times as long for a matrix of 1024 × 1024
    on a processor without instructions for it. This one does so in bfloat16 where the device computes fast in it, and
    then its steps are PyTorch's; else in float32.

    Args:
        params: matrices.
        options: as PyTorch's takes them, but for `adjust_lr_fn`.
    """

    def __init__(self, params: Any, **options: Any):
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("Muon takes one step at a time, without a closure.")
        for group in self.param_groups:
            momentum, rate = group["momentum"], float(group["lr"])
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                mean = state.setdefault("momentum_buffer", torch.zeros_like(matrix.grad))
                mean.lerp_(matrix.grad, 1 - momentum)
                update = matrix.grad.lerp(mean, momentum) if group["nesterov"] else mean
                update = orthogonalize(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update, alpha=-rate * 0.2 * max(matrix.shape) ** 0.5)


def orthogonalize(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], num_steps: int, epsilon: float
) -> torch.Tensor:
    """Newton and Schulz's iteration: a matrix of the same singular vectors, whose singular values are about 1.

    Args:
        matrix: (a, b).
        coefficients: of the iteration's polynomial, for the 1st, 3rd and 5th power of a singular value.
        num_steps: iterations.
        epsilon: what a smaller norm counts as.

    Returns:
        (a, b), bfloat16 where the device computes fast in it, else float32.
    """
    dtype = torch.bfloat16 if fast_dtype(matrix.device) == torch.bfloat16 else torch.float32
    first, third, fifth = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    found = (matrix.T if is_tall else matrix).to(dtype)
    found = found / found.norm().clamp(min=epsilon)
    for _ in range(num_steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), found, beta=first)
    return found.T if is_tall else found


class MuonWithAdamW(torch.optim.Optimizer):
    """What is a matrix and lies in a layer of the language model goes to Muon, whose steps are as long as AdamW's at
    the same rate; the rest to AdamW.

    Args:
        groups: dictionaries with `named_params`, (name, parameter) pairs, and `lr`.
        weight_decay: of both.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], weight_decay: float = 0.0):
        of_muon, of_adamw = [], []
        for group in groups:
            matrices: list[nn.Parameter] = []
            others: list[nn.Parameter] = []
            for name, parameter in group["named_params"]:
                (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
            of_muon += [{"params": matrices, "lr": group["lr"]}] if matrices else []
            of_adamw += [{"params": others, "lr": group["lr"]}] if others else []
        self.parts: list[torch.optim.Optimizer] = []
        if of_adamw:
            self.parts.append(torch.optim.AdamW(of_adamw, betas=(0.9, 0.98), weight_decay=weight_decay))
        if of_muon:
            self.parts.append(Muon(of_muon, weight_decay=weight_decay))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        # The very groups of the parts: whoever changes a rate changes theirs.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("Muon takes one step at a time, without a closure.")
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
