"""A GGUF base as a Hugging Face folder: the same numbers, and the same token ids as llama.cpp."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import gguf_file, gguf_output, gguf_types, safetensors_file
from adapterhub_converters.errors import OutputExistsError, RefusedError
from adapterhub_converters.formats.gguf_model import to_folder
from tests.conftest import missing, need_module, need_smollm2

NASTY = [
    "½ ² Ⅷ ٣ 12345 3.14 x²+y₂",
    "don't won't I'll they've 'S 'RE it’s",
    "日本語のテキスト 中文，标点。 한국어 ไทย हिन्दी",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 n\u0303 \u200b\ufeff\u00a0nbsp\u2003em\u3000wide",
    "a\t\tb\n\n\nc  \n  d\r\n\r\ne   ",
    "   leading", "trailing   ", " ", "\n", "\t \t", "", "\u00a0\u00a0", "\u2028x\u2029", "\x00\x01\x7f\x80\x85\xad",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_start|", "< |im_end|>", "<repo_name><reponame>x",
    "if (a[i]!=b){return;}//...---___***", "http://x.y/z?q=1&r=2#%20", "İıſßﬁ ǅ ΆΈ Ωmega", "\U0001f1e9\U0001f1ea\U000e0041",
    "\ufffd\ufffe\U0010ffff\ue000", "ⅷ ¼ ੩ 𝟘𝟙 ㊿ 〇", "²", "x ½y", "1½", "\u0378\u0380",
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A real GGUF and the folder made of it."""
    gguf = need_smollm2()
    out = tmp_path_factory.mktemp("base") / "hf"
    to_folder.to_hf(gguf, out)
    return gguf, out


@pytest.fixture(scope="module")
def llama_ids(smollm: tuple[Path, Path]):  # type: ignore[no-untyped-def]
    """llama.cpp's own tokenizer: text to ids, special tokens recognized."""
    need_module("llama_cpp_py_sync")
    from llama_cpp_py_sync import _cffi_bindings as bindings

    ffi, lib = bindings.get_ffi(), bindings.get_lib()
    quiet = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *_: None)
    lib.llama_log_set(quiet, ffi.NULL)
    parameters = lib.llama_model_default_params()
    parameters.vocab_only = True
    model = lib.llama_model_load_from_file(str(smollm[0]).encode(), parameters)
    if model == ffi.NULL:
        missing("a llama.cpp that loads this model", install="pip install --upgrade llama-cpp-py-sync")
    vocab = lib.llama_model_get_vocab(model)

    def ids(text: str) -> list[int]:
        raw = text.encode()
        buffer = ffi.new("llama_token[]", len(raw) + 8)
        count = lib.llama_tokenize(vocab, raw, len(raw), buffer, len(raw) + 8, True, True)
        return [buffer[position] for position in range(count)]

    yield ids
    lib.llama_model_free(model)
    lib.llama_log_set(ffi.NULL, ffi.NULL)  # else it calls a function that is gone, in a test of another file
    del quiet


def licenses() -> list[str]:
    """Every third of the license texts of this environment."""
    files = sorted(Path(sysconfig.get_path("purelib")).glob("*.dist-info/**/*LICEN*"))
    texts = [path.read_text(errors="replace")[:20_000] for path in files[::3] if path.is_file()]
    assert len(texts) > 20
    return texts


@pytest.mark.peer
def test_token_ids_are_llama_cpps(smollm: tuple[Path, Path], llama_ids) -> None:  # type: ignore[no-untyped-def]
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(smollm[1] / "tokenizer.json"))
    wrong = [text for text in [*NASTY, *licenses()] if tokenizer.encode(text).ids != llama_ids(text)]
    assert [text[:40] for text in wrong] == []


@pytest.mark.peer
def test_transformers_loads_it_with_the_same_ids(smollm: tuple[Path, Path], llama_ids) -> None:  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm[1])
    wrong = [text for text in NASTY if tokenizer(text)["input_ids"] != llama_ids(text)]
    assert wrong == []
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")


