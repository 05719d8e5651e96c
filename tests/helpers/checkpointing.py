"""Gradient checkpointing by the name that the installed Transformers gives it."""

from torch import nn

from foveate.modeling.compatibility import CHECKPOINTING


def checkpoint_activations(model: nn.Module, enabled: bool = True) -> None:
    """Turns gradient checkpointing on or off."""
    if enabled:
        getattr(model, f"{CHECKPOINTING}_enable")(**{f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}})
    else:
        getattr(model, f"{CHECKPOINTING}_disable")()
