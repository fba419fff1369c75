"""Retrieval metrics against loops over every query and target."""

import numpy as np
import pytest
import torch

from distil_rank.evaluation.retrieval import Relevance, inner_product, retrieve


@pytest.fixture(scope="module")
def relevance() -> Relevance:
    """Ninety proteins in nested classes: folds of superfamilies of families, some of a single protein."""
    rng = np.random.default_rng(1)
    family = rng.integers(30, size=90)
    return Relevance(np.stack([family, family // 3, family // 9]), ("family", "superfamily", "fold"), 1)


def rows(relevance: Relevance, seed: int = 0) -> torch.Tensor:
    """Vectors that lie near those of their family and superfamily."""
    rng = np.random.default_rng(seed)
    centres = [rng.normal(size=(40, 16))[level] for level in relevance.levels]
    return torch.nn.functional.normalize(torch.from_numpy(sum(centres) + rng.normal(size=centres[0].shape)).float())


def by_hand(scores: np.ndarray, relevance: Relevance, cutoff: int) -> dict[str, list[float]]:
    """The definitions, one query at a time."""
    family, superfamily, fold = relevance.levels
    results: dict[str, list[float]] = {name: [] for name in relevance.metrics}
    for q in range(len(scores)):
        others = [t for t in np.argsort(-scores[q], kind="stable") if t != q]
        right = [superfamily[t] == superfamily[q] for t in others]
        hits = [(i + 1) / (rank + 1) for i, rank in enumerate(np.flatnonzero(right)) if rank < cutoff]
        results["mAP"].append(sum(hits) / min(sum(right), cutoff) if any(right) else np.nan)
        has_family = any(family[t] == family[q] for t in others)
        results["family@1"].append(float(family[others[0]] == family[q]) if has_family else np.nan)
        remote = [t for t in others if family[t] != family[q]]
        has_remote = any(superfamily[t] == superfamily[q] for t in remote)
        first = float(superfamily[remote[0]] == superfamily[q])
        results["superfamily@1 remote"].append(first if has_remote else np.nan)
        until = next((i for i, t in enumerate(others) if fold[t] != fold[q]), len(others))
        sets = [
            [t for t in others if family[t] == family[q]],
            [t for t in others if superfamily[t] == superfamily[q] and family[t] != family[q]],
            [t for t in others if fold[t] == fold[q] and superfamily[t] != superfamily[q]],
        ]
        for name, one in zip(relevance.names, sets, strict=True):
            share = len(set(one) & set(others[:until])) / len(one) if all(sets) else np.nan
            results[f"sens1fp {name}"].append(share)
    return results


@pytest.mark.parametrize("cutoff", [200, 3])
def test_every_metric_is_what_its_definition_says(relevance, cutoff):
    x = rows(relevance)
    expected = by_hand((x @ x.T).numpy(), relevance, cutoff)
    measured = retrieve(inner_product(x, x), relevance, cutoff=cutoff)
    assert set(measured) == set(expected)
    for name, values in measured.items():
        np.testing.assert_allclose(values, expected[name], atol=1e-12, err_msg=name)


def test_blocks_change_nothing(relevance, monkeypatch):
    x = rows(relevance)
    whole = retrieve(inner_product(x, x), relevance)
    monkeypatch.setattr("distil_rank.evaluation.retrieval.BLOCK_SCORES", 7 * len(x))
    for name, values in retrieve(inner_product(x, x), relevance).items():
        np.testing.assert_array_equal(values, whole[name])


def test_chosen_queries_search_among_all(relevance):
    x, chosen = rows(relevance), np.array([3, 50, 7])
    whole = retrieve(inner_product(x, x), relevance)
    for name, values in retrieve(inner_product(x, x), relevance, queries=chosen).items():
        np.testing.assert_array_equal(values, whole[name][chosen])


def test_targets_that_were_not_found_add_nothing():
    scores = torch.tensor(
        [[0.0, 0.9, -torch.inf, 0.1], [0.9, 0.0, 0.8, 0.7], [0.1, 0.2, 0.0, 0.3], [0.4, 0.3, 0.2, 0.0]]
    )
    relevance = Relevance(np.array([[0, 0, 0, 1]]), ("class",))
    figures = retrieve(lambda q, t: scores[q][:, t], relevance)
    assert figures["mAP"].tolist()[:2] == [0.5, 1.0] and np.isnan(figures["mAP"][3])
    assert figures["sens1fp class"].tolist()[:3] == [0.5, 1.0, 0.0]


def test_queries_that_the_nearest_do_not_decide_are_sorted_in_full(relevance, monkeypatch):
    x = rows(relevance)
    whole = retrieve(inner_product(x, x), relevance, cutoff=2)
    monkeypatch.setattr("distil_rank.evaluation.retrieval.NEAREST", 2)
    for name, values in retrieve(inner_product(x, x), relevance, cutoff=2).items():
        np.testing.assert_array_equal(values, whole[name])


def test_ties_are_not_broken_by_the_order_of_the_file():
    """A representation without any information, on proteins sorted by label, scores as chance does."""
    levels = np.repeat(np.arange(50), 4)[None]
    same = torch.ones(200, 1)
    figures = retrieve(inner_product(same, same), Relevance(levels, ("class",)))
    assert figures["class@1"].mean() < 0.06  # 3 / 199 expected; broken by order it would be 0.75
    assert figures["mAP"].mean() < 0.1


def test_permuted_labels_and_shuffled_rows_score_at_chance(relevance):
    x, order = rows(relevance), np.random.default_rng(5).permutation(90)
    true = np.nanmean(retrieve(inner_product(x, x), relevance)["mAP"])
    permuted = np.nanmean(retrieve(inner_product(x, x), relevance.subset(order))["mAP"])
    shuffled = np.nanmean(retrieve(inner_product(x[order], x[order]), relevance)["mAP"])
    noise = [np.nanmean(retrieve(inner_product(y, y), relevance)["mAP"]) for y in torch.randn(5, 90, 16)]
    assert true > 0.5
    for chance in (permuted, shuffled):
        assert abs(chance - np.mean(noise)) < 0.04
