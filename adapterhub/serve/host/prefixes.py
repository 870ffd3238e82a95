"""Keys and values of the beginnings of prompts, kept for prompts that begin alike and use the same blend.

A prompt is a chain of blocks of tokens. The key of a block is a digest of the key of the block before it and of its tokens;
that of the first, of what answers: the versions, each by the number of its load, with their weights. So a block is found only
behind the same tokens with the same bytes of the same adapters; the base is that of the host.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from .adapters import Parts
from .attention import BLOCK, Chunk, KeysValues, size_of


class Prefixes:
    """Blocks by their keys, the last used at the end; at most `most` bytes.

    Attributes:
        size: Bytes in memory.
        hits: Tokens that were found so far.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._blocks: OrderedDict[bytes, tuple[Chunk, int]] = OrderedDict()
        self.size = self.hits = 0

    def restore(self, ids: Sequence[int], parts: Parts, keys_values: KeysValues) -> int:
        """Write what is known of a prompt into its keys and values; returns the number of tokens, at most all but the last."""
        found: list[bytes] = []
        for key in _keys(ids[:-1], parts):
            if key not in self._blocks:
                break
            keys_values.write(len(found) * BLOCK, self._blocks[key][0])
            found.append(key)
        self._used(found)
        self.hits += len(found) * BLOCK
        return len(found) * BLOCK

    def keep(self, ids: Sequence[int], parts: Parts, keys_values: KeysValues) -> None:
        """Keep the blocks of a prompt that was read."""
        keys = list(_keys(ids, parts)) if self._most else []
        for at, key in enumerate(keys):
            if key not in self._blocks:
                chunk = keys_values.copied(at * BLOCK, (at + 1) * BLOCK)
                self._blocks[key] = chunk, size_of(chunk)
                self.size += self._blocks[key][1]
        self._used(keys)
        while self.size > self._most:
            _, (_, size) = self._blocks.popitem(last=False)
            self.size -= size

    def _used(self, keys: Sequence[bytes]) -> None:
        # Later blocks are of no use without those before them, which are to be removed after them.
        for key in reversed(keys):
            self._blocks.move_to_end(key)


def _keys(ids: Sequence[int], parts: Parts) -> Iterator[bytes]:
    """Yield the key of each whole block."""
    key = blake2b(b"".join(struct.pack("<qd", adapter.number, weight) for adapter, weight in parts), digest_size=16).digest()
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        key = blake2b(key + struct.pack(f"<{BLOCK}q", *ids[start : start + BLOCK]), digest_size=16).digest()
        yield key
