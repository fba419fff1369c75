"""Options of evaluate and recommend."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distil_rank.artefact import check_writable
from distil_rank.errors import InputError, check_range, check_share
from distil_rank.options.embed import Precision, check_backbone, check_exists

Kind = Literal["retrieval", "classification", "multilabel", "regression"]
TaskKind = Literal["auto", "retrieval", "classification", "multilabel", "regression"]
Answer = Literal["fastest", "smallest", "best"]


@dataclass(frozen=True)
class LabelOptions:
    """Where labels come from, and how to read them.

    Attributes:
        source: CSV or TSV table (recommend: several, with commas between them), FASTA file, or `.npz`; by default what
            lies with the data (`labels.tsv` in a store's folder, or the labels of the data file).
        column: Column of the table, or array of the `.npz`, that holds the label; by default one called label, class,
            family, target or the like, else the second.
        field: Word of each FASTA header that is the label, counted from 1: 2 for SCOPe, whose first is the id.
        separator: Between the levels of a label, coarse to fine; found by itself in labels such as a.1.1.1.
        names: Names of the levels, coarse to fine, separated by commas.
        level: The level that decides whether a found protein is right.
    """

    source: str | None = None
    column: str | None = None
    field: int | None = None
    separator: str | None = None
    names: str | None = None
    level: str | None = None

    def check(self) -> None:
        """Raises `InputError` for files that are not there and for options that contradict each other."""
        files = [] if self.source is None else [self.source, *self.source.split(",")]
        if files and not (Path(files[0]).is_file() or all(Path(one.strip()).is_file() for one in files[1:])):
            raise InputError(
                f"Expected a file of labels at {self.source} but there is none; give a CSV, TSV, FASTA or .npz file."
            )
        if self.field is not None and (self.field < 1 or self.column is not None):
            raise InputError(
                f"Expected --labels.field from 1, without --labels.column, but got {self.field} and {self.column}; "
                "give a field for FASTA headers, a column for tables."
            )
        names = [name.strip() for name in (self.names or "").split(",")]
        if self.names is not None and (not all(names) or len(set(names)) < len(names)):
            raise InputError(f"Expected different --labels.names, coarse to fine, but got {self.names!r}.")
        if self.names is not None and self.level is not None and self.level not in names:
            raise InputError(f"Expected --labels.level out of {', '.join(names)} but got {self.level!r}.")


@dataclass(frozen=True)
class TaskOptions:
    """What evaluate and recommend are told alike.

    Attributes:
        data: The vectors: a store (recommend: of one or several layers) or any file that distil reads; auto is your one
            store or the sample.
        labels: Where labels come from.
        task: Kind of the task; auto decides by the labels.
        groups: What stays in one split: a column of the table, a level of the label, clusters, mmseqs, none, or a file
            of the groups to fit on.
        fasta: Sequences to embed into `data` first (only what is missing there).
        backbone: Model for that; see embed.
        precision: For that; see embed.
        metric: The score that decides; by default mAP (retrieval), mcc, macro_f1 or spearman.
        alignment: Search with MMseqs2 too, where it is installed.
        seed: Of all draws.
        output: Folder for results.
    """

    data: str = "auto"
    labels: LabelOptions = field(default_factory=LabelOptions)
    task: TaskKind = "auto"
    groups: str | None = None
    fasta: str | None = None
    backbone: str = "auto"
    precision: Precision = "auto"
    metric: str | None = None
    alignment: bool = True
    seed: int = 0
    output: str = "results"

    def _check(self, embeds: bool) -> None:
        """What can be told of vectors and labels; `embeds` says whether proteins are to be embedded."""
        check_writable(self.output)
        self.labels.check()
        check_range("--seed", self.seed, 0)
        check_exists(self.data, self.data == "auto" or "://" in self.data or self.fasta is not None)
        if self.fasta is not None and self.fasta != "-" and not Path(self.fasta).is_file():
            raise InputError(f"Expected sequences at {self.fasta} but there is no such file; give a FASTA file.")
        if embeds:
            check_backbone(self.backbone)
        elif self.precision != "auto" or self.backbone != "auto":
            raise InputError(
                f"Expected --fasta, whose proteins are to be embedded by {self.backbone} in {self.precision}, but "
                "got none; vectors that are there have their own."
            )


@dataclass(frozen=True)
class EvaluateOptions(TaskOptions):
    """Evaluate what representations of the same proteins retain of a labelled task.

    Attributes:
        ranks: Of the students that are fitted here; by default 16, 32, 64 and 128, as far as the vectors are wide.
        students: Folders of saved students or encoders; FOLDER:RANK takes a lower rank.
        others: Further matrices of the same proteins, NAME=PATH.
        fit_fraction: Share of the proteins to fit on.
    """

    ranks: list[int] | None = None
    students: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    fit_fraction: float = 0.5

    def check(self) -> None:
        """Raises `InputError` for values out of range, files that are not there and options that contradict."""
        self._check(embeds=self.fasta is not None)
        check_range("--ranks", min(self.ranks or [1]), 1)
        check_share("--fit_fraction", self.fit_fraction)
        for folder in self.students:
            if not any(Path(path, "manifest.json").is_file() for path in (folder, folder.rpartition(":")[0])):
                raise InputError(f"Expected the folder of a saved student but got {folder}; distil and code make some.")


@dataclass(frozen=True)
class RecommendOptions(TaskOptions):
    """Recommend the cheapest pipeline that retains a function.

    Several tables of labels, separated by commas, are several tasks that all must be retained; without labels proteins
    are to be found by their augmented copies.

    Attributes:
        keep: Share of the full vector's score that must be retained.
        weigh: Which of three answers comes first. fastest: saves most time, then bytes, or has the highest score where
            nothing is stored; smallest: saves most bytes, then time; best: the highest score, then the cheapest.
        max_bytes: For each protein at most.
        max_time: Share of the full backbone's time at most.
        proteins: At most so many of a larger FASTA file: whole classes, the largest in part.
    """

    keep: float = 0.99
    weigh: Answer = "fastest"
    max_bytes: float | None = None
    max_time: float | None = None
    proteins: int = 20_000

    def check(self) -> None:
        """Raises `InputError` for values out of range, files that are not there and options that contradict."""
        self._check(embeds=self.fasta is not None or (self.data == "auto" and self.labels.source is None))
        if not 0 < self.keep <= 2:
            raise InputError(f"Expected --keep in (0, 2], a share of the full vector's score, but got {self.keep}.")
        for name in ("max_bytes", "max_time"):
            if (limit := getattr(self, name)) is not None and not limit > 0:
                raise InputError(f"Expected --{name} above 0 but got {limit}.")
        check_range("--proteins", self.proteins, 1)
