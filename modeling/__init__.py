"""Models: the algorithms (`compressor_*.py`), the models around them, and what models share."""
