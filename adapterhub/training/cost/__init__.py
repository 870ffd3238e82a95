"""The time and memory of a training run, predicted and measured."""
