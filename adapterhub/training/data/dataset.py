"""The data sets of a training run: from files to rows, with held-out documents, mixing by shares, and notes for the user."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from adapterhub.prompts import chat_template
from adapterhub.training.train_config import TrainConfig
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import NotFoundError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.trained_prompt import RESERVED, TrainedPrompt

from . import document_files, packed_rows, record_shapes
from . import overlap as passages
from .encoding import Progress, batch_counter, encode_documents
from .packed_rows import PackedRows, Rows, pack
from .token_arrays import EncodedFiles, File, Tokens, collect, stop_tokens


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows, and the files that they were made of.

    Attributes:
        notes: Notes for the user, one line each.
        digests: Eight bytes of each document's digest, to find documents that another set has too.
        starts: The place of the first token of each document among the tokens of all, ascending.
        truncated: The number of documents that are longer than a row and were cut.
        shared: For held-out data, the share of their passages that the training data have too.
    """

    packed: PackedRows
    files: tuple[File, ...]
    notes: tuple[str, ...]
    digests: np.ndarray
    starts: np.ndarray
    truncated: int
    shared: float = 0.0

    @property
    def rows(self) -> Rows:
        """All rows at once."""
        return self.packed.all()

    @property
    def documents(self) -> int:
        """The number of documents."""
        return sum(file.documents for file in self.files)

    @property
    def tokens(self) -> int:
        """The number of tokens, including prompts."""
        return sum(file.tokens for file in self.files)


def datasets(config: TrainConfig, tokenizer: Any, *, on_progress: Progress | None = None) -> tuple[Dataset, Dataset | None]:
    """Return the training data and the held-out data: separate files, a share of the documents, or None."""
    data = config.data
    train_files, heldout_files = files(config)
    shared = shared_passages(train_files, heldout_files) if heldout_files else 0.0
    total = sum(len(file.documents) for file in (*train_files, *heldout_files))
    on_batch = batch_counter(total, on_progress) if on_progress else None
    encoded = encode_files(train_files, tokenizer, loss=data.loss, on_batch=on_batch)
    row_options: dict[str, Any] = {"sequence": data.sequence, "pack_rows": data.pack, "pairs": bool(config.preference)}
    train = arrange_rows(encoded, tokenizer, seed=config.train.seed, shares=data.shares, **row_options)
    if not heldout_files:
        return train, None
    encoded = encode_files(heldout_files, tokenizer, loss=data.loss, on_batch=on_batch)
    # Without a seed: the order of held-out rows must not differ between training runs that are compared.
    heldout = arrange_rows(encoded, tokenizer, seed=None, **row_options)
    return train, dataclasses.replace(heldout, shared=shared)


def shared_passages(train: Sequence[document_files.DataFile], heldout: Sequence[document_files.DataFile]) -> float:
    """Return the share of the passages of held-out files that training files have too."""
    return passages.shared_share(
        *(itertools.chain.from_iterable(file.documents for file in files) for files in (train, heldout))
    )


def files(config: TrainConfig) -> tuple[list[document_files.DataFile], list[document_files.DataFile]]:
    """Read the files to train on, and the held-out files or the held-out parts of the training files."""
    data, share = config.data, config.data.heldout_share
    record_shapes.check_columns(data.columns, f"{config.location}: [data] columns")
    options = document_files.Options.of_training(config)
    train, heldout = (
        [document_files.read(config.resolve(name), options) for name in names] for names in (data.paths, data.heldout)
    )
    if not share:
        return train, heldout
    remaining = [file.part(lambda document: not held_out(document, share)) for file in train]
    heldout = [file.part(lambda document: held_out(document, share)) for file in train]
    count = sum(len(file.documents) for file in train)
    if not all(any(file.documents for file in split) for split in (remaining, heldout)):
        problem = f"it holds out whole documents, and of {count} one part is empty"
        hint = 'Name other files in heldout; of plain text, split_text = "paragraphs" makes more documents'
        raise RefusedError(f"{config.location}: [data] heldout_share", problem, hint)
    return remaining, heldout


