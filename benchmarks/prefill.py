"""`python -m benchmarks.prefill`: what MetaCompress adds to the time to first token.

At the shapes of LLaVA-1.5-7B, in one process, on one set of random weights: MetaCompress beside equidistant sampling to
as many tokens, and the uncompressed model if asked for. The time to first token is one forward pass, from the pixels to
the head on the last position. The compressor, on a projected sequence, and the language model, on a prompt of
compressed length and with the head on its last position, also run alone. All take turns; each round gives the ratios,
next to the ratio of FLOPs by the account (`flops.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import timer

from benchmarks.timing import (
    command_parser,
    conditions,
    describe,
    measure_in_turns,
    random_model,
    run_command,
    sharing,
    spread,
    timed,
)
from foveate.configuration.configuration_llava_baseline import LlavaBaselineConfig
from foveate.configuration.configuration_llava_metacompress import LlavaMetaCompressConfig
from foveate.errors import FoveateError
from foveate.evaluation.shapes import config_of_shape
from foveate.modeling.core.account import DEFAULT_TEXT_TOKENS, account_of
from foveate.modeling.core.precision import fast_dtype
from foveate.modeling.modeling_llava_baseline import LlavaBaselineForConditionalGeneration
from foveate.modeling.modeling_llava_metacompress import LlavaMetaCompressForConditionalGeneration


SHAPE, KEEP_RATIO = "llava-1.5-7b", 0.1
RATIOS = [
    ("metacompress", "sample"),
    ("metacompress", "uncompressed"),
    ("compressor", "language model"),
    ("compressor", "metacompress"),
]
TARGETS = {"metacompress : sample": 1.03, "compressor : language model": 0.02}  # at most


class _Bench:
    """The models and inputs, and each part as a function to be timed."""

    def __init__(self, config: LlavaMetaCompressConfig, text_tokens: int, batch_size: int, dtype: torch.dtype):
        torch.manual_seed(0)
        self.config, self.text_tokens, self.batch_size = config, text_tokens, batch_size
        keep_ratio, width = config.compression.keep_ratio, config.text_config.hidden_size
        self.metacompress = random_model(LlavaMetaCompressForConditionalGeneration, config, dtype)
        self.sample = _sharing(self.metacompress, keep_ratio)
        self.uncompressed = _sharing(self.metacompress, keep_ratio=1.0)
        side = config.vision_config.image_size
        self.pixels = torch.randn(batch_size, 3, side, side, dtype=dtype)
        self.sequences = torch.randn(batch_size, config.num_patches, width, dtype=dtype)
        self.num_tokens = config.compression.count_tokens(config.num_patches)
        self.embeddings = torch.randn(batch_size, self.num_tokens + text_tokens, width, dtype=dtype)

    def first_token(self, model: Any) -> Callable[[], Any]:
        placeholders = model.config.compression.count_tokens(self.config.num_patches)
        text = torch.randint(1, min(1000, self.config.image_token_id), (self.batch_size, self.text_tokens))
        ids = torch.cat([text.new_full((self.batch_size, placeholders), self.config.image_token_id), text], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": self.pixels}
        return partial(model, **inputs, logits_to_keep=1)

    def compress(self) -> None:
        self.metacompress.model.compressor(self.sequences, self.num_tokens)

    def prefill(self) -> None:
        output = self.metacompress.model.language_model(inputs_embeds=self.embeddings)
        self.metacompress.lm_head(output.last_hidden_state[:, -1:])

    def parts(self, with_base: bool) -> dict[str, Callable[[], Any]]:
        return {
            "metacompress": self.first_token(self.metacompress),
            "sample": self.first_token(self.sample),
            **({"uncompressed": self.first_token(self.uncompressed)} if with_base else {}),
            "language model": self.prefill,
            "compressor": self.compress,
        }

    def flops(self) -> dict[str, int]:
        """Of each part by the account, one image and its prompt."""
        size = (self.config.vision_config.image_size,) * 2
        metacompress, sample, uncompressed = (
            account_of(model.config, size, self.text_tokens)
            for model in (self.metacompress, self.sample, self.uncompressed)
        )
        return {
            "metacompress": metacompress.total,
            "sample": sample.total,
            "uncompressed": uncompressed.total,
            "language model": metacompress.llm_prefill,
            "compressor": metacompress.compressor,
        }


def _sharing(model: LlavaMetaCompressForConditionalGeneration, keep_ratio: float) -> Any:
    """A model that samples to this share, made of the very modules of another."""
    fields = {
        name: value for name, value in model.config.to_dict().items() if name not in ("model_type", "compression")
    }
    config = LlavaBaselineConfig.from_dict({**fields, "compression": {"method": "sample", "keep_ratio": keep_ratio}})
    return sharing(model, LlavaBaselineForConditionalGeneration, config)


@torch.inference_mode()
def benchmark(
    config: LlavaMetaCompressConfig | None = None,
    layers: int | None = None,
    with_base: bool = False,
    text_tokens: int = DEFAULT_TEXT_TOKENS,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    repeats: int = 7,
    cpu_time: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Times everything on the CPU with torch's current number of threads.

    Args:
        config: LLaVA-1.5-7B at a keep ratio of 0.1 if `None`.
        layers: of the language model, for machines that have no memory for all; `None`: all.
        with_base: also time the uncompressed model.
        text_tokens: length of the prompts without their visual tokens.
        batch_size: images, a prompt each.
        dtype: of weights and activations; what the processor computes fast in, if `None`.
        repeats: rounds after a warm-up; in each every part runs once.
        cpu_time: count the processor time of the process, which what else the machine does disturbs less.

    Returns:
        `milliseconds` (of a part) and `ratios` ("a : b"), each with median and quartiles over the rounds, the ratios
        with that of FLOPs by the account and the target where there is one; and what was measured on what.

    Raises:
        FoveateError: a model for which there is not memory enough, or layers that it doesn't have.
    """
    config = config or config_of_shape(SHAPE, "metacompress", {"keep_ratio": KEEP_RATIO})
    depth = config.text_config.num_hidden_layers
    layers = depth if layers is None else layers
    if not 1 <= layers <= depth:
        raise FoveateError(f"--layers is {layers}: choose from 1 to the language model's {depth}.")
    config.text_config.num_hidden_layers = layers
    dtype = dtype or fast_dtype("cpu")
    bench = _Bench(config, text_tokens, batch_size, dtype)
    now = time.process_time if cpu_time else timer
    parts = {name: timed(run, now) for name, run in bench.parts(with_base).items()}
    times = measure_in_turns(parts, repeats, progress)
    return {
        "milliseconds": {name: spread(values) for name, values in times.items()},
        "ratios": _ratios(times, bench.flops()),
        "visual_tokens": bench.num_tokens,
        "uncompressed_visual_tokens": config.num_patches,
        "text_tokens": text_tokens,
        "layers": layers,
        "all_layers": depth,
        "compression": config.compression.to_dict(),
        "clock": "processor time" if cpu_time else "wall time",
        **conditions(batch_size, dtype, repeats),
    }


