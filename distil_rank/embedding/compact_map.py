"""A dictionary for tens of millions of names: digests to numbers in flat arrays."""

from __future__ import annotations

import hashlib
from array import array

EMPTY = 2**64 - 1  # marks a free slot; stored numbers are smaller


class CompactMap:
    """Maps texts to numbers below 2**64 - 1 in 36 to 72 bytes each; a `dict` of strings takes four times as much.

    Keeps 128 bits of a digest in place of the text (two of 65 million texts then share one with probability 1e-23), in
    an open-addressing table with linear probing.

    >>> rows = CompactMap()
    >>> rows.setdefault("MKV", 0), rows.setdefault("MAA", 1), rows.setdefault("MKV", 2), rows.get("GGG"), len(rows)
    (0, 1, 0, None, 2)
    """

    def __init__(self) -> None:
        self._count = 0
        self._allocate(1024)

    def _allocate(self, slots: int) -> None:
        self._mask = slots - 1
        self._high = array("Q", bytes(8 * slots))
        self._low = array("Q", bytes(8 * slots))
        self._number = array("Q", b"\xff" * 8 * slots)

    def __len__(self) -> int:
        return self._count

    def get(self, text: str) -> int | None:
        """The text's number, or None."""
        number = self._number[self._slot(*_digest(text))]
        return None if number == EMPTY else number

    def setdefault(self, text: str, number: int) -> int:
        """The text's number, set to this one if it has none yet."""
        high, low = _digest(text)
        slot = self._slot(high, low)
        if self._number[slot] == EMPTY:
            self._high[slot], self._low[slot], self._number[slot] = high, low, number
            self._count += 1
            if self._count > self._mask * 2 // 3:
                self._grow()
            return number
        return self._number[slot]

    def _slot(self, high: int, low: int) -> int:
        """The digest's slot, or the free one where it would be stored."""
        slot = low & self._mask
        while self._number[slot] != EMPTY and (self._low[slot] != low or self._high[slot] != high):
            slot = (slot + 1) & self._mask
        return slot

    def _grow(self) -> None:
        old = zip(self._high, self._low, self._number, strict=True)
        self._allocate(2 * (self._mask + 1))
        for high, low, number in old:
            if number != EMPTY:
                slot = self._slot(high, low)
                self._high[slot], self._low[slot], self._number[slot] = high, low, number


def _digest(text: str) -> tuple[int, int]:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8]), int.from_bytes(digest[8:])
