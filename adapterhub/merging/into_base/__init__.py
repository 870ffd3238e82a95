"""Merge adapters into a base: `merge_into_base`, or `prepare_merge` and `Merge.write`; `merge_proof` checks a merged model.

model_merge    the whole merge: plan, estimate, write
read_base      the base: `open_model` reads its rows, over `tensor_files`, `stored_weights`, `dequantize`
merge_options  the options
plan_folder    the edits of each tensor of a folder, named by `tensor_names`; `plan_gguf`, of a GGUF model
edits          one tensor changed, over `product`; `joined_edits`, by a method that is no sum
tensor_types   rows to bytes and back, with `nf4_numpy`, `nf4_writer`, `k_quants`, `mixtures` and `importance`
output_files   what is written: `write_folder` with `side_files`, `write_gguf`, `folder_to_gguf`
resume         finished files of an interrupted merge
loss_estimate  how much a merge retains; `merge_proof`, whether a model is that merge
extraction     the way back: an adapter from a full fine-tune
"""

from .loss_estimate import ChangeEstimate
from .merge_options import Options
from .model_merge import Merge, ModelMergeReport, merge_into_base, prepare_merge
from .read_base import read_base

__all__ = ["ChangeEstimate", "Merge", "ModelMergeReport", "Options", "merge_into_base", "prepare_merge", "read_base"]
