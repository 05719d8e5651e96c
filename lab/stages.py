"""The loop that every stage of the lab's training runs in: seeded, with a progress bar, resumable at any point."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader, Dataset

from foveate.modeling.core.precision import dtype_name, fast_dtype
from foveate.training.muon import Muon


@dataclass
class Stage:
    """One stage: what is trained, on which batches, for how long.

    Args:
        name: names the checkpoint file.
        module: everything that the stage trains or must remember, in one module.
        batches: a map from step number to batch; it must be a pure function of the step, so that resuming is exact.
        loss: batch → (loss, named numbers for the progress bar).
        num_steps, learning_rate, warmup_steps: the schedule is a linear warm-up, then a cosine to 2 % of the peak.
        evaluate: called now and then and at the end, returns named numbers for the log.
    """

    name: str
    module: nn.Module
    batches: Callable[..., dict[str, Any]]
    loss: Callable[[Any], tuple[torch.Tensor, dict[str, float]]]
    num_steps: int
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.02
    evaluate: Callable[[], dict[str, float]] | None = None
    evaluate_every: int = 400
    save_every: int = 100


class _Batches(Dataset):
    def __init__(self, make: Callable, num_steps: int):
        self.make, self.num_steps = make, num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int):
        return self.make(step)


def make_optimizers(module: nn.Module, learning_rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers (about twice as fast as AdamW here), AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            inside_layer = parameter.ndim == 2 and ".layers." in name
            (matrices if inside_layer else others).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    ]
    if matrices:
        optimizers.append(Muon(matrices, lr=learning_rate, weight_decay=weight_decay, ns_steps=5))
    return optimizers


def fast_autocast(dtype: torch.dtype | None = None) -> torch.autocast:
    """The context that the lab's models are trained and asked in on the CPU.

    Args:
        dtype: of matrix products, bfloat16 or float32; what the processor computes fast in, if `None`.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=(dtype or fast_dtype("cpu")) == torch.bfloat16)


def _rate(stage: Stage, step: int) -> float:
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    progress = (step - stage.warmup_steps) / max(1, stage.num_steps - stage.warmup_steps)
    return stage.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def run_stage(stage: Stage, folder: Path, log: Callable[[str], None] = print) -> float:
    """Runs (or goes on with, or skips when done) a stage; its state lies in `folder`/<name>.pt. Returns the seconds
    of training that it took over all its runs."""
    path = folder / f"{stage.name}.pt"
    optimizers = make_optimizers(stage.module, stage.learning_rate, stage.weight_decay)
    step, seconds, dtype = 0, 0.0, fast_dtype("cpu")
    if path.exists():
        state = torch.load(path, weights_only=True)
        stage.module.load_state_dict(state["module"])
        step, seconds = state["step"], state["seconds"]
        dtype = getattr(torch, state.get("dtype", "bfloat16"))  # as it began; older states don't say it
        if step >= stage.num_steps:
            return seconds
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        log(f"{stage.name}: going on at step {step}")
    log(f"{stage.name}: computes in {dtype_name(dtype)}")

    def save() -> None:
        done = step >= stage.num_steps
        state = {
            "module": stage.module.state_dict(),
            "optimizers": [] if done else [optimizer.state_dict() for optimizer in optimizers],
            "step": step,
            "seconds": seconds,
            "dtype": dtype_name(dtype),
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    steps: Iterable[int] = range(step, stage.num_steps)
    loader = DataLoader(_Batches(stage.batches, stage.num_steps), batch_size=None, sampler=steps, num_workers=1)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    numbers: dict[str, float] = {}
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task(stage.name, total=stage.num_steps, completed=step)
        last = time.monotonic()
        for batch in loader:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = _rate(stage, step)
            stage.module.train()
            with fast_autocast(dtype):
                loss, fresh = stage.loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(stage.module.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for name, value in fresh.items():
                numbers[name] = 0.95 * numbers.get(name, value) + 0.05 * value
            step += 1
            now = time.monotonic()
            seconds, last = seconds + now - last, now
            shown = " ".join(f"{name} {value:.3f}" for name, value in numbers.items())
            progress.update(task, completed=step, description=f"{stage.name} {shown}")
            if step % 50 == 0:
                log(f"{stage.name} step {step}/{stage.num_steps} {seconds:.0f} s {shown}")
            if step % stage.save_every == 0 or step == stage.num_steps:
                save()
            if stage.evaluate and (step % stage.evaluate_every == 0 or step == stage.num_steps):
                stage.module.eval()
                with torch.no_grad(), fast_autocast(dtype):
                    found = stage.evaluate()
                log(f"{stage.name} step {step} " + " ".join(f"{name} {value:.4f}" for name, value in found.items()))
                last = time.monotonic()
    return seconds
