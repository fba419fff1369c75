"""What a recommendation is made for."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from distil_rank.codes.copies import Copies

from distil_rank.data.files import load_matrix
from distil_rank.errors import InputError
from distil_rank.options.evaluation import LabelOptions
from distil_rank.recommendation import copy_problem, opening
from distil_rank.recommendation.opening import open_problem
from distil_rank.recommendation.parts import CONFIRM, FIT, VALIDATE
from distil_rank.recommendation.pipelines import Fitted
from distil_rank.recommendation.search import Evaluator
from distil_rank.report.choices import Pipeline

SAMPLE = Path(__file__).parents[2] / "data" / "functions"


def test_no_group_is_on_two_sides_and_proteins_without_labels_are_on_none(tmp_path):
    lines = (SAMPLE / "labels.tsv").read_text().splitlines()[:500]
    (tmp_path / "some.tsv").write_text("\n".join(lines))
    opened = open_problem(str(SAMPLE), LabelOptions(str(tmp_path / "some.tsv")))
    assert (opened.part >= 0).sum() == 499 and set(opened.part) == {-1, FIT, VALIDATE, CONFIRM}
    for number in set(opened.group[opened.part >= 0]):
        assert len(set(opened.part[opened.group == number]) - {-1}) == 1
    again = opened.parted((0.25,) * 4, 5)
    assert (again.part >= 0).sum() == 499 and again.part.max() == 3


def test_without_labels_copies_look_for_their_originals(tmp_path, monkeypatch):
    """Copies are made by adding noise, in place of a backbone's: what is found, and what nothing is fitted on."""
    data = load_matrix(SAMPLE)
    rng = np.random.default_rng(0)
    spread = data.x.std(axis=0)

    def noisy(sequences, chosen, how, layers, folder):
        owner = np.repeat(chosen, how.copies)
        noise = rng.normal(size=(len(owner), data.x.shape[1])) * spread
        return [Copies((data.x[owner] + 0.5 * noise).astype(np.float32), owner) for _ in layers]

    monkeypatch.setattr(copy_problem, "embed_copies_by_layer", noisy)
    bare = replace(data, labels=None)
    monkeypatch.setattr(opening, "load_matrix", lambda _: bare)
    monkeypatch.setattr(opening, "own_labels", lambda *_: None)
    opened = open_problem(str(SAMPLE), LabelOptions(), folder=tmp_path)
    assert opened.tasks[0].name == "perturbed copies" and len(opened.part) == 706 + len(opened.part[706:])
    assert set(opened.part[706:]) == {VALIDATE, CONFIRM}
    fitted = Fitted(opened.layers, opened.part == FIT, opened.noise)
    evaluator = Evaluator(opened, fitted, CONFIRM)
    assert evaluator.metrics == ("mAP",)
    outcome = evaluator.outcome(Pipeline(opened.last, "invariant", 64, "int8"), {})
    assert outcome.scores[0] > 0.5


def test_data_without_labels_and_sequences_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", embeddings=np.ones((40, 3), np.float32), ids=np.array([f"p{i}" for i in range(40)]))
    with pytest.raises(InputError, match="it has neither"):
        open_problem(str(tmp_path / "a.npz"), LabelOptions())