def held_out(document: document_files.Document, share: float) -> bool:
    """Return whether a document belongs to the held-out share.

    Its digest decides, so that all copies of a document are held out together, and so is the same document in other data.
    """
    return int.from_bytes(document.digest[:8], "big") < share * 2**64


def overlap(train_set: Dataset, heldout: Dataset | None) -> list[str]:
    """Return notes if the sets share documents or passages."""
    if heldout is None:
        return []
    if shared := len(np.intersect1d(train_set.digests, heldout.digests)):
        return [f"{shared} held-out documents are also trained on: its perplexity proves nothing"]
    return passages.note(heldout.shared)


def build(
    files: Sequence[document_files.DataFile],
    tokenizer: Any,
    *,
    sequence: int,
    loss: str,
    seed: int | None,
    pack_rows: bool = True,
    pairs: bool = False,
) -> Dataset:
    """Encode documents and arrange them in rows; arguments and errors are those of `encode_files` and `arrange_rows`."""
    encoded_files = encode_files(files, tokenizer, loss=loss)
    return arrange_rows(encoded_files, tokenizer, sequence=sequence, seed=seed, pack_rows=pack_rows, pairs=pairs)


def encode_files(
    files: Sequence[document_files.DataFile],
    tokenizer: Any,
    *,
    loss: str,
    on_batch: Callable[[int], None] | None = None,
) -> EncodedFiles:
    """Encode the documents of files.

    Args:
        loss: `all` or `completion`.
        on_batch: As in `encoding.encode_documents`.

    Raises:
        FormatError: The chat template refuses conversations.
    """
    template_notes = _use_alpaca(files, tokenizer)
    examples = itertools.chain.from_iterable(
        encode_documents(file.documents, tokenizer, loss=loss, on_batch=on_batch) for file in files
    )
    tokens = collect(examples, stop_tokens(tokenizer))
    used, start = [], 0
    for file in files:
        # The two sides of a pair are encoded as two documents.
        end = start + len(file.documents) * (2 if record_shapes.PAIRS in file.shapes else 1)
        count = int(tokens.documents["length"][start:end].sum())
        used.append(File(file.name, file.digest, file.size, len(file.documents), count))
        start = end
    notes = tuple(note for file in files for note in file.notes)
    return EncodedFiles(tuple(used), tokens, notes, template_notes)


def arrange_rows(
    encoded_files: EncodedFiles,
    tokenizer: Any,
    *,
    sequence: int,
    seed: int | None,
    pack_rows: bool = True,
    pairs: bool = False,
    shares: Sequence[float] | None = None,
    partial: bool = False,
) -> Dataset:
    """Arrange encoded documents in rows.

    Args:
        sequence: Tokens in a row.
        seed: Seeds the order of documents; None sorts them by their tokens, so that the rows do not depend on the file order.
        pack_rows: Let documents share rows.
        pairs: Documents are pairs, whose sides follow each other in a row.
        shares: The share of each file in the tokens; None uses all of each file.
        partial: The documents are a sample of the data, which may contain nothing to train on.

    Raises:
        RefusedError: Nothing in the data would be trained on.
    """
    tokens, used_files = encoded_files.tokens, encoded_files.files
    notes = (*encoded_files.notes, *encoded_files.template_notes)
    sizes = tokens.documents["length"].reshape(-1, 2 if pairs else 1).sum(axis=1)
    units = np.arange(len(sizes))
    if shares:
        units, used_files = draw_by_share(sizes, used_files, shares, seed or 0)
        notes = (*notes, *_mix_notes(encoded_files.files, used_files))
    if seed is None:
        # A checksum of the tokens orders the documents, so that renamed or reordered files give the same evaluation.
        units = units[np.argsort([_checksum(tokens, unit, pairs) for unit in units.tolist()], kind="stable")]
    else:
        units = units[np.random.Generator(np.random.PCG64(seed)).permutation(len(units))]
    # The sides of pairs stay together.
    order = (2 * units[:, None] + np.arange(2)).reshape(-1) if pairs else units
    packed = pack(tokens, sequence, order=order, pack_rows=pack_rows, pairs=pairs)
    max_length = sequence // 2 if pairs else sequence
    lines = tokens.documents[order]
    if not (partial or any(batch.label_tokens for batch in packed.parts())):
        raise nothing_to_train_on(lines, max_length, ", ".join(file.path for file in used_files))
    truncated_documents = truncated_count(lines, max_length, pack_rows=pack_rows)
    notes = (
        *notes,
        *left_out_notes(lines, sequence, pairs=pairs),
        *learning_notes(lines[lines["length"] > 0], truncated_documents, max_length, tokenizer),
    )
    digests = np.unique(tokens.documents["digest"])
    return Dataset(packed, used_files, notes, digests, tokens.starts, truncated_documents)


