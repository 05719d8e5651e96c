"""The methods: one file each, with its algorithm (tensors in, tensors out) and what it adds to a model."""
