"""Quantized weights, and the layers that adapt them.

nf4_matrix     weights in NF4; `bitsandbytes_format`, as bitsandbytes stores them
lora           the linear layer; `variants`, DoRA and PiSSA; `embeddings`, tables; `expert_stacks`, experts
targets        which modules get one
row_attention  attention within rows; `varlen`, within documents that follow each other
rms_norm       RMSNorm with a frozen weight
"""