def tiny(path: Path, **changes: gguf_types.MetadataValue) -> Path:
    """A one-layer llama in F32: hidden 8, two heads of 4, one of keys and values."""
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (6, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,),
        "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8),
        "blk.0.ffn_gate": (12, 8), "blk.0.ffn_up": (12, 8), "blk.0.ffn_down": (8, 12),
    }  # fmt: skip
    u32, f32, text = gguf_types.u32_value, gguf_types.f32_value, gguf_types.string_value
    metadata = {
        "general.architecture": text("llama"),
        "llama.block_count": u32(1),
        "llama.context_length": u32(64),
        "llama.embedding_length": u32(8),
        "llama.feed_forward_length": u32(12),
        "llama.attention.head_count": u32(2),
        "llama.attention.head_count_kv": u32(1),
        "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
        "llama.rope.freq_base": f32(10000.0),
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text("smollm"),
        "tokenizer.ggml.tokens": gguf_types.strings_value(["<s>", "a", "b", "ab", "\u0120", "</s>"]),
        "tokenizer.ggml.token_type": gguf_types.MetadataValue("[INT32]", [3, 1, 1, 1, 1, 3]),
        "tokenizer.ggml.merges": gguf_types.strings_value(["a b"]),
        "tokenizer.ggml.bos_token_id": u32(0),
        "tokenizer.ggml.eos_token_id": u32(5),
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    gguf_output.write(path, metadata, {f"{name}.weight": rng.normal(size=s).astype(np.float32) for name, s in shapes.items()})
    return path


def test_numbers_names_and_the_order_of_rows(tmp_path: Path) -> None:
    source = tiny(tmp_path / "a.gguf")
    to_folder.to_hf(source, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["rms_norm_eps"], config["head_dim"], config["tie_word_embeddings"], config["eos_token_id"]) == (
        1e-5,
        4,
        True,
        5,
    )
    assert read_base(tmp_path / "hf").fingerprint == read_base(source).fingerprint
    with (
        gguf_file.GGUFFile(source) as file,
        safetensors_file.SafetensorsFile(tmp_path / "hf" / "model.safetensors") as converted,
    ):
        q = converted.tensor("model.layers.0.self_attn.q_proj.weight").astype(np.float32)
        np.testing.assert_allclose(architecture_lookup.permute_rows(q, 2), file.tensor("blk.0.attn_q.weight"), rtol=2**-8)
        v = converted.tensor("model.layers.0.self_attn.v_proj.weight").astype(np.float32)
        np.testing.assert_allclose(v, file.tensor("blk.0.attn_v.weight"), rtol=2**-8)
    assert {path.name for path in tmp_path.iterdir()} == {"a.gguf", "hf"}
    with pytest.raises(OutputExistsError, match="already exists") as caught:
        to_folder.to_hf(source, tmp_path / "hf")
    assert caught.value.code == "already-exists"


def test_a_beginning_that_llama_cpp_adds_is_added(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    to_folder.to_hf(
        tiny(tmp_path / "a.gguf", tokenizer__ggml__add_bos_token=gguf_types.bool_value(value=True)), tmp_path / "hf"
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert tokenizer.encode("ab a</s>").ids == [0, 3, 4, 1, 5]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"general__architecture": gguf_types.string_value("qwen2")}, "architecture 'qwen2' cannot be converted to"),
        (
            {"tokenizer__ggml__pre": gguf_types.string_value("llama-bpe")},
            "only gpt-2, smollm; another one would split differently",
        ),
        ({"tokenizer__ggml__model": gguf_types.string_value("llama")}, "tokenizer model 'llama' cannot be converted to"),
        ({"llama__rope__scaling__type": gguf_types.string_value("yarn")}, "llama.rope.scaling.type = yarn changes"),
        ({"llama__rope__dimension_count": gguf_types.u32_value(2)}, "a partial rotary embedding"),
        ({"llama__block_count": gguf_types.string_value("")}, "llama.block_count is '', not a number"),
        ({"llama__block_count": gguf_types.MetadataValue("[UINT32]", [1])}, "llama.block_count is an array, not one value"),
        (
            {"tokenizer__ggml__token_type": gguf_types.MetadataValue("[INT32]", [3, 1])},
            "tokenizer.ggml.token_type has 2 entries for 6 tokens",
        ),
    ],
)
def test_refused_by_name(tmp_path: Path, changes: dict[str, gguf_types.MetadataValue], says: str) -> None:
    with pytest.raises(RefusedError) as caught:
        to_folder.to_hf(tiny(tmp_path / "a.gguf", **changes), tmp_path / "hf")
    assert says in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
