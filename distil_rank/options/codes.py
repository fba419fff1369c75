"""Options of code and search, and of augmented copies wherever they are made."""

from dataclasses import dataclass, field
from typing import Literal

from distil_rank.artefact import check_writable
from distil_rank.errors import InputError, check_range, check_share
from distil_rank.options.evaluation import LabelOptions, TaskKind

CodeMetric = Literal["variance", "whitened", "invariant"]
CodeType = Literal["float32", "int8", "bit"]
NoiseSource = Literal["copies", "labels"]
Engine = Literal["auto", "codes", "alignment", "both"]
FITTING = ("metric", "rank", "dtype", "noise", "regularisation", "augmentation", "train", "groups", "fit_fraction")


@dataclass(frozen=True)
class AugmentationOptions:
    """Augmented copies of proteins: each is a window of the sequence in which residues are substituted.

    Attributes:
        proteins: How many get copies, at most.
        copies: Of each protein.
        window: Share of the sequence that a copy keeps, in (0, 1].
        substitutions: Share of its residues that are substituted, in [0, 1].
        seed: Of the draws; the same protein gets the same copies in any company.
    """

    proteins: int = 1000
    copies: int = 2
    window: float = 0.7
    substitutions: float = 0.4
    seed: int = 0

    def check(self) -> None:
        """Raises `InputError` for shares and numbers out of range."""
        if not 0 < self.window <= 1:
            raise InputError(f"Expected --augmentation.window in (0, 1] but got {self.window}.")
        check_range("--augmentation.substitutions", self.substitutions, 0, 1)
        if self.window == 1 and self.substitutions == 0:
            raise InputError("Expected copies that differ: lower the window of 1, or raise the substitutions of 0.")
        check_range("--augmentation.proteins", self.proteins, 1)
        check_range("--augmentation.copies", self.copies, 1)


@dataclass(frozen=True)
class CodeOptions:
    """Fit an encoder, evaluate it, and encode a store of embeddings with it.

    Attributes:
        data: The vectors: a store, or any file that distil reads (fitted to and evaluated, but not encoded); auto is
            the labelled sample.
        metric: variance, whitened, or invariant (within-class whitening, against the noise).
        rank: Numbers in a code before they are quantised.
        dtype: float32, int8 or bit (signs, eight to a byte).
        codes: Folder or address of the store of codes; encoding goes on where it stopped.
        encoder: Folder of an encoder that is there, such as recommend leaves; nothing is fitted or evaluated then.
        noise: What should not matter: differences of augmented copies, or within labels.
        augmentation: How copies are made.
        labels: Where labels come from; without any, proteins are to be found by their augmented copies.
        task: Kind of the task; auto decides by the labels.
        groups: What stays in one split; see evaluate.
        fit_fraction: Share of the proteins to fit on.
        regularisation: Of the noise covariance, in units of its mean eigenvalue.
        train: Steps of training towards the neighbours of the full-rank code, kept only where it clearly helps; 0 for
            the closed form alone. Codes of the variance metric are not trained.
        seed: Of all draws.
        output: Folder for results.
    """

    data: str = "auto"
    metric: CodeMetric = "invariant"
    rank: int = 64
    dtype: CodeType = "bit"
    codes: str = "codes"
    encoder: str | None = None
    noise: NoiseSource = "copies"
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    labels: LabelOptions = field(default_factory=LabelOptions)
    task: TaskKind = "auto"
    groups: str | None = None
    fit_fraction: float = 0.5
    regularisation: float = 0.1
    train: int = 600
    seed: int = 0
    output: str = "results"

    def check(self) -> None:
        """Raises `InputError` for values out of range and options that contradict each other."""
        check_writable(self.output)
        self.augmentation.check()
        for name, least in (("rank", 1), ("train", 0), ("regularisation", 0)):
            check_range(f"--{name}", getattr(self, name), least)
        check_share("--fit_fraction", self.fit_fraction)
        if self.metric != "invariant" and self.noise != "copies":
            raise InputError(f"Expected --noise with the invariant metric only but got it with {self.metric}.")
        if self.metric == "whitened" and not self.regularisation:
            raise InputError("Expected --regularisation above 0 with whitened, or no direction comes before another.")
        changed = [name for name in FITTING if getattr(self, name) != getattr(CodeOptions(), name)]
        if self.encoder is not None and changed:
            raise InputError(
                f"Expected no --{changed[0]} with --encoder, with which nothing is fitted; leave one of them out."
            )


@dataclass(frozen=True)
class SearchOptions:
    """Search a store of codes with proteins, by codes and by alignment, and write a table of hits.

    Attributes:
        codes: Folder or address of the store of codes.
        fasta: Queries; embedded as the proteins behind the codes were.
        queries: Queries that are embedded already, a store of the same backbone, layer and pooling.
        self: Search with the codes themselves, each against all others.
        engine: codes, alignment (MMseqs2) or both; auto is both where MMseqs2 is installed, otherwise codes.
        hits: Of each query at most.
        evalue: Hits of a greater E-value are left out; 10 by default.
        decoys: Reversed proteins that E-values are estimated with; 0 for none.
        exact: Whether every query looks at every code; by default where there are not too many.
        labels: Labels of the targets, from which each query gets a vote of its hits.
        cluster: With self, E-value up to which hits are neighbours; writes clusters.tsv beside the table.
        out: The table, tab separated: BLAST's twelve columns, cosine, score, rank, and the E-value of both engines.
        seed: Of the choice of decoys and of the index.
        output: Folder for results.
    """

    codes: str = "codes"
    fasta: str | None = None
    queries: str | None = None
    self: bool = False
    engine: Engine = "auto"
    hits: int = 10
    evalue: float | None = None
    decoys: int = 200
    exact: bool | None = None
    labels: LabelOptions = field(default_factory=LabelOptions)
    cluster: float | None = None
    out: str = "results/search/hits.tsv"
    seed: int = 0
    output: str = "results"

    def check(self) -> None:
        """Raises `InputError` for values out of range and options that contradict each other."""
        check_writable(self.output)
        sources = [f"--{name}" for name in ("fasta", "queries", "self") if getattr(self, name)]
        if len(sources) != 1:
            raise InputError(
                f"Expected one of --fasta, --queries and --self but got {' and '.join(sources) or 'none'}; name one."
            )
        check_range("--hits", self.hits, 1)
        check_range("--decoys", self.decoys, 0)
        for name in ("evalue", "cluster"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and (self.decoys or self.engine == "alignment")):
                raise InputError(
                    f"Expected an E-value above 0, and decoys to estimate it with, but got --{name} {value} and "
                    f"{self.decoys} decoys."
                )
        if self.cluster is not None and not self.self:
            raise InputError("Expected --cluster with --self true, all against all, but got it without; add that.")
