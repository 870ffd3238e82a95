"""Rules for the runtimes that load adapters, as data, each taken from that program's own source.

A rule maps a *feature* of an adapter (or of an adapter on a base) to a verdict. `adapterhub.checks` finds the features; this
module only has the rules. If a runtime reads another format than the adapter's, the verdict is the one after a conversion,
which folds rsLoRA and patterns and refuses everything that the format does not support.
"""

from __future__ import annotations

from typing import Literal

from adapterhub_converters.lazy_dataclass import dataclass

RuntimeName = Literal["peft", "transformers", "vllm", "llama.cpp", "mlx", "sglang"]
"""The names of `RUNTIMES`."""
# Verdicts are plain text, since they appear in reports and documentation.
APPLIED, UNKNOWN, IGNORED, WRONG, REFUSED, CRASHES = "applied", "unknown", "ignored", "wrong", "refused", "crashes"
VERDICTS = (APPLIED, UNKNOWN, IGNORED, WRONG, REFUSED, CRASHES)
"""Best first: as trained; of a kind that is not known here; partly or wholly without effect; another result; an error at load;
the process crashes.
"""


@dataclass(frozen=True, slots=True)
class Rule:
    """The verdict for a feature; `text` is the runtime's own message if it has one, or, for APPLIED, a condition."""

    feature: str
    verdict: str
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Runtime:
    """A program that loads adapters: the version that its rules describe, and the format that it reads.

    Attributes:
        judged: The codes of problems that its rules judge, where others do not load the adapter at all.
    """

    name: str
    version: str
    format: str
    rules: tuple[Rule, ...]
    judged: frozenset[str] = frozenset()


_VLLM = "vllm/lora/peft_helper.py, _validate_features"
_VLLM_MODELS = "adapterhub_converters/runtime_models.json, of vllm/model_executor/models/registry.py"
_VLLM_MANAGER = "vllm/lora/model_manager.py, _create_lora_modules"
_VLLM_NAMES = "vllm/lora/utils.py, parse_fine_tuned_lora_name"
_VLLM_EXPECTED = "vllm/lora/lora_model.py, check_unexpected_modules"
_LLAMA = "llama.cpp src/llama-adapter.cpp, llama_adapter_lora_init_impl"
_SGLANG = "sglang/srt/lora/lora_manager.py, validate_new_adapter"
_SGLANG_LORA = "sglang/srt/lora/lora.py, LoRAAdapter"
_SGLANG_MODELS = "adapterhub_converters/runtime_models.json, of sglang/srt/models, EntryClass"
_SGLANG_POOL = "sglang/srt/lora/mem_pool.py, load_lora_weight_to_buffer"
_PEFT = "peft/utils/save_and_load.py, set_peft_model_state_dict"
_PEFT_EXPERTS = "peft/utils/transformers_weight_conversion.py; peft/tuners/lora/layer.py, ParamWrapper"
_MLX = "mlx_lm/tuner/utils.py, load_adapters"
_MLX_NAMES = "adapterhub_converters/formats/mlx/module_names.py, ROWS"
_MLX_EMBED = "mlx_lm/tuner/lora.py, LoRAEmbedding.as_linear"

_INFERRED = "inferred:"
"""Prefix of the source of a rule that was inferred from other code rather than read in these lines."""

_NAMES = "adapterhub_converters/architectures/architecture_lookup.py, ADAPTERS"
_KINDS = "adapterhub_converters/adapter/adapter.py, plain_pairs"
_VLLM_KINDS = f"{_INFERRED} vllm/lora/peft_helper.py, _validate_features"

_UNCOVERED = "correct only if the modules without tensors were not trained: they stay as in the base"


def _condition_rules(source: str) -> tuple[Rule, Rule]:
    """Return the rules of a runtime that applies an adapter to every token, and has each layer once."""
    return (
        Rule("condition", REFUSED, "has no layer_replication", source),
        Rule("alora", REFUSED, "has no aLoRA: it would apply the adapter to every token", source),
    )


def _missing_rule(source: str) -> Rule:
    """Return the rule of a runtime that applies what an adapter has, without a tensor that its config names."""
    return Rule("missing-tensor", WRONG, "applies the rest alone: the file lacks {name}, which training changed", source)


