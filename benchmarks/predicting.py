"""Predictors from labels: teachers beside what needs no training, students, and coverage over twenty splits.

    python benchmarks/predicting.py                          the functions that ship, and made-up numbers
    python benchmarks/predicting.py --data kinases.npz       a labelled file too

The made-up number of a protein is a linear function of its amino-acid composition plus noise of 0.3 of its spread. The
tables are of one split; coverage and calibration error are means over `--splits` splits, each with a linear probe of
its own, which is calibrated on the validation groups and measured on the test groups. Writes results/predicting.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from script import run, save_markdown

from distil_rank.commands.distil import distil_predictor
from distil_rank.commands.train_teacher import train_from_labels
from distil_rank.compression.saved import read_manifest
from distil_rank.data.files import load_matrix, sample
from distil_rank.evaluation.labelled import open_to_predict
from distil_rank.evaluation.probes import fit_linear
from distil_rank.evaluation.representations import AMINO_ACIDS
from distil_rank.evaluation.trust import Trust, calibrate, measure_trust
from distil_rank.lowrank.predictor import Predictor
from distil_rank.options.evaluation import LabelOptions
from distil_rank.options.training import DataOptions, DistilOptions, HeadOptions, LabelledTeacherOptions, TeacherOptions

OUTPUT = Path("results/predicting")
NOISE = 0.3


def made_up_numbers(source: str) -> Path:
    """A table of numbers for the proteins of a store."""
    proteins = load_matrix(source)
    assert proteins.sequences is not None
    shares = np.array([[one.count(letter) / len(one) for letter in AMINO_ACIDS] for one in proteins.sequences])
    dice = np.random.default_rng(0)
    values = shares @ dice.normal(size=len(AMINO_ACIDS))
    values = (values - values.mean()) / values.std() + NOISE * dice.normal(size=len(values))
    path = OUTPUT / "numbers.tsv"
    lines = [f"{name}\t{value:.5f}\n" for name, value in zip(proteins.ids, values, strict=True)]
    path.write_text("id\tvalue\n" + "".join(lines))
    return path


def one_split(name: str, source: str, labels: str, keep: Any) -> tuple[list[str], str]:
    """Lines of the teacher's table, and the line of its student."""
    options = LabelledTeacherOptions(
        data=DataOptions(source=source),
        labels=LabelOptions(source=labels),
        head=HeadOptions(keep=keep, name=name),
        output=str(OUTPUT),
    )
    evaluation = train_from_labels(options)
    lines = []
    for entry in evaluation.entries:
        cells = [
            f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"
            for one in map(entry.scores.get, evaluation.metrics[:2])
            if one
        ]
        lines.append(f"| {name} | {entry.name} | {' | '.join(cells)} |")
    folder = distil_predictor(
        DistilOptions(teacher=TeacherOptions(str(OUTPUT / "teachers" / name)), output=str(OUTPUT))
    )
    r: Mapping[str, Any] = json.loads((folder.parent / "predictor_report.json").read_text())
    dense, small = r["parameters"]
    error = "–" if r["probability_error"] is None else f"{r['probability_error']:.4f}"
    kept = read_manifest(OUTPUT / "teachers" / name)["data"]["kept"]
    retained = f"{r['retained']['value']:.4f} [{r['retained']['low']:.3f}, {r['retained']['high']:.3f}]"
    return (
        lines,
        f"| {name} | {kept} | {r['rank']} | {retained} | {dense:,} → {small:,} ({dense / small:.1f}x) | {error} |",
    )


def trust_of(source: str, labels: str, seed: int) -> Trust:
    """A linear probe of one split, calibrated and measured."""
    proteins, split = open_to_predict(source, {"source": labels}, seed=seed)
    x, target, group = np.asarray(proteins.embeddings.x), proteins.target, proteins.groups.number
    assert target.y is not None
    linear, _ = fit_linear(target, x, target.y, split.train, [(split.train, split.val)])
    predictor = Predictor.linear(*linear, target.kind, target.classes)
    calibrate(predictor, torch.from_numpy(x[split.val]), target.y[split.val], group[split.val])
    return measure_trust(predictor, torch.from_numpy(x[split.test]), target.subset(split.test), group[split.test])


def many_splits(name: str, source: str, labels: str, splits: int) -> str:
    """Coverage and calibration error, means over splits."""
    trusts = [trust_of(source, labels, seed) for seed in range(splits)]
    coverage = np.array([one.coverage.value for one in trusts])
    cells = f"{coverage.mean():.3f} | {coverage.min():.3f} to {coverage.max():.3f}"
    if trusts[0].calibration_error is None:
        return f"| {name} | {cells} | – | – |"
    before, after = (np.mean([getattr(one, key) for one in trusts]) for key in ("before", "calibration_error"))
    return f"| {name} | {cells} | {before:.3f} | {after:.3f} |"


def main(data: str | None = None, splits: int = 20) -> None:
    """All tables.

    Args:
        data: a file with vectors, sequences and labels.
        splits: of the means.
    """
    OUTPUT.mkdir(parents=True, exist_ok=True)
    shipped = sample("functions")
    tasks = {
        "functions": (shipped, f"{shipped}/labels.tsv"),
        "numbers": (sample("sample"), str(made_up_numbers(sample("sample")))),
    }
    if data is not None:
        tasks[Path(data).stem] = (data, data)
    scores, students, trusts = list[str](), list[str](), list[str]()
    for name, (source, labels) in tasks.items():
        for suffix, keep in (("", "auto"), ("-trained", "trained"))[: 1 + (name != "numbers")]:
            lines, student = one_split(f"{name}{suffix}", source, labels, keep)
            scores += lines if not suffix else []
            students.append(student)
        trusts.append(many_splits(name, source, labels, splits))
    head = ["| task | model | first metric | second |", "|---|---|---|---|"]
    small = [
        "| task | teacher | rank | predictions retained | parameters of the layer | probability error |",
        "|---|---|---|---|---|---|",
    ]
    cover = [
        f"| task | truths in 90 % sets, {splits} splits | range | calibration error before | after |",
        "|---|---|---|---|---|",
    ]
    save_markdown(Path("results/predicting.md"), [*head, *scores, "", *small, *students, "", *cover, *trusts])


if __name__ == "__main__":
    run(main)
