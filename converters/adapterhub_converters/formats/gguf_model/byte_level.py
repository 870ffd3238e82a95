"""Conversion of a byte-level BPE vocabulary from a tokenizer.json (llama.cpp, `conversion/base.py`, `get_vocab_base`).

Before the merges, llama.cpp splits a text by one of its own named rules (src/llama-vocab.cpp, `llm_tokenizer_bpe`). Its
conversion finds the name by a hash of the ids of a test text, which works for known vocabularies only; here the name is
found by comparing the rules in tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub_converters.containers.gguf_types import MetadataValue, string_value, strings_value
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .special_tokens import CONTROL, NORMAL, UNUSED, USER_DEFINED, Tokenizer

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
)
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


@dataclass(frozen=True)
class Split:
    """Rules that split a text, applied one after the other, and llama.cpp's name for them.

    Attributes:
        rules: Expressions whose matches are isolated; `words` is GPT-2's expression, which the byte-level step itself applies.
        whole_tokens_first: Whether a piece that is a token is used before any merge.
        name: The name of the rules in llama.cpp.
        names_by_architecture: llama.cpp's other names of the same rules, by architecture.
        adds_first_token: Whether llama.cpp adds the first token to a text by default.
    """

    rules: tuple[str, ...]
    whole_tokens_first: bool
    name: str
    names_by_architecture: Mapping[str, str]
    adds_first_token: bool = False


_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WITH_MARKS = (  # Qwen2's, with the marks of letters
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _WORDS + r"\p{N}{1,3}|" + _REST
SPLITS = (
    Split(("digit", "words"), False, "smollm", {"starcoder2": "starcoder", "command-r": "command-r", "granite": "refact"}),
    Split(("words",), False, "gpt-2", {"olmo": "olmo", "phi2": "phi-2", "exaone4": "exaone4"}),
    Split((_LLAMA3,), True, "llama-bpe", {"glm4": "glm4", "glm4moe": "glm4", "lfm2": "lfm2"}, adds_first_token=True),
    Split((_LLAMA3,), False, "dbrx", {"llama": "smaug-bpe", "glm4": "chatglm-bpe"}),
    Split((_WORDS + r"\p{N}|" + _REST,), False, "qwen2", {"stablelm": "stablelm2"}),
    Split((_WITH_MARKS,), False, "qwen35", {}),
    Split((_CASES % ("", "") + r"\p{N}|" + _SLASHED,), True, "tekken", {}, adds_first_token=True),
    Split((_CASES % (_CONTRACTED, _CONTRACTED) + r"\p{N}{1,3}|" + _SLASHED,), False, "gpt-4o", {"minimax-m2": "minimax-m2"}),
    Split((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK), False, "deepseek-v3", {"hunyuan-dense": "hunyuan-dense"}),
    Split((" ?[^(\\s|[.,!?…。，、।۔،])]+",), False, "bloom", {}),
)


def vocabulary(tokenizer: Tokenizer, gguf: str, size: int) -> dict[str, MetadataValue]:
    """Return tokens, types and merges, for a model of the architecture `gguf` with `size` rows of embeddings."""
    model = tokenizer.json.get("model") or {}
    split = _find_split(tokenizer, model)
    tokens, types = _tokens(tokenizer, model, size)
    metadata = {
        "tokenizer.ggml.model": string_value("gpt2"),
        "tokenizer.ggml.pre": string_value(split.names_by_architecture.get(gguf, split.name)),
        "tokenizer.ggml.tokens": strings_value(tokens),
        "tokenizer.ggml.token_type": MetadataValue("[INT32]", types),
        "tokenizer.ggml.merges": strings_value(_merges(tokenizer, model)),
    }
    return metadata | ({"tokenizer.ggml.add_bos_token": MetadataValue("BOOL", False)} if split.adds_first_token else {})


def _find_split(tokenizer: Tokenizer, model: Mapping[str, Any]) -> Split:
    if (
        model.get("type", "BPE") != "BPE"
        or model.get("byte_fallback")
        or not isinstance(model.get("vocab"), dict)
        or not model.get("merges")
    ):
        kind = "BPE with byte fallback" if model.get("byte_fallback") else str(model.get("type"))[:40]
        hint = (
            "Put the tokenizer.model it was converted from next to it" if kind in ("Unigram", "BPE with byte fallback") else ""
        )
        raise RefusedError(tokenizer.where, f"tokenizer.json: a vocabulary of the kind {kind}, not of bytes with merges", hint)
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise RefusedError(
                tokenizer.where, f"tokenizer.json: {key} is {str(model[key])[:40]}, which llama.cpp does not support"
            )
    normalizer = tokenizer.json.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
        problem = f"tokenizer.json: a normalizer {str(normalizer)[:60]}, which llama.cpp does not apply"
        raise RefusedError(tokenizer.where, problem)
    rules, whole_first = _rules(tokenizer), bool(model.get("ignore_merges"))
    match = next((split for split in SPLITS if split.rules == rules and split.whole_tokens_first == whole_first), None)
    if match is None:
        rules_text = " then ".join(repr(rule[:60]) for rule in rules)
        known_names = ", ".join(sorted({split.name for split in SPLITS}))
        problem = (
            f"tokenizer.json: texts are split by {rules_text}{' and whole tokens' * whole_first}, "
            "which matches no known rule of llama.cpp"
        )
        raise RefusedError(tokenizer.where, problem, f"Known: {known_names}")
    return match


def _rules(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the steps of the pre-tokenizer as rules of `Split`; an unknown step becomes text that matches no rule."""
    first = tokenizer.json.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", []) if first.get("type") == "Sequence" else [first]
    rules = []
    for number, step in enumerate(steps):
        kind, pattern = step.get("type"), step.get("pattern") or {}
        if kind == "ByteLevel" and number == len(steps) - 1 and not step.get("add_prefix_space"):
            rules += ["words"] if step.get("use_regex", True) else []
        elif (kind == "Digits" and step.get("individual_digits")) or (kind == "Split" and pattern == {"Regex": r"\p{N}"}):
            rules.append("digit")
        elif (
            kind == "Split"
            and step.get("behavior") == "Isolated"
            and not step.get("invert")
            and isinstance(pattern.get("Regex"), str)
        ):
            rules.append(pattern["Regex"].replace("\r", r"\r").replace("\n", r"\n"))  # files use either
        else:
            rules.append(f"the step {str(step)[:60]}")
    if not steps or steps[-1].get("type") != "ByteLevel":
        rules.append("no step to bytes")
    return tuple(rules)


