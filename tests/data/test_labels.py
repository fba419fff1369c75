"""Label tables in all their forms, and what is refused."""

import gzip
import zipfile

import numpy as np
import pytest

from distil_rank.data.labels import LabelTable, read_labels
from distil_rank.errors import InputError
from distil_rank.options.evaluation import LabelOptions


def read(path, content, **options):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_labels(LabelOptions(str(path), **options))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "id,label\nP1,kinase\nP2,protease\n"),
        ("a.tsv", "accession\tclass\nP1\tkinase\nP2\tprotease\n"),
        ("a.tsv", "P1\tkinase\nP2\tprotease\n"),
        ("bom.csv", "\ufeffid,label\r\nP1,kinase\r\nP2,protease\r\n"),
        ("a.txt", "label\tid\nkinase\tP1\nprotease\tP2\n"),
        ("quoted.csv", '"id","label"\n"P1","kinase"\n\n"P2","protease"\n'),
        ("a.fasta", ">P1 kinase\nMK\n>sp|P2|X_HUMAN protease\nMV\n"),
        ("a.csv.gz", gzip.compress(b"id,label\nP1,kinase\nP2,protease\n", mtime=0)),
    ],
)
def test_the_same_labels_in_every_form(tmp_path, name, content):
    field = 2 if "fasta" in name else None
    assert dict(read(tmp_path / name, content, field=field).labels) == {"P1": "kinase", "P2": "protease"}


def test_columns_beside_the_label(tmp_path):
    table = read(tmp_path / "a.csv", "id,organism,label,cluster\nP1,yeast,kinase,c1\nP2,human,protease,\n")
    assert dict(table.labels) == {"P1": "kinase", "P2": "protease"}
    assert table.columns == {"organism": {"P1": "yeast", "P2": "human"}, "cluster": {"P1": "c1"}}
    chosen = read(tmp_path / "a.csv", "id,organism,label\nP1,yeast,kinase\n", column="organism")
    assert dict(chosen.labels) == {"P1": "yeast"}


def test_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", ids=np.array(["P1"]), labels=np.array(["k"]), full=np.array(["k_a"]))
    assert read_labels(LabelOptions(str(tmp_path / "a.npz"), column="full")).labels == {"P1": "k_a"}


def test_what_is_left_out_is_counted(tmp_path):
    table = read(tmp_path / "a.csv", "id,label\nP1,k\nP1,k\nP2,NA\nP3,m\nP4,?\n")
    rows, labels, notes = table.aligned(["P3", "P1", "P9"])
    assert rows.tolist() == [0, 1] and labels == ["m", "k"]
    assert "2 empty labels" in notes[0] and "(P2, P4)" in notes[0]
    assert "1 repeated lines" in notes[1]
    assert "1 of 3 proteins have no label" in notes[2] and "P9" in notes[2]


@pytest.mark.parametrize("missing", ["NA", "NaN", "n/a", "None", "-", "?", "", " NA "])
def test_a_missing_label_is_no_class(tmp_path, missing):
    for table in (
        read(tmp_path / "a.csv", f"id,label\nP1,k\nP2,{missing}\n"),
        LabelTable.of("x.npz", [("P1", "k"), ("P2", missing)]),
    ):
        assert dict(table.labels) == {"P1": "k"} and "1 empty labels" in table.notes[0]


def test_ids_are_accessions_as_in_fasta_and_it_is_said(tmp_path):
    table = read(tmp_path / "a.csv", "id,label,cluster\nsp|P1|X_HUMAN,k,c\nP2,m,\n")
    assert dict(table.labels) == {"P1": "k", "P2": "m"} and table.columns == {"cluster": {"P1": "c"}}
    assert "shortened to accessions: sp|P1|X_HUMAN to P1" in table.notes[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", "id\tvalue\nP1\t0,75\nP2\t-3\n"),
        ("a.csv", "id;value\nP1;0,75\nP2;-3\n"),
        ("a.csv", "P1;0,75\nP2;-3\n"),
        ("a.csv", 'id,value\nP1,"0,75"\nP2,-3\n'),
    ],
)
def test_decimal_commas_are_numbers(tmp_path, name, content):
    table = read(tmp_path / name, content)
    assert {name: float(label) for name, label in table.labels.items()} == {"P1": 0.75, "P2": -3.0}
    assert "decimal commas" in table.notes[0]


def test_commas_in_names_stay(tmp_path):
    table = read(tmp_path / "a.tsv", "P1\t1,3-beta-glucanase\nP2\t1,5\n")
    assert dict(table.labels) == {"P1": "1,3-beta-glucanase", "P2": "1,5"} and not table.notes


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", b"PK\x03\x04rest", {}, "Excel"),
        ("a.csv", "id,label\nP1,k\n".encode("utf-16"), {}, "UTF-16"),
        ("a.csv", "", {}, "got nothing"),
        ("a.csv", "id\nP1\n", {}, "one column"),
        ("a.csv", "id,label\nP1,k\nP1,m\n", {}, "P1 has 'k' and 'm'"),
        ("a.csv", "id,label\nP1,\n", {}, "every one is empty"),
        ("a.csv", "id,label\nP1,k,3\n", {}, "line 2 has 3"),
        ("a.csv", "id,label\nP1,k\n", {"column": "family"}, "a column 'family'"),
        ("a.csv", "id,a,b,c,label\nP1,a,b,c,k\n", {"column": "family"}, "but got id, a, b, ...."),
        ("a.fasta", ">P1 k\nMK\n", {}, "--labels.field"),
        ("a.fasta", ">P1\nMK\n", {"field": 2}, "as word 2"),
        ("a.npz", b"no zip", {}, "cannot be read"),
        ("a.csv", "id,label\nP1,k\nP2,prot\u00e9ase\n".encode("latin-1"), {}, "UTF-8 text"),
        ("a.csv", "id,label,family\nP1,k,\u00e9\n".encode("latin-1"), {}, "UTF-8 text"),
        ("a.csv", 'id,label\nP1,"k\nP2,k\nP3,"m"\n', {}, "a quote runs on into line 4"),
        ("a.fasta", ">P1 \u00e9\nMK\n".encode("latin-1"), {"field": 2}, "UTF-8 text"),
    ],
)
def test_what_is_refused(tmp_path, name, content, options, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as caught:
        read(tmp_path / name, content, **options)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_ids_that_do_not_match(tmp_path):
    with pytest.raises(InputError, match="there is none"):
        read_labels(LabelOptions(str(tmp_path / "absent.csv")))
    table = read(tmp_path / "a.csv", "id,label\nP1,k\nP2,k\n")
    with pytest.raises(InputError, match=r"such as X1, X2, X3, \.\.\. but got 2"):
        table.aligned(["X1", "X2", "X3", "X4"])


def test_a_zip_file_is_no_table(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.tsv", "w") as archive:
        archive.writestr("sheet.xml", "")
    with pytest.raises(InputError, match="save it as CSV"):
        read_labels(LabelOptions(str(tmp_path / "a.tsv")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "absent.csv"}, "absent.csv but there is none"),
        ({"field": 0}, "--labels.field from 1"),
        ({"field": 2, "column": "family"}, "a field for FASTA headers, a column for tables"),
        ({"names": "fold,,family"}, "different --labels.names"),
        ({"names": "fold,family", "level": "class"}, "--labels.level out of fold, family"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_before_any_work(options, message):
    LabelOptions(source=f"{__file__}, {__file__}", field=2, names="fold,family", level="fold").check()
    with pytest.raises(InputError, match=message):
        LabelOptions(**options).check()
