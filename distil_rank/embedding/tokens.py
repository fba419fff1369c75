"""Residues to the tokens of a model, packed without padding; one table look-up for a whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from esm import Alphabet
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ResidueTokens:
    """How a model writes a protein: one token a residue, the same special tokens before and after all of them.

    Attributes:
        table: token of each byte, (256,) int64; that of an unknown residue for what is no residue.
        before: tokens before the first residue.
        after: those after the last residue.
        bos: whether the first token is a special one, which `bos` pools.
    """

    table: np.ndarray
    before: tuple[int, ...]
    after: tuple[int, ...]
    bos: bool = True

    @classmethod
    def of(
        cls, letters: Mapping[str, int], unknown: int, before: Sequence[int], after: Sequence[int], bos: bool = True
    ) -> Self:
        """From the tokens of single letters.

        >>> tokens = ResidueTokens.of({"A": 5, "C": 6}, 3, [0], [2])
        >>> tokens.pack(["AC", "Z"])
        (tensor([0, 5, 6, 2, 0, 3, 2]), [4, 3])
        """
        table = np.full(256, unknown, dtype=np.int64)
        for letter, token in letters.items():
            table[ord(letter)] = token
        return cls(table, tuple(before), tuple(after), bos)

    @classmethod
    def of_alphabet(cls, alphabet: Alphabet) -> Self:
        """fair-esm's: BOS, residues, EOS."""
        letters = {letter: token for letter, token in alphabet.tok_to_idx.items() if len(letter) == 1}
        return cls.of(letters, alphabet.unk_idx, [alphabet.cls_idx], [alphabet.eos_idx])

    @property
    def specials(self) -> int:
        """Tokens of a sequence that are no residues."""
        return len(self.before) + len(self.after)

    def pack(self, sequences: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Tokens of all sequences one after the other, (T,), and how many each has."""
        before, after = np.array(self.before, dtype=np.int64), np.array(self.after, dtype=np.int64)
        parts = [
            part for text in sequences for part in (before, self.table[np.frombuffer(text.encode(), np.uint8)], after)
        ]
        return torch.from_numpy(np.concatenate(parts)), [len(text) + self.specials for text in sequences]
