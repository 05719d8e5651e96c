"""Amounts as people read them: FLOPs and bytes with three digits and a unit."""

from __future__ import annotations


def show_flops(number: float) -> str:
    """`2.02e12` → "2.02 TFLOPs"; a dash for none."""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g} {unit}FLOPs" if number else "–"
        number /= 1000
    return f"{number:.3g} TFLOPs"


def show_size(num_bytes: float) -> str:
    """`69_200_000` → "69.2 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}" if unit != "bytes" else f"{num_bytes} bytes"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
