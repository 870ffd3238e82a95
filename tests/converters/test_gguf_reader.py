"""GGUF adapters: llama.cpp computes what peft computes, and the way back to PEFT loses no byte."""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_converters.adapter import Adapter, Loss, LowRank, Meta
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.bases import BaseSpec, read_base
from adapterhub_converters.containers import gguf_output, gguf_types
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.containers.gguf_types import MetadataValue, f32_value, string_value
from adapterhub_converters.errors import AdapterhubError, FormatError, RefusedError
from adapterhub_converters.formats import convert, peft
from adapterhub_converters.formats import gguf as gguf_lora
from tests.conftest import need_module
from tests.support import llama_cpp, tiny

TOKENS = [3, 17, 99, 5, 64, 23, 101, 7]

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 4},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8}},
    "alpha_pattern": {"alpha_pattern": {"k_proj": 16, "v_proj": 2}},
    "uneven_alpha": {"alpha_pattern": {"k_proj": 11, "v_proj": 3}},
    "rslora_ranks": {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 5}},
    "half_of_it_off": {"alpha_pattern": {"mlp.*": 0}},
    "negative": {"lora_alpha": -8},
    "some_modules": {"target_modules": ["q_proj", "k_proj"], "r": 16, "lora_alpha": 32},
    "head": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
}


def peft_logits(wrapped: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        logits: np.ndarray = wrapped(torch.tensor([TOKENS])).logits[0].float().numpy()
    return logits


def same_bytes(first: Path, second: Path) -> None:
    for name in (peft.CONFIG, peft.WEIGHTS):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def back_to_peft(gguf: Path, folder: Path, base: BaseSpec | None = None) -> Path:
    folder.mkdir()
    peft.write(gguf_lora.read(gguf, base=base), folder)
    return folder


@pytest.mark.peer
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, "float32") for kind in ADAPTERS]
    + [
        (kind, dtype)
        for kind in ("plain", "uneven_alpha", "rslora_ranks", "half_of_it_off")
        for dtype in ("float16", "bfloat16")
    ],
)
def test_llama_cpp_computes_what_peft_computes(tmp_path: Path, kind: str, dtype: str) -> None:
    need_module("llama_cpp_py_sync")
    need_module("peft")
    model = tiny.model()
    base = read_base(tiny.write_gguf(model, tmp_path / "base.gguf"))
    wrapped = tiny.adapter(model, tmp_path / "peft", dtype=dtype, **ADAPTERS[kind])
    report = gguf_lora.write(peft.read(tmp_path / "peft"), tmp_path / "a.gguf", base=base)

    expected = peft_logits(wrapped)
    with wrapped.disable_adapter():
        effect = np.abs(expected - peft_logits(wrapped)).max()
    our_logits = llama_cpp.logits(tmp_path / "base.gguf", TOKENS, tmp_path / "a.gguf")
    error = np.abs(our_logits - expected).max()
    print(f"{kind} {dtype}: error {error:.2g}, effect {effect:.2g}")
    assert effect > 1
    # With factors in 16 bits llama.cpp rounds the activations they meet to 16 bits as well.
    assert error < {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}[dtype] * max(1, effect)

    assert report.worst == Loss.EXACT
    same_bytes(tmp_path / "peft", back_to_peft(tmp_path / "a.gguf", tmp_path / "again"))


