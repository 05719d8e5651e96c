"""`python -m benchmarks.encoder`: what QG-VTC's vision encoder takes beside the stock one.

At the shapes of CLIP ViT-L/14-336 (LLaVA-1.5's tower), with random weights, in one process, where the two encoders take
turns. Each round gives three ratios of compressed time to stock time, next to the share of FLOPs that they should have:

- as run: LLaVA reads the output of the layer before the last, so the compressed encoder leaves out the last layer,
  which the stock tower runs all the same;
- without the last layer in either;
- with all layers in both, which is the setting of the paper's Eq. 6 and to be compared with its R.

R counts neither embeddings, class token nor recycling, and neither does it count the question's text encoder and MLP,
whose times stand beside. The shares of FLOPs have embeddings and class token as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.benchmark import timer
from transformers import CLIPTextModelWithProjection, CLIPVisionModel

from benchmarks.timing import (
    Shapes,
    command_parser,
    conditions,
    describe,
    measure_in_turns,
    run_command,
    spread,
    timed,
)
from foveate.configuration.configuration_llava_qgvtc import LlavaQGVTCConfig
from foveate.errors import bad_input
from foveate.modeling.compatibility import clip_layers
from foveate.modeling.core.precision import fast_dtype
from foveate.modeling.methods.qgvtc import QuestionProjector
from foveate.modeling.methods.qgvtc_account import encoder_ratio
from foveate.modeling.methods.qgvtc_algorithm import encode_crops, token_schedule


TARGET = 0.08  # largest distance of the measured ratio, all layers in both, from R, as a share of R
RATIOS = {
    "as_run": "as run, over all of the stock tower",
    "without_last_layer": "both without the last layer",
    "all_layers": "both with all layers, as in Eq. 6",
}


@dataclass(frozen=True)
class _LayerTokens:
    """How many tokens, the class token among them, go through the parts of an encoder layer: its account, of which the
    compression's own products are no part.

    Args:
        queries: through the query and output projections, and rows of the attention.
        keys: through the key and value projections, and columns of the attention.
        mlp: through the MLP.
    """

    queries: int
    keys: int
    mlp: int

    def flops(self, config: Any) -> int:
        """FLOPs of a layer of a tower of this config."""
        width = config.hidden_size
        projections = 2 * (self.queries + self.keys) * width * width
        attention = 2 * self.queries * self.keys * width
        return 2 * (projections + attention + 2 * self.mlp * width * config.intermediate_size)


class _LayerClock:
    """Tells how long each layer of a vision tower took: in the stock and in the compressed encoder a layer begins with
    its first norm."""

    def __init__(self, vision_tower: nn.Module, now: Callable[[], float]):
        self._now, self._stamps = now, [0.0]
        for layer in clip_layers(vision_tower):
            layer.layer_norm1.register_forward_pre_hook(lambda *_: self._stamps.append(now()))

    def time(self, run: Callable[[], Any]) -> list[float]:
        """Milliseconds of what comes before the layers, and of each of them."""
        self._stamps = [self._now()]
        run()
        stamps = torch.tensor([*self._stamps, self._now()], dtype=torch.float64)
        return (1000 * stamps.diff()).tolist()


class _Bench:
    """The modules and inputs, and each part as a function to be timed."""

    def __init__(self, config: LlavaQGVTCConfig, batch_size: int, dtype: torch.dtype, now: Callable[[], float]):
        torch.manual_seed(0)
        vision, question = config.vision_config, config.question_config
        self.settings, self.depth, self.now = config.compression, vision.num_hidden_layers, now
        self.tower = CLIPVisionModel._from_config(vision).to(dtype).eval()
        self.text_encoder = CLIPTextModelWithProjection._from_config(question).to(dtype).eval()
        self.question_mlp = QuestionProjector(question.hidden_size, vision.hidden_size).to(dtype)
        self.pixels = torch.randn(batch_size, 3, vision.image_size, vision.image_size, dtype=dtype)
        self.question = torch.randint(1, 1000, (batch_size, question.max_position_embeddings))
        self.pooled = torch.randn(batch_size, question.hidden_size, dtype=dtype)
        self.text_class = self.question_mlp(self.pooled)
        self.has_question = torch.ones(batch_size, dtype=torch.bool)

    def compress(self) -> None:
        """All layers, the last on the tokens that are left."""
        encode_crops(self.tower, self.pixels, self.settings, self.depth, self.text_class, self.has_question)

    def parts(self) -> dict[str, Callable[[], Any]]:
        clock = _LayerClock(self.tower, self.now)
        return {
            "stock": partial(clock.time, lambda: self.tower(self.pixels)),
            "compressed": partial(clock.time, self.compress),
            "text encoder": timed(lambda: self.text_encoder(self.question), self.now),
            "question MLP": timed(lambda: self.question_mlp(self.pooled), self.now),
        }


@torch.inference_mode()
def benchmark(
    shapes: Shapes | None = None,
    num_visual_tokens: int | None = None,
    layers: list[int] | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    repeats: int = 7,
    cpu_time: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Times both encoders on the CPU with torch's current number of threads.

    Args:
        shapes: CLIP ViT-L/14-336 if `None`.
        num_visual_tokens, layers: as in `QGVTCSettings`; `None`: the paper's.
        batch_size: images.
        dtype: of weights and activations; what the processor computes fast in, if `None`.
        repeats: rounds after a warm-up; in each every part runs once.
        cpu_time: count the processor time of the process, which what else the machine does disturbs less.

    Returns:
        `milliseconds` (of a part) and `ratios`, each with median and quartiles over the rounds, the ratios with the
        share of FLOPs by the account; `R` and `distance_from_R`, a share of it; `layers`, one by one; and what was
        measured on what.

    Raises:
        FoveateError: a budget or layers that the tower doesn't have.
    """
    shapes = shapes or Shapes()
    with bad_input():
        config = LlavaQGVTCConfig(
            vision_config=shapes.vision_config,
            question_config=shapes.text_config,
            compression={"num_visual_tokens": num_visual_tokens, "layers": layers},
        )
    settings = config.compression
    dtype = dtype or fast_dtype("cpu")
    bench = _Bench(config, batch_size, dtype, time.process_time if cpu_time else timer)
    found = measure_in_turns(bench.parts(), repeats, progress)
    stock, compressed = (torch.tensor(found.pop(name), dtype=torch.float64) for name in ("stock", "compressed"))
    times = {
        f"stock, {shapes.layers} layers": stock.sum(1).tolist(),
        f"stock, {shapes.layers - 1} layers": stock[:, :-1].sum(1).tolist(),
        f"compressed, {shapes.layers - 1} layers": compressed[:, :-1].sum(1).tolist(),
        f"compressed, {shapes.layers} layers": compressed.sum(1).tolist(),
        **found,
    }
    ratios = _ratios(stock, compressed, config)
    eq_6 = encoder_ratio(
        settings.layers, settings.num_visual_tokens, config.num_patches, shapes.layers, shapes.width, 4 * shapes.width
    )
    return {
        "milliseconds": {name: spread(values) for name, values in times.items()},
        "ratios": ratios,
        "R": eq_6 / 100,
        "distance_from_R": ratios["all_layers"]["median"] / (eq_6 / 100) - 1,
        "target": TARGET,
        "layers": _layers(stock, compressed, config),
        "compression": settings.to_dict(),
        "shapes": asdict(shapes),
        "clock": "processor time" if cpu_time else "wall time",
        **conditions(batch_size, dtype, repeats),
    }


