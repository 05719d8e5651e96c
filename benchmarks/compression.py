"""`python -m benchmarks.compression`: what compression itself costs beside the vision tower.

At the shapes of CLIP ViT-L/14-336 (LLaVA-1.5's tower), with random weights, in one process: the tower's forward; every
part of Recoverable Compression, for both variants; and the text encoder's forward, which is not part of the compression
but is an extra cost of guiding it by the question. Everything takes turns, and medians are given.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPVisionModel

from benchmarks.timing import Shapes, command_parser, conditions, describe, measure_in_turns, run_command, timed
from foveate.modeling.compatibility import clip_embeddings, clip_layers, run_clip_layer
from foveate.modeling.core.precision import fast_dtype
from foveate.modeling.methods.recoverable_algorithm import assign_tokens, class_token_scores, text_similarity


VARIANTS = ("official", "paper")
TARGET = 0.05  # of the tower's forward


class _Bench:
    """The modules and inputs, and each part as a function to be timed."""

    def __init__(self, shapes: Shapes, batch_size: int, dtype: torch.dtype):
        torch.manual_seed(0)
        config = shapes.vision_config
        self.tower = CLIPVisionModel._from_config(config).to(dtype).eval()
        self.text_encoder = CLIPTextModelWithProjection._from_config(shapes.text_config).to(dtype).eval()
        self.projection = nn.Linear(shapes.width, shapes.projection, bias=False).to(dtype)
        self.pixels = torch.randn(batch_size, 3, shapes.image_size, shapes.image_size, dtype=dtype)
        self.question = torch.randint(1, 1000, (batch_size, shapes.text_length))
        self.layers: Any = clip_layers(self.tower)
        self.penultimate = clip_embeddings(self.tower, self.pixels)
        for layer in self.layers[:-1]:
            self.penultimate = run_clip_layer(layer, self.penultimate)
        self.final = run_clip_layer(self.layers[-1], self.penultimate)
        self.text = self.text_encoder(self.question).text_embeds
        self.class_token_scores, self.similarity = self.score(), self.compare()
        self.assignments = {variant: self.assign(variant) for variant in VARIANTS}

    def run_tower(self) -> None:
        self.tower(self.pixels)

    def run_text_encoder(self) -> None:
        self.text_encoder(self.question)

    def score(self) -> torch.Tensor:
        """LN1, the class token's query, all keys, and the scores."""
        attention = self.layers[-1].self_attn
        normed = self.layers[-1].layer_norm1(self.penultimate)
        self.keys = attention.k_proj(normed)
        return class_token_scores(attention.q_proj(normed[:, 0]), self.keys)

    def compare(self) -> torch.Tensor:
        return text_similarity(self.text, self.projection(self.final[:, 1:]))

    def assign(self, variant: str):
        return assign_tokens(self.class_token_scores, self.similarity, self.keys[:, 1:], variant=variant)

    def merge(self, variant: str) -> None:
        self.assignments[variant].tokens(self.penultimate[:, 1:])

    def parts(self) -> dict[str, Callable[[], Any]]:
        return {
            "vision tower": self.run_tower,
            "text encoder": self.run_text_encoder,
            "visual scores": self.score,
            "text similarity": self.compare,
            **{f"assignment, {variant}": partial(self.assign, variant) for variant in VARIANTS},
            **{f"tokens, {variant}": partial(self.merge, variant) for variant in VARIANTS},
        }


@torch.inference_mode()
def benchmark(
    shapes: Shapes | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    repeats: int = 7,
    progress: bool = True,
) -> dict[str, Any]:
    """Times everything on the CPU with torch's current number of threads.

    Args:
        shapes: CLIP ViT-L/14-336 if `None`.
        batch_size: images.
        dtype: of weights and activations; what the processor computes fast in, if `None`.
        repeats: rounds after a warm-up; in each every part runs once.

    Returns:
        `parts` (name → milliseconds, median), `compression` (variant → milliseconds, share of the tower's forward and
        mean number of tokens), and what was measured on what.
    """
    shapes = shapes or Shapes()
    dtype = dtype or fast_dtype("cpu")
    bench = _Bench(shapes, batch_size, dtype)
    times = measure_in_turns({name: timed(run) for name, run in bench.parts().items()}, repeats, progress)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "parts": medians,
        "compression": {variant: _account(medians, bench, variant) for variant in VARIANTS},
        "text_encoder_share": medians["text encoder"] / medians["vision tower"],
        "target": TARGET,
        "shapes": asdict(shapes),
        **conditions(batch_size, dtype, repeats),
    }


def _account(medians: dict[str, float], bench: _Bench, variant: str) -> dict[str, float]:
    names = "visual scores", "text similarity", f"assignment, {variant}", f"tokens, {variant}"
    total = sum(medians[name] for name in names)
    return {
        "milliseconds": total,
        "share": total / medians["vision tower"],
        "mean_visual_tokens": bench.assignments[variant].counts.float().mean().item(),
    }


def _print(result: dict[str, Any]) -> None:
    tower = result["parts"]["vision tower"]
    table = Table("", "ms", "of the tower", box=None, pad_edge=False)
    for name, milliseconds in result["parts"].items():
        table.add_row(name, f"{milliseconds:.1f}", f"{milliseconds / tower:.2%}")
    for variant, account in result["compression"].items():
        name = f"[bold]compression, {variant}[/] ({account['mean_visual_tokens']:.0f} tokens)"
        table.add_row(name, f"{account['milliseconds']:.1f}", f"[bold]{account['share']:.2%}[/]")
    Console().print(table)
    print(f"Target: at most {result['target']:.0%} of the tower's forward. {describe(result)}")
    print(f"Command: {result['command']}")


def main() -> None:
    run_command(
        command_parser("compression", __doc__, cpu_time=False),
        lambda arguments: benchmark(batch_size=arguments.batch_size, dtype=arguments.dtype, repeats=arguments.repeats),
        _print,
    )


if __name__ == "__main__":
    main()
