"""Base checkpoint → compressed checkpoint, and the self-contained code that travels with it."""
