"""What every backbone is to the rest: residues in, as its tokens without padding, and hidden states out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

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


class Encoder:
    """A model up to some layer in some precision on a device: packed tokens in, hidden states out."""

    device: torch.device
    layer: int  # the last that is computed
    depth: int  # of the whole model

    def __call__(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Hidden states behind the last computed layer, (T, dim) float32; those of the model's last have its norm.

        Tokens (T,) and their numbers are as `ResidueTokens` packs them.
        """
        *_, hidden = self.states(tokens, lengths)
        return self.normed(hidden) if self.layer == self.depth else hidden

    def states(self, tokens: Tensor, lengths: list[int]) -> Iterator[Tensor]:
        """Hidden states behind the embedding and each layer, to be `normed` where they are the last's.

        Each may be overwritten by the next: use it before going on.
        """
        raise NotImplementedError

    def normed(self, hidden: Tensor) -> Tensor:
        """The last layer's states after the model's final norm; here they have it already."""
        return hidden


@dataclass(frozen=True)
class Backbone:
    """A protein language model in evaluation mode.

    Attributes:
        name: As requested; for `auto` the chosen one.
        model: A module of fair-esm or `transformers`.
        tokens: How it writes residues.
        dim: Width of the hidden states.
        num_layers: Transformer layers.
        sha256: Of the weights' file, or over those of all files in order.
        limit: Residues in one pass at most, where the model has a table of positions.
        fallback: The warning, where this is not the model that was asked for.
    """

    name: str
    model: Any
    tokens: ResidueTokens
    dim: int
    num_layers: int
    sha256: str
    limit: int | None = None
    fallback: str | None = None

    def encoder(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", layers: Sequence[int] = ()
    ) -> Encoder:
        """In some precision on a device, up to the last of these layers, whose states are wanted; by default of all."""
        raise NotImplementedError
