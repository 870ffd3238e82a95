"""PEFT: a folder with `adapter_config.json` and `adapter_model.safetensors`."""

from .config import CONFIG, INDEX, INERT, READ, UNKNOWN_KEY, WEIGHTS, residual_init, unknown_keys
from .config import check as check_config
from .earlier import LayoutProblem, upgrade_layout, layout_problem
from .keys import classify, state_dict
from .one_scale import with_one_scale
from .quirks import alpha_is_rank
from .reader import nested_adapter_hint, parse, parse_shapes, read, read_shapes, sniff, weight_files
from .stacks import stack_transposed_experts, expert_place, stack_experts
from .writer import config_text, saved_modules, write

__all__ = [
    "CONFIG", "INDEX", "INERT", "READ", "UNKNOWN_KEY", "WEIGHTS", "Outdated", "alpha_is_rank", "brought_forward",
    "check_config", "classify", "config_text", "folded", "in_stacks", "nested", "outdated", "parse", "parse_shapes",
    "place_of", "read", "read_shapes", "residual_init", "saved_modules", "sniff", "stacked", "state_dict",
    "unknown_keys", "weight_files", "write",
]  # fmt: skip