def _tokens(tokenizer: Tokenizer, model: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    by_id: dict[int, str] = {number: token for token, number in model["vocab"].items()}
    added = {token["id"]: token for token in (tokenizer.json.get("added_tokens") or [])}
    by_id |= {number: token["content"] for number, token in added.items()}
    _check_config(tokenizer, added)
    if max(by_id, default=0) >= size:
        problem = f"tokenizer.json has a token {max(by_id)}, but the model {size} rows of embeddings"
        raise RefusedError(tokenizer.where, problem)
    tokens, types = [], []
    for number in range(size):
        if number not in by_id:
            # The placeholder that llama.cpp's converter writes for rows without a token.
            tokens.append(f"[PAD{number}]")
            types.append(UNUSED)
        elif number in added:
            text, kind = added_token(tokenizer, added[number])
            tokens.append(text)
            types.append(kind)
        else:
            tokens.append(by_id[number])
            types.append(NORMAL)
    # llama.cpp looks tokens up by their text.
    if len(set(tokens)) != len(tokens):
        raise RefusedError(tokenizer.where, "tokenizer.json: two tokens of the vocabulary are the same text")
    return tokens, types


def _check_config(tokenizer: Tokenizer, added: Mapping[int, Mapping[str, Any]]) -> None:
    """Refuse tokens that are only in tokenizer_config.json, which transformers would add."""
    for number, token in (tokenizer.config.get("added_tokens_decoder") or {}).items():
        if int(number) not in added or added[int(number)]["content"] != token["content"]:
            problem = f"tokenizer_config.json has an added token {number} that is missing from tokenizer.json"
            raise RefusedError(tokenizer.where, problem)


def added_token(tokenizer: Tokenizer, token: Mapping[str, Any]) -> tuple[str, int]:
    """Return the text and type of an added token; if it is not normalized, the text as its own encoding decodes it."""
    text = str(token["content"])
    if not token.get("normalized") and not _is_plain(text):
        problem = f"tokenizer.json: the added token {text[:40]!r} has characters that stand for bytes"
        raise RefusedError(tokenizer.where, problem)
    if token.get("special") or looks_special(text):
        return text, CONTROL
    return text.replace("\u2581", " "), USER_DEFINED


def _is_plain(text: str) -> bool:
    """Return whether decoding leaves a text unchanged: in the alphabet of bytes only ASCII characters represent themselves."""
    return all("!" <= c <= "~" for c in text) or any(not _encodes_byte(c) for c in text)


def _encodes_byte(character: str) -> bool:
    # GPT-2's alphabet: the printable bytes of Latin-1, and 68 characters from U+0100 on for the others.
    code = ord(character)
    return 0x21 <= code <= 0x7E or 0xA1 <= code <= 0xAC or 0xAE <= code <= 0xFF or 0x100 <= code < 0x144


def looks_special(text: str) -> bool:
    """Return whether a token that a model marks as normal is a control token (`does_token_look_special`)."""
    framed = (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))
    unused = text.startswith("<unused") and text.endswith(">")
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or framed or unused


def _merges(tokenizer: Tokenizer, model: Mapping[str, Any]) -> list[str]:
    merges = [
        merge if isinstance(merge, str) else " ".join(part.replace(" ", "Ġ") for part in merge) for merge in model["merges"]
    ]
    if any(merge.count(" ") != 1 for merge in merges):
        raise RefusedError(tokenizer.where, "tokenizer.json: a merge does not have two parts")
    return merges
