"""The outcome of compressing a model: a row for each layer, and the agreement of its outputs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from distil_rank.compression.agreement import Agreement
from distil_rank.compression.tune import Tuning


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
class Report:
    """What `compress` did.

    Attributes:
        model: with the students in place.
        layers: one row for each layer that was asked for, in the order in which they run.
        outputs: the whole model's agreement with the original; None without held-out rows.
        untuned: the same before fine-tuning.
        tuning: how fine-tuning went; None without.
    """

    model: nn.Module
    layers: list[LayerRow]
    outputs: Agreement | None = None
    untuned: Agreement | None = None
    tuning: Tuning | None = None

    @property
    def parameters(self) -> tuple[int, int]:
        """Of these layers, before and after."""
        return sum(row.dense_parameters for row in self.layers), sum(row.parameters for row in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: everything but the models."""
        parts = {"outputs": self.outputs, "untuned": self.untuned, "tuning": self.tuning}
        return {"layers": [asdict(row) for row in self.layers]} | {
            name: None if part is None else asdict(part) for name, part in parts.items()
        }

    def __str__(self) -> str:
        """A Markdown table."""
        head = "| layer | shape | rank | parameters | predicted R² | held-out R² | µs for 32 rows |"
        lines = [head, "|---|---|---|---|---|---|---|"]
        for row in self.layers:
            shape = f"{row.in_features} → {row.out_features}"
            if row.rank is None:
                lines.append(f"| {row.name} | {shape} | dense: {row.note} | {row.parameters:,} | | | |")
                continue
            held_out = "" if row.held_out_r2 is None else f"{row.held_out_r2:.4f}"
            lines.append(
                f"| {row.name} | {shape} | {row.rank} | {row.dense_parameters:,} → {row.parameters:,} "
                f"| {row.predicted_r2:.4f} | {held_out} | {row.dense_us:.0f} → {row.student_us:.0f} |"
            )
        before, after = self.parameters
        lines += ["", f"Parameters of these layers: {before:,} → {after:,} ({after / before:.1%})."]
        if self.tuning is not None:
            lines.append("Fine-tuned for the whole model's output, which the layers' own R² may have paid for.")
        for when, agreed in (("", self.outputs), (" before fine-tuning", self.untuned)):
            if agreed is not None:
                retained = agreed.predictions_retained
                retained_text = "" if retained is None else f", predictions kept {retained:.2%}"
                lines.append(
                    f"The whole model's output{when} on {agreed.rows:,} held-out rows: R² {agreed.r2:.4f}{retained_text}."
                )
        return "\n".join(lines)

    _repr_markdown_ = __str__  # a table in a notebook
