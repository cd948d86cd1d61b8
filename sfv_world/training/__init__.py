"""Training: clips to gradients to checkpoints."""
