"""`python -m benchmarks.fusion`: what LLaVA-Meteor's fusion costs beside the vision tower.

At the shapes of CLIP ViT-L/14-336 (LLaVA-1.5's tower), with random weights, in one process: the tower's forward on a
batch of square views; the whole fusion on what it gives, and the selection after it; the fusion of one view of 144, 576
and 2304 patches, which should take time in proportion; and one block of it as Transformers' own Mamba mixer runs it
where there are no fused kernels. Everything takes turns, and medians are given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import timer
from transformers import CLIPVisionModel, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

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
from foveate.modeling.compatibility import replace_clip_embeddings
from foveate.modeling.core.precision import fast_dtype
from foveate.modeling.layers.clip import choose_tokens
from foveate.modeling.layers.slices import SliceGrid, SliceLayout
from foveate.modeling.methods.meteor_algorithm import (
    FlashGlobalFusion,
    SliceEmbeddings,
    class_scores,
    encode_views,
    native_scores,
)


SIDES = (12, 24, 48)  # of one view, in patches
NUM_VIEWS = 7  # of an image of 672 × 1008 pixels
NUM_KEPT = 144
STATE_SIZE = 16
TARGET = 0.15  # of the tower's forward


def _views(number: int, side: int) -> SliceLayout:
    return SliceLayout([SliceGrid((side, side))] * number, torch.device("cpu"))


class _Bench:
    """The modules and inputs, and each part as a function to be timed."""

    def __init__(self, shapes: Shapes, batch_size: int, dtype: torch.dtype):
        torch.manual_seed(0)
        self.shapes, self.side = shapes, shapes.image_size // shapes.patch_size
        self.tower = CLIPVisionModel._from_config(shapes.vision_config)
        replace_clip_embeddings(self.tower, SliceEmbeddings)
        self.tower.to(dtype).eval()
        self.fusion = FlashGlobalFusion(shapes.width, STATE_SIZE).to(dtype).eval()
        self.fusion.reset_parameters()
        config = MambaConfig(hidden_size=shapes.width, state_size=STATE_SIZE, expand=1, num_hidden_layers=1)
        self.mixer = MambaMixer(config, layer_idx=0).to(dtype).eval()
        self.mixer.load_state_dict(self.fusion.forward_mixer.state_dict())
        self.layout = _views(batch_size, self.side)
        patches = (self.side**2, 3 * shapes.patch_size**2)
        self.patches = torch.randn(batch_size, *patches, dtype=dtype)
        self.features, self.class_row = self.run_tower()
        self.sequence = torch.randn(batch_size, 2 * self.side**2 + 1, shapes.width, dtype=dtype)
        self.fused, self.instruction = self.fuse()
        self.single = {side: torch.randn(1, side**2, shapes.width, dtype=dtype) for side in SIDES}

    def run_tower(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return encode_views(self.tower, self.patches, self.layout, self.shapes.layers - 1, look=True)

    def fuse(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.fusion(self.features, self.layout, local=True)

    def select(self) -> torch.Tensor:
        importance = 0.8 * class_scores(self.class_row) + 0.2 * native_scores(self.fused, self.instruction)
        kept, _ = choose_tokens(importance, min(NUM_KEPT, self.side**2))
        return self.fused.gather(1, kept[..., None].expand(-1, -1, self.fused.shape[-1]))

    def parts(self) -> dict[str, Callable[[], Any]]:
        return {
            "vision tower": self.run_tower,
            "fusion": self.fuse,
            "selection": self.select,
            "one block of it": lambda: self.fusion.forward_mixer(self.sequence),
            "the same, Transformers' mixer": lambda: self.mixer(self.sequence),
            **{
                f"fusion of {side**2} patches": lambda side=side: self.fusion(
                    self.single[side], _views(1, side), local=True
                )
                for side in SIDES
            },
        }


@torch.inference_mode()
def benchmark(
    shapes: Shapes | None = None,
    batch_size: int = NUM_VIEWS,
    dtype: torch.dtype | None = None,
    repeats: int = 7,
    progress: bool = True,
    clock: Callable[[], float] = timer,
) -> dict[str, Any]:
    """Times everything on the CPU with torch's current number of threads.

    Args:
        shapes: CLIP ViT-L/14-336 if `None`.
        batch_size: square views.
        dtype: of weights and activations; what the processor computes fast in, if `None`. States are always float32.
        repeats: rounds after a warm-up; in each every part runs once.
        clock: seconds.

    Returns:
        `parts` (name → median and quartiles in milliseconds), `share` (of fusion and selection, by the tower),
        `microseconds_a_patch` (patches of the one view → of its fusion), and what was measured on what.
    """
    shapes = shapes or Shapes()
    dtype = dtype or fast_dtype("cpu")
    bench = _Bench(shapes, batch_size, dtype)
    times = measure_in_turns({name: timed(run, clock) for name, run in bench.parts().items()}, repeats, progress)
    parts = {name: spread(found) for name, found in times.items()}
    tower, fusion, selection = (parts[name]["median"] for name in ("vision tower", "fusion", "selection"))
    return {
        "parts": parts,
        "share": {"fusion": fusion / tower, "selection": selection / tower},
        "microseconds_a_patch": {
            str(side**2): 1000 * parts[f"fusion of {side**2} patches"]["median"] / side**2 for side in SIDES
        },
        "target": TARGET,
        "shapes": asdict(shapes),
        "clock": "processor" if clock is time.process_time else "wall",
        **conditions(batch_size, dtype, repeats),
    }


def _print(result: dict[str, Any]) -> None:
    parts, tower = result["parts"], result["parts"]["vision tower"]["median"]
    table = Table("", "ms", "quartiles", "of the tower", "µs a patch", box=None, pad_edge=False)
    for name, found in parts.items():
        low, high = found["quartiles"]
        a_patch = result["microseconds_a_patch"].get(name.removeprefix("fusion of ").removesuffix(" patches"))
        table.add_row(
            name,
            f"{found['median']:.1f}",
            f"{low:.1f} – {high:.1f}",
            "" if a_patch else f"{found['median'] / tower:.2%}",
            f"{a_patch:.0f}" if a_patch else "",
        )
    Console(width=120).print(table)
    print(f"Target: fusion at most {result['target']:.0%} of the tower's forward. {describe(result)}", end=" ")
    print(f"By {result['clock']} time.")
    print(f"Command: {result['command']}")


def main() -> None:
    parser = command_parser("fusion", __doc__)
    parser.set_defaults(batch_size=NUM_VIEWS)
    run_command(
        parser,
        lambda arguments: benchmark(
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            repeats=arguments.repeats,
            clock=time.process_time if arguments.cpu_time else timer,
        ),
        _print,
    )


if __name__ == "__main__":
    main()
