"""The time and memory of a training, predicted and measured."""
