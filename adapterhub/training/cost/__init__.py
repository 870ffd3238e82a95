"""The time and memory of a training run, predicted and measured.

memory       the memory that it will need, by `model_sizes`; `budget`, beside the memory that is free
meter        what it took, against the `peaks` of graphics cards
"""
