"""What a recommendation is made for."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distil_rank.codes.augment import Copies
from distil_rank.data.files import load_matrix
from distil_rank.errors import InputError
from distil_rank.options.evaluation import LabelOptions
from distil_rank.recommendation import problem
from distil_rank.recommendation.pipelines import Fitted, Pipeline
from distil_rank.recommendation.problem import CONFIRM, FIT, VALIDATE, open_problem, subset_of
from distil_rank.recommendation.search import Evaluator

SAMPLE = Path(__file__).parents[2] / "data" / "functions"


def test_no_group_is_in_two_splits_and_proteins_without_labels_are_in_none(tmp_path):
    lines = (SAMPLE / "labels.tsv").read_text().splitlines()[:500]
    (tmp_path / "some.tsv").write_text("\n".join(lines))
    opened = open_problem(str(SAMPLE), LabelOptions(str(tmp_path / "some.tsv")))
    assert (opened.split >= 0).sum() == 499 and set(opened.split) == {-1, FIT, VALIDATE, CONFIRM}
    for number in set(opened.group[opened.split >= 0]):
        assert len(set(opened.split[opened.group == number]) - {-1}) == 1


def test_without_labels_copies_look_for_their_originals(tmp_path, monkeypatch):
    """Copies are made by adding noise, in place of a backbone's: what is found, and what nothing is fitted on."""
    data = load_matrix(SAMPLE)
    rng = np.random.default_rng(0)
    spread = data.x.std(axis=0)

    def noisy(sequences, chosen, how, layers, folder):
        owner = np.repeat(chosen, how.copies)
        noise = rng.normal(size=(len(owner), data.x.shape[1])) * spread
        return [Copies((data.x[owner] + 0.5 * noise).astype(np.float32), owner) for _ in layers]

    monkeypatch.setattr(problem, "embed_copies", noisy)
    bare = replace(data, labels=None)
    monkeypatch.setattr(problem, "load_vectors", lambda _: bare)
    monkeypatch.setattr(problem, "own_labels", lambda *_: None)
    opened = open_problem(str(SAMPLE), LabelOptions(), groups="none", folder=tmp_path)
    assert opened.tasks[0].name == "augmented copies" and len(opened.split) == 706 + len(opened.split[706:])
    assert set(opened.split[706:]) == {VALIDATE, CONFIRM}
    fitted = Fitted(opened)
    evaluator = Evaluator(fitted, CONFIRM)
    assert [one.metric for one in evaluator.trials] == ["mAP"]
    outcome = evaluator.outcome(Pipeline(opened.last, "invariant", 64, "int8"), {})
    assert outcome.scores[0] > 0.5


def test_data_without_labels_and_sequences_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", embeddings=np.ones((40, 3), np.float32), ids=np.array([f"p{i}" for i in range(40)]))
    with pytest.raises(InputError, match="it has neither"):
        open_problem(str(tmp_path / "a.npz"), LabelOptions())


def test_whole_classes_and_a_note(tmp_path):
    names = [f"p{i}" for i in range(90)]
    (tmp_path / "a.fasta").write_text(
        "".join(f">{name}\nMKVLA{'ACDEFGHIKL'[i % 10]}\n" for i, name in enumerate(names))
    )
    (tmp_path / "a.csv").write_text("id,label\n" + "".join(f"{name},c{i // 3}\n" for i, name in enumerate(names[:60])))
    fasta, labels = str(tmp_path / "a.fasta"), LabelOptions(str(tmp_path / "a.csv"))
    assert subset_of(fasta, labels, 90, 0, tmp_path) == (fasta, None)
    smaller, note = subset_of(fasta, labels, 30, 0, tmp_path)
    retained = [line[1:] for line in Path(smaller).read_text().splitlines() if line.startswith(">")]
    assert len(retained) == 30 and note.startswith("FEWER PROTEINS: 30 of 90, classes at random")
    assert all(
        {f"p{3 * k}", f"p{3 * k + 1}", f"p{3 * k + 2}"} <= set(retained)
        for k in {int(one[1:]) // 3 for one in retained}
    )
    unlabelled, note = subset_of(fasta, LabelOptions(), 10, 0, tmp_path)
    assert Path(unlabelled).read_text().count(">") == 10 and "10 of 90, at random" in note


@pytest.mark.parametrize(
    ("classes", "limit", "expected"), [(2, 60, [30, 30]), (2, 10, [5, 5]), (3, 1, [1]), (40, 30, 0)]
)
def test_few_large_classes_are_drawn_in_part(tmp_path, classes, limit, expected):
    names = [f"p{i}" for i in range(80)]
    (tmp_path / "a.fasta").write_text("".join(f">{name}\nMKVLA\n" for name in names))
    (tmp_path / "a.csv").write_text("id,label\n" + "".join(f"{name},c{i % classes}\n" for i, name in enumerate(names)))
    smaller, _ = subset_of(str(tmp_path / "a.fasta"), LabelOptions(str(tmp_path / "a.csv")), limit, 0, tmp_path)
    retained = [int(line[2:]) % classes for line in Path(smaller).read_text().splitlines() if line.startswith(">")]
    sizes = sorted(Counter(retained).values())
    assert sizes == (expected or [2] * 15), "the same of each, or whole classes"
