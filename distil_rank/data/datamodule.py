"""Embeddings as a LightningDataModule: extracted where missing, split without leaks, in batches."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

from distil_rank.data.files import SYNTHETIC, Embeddings, find_source, load_matrix, read_clusters
from distil_rank.data.split import DataDescription, Split, make_split
from distil_rank.embedding.extraction import default_store
from distil_rank.embedding.layers import split_source
from distil_rank.embedding.run import embed
from distil_rank.errors import InputError
from distil_rank.lowrank.moments import Moments

log = logging.getLogger(__name__)

STREAM_ROWS = 8192  # rows per block of a pass over all of them
MAX_TARGET_BYTES = 2**29  # of the teacher's outputs for the training rows
SplitName = Literal["train", "val", "test"]
Batch = Tensor | tuple[Tensor, Tensor]  # rows, and what belongs to them where the data module has targets


class Rows(Dataset[Batch]):
    """Selected rows of a matrix that may be memory-mapped, with a target each or none; an index is a whole batch."""

    def __init__(self, x: np.ndarray, indices: np.ndarray, targets: Tensor | None = None) -> None:
        self.x, self.indices, self.targets = x, indices, targets

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: list[int]) -> Batch:
        rows = torch.from_numpy(self.x[self.indices[index]])
        return rows if self.targets is None else (rows, self.targets[index])


class EmbeddingDataModule(LightningDataModule):
    """Train, validation and test rows of one set of embeddings. A batch is a float32 tensor `(rows, d)`.

    Args:
        source: A store, `.npz`, `.npy`, `.safetensors`, `.h5`, a folder with `embeddings_train.pt` and
            `embeddings_val.pt`, or `synthetic`. `auto` is `data/sample`, unless there is one finished
            store or pair of yours in `embeddings/` or here.
        fasta: Sequences to extract into `source` first (only what is missing there).
        backbone: ESM-2 model for the extraction (see `distil-rank embed --help`).
        pooling: One vector per protein (`mean`, `bos`) or per residue (`residue`).
        clusters: Sequence clusters to split by, as MMseqs2 writes them: lines of representative, tab, member. A store
            with a `clusters.tsv` in its folder brings its own.
        split: What stays on one side: `clusters` (ids in the data), `mmseqs` (clusters at 30 % identity), `exact`
            (duplicates only), or `auto`, the strictest available.
        val_fraction: Share of the rows for validation; `test_fraction` of all rows for the report alone.
        batch_size: Rows in a training batch.
        replacement: Draw training rows with replacement, as the original does.
        seed: Of the split, and of synthetic data.
        epoch_batches: Batches in an epoch where rows are drawn with replacement; by default as many as without.

    Raises:
        InputError: nothing usable at `source`, or too few rows for three splits.
    """

    embeddings: Embeddings
    split_rows: Split

    def __init__(
        self,
        source: str = "auto",
        fasta: str | None = None,
        backbone: str = "auto",
        pooling: Literal["mean", "bos", "residue"] = "mean",
        clusters: str | None = None,
        split: Literal["auto", "mmseqs", "clusters", "exact"] = "auto",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        batch_size: int = 64,
        replacement: bool = False,
        seed: int = 42,
        epoch_batches: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.source = str(default_store(fasta)) if fasta is not None and source == "auto" else source
        self.targets: Tensor | None = None
        self.labels: Tensor | None = None
        self._ready = False

    @classmethod
    def of(cls, embeddings: Embeddings, split: Split, labels: np.ndarray | None = None) -> Self:
        """Vectors that are read and split already; with `labels (N, …)` batches are pairs `(x, labels)`."""
        data = cls(str(embeddings.provenance.get("source", "memory")))
        data.embeddings, data.split_rows, data._ready = embeddings, split, True
        if labels is not None:
            values = torch.from_numpy(labels)
            data.labels = values.float() if values.is_floating_point() else values
        return data

    def prepare_data(self) -> None:
        """Extract what is missing (Lightning calls it in one process, before every `setup`)."""
        h: Any = self.hparams
        if h.fasta is not None and not self._ready:
            embed(h.fasta, self.source, backbone=h.backbone, pooling=h.pooling)

    def setup(self, stage: str | None = None) -> None:
        """Open the embeddings and split them, whatever the stage; further calls do nothing."""
        if self._ready:
            return
        h: Any = self.hparams
        self.source = find_source(self.source)
        if self.source == SYNTHETIC:
            self.embeddings = synthetic_embeddings(seed=h.seed)
        else:
            self.embeddings = load_matrix(self.source)
            shipped = Path(split_source(self.source)[0]) / "clusters.tsv"
            if h.clusters is not None or shipped.exists():
                clusters = read_clusters(Path(h.clusters or shipped), self.embeddings.ids)
                self.embeddings = replace(self.embeddings, clusters=clusters)
        data, digests = self.embeddings, None
        if data.sequences is None:  # then at least equal vectors stay together
            digests = [hashlib.blake2b(np.ascontiguousarray(x).tobytes(), digest_size=16).digest() for x in data.x]
        if digests is not None and "rows_train" in data.provenance and data.clusters is None and h.split == "auto":
            self.split_rows = split_pair(digests, data.provenance["rows_train"])
        else:
            fractions = (h.val_fraction, h.test_fraction)
            columns = (data.ids, data.sequences, data.clusters)
            self.split_rows = make_split(*columns, h.split, *fractions, h.seed, groups=digests)
        if min(len(getattr(self.split_rows, split)) for split in get_args(SplitName)) < 2:
            raise InputError(
                f"Expected enough rows in {self.source} for train, validation and test but got {len(data.ids)} in all; "
                "give more proteins or larger fractions."
            )
        self._ready = True

    @property
    def dim(self) -> int:
        """d, the width of an embedding."""
        return self.embeddings.x.shape[1]

    def rows(self, split: SplitName, selected: np.ndarray | None = None) -> Tensor:
        """The rows of one split in memory, or selected ones of them, `(N, d)` float32."""
        indices = getattr(self.split_rows, split)
        return torch.from_numpy(self.embeddings.x[indices if selected is None else indices[selected]])

    def proteins(self, split: SplitName) -> np.ndarray:
        """Which protein each row of a split belongs to, numbered from 0, `(N,)`."""
        ids = np.asarray(self.embeddings.ids)[getattr(self.split_rows, split)]
        return np.unique(ids, return_inverse=True)[1]

    def stream(self, split: SplitName) -> Iterator[Tensor]:
        """Iterates over one split in order, in blocks of `STREAM_ROWS`, so that it need not fit in memory."""
        indices = getattr(self.split_rows, split)
        for start in range(0, len(indices), STREAM_ROWS):
            yield torch.from_numpy(self.embeddings.x[indices[start : start + STREAM_ROWS]])

    @cached_property
    def moments(self) -> Moments:
        """Mean and covariance of the training rows, in one streaming pass."""
        return Moments.of(self.stream("train"))

    @torch.no_grad()
    def with_targets(self, teacher: nn.Module) -> Self:
        """The same vectors, whose training batches are pairs `(x, teacher(x))`, computed once for all epochs.

        Outputs that would take more than `MAX_TARGET_BYTES` are left to each training step.
        """
        paired = copy(self)
        paired.labels = None
        first = teacher(self.rows("train", np.arange(1)))
        if 4 * first.shape[1] * len(self.split_rows.train) <= MAX_TARGET_BYTES:
            paired.targets = torch.cat([teacher(x) for x in self.stream("train")])
        return paired

    def with_batches(self, batch_size: int, replacement: bool, epoch_batches: int | None = None) -> Self:
        """The same data in other training batches."""
        other = copy(self)
        changes = {"batch_size": batch_size, "replacement": replacement, "epoch_batches": epoch_batches}
        other._set_hparams({**self.hparams, **changes})
        return other

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled training batches; the sampler draws from torch's global generator."""
        h: Any = self.hparams
        number = h.epoch_batches * h.batch_size if h.replacement and h.epoch_batches else None
        return self._loader(
            "train", h.batch_size, partial(RandomSampler, replacement=h.replacement, num_samples=number)
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation batches in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test batches in order."""
        return self._loader("test")

    def _loader(
        self, split: SplitName, batch_size: int = STREAM_ROWS, order: Callable[[Rows], Sampler[int]] = SequentialSampler
    ) -> DataLoader[Batch]:
        """Whole batches, each gathered by one indexing operation."""
        indices = getattr(self.split_rows, split)
        labels = None if self.labels is None else self.labels[torch.from_numpy(indices)]
        rows = Rows(self.embeddings.x, indices, self.targets if split == "train" and labels is None else labels)
        return DataLoader(rows, None, sampler=BatchSampler(order(rows), batch_size, drop_last=False))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the vectors, the split and the labels, its first 16 hexadecimal digits."""
        sha = hashlib.sha256()
        for start in range(0, len(self.embeddings.x), STREAM_ROWS):
            sha.update(np.ascontiguousarray(self.embeddings.x[start : start + STREAM_ROWS]).tobytes())
        for rows in (self.split_rows.train, self.split_rows.val, self.split_rows.test):
            sha.update(rows.astype(np.int64).tobytes())
        if self.labels is not None:
            sha.update(self.labels.numpy().tobytes())
        return sha.hexdigest()[:16]

    def description(self) -> DataDescription:
        """Where the data come from, how many rows there are, how they were split, and which backbone made them."""
        known = ("backbone", "pooling", "fallback", "embedding_run")
        about = {key: value for key, value in self.embeddings.provenance.items() if key in known}
        rows = {split: len(getattr(self.split_rows, split)) for split in get_args(SplitName)}
        return DataDescription(self.source, self.digest, self.dim, rows, self.split_rows.method, **about)


def split_pair(digests: Sequence[bytes], rows_train: int) -> Split:
    """The split that the original project's pair of files prescribes, by digests of the vectors, `(N,)`.

    The validation file's rows are held out, one third to choose the epoch and the rest for the report. A held-out
    vector that is also in the training file counts as a training row.
    """
    training = set(digests[:rows_train])
    if leaked := sum(digest in training for digest in digests[rows_train:]):
        held_out = len(digests) - rows_train
        log.warning("%d of %d validation vectors are also training vectors and stay there.", leaked, held_out)
    number = [0 if digest in training else 1 if digest[0] % 3 == 0 else 2 for digest in digests]
    return Split.of(np.array(number), "given with the data")


def synthetic_embeddings(seed: int) -> Embeddings:
    """2,000 Gaussian rows whose first 100 coordinates are 5 times as large (the original project's stand-in)."""
    x = torch.randn(2000, 1280, generator=torch.Generator().manual_seed(seed))
    x[:, :100] *= 5
    provenance = {"backbone": "none (Gaussian noise)", "fallback": "SYNTHETIC DATA, NOT PROTEINS"}
    return Embeddings([f"synthetic{i}" for i in range(len(x))], x.numpy(), provenance=provenance)
