"""How images reach a stock model of Transformers: one file a family, with only what differs."""
