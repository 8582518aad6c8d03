"""The training loop, data, models, and checkpoints."""
