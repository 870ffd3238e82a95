"""A cache of keys and values for prompts that begin alike and use the same blend.

A prompt is a chain of blocks of tokens. The key of a block is a digest of the previous block's key and its tokens; the first
key also covers the versions, each by the number of its load, with their weights. So a block is found only after the same
tokens, with the same bytes of the same adapters; the base is always the host's.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from .loaded_adapters import Parts
from .segment_attention import BLOCK, Chunk, KeysValues, chunk_size


class Prefixes:
    """A cache of blocks by their keys, least recently used first, of at most `max_bytes`.

    Attributes:
        size: Bytes in memory.
        hits: Tokens that were found so far.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[bytes, tuple[Chunk, int]] = OrderedDict()
        self.size = self.hits = 0

    def restore(self, ids: Sequence[int], parts: Parts, keys_values: KeysValues) -> int:
        """Write the cached beginning of a prompt into its keys and values; return its length in tokens, at most all but one."""
        found_keys: list[bytes] = []
        # The last token is always computed, because its logits give the first token of the answer.
        for key in _block_keys(ids[:-1], parts):
            if key not in self._blocks:
                break
            keys_values.write(len(found_keys) * BLOCK, self._blocks[key][0])
            found_keys.append(key)
        self._mark_used(found_keys)
        self.hits += len(found_keys) * BLOCK
        return len(found_keys) * BLOCK

    def keep(self, ids: Sequence[int], parts: Parts, keys_values: KeysValues) -> None:
        """Cache the blocks of a prompt that was read."""
        keys = list(_block_keys(ids, parts)) if self._max_bytes else []
        for index, key in enumerate(keys):
            if key not in self._blocks:
                chunk = keys_values.copy(index * BLOCK, (index + 1) * BLOCK)
                self._blocks[key] = chunk, chunk_size(chunk)
                self.size += self._blocks[key][1]
        self._mark_used(keys)
        while self.size > self._max_bytes:
            _, (_, size) = self._blocks.popitem(last=False)
            self.size -= size

    def _mark_used(self, keys: Sequence[bytes]) -> None:
        # Later blocks are useless without earlier ones, so the earlier ones must be evicted last.
        """Mark blocks as just used."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)


def _block_keys(ids: Sequence[int], parts: Parts) -> Iterator[bytes]:
    """Yield the key of each complete block."""
    key = blake2b(b"".join(struct.pack("<qd", adapter.number, weight) for adapter, weight in parts), digest_size=16).digest()
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        key = blake2b(key + struct.pack(f"<{BLOCK}q", *ids[start : start + BLOCK]), digest_size=16).digest()
        yield key