def _ratios(stock: torch.Tensor, compressed: torch.Tensor, config: LlavaQGVTCConfig) -> dict[str, dict[str, Any]]:
    """Ratios of each round, from milliseconds (rounds, 1 + layers) of both encoders, and by the account."""
    plain, ours = _vision_layers(config)
    pairs = {
        "as_run": (compressed[:, :-1], stock, ours[:-1], plain),
        "without_last_layer": (compressed[:, :-1], stock[:, :-1], ours[:-1], plain[:-1]),
        "all_layers": (compressed, stock, ours, plain),
    }
    vision, patches = config.vision_config, config.num_patches
    embedding = 2 * patches * vision.num_channels * vision.patch_size**2 * vision.hidden_size

    def flops(layers: list[_LayerTokens]) -> int:
        return embedding + sum(layer.flops(vision) for layer in layers)

    return {
        name: {
            **spread((mine.sum(1) / theirs.sum(1)).tolist()),
            "by_account": flops(my_layers) / flops(their_layers),
        }
        for name, (mine, theirs, my_layers, their_layers) in pairs.items()
    }


def _vision_layers(config: LlavaQGVTCConfig) -> tuple[list[_LayerTokens], list[_LayerTokens]]:
    """All layers, of the stock tower and of the compressed one, the last on the tokens that are left."""
    settings, tokens = config.compression, 1 + config.num_patches
    schedule = token_schedule(config.num_patches, settings.num_visual_tokens, len(settings.layers))
    left = dict(zip(settings.layers, schedule))
    stock = [_LayerTokens(tokens, tokens, tokens)] * config.vision_config.num_hidden_layers
    compressed, entering = [], tokens
    for index in range(len(stock)):
        kept = 1 + left[index] if index in left else entering
        # Recycling reads the attention of the discarded tokens too; the MLP runs on the kept ones alone.
        compressed.append(_LayerTokens(entering if settings.recycle else kept, entering, kept))
        entering = kept
    return stock, compressed


