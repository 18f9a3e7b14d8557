"""Training: target-made data, features, the loop, checkpoints."""
