"""The steps of a training: loss, optimizer, evaluation on held-out data."""
