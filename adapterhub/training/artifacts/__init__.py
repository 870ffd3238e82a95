"""The files that a training run writes.

training_checkpoint  a checkpoint; when one is written and kept: `loop.training_loop`
finished_folder      the finished adapter; `loss_curve`, its picture
tracking             the numbers of a run for TensorBoard and W&B
"""
