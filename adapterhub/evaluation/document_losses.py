"""The loss of each document, which rows share and long ones fill several of, as the comparison of two adapters needs it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adapterhub.training.data.dataset import Dataset
from adapterhub.training.data.packed_rows import IGNORED, Rows, document_numbers, sample_numbers
from adapterhub.training.loop import heldout
from adapterhub.training.model.base_model import Base
from adapterhub_converters.lazy_dataclass import dataclass


@dataclass(frozen=True, eq=False)
class DocumentRows:
    """Rows, and the document of each of their parts.

    Attributes:
        documents: The number of the document of each part, a document or a piece of one, in the order of rows: `(parts,)`.
        offsets: The number of the first part of each row, `(rows,)`.
    """

    rows: Rows
    documents: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The number of tokens with a loss of each document that has any."""
        counts = self._label_counts()
        return counts[counts > 0].astype(np.int64)

    def _label_counts(self) -> NDArray[np.float64]:
        return self._by_document(self._by_part(self.rows, self.rows.labels != IGNORED, 0))

    def measure(self, model: Base, size: int) -> tuple[float, NDArray[np.float64]]:
        """Return the mean loss, and the sum of the losses of each document that has any; `size` rows are computed at a time."""
        parts, start = np.zeros(len(self.documents) + 1), 0

        def add(batch: Rows, label_logprobs: Tensor) -> None:
            nonlocal start
            parts[:] += self._by_part(batch, -label_logprobs.double().cpu().numpy(), start)
            start += len(batch)

        loss = heldout.evaluate(model, self.rows, size, on_pass=add)
        return loss, self._by_document(parts)[self._label_counts() > 0]

    def _by_part(self, batch: Rows, values: NDArray[np.generic], start: int) -> NDArray[np.float64]:
        """Return the sums of `values` `(rows, tokens)` of rows from number `start` on over each part, `(parts + 1,)`."""
        # Padding counts as the part after the last one of its row, and has no values.
        places = self.offsets[start : start + len(batch), None] + document_numbers(batch)
        return np.bincount(places.ravel(), values.ravel(), minlength=len(self.documents) + 1).astype(np.float64, copy=False)

    def _by_document(self, parts: NDArray[np.float64]) -> NDArray[np.float64]:
        _, places = np.unique(self.documents, return_inverse=True)
        return np.bincount(places.ravel(), parts[:-1]).astype(np.float64, copy=False)


def document_rows(dataset: Dataset, tokens: int | None) -> DocumentRows:
    """Return the rows of a data set, about `tokens` tokens of it, with the documents of their parts."""
    packed = dataset.packed
    numbers = sample_numbers(packed, tokens)
    counts = packed.bounds[numbers + 1] - packed.bounds[numbers]
    offsets = np.cumsum(counts) - counts
    segments = np.repeat(packed.bounds[numbers] - offsets, counts) + np.arange(counts.sum())
    documents = np.searchsorted(dataset.starts, packed.starts[segments], side="right") - 1
    return DocumentRows(packed.take(numbers), documents, offsets)
