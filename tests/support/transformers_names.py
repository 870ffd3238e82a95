"""The rules by which transformers renames tensors when it loads them, as `bases.names_in_memory` reads them.

`python -m tests.support.transformers_names` writes the table anew from the installed transformers, in some minutes: for every
class that its auto classes make, the rules that apply to it and to the models inside it (`conversion_mapping.py`,
`get_model_conversion_mapping`).
"""

from __future__ import annotations

import datetime
import functools
import json
import operator
import re
from collections.abc import Iterable, Iterator
from typing import Any

from tests.conftest import ROOT

TABLE = ROOT / "converters/adapterhub_converters/bases/names_in_memory.json"
# The class that stands for a model type is one of the first of these that has the type.
_AUTO_CLASSES = (
    "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "TEXT_TO_WAVEFORM",
    "MASKED_LM", "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "PRETRAINING",
)  # fmt: skip
_LAYER_COUNTS = (
    "num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers", "depth", "num_decoder_layers",
    "num_nextn_predict_layers", "num_mtp_layers",
)  # fmt: skip
# What the default config of a type lacks, or has in numbers that do not fit each other.
_MISSING_NUMBERS: dict[str, dict[str, Any]] = {
    "qwen3_omni_moe": {"talker_config.text_config.shared_expert_intermediate_size": 768, "talker_config.spatial_merge_size": 2},
    "aya_vision": {"vision_config.num_attention_heads": 16},
}
_BEHIND, _AHEAD = (
    re.compile(r"^((?:\(\?<!(?:[^()]|\([^()]*\))*\))+)"),
    re.compile(r"(\(\?!(?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))$"),
)


def classes_by_type() -> dict[str, list[str]]:
    """Return the classes that the auto classes make of each model type; the first stands for the type."""
    from transformers.models.auto import modeling_auto

    tables = {name: table for name, table in vars(modeling_auto).items() if re.fullmatch(r"MODEL_.*MAPPING_NAMES", name)}
    first = [table for task in _AUTO_CLASSES for name, table in tables.items() if name.startswith(f"MODEL_FOR_{task}_")]
    classes: dict[str, list[str]] = {}
    for table in (*first, *tables.values()):
        for model_type, names in table.items():
            for name in [names] if isinstance(names, str) else names:
                if name not in classes.setdefault(model_type, []):
                    classes[model_type].append(name)
    return classes


@functools.cache
def empty_model(model_type: str, class_name: str) -> Any:
    """Return a model of a class of transformers without memory for its weights; None if its default config makes none."""
    import torch
    import transformers

    model_class = getattr(transformers, class_name)
    for shorten in (True, False):
        try:
            config = transformers.CONFIG_MAPPING[model_type]()
            for part, number in _MISSING_NUMBERS.get(model_type, {}).items():
                inner = config if "." not in part else operator.attrgetter(part.rpartition(".")[0])(config)
                setattr(inner, part.rpartition(".")[2], number)
            if shorten:
                _shorten(config)
            with torch.device("meta"):
                return model_class(config)
        except Exception:  # whatever a class says of a config that it cannot be made of
            continue
    return None


def _shorten(config: Any) -> None:
    for name in _LAYER_COUNTS:
        if type(count := getattr(config, name, None)) is int and count > 2:
            setattr(config, name, 2)
    for part in config.sub_configs:
        if (inner := getattr(config, part, None)) is not None:
            _shorten(inner)


def transforms_of(model: Any) -> list[Any]:
    """Return the renamings of a model in their order, those of converters and of every model left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    transforms = get_model_conversion_mapping(model, add_legacy=False)
    return [transform for transform in transforms if isinstance(transform, WeightRenaming)]


def build_table() -> dict[str, Any]:
    """Return the table of the installed transformers."""
    import transformers
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

    keys = _build_checkpoint_conversion_mapping()
    # The first of several keys with the same rules stands for all.
    key_of: dict[str, str] = {}
    for key, transforms in keys.items():
        key_of.setdefault(json.dumps(list(_rules(transforms))), key)
    models: dict[str, Any] = {}
    types: dict[str, str] = {}
    for model_type, names in sorted(classes_by_type().items()):
        classes = [name for name in names if hasattr(transformers, name)]
        rows = {name: _row(model_type, name, key_of, keys, classes) for name in classes}
        if not any(row["rules"] for row in rows.values()):
            continue
        own_classes = [
            name for name in classes if _attribute(name, "config_class") in (None, transformers.CONFIG_MAPPING[model_type])
        ]
        if own_classes:
            models |= {name: rows[name] for name in own_classes}
            types[model_type] = own_classes[0]
        else:
            # Its class is another type's, which has other rules: the type stands for itself.
            models[model_type] = rows[classes[0]]
            types[model_type] = model_type
    used = {key for row in models.values() for _, key in row["rules"]}
    return {
        "transformers": transformers.__version__,
        "written": datetime.date.today().isoformat(),
        "rules": {key: list(_rules(transforms)) for key, transforms in keys.items() if key in used},
        "models": dict(sorted(models.items())),
        "types": types,
    }


def _row(model_type: str, class_name: str, key_of: dict[str, str], keys: dict[str, Any], classes: list[str]) -> dict[str, Any]:
    """Return the prefix of a class's base model, and its rules as the place of a model inside it and a key of the rules."""
    model = empty_model(model_type, class_name)
    prefix = _attribute(class_name, "base_model_prefix") or "model"
    groups: list[tuple[str | None, list[Any]]] = []
    if model is None:
        # What needs a library or numbers that are not here has at least its own rules and those of its base model.
        root = next((key for key in (class_name, model_type) if key in keys), "")
        inner = next((name for name in classes if name.endswith("Model") and name != class_name and name in keys), "")
        groups += [(place, list(keys[key])) for place, key in ((None, root), ("", inner)) if key]
    for transform in transforms_of(model) if model is not None else ():
        if not groups or groups[-1][0] != transform.scope_prefix:
            groups.append((transform.scope_prefix, []))
        groups[-1][1].append(transform)
    rules = [[place, key_of[json.dumps(list(_rules(transforms)))]] for place, transforms in groups]
    return {
        "prefix": prefix,
        "rules": [rule for rule, (_, transforms) in zip(rules, groups, strict=True) if list(_rules(transforms))],
    }


