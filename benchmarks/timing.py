"""What the benchmarks share: the shapes of CLIP ViT-L/14-336, a round-robin, and the options of the commands.

Weights are random: how long a product takes doesn't depend on what is multiplied.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch
from accelerate import init_empty_weights
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.utils.benchmark import timer
from transformers import CLIPTextConfig, CLIPVisionConfig

from foveate.errors import FoveateError
from foveate.modeling.core.precision import dtype_name


_HEADROOM = 1.1  # activations and caches beside the weights
_NUM_VALUES = 1_000_003  # random values that weights repeat; a prime, so that no two rows are alike
Measurement = TypeVar("Measurement")


@dataclass(frozen=True)
class Shapes:
    """Sizes of the vision tower and of the text encoder; the defaults are CLIP ViT-L/14-336."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_length: int = 77
    projection: int = 768

    @property
    def vision_config(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
            projection_dim=self.projection,
        )

    @property
    def text_config(self) -> CLIPTextConfig:
        return CLIPTextConfig(
            hidden_size=self.text_width,
            intermediate_size=4 * self.text_width,
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.text_heads,
            max_position_embeddings=self.text_length,
            projection_dim=self.projection,
        )


def random_model(model_class: type, config: Any, dtype: torch.dtype) -> Any:
    """A model of random weights. Values repeat, as billions of them would take longer to draw than to run.

    Raises:
        FoveateError: a model for which there is not memory enough.
    """
    with init_empty_weights(include_buffers=False):
        model = model_class(config)
    num_bytes = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    available = psutil.virtual_memory().available
    if _HEADROOM * num_bytes > available:
        raise FoveateError(
            f"A model of {num_bytes / 1e9:.1f} GB and what it computes don't fit in the {available / 1e9:.1f} GB of "
            "memory that are free: run fewer layers of the language model (--layers)."
        )
    values = 0.02 * torch.randn(_NUM_VALUES)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            weights = torch.empty(parameter.shape, dtype=dtype)
            for piece in weights.view(-1).split(_NUM_VALUES):
                piece.copy_(values[: len(piece)])
            setattr(module, name, nn.Parameter(weights, requires_grad=False))
    model.tie_weights()
    return model.eval()


def sharing(model: Any, model_class: type, config: Any) -> Any:
    """Another model, made of the very modules of this one."""
    with init_empty_weights():
        other = model_class(config)
    for name, _ in list(other.model.named_children()):
        setattr(other.model, name, getattr(model.model, name))
    other.lm_head = model.lm_head
    return other.eval()


def timed(run: Callable[[], Any], now: Callable[[], float] = timer) -> Callable[[], float]:
    """A call that returns the milliseconds that `run` took by the clock `now`, which counts in seconds.

    The clock is PyTorch's, which waits for the device. Its `Timer` runs twice to warm up before every measurement,
    which would treble the time of rounds.
    """

    def measure() -> float:
        start = now()
        run()
        return 1000 * (now() - start)

    return measure


def measure_in_turns(
    parts: Mapping[str, Callable[[], Measurement]], repeats: int, progress: bool
) -> dict[str, list[Measurement]]:
    """Calls every part once a round, one after the other, so that what else the machine does falls on all of them.

    Returns:
        What each returned in `repeats` rounds, after one that warms up.
    """
    found: dict[str, list[Measurement]] = {name: [] for name in parts}
    for round_ in track(range(repeats + 1), "timing", console=Console(stderr=True), disable=not progress):
        for name, measure in parts.items():
            measurement = measure()
            if round_ > 0:
                found[name].append(measurement)
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median, "quartiles": [low, high]}


def conditions(batch_size: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """What was measured on what, for the result."""
    return {
        "batch_size": batch_size,
        "dtype": dtype_name(dtype),
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def describe(result: Mapping[str, Any]) -> str:
    """The conditions of a result in words."""
    return (
        f"Median of {result['repeats']} rounds, batch {result['batch_size']}, {result['dtype']}, {result['threads']} "
        f"thread(s), torch {result['torch']}."
    )


def command_parser(name: str, description: str | None, cpu_time: bool = True) -> argparse.ArgumentParser:
    """The options that every benchmark has; `name` is its module's, `cpu_time` says whether it can count that."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="auto: bfloat16 where this processor computes fast in it, else float32",
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds after a warm-up")
    parser.add_argument("--threads", type=int, help="torch's own choice if not said")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    if cpu_time:
        parser.add_argument("--cpu-time", action="store_true", help="count processor time: for a machine that is busy")
    return parser


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, str]:
    """The options, with `dtype` as torch has it (`None`: auto) and the threads set, and the command as it was given."""
    arguments = parser.parse_args()
    if min(arguments.batch_size, arguments.repeats) < 1:
        parser.error("--batch-size and --repeats have to be at least 1.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    return arguments, " ".join([parser.prog, *sys.argv[1:]])


def run_command(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> None:
    """Runs a benchmark as its options say, and prints what it found as JSON or as `show` does. What can't be measured
    is one sentence."""
    arguments, command = parse(parser)
    try:
        result = {**measure(arguments), "command": command}
    except FoveateError as error:
        parser.error(str(error))
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
