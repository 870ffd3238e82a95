"""Which paths of the API each engine answers with exactly the version that is asked for.

A path is left out where the engine has it but would answer with another version: llama-server drops the list of adapters from
/v1/messages (b10435), and SGLang answers /v1/responses, /v1/score and /v1/rerank by the base (0.5.23, read).
"""

from __future__ import annotations

from collections.abc import Mapping

from . import CHAT, COMPLETIONS, EMBEDDINGS

RESPONSES, RESPONSE_TOKENS = "/v1/responses", "/v1/responses/input_tokens"
MESSAGES, MESSAGE_TOKENS = "/v1/messages", "/v1/messages/count_tokens"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
RERANKS, SCORES = frozenset({"/v1/rerank", "/rerank"}), frozenset({"/v1/score", "/score"})

_GENERATION, _TOKENIZER = frozenset({COMPLETIONS, CHAT}), frozenset({TOKENIZE, DETOKENIZE})
_RESPONSES, _MESSAGES = frozenset({RESPONSES, RESPONSE_TOKENS}), frozenset({MESSAGES, MESSAGE_TOKENS})
ENGINE_PATHS: Mapping[str, frozenset[str]] = {
    "vllm": _GENERATION | {EMBEDDINGS, RESPONSES} | _MESSAGES | _TOKENIZER | RERANKS | SCORES,
    "sglang": _GENERATION | {EMBEDDINGS} | _MESSAGES | _TOKENIZER,
    "llama.cpp": _GENERATION | _RESPONSES | _MESSAGES | _TOKENIZER,
    "llama.cpp, one process": _GENERATION | _RESPONSES | {MESSAGE_TOKENS} | _TOKENIZER,
    "llama.cpp, embeddings": _TOKENIZER | {EMBEDDINGS},
    "llama.cpp, reranking": _TOKENIZER | RERANKS,
    "mlx": _GENERATION,
    "in process": _GENERATION,
}
ALL_PATHS: frozenset[str] = frozenset().union(*ENGINE_PATHS.values())
ANSWERED_BY_TEXT = _GENERATION | {RESPONSES, MESSAGES}
"""The paths whose answer has tokens of its own."""
WITHOUT_MODEL = _TOKENIZER | {RESPONSE_TOKENS, MESSAGE_TOKENS}
"""The paths that cost no token, because only the tokenizer is asked."""


def answers_no_such_path(status: int, words: str) -> bool:
    """Return whether an engine's error says that it does not have the path at all, rather than that it knows no such model.

    Args:
        words: Its reason, as `error_text` has it.
    """
    return status in (405, 501) or (status == 404 and words.removesuffix('"}').endswith("Not Found"))
