"""Representations side by side."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from distil_rank.data.files import load_matrix
from distil_rank.data.mmseqs import mmseqs_binary
from distil_rank.errors import InputError
from distil_rank.evaluation.evaluate import evaluate, make_trial
from distil_rank.evaluation.labelled import open_labelled
from distil_rank.evaluation.representations import (
    alignment,
    composition,
    full_vector,
    module_output,
    principal_components,
)
from distil_rank.evaluation.task import make_groups, make_target
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import solve
from distil_rank.options.evaluation import LabelOptions

SAMPLE = "data/functions"


@pytest.fixture(scope="module")
def opened(request):
    return open_labelled(str(request.config.rootpath / SAMPLE), LabelOptions())


def test_the_sample_is_hard_but_not_hopeless(opened):
    """Its labels are names that occur in several organisms; neither composition nor the full vector solves it."""
    x, sequences = opened.embeddings.x, opened.embeddings.sequences
    done = evaluate(opened.target, opened.groups, [full_vector(x), composition(sequences)], "names")
    full, chance, simple = done.entries
    headline = done.headline
    assert 0.4 < full.scores[headline].value < 0.9
    assert chance.scores[headline].high < 0.1 < simple.scores[headline].value < full.scores[headline].low
    assert simple.retained[headline].high < 1
    assert done.entry("composition") is simple


def test_a_student_is_what_the_solver_makes_of_the_fit_rows(opened):
    """Ranking by the inner activation is ranking by the outputs of the closed form, of the identity layer."""
    x, fit = opened.embeddings.x, opened.groups.fit
    moments = Moments.of(torch.from_numpy(x[fit]))
    layer = LowRankLinear.from_factors(solve(torch.eye(x.shape[1]), None, 32, "closed_form", moments))
    candidates = [full_vector(x), principal_components(x, 32), module_output("outputs", layer, x, "fitted elsewhere")]
    done = evaluate(opened.target, opened.groups, candidates, "names")
    ours, outputs = (done.entry(name).scores for name in ("student, rank 32", "outputs"))
    for metric in done.metrics:
        assert ours[metric].value == pytest.approx(outputs[metric].value, abs=2e-3)
    assert "fitted elsewhere" in done.notes and done.entry("outputs").bytes == 128


def test_nothing_is_fitted_on_the_evaluated_rows(opened):
    x, fit = opened.embeddings.x, opened.groups.fit
    changed = x.copy()
    changed[~fit] += 100 * np.random.default_rng(0).normal(size=changed[~fit].shape).astype(np.float32)
    for make in (full_vector, lambda x: principal_components(x, 8), lambda x: full_vector(x, "other", "matrix")):
        before, after = (make(matrix).make(fit)[0][torch.from_numpy(fit)] for matrix in (x, changed))
        torch.testing.assert_close(before, after)


def test_a_better_baseline_is_named():
    """Labels that are the composition itself: it wins, and the notes say so."""
    rng = np.random.default_rng(0)
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    shares = rng.dirichlet(np.ones(20) * 0.2, size=40)
    labels = np.repeat(np.arange(40), 5)
    sequences = ["".join(rng.choice(letters, size=80, p=shares[k])) for k in labels]
    target = make_target([f"c{k}" for k in labels], LabelOptions(), "retrieval")
    groups = make_groups(None, target, [str(i) for i in range(200)])
    x = rng.normal(size=(200, 6)).astype(np.float32)
    done = evaluate(target, groups, [full_vector(x), composition(sequences)])
    assert any(note.startswith("WARNING: amino-acid composition and length alone reaches") for note in done.notes)


@pytest.mark.skipif(mmseqs_binary() is None, reason="MMseqs2 is not installed")
def test_alignment_is_a_baseline(opened):
    rows = opened.groups.evaluated
    sequences = [opened.embeddings.sequences[row] for row in rows]
    scores = alignment(sequences).make(np.zeros(len(rows), dtype=bool))
    block = scores(np.arange(5), np.arange(len(rows)))
    assert block.shape == (5, len(rows)) and (block.argmax(1) == torch.arange(5)).all()  # each finds itself
    x = opened.embeddings.x
    searched = replace(alignment(opened.embeddings.sequences), make=lambda _: scores)
    done = evaluate(opened.target, opened.groups, [full_vector(x), searched])
    assert done.entry("MMseqs2").scores["mAP"].value > done.entries[0].scores["mAP"].value
    assert any("MMseqs2 search reaches" in note for note in done.notes)


def test_the_headline_is_chosen(opened):
    x = opened.embeddings.x
    done = evaluate(opened.target, opened.groups, [full_vector(x), principal_components(x, 8)], metric="class@1")
    assert done.headline == "class@1" and set(done.metrics) == {"mAP", "class@1", "sens1fp class"}
    with pytest.raises(InputError, match="--metric out of mAP, class@1"):
        evaluate(opened.target, opened.groups, [full_vector(x)], metric="accuracy")


def test_fewer_queries_are_told(opened):
    trial = make_trial(opened.target, opened.groups, max_queries=50)
    assert any(note.startswith("FEWER QUERIES: 50 of 3") for note in trial.notes) and len(trial.queries) == 50


def test_classes_in_one_split_only_are_told(opened):
    texts = [f"c{number % 3}" if fit else f"c{number % 4}" for number, fit in enumerate(opened.groups.fit)]
    target = make_target(texts, LabelOptions(), "classification")
    groups = make_groups("clusters", target, opened.embeddings.ids, clusters=opened.embeddings.clusters)
    sided = type(groups)(groups.number, opened.groups.fit, "by hand")
    done = evaluate(target, sided, [full_vector(opened.embeddings.x)])
    assert any("1 of 4 classes are only evaluated (c3)" in note for note in done.notes)
    assert done.metrics[0] == "mcc" and [one.name for one in done.entries[1:]] == ["chance", "majority"]


def test_a_full_vector_that_knows_nothing_is_warned_of(opened):
    """Five of one class among hundreds: the accuracy is high, and that of saying the other class always no lower."""
    y = np.zeros(len(opened.groups.fit), dtype=int)
    y[np.flatnonzero(opened.groups.fit)[:3]] = y[np.flatnonzero(~opened.groups.fit)[:2]] = 1
    target = make_target([("no", "yes")[k] for k in y], LabelOptions(), "classification")
    done = evaluate(target, opened.groups, [full_vector(opened.embeddings.x)], metric="accuracy")
    assert done.entries[0].scores["accuracy"].value > 0.98
    assert any("accuracy is not clearly above majority" in note for note in done.notes)


def test_nothing_to_find_is_refused(opened):
    target = make_target(["k", "k", *(f"c{i}" for i in range(58))], LabelOptions(), "retrieval")
    groups = make_groups(None, target, [str(i) for i in range(60)])
    fit = np.arange(60) < 30
    with pytest.raises(InputError, match="every one is alone"):
        evaluate(target, type(groups)(groups.number, fit, ""), [full_vector(opened.embeddings.x[:60])])


def test_ranks_beyond_the_width_are_refused(opened):
    with pytest.raises(InputError, match=r"in \[1, 320\]"):
        principal_components(opened.embeddings.x, 321)


def test_labels_of_some_proteins_only(opened, tmp_path, request):
    store = request.config.rootpath / SAMPLE
    lines = (store / "labels.tsv").read_text().splitlines()
    (tmp_path / "some.tsv").write_text("\n".join(lines[:300]))
    some = open_labelled(str(store), LabelOptions(str(tmp_path / "some.tsv")))
    assert len(some.embeddings.ids) == len(some.embeddings.x) == 299
    assert some.embeddings.ids == [line.split("\t")[0] for line in lines[1:300]]
    np.testing.assert_array_equal(some.embeddings.x, load_matrix(store).x[:299])
    assert any("have no label" in note for note in some.notes)