# What peft and transformers make of names, shapes and options in peft's format is not here: `adapterhub.checks.peft_load`
# follows their steps.
_PEFT_RULES = (
    Rule("shape", REFUSED, "size mismatch for …: copying a param with shape … from checkpoint", _PEFT),
    Rule("not-floats", WRONG, "takes the numbers as they are, without the scale of a quantization: {what}", _PEFT),
    Rule("deeper", WRONG, "loads and reports missing keys: layers without tensors are not adapted", _PEFT),
    Rule("uncovered", APPLIED, f"reports missing keys; {_UNCOVERED}", _PEFT),
    Rule(
        "unknown-key",
        APPLIED,
        "ignores {key} with a warning: correct only if that changes nothing",
        "peft/config.py, from_peft_type",
    ),
    *(Rule(f"experts-{verdict}", verdict, "{what}", _PEFT_EXPERTS) for verdict in (IGNORED, WRONG, REFUSED)),
    Rule(
        "init-random",
        WRONG,
        "init_lora_weights {init}: loading changes the base again, but not as training did",
        "peft/tuners/lora/layer.py, reset_lora_parameters",
    ),
    Rule(
        "init-lost",
        WRONG,
        "init_lora_weights {init} changed the base as training began, and loading does not",
        "peft/tuners/lora/layer.py, lora_ga_init",
    ),
    Rule(
        "init-exact",
        APPLIED,
        "init_lora_weights {init} changes the base again as it is loaded: correct only on the exact base it was trained on",
        "peft/tuners/lora/layer.py, reset_lora_parameters",
    ),
)
_PEFT_OWN = (Rule("no-module", IGNORED, "keys for which the base has no module are silently skipped (strict=False)", _PEFT),)

