"""Timings at real shapes: `python -m benchmarks.NAME` in a checkout. Not installed."""
