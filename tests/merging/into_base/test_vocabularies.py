"""Vocabularies of folders written as GGUF: llama.cpp's own keys and tokens, or a refusal by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.errors import AdapterhubError, RefusedError
from adapterhub_converters.formats.gguf_model import byte_level, special_tokens, to_folder
from tests.conftest import need_module, need_smollm2
from tests.merging.into_base.gguf_folders import TEXT, assert_converted, changed, contents, of_bytes, written
from tests.support import llama_cpp, llama_cpp_scripts, tiny
from tests.support.llama_cpp_scripts import Converter


@pytest.mark.peer
def test_the_vocabulary_of_a_real_model_is_llama_cpp_s(tmp_path: Path, converted: Converter) -> None:
    source = need_smollm2()
    folder = tmp_path / "hf"
    tiny.model(vocab_size=49152, tie_word_embeddings=True).save_pretrained(folder)
    with GGUFFile(source) as file:
        for name, text in to_folder.tokenizer_files(to_folder.GGUFBase(str(source), file)).items():
            json_file.write_text(folder / name, text)
    ours = written(folder, tmp_path / "out.gguf")
    keys, _ = contents(ours)
    assert keys["tokenizer.ggml.pre"] == ("STRING", "smollm")
    assert keys["tokenizer.chat_template"][1].startswith("{%")
    assert_converted(ours, converted(folder, tmp_path / "theirs.gguf", "vocabulary"))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 400 pieces with byte fallback."""
    need_module("sentencepiece")
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text((TEXT.replace("\r", "") + "\n") * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<mine>"],
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def unprefixed(pieces: Path) -> Path:
    """The same that puts no space before a text, as Gemma's."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(pieces.read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    path = pieces.with_name("unprefixed.model")
    path.write_bytes(model.SerializeToString())
    return path


CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>"},
    "add_bos_token": True,
    "added_tokens_decoder": {
        "1": {"content": "<s>", "special": True},
        "400": {"content": "<|end|>", "special": False},
        "401": {"content": "a\u2581b", "special": False},
    },
    "chat_template": [{"name": "default", "template": "{{ x }}"}, {"name": "tool-use", "template": "{{ y }}"}],
}


@pytest.mark.peer
@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM",
        "Gemma3ForCausalLM", "Phi3ForCausalLM", "NemotronForCausalLM", "Ernie4_5ForCausalLM", "GraniteForCausalLM",
        "Ernie4_5_MoeForCausalLM", "Ministral3ForCausalLM", "ApertusForCausalLM", "Qwen2VLForConditionalGeneration",
    ],
)  # fmt: skip
def test_a_vocabulary_of_pieces_is_llama_cpp_s(
    tmp_path: Path, converted: Converter, pieces: Path, unprefixed: Path, name: str
) -> None:
    folder = tmp_path / "hf"
    tiny.model(name, vocab_size=408, bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    shutil.copyfile(unprefixed if name.startswith("Gemma") else pieces, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({**CONFIG, "tokenizer_class": "LlamaTokenizer"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|end|>": 400}))
    ours = written(folder, tmp_path / "out.gguf")
    assert_converted(ours, converted(folder, tmp_path / "theirs.gguf", "vocabulary"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", b'{"<|end|>": "x"}', "the id of '<|end|>' is 'x', not a number"),
        ("added_tokens.json", b'{"<|end|>": 500}', "an added token 500, but the model has 400 rows"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: not UTF-8 text"),
        ("tokenizer.model", b"\x0a\xff", "tokenizer.model"),
    ],
)
def test_invalid_files_next_to_pieces_are_refused(
    tmp_path: Path, pieces: Path, name: str, content: bytes, message: str
) -> None:
    tiny.model(vocab_size=400).save_pretrained(tmp_path / "hf")
    shutil.copyfile(pieces, tmp_path / "hf/tokenizer.model")
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    (tmp_path / "hf" / name).write_bytes(content)
    with pytest.raises(AdapterhubError, match=re.escape(message)):
        written(tmp_path / "hf", tmp_path / "out.gguf")


def test_llama_cpp_tokenizes_as_sentencepiece(tmp_path: Path, pieces: Path) -> None:
    need_module("llama_cpp_py_sync")
    import sentencepiece

    tiny.model(vocab_size=400).save_pretrained(tmp_path / "hf")
    shutil.copyfile(pieces, tmp_path / "hf/tokenizer.model")
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    with llama_cpp.opened(written(tmp_path / "hf", tmp_path / "out.gguf")) as run:
        assert run.tokens(TEXT, raw=True) == sentencepiece.SentencePieceProcessor(str(pieces)).encode(TEXT)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Llama of 400 tokens with a tokenizer of one's own."""
    need_module("tokenizers")
    root = tmp_path_factory.mktemp("bytes") / "hf"
    tiny.model(vocab_size=400).save_pretrained(root)

    def make(folder: Path, document: Mapping[str, Any], **config: Any) -> Path:
        shutil.copytree(root, folder)
        (folder / "tokenizer.json").write_text(json.dumps(document))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.peer
@pytest.mark.parametrize("split", byte_level.SPLITS, ids=lambda split: split.name)
def test_llama_cpp_splits_a_text_as_the_tokenizer_does(tmp_path: Path, folder_of: Any, split: byte_level.Split) -> None:
    need_module("llama_cpp_py_sync")
    from tokenizers import Tokenizer

    document = of_bytes(split)
    folder = folder_of(tmp_path / "hf", document, add_bos_token=False)
    with llama_cpp.opened(written(folder, tmp_path / "out.gguf")) as run:
        assert run.tokens(TEXT, raw=True) == Tokenizer.from_str(json.dumps(document)).encode(TEXT).ids


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (
            "Glm4MoeForCausalLM",
            {},
            {"pre": "glm4", "bos_token_id": 402, "eot_token_id": 1, "unknown_token_id": 0, "eom_token_id": 403},
        ),
        ("HunYuanDenseV1ForCausalLM", {"eod_token_id": 9}, {"pre": "llama-bpe", "eos_token_id": 9, "eot_token_id": 7}),
        ("PhiForCausalLM", {}, {"pre": "llama-bpe", "add_bos_token": False}),
        ("Lfm2ForCausalLM", {}, {"pre": "lfm2"}),
    ],
)
def test_the_tokens_that_a_family_has_of_its_own_are_written(
    tmp_path: Path, name: str, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    need_module("tokenizers")
    folder = tmp_path / "hf"
    tiny.model(name, vocab_size=408).save_pretrained(folder)
    changed(folder, **changes)
    document = of_bytes(next(split for split in byte_level.SPLITS if split.name == "llama-bpe"))
    named = {"[gMASK]": 402, "<|observation|>": 403}
    document["added_tokens"] += [{"id": number, "content": text, "special": True} for text, number in named.items()]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    keys, _ = contents(written(folder, tmp_path / "out.gguf"))
    assert {key: keys[f"tokenizer.ggml.{key}"][1] for key in expected} == expected


def template(*single: Any, pair: Any = ()) -> dict[str, Any]:
    def part(token: str) -> dict[str, Any]:
        return {"Sequence": {"id": token, "type_id": 0}} if token in "AB" else {"SpecialToken": {"id": token, "type_id": 0}}

    tokens = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    return {
        "type": "TemplateProcessing",
        "single": [part(token) for token in single],
        "pair": [part(token) for token in pair],
        "special_tokens": {"<s>": tokens},
    }


PROCESSED: list[tuple[dict[str, Any] | None, dict[str, Any]]] = [
    (None, {}),
    (None, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": False}),
    ({"type": "ByteLevel"}, {"bos_token": "<s>"}),
    (template("<s>", "A", pair=("<s>", "A", "<s>", "B")), {"bos_token": "<s>", "eos_token": "</s>"}),
    (template("<s>", "A", "</s>", pair=("<s>", "A", "</s>", "B", "</s>")), {"bos_token": "<s>", "eos_token": "</s>"}),
    (template("A", "</s>"), {"eos_token": "<s>", "pad_token": {"content": "</s>"}}),
    (template("<s>", "A", pair=("<s>", "A", "</s>", "B")), {"bos_token": "<s>", "eos_token": "</s>"}),
    ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template("<s>", "A")]}, {"cls_token": "<s>"}),
    (template("<s>", "A"), {"add_bos_token": False, "bos_token": "<s>", "chat_template": "{{ x }}"}),
]
# Prints the keys of special tokens for each folder named.
_GGUF_PY = """
import json, sys, gguf
for folder in sys.argv[1:]:
    writer = gguf.GGUFWriter(None, "llama")
    gguf.SpecialVocab(folder).add_to_gguf(writer)
    print(json.dumps({key: value.value for key, value in writer.kv_data[0].items() if key != "general.architecture"}))
"""


