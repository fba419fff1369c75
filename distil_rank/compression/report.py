"""The outcome of compressing a model: a row for each layer, and how close the whole model's output stayed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

HEAD = ["layer", "shape", "rank", "parameters", "predicted R²", "held-out R²", "µs for 32 rows"]


@dataclass(frozen=True)
class LayerRow:
    """The outcome for one layer.

    Attributes:
        name: where it is in the model.
        in_features: n.
        out_features: m.
        rank: of the student; None where the layer was left dense, and `note` says why.
        dense_parameters: before.
        parameters: after.
        predicted_r2: share of the output's variance that the student keeps on the rows it was fitted to.
        held_out_r2: the same on held-out rows; None without any.
        dense_us: median time of the dense layer for 32 rows, in microseconds.
        student_us: of its student.
        note: why the layer was left dense; empty otherwise.
    """

    name: str
    in_features: int
    out_features: int
    rank: int | None
    dense_parameters: int
    parameters: int
    predicted_r2: float | None = None
    held_out_r2: float | None = None
    dense_us: float | None = None
    student_us: float | None = None
    note: str = ""


@dataclass(frozen=True)
class OutputFidelity:
    """The whole model's output beside the original's, on held-out rows.

    Attributes:
        rows: compared.
        r2: share of the outputs' variance retained.
        predictions_retained: share of rows whose largest output stayed the largest, as the predicted class is; of a
            single output, whose sign stayed.
    """

    rows: int
    r2: float
    predictions_retained: float


@dataclass(frozen=True)
class CompressionReport:
    """What `compress` did.

    Attributes:
        model: with the students in place.
        layers: one row for each layer that was asked for, in the order in which they run.
        outputs: the whole model beside the original; None without held-out rows.
    """

    model: nn.Module
    layers: list[LayerRow]
    outputs: OutputFidelity | None = None

    @property
    def parameters(self) -> tuple[int, int]:
        """Of these layers, before and after."""
        return sum(row.dense_parameters for row in self.layers), sum(row.parameters for row in self.layers)

    def cells(self) -> list[list[str]]:
        """A line of the table under `HEAD` for each layer."""
        lines = []
        for row in self.layers:
            line = [row.name, f"{row.in_features} → {row.out_features}"]
            if row.rank is None:
                lines.append([*line, f"dense: {row.note}", f"{row.parameters:,}", "", "", ""])
                continue
            line += [str(row.rank), f"{row.dense_parameters:,} → {row.parameters:,}", f"{row.predicted_r2:.4f}"]
            held_out = "" if row.held_out_r2 is None else f"{row.held_out_r2:.4f}"
            lines.append([*line, held_out, f"{row.dense_us:.0f} → {row.student_us:.0f}"])
        return lines

    def notes(self) -> list[str]:
        """What the table does not say."""
        before, after = self.parameters
        notes = [f"Parameters of these layers: {before:,} → {after:,} ({after / before:.1%})."]
        if (o := self.outputs) is not None:
            figures = f"R² {o.r2:.4f}, predictions retained {o.predictions_retained:.2%}"
            notes.append(f"The whole model's output on {o.rows:,} held-out rows: {figures}.")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """JSON values: everything but the model."""
        outputs = None if self.outputs is None else asdict(self.outputs)
        return {"layers": [asdict(row) for row in self.layers], "outputs": outputs}

    def __str__(self) -> str:
        """A Markdown table and the notes."""
        table = [HEAD, ["---"] * len(HEAD), *self.cells()]
        return "\n".join([*(f"| {' | '.join(line)} |" for line in table), "", *self.notes()])

    _repr_markdown_ = __str__  # a table in a notebook
