"""PEFT: a folder with `adapter_config.json` and `adapter_model.safetensors`.

reader             a folder, or a config and tensors; `adapter_config`, the config; `tensor_keys`, names of tensors
module_deltas      a module's tensors as a delta; `tuner_tensors`, those of other methods than LoRA
target_parameters  LoRA on parameters of experts, with `stacks`
earlier_versions   folders of earlier versions; `quirks`, of other programs; `tinker`, archives, told apart by
                   `tinker_names`
writer             a folder, with `one_scale` for programs that know a single alpha
"""

from .adapter_config import CONFIG, INDEX, INERT, READ, UNKNOWN_KEY, WEIGHTS, residual_init, unknown_keys
from .adapter_config import check as check_config
from .earlier_versions import LayoutProblem, layout_problem, upgrade_layout
from .quirks import alpha_is_rank
from .reader import has_peft_type, nested_adapter_hint, parse, parse_files, parse_shapes, read, read_shapes, sniff, weight_files
from .stacks import expert_place, stack_experts, stack_transposed_experts
from .tensor_keys import classify, state_dict
from .writer import config_text, saved_modules, write

__all__ = [
    "CONFIG",
    "INDEX",
    "INERT",
    "READ",
    "UNKNOWN_KEY",
    "WEIGHTS",
    "LayoutProblem",
    "alpha_is_rank",
    "check_config",
    "classify",
    "config_text",
    "expert_place",
    "has_peft_type",
    "layout_problem",
    "nested_adapter_hint",
    "parse",
    "parse_files",
    "parse_shapes",
    "read",
    "read_shapes",
    "residual_init",
    "saved_modules",
    "sniff",
    "stack_experts",
    "stack_transposed_experts",
    "state_dict",
    "unknown_keys",
    "upgrade_layout",
    "weight_files",
    "write",
]  # fmt: skip
