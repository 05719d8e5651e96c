"""`python -m benchmarks.eviction`: what ETC's small cache saves, and where.

At the shapes of Qwen3-VL-2B, with 1024 visual tokens, in one process and on one set of random weights: the first token
and a later one of the stock model, of ETC, and of ETC on an image that was compressed before. Keys and values are
counted where they lie; the peak is what the process grew by on the way to the first token (Linux). FLOPs are by the
account (`flops.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import timer
from transformers import Qwen3VLForConditionalGeneration

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
from foveate.evaluation.shapes import config_of_shape
from foveate.modeling.compatibility import cache_argument, cache_of, iterate_cache_tensors
from foveate.modeling.core.account import Account, account_of, prefill_flops
from foveate.modeling.core.precision import fast_dtype
from foveate.modeling.modeling_qwen3_vl_etc import Qwen3VLETCForConditionalGeneration


SHAPE = "qwen3-vl-2b"
SIDE = 1024  # pixels: 32 × 32 visual tokens
TEXT_TOKENS = 49  # at which 1024 → 1 takes 95.33 % of the cache, as in the paper's Table 4
#: The paper's Table 4, on a GPU: uncompressed and ETC.
PAPER = {"KV cache": (223.54, 10.44), "CUDA time": (203.05, 114.13), "FLOPs": (2.98, 1.37)}
_PROCESS = Path("/proc/self")
Output = TypeVar("Output")


class _Bench:
    """The models and inputs of one image and its prompt, and each part as a function to be timed."""

    def __init__(self, config: Any, stock_config: Any, side: int, text_tokens: int, dtype: torch.dtype):
        torch.manual_seed(0)
        self.etc = random_model(Qwen3VLETCForConditionalGeneration, config, dtype)
        self.stock = sharing(self.etc, Qwen3VLForConditionalGeneration, stock_config)
        vision, self.image_token = config.vision_config, config.image_token_id
        rows = side // vision.patch_size
        grid = torch.tensor([[1, rows, rows]])
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        self.pixels = {"pixel_values": torch.randn(rows * rows, values, dtype=dtype), "image_grid_thw": grid}
        self.length = rows * rows // vision.spatial_merge_size**2
        self.text = torch.randint(1, 1000, (1, text_tokens))
        with torch.inference_mode():
            [self.image] = self.etc.compress(
                self._ids(self.length + config.compression.num_visual_tokens), **self.pixels
            )

    def _ids(self, placeholders: int) -> torch.Tensor:
        """The image first: the account says so too."""
        return torch.cat([torch.full((1, placeholders), self.image_token), self.text], dim=1)

    def first_token(self, name: str) -> Any:
        """The output of a prompt."""
        number = self.etc.config.compression.num_visual_tokens
        if name == "uncompressed":
            ids = self._ids(self.length)
            kinds = (ids == self.image_token).int()
            return self.stock(input_ids=ids, mm_token_type_ids=kinds, **self.pixels, logits_to_keep=1, use_cache=True)
        images = self.pixels if name == "etc" else {"compressed_images": [self.image]}
        return self.etc(input_ids=self._ids(self.length + number), **images, logits_to_keep=1, use_cache=True)

    def later_token(self, name: str, cache: Any) -> Callable[[], None]:
        """A token on the cache of a prompt, which is put back afterwards."""
        model, token = self.stock if name == "uncompressed" else self.etc, self.text[:, :1]

        def run() -> None:
            model(input_ids=token, **cache_argument(cache), use_cache=True)
            cache.crop(-1)

        return run


NAMES = ("uncompressed", "etc", "etc, compressed before")


def kv_bytes(cache: Any) -> int:
    return sum(tensor.nbytes for tensor in iterate_cache_tensors(cache))


def peak_growth(run: Callable[[], Output]) -> tuple[Output, int | None]:
    """What a call returns, and the bytes that the process had more at its peak than before; `None` where that can't be
    read."""
    try:
        (_PROCESS / "clear_refs").write_text("5")  # the peak starts again from now
        before = _status("VmRSS")
    except OSError:
        return run(), None
    output = run()
    return output, _status("VmHWM") - before


def _status(name: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@torch.inference_mode()
def benchmark(
    config: Any = None,
    stock_config: Any = None,
    side: int = SIDE,
    text_tokens: int = TEXT_TOKENS,
    dtype: torch.dtype | None = None,
    repeats: int = 7,
    cpu_time: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Times everything on the CPU with torch's current number of threads.

    Args:
        config, stock_config: of ETC and of the stock model; Qwen3-VL-2B, with one compressed token, if `None`.
        side: of the image in pixels.
        text_tokens: length of the prompt without the image.
        dtype: of weights and activations; what the processor computes fast in, if `None`.
        repeats: rounds after a warm-up; in each every part runs once.
        cpu_time: count the processor time of the process, which what else the machine does disturbs less.

    Returns:
        For each of `NAMES`: `first_token` and `later_token` (milliseconds, median and quartiles), `first_token_ratio`
        to the uncompressed model's (of each round), `kv_bytes`, `peak_bytes` and `flops` to the first token; and what
        was measured on what.
    """
    config = config or config_of_shape(SHAPE, "etc", {"num_visual_tokens": 1})
    stock_config = stock_config or config_of_shape(SHAPE)
    dtype = dtype or fast_dtype("cpu")
    bench = _Bench(config, stock_config, side, text_tokens, dtype)
    now = time.process_time if cpu_time else timer
    parts: dict[str, Callable[[], float]] = {}
    caches, peaks = {}, {}
    for name in NAMES:
        first = partial(bench.first_token, name)
        output, peaks[name] = peak_growth(first)
        caches[name] = kv_bytes(cache_of(output))
        parts[f"{name}: first"] = timed(first, now)
        parts[f"{name}: later"] = timed(bench.later_token(name, cache_of(output)), now)
    times = measure_in_turns(parts, repeats, progress)
    flops = _flops(config, (side, side), text_tokens)
    found = {}
    for name in NAMES:
        ratios = [mine / stock for mine, stock in zip(times[f"{name}: first"], times["uncompressed: first"])]
        found[name] = {
            "first_token": spread(times[f"{name}: first"]),
            "first_token_ratio": spread(ratios),
            "later_token": spread(times[f"{name}: later"]),
            "kv_bytes": caches[name],
            "peak_bytes": peaks[name],
            "flops": flops[name],
        }
    return {
        "parts": found,
        "visual_tokens": bench.length,
        "compressed_tokens": config.compression.num_visual_tokens,
        "text_tokens": text_tokens,
        "image_bytes": bench.image.num_bytes,
        "clock": "processor time" if cpu_time else "wall time",
        **conditions(1, dtype, repeats),
    }


