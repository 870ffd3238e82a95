"""Break files of adapters and bases, and drive the command line over them: each run ends with an exit code that is documented.

    python tests/fuzz/fuzz_commands.py 2000 [--seed 0]

A mutation replaces a value of a JSON file, edits a tensor of a safetensors file so that its header still holds together, or
flips bytes. A finding is exit code 70, an exception, more than one line for an error, more than 5 seconds, or more than 500 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas")]

from adapterhub.cli import main as program  # noqa: E402
from adapterhub_converters import dtypes  # noqa: E402
from adapterhub_converters.containers import gguf_output, gguf_types, safetensors_header  # noqa: E402
from tests.support import folders  # noqa: E402

SECONDS, MEGABYTES = 5, 500
CODES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}
Files = dict[str, bytes]
Tensors = dict[str, tuple[str, tuple[int, ...]]]

_HUGE = json.loads("1e400")
_ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1e-320, _HUGE, 2**31, 2**63, 2**64, -(2**63), 10**300, 10**400,
    json.loads("[" * 150 + "]" * 150), "", "q_proj", "nan", "\ud800", "\x1b[31m",
    "\x00", "a" * 5000, ".", "..", "../x", "a/b", "(a|aa)+$", "a?" * 40 + "a" * 40, "all-linear", [], [[]], [None], [0],
    [-1], [1, 2], ["q_proj"],
    [2**63], {}, {"a": 1}, {"": {}}, {"q_proj": 2}, {"(": 1}, {"q_proj": _HUGE}, {"q_proj": "2"}, "float8_e4m3fn", "gptq",
     "awq", "mxfp4", "bitsandbytes",
]  # fmt: skip


def st(tensors: Tensors) -> bytes:
    """A safetensors file of any dtypes; random where that means something, else zeros."""
    rng, body = np.random.default_rng(0), bytearray()
    layout = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    for _, dtype, shape in layout:
        count = math.prod(shape)
        body += (
            rng.normal(size=count).astype(np.float32).tobytes() if dtype == "F32" else bytes(dtypes.BITS[dtype] * count // 8)
        )
    return safetensors_header.header_bytes(layout, {}) + bytes(body)


def of_folder(path: Path) -> Files:
    return {item.name: item.read_bytes() for item in path.iterdir() if item.is_file()}


def adapters(tmp: Path) -> dict[str, Files]:
    """A good adapter of each kind."""
    files_by_name = {
        "lora": of_folder(folders.adapter(tmp / "lora", folders.pairs(2), rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.0.*": 3},
                                          base_model_name_or_path="org/base", use_rslora=False)),
        "pissa": of_folder(folders.adapter(tmp / "pissa", folders.pairs(2), init_lora_weights="pissa")),
        "vera": of_folder(folders.vera(tmp / "vera", {"model.layers.0.self_attn.q_proj": 8}, (8, 8))),
    }  # fmt: skip
    m = "base_model.model.model.layers.0.self_attn.q_proj"
    e = "base_model.model.model.layers.0.mlp.experts"
    other_adapters: dict[str, tuple[dict[str, Any], Tensors]] = {
        "adalora": (
            {"peft_type": "ADALORA", "target_r": 2, "init_r": 2, "rank_pattern": {f"{m}.lora_E": [True, False]}},
            {f"{m}.lora_A": ("F32", (2, 8)), f"{m}.lora_B": ("F32", (8, 2)), f"{m}.lora_E": ("F32", (2, 1)),
             f"{m}.ranknum": ("F32", ())},
        ),
        "loha": (
            {"peft_type": "LOHA", "alpha": 4},
            {f"{m}.hada_w{n}_{h}": ("F32", (8, 2) if h == "a" else (2, 8)) for n in (1, 2) for h in "ab"},
        ),
        "lokr": (
            {"peft_type": "LOKR", "alpha": 4, "decompose_factor": -1},
            {f"{m}.lokr_w1": ("F32", (2, 2)), f"{m}.lokr_w2_a": ("F32", (4, 2)), f"{m}.lokr_w2_b": ("F32", (2, 4))},
        ),
        "dora": (
            {"use_dora": True, "lora_bias": True},
            {f"{m}.lora_A.weight": ("F32", (2, 8)), f"{m}.lora_B.weight": ("F32", (8, 2)),
             f"{m}.lora_magnitude_vector": ("F32", (8,)),
             f"{m}.lora_B.bias": ("F32", (8,))},
        ),
        "experts": (
            {"target_parameters": ["mlp.experts.down_proj"], "peft_version": "0.19.1", "target_modules": []},
            {f"{e}.lora_A.weight": ("F32", (8, 8)), f"{e}.lora_B.weight": ("F32", (8, 8))},
        ),
        "rows": (
            {"trainable_token_indices": {"embed_tokens": [1, 2]}, "layer_replication": [[0, 2]],
             "modules_to_save": ["lm_head"]},
            {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": ("F32", (2, 8)),
             "base_model.model.lm_head.weight": ("BF16", (12, 8)), f"{m}.lora_A.weight": ("F16", (2, 8)),
             f"{m}.lora_B.weight": ("F16", (8, 2))},
        ),
        "double": ({}, {f"{m}.lora_A.weight": ("F64", (2, 8)), f"{m}.lora_B.weight": ("F64", (8, 2))}),
        "half": ({}, {f"{m}.lora_A.weight": ("F8_E4M3", (2, 8)), f"{m}.lora_B.weight": ("F64", (8, 2))}),
    }  # fmt: skip
    for name, (config, tensors) in other_adapters.items():
        text = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config})
        files_by_name[name] = {"adapter_config.json": text.encode(), "adapter_model.safetensors": st(tensors)}
    pair: Tensors = {
        "model.layers.0.self_attn.q_proj.lora_a": ("F32", (8, 2)),
        "model.layers.0.self_attn.q_proj.lora_b": ("F32", (2, 8)),
    }
    mlx = {
        "fine_tune_type": "lora",
        "num_layers": 1,
        "model": "org/x",
        "lora_parameters": {"rank": 2, "scale": 2.0, "keys": ["q"]},
    }
    files_by_name["mlx"] = {"adapter_config.json": json.dumps(mlx).encode(), "adapters.safetensors": st(pair)}
    return files_by_name


_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 12, "intermediate_size": 16, "tie_word_embeddings": True, "rope_theta": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": 4,
}  # fmt: skip


def bases(tmp: Path) -> dict[str, Files]:
    """A good base of each kind."""
    folders.base(tmp / "whole")
    files_by_name = {
        "whole": of_folder(tmp / "whole") | {"tokenizer_config.json": b'{"chat_template": "x"}', "tokenizer.json": b"{}"}
    }
    moe = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 4,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 1,
    }
    deep = {
        "q_lora_rank": 4, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 4,
    }  # fmt: skip
    configs: dict[str, dict[str, Any]] = {
        "llama": {}, "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **moe},
        "deepseek": {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", **deep},
        "gpt2": {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 8,
        "n_positions": 9},
        "falcon": {"architectures": ["FalconForCausalLM"], "model_type": "falcon", "num_kv_heads": 1, "multi_query": True},
        "t5": {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 8, "d_ff": 8, "d_kv": 4,
        "num_heads": 2,
               "num_layers": 2, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu"},
        "mistral3": {"model_type": "mistral3", "text_config": dict(_LLAMA)},
    }  # fmt: skip
    files_by_name |= {name: {"config.json": json.dumps({**_LLAMA, **config}).encode()} for name, config in configs.items()}
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {"model.layers.0.self_attn.q_proj.weight": "model-00001-of-00001.safetensors"},
    }
    files_by_name["index"] = {
        "config.json": json.dumps(_LLAMA).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
    }
    q = "model.layers.0.self_attn.q_proj"
    e = "model.layers.0.mlp.experts"
    packed: dict[str, tuple[dict[str, Any], Tensors]] = {
        "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 8, "checkpoint_format": "gptq"},
                 {f"{q}.qweight": ("I32", (1, 8)), f"{q}.scales": ("F16", (1, 8)), f"{q}.qzeros": ("I32", (1, 1)),
                  f"{q}.g_idx": ("I32", (8,))}),
        "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"},
                {f"{q}.qweight": ("I32", (8, 1)), f"{q}.scales": ("F16", (1, 8)), f"{q}.qzeros": ("I32", (1, 1))}),
        "mxfp4": ({"quant_method": "mxfp4"},
                  {f"{e}.down_proj_blocks": ("U8", (2, 8, 1, 16)), f"{e}.down_proj_scales": ("U8", (2, 8, 1)),
                   f"{e}.down_proj_bias": ("BF16", (2, 8))}),
        "nvfp4": ({"quant_method": "modelopt"}, {f"{q}.weight": ("U8", (8, 4)), f"{q}.weight_scale": ("F8_E4M3", (8, 1))}),
        "mlxq": ({"group_size": 8, "bits": 4, q: {"group_size": 8, "bits": 4}},
                 {f"{q}.weight": ("U32", (8, 1)), f"{q}.scales": ("F16", (8, 1)), f"{q}.biases": ("F16", (8, 1))}),
        "compressed": ({"quant_method": "compressed-tensors"},
                       {f"{q}.weight_packed": ("I32", (8, 1)), f"{q}.weight_shape": ("I64", (2,)),
                        f"{q}.weight_scale": ("BF16", (8, 1))}),
        "bnb": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"},
                {f"{q}.weight": ("U8", (32, 1)), f"{q}.weight.absmax": ("F32", (1,)), f"{q}.weight.quant_map": ("F32", (16,)),
                 f"{q}.weight.quant_state.bitsandbytes__nf4": ("U8", (16,))}),
        "stacked": ({}, {f"{e}.gate_up_proj": ("BF16", (2, 8, 8)), f"{e}.down_proj": ("BF16", (2, 8, 4)),
        f"{q}.weight": ("F32", (8, 8))}),
    }  # fmt: skip
    for name, (settings, tensors) in packed.items():
        config = {**_LLAMA, "quantization_config": settings}
        if name in ("stacked", "mxfp4"):
            config |= {"architectures": ["MixtralForCausalLM" if name == "stacked" else "GptOssForCausalLM"]}
        raw = st(tensors)
        if name == "bnb":
            raw = raw[:-16] + b'{"shape": [8,8]}'
        files_by_name[name] = {"config.json": json.dumps(config).encode(), "model.safetensors": raw}
    return files_by_name


_GGUF = [
    ("blk.0.attn_q.weight", (8, 8)), ("blk.0.attn_qkv.weight", (24, 8)), ("token_embd.weight", (12, 8)),
     ("blk.0.attn_norm.weight", (8,)),
    ("blk.0.ffn_gate_exps.weight", (2, 8, 8)), ("blk.0.ffn_up_exps.weight", (2, 8, 8)), ("blk.0.ffn_down_exps.weight", (2, 8,
     8)),
    ("blk.0.attn_k_b.weight", (2, 4, 4)), ("blk.0.attn_v_b.weight", (2, 4, 4)), ("blk.0.ffn_gate_up_exps.weight", (2, 8, 8)),
    ("blk.0.ffn_gate_exps.bias", (2, 8)), ("blk.0.attn_output.weight", (8, 8)),
]  # fmt: skip


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


_AT_FIRST = _peak_memory()  # Linux counts what the parent had at the fork
_NUMBERS = {
    "block_count": 1, "attention.head_count": 2, "expert_count": 2, "attention.head_count_kv": 2, "attention.key_length": 4,
    "embedding_length": 8,
}  # fmt: skip


def gguf(rng: random.Random, architecture: str) -> bytes:
    """A GGUF base that holds together, with a number or a shape or two that make no sense."""
    metadata = {"general.architecture": gguf_types.string_value(architecture), "general.type": gguf_types.string_value("model")}
    metadata |= {f"{architecture}.{key}": gguf_types.u32_value(value) for key, value in _NUMBERS.items()}
    tensors = {name: shape for name, shape in _GGUF if rng.random() < 0.6}
    for _ in range(rng.randrange(3)):
        key = rng.choice(
            [*metadata, "split.no", "split.count", "split.tensors.count", "tokenizer.chat_template", "general.source.repo_url"]
        )
        metadata[key] = rng.choice(
            [gguf_types.u32_value(0), gguf_types.u32_value(2**32 - 1), gguf_types.string_value("\x1b[31m"),
             gguf_types.strings_value(["a"]),
             gguf_types.f32_value(float("nan")),
             gguf_types.f32_value(float("inf")), gguf_types.f32_value(-1.0), gguf_types.string_value("llama"),
             gguf_types.string_value("https://huggingface.co/a/\x07b")]
        )  # fmt: skip
    if tensors and rng.random() < 0.7:
        name = rng.choice(sorted(tensors))
        tensors[name] = rng.choice(
            [
                (),
                (0,),
                (1,),
                (7,),
                (0, 8),
                (8, 0),
                (2, 0, 8),
                (10**12, 8, 0),
                (10**12, 0, 8),
                (3, 7, 5),
                (1,) * 4,
                (2**62, 0),
                (8, 8, 1, 1),
            ]
        )
    return gguf_output.header_bytes(metadata, [(name, "F32", shape) for name, shape in tensors.items()]) + b"".join(
        bytes(-(-4 * int(np.prod([float(n) for n in shape])) // 32) * 32) for shape in tensors.values()
    )


_ARCHITECTURES = ("llama", "gpt-oss", "deepseek2", "falcon", "qwen3moe", "phi3", "bloom", "gpt2")


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def mutated_json(rng: random.Random, document: Any) -> Any:
    """One to three values replaced, dropped, wrapped, renamed or doubled."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = list(_places(document))
        if not places:
            return document
        *path, last = rng.choice(places)
        parent = document
        for key in path:
            parent = parent[key]
        kind = rng.randrange(10)
        if kind < 6:
            parent[last] = copy.deepcopy(rng.choice(_ODD))
        elif kind == 6:
            del parent[last]
        elif kind == 7:
            parent[last] = [parent[last]] if rng.random() < 0.5 else {"x": parent[last]}
        elif kind == 8 and isinstance(parent, dict):
            parent[str(rng.choice(["\ud800", "\x1b[2J", "", "a.b", "\n", "x" * 2000, str(last) + "x"]))] = parent.pop(last)
        elif isinstance(parent[last], int | float) and not isinstance(parent[last], bool):
            parent[last] = rng.choice(
                [-parent[last], parent[last] * 2, parent[last] + 1, parent[last] * 10**6, parent[last] * 1.5]
            )
    return document


