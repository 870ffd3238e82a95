"""PEFT: `adapter_config.json` beside `adapter_model.safetensors`."""

from .config import CONFIG, INERT, READ, residual_init, saved_modules
from .config import check as check_config
from .config import text as config_text
from .keys import classify
from .quirks import alpha_is_rank
from .reader import INDEX, WEIGHTS, config_of, nested, parse, parse_shapes, read, read_shapes, sniff, weight_files
from .state_dict import state_dict
from .writer import write

__all__ = [
    "CONFIG", "INDEX", "INERT", "READ", "WEIGHTS", "alpha_is_rank", "check_config", "classify", "config_of", "config_text", "nested",
    "parse", "parse_shapes", "read", "read_shapes", "residual_init", "saved_modules", "sniff", "state_dict", "weight_files",
    "write",
]  # fmt: skip