@pytest.mark.peer
@pytest.mark.parametrize(
    "name",
    [
        name
        for item in architecture_lookup.ARCHITECTURES
        for name in item.classes
        if item.gguf in tiny.GGUF and not item.experts
    ],
)
def test_every_architecture_computes_what_peft_computes(tmp_path: Path, name: str) -> None:
    need_module("llama_cpp_py_sync")
    need_module("peft")
    model = tiny.model(name)
    base = read_base(tiny.write_gguf(model, tmp_path / "base.gguf"))
    plain = llama_cpp.logits(tmp_path / "base.gguf", TOKENS)
    assert np.abs(plain - peft_logits(model)).max() < 1e-3
    wrapped = tiny.adapter(model, tmp_path / "peft", alpha_pattern={"o_proj": 3}, use_rslora=True)
    gguf_lora.write(peft.read(tmp_path / "peft"), tmp_path / "a.gguf", base=base)
    expected = peft_logits(wrapped)
    effect = np.abs(expected - plain).max()
    assert effect > 0.5
    assert np.abs(llama_cpp.logits(tmp_path / "base.gguf", TOKENS, tmp_path / "a.gguf") - expected).max() < 1e-3 * max(
        1, effect
    )


@pytest.mark.peer
def test_llama_cpp_applies_an_alora_where_peft_does(tmp_path: Path) -> None:
    for module in ("peft", "llama_cpp_py_sync"):
        need_module(module)
    model = tiny.model()
    base = tiny.write_gguf(model, tmp_path / "base.gguf")
    model.save_pretrained(tmp_path / "base")
    wrapped = tiny.adapter(model, tmp_path / "a", alora_invocation_tokens=[5, 64], lora_alpha=11)
    report = convert.convert(tmp_path / "a", tmp_path / "a.gguf", to="gguf", base=read_base(tmp_path / "base"))
    assert "llama-server applies it from its invocation tokens on" in report.notes[-1]
    our_logits = llama_cpp.gated_logits(base, TOKENS, tmp_path / "a.gguf")
    assert np.abs(our_logits - peft_logits(wrapped)).max() < 2e-3
    with pytest.raises(RefusedError, match="acts only after certain tokens"):
        llama_cpp.logits(base, TOKENS, tmp_path / "a.gguf")


def test_an_alora_comes_back_with_and_without_its_config_and_ollama_does_not_get_it(tmp_path: Path) -> None:
    base = BaseSpec("base", "hf", "Qwen2ForCausalLM", "qwen2", {"num_attention_heads": 4})
    pair = LowRank(np.ones((2, 8), np.float32), np.full((6, 2), 0.3, np.float32), 5.0)
    adapter = Adapter({"model.layers.0.mlp.up_proj": pair}, meta=Meta(invocation=(5, 64)))
    (tmp_path / "a").mkdir()
    peft.write(adapter, tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "a.gguf", to="gguf", base=base)
    same_bytes(tmp_path / "a", back_to_peft(tmp_path / "a.gguf", tmp_path / "b"))
    with GGUFFile(tmp_path / "a.gguf") as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
    plain = string_keys(general_type="adapter", general_architecture="qwen2", adapter_type="lora")
    for ids in ([5, 64], [7]):  # as llama.cpp's script writes it; other tokens than the stored config has
        source_metadata = file.header.metadata if ids == [7] else {}
        kept_metadata = {key: string_value(text) for key, text in source_metadata.items() if key.startswith("adapterhub.")}
        gguf_output.write(tmp_path / "c.gguf", plain | kept_metadata | {INVOCATION: MetadataValue("[UINT32]", ids)}, tensors)
        read_adapter = gguf_lora.read(tmp_path / "c.gguf")
        assert read_adapter.meta.invocation == tuple(ids)
        (tmp_path / "c.gguf").unlink()
    with pytest.raises(RefusedError, match="Ollama applies it to all"):
        convert.convert(tmp_path / "a", tmp_path / "o", to="ollama", base=base, model="x")
    assert not (tmp_path / "o").exists()


@pytest.mark.peer
def test_alpha_0_has_no_effect_in_llama_cpp(tmp_path: Path) -> None:
    need_module("llama_cpp_py_sync")
    model = tiny.model()
    base = read_base(tiny.write_gguf(model, tmp_path / "base.gguf"))
    tiny.adapter(model, tmp_path / "peft", lora_alpha=0)
    gguf_lora.write(peft.read(tmp_path / "peft"), tmp_path / "a.gguf", base=base)
    our_logits = llama_cpp.logits(tmp_path / "base.gguf", TOKENS, tmp_path / "a.gguf")
    assert np.array_equal(our_logits, llama_cpp.logits(tmp_path / "base.gguf", TOKENS))
    same_bytes(tmp_path / "peft", back_to_peft(tmp_path / "a.gguf", tmp_path / "again"))


