"""The schedule of requests: they wait in line, and each row of a batch pins the slots of its adapters.

A request whose adapters find no slot may be overtaken by others, because the free slots are of no use to it. But not forever:
once it has waited for `patience` seconds nothing overtakes it, so that rows end and a slot becomes free. A slot is never taken
from a row, and the least recently used of the others is filled next: more adapters than slots cost waiting time, but no adapter
is moved in and out for every token.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import field

from adapterhub_converters.lazy_dataclass import dataclass

from .answer import GeneratedAnswer
from .loaded_adapters import LoadedAdapter, Parts
from .segment_attention import KeysValues
from .slots import Use
from .streams import Stream
from .values import Limits, Request


@dataclass(eq=False)
class Row:
    """A request, waiting or in the batch.

    Attributes:
        request: The request.
        parts: The adapters of its blend with their weights.
        stream: The stream for its pieces.
        answer: The answer so far.
        keys_values: The keys and values of all tokens that were read.
        read: The number of tokens of prompt and answer that were read.
        token: The last token of the answer, which is read next.
        use: The slots of its adapters.
        since: When it arrived.
        has_ended: Whether it was removed.
    """

    request: Request
    parts: Parts
    stream: Stream
    answer: GeneratedAnswer
    keys_values: KeysValues
    read: int = 0
    token: int = -1
    use: Use = ()
    since: float = field(default_factory=time.monotonic)
    has_ended: bool = False

    @property
    def prompt_is_read(self) -> bool:
        """Whether the whole prompt was read."""
        return self.read >= len(self.request.ids)

    @property
    def tokens(self) -> int:
        """The largest number of tokens of prompt and answer."""
        return len(self.request.ids) + self.request.max_tokens


class SlotTable:
    """The table of slots: which adapter is in which slot, and how many rows use it.

    Args:
        fill: Called with a slot and an adapter before its first use.

    Attributes:
        pinned: The keys of adapters that give up their slots last.
    """

    def __init__(self, count: int, fill: Callable[[int, LoadedAdapter], None]) -> None:
        self._fill = fill
        self.pinned: frozenset[str] = frozenset()
        self._free = list(reversed(range(count)))
        self._slots: OrderedDict[int, int] = OrderedDict()  # slot by number of an adapter, the most recently used at the end
        self._keys: dict[int, str] = {}  # of the same adapters
        self._pins: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def pinned_count(self) -> int:
        """The number of slots that a row uses."""
        return len(self._pins)

    def has_room(self, parts: Parts) -> bool:
        """Return whether all adapters of a blend can have slots now."""
        numbers = {adapter.number for adapter, _ in parts}
        missing = numbers - {*self._slots}
        idle = {number for number in self._slots if not self._pins[number]} - numbers
        return len(missing) <= len(self._free) + len(idle)

    def pin(self, parts: Parts) -> Use:
        """Put the adapters of a blend into slots, where they stay until unpinned, and return the slots."""
        numbers = {adapter.number for adapter, _ in parts}
        for adapter, _ in parts:
            if adapter.number not in self._slots:
                slot = self._free.pop() if self._free else self._evict(numbers)
                try:
                    self._fill(slot, adapter)
                # Given back, so that a failed copy to the device does not lose a slot.
                except BaseException:
                    self._free.append(slot)
                    raise
                self._slots[adapter.number], self._keys[adapter.number] = slot, adapter.key
            self._slots.move_to_end(adapter.number)
        self._pins.update(numbers)
        return tuple((self._slots[adapter.number], weight) for adapter, weight in parts)

    def _evict(self, spared: set[int]) -> int:
        """Free the slot of the least recently used adapter that no row uses and is not spared, and return it."""
        idle = [number for number in self._slots if not self._pins[number] and number not in spared]
        number = next((number for number in idle if self._keys[number] not in self.pinned), idle[0])
        del self._keys[number]
        return self._slots.pop(number)

    def unpin(self, parts: Parts) -> None:
        """Release the slots of a row."""
        self._pins -= Counter({adapter.number for adapter, _ in parts})


class Schedule:
    """The waiting requests, and the rows of the batch.

    Args:
        token_size: Bytes of the keys and values of a token.
    """

    def __init__(self, limits: Limits, slots: SlotTable, token_size: int) -> None:
        self._limits, self._slots = limits, slots
        self._most_tokens = limits.keys_values // max(1, token_size)
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []

    def remove(self, row: Row) -> None:
        """Remove a row that ended or was canceled, and release its slots."""
        if row in self.rows:
            self.rows.remove(row)
            self._slots.unpin(row.parts)
        elif row in self.waiting:
            self.waiting.remove(row)

    def move_to_end(self, row: Row) -> None:
        """Move a row behind the others of the batch."""
        self.rows.remove(row)
        self.rows.append(row)

    def admit(self) -> Iterator[Row]:
        """Yield the waiting requests whose turn it is, in order of arrival; the caller must start each at once."""
        deadline = time.monotonic() - self._limits.patience
        for row in list(self.waiting):
            tokens = sum(running.tokens for running in self.rows)
            # A request that is too large for the limit alone still runs, with the batch to itself.
            if len(self.rows) >= self._limits.rows or (self.rows and tokens + row.tokens > self._most_tokens):
                return
            if self._slots.has_room(row.parts):
                self.waiting.remove(row)
                yield row
            elif row.since < deadline:
                return

    def start(self, row: Row) -> None:
        """Put the adapters of a row into slots, and the row into the batch."""
        row.use = self._slots.pin(row.parts)
        self.rows.append(row)
