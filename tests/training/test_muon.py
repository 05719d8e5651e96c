"""Muon beside AdamW is the two optimizers of torch, one after the other, and goes on where it was broken off."""

import copy

import pytest
import torch
from torch import nn

from foveate.training.muon import MuonWithAdamW


class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 3)


def make():
    torch.manual_seed(0)
    return Layered()


def groups_of(model):
    inside = [(f"model.{name}", p) for name, p in model.named_parameters() if name.startswith("layers")]
    return [
        {"named_params": inside, "lr": 0.01},
        {"named_params": [(f"model.{name}", p) for name, p in model.head.named_parameters(prefix="head")], "lr": 0.1},
    ]


def step(model, *optimizers):
    model.zero_grad()
    hidden = torch.linspace(-1, 1, 24).view(4, 6)
    for layer in model.layers:
        hidden = layer(hidden).tanh()
    model.head(hidden).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_it_is_muon_and_adamw():
    ours, theirs = make(), make()
    both = MuonWithAdamW(groups_of(ours), weight_decay=0.1)
    matrices = [layer.weight for layer in theirs.layers]
    biases = [layer.bias for layer in theirs.layers]
    adamw = torch.optim.AdamW(
        [{"params": biases, "lr": 0.01}, {"params": list(theirs.head.parameters()), "lr": 0.1}],
        betas=(0.9, 0.98),
        weight_decay=0.1,
    )
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        step(ours, both)
        step(theirs, adamw, muon)
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, other)


def test_a_schedule_changes_the_rates_of_both():
    model = make()
    both = MuonWithAdamW(groups_of(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(both, lambda number: 0.0 if number else 1.0)
    step(model, both)
    schedule.step()
    before = copy.deepcopy(model.state_dict())
    step(model, both)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_it_goes_on_where_it_was_broken_off():
    whole, broken = make(), make()
    first = MuonWithAdamW(groups_of(whole))
    step(whole, first)
    broken.load_state_dict(copy.deepcopy(whole.state_dict()))
    second = MuonWithAdamW(groups_of(broken))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    step(whole, first)
    step(broken, second)
    for mine, other in zip(whole.parameters(), broken.parameters()):
        assert torch.equal(mine, other)


def test_it_takes_no_closure():
    with pytest.raises(ValueError, match="without a closure"):
        MuonWithAdamW(groups_of(make())).step(lambda: 0.0)
