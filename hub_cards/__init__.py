"""Model cards of converted checkpoints."""
