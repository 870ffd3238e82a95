"""The steps of a training run: loss, optimizer, evaluation on held-out data.

training_loop  a step, in the order in which things happen
loss           cross-entropy; `preference`, DPO, ORPO and SimPO
optimizer      AdamW and the learning rate
heldout        losses and answers on held-out data
state          what a checkpoint has
"""