@pytest.mark.peer
def test_special_tokens_are_those_of_gguf_py(tmp_path: Path, converted: Converter) -> None:
    scripts = llama_cpp_scripts.scripts_folder()
    assert scripts
    added = [{"id": 1, "content": "<s>"}, {"id": 2, "content": "</s>"}]
    model = {"eos_token_id": 2, "pad_token_id": None, "text_config": {"eos_token_id": 3, "pad_token_id": 0}}
    folders = [tmp_path / str(number) for number in range(len(PROCESSED))]
    for folder, (processor, config) in zip(folders, PROCESSED, strict=True):
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "post_processor": processor, "model": {}}))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "config.json").write_text(json.dumps(model))
    child = [sys.executable, "-c", _GGUF_PY, *map(str, folders)]
    environment = {**os.environ, "PYTHONPATH": str(scripts / "gguf-py")}
    result = subprocess.run(child, env=environment, check=True, capture_output=True, text=True)
    for folder, line in zip(folders, result.stdout.splitlines(), strict=True):
        our_tokens = special_tokens.special_tokens(special_tokens.read_tokenizer(folder, model), None)
        assert {key: value.value for key, value in our_tokens.items()} == json.loads(line), folder.name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "a vocabulary of the kind WordPiece"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "a vocabulary of the kind BPE with byte fallback"),
        ({"normalizer": {"type": "Lowercase"}}, "a normalizer {'type': 'Lowercase'}"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "texts are split by"),
        ({"post_processor": {"type": "RobertaProcessing"}}, "a post-processor 'RobertaProcessing'"),
        ({"post_processor": template("<s>", "<s>", "A")}, "a template that adds more than one token"),
        ({"added_tokens": ["x"]}, "added_tokens is malformed"),
        ({"model": {"vocab": {"a": "b"}}}, "model is malformed"),
        ({"pre_tokenizer": {"type": "Split", "pattern": 3}}, "pre_tokenizer is malformed"),
        ({"pre_tokenizer": {"pretokenizers": 1}}, "pre_tokenizer is malformed"),
        ({"post_processor": template("<s>", "A") | {"single": ["A"]}}, "post_processor is malformed"),
        ({"added_tokens": [{"id": 500, "content": "x"}]}, "a token 500, but the model 400 rows"),
        ({"added_tokens": [{"id": 3, "content": "é"}]}, "the added token 'é' has characters that stand for bytes"),
    ],
)
def test_a_tokenizer_that_is_not_understood_is_refused(
    tmp_path: Path, folder_of: Any, fields: dict[str, Any], message: str
) -> None:
    folder = folder_of(tmp_path / "hf", of_bytes(byte_level.SPLITS[0], **fields))
    with pytest.raises(AdapterhubError) as caught:
        written(folder, tmp_path / "out.gguf")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not a SentencePiece model: it has no pieces"),
        (b"\x0a\xff", "truncated, or not a SentencePiece model"),
        (b"\x0a\x02\x0a\x05", "piece 0: truncated, or not a SentencePiece model"),
        (b"\x08\x01", "piece 0: not a SentencePiece model: a number is in place of a message"),
        (b"\x0a\x03\x0a\x01a\x0a\x03\x0a\x01\xff", "piece 1: not UTF-8 text"),
        (b"\x0a\x02\x08\x01", "piece 0: its text, score or type is not one that SentencePiece writes"),
        (b"\x0a\x02\x18\x09", "piece 0: its text, score or type is not one that SentencePiece writes"),
        (b"\x0a\x03\x0a\x01a", "a SentencePiece model of another kind than BPE, which llama.cpp would merge as BPE"),
    ],
)
def test_a_broken_tokenizer_model_is_refused(tmp_path: Path, raw: bytes, message: str, bf16_llama: Any) -> None:
    shutil.copytree(bf16_llama[0], tmp_path / "hf")
    (tmp_path / "hf/tokenizer.model").write_bytes(raw)
    with pytest.raises(AdapterhubError, match=rf"tokenizer\.model: {message}"):
        written(tmp_path / "hf", tmp_path / "out.gguf")