def _attribute(class_name: str, attribute: str) -> Any:
    """Return an attribute of a class of transformers; None if it needs a library that is not here."""
    import transformers

    try:
        return getattr(getattr(transformers, class_name), attribute, None)
    except ImportError:
        return None


def _rules(transforms: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield each renaming as a pattern without lookaround, what is put in its place, and its conditions if it has any."""
    from transformers import core_model_loading

    for transform in transforms:
        if not isinstance(transform, core_model_loading.WeightRenaming):
            continue
        if isinstance(transform, core_model_loading.LayerPairCollapse):
            yield from _layer_pairs()
        elif isinstance(transform, core_model_loading.PrefixChange):
            yield _prefix_rule(transform)
        elif isinstance(transform, core_model_loading.GroupWeightRename):
            guard = _rule(transform.source_patterns[0], "")[0]
            # One key is renamed once: from the last to the first, no result is renamed again.
            for source, target in reversed(list(zip(transform.source_patterns, transform.target_patterns, strict=True))):
                yield _rule(source, target, when=guard)
        else:
            conditions = {"add": transform.offset} if hasattr(transform, "offset") else {}
            for source in transform.source_patterns:
                yield _rule(source, transform.target_patterns[0], **conditions)


def _layer_pairs() -> Iterator[list[Any]]:
    """Yield the rules of `LayerPairCollapse`: layer 2i is the attention of layer i, and 2i + 1 its MLP."""
    for digits, name, new in (
        (r"\d*[02468]", "mixer", "self_attn"), (r"\d*[13579]", "mixer", "mlp"),
        (r"\d+", "attn_alpha", "lambda_1"), (r"\d+", "mlp_alpha", "lambda_2"),
    ):  # fmt: skip
        yield [rf"layers\.({digits})\.{name}\b", rf"layers.\1.{new}", {"divide": 2}]


def _prefix_rule(transform: Any) -> list[Any]:
    """Return the rule of a `PrefixChange`."""
    prefix = f"{transform.model_prefix}." if transform.model_prefix else ""
    if transform.prefix_to_remove is not None:
        return [f"^{re.escape(prefix + transform.prefix_to_remove)}\\.", prefix]
    added = f"{transform.prefix_to_add}."
    return [f"^{re.escape(prefix)}", prefix + added, {"not_before": re.escape(added)}]


def _rule(source: str, target: str, **conditions: Any) -> list[Any]:
    source = source.replace("*.", r".*\.")
    if behind := _BEHIND.search(source):
        parts = re.findall(r"\(\?<!((?:[^()]|\([^()]*\))*)\)", behind[1])
        conditions["not_after"] = f"(?:{'|'.join(parts)})$"
        source = source[behind.end() :]
    if ahead := _AHEAD.search(source):
        conditions["not_before"] = ahead[1][len("(?!") : -1]
        source = source[: ahead.start()]
    # A pattern ends on a name's boundary (core_model_loading.py, `WeightTransform`).
    elif re.search(r"[a-zA-Z0-9]$", source):
        source += r"\b"
    return [source, target, conditions] if conditions else [source, target]


def text_of(table: dict[str, Any]) -> str:
    """Return the table as JSON with a line for each rule and model."""

    def lines(rows: dict[str, Any]) -> str:
        return ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())

    rules = ",\n".join(
        f"  {json.dumps(key)}: [\n" + ",\n".join(f"   {json.dumps(rule)}" for rule in rules) + "\n  ]"
        for key, rules in table["rules"].items()
    )
    head = "".join(f" {json.dumps(key)}: {json.dumps(table[key])},\n" for key in ("transformers", "written"))
    models, types = lines(table["models"]), lines(table["types"])
    return f'{{\n{head} "rules": {{\n{rules}\n }},\n "models": {{\n{models}\n }},\n "types": {{\n{types}\n }}\n}}\n'


if __name__ == "__main__":
    TABLE.write_text(text_of(build_table()))