def _checksum(tokens: Tokens, unit: int, pairs: bool) -> int:
    document_numbers = (2 * unit, 2 * unit + 1) if pairs else (unit,)
    return zlib.crc32(b"".join(tokens.ids(number).tobytes() for number in document_numbers))


def draw_by_share(
    sizes: np.ndarray, files: Sequence[File], shares: Sequence[float], seed: int
) -> tuple[np.ndarray, tuple[File, ...]]:
    """Draw documents so that each file has its share of the tokens; return their numbers, and the files with the counts used.

    As many documents are drawn as possible without using any of them twice, so at least one file is used completely.

    Args:
        sizes: The tokens of each document, or of each pair, of all files in order.
    """
    # The file that is smallest in relation to its share limits the total.
    limit = min(file.tokens / share for file, share in zip(files, shares, strict=True))
    drawn_numbers, used_files, start = list[np.ndarray](), list[File](), 0
    for number, (file, share) in enumerate(zip(files, shares, strict=True)):
        drawn = start + np.random.Generator(np.random.PCG64([seed, number])).permutation(file.documents)
        totals = np.cumsum(sizes[drawn])
        # At least one document of each file, even if it exceeds the share.
        count = max(1, int(np.searchsorted(totals, round(share * limit), side="right"))) if file.documents else 0
        drawn_numbers.append(drawn[:count])
        used_files.append(dataclasses.replace(file, documents=count, tokens=int(totals[count - 1]) if count else 0))
        start += file.documents
    return np.sort(np.concatenate(drawn_numbers)), tuple(used_files)


def _mix_notes(files: Sequence[File], used_files: Sequence[File]) -> Iterator[str]:
    tokens = sum(file.tokens for file in used_files)
    for original, file in zip(files, used_files, strict=True):
        share = f"{file.tokens / max(1, tokens):.1%} of the tokens"
        yield f"{file.path}: {file.documents:,} of {original.documents:,} documents are used, {share}"


def _use_alpaca(files: Sequence[document_files.DataFile], tokenizer: Any) -> tuple[str, ...]:
    """Give a tokenizer without a chat template, which instructions need, the words of Alpaca; return a note if so."""
    if getattr(tokenizer, "chat_template", None):
        return ()
    records = (document.record for file in files for document in file.documents)
    if not any("instruction" in side for record in records for side in (record, *map(record.get, record_shapes.SIDES)) if side):
        return ()
    chat_template.use_alpaca(tokenizer)
    return ("the model has no chat template: instructions are written in the words of Alpaca",)


def truncated_count(lines: np.ndarray, sequence: int, *, pack_rows: bool) -> int:
    """Return the number of documents, `lines` of `Tokens.documents`, that are longer than a row and lose their end."""
    unsplit = lines["joint"] if pack_rows else True
    return int((unsplit & (lines["length"] > sequence)).sum())


def nothing_to_train_on(lines: np.ndarray, sequence: int, location: str) -> RefusedError:
    """Return the error for documents without a token to train on."""
    if lines["trained"].any():
        problem = f"no token to train on: the answers come after the first {sequence} tokens of every document"
        return RefusedError(location, problem, "Raise [data] sequence")
    reason = "all documents are prompts" if len(lines) else "there are no documents"
    if lines["unwritten"].any():
        reason = "the chat template writes no answer in full"
    return RefusedError(location, f"no token to train on: {reason}")


