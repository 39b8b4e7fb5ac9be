"""The machinery of any training loop: steps, optimizer, checkpoints, gradients over processes, cost."""
