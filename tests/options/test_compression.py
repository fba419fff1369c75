"""What cannot be meant is refused before any work."""

import pytest

from distil_rank.artefact import write_folder
from distil_rank.errors import InputError
from distil_rank.options.compression import CompressOptions, ExportOptions
from distil_rank.options.training import DataOptions


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Holds a model, a matrix, a student and a store."""
    monkeypatch.chdir(tmp_path)
    for name in ("m.pt", "x.npy"):
        (tmp_path / name).touch()
    write_folder("student", {"format": "distil-rank"}, {})
    write_folder("store", {"format": "distil-rank embeddings"}, {})
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "a saved model at --model but got 'none'"),
        ({"model": "nowhere.pt"}, "got 'nowhere.pt'"),
        ({"data": DataOptions("nowhere.npy")}, "nowhere.npy but it does not exist"),
        ({"rank": 0}, "--rank as an integer"),
        ({"rank": 1.0}, r"in \(0, 1\) or 'auto' but got 1.0"),
        ({"output": "store"}, "store but it holds 'distil-rank embeddings'; name another place"),
        ({"output": "m.pt/x"}, "m.pt is a file"),
    ],
)
def test_compress(folder, changes, message):
    valid = {"model": "m.pt", "data": DataOptions("x.npy"), "output": "student"}
    CompressOptions(**valid).check()
    with pytest.raises(InputError, match=message):
        CompressOptions(**valid | changes).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"artefact": ""}, "a saved student at --artefact but got 'none'"),
        ({"artefact": "m.pt"}, "got 'm.pt'"),
        ({"rank": 0}, "--rank of at least 1 but got 0"),
        ({"output": "store"}, "a file at --output but store is a folder"),
        ({"output": "m.pt/x.onnx"}, "m.pt is a file"),
    ],
)
def test_export(folder, changes, message):
    ExportOptions("student", output="deep/layer.onnx").check()
    with pytest.raises(InputError, match=message):
        ExportOptions(**{"artefact": "student"} | changes).check()