_LOAD_ADAPTER = "transformers/integrations/peft.py, load_adapter"
_TRANSFORMERS_OWN = (
    Rule("rank-config", REFUSED, "size mismatch for …: the config and the tensors disagree on the rank", _PEFT),
    Rule("magnitude-flag", IGNORED, "magnitudes are skipped unless use_dora is true", _PEFT),
    Rule("no-magnitude", WRONG, "reports missing keys: magnitudes keep their initial values", _PEFT),
    Rule("bias-flag", IGNORED, "lora_B.bias is skipped unless lora_bias is true", _PEFT),
    Rule(
        "old-targets",
        REFUSED,
        "Target modules … not found in the base model: transformers 5 renamed {module}",
        "peft/tuners/tuners_utils.py, inject_adapter",
    ),
    Rule("peft-refuses", REFUSED, "{what}", "peft/tuners/tuners_utils.py, inject_adapter"),
    Rule("no-module", IGNORED, "reports keys for which the base has no module as UNEXPECTED and skips them", _LOAD_ADAPTER),
    Rule("not-targeted", IGNORED, "reports tensors of modules that target_modules does not name and skips them", _LOAD_ADAPTER),
    Rule("dora", WRONG, "reports lora_magnitude_vector as MISSING and keeps the base's norms; peft loads it", _LOAD_ADAPTER),
    Rule("alora", WRONG, "applies the adapter to every token; only peft's own forward detects the invocation", _LOAD_ADAPTER),
)

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime("peft", "0.21.2", "peft", (*_PEFT_RULES, *_PEFT_OWN)),
        Runtime("transformers", "5.24.0", "peft", (*_PEFT_RULES, *_TRANSFORMERS_OWN)),
        Runtime(
            "vllm",
            "0.33.0",
            "peft",
            (
                Rule("vllm-without-lora", REFUSED, "{model} does not support LoRA yet.", _VLLM_MODELS),
                Rule("vllm-removed", REFUSED, "{model}", _VLLM_MODELS),
                Rule("vllm-unlisted", UNKNOWN, "{model} is not among its models; transformers may run it there", _VLLM_MODELS),
                Rule("vllm-tower", IGNORED, "{module}", _VLLM_MANAGER),
                Rule(
                    "vllm-table",
                    REFUSED,
                    "expected target modules in …, but received {module}: no LoRA on it",
                    "vllm/lora/utils.py, get_supported_lora_modules",
                ),
                Rule("vllm-name", REFUSED, "{name} is unsupported LoRA weight", _VLLM_NAMES),
                Rule("vllm-path", UNKNOWN, "{name}: it finds modules by these paths alone; name the base to know", _VLLM_NAMES),
                Rule("vllm-dropped", IGNORED, "{module} is no module of the base, and is dropped (vllm #34186)", _VLLM_MANAGER),
                *(
                    Rule(feature, REFUSED, "expected target modules in …, but received {module}", _VLLM_EXPECTED)
                    for feature in ("vllm-unexpected", "vllm-unlike-any")
                ),
                Rule(
                    "vllm-half-refused",
                    REFUSED,
                    "{module} has one of its two matrices: vLLM needs both",
                    "vllm/lora/layers/base_linear.py, set_lora",
                ),
                Rule(
                    "vllm-half-lost",
                    IGNORED,
                    "{module} has one of its two matrices: vLLM leaves this part of a fused layer as it is",
                    "vllm/lora/layers/column_parallel_linear.py, set_lora",
                ),
                Rule("vllm-unwrapped", IGNORED, "{module} could not be wrapped by any LoRA layer: left out", _VLLM_MANAGER),
                Rule("vllm-elsewhere", IGNORED, "{module} has another name in vLLM, which drops it", _VLLM_MANAGER),
                Rule(
                    "vllm-stacked",
                    REFUSED,
                    "reads experts of this model one by one unless enable_mixed_moe_lora_format is set",
                    "vllm/lora/model_manager.py, _validate_moe_lora_format",
                ),
                Rule(
                    "vllm-numbered",
                    REFUSED,
                    "expected target modules in …, but received {module}: experts of this model are one stack",
                    _VLLM_EXPECTED,
                ),
                Rule(
                    "vllm-half",
                    REFUSED,
                    "AssertionError: experts need a delta on gate_up_proj and on down_proj",
                    "vllm/lora/model_manager.py, _stack_moe_lora_weights",
                ),
                Rule(
                    "experts-of-unknown-model",
                    UNKNOWN,
                    "reads stacked experts of some models; name the base to know",
                    "vllm/lora/model_manager.py, _validate_moe_lora_format",
                ),
                Rule("dora", REFUSED, "vLLM does not yet support DoRA.", _VLLM),
                Rule("lora-bias", REFUSED, "vLLM does not support LoRA bias (lora_bias).", _VLLM),
                Rule("bias", REFUSED, "Adapter bias is not supported.", "vllm/lora/peft_helper.py, validate_legal"),
                Rule(
                    "modules-to-save",
                    REFUSED,
                    "vLLM only supports modules_to_save being either None or [classifier, score]",
                    _VLLM,
                ),
                Rule("norms", REFUSED, "vLLM only supports modules_to_save being either None or [classifier, score]", _VLLM),
                Rule("other-kind", REFUSED, "reads pairs of matrices only", _VLLM_KINDS),
                *_condition_rules(_VLLM_KINDS),
                Rule("rows", REFUSED, "… is unsupported LoRA weight", _VLLM_NAMES),
                Rule("adapter-name", REFUSED, "{name} is unsupported LoRA weight", _VLLM_NAMES),
                Rule(
                    "config-modules-to-save",
                    REFUSED,
                    "vLLM only supports modules_to_save being either None or [classifier, score]",
                    _VLLM,
                ),
                _missing_rule("vllm/lora/lora_model.py, from_lora_tensors"),
                Rule("init", REFUSED, "vLLM does not support init_lora_weights={init}: it changes the base", _VLLM),
                Rule("init-lost", WRONG, "init_lora_weights {init} changed the base as training began", _VLLM),
                Rule("rank-over-16", APPLIED, "start it with max_lora_rank={rank} (default 16)", "vllm/config/lora.py"),
                Rule("shape", WRONG, "silently pads a smaller matrix with zeros", "vllm/lora/layers/base_linear.py"),
                Rule(
                    "vocab", REFUSED, "The embedding LoRA size must be consistent with the base model's vocabulary size", _VLLM
                ),
                Rule("no-module", IGNORED, "paths without a module are dropped (vllm #34186)", "vllm/lora/model_manager.py"),
                Rule("deeper", WRONG, "layers without tensors are silently left unadapted", "vllm/lora/model_manager.py"),
                Rule("uncovered", APPLIED, _UNCOVERED, "vllm/lora/model_manager.py"),
            ),
            frozenset({"key-prefix", "unknown-tensor", "missing-half"}),
        ),
        Runtime(
            "llama.cpp",
            "0c1e57098",
            "gguf",
            (
                Rule("dora", REFUSED, "GGUF has no DoRA magnitude; merge the adapter into its base", "convert_lora_to_gguf.py"),
                Rule(
                    "lora-bias",
                    REFUSED,
                    "GGUF adapters have no bias; merge the adapter into its base",
                    "convert_lora_to_gguf.py",
                ),
                Rule("bias", REFUSED, "GGUF adapters have no bias; merge the adapter into its base", "convert_lora_to_gguf.py"),
                Rule(
                    "modules-to-save",
                    REFUSED,
                    "GGUF adapters cannot replace a whole tensor; merge the adapter into its base (llama.cpp #11554)",
                    "convert_lora_to_gguf.py",
                ),
                Rule("norms", REFUSED, "the loader skips *_norm.weight, so the conversion refuses it", _LLAMA),
                Rule("kind-unsettled", REFUSED, "reads pairs of matrices only", _KINDS),
                Rule("condition", REFUSED, "has no layer_replication", _KINDS),
                Rule(
                    "alora",
                    APPLIED,
                    "by llama-server, from the invocation tokens on; other programs apply it to every token",
                    "tools/server/server-context.cpp, alora_invocation_start",
                ),
                Rule("copies-unsettled", REFUSED, "the conversion must verify that the copy is the base's own", _KINDS),
                Rule(
                    "rows-unsettled",
                    REFUSED,
                    "GGUF adapters cannot replace single rows; convert it with its untied base, or merge it into the base",
                    _LLAMA,
                ),
                Rule("init-unsettled", REFUSED, "init_lora_weights {init}: the delta also needs the initial adapter", _LLAMA),
                _missing_rule(_KINDS),
                Rule("tied-embedding", CRASHES, "GGML_ASSERT(ggml_can_mul_mat(a, b)): the process aborts", "ggml/src/ggml.c"),
                Rule("tied-lm-head", REFUSED, "LoRA tensor 'output.weight' does not exist in base model", _LLAMA),
                Rule("unmapped", REFUSED, "{module} has no verified name in llama.cpp, so the conversion refuses it", _NAMES),
                Rule("mla", IGNORED, "loads, but the compute graph bypasses the adapter", "src/models/deepseek2.cpp"),
                Rule("shape", REFUSED, "tensor '…' has incorrect shape (hint: maybe wrong base model?)", _LLAMA),
                Rule(
                    "no-module", REFUSED, "LoRA tensor '…' does not exist in base model (hint: maybe wrong base model?)", _LLAMA
                ),
                Rule("deeper", WRONG, "silently accepts a deeper base", _LLAMA),
                Rule("uncovered", APPLIED, _UNCOVERED, _LLAMA),
                Rule(
                    "rslora",
                    APPLIED,
                    "convert with adapterhub: llama.cpp's own script ignores rsLoRA",
                    "convert_lora_to_gguf.py:528",
                ),
                Rule(
                    "alpha-pattern",
                    APPLIED,
                    "convert with adapterhub: llama.cpp's own script ignores alpha_pattern",
                    "convert_lora_to_gguf.py:528",
                ),
                Rule(
                    "conv1d",
                    APPLIED,
                    "convert with adapterhub: llama.cpp's own script transposes Conv1D",
                    "conversion/gpt2.py:34",
                ),
            ),
        ),
        Runtime(
            "mlx",
            "mlx-lm main as of 2026-11",
            "mlx",
            (
                Rule("encoder", REFUSED, "Model type {model} not supported.", "mlx_lm/utils.py, _get_classes"),
                Rule("tied-embedding", REFUSED, "mlx-lm has one delta for a table and the output layer tied to it", _MLX_EMBED),
                Rule("conv1d", REFUSED, "mlx-lm has no transposed modules", _MLX),
                Rule("tied-lm-head", REFUSED, "mlx-lm has no separate output layer where a model ties it", _MLX),
                Rule("lora-bias", REFUSED, "MLX adapters have no bias; merge the adapter into its base", _MLX),
                Rule("bias", REFUSED, "MLX adapters have no bias; merge the adapter into its base", _MLX),
                Rule("modules-to-save", REFUSED, "MLX adapters cannot replace a tensor; merge the adapter into its base", _MLX),
                Rule("norms", REFUSED, "MLX adapters cannot replace a tensor; merge the adapter into its base", _MLX),
                Rule("not-in-mlx", REFUSED, "{module}", _MLX_NAMES),
                Rule("kind-unsettled", REFUSED, "reads pairs of matrices only", _KINDS),
                *_condition_rules(_KINDS),
                Rule("copies-unsettled", REFUSED, "the conversion must verify that the copy is the base's own", _KINDS),
                Rule(
                    "rows-unsettled",
                    REFUSED,
                    "MLX adapters cannot replace single rows; convert it with its untied base, or merge it into the base",
                    _MLX,
                ),
                Rule("init-unsettled", REFUSED, "init_lora_weights {init}: the delta also needs the initial adapter", _MLX),
                _missing_rule(_KINDS),
                Rule("shape", REFUSED, "Adapter at … contains incompatible tensors", _MLX),
                Rule("no-module", REFUSED, "Adapter at … contains incompatible tensors", _MLX),
                Rule("deeper", WRONG, "puts the adapter on the last layers of a deeper base", _MLX),
                Rule("uncovered", APPLIED, _UNCOVERED, _MLX),
            ),
        ),
        Runtime(
            "sglang",
            "0.5.23",
            "peft",
            (
                Rule(
                    "sglang-unlisted", UNKNOWN, "{model} is not among its models; transformers may run it there", _SGLANG_MODELS
                ),
                Rule(
                    "sglang-size",
                    REFUSED,
                    "get_hidden_dim not implemented for {module}",
                    "sglang/srt/lora/utils.py, get_hidden_dim",
                ),
                Rule("sglang-tower", CRASHES, "takes {module} for a layer of the language model", _SGLANG_LORA),
                Rule("sglang-layerless", IGNORED, "{module} is in no numbered layer, and is skipped silently", _SGLANG_LORA),
                Rule("dora", REFUSED, "LoRA serving currently doesn't support DoRA adapters", _SGLANG),
                Rule("rslora", WRONG, "scales by alpha / r regardless of use_rslora", _SGLANG_LORA),
                Rule(
                    "rank-pattern",
                    CRASHES,
                    "LoRA buffer shape … does not match weight shape …, in the first batch",
                    _SGLANG_POOL,
                ),
                Rule("alpha-pattern", WRONG, "scales by alpha / r regardless of alpha_pattern", _SGLANG_LORA),
                Rule(
                    "target-pattern",
                    REFUSED,
                    "Only 'all' or 'all-linear' can be used as the string for target module",
                    "sglang/srt/lora/utils.py, get_normalized_target_modules",
                ),
                Rule("q-without-v", REFUSED, "KeyError: fuses q, k and v, and {module}", _SGLANG_LORA),
                Rule("part-of-fused", CRASHES, "Cannot find target module name, in the first batch: {module}", _SGLANG_POOL),
                Rule("lora-bias", IGNORED, "biases are not loaded", f"{_INFERRED} {_SGLANG_LORA}"),
                Rule("bias", IGNORED, "biases are not loaded", f"{_INFERRED} {_SGLANG_LORA}"),
                Rule(
                    "modules-to-save",
                    IGNORED,
                    "whole tensors are not loaded",
                    f"{_INFERRED} {_SGLANG_LORA}",
                ),
                Rule("norms", IGNORED, "whole tensors are not loaded", f"{_INFERRED} {_SGLANG_LORA}"),
                Rule(
                    "experts",
                    REFUSED,
                    "stacked experts are not loaded from target_parameters",
                    f"{_INFERRED} {_SGLANG_LORA}",
                ),
                Rule("other-kind", REFUSED, "reads pairs of matrices only", f"{_INFERRED} {_SGLANG_LORA}"),
                *_condition_rules(f"{_INFERRED} {_SGLANG_LORA}"),
                Rule("rows", IGNORED, "replaced rows are not loaded", f"{_INFERRED} {_SGLANG_LORA}"),
                Rule("init", WRONG, "ignores init_lora_weights {init}", f"{_INFERRED} sglang/srt/lora/lora_config.py"),
                Rule("init-lost", WRONG, "ignores init_lora_weights {init}", f"{_INFERRED} sglang/srt/lora/lora_config.py"),
                _missing_rule(f"{_INFERRED} {_SGLANG_LORA}"),
                Rule("shape", CRASHES, "compares shapes only when computing a batch", _SGLANG_POOL),
                Rule(
                    "no-module",
                    IGNORED,
                    "weights without a module are left out",
                    f"{_INFERRED} {_SGLANG_LORA}",
                ),
                Rule(
                    "deeper",
                    WRONG,
                    "layers without tensors are silently left unadapted",
                    f"{_INFERRED} sglang/srt/lora/mem_pool.py",
                ),
                Rule("uncovered", APPLIED, _UNCOVERED, f"{_INFERRED} sglang/srt/lora/mem_pool.py"),
            ),
        ),
    )
}
