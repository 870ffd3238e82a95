"""The steps of a training run: loss, optimizer, evaluation on held-out data."""
