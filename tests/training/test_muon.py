"""Muon beside AdamW is the two optimizers of torch, one after the other, and goes on where it was broken off."""

import copy

import pytest
import torch
from torch import nn

from foveate.training import muon
from foveate.training.muon import Muon, MuonWithAdamW


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


@pytest.fixture
def shapes():
    return (24, 40), (40, 24), (16, 16)


def steps_of(make_optimizer, shapes, number=4):
    """Matrices after some steps along gradients that are the same each time."""
    random = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape, generator=random)) for shape in shapes]
    optimizer = make_optimizer(matrices)
    for _ in range(number):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=random)
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


def torchs(matrices):
    return torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


def ours(matrices):
    return Muon(matrices, lr=0.02, weight_decay=0.1)


def test_where_bfloat16_is_fast_muon_is_torchs_to_the_bit(shapes, monkeypatch):
    monkeypatch.setattr(muon, "fast_dtype", lambda device: torch.bfloat16)
    assert all(map(torch.equal, steps_of(ours, shapes), steps_of(torchs, shapes)))


def test_elsewhere_muon_multiplies_nothing_in_16_bits(shapes, monkeypatch):
    """A GPU that prefers float16 as well: its range is too small for the iteration."""
    expected = steps_of(torchs, shapes)
    multiplied, addmm = set(), torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kw: multiplied.add(args[0].dtype) or addmm(*args, **kw))
    for dtype in (torch.float32, torch.float16):
        monkeypatch.setattr(muon, "fast_dtype", lambda device, dtype=dtype: dtype)
        for mine, other in zip(steps_of(ours, shapes), expected):
            torch.testing.assert_close(mine, other, atol=5e-3, rtol=0)  # the rate is 0.02
    assert multiplied == {torch.float32}


def test_in_float32_singular_values_become_about_1(monkeypatch):
    monkeypatch.setattr(muon, "fast_dtype", lambda device: torch.float32)
    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(1))
    found = muon.orthogonalize(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = left.T @ found @ right.T  # the same singular vectors: nothing off the diagonal
    torch.testing.assert_close(values, torch.diag(values.diag()), atol=1e-4, rtol=0)
    assert values.diag().min() > 0.6 and values.diag().max() < 1.3


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