@pytest.mark.parametrize("name", ["tekken.json", "vocab.json", "spiece.model"])
def test_a_tokenizer_in_another_file_is_named(tmp_path: Path, name: str, bf16_llama: Any) -> None:
    shutil.copytree(bf16_llama[0], tmp_path / "hf")
    (tmp_path / "hf" / name).write_bytes(b"{}")
    with pytest.raises(RefusedError) as caught:
        written(tmp_path / "hf", tmp_path / "out.gguf")
    says = f"hf: its only tokenizer is {name}, which is not supported. Save it with transformers as tokenizer.json"
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "present_file", "says"),
    [
        ("GemmaForCausalLM", "tokenizer.json", "llama.cpp's gemma reads its vocabulary from tokenizer.model, which is missing"),
        ("GPT2LMHeadModel", "tokenizer.model", "llama.cpp's gpt2 reads its vocabulary from tokenizer.json, which is missing"),
    ],
)
def test_a_tokenizer_file_that_llama_cpp_does_not_read_for_a_family_is_not_enough(
    tmp_path: Path, name: str, present_file: str, says: str
) -> None:
    need_module("transformers")
    tiny.model(name).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / present_file).write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}')
    with pytest.raises(RefusedError, match=f"{says}. Copy it from the original model"):
        written(tmp_path / "hf", tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("name", "present_tokens", "message"),
    [
        ("Glm4ForCausalLM", ["<|endoftext|>"], "tokenizer.json: the added token <|user|> of GLM-4 is missing"),
        ("Glm4MoeForCausalLM", ["[gMASK]"], "tokenizer.json: the added token <|user|> of GLM-4.5 is missing"),
    ],
)
def test_a_token_that_a_family_needs_and_lacks_is_named(
    tmp_path: Path, name: str, present_tokens: list[str], message: str
) -> None:
    need_module("transformers")
    tiny.model(name).save_pretrained(tmp_path / "hf")
    tokens = [{"id": number, "content": text} for number, text in enumerate(present_tokens)]
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {}}))
    with pytest.raises(RefusedError) as caught:
        written(tmp_path / "hf", tmp_path / "out.gguf")
    assert message in str(caught.value)