# Without peers


def llama(**config: Any) -> BaseSpec:
    """A base known from its config alone: four heads of eight, two of them for keys."""
    numbers = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, **config}
    return BaseSpec("base", "hf", "LlamaForCausalLM", "llama", numbers)


def delta(rows: int = 32, *, seed: int = 0, dtype: Any = np.float32, alpha: float = 4, **fields: Any) -> LowRank:
    rng = np.random.default_rng(seed)
    lora_A, lora_B = rng.normal(size=(2, 32)).astype(dtype), rng.normal(size=(rows, 2)).astype(dtype)
    return LowRank(lora_A, lora_B, alpha, **fields)


Q, K, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.up_proj"
ADAPTER = Adapter({Q: delta(seed=1), K: delta(16, seed=2, alpha=7), UP: delta(48, seed=3, alpha=6, dtype=ml_dtypes.bfloat16)})


def test_the_layout_of_the_file(tmp_path: Path) -> None:
    gguf_lora.write(ADAPTER, tmp_path / "a.gguf", base=llama())
    with GGUFFile(tmp_path / "a.gguf") as file:
        stems = ("blk.0.attn_q", "blk.1.ffn_up", "blk.1.attn_k")
        assert set(file.tensors) == {f"{stem}.weight.lora_{half}" for stem in stems for half in "ab"}
        assert file.header.kinds["adapter.lora.alpha"] == "FLOAT32"
        assert file.header.metadata["general.type"] == "adapter"
        assert file.tensors["blk.0.attn_q.weight.lora_a"].shape == (2, 32)
        assert file.tensors["blk.0.attn_q.weight.lora_b"].shape == (32, 2)


def test_tiny_bytes(tmp_path: Path) -> None:
    rows = np.arange(16, dtype=np.float32).reshape(16, 1)
    small = LowRank(rows.T / 4, rows, 1.0)
    spec = llama(hidden_size=16, num_attention_heads=2)
    gguf_lora.write(Adapter({Q: small}, meta=Meta(base_model="a/b")), tmp_path / "a.gguf", base=spec)
    assert (tmp_path / "a.gguf").read_bytes() == (Path(__file__).parent / "golden" / "tiny_adapter.gguf").read_bytes()


