"""Evaluation: the one harness, asking one question, pictures and benchmarks."""
