"""What tells an archive of Tinker from a folder of peft's: the names of some tensors, which peft writes for no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from adapterhub_converters import safe_regex
from adapterhub_converters.containers import json_file

from .tensor_keys import PREFIX

_OWN = safe_regex.Pattern(
    r".*(?:\.unembed_tokens|\.experts\.w[123]|\.layers\.[0-9]{1,5}\.attn\.q_proj|\.linear_attn\.in_proj_q)\.lora_[AB](?:\.weight)?"
)
# What `target_modules` is where some name may be Tinker's own: in an archive as it is downloaded, and in one made for vLLM.
_OWN_TARGETS = ('"all-linear"', '"in_proj_q"')
# What Tinker has not, so that only peft's reader knows what it means.
_OPTIONS = (
    "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters",
    "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "fan_in_fan_out", "use_qalora",
)  # fmt: skip


def is_archive(config: str, tensor_names: Callable[[], Iterable[str]]) -> bool:
    """Return whether a folder is an archive of Tinker.

    Args:
        config: The text of its config.
        tensor_names: Returns the names of its tensors; called only if the config may be Tinker's.
    """
    if '"lora_alpha"' not in config or '"r"' not in config:
        return False
    if '"peft_type"' in config and not any(target in config for target in _OWN_TARGETS):
        return False
    document = json_file.parse_plain_object(config.encode()) or {}
    if document.get("peft_type", "LORA") != "LORA" or any(document.get(option) for option in _OPTIONS):
        return False
    names = tuple(tensor_names())
    return all(name.startswith(PREFIX) for name in names) and any(_OWN.fullmatch(name) for name in names)