def left_out_notes(lines: np.ndarray, sequence: int, *, pairs: bool) -> Iterator[str]:
    """Yield notes on the examples, or pairs, that are in no row, because nothing of them would be trained on."""
    left_out = ~packed_rows.has_labels(lines, sequence, pairs=pairs)
    # An answer that a longer row would contain, in contrast to those that no row contains.
    cut = left_out & packed_rows.has_labels(lines, 2 * int(lines["length"].max(initial=1)), pairs=pairs)
    name, length = ("pairs", sequence // 2) if pairs else ("examples", sequence)
    reasons = {f"their answers come after token {length}": cut, "they have no token to train on": left_out & ~cut}
    for reason, affected in reasons.items():
        if count := int(affected.sum()):
            yield f"{count} of {len(affected)} {name} are left out: {reason}"


def learning_notes(lines: np.ndarray, cut: int, sequence: int, tokenizer: Any) -> Iterator[str]:
    """Yield notes on what is not trained on, and on missing ends of answers; `cut` documents are longer than a row."""
    count, trained, tokens = len(lines), int(lines["trained"].sum()), int(lines["length"].sum())
    if cut:
        share = f"{cut / count:.0%}"
        yield f"{cut} of {count} examples ({share}) are longer than {sequence} tokens and were cut there"
    if trained < tokens:
        yield f"{trained / tokens:.0%} of {tokens} tokens are trained on, the others are context"
    answers, unwritten = int(lines["answers"].sum()), int(lines["unwritten"].sum())
    if unwritten:
        then = ", and are not trained on" if trained < tokens else ""
        yield f"{unwritten} of {answers} answers are not written in full by the chat template{then}"
    if thoughtless := int(lines["thoughtless"].sum()):
        yield f"the chat template does not write the thoughts of {thoughtless} of {answers} answers, which are not learned"
    if empty := int(lines["empty_thoughts"].sum()):
        yield f"{empty} of {answers} answers are learned with an empty thought, because their prompt does not end with it"
    if prompted := int(lines["prompted_thoughts"].sum()):
        yield f"the prompt of {prompted} of {answers} answers ends with an empty thought, which is context"
    # Examples without an answer have no end to learn; other notes count them.
    stopped = lines["stopped"][lines["trained"] > 0]
    if stop_tokens(tokenizer) and not stopped.any():
        yield f"the stop token {tokenizer.eos_token!r} is never trained on: the model will not learn to end its answers"
    elif stop_tokens(tokenizer) and (endless := int((~stopped).sum())):
        yield f"{endless} of {len(stopped)} examples do not end with a stop token that is trained on"


def configured_prompt(config: TrainConfig, tokenizer: Any) -> TrainedPrompt:
    """Return the prompt that a config sets: a template by its name or its file, its options, and the date.

    Raises:
        NotFoundError: The template is neither a name nor a file.
        RefusedError: The tokenizer has no token for the marks of `chatml`, or an option has the name of another variable.
    """
    data = config.data
    if reserved := sorted(RESERVED.intersection(data.template_options)):
        problem = f"`{reserved[0]}` is set by each conversation, or by another field"
        raise RefusedError(f"{config.location}: [data] template_options", problem, "Leave it out")
    template = None if data.chat_template is None else _configured_template(config, data.chat_template, tokenizer)
    return TrainedPrompt(template, tuple(data.template_options.items()), data.date)


def _configured_template(config: TrainConfig, setting: str, tokenizer: Any) -> str:
    path, location = config.resolve(setting), f"{config.location}: [data] chat_template"
    if setting not in chat_template.NAMED and not path.is_file():
        raise NotFoundError(location, f"no file {setting[:80]!r}", f"The names are {', '.join(chat_template.NAMED)}")
    # Depending on the tokenizer, the id of an unknown token is None or that of the token for unknown text.
    if setting == "chatml" and tokenizer.convert_tokens_to_ids("<|im_end|>") in (None, tokenizer.unk_token_id):
        problem = "the base has no token <|im_end|>, with which chatml ends what somebody says"
        raise RefusedError(location, problem, 'Set "plain", or a file of your own')
    return chat_template.for_tokenizer(chat_template.NAMED.get(setting) or json_file.read_text(path), tokenizer)
