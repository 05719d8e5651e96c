"""Muon for the matrices inside layers, AdamW for all else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


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
            self.parts.append(torch.optim.Muon(of_muon, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
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