def mutated_tensors(rng: random.Random, data: bytes) -> bytes:
    """A tensor of another name, dtype, shape or value, in a file that still holds together."""
    length = int.from_bytes(data[:8], "little")
    document = json.loads(data[8 : 8 + length])
    metadata = document.pop("__metadata__", {})
    tensors = {n: (t["dtype"], tuple(t["shape"]), data[8 + length :][slice(*t["data_offsets"])]) for n, t in document.items()}
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice(sorted(tensors))
        dtype, shape, raw = tensors.pop(name)
        kind = rng.randrange(6)
        if kind == 0:
            parts = name.split(".")
            parts[rng.randrange(len(parts))] = rng.choice(
                [
                    "",
                    "0",
                    "-1",
                    "99999999999",
                    "experts",
                    "lora_A",
                    "lora_B",
                    "weight",
                    "é",
                    "a" * 900,
                    "default",
                    "²",
                    "0" * 500,
                ]
            )
            name = ".".join(parts)
        elif kind == 1:
            dtype = rng.choice(sorted(dtypes.BITS))
        elif kind == 2 and shape:
            dims = list(shape)
            dims[rng.randrange(len(dims))] = rng.choice([0, 1, 2, 3, 7, 16, 100])
            shape = tuple(dims)
        elif kind == 3:
            shape = rng.choice(
                [
                    (),
                    (0,),
                    (1,),
                    (1, 1),
                    (10**12, 8, 0),
                    (2**62, 0),
                    (0, 2**33),
                    (10**12, 0, 8),
                    (*shape, 1),
                    (0, *shape),
                    shape[::-1],
                    (*shape, 0, 0, 0),
                    shape[1:],
                    (1,) * 16,
                ]
            )
        elif kind == 4 and dtype in ("F32", "F64"):
            bad = rng.choice([np.nan, np.inf, -np.inf, 3e38, 1e-45, 0.0, 65520.0, *([1e300, -1e160] if dtype == "F64" else [])])
            values = np.frombuffer(raw, np.float32 if dtype == "F32" else np.float64).copy()
            values[rng.randrange(len(values)) if len(values) and rng.random() < 0.7 else slice(None)] = bad
            raw = values.tobytes()
        elif kind == 5:
            continue  # gone
        size = dtypes.BITS[dtype] * math.prod(shape) // 8
        if size > 1 << 20:
            raise ValueError(shape)
        tensors[name or "x"] = (dtype, shape, (raw * (size // max(len(raw), 1) + 1))[:size] if raw else bytes(size))
    layout = [(name, dtype, shape) for name, (dtype, shape, _) in tensors.items()]
    return safetensors_header.header_bytes(layout, metadata) + b"".join(raw for _, _, raw in tensors.values())


def flipped(rng: random.Random, data: bytes) -> bytes:
    raw = bytearray(data)
    for _ in range(rng.choice([1, 2, 8])):
        at = rng.randrange(max(1, min(len(raw), 800)))
        value = rng.choice([0, 1, 255, 2**31, 2**63, 2**64 - 1, rng.randrange(256)])
        raw[at : at + (1 if value < 256 else 8)] = value.to_bytes(1 if value < 256 else 8, "little")
    return bytes(raw)


def mutated(rng: random.Random, files: Files) -> Files:
    """The files with one or two of them broken."""
    files = dict(files)
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice(sorted(files))
        with contextlib.suppress(LookupError, ValueError, TypeError, OverflowError):
            if rng.random() < 0.1 or name.endswith(".gguf"):
                files[name] = flipped(rng, files[name])
            elif name.endswith(".json"):
                files[name] = json.dumps(mutated_json(rng, json.loads(files[name]))).replace("Infinity", "1e400").encode()
            else:
                files[name] = mutated_tensors(rng, files[name])
    return files


class TooSlowError(BaseException):
    """Not an Exception, which the command line would turn into exit code 70."""


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise TooSlowError


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def outcome(arguments: list[str], seconds: int = SECONDS) -> tuple[int | None, str]:
    """The exit code of a command line, None if it ended otherwise, and what is wrong with the run, if anything."""
    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(seconds)
    code: int | None = None
    wrong = ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = program.run([*arguments, "--debug"])
            out.getvalue().encode("utf-8", "strict")
    except TooSlowError:
        wrong = f"more than {seconds} s\n{traceback.format_exc()}"
    except BaseException:
        wrong = traceback.format_exc()
    finally:
        signal.alarm(0)
    lines = [line for line in err.getvalue().splitlines() if line.startswith("error:")]
    if not wrong and (code not in CODES or len(lines) != (code not in (0, 1))):
        wrong = f"exit code {code}\n{err.getvalue()[-3000:]}"
    if not wrong and "Warning" in err.getvalue():
        wrong = err.getvalue()[-1000:]
    if not wrong and any(char in out.getvalue() + "".join(lines) for char in "\x1b\x00\x07\ud800"):
        wrong = "a control character is printed"
    if not wrong and "--json" in arguments:
        try:
            json.loads(out.getvalue(), parse_constant=_no_constant)
        except ValueError as error:
            wrong = f"no JSON: {error}"
    memory = _peak_memory()  # so far: told of every run after it, too
    return code, wrong or (f"{memory} MB" if memory > max(MEGABYTES, _AT_FIRST + 200) else "")


def commands(rng: random.Random, adapter: str, base: str, out: str) -> list[str]:
    """A command line over an adapter and a base."""
    to, read = rng.choice(["peft", "gguf", "mlx", "raw"]), rng.choice([[], ["--json"]])
    over = rng.choice([[], ["--base", base]])
    approximately = rng.choice(
        [[], ["--allow-approx"], ["--allow-approx", "--allow-drop", "weights,rows,magnitudes,biases,norms,copies"]]
    )
    dtype = rng.choice([[], [], ["--dtype", rng.choice(["f32", "f16", "bf16", "q8_0", "q4_0"])]])
    lines = [
        ["validate", adapter, *over, *read], ["validate", adapter, "--base", base, *read], ["validate", adapter, "--base",
         base, "--headers-only"],
        ["validate", adapter, *over, "--for", rng.choice(["peft", "transformers", "vllm", "llama.cpp", "mlx", "sglang"])],
        ["validate", adapter, *over, "--format", rng.choice(["sarif", "junit", "github"])], ["show", adapter, *over, *read],
        ["base", "show", base, *read], ["diff", adapter, "good", *over, *read], ["diff", "good", adapter, *over, *read],
        ["fix", adapter, "-o", out, *over, *read], ["fix", adapter, "--dry-run", *over], ["convert", adapter, out, "--to",
         to, *over, *dtype],
        ["convert", adapter, out, "--to", to, *over, *dtype, *approximately], ["convert", adapter, out, "--to", "gguf",
         "--base", base, *approximately],
        ["convert", base, out, "--to", "hf"], ["merge", adapter, "good", "-o", out, "--method", rng.choice(["cat", "linear",
         "svd", "ties", "della", "sce", "knots", "tsv", "karcher"])],
        ["merge", adapter, "--into", base, "-o", out],
    ]  # fmt: skip
    return rng.choice(lines)


def write_files(folder: Path, files: Files) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def run(runs: int, seed: int, *, seconds: int = SECONDS, keep: Path | None = None) -> list[str]:
    """The findings of so many mutated runs, each with its command line; `keep` is where the files of each stay."""
    rng, findings = random.Random(seed), list[str]()
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        tmp = Path(name)
        (tmp / "a").mkdir()
        (tmp / "b").mkdir()
        good, bases_by_name = adapters(tmp / "a"), bases(tmp / "b")
        write_files(tmp / "good", good["lora"])
        for number in range(runs):
            kind, base_kind = rng.choice(sorted(good)), rng.choice([*bases_by_name, *_ARCHITECTURES])
            unchanged_part = rng.randrange(3)
            files = mutated(rng, good[kind]) if unchanged_part != 0 else good[kind]
            base_files = bases_by_name.get(base_kind) or {"x.gguf": gguf(rng, base_kind)}
            if unchanged_part != 1 and (base_kind in bases_by_name or rng.random() < 0.2):
                base_files = mutated(rng, base_files)
            adapter = write_files(tmp / "adapter", files)
            base = write_files(tmp / "base", base_files)
            place = str(base / "x.gguf") if base_kind in _ARCHITECTURES else str(base)
            shutil.rmtree(tmp / "out", ignore_errors=True)
            (tmp / "out").unlink(missing_ok=True)
            arguments = commands(rng, adapter.name, place, "out")
            code, wrong = outcome(arguments, seconds)
            half = [item.name for item in tmp.iterdir() if item.name not in ("a", "b", "good", "adapter", "base", "out")]
            if code not in (0, 1) and ((tmp / "out").exists() or half) and not wrong:
                wrong = f"exit code {code} and left {half or 'out'}"
            for item in half:
                shutil.rmtree(tmp / item, ignore_errors=True)
            if wrong:
                findings.append(f"{seed}:{number} {kind} {base_kind} {' '.join(arguments)}\n{wrong}")
                if keep:
                    write_files(keep / f"{seed}-{number}/adapter", files)
                    write_files(keep / f"{seed}-{number}/base", base_files)
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="how long a run may take")
    parser.add_argument("--keep", type=Path, help="where the files of findings stay")
    options = parser.parse_args()
    findings = run(options.runs, options.seed, seconds=options.seconds, keep=options.keep)
    for finding in findings:
        print(finding, file=sys.stderr)
    raise SystemExit(bool(findings))


if __name__ == "__main__":
    main()
