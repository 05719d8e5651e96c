"""The lab's training loop: a run that was broken off goes on to the very weights of one that was not."""

import pytest
import torch
from torch import nn

from foveate.lab.stages import Stage, run_stage


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


def run(folder, batches=batch_of):
    torch.manual_seed(0)
    net = Net()
    stage = Stage("net", net, batches, net.loss, num_steps=12, learning_rate=1e-2, warmup_steps=2, save_every=5)
    run_stage(stage, folder, log=lambda _: None)
    return net.state_dict()


def test_a_run_that_was_broken_off_ends_as_one_that_was_not(tmp_path):
    def breaks_off(step):
        if step == 8:
            raise KeyError("power cut")
        return batch_of(step)

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
