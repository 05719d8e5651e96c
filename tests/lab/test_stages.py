"""The lab's training loop: a run that was broken off goes on to the very weights of one that was not."""

import pytest
import torch
from torch import nn

from foveate.lab import stages
from foveate.lab.stages import Stage, fast_autocast, run_stage


class Net(nn.Module):
    """Has matrices inside layers (trained by Muon) and parameters outside (by AdamW)."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 1)

    def loss(self, batch):
        hidden = batch["x"]
        for layer in self.inner.layers:
            hidden = layer(hidden).tanh()
        loss = (self.head(hidden).float() - batch["x"].sum(1, keepdim=True)).square().mean()
        return loss, {"loss": loss.item()}


def batch_of(step: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(step))}


def run(folder, batches=batch_of, log=lambda _: None):
    torch.manual_seed(0)
    net = Net()
    stage = Stage("net", net, batches, net.loss, num_steps=12, learning_rate=1e-2, warmup_steps=2, save_every=5)
    run_stage(stage, folder, log)
    return net.state_dict()


def breaks_off(step):
    if step == 8:
        raise KeyError("power cut")
    return batch_of(step)


def test_a_run_that_was_broken_off_ends_as_one_that_was_not(tmp_path):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyError, match="power cut"):
        run(tmp_path / "broken", breaks_off)
    assert torch.load(tmp_path / "broken" / "net.pt", weights_only=True)["step"] == 5
    resumed = run(tmp_path / "broken")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_finished_stage_is_not_run_again(tmp_path):
    def never(step):
        raise AssertionError("no batch is needed")

    first = run(tmp_path)
    again = run(tmp_path, never)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matrices_are_multiplied_in_what_the_processor_is_fast_in(dtype, monkeypatch):
    monkeypatch.setattr(stages, "fast_dtype", lambda device: dtype if device == "cpu" else None)
    x = torch.ones(2, 2)
    with fast_autocast():
        assert (x @ x).dtype == dtype
    for said in (torch.bfloat16, torch.float32):
        with fast_autocast(said):
            assert (x @ x).dtype == said


@pytest.mark.parametrize(("before", "after"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_run_goes_on_in_the_dtype_that_it_began_in(before, after, tmp_path, monkeypatch):
    lines = []
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(stages, "fast_dtype", lambda device: getattr(torch, before))
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyError, match="power cut"):
        run(tmp_path / "broken", breaks_off, lines.append)
    monkeypatch.setattr(stages, "fast_dtype", lambda device: getattr(torch, after))  # another processor
    resumed = run(tmp_path / "broken", log=lines.append)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [line for line in lines if "computes in" in line] == [f"net: computes in {before}"] * 2
    (tmp_path / "other").mkdir()
    other = run(tmp_path / "other")
    assert not all(torch.equal(whole[name], other[name]) for name in whole), "the dtype makes a difference"


def test_a_state_that_does_not_say_its_dtype_is_bfloat16(tmp_path, monkeypatch):
    """All were, before states said it."""
    with pytest.raises(KeyError, match="power cut"):
        run(tmp_path, breaks_off)
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "dtype"}, tmp_path / "net.pt")
    monkeypatch.setattr(stages, "fast_dtype", lambda device: torch.float32)
    lines = []
    run(tmp_path, log=lines.append)
    assert "net: computes in bfloat16" in lines
