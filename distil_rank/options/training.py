"""Options of train-teacher, distil, benchmark and sweep."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distil_rank.artefact import check_writable
from distil_rank.errors import InputError, check_range
from distil_rank.options.embed import check_exists
from distil_rank.options.evaluation import LabelOptions, TaskKind

BUILT_IN = ("denoising", "random", "spectral")


def check_rank_option(rank: float | str) -> None:
    """Raises `InputError` unless this is a positive integer, a share in (0, 1) or `auto`."""
    valid = rank == "auto"
    if not isinstance(rank, str | bool):
        integer = rank >= 1 and float(rank).is_integer()
        valid = 0 < rank < 1 or (integer and repr(rank) != "1.0")  # which may be all of the variance, or one direction
    if not valid:
        raise InputError(f"Expected --rank as an integer, a share of variance in (0, 1) or 'auto' but got {rank!r}.")


@dataclass(frozen=True)
class DataOptions:
    """What `EmbeddingDataModule` takes.

    Attributes:
        source: A store, matrix, HDF5 file, folder of embeddings_{train,val}.pt, `synthetic`, or `auto`.
        fasta: Sequences to extract into `source` first (only what is missing there).
        backbone: ESM-2 model of the extraction.
        pooling: One vector a protein (mean, bos) or a residue (residue).
        clusters: Sequence clusters to split by, as MMseqs2 writes them.
        split: What stays in one split: clusters, mmseqs (30 % identity), exact (duplicates), or the strictest.
        val_fraction: Share of the rows for validation.
        test_fraction: Share of the rows for the report alone.
        batch_size: Rows in a training batch.
        replacement: Draw training rows with replacement, as the original does.
        seed: Of the split, and of synthetic data.
    """

    source: str = "auto"
    fasta: str | None = None
    backbone: str = "auto"
    pooling: Literal["mean", "bos", "residue"] = "mean"
    clusters: str | None = None
    split: Literal["auto", "mmseqs", "clusters", "exact"] = "auto"
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    batch_size: int = 64
    replacement: bool = False
    seed: int = 42

    def check(self) -> None:
        """Raises `InputError` for values out of range and for files that are not there."""
        for name in ("val_fraction", "test_fraction"):
            check_range(f"--data.{name}", getattr(self, name), 0, 1)
        check_range("--data.val_fraction + --data.test_fraction", self.val_fraction + self.test_fraction, 0, 0.99)
        check_range("--data.batch_size", self.batch_size, 1)
        check_range("--data.seed", self.seed, 0)
        named = self.source in ("auto", "synthetic") or "://" in self.source or self.fasta is not None
        check_exists(self.source, named)
        for name in ("fasta", "clusters"):
            if (file := getattr(self, name)) is not None and not Path(file).exists():
                raise InputError(f"Expected a file at --data.{name} {file} but there is none.")


@dataclass(frozen=True)
class TeacherOptions:
    """The dense layer to be distilled.

    Attributes:
        kind: denoising (trained), random, spectral, or a layer of your own, FILE:KEY.
        noise: Standard deviation of the denoiser's noise.
        noise_scale: Whether that is absolute, or relative to each dimension's standard deviation.
        lr: Learning rate of the denoiser.
        steps: Optimiser steps of the denoiser.
        seed: Of the initialisation and the noise.
    """

    kind: str = "denoising"
    noise: float = 0.3
    noise_scale: Literal["absolute", "relative"] = "absolute"
    lr: float = 1e-3
    steps: int = 500
    seed: int = 42

    def check(self) -> None:
        """Raises `InputError` for a teacher that there is not, or values out of range."""
        if self.kind not in BUILT_IN and ":" not in self.kind and not Path(self.kind).exists():
            raise InputError(f"Expected a teacher out of {', '.join(BUILT_IN)}, or FILE:KEY, but got {self.kind!r}.")
        check_range("--teacher.noise", self.noise, 0)
        check_range("--teacher.lr", self.lr, 0)
        check_range("--teacher.steps", self.steps, 1)
        check_range("--teacher.seed", self.seed, 0)


@dataclass(frozen=True)
class StudentOptions:
    """What `DistilModule` takes beside the teacher and the rank.

    Attributes:
        warm_start: Where training begins: the exact optimum of the squared error, or the SVD of the weight.
        alpha: Weight of the cosine term.
        normalise: Divide the squared error by the variance of the teacher's output.
        lr: Learning rate of AdamW.
        weight_decay: Of AdamW.
        schedule: cosine decays the rate to zero over the run, constant keeps it.
        outputs: Whether the head puts out logits of classes (classification) or values (regression).
    """

    warm_start: Literal["closed_form", "svd"] = "closed_form"
    alpha: float = 0.1
    normalise: bool = True
    lr: float = 3e-4
    weight_decay: float = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    outputs: Literal["classification", "regression"] = "classification"

    def check(self) -> None:
        """Raises `InputError` for values out of range."""
        for name in ("alpha", "lr", "weight_decay"):
            check_range(f"--distil.{name}", getattr(self, name), 0)


@dataclass(frozen=True)
class HeadOptions:
    """How a teacher is trained from labels: Linear(d, d), tanh, dropout, Linear(d, classes or targets).

    Attributes:
        keep: auto keeps the trained head only where it clearly beats the linear probe on the validation groups.
        seconds: Limit of the search over learning rate, dropout and the first biases.
        epochs: At most; training stops early by the validation loss.
        alignment: Compare with MMseqs2's best hit too, where it is installed.
        name: Of the folder in results/teachers; by default that of the labels' file.
    """

    keep: Literal["auto", "trained", "linear"] = "auto"
    seconds: float = 120.0
    epochs: int = 200
    alignment: bool = True
    name: str | None = None

    def check(self) -> None:
        """Raises `InputError` for values out of range."""
        check_range("--head.seconds", self.seconds, 1)
        check_range("--head.epochs", self.epochs, 1)
        if self.name is not None and (not self.name or Path(self.name).name != self.name):
            raise InputError(f"Expected --head.name without folders but got {self.name!r}.")


@dataclass(frozen=True)
class TrainTeacherOptions:
    """Train or make the dense layer that is to be distilled.

    Attributes:
        data: The embeddings.
        teacher: The dense layer.
        trainer: Options of Lightning's Trainer (`--trainer.help` lists them).
        output: Folder for results.
    """

    data: DataOptions = field(default_factory=DataOptions)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    trainer: dict[str, Any] = field(default_factory=dict)
    output: str = "results"

    def check(self) -> None:
        """Raises `InputError` for what can be told before any work."""
        check_writable(self.output)
        self.data.check()
        self.teacher.check()


@dataclass(frozen=True)
class LabelledTeacherOptions(TrainTeacherOptions):
    """Train or make the dense layer that is to be distilled; with labels, the one that predicts them.

    Attributes:
        labels: What to predict; without a source the teacher is what `--teacher.kind` says.
        task: Kind of the labels; auto decides by what they are.
        groups: What stays in one split; see evaluate.
        head: How it is trained from labels.
    """

    labels: LabelOptions = field(default_factory=LabelOptions)
    task: TaskKind = "auto"
    groups: str | None = None
    head: HeadOptions = field(default_factory=HeadOptions)

    def check(self) -> None:
        """Raises `InputError` for what can be told before any work."""
        super().check()
        self.labels.check()
        self.head.check()
        if self.task == "retrieval":
            raise InputError("Expected --task classification, multilabel or regression to predict but got retrieval.")
        if self.labels.source is None:
            if self.task != "auto" or self.groups is not None:
                raise InputError("Expected --labels.source with --task or --groups but got none; name the labels.")
        elif self.data != DataOptions(self.data.source, seed=self.data.seed) or self.teacher != TeacherOptions():
            raise InputError(
                "Expected of --data and --teacher no more than --data.source and --data.seed with labels; --groups "
                "says how proteins are split."
            )


@dataclass(frozen=True)
class BenchmarkOptions(TrainTeacherOptions):
    """The three teachers of the original, one table; the teacher's `kind` is set to each in turn.

    Attributes:
        distil: How the students are trained.
        rank: An integer, a share of the teacher's output variance to retain (0.95), or `auto`.
        seeds: Of the trained students; the first one is saved.
    """

    distil: StudentOptions = field(default_factory=StudentOptions)
    rank: int | float | str | None = 64
    seeds: Sequence[int] = (42, 43)

    def check(self) -> None:
        """Raises `InputError` for what can be told before any work."""
        super().check()
        self.distil.check()
        if self.rank is not None:
            check_rank_option(self.rank)
        if not self.seeds:
            raise InputError("Expected at least one seed but --seeds has none.")
        check_range("--seeds", min(self.seeds), 0)


@dataclass(frozen=True)
class DistilOptions(BenchmarkOptions):
    """Distil one teacher, which is trained first unless that was done already, and report what is retained.

    Attributes:
        rank: An integer, a share of the teacher's output variance to retain (0.95), or `auto`; 64 by default. Of a
            teacher from labels the share of its predictions to retain, 0.999 by default.
        head: What stands behind the layer, to be matched at its end: steps like `tanh,head.safetensors:out_proj`.
        ckpt_path: Resume from this Lightning checkpoint.
    """

    seeds: Sequence[int] = (42,)
    rank: int | float | str | None = None
    head: str | None = None
    ckpt_path: str | None = None

    def check(self) -> None:
        """Raises `InputError` for what can be told before any work."""
        super().check()
        if self.ckpt_path is not None and not Path(self.ckpt_path).is_file():
            raise InputError(f"Expected a Lightning checkpoint at {self.ckpt_path} but there is no such file.")
        if self.ckpt_path is not None and len(self.seeds) > 1:
            raise InputError(f"Expected one seed with --ckpt_path but got {len(self.seeds)}; resume one run.")


@dataclass(frozen=True)
class SweepOptions(TrainTeacherOptions):
    """One teacher at several ranks.

    Attributes:
        distil: How the students are trained.
        ranks: To try; by default 8, 16, 32, 64 and 128, as far as the layer is wide enough.
        seeds: Of the trained students.
    """

    distil: StudentOptions = field(default_factory=StudentOptions)
    ranks: Sequence[int | float] | None = None
    seeds: Sequence[int] = (42,)

    def check(self) -> None:
        """Raises `InputError` for what can be told before any work."""
        if self.ranks is not None and not len(self.ranks):
            raise InputError("Expected ranks to try but --ranks has none.")
        for rank in self.ranks or (1,):
            BenchmarkOptions(self.data, self.teacher, self.trainer, self.output, self.distil, rank, self.seeds).check()
