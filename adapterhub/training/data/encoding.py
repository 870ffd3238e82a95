"""Encoding of the documents of a data set, in batches: the next ones are rendered while one is tokenized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from adapterhub.prompts import chat_template
from adapterhub.prompts.process_limits import LimitExceededError
from adapterhub_converters.errors import FormatError, Problems

from . import record_shapes, template_renderers
from .conversation import Conversation
from .document_files import Document
from .example import Example
from .examples import Source, encode_sources, requests, source_of

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 64, 1 << 18
_MANY = 512  # documents: fewer are not worth the start of further processes

Progress = Callable[[int, int], None]
"""Called with the number of documents encoded so far, and the total."""


def batch_counter(total: int, on_progress: Progress) -> Callable[[int], None]:
    """Return a function that adds up the documents of batches and reports their progress toward `total`."""
    counts = [0]

    def on_batch(documents: int) -> None:
        counts[0] += documents
        on_progress(counts[0], total)

    return on_batch


def encode_documents(
    documents: Sequence[Document], tokenizer: Any, *, loss: str, on_batch: Callable[[int], None] | None = None
) -> Iterator[tuple[Example, bytes]]:
    """Yield encoded documents, each with its digest; of a pair, the chosen side before the rejected one.

    The first refusals of the chat template are raised together, after the last document, or after so many exceeded its limits
    that the rest of their batch was not tried.

    Args:
        on_batch: Called with the number of documents of each batch that is encoded.
    """
    problems: Problems[FormatError] = Problems()
    endless = 0
    for document, examples in _encoded(documents, tokenizer, loss, on_batch):
        error = next((example for example in examples if isinstance(example, FormatError)), None)
        if error is None:
            yield from ((example, document.digest) for example in examples if isinstance(example, Example))
            continue
        problems.add(error)
        endless += isinstance(error.__cause__, LimitExceededError)
        if problems.count == problems.SHOWN or endless == chat_template.MAX_ENDED:
            break  # every further one would cost a call of the template
    problems.check()


def _encoded(
    documents: Sequence[Document], tokenizer: Any, loss: str, on_batch: Callable[[int], None] | None
) -> Iterator[tuple[Document, list[Example | FormatError]]]:
    batches = _batches(documents, tokenizer, loss)
    for batch, answers in _answered(batches, loss, many=len(documents) >= _MANY):
        sources = [source for _, document_sources in batch for source in document_sources]
        examples = iter(encode_sources(sources, answers, tokenizer, loss=loss))
        for document, document_sources in batch:
            yield document, [next(examples) for _ in document_sources]
        if on_batch:
            on_batch(len(batch))


_Batch = list[tuple[Document, list[Source | FormatError]]]
"""Documents with their sources: one for most, two for a pair, or the error of one that is no conversation."""


def _batches(documents: Sequence[Document], tokenizer: Any, loss: str) -> Iterator[_Batch]:
    batch: _Batch = []
    characters = 0
    for document in documents:
        batch.append((document, _sources(document, tokenizer, loss)))
        characters += sum(map(_size, batch[-1][1]))
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _answered(batches: Iterable[_Batch], loss: str, *, many: bool) -> Iterator[tuple[_Batch, list[Any]]]:
    """Yield each batch with the answers of its chat template, while the next ones are rendered if there are many."""
    with_requests = ((batch, requests([source for _, sources in batch for source in sources], loss)) for batch in batches)
    if not many:
        yield from ((batch, template_renderers.request_all(batch_requests)) for batch, batch_requests in with_requests)
        return
    with template_renderers.Renderers() as renderers:
        yield from renderers.answered(with_requests)


def _size(source: Source | FormatError) -> int:
    return source.size if isinstance(source, Conversation) else len(source) if isinstance(source, str) else 0


def _sources(document: Document, tokenizer: Any, loss: str) -> list[Source | FormatError]:
    record = document.record
    sides = [record[side] for side in record_shapes.SIDES] if document.shape == record_shapes.PAIRS else [record]
    try:
        return [source_of(side, tokenizer, loss=loss, location=document.location) for side in sides]
    except FormatError as error:
        return [error]
