"""Options of predict."""

from dataclasses import dataclass
from pathlib import Path

from distil_rank.artefact import MANIFEST, check_writable
from distil_rank.errors import InputError, check_share


@dataclass(frozen=True)
class PredictOptions:
    """Predict the labels of new proteins.

    Attributes:
        model: Folder of a predictor, as distil makes it of a teacher that was trained from labels.
        fasta: The new proteins; they are embedded as those were that the predictor learned from.
        data: Or their vectors: a store, or any file that distil reads.
        confidence: Of the sets of classes, or of the intervals of values.
        output: The table, TSV.
    """

    model: str = ""
    fasta: str | None = None
    data: str | None = None
    confidence: float = 0.9
    output: str = "results/predictions.tsv"

    def check(self) -> None:
        """Raises `InputError` for values out of range and files that are not there."""
        if not self.model or not (Path(self.model) / MANIFEST).is_file():
            raise InputError(
                f"Expected the folder of a predictor at --model but got {self.model or 'none'!r}; make one with "
                "train-teacher --labels.source and distil."
            )
        if (self.fasta is None) == (self.data is None):
            raise InputError("Expected either --fasta or --data, proteins or their vectors; give one of them.")
        if self.fasta is not None and not Path(self.fasta).is_file():
            raise InputError(f"Expected sequences at {self.fasta} but there is no such file; give a FASTA file.")
        check_share("--confidence", self.confidence)
        if Path(self.output).is_dir():
            raise InputError(f"Expected a file at --output but {self.output} is a folder; name a file in it.")
        check_writable(Path(self.output).parent)
