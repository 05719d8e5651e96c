"""Configurations: one class a model, and the `compression` block with its validation."""
