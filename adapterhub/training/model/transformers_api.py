"""The only module that asks transformers for a config, a tokenizer or a model, without running code of a base or downloading.

A base may bring its own Python code (`auto_map`), name a config for each version of transformers (`configuration_files`) or
attention kernels of a hub (`attn_implementation`). transformers gets a copy of its config.json without them; a base that does
not work without its code is refused by name, before transformers could ask whether to run it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from adapterhub.training.layers import expert_stacks, row_attention
from adapterhub_converters import safe_regex
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, RefusedError

from . import tokenizer_search

_CONFIG, _TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
# Keys, at any depth of a config, that name code, kernels or other files.
_CODE_KEYS = safe_regex.Pattern("auto_map|configuration_files|custom_generate|_?(attn|experts)_implementation(_internal)?")
_LOCAL_OPTIONS = {"trust_remote_code": False, "local_files_only": True}


def config_and_tokenizer(folder: Path, document: dict[str, Any], *, location: str) -> tuple[Any, Any]:
    """Return the config and the tokenizer of a base.

    Args:
        folder: The folder with the tokenizer's files.
        document: The contents of its config.json.
        location: The base, in messages.

    Raises:
        RefusedError: It needs its own code.
        FormatError: transformers cannot build them.
    """
    import transformers

    _check_model_type(document, location)
    with _transformers_errors(location), tempfile.TemporaryDirectory() as temporary:
        json_file.write_text(Path(temporary, _CONFIG), json.dumps(_without_code(document)))
        config = transformers.AutoConfig.from_pretrained(temporary, **_LOCAL_OPTIONS)
        config._name_or_path = str(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, config=config, **_LOCAL_OPTIONS)
    tokenizer_class = type(tokenizer)
    expression_trial = tokenizer_search.ExpressionTrial(tokenizer, location)
    # A subclass of the tokenizer's own class with the same name, so that everything else stays as it was.
    tokenizer.__class__ = type(
        tokenizer_class.__name__, (_SafeTokenizer, tokenizer_class), {"location": location, "search": expression_trial}
    )
    tokenizer.stop_tokens = stop_tokens(folder)
    return config, tokenizer


def stop_tokens(folder: Path) -> frozenset[int]:
    """Return the ids at which a base stops generating, according to its generation_config.json."""
    path = folder / "generation_config.json"
    token_ids = json_file.read_object(path).get("eos_token_id") if path.is_file() else None
    return frozenset(item for item in (token_ids if isinstance(token_ids, list) else [token_ids]) if type(item) is int)


class _SafeTokenizer:
    """A mix-in for tokenizers that neither hang nor panic: any error of tokenizers (Rust) about a text becomes one line."""

    location: str
    search: tokenizer_search.ExpressionTrial
    stop_tokens: frozenset[int]

    def __call__(self, text: Any, **options: Any) -> Any:
        self.search.check(text)
        with _tokenizer_errors(self.location):
            return super().__call__(text, **options)  # type: ignore[misc]

    def decode(self, *args: Any, **options: Any) -> Any:
        with _tokenizer_errors(self.location):
            return super().decode(*args, **options)  # type: ignore[misc]


@contextmanager
def _tokenizer_errors(location: str) -> Iterator[None]:
    try:
        yield
    # PyO3 raises PanicException, which is no Exception; other errors of tokenizers are plain Exceptions.
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise FormatError(location, f"its tokenizer gives up on a text ({str(error)[:200]})", "Use another base") from error


def empty_model(config: Any, dtype: torch.dtype, *, location: str) -> Any:
    """Build the causal model of `config` without weights, with the attention of `layers.row_attention` if possible.

    A vision-language model is built as peft users load it; the caller removes its vision parts (`base_model.remove_vision`).
    """
    import transformers

    with _transformers_errors(location):
        causal_models, vision_models = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
        auto_class = causal_models if type(config) in causal_models._model_mapping else vision_models
        family = auto_class._model_mapping[type(config)]
        options = {"attn_implementation": row_attention.register()} if row_attention.suits(family) else {}
        # On the meta device, parameters have shapes but no memory.
        with torch.device("meta"):
            model = auto_class.from_config(config, dtype=dtype, trust_remote_code=False, **options)
    # transformers looks up the implementation of experts by its name in their config.
    name = expert_stacks.register()
    for module in model.modules():
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
            module.config._experts_implementation = name
    return model


def float32_parameters(model: Any, dtype: torch.dtype) -> set[str]:
    """Return the names of the parameters that transformers keeps in float32 when it loads `model` in `dtype`."""
    from transformers.core_model_loading import build_glob_alternation

    patterns = list(model._get_dtype_plan(dtype))
    matches = build_glob_alternation(patterns)[0].search if patterns else lambda _name: None
    return {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if matches(name) or (parameter.is_meta and parameter.dtype == torch.float32)
    }


def _check_model_type(document: dict[str, Any], location: str) -> None:
    from transformers import CONFIG_MAPPING

    model_type = document.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return
    code = "; the base brings code for it, which is not run" if "auto_map" in document else ""
    hint = "Use a base whose model is part of transformers, or a newer transformers"
    raise RefusedError(
        f"{location}: {_CONFIG}",
        f"transformers has no model of type {str(model_type)[:80]!r}{code}",
        hint,
        code="unsupported-architecture",
    )


def _without_code(value: Any) -> Any:
    """Return the config without keys that name code or other files."""
    if isinstance(value, dict):
        return {key: _without_code(item) for key, item in value.items() if not _CODE_KEYS.fullmatch(key)}
    return [_without_code(item) for item in value] if isinstance(value, list) else value


@contextmanager
def _transformers_errors(location: str) -> Iterator[None]:
    """Within the block, block the network, and turn any error of transformers about a base into one line."""
    try:
        with _offline():
            yield
    # Running out of memory is not the fault of the base.
    except MemoryError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            problem = f"{_TOKENIZER_CONFIG}: needs code of its own, which is not run"
            raise RefusedError(location, problem, "Use a base whose tokenizer is part of transformers") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(location, f"transformers cannot build it ({reason[:200]})") from error


@contextmanager
def _offline() -> Iterator[None]:
    """Within the block, make huggingface_hub refuse every request: some models ask for kernels while they are built."""
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline
