import numpy as np
import pyarrow as pa
import pytest

from distil_rank.embedding.shards import key_of, reopen, shard_of, vector_table
from distil_rank.embedding.store import column_of, vectors_of

ENTRY = {"file": "shard-00001.arrow", "rows": [4, 9], "proteins": ["proteins-00000.arrow", 4, 11], "residues": 300}
MANIFEST = {
    "format": "distil-rank embeddings",
    "version": 1,
    "layer": 6,
    "pooling": "mean",
    "dim": 3,
    "proteins": [{"file": "proteins-00000.arrow", "sha256": "ab"}],
    "shards": [ENTRY],
}


def test_a_shard_is_what_its_entry_says():
    shard = shard_of(ENTRY, MANIFEST)
    assert (shard.file, shard.rows, shard.proteins) == (ENTRY["file"], (4, 9), ("proteins-00000.arrow", 4, 11))
    assert (shard.residues, shard.parts, shard.key) == (300, "parts/shard-00001", key_of(ENTRY, MANIFEST))


@pytest.mark.parametrize(
    ("entry", "manifest"),
    [
        ({"rows": [4, 10]}, {}),
        ({"proteins": ["proteins-00000.arrow", 4, 12]}, {}),
        ({}, {"layer": 5}),
        ({}, {"proteins": [{"file": "proteins-00000.arrow", "sha256": "cd"}]}),
    ],
)
def test_another_content_has_another_key(entry, manifest):
    assert key_of(ENTRY | entry, MANIFEST | manifest) != key_of(ENTRY, MANIFEST)
    assert key_of(dict(ENTRY), dict(MANIFEST)) == key_of(ENTRY, MANIFEST)


def test_a_finished_shard_is_reopened():
    entry = {**ENTRY, "vectors": 5, "skipped": 0, "bytes": 900, "sha256": "ef"}
    assert key_of(entry, MANIFEST) == key_of(ENTRY, MANIFEST)
    reopen(entry)
    assert entry == ENTRY


def test_vectors_are_a_table():
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
    table = vector_table(np.array([4, 7]), {column_of(None): vectors}, {"key": "k"})
    assert table["row"].to_pylist() == [4, 7] and table.schema.metadata == {b"key": b"k"}
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 3)
    assert np.array_equal(vectors_of(table, "embedding"), vectors)