def _flops(config: Any, size: tuple[int, int], text_tokens: int) -> dict[str, dict[str, int]]:
    """Of all, and of the language model alone, to the first token."""

    def of(account: Account) -> dict[str, int]:
        return {"total": account.total, "llm_prefill": account.llm_prefill}

    asked = prefill_flops(config.text_config, [(text_tokens, text_tokens + config.compression.num_visual_tokens)])
    return {
        "uncompressed": of(account_of(config, size, text_tokens, uncompressed=True)),
        "etc": of(account_of(config, size, text_tokens)),
        "etc, compressed before": {"total": asked, "llm_prefill": asked},
    }


def _print(result: dict[str, Any]) -> None:
    table = Table("", *NAMES, box=None, pad_edge=False)
    parts = result["parts"]
    stock = parts["uncompressed"]

    def row(title: str, show: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(title, *(show(parts[name]) for name in NAMES))

    def beside(value: float, base: float, text: str) -> str:
        return text if value == base else f"{text} ({value / base - 1:+.1%})"

    row("KV cache", lambda p: beside(p["kv_bytes"], stock["kv_bytes"], f"{p['kv_bytes'] / 1e6:.2f} MB"))
    row(
        "first token",
        lambda p: (
            f"{p['first_token']['median']:.0f} ms"
            + (f" ({p['first_token_ratio']['median'] - 1:+.1%})" if p is not stock else "")
        ),
    )
    row("its quartiles", lambda p: " – ".join(f"{value:.0f}" for value in p["first_token"]["quartiles"]))
    row("later token", lambda p: f"{p['later_token']['median']:.0f} ms")
    row("its quartiles", lambda p: " – ".join(f"{value:.0f}" for value in p["later_token"]["quartiles"]))
    row("peak above weights", lambda p: "–" if p["peak_bytes"] is None else f"{p['peak_bytes'] / 1e6:.0f} MB")
    for title, key in (("FLOPs of the language model", "llm_prefill"), ("FLOPs in all", "total")):
        row(title, lambda p, key=key: beside(p["flops"][key], stock["flops"][key], f"{p['flops'][key] / 1e12:.2f} T"))  # type: ignore[misc]
    Console(width=120).print(table)
    paper = ", ".join(f"{name} {full} → {small} ({small / full - 1:+.1%})" for name, (full, small) in PAPER.items())
    print(f"The paper's Table 4, on a GPU: {paper}.")
    print(
        f"{result['visual_tokens']} → {result['compressed_tokens']} visual token(s), {result['text_tokens']} of text. "
        f"A compressed image is {result['image_bytes'] / 1e3:.1f} kB."
    )
    print(f"{describe(result)} By {result['clock']}.")
    print(f"Command: {result['command']}")


def main() -> None:
    parser = command_parser("eviction", __doc__)
    run_command(
        parser,
        lambda arguments: benchmark(dtype=arguments.dtype, repeats=arguments.repeats, cpu_time=arguments.cpu_time),
        _print,
    )


if __name__ == "__main__":
    main()