def test_a_file_without_our_keys_reads_to_the_same_function(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    gguf_lora.write(ADAPTER, path, base=llama())
    strip(path, path)
    again = gguf_lora.read(path, base=llama())
    assert set(again.deltas) == set(ADAPTER.deltas)
    for target, original in ADAPTER.deltas.items():
        read_delta = again.deltas[target]
        assert np.array_equal(read_delta.lora_A, original.lora_A)
        first, original_product = (
            read_delta.scaling * read_delta.lora_B.astype(np.float64),
            original.scaling * original.lora_B.astype(np.float64),
        )
        np.testing.assert_allclose(first, original_product, rtol=1e-6)
    with pytest.raises(RefusedError, match="the order of its rows depends on the number of heads.*Name its base model"):
        gguf_lora.read(path)


def strip(source: Path, path: Path, *, without: str = "adapterhub.", **changes: gguf_types.MetadataValue) -> None:
    """The file again as somebody else would have written it."""
    with GGUFFile(source) as file:
        kept_metadata = {
            key: gguf_types.MetadataValue(file.header.kinds[key], value)
            for key, value in file.header.metadata.items()
            if not key.startswith(without)
        }
        tensors = {name: file.tensor(name) for name in file.tensors}
    changed = {key.replace("/", ".") if "/" in key else key.replace("_", "."): value for key, value in changes.items()}
    gguf_output.write(path, kept_metadata | changed, tensors)


@pytest.mark.parametrize("change", ["tensor", "alpha"])
def test_a_source_config_of_another_payload_is_ignored_and_reported(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.gguf"
    gguf_lora.write(ADAPTER, path, base=llama())
    if change == "alpha":
        strip(path, path, without="never", adapter_lora_alpha=gguf_types.f32_value(64.0))
    else:
        raw = bytearray(path.read_bytes())
        raw[-40] ^= 1
        path.write_bytes(raw)
    again = gguf_lora.read(path, base=llama())
    assert "have changed since the conversion" in again.notes[0]
    assert again.source is None


def test_a_source_config_with_a_wrong_scale_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    gguf_lora.write(ADAPTER, path, base=llama())
    with GGUFFile(path) as file:
        config = str(file.header.metadata["adapterhub.source.config"])
    strip(
        path,
        path,
        without="never",
        adapterhub_source_config=gguf_types.string_value(config.replace('"lora_alpha": 7', '"lora_alpha": 9')),
    )
    with pytest.raises(AdapterhubError, match="the scale is 3.5 in the file and 4.5 in the source's config"):
        gguf_lora.read(path)


Lines = list[list[Any]]


def _twice(rows: Lines) -> None:
    rows.append(rows[0])


def _of_a_norm(rows: Lines) -> None:
    rows[0][1] = "model.layers.0.norm"


def _in_16_bits(rows: Lines) -> None:
    for row in rows:
        row[5] = row[2] != 1.0
    next(row for row in rows if row[5])[3] = "BF16"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_twice, "adapterhub.source.tensors has a module in two lines"),
        (_of_a_norm, "adapterhub.source.tensors has 'model.layers.0.norm', of which llama.cpp's llama has no tensor"),
        (_in_16_bits, "adapterhub.source.ulps are for a source in F32, but its source was BF16"),
    ],
)
def test_a_source_config_that_contradicts_its_file_is_refused_by_name(
    tmp_path: Path, change: Callable[[Lines], None], says: str
) -> None:
    path = tmp_path / "a.gguf"
    gguf_lora.write(ADAPTER, path, base=llama())
    with GGUFFile(path) as file:
        rows = json.loads(str(file.header.metadata["adapterhub.source.tensors"]))
        change(rows)
        size = sum(math.prod(file.tensors[f"{row[0]}.weight.lora_b"].shape) for row in rows if row[5])
    ulps = base64.b64encode(bytes(-(-size // 4))).decode()
    changes = {"tensors": json.dumps(rows), "ulps": ulps}
    strip(path, path, without="never", **{f"adapterhub_source_{key}": string_value(text) for key, text in changes.items()})
    with pytest.raises(FormatError) as caught:
        gguf_lora.read(path)
    assert f"{says}. Convert the adapter from its source again" in str(caught.value)


def test_alpha_absent_means_a_scale_of_1(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    gguf_lora.write(Adapter({UP: delta(48)}), path, base=llama())
    changes: list[dict[str, Any]] = [{}, {"adapter_lora_alpha": gguf_types.f32_value(0.0)}]
    for change in changes:
        strip(path, tmp_path / "b.gguf", without="a", general_type=gguf_types.string_value("adapter"))
        strip(tmp_path / "b.gguf", tmp_path / "b.gguf", adapter_type=gguf_types.string_value("lora"), **change)
        assert gguf_lora.read(tmp_path / "b.gguf").deltas[UP].scaling == 1.0


def string_keys(**values: str) -> dict[str, gguf_types.MetadataValue]:
    return {key.replace("_", "."): gguf_types.string_value(value) for key, value in values.items()}


INVOCATION = "adapter.alora.invocation_tokens"
KIND = string_keys(general_type="adapter", general_architecture="qwen2", adapter_type="lora")
PAIR = {"blk.0.ffn_up.weight.lora_a": np.ones((2, 8), np.float32), "blk.0.ffn_up.weight.lora_b": np.ones((6, 2), np.float32)}


@pytest.mark.parametrize(
    ("metadata", "tensors", "says"),
    [
        (KIND | string_keys(general_type="model"), PAIR, "general.type is 'model', not 'adapter'"),
        (KIND | string_keys(adapter_type="other"), PAIR, "adapter.type is 'other'"),
        (KIND | {"adapter.lora.alpha": gguf_types.u32_value(4)}, PAIR, "adapter.lora.alpha is a UINT32; llama.cpp aborts"),
        (KIND | {"adapter.lora.alpha": gguf_types.f32_value(float("nan"))}, PAIR, "adapter.lora.alpha is nan"),
        (
            KIND | {INVOCATION: gguf_types.MetadataValue("[INT32]", [1])},
            PAIR,
            "is a [INT32], but llama.cpp reads only a [UINT32]",
        ),
        (KIND | {INVOCATION: gguf_types.MetadataValue("[UINT32]", [2**31])}, PAIR, "an id that no token can have"),
        (KIND | string_keys(general_architecture="rwkv7"), PAIR, "'rwkv7' has no verified mapping"),
        (KIND, {"blk.0.ffn_up.weight.lora_a": PAIR["blk.0.ffn_up.weight.lora_a"]}, "'blk.0.ffn_up' has lora_a alone"),
        (KIND, PAIR | {"blk.0.ffn_up.weight.lora_b": np.ones((6, 3), np.float32)}, "do not share a rank"),
        (KIND, PAIR | {"blk.0.attn_norm.weight": np.ones(8, np.float32)}, "is not part of a low-rank pair"),
        (
            KIND,
            PAIR | {"blk.0.ffn_up.weight.lora_b": np.ones((2, 6, 2), np.float32)},
            "has shape (2, 6, 2), which llama.cpp does not multiply",
        ),
        (KIND, PAIR | {"blk.0.ffn_up.weight.lora_b": np.ones((6, 2), np.int32)}, "contains integers, and factors are floats"),
        (KIND, {name.replace("ffn_up", "ffn_gate_inp"): array for name, array in PAIR.items()}, "has no verified name"),
        (
            KIND,
            {name.replace("ffn_up", "ffn_up_exps"): array for name, array in PAIR.items()},
            "which llama.cpp does not multiply",
        ),
    ],
)
def test_malformed_adapters_are_refused_in_one_line(
    tmp_path: Path, metadata: dict[str, gguf_types.MetadataValue], tensors: dict[str, np.ndarray], says: str
) -> None:
    gguf_output.write(tmp_path / "a.gguf", metadata, tensors)
    with pytest.raises(AdapterhubError) as caught:
        gguf_lora.read(tmp_path / "a.gguf")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    gguf_lora.write(ADAPTER, path, base=llama())
    return path


@given(st.data())
def test_mutated_adapters_are_read_or_refused(written: Path, data: st.DataObject) -> None:
    raw = bytearray(written.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = written.with_name("mutated.gguf")
    path.write_bytes(raw)
    with contextlib.suppress(AdapterhubError):
        gguf_lora.read(path, base=llama())


KEYS = [
    "general.type", "general.architecture", "adapter.type", "adapter.lora.alpha", "general.base_model.0.name", "split.count",
    "general.base_model.0.repo_url", "general.repo_url", "llama.block_count", "llama.rope.freq_base",
    "llama.attention.head_count", "llama.embedding_length", "tokenizer.chat_template", "adapterhub.source.payload",
    "adapterhub.source.config", "adapterhub.source.metadata", "adapterhub.source.tensors",
]  # fmt: skip
ODD = st.sampled_from(
    [
        MetadataValue("STRING", "x"), MetadataValue("[STRING]", ["a", "b"]),
        MetadataValue("[UINT32]", [1, 2]), MetadataValue("[UINT32]", []),
        f32_value(float("nan")), f32_value(float("inf")), MetadataValue("INT64", -1),
        MetadataValue("UINT32", 0), MetadataValue("BOOL", True),
        MetadataValue("FLOAT64", 1e300),
    ]
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(KEYS), ODD, min_size=1, max_size=4))
def test_keys_of_another_type_are_read_or_refused(written: Path, changes: dict[str, MetadataValue]) -> None:
    path = written.with_name("odd.gguf")
    strip(written, path, without="never", **{key.replace(".", "/"): value for key, value in changes.items()})
    for reader in (lambda: gguf_lora.read(path, base=llama()), lambda: read_base(path)):
        with contextlib.suppress(AdapterhubError):
            reader()
    model = {"general/type": string_value("model"), "general/architecture": string_value("llama")}
    strip(written, path, without="never", **({key.replace(".", "/"): value for key, value in changes.items()} | model))
    with contextlib.suppress(AdapterhubError):
        assert read_base(path).kind == "gguf"


SCRAPS = st.sampled_from(
    ["blk.0.attn_q", "blk.1.ffn_up", Q, K, UP, "F32", "BF16", "", 0, 1, 2, 4, -1, 1.5, 1e-310, True, None, []]
)


@given(
    key=st.sampled_from(["config", "metadata", "tensors", "ulps", "names", "turned"]),
    text=st.lists(st.lists(SCRAPS, min_size=6, max_size=6), max_size=3).map(json.dumps)
    | st.text(max_size=20)
    | st.fixed_dictionaries({"peft_type": st.just("LORA")}, optional={"r": SCRAPS, "lora_alpha": SCRAPS}).map(json.dumps),
)
def test_hostile_source_configs_are_refused(written: Path, key: str, text: str) -> None:
    path = written.with_name("hostile.gguf")
    strip(written, path, without="never", **{f"adapterhub_source_{key}": gguf_types.string_value(text)})
    with contextlib.suppress(AdapterhubError):
        gguf_lora.read(path, base=llama())


@given(
    alpha=st.floats(1e-3, 1e6),
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=2.0**-60, max_value=2.0**60),
        min_size=2,
        max_size=20,
    ),
    signs=st.integers(0, 2**20),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
)
def test_any_alpha_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, alpha: float, values: list[float], signs: int, dtype: Any
) -> None:
    lora_B = np.array([-x if signs >> n & 1 else x for n, x in enumerate(values)]).astype(np.float32).clip(-6e4, 6e4)
    odd = LowRank(np.ones((1, 8), dtype), lora_B.astype(dtype).reshape(-1, 1), alpha)
    path = tmp_path_factory.mktemp("alpha") / "a.gguf"
    gguf_lora.write(Adapter({UP: odd, Q: delta(), K: delta(16)}), path, base=llama())
    again = gguf_lora.read(path)
    assert again.deltas[UP].lora_B.tobytes() == odd.lora_B.tobytes()
    assert again.deltas[UP].alpha == alpha


@pytest.mark.parametrize(
    ("text", "says"), [("AAAA", "is 3 bytes, not 16"), ("A" * 4_000_000, "bytes, not 16"), ("=!", "is not base64")]
)
def test_last_places_of_another_size_are_refused(tmp_path: Path, text: str, says: str) -> None:
    gguf_lora.write(ADAPTER, tmp_path / "a.gguf", base=llama())
    strip(tmp_path / "a.gguf", tmp_path / "b.gguf", without="never", adapterhub_source_ulps=gguf_types.string_value(text))
    with pytest.raises(FormatError) as caught:
        gguf_lora.read(tmp_path / "b.gguf")
    assert says in str(caught.value)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        gguf_lora.write(ADAPTER, tmp_path / name, base=llama())
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