def _ratios(times: dict[str, list[float]], flops: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Of each round, from milliseconds, and by the account."""
    found = {}
    for mine, theirs in RATIOS:
        if theirs in times:
            name = f"{mine} : {theirs}"
            rounds = [a / b for a, b in zip(times[mine], times[theirs])]
            found[name] = {**spread(rounds), "by_account": flops[mine] / flops[theirs], "target": TARGETS.get(name)}
    return found


def _print(result: dict[str, Any]) -> None:
    parts = Table("", "ms", "quartiles", box=None, pad_edge=False)
    for name, times in result["milliseconds"].items():
        parts.add_row(name, f"{times['median']:.1f}", " – ".join(f"{value:.1f}" for value in times["quartiles"]))
    ratios = Table("", "measured", "quartiles", "FLOPs", "target", box=None, pad_edge=False)
    for name, ratio in result["ratios"].items():
        quartiles = " – ".join(f"{value:.2%}" for value in ratio["quartiles"])
        target = f"at most {ratio['target']:.0%}" if ratio["target"] else ""
        ratios.add_row(name, f"[bold]{ratio['median']:.2%}[/]", quartiles, f"{ratio['by_account']:.2%}", target)
    console = Console()
    for table in (parts, ratios):
        console.print(table)
        print()
    print(
        f"{result['uncompressed_visual_tokens']} → {result['visual_tokens']} visual tokens, {result['text_tokens']} of "
        f"text, {result['layers']} of {result['all_layers']} layers of the language model."
    )
    print(f"{describe(result)} By {result['clock']}.")
    print(f"Command: {result['command']}")


def main() -> None:
    parser = command_parser("prefill", __doc__)
    parser.set_defaults(batch_size=1)
    parser.add_argument("--with-base", action="store_true", help="also time the uncompressed model")
    parser.add_argument("--layers", type=int, help="of the language model; all if not said")
    run_command(
        parser,
        lambda arguments: benchmark(
            layers=arguments.layers,
            with_base=arguments.with_base,
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            repeats=arguments.repeats,
            cpu_time=arguments.cpu_time,
        ),
        _print,
    )


if __name__ == "__main__":
    main()