def _layers(stock: torch.Tensor, compressed: torch.Tensor, config: LlavaQGVTCConfig) -> list[dict[str, Any]]:
    """Layer by layer, from milliseconds (rounds, 1 + layers): medians, and both ratios to the stock tower's layer."""
    plain, ours = _vision_layers(config)
    times = zip(stock.quantile(0.5, dim=0)[1:].tolist(), compressed.quantile(0.5, dim=0)[1:].tolist())
    return [
        {
            "layer": index,
            "compresses": layer.mlp < layer.keys,
            "entering": layer.keys - 1,
            "leaving": layer.mlp - 1,
            "stock_milliseconds": theirs,
            "milliseconds": mine,
            "ratio": mine / theirs,
            "by_account": layer.flops(config.vision_config) / plain[index].flops(config.vision_config),
        }
        for index, (layer, (theirs, mine)) in enumerate(zip(ours, times))
    ]


def _print(result: dict[str, Any]) -> None:
    console = Console()
    layers = Table("layer", "patches", "stock ms", "ms", "ratio", "FLOPs", box=None, pad_edge=False)
    for row in result["layers"]:
        patches, mark = str(row["entering"]), ""
        if row["compresses"]:
            patches, mark = f"{row['entering']} → {row['leaving']}", "[bold]"
        times = f"{row['stock_milliseconds']:.1f}", f"{row['milliseconds']:.1f}"
        layers.add_row(f"{mark}{row['layer']}", patches, *times, f"{row['ratio']:.1%}", f"{row['by_account']:.1%}")
    parts = Table("", "ms", "quartiles", box=None, pad_edge=False)
    for name, times in result["milliseconds"].items():
        parts.add_row(name, f"{times['median']:.1f}", " – ".join(f"{value:.1f}" for value in times["quartiles"]))
    ratios = Table("compressed : stock", "measured", "quartiles", "FLOPs", box=None, pad_edge=False)
    for name, ratio in result["ratios"].items():
        quartiles = " – ".join(f"{value:.1%}" for value in ratio["quartiles"])
        ratios.add_row(RATIOS[name], f"[bold]{ratio['median']:.1%}[/]", quartiles, f"{ratio['by_account']:.1%}")
    for table in (layers, parts, ratios):
        console.print(table)
        print()
    print(
        f"R of Eq. 6 is {result['R']:.2%}; the measured ratio with all layers in both differs by "
        f"{result['distance_from_R']:+.1%} of it. Target: at most {result['target']:.0%} either way."
    )
    print(f"{describe(result)} By {result['clock']}.")
    print(f"Command: {result['command']}")


def layer_list(words: str) -> list[int]:
    """`"12,14"` → [12, 14]; a `ValueError` is argparse's to explain."""
    return [int(number) for number in words.split(",")]


def main() -> None:
    parser = command_parser("encoder", __doc__)
    parser.add_argument("--num-visual-tokens", type=int, help="72 of 576 patches if not said")
    parser.add_argument("--layers", type=layer_list, help="the compressing ones; 12,14,16,18,20,22 if not said")
    run_command(
        parser,
        lambda arguments: benchmark(
            num_visual_tokens=arguments.num_visual_tokens,
            layers=arguments.layers,
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            repeats=arguments.repeats,
            cpu_time=arguments.cpu_time,
        ),
        _print,
    )


if __name__ == "__main__":
    main()
