"""Real-world FASTA and tables: cleaned and counted, or refused with file, line and record."""

import gzip
import io
import lzma
import sys
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distil_rank.embedding.sequences import CleaningReport, Protein, UniqueNames, iter_records, read_proteins
from distil_rank.errors import InputError


def read(tmp_path: Path, content: bytes | str, name: str = "in.fasta"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    proteins, report = read_proteins(path)
    return [(protein.id, protein.sequence) for protein in proteins], report


@pytest.mark.parametrize(
    ("raw", "clean", "counted"),
    [
        ("MKV", "MKV", []),
        ("mkv", "MKV", ["lowercase"]),
        ("MKV*", "MKV", ["stops"]),
        ("MK*V**", "MKXV", ["stops", "unknown"]),
        ("MK--V..A", "MKVA", ["gaps"]),
        ("MJV", "MXV", ["unknown"]),
        ("MUOBZX", "MUOBZX", ["rare"]),
        ("1 MKV 60 AAA", "MKVAAA", ["digits"]),
        ("M K\tV", "MKV", []),
        ("m-k*", "MK", ["lowercase", "gaps", "stops"]),
        ("ACGT" * 10, "ACGT" * 10, ["nucleotides"]),
        ("acgt" * 10, "ACGT" * 10, ["lowercase", "nucleotides"]),
        ("ACGU" * 10, "ACGU" * 10, ["rare", "nucleotides"]),
    ],
)
def test_what_is_cleaned_is_counted(tmp_path, raw, clean, counted):
    proteins, report = read(tmp_path, f">a\n{raw}\n")
    assert proteins == [("a", clean)]
    changes = {key for key, count in report.counts.items() if count} - {"records", "kept"}
    assert changes == set(counted)
    assert all(report.counts[key] == 1 for key in counted)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_any_line_ending(tmp_path, ending):
    proteins, _ = read(tmp_path, ending.join([">a first", "MK", "VA", "", ">b", "GG"]))
    assert proteins == [("a", "MKVA"), ("b", "GG")]


def test_names(tmp_path):
    text = ">sp|P12345|A_B protein\nMK\n>tr|Q9XYZ1|C_D\nMV\n>UniRef50_A0A1 cluster\nMA\n> spaced out\nMG\n>\nML\n"
    proteins, report = read(tmp_path, text)
    assert [name for name, _ in proteins] == ["P12345", "Q9XYZ1", "UniRef50_A0A1", "spaced", "protein_5"]
    assert report.counts["unnamed"] == 1


def test_repeats_and_name_clashes(tmp_path):
    proteins, report = read(tmp_path, ">a\nMK\n>a\nmk\n>a\nMV\n>a_2\nML\n>a\nMA\n>b\nMK\n")
    assert proteins == [("a", "MK"), ("a_2", "MV"), ("a_2_2", "ML"), ("a_3", "MA"), ("b", "MK")]
    assert (report.counts["repeated"], report.counts["renamed"]) == (1, 3)


def test_empty_records_and_comments(tmp_path):
    proteins, report = read(tmp_path, "; old style\n>a\n\n>b\n***\n>c\nMK\n; remark\nVA\n>d\n")
    assert proteins == [("c", "MKVA")]
    assert (report.counts["empty"], report.counts["comments"], report.counts["records"]) == (3, 2, 4)
    assert str(report) == "1 of 4 records kept, 1 with stops removed, 3 empty records left out, 2 comment lines ignored"


def test_byte_order_mark_and_long_lines(tmp_path):
    proteins, _ = read(tmp_path, b"\xef\xbb\xbf>a\n" + b"MKVAL" * 40_000 + b"\n")
    assert len(proteins[0][1]) == 200_000


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, partial(pa.compress, codec="zstd", asbytes=True)])
@pytest.mark.parametrize("name", ["in.fasta.gz", "in.fasta.zst", "misnamed.fasta"])
def test_compressed_whatever_the_name(tmp_path, compress, name):
    assert read(tmp_path, compress(b">a\nMK\n"), name)[0] == [("a", "MK")]


def test_standard_input(monkeypatch):
    class Stdin:
        buffer = io.BufferedReader(io.BytesIO(gzip.compress(b">a\nMK\n", mtime=0)))

    monkeypatch.setattr(sys, "stdin", Stdin)
    assert read_proteins("-")[0] == [Protein("a", "MK")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("in.csv", "id,family,sequence\na,x,MK\nb,y,mv*\n"),
        ("in.tsv", "Entry\tLength\tSequence\r\na\t2\tMK\r\nb\t2\tMV\r\n"),
        ("in.csv.gz", "Sequence,Accession\nMK,a\nMV,b\n"),
        ("in.csv", 'seq,name\n"M\nK",a\n\nMV,"b, with words"\n'),
    ],
)
def test_tables_with_named_columns(tmp_path, name, text):
    content = gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text.encode()
    proteins, _ = read(tmp_path, content, name)
    assert [sequence for _, sequence in proteins] == ["MK", "MV"]
    assert proteins[0][0] == "a"


def test_names_in_a_table_are_whole_cells(tmp_path):
    text = "id,sequence\nheavy chain 1,MK\nheavy chain 2,MV\nsp|P12345|A_B protein,MA\n"
    assert [name for name, _ in read(tmp_path, text, "in.csv")[0]] == ["heavy chain 1", "heavy chain 2", "P12345"]


def test_quotes_in_a_tsv_are_characters(tmp_path):
    text = 'id\tnote\t"sequence"\n5" end\t"open\tMK\n"b"\tx\t"MV"\n'
    assert read(tmp_path, text, "in.tsv")[0] == [('5" end', "MK"), ("b", "MV")]


def test_cells_that_say_missing_are_no_proteins(tmp_path):
    missing = ["NA", "N/A", "nan", "NaN", "NULL", "null", "None", ""]
    proteins, report = read(tmp_path, "id,sequence\n" + "".join(f"x,{text}\n" for text in [*missing, "MK"]), "in.csv")
    assert proteins == [("x", "MK")]
    assert report.counts["empty"] == len(missing)


def test_many_proteins_of_one_name_are_numbered_without_trying_every_number():
    lookups = []

    class Counting(dict):
        def __contains__(self, name):
            lookups.append(name)
            return super().__contains__(name)

    names = UniqueNames()
    names._sequence_of = Counting()
    unique = [names.resolve("chain", f"MK{'A' * i}") for i in range(500)]
    assert unique == ["chain", *(f"chain_{number}" for number in range(2, 501))]
    assert len(lookups) <= 2 * 500


def test_table_without_names_or_with_short_lines(tmp_path):
    proteins, report = read(tmp_path, "family,sequence\nx,MK\nonly\ny,MV\n", "in.csv")
    assert proteins == [("protein_1", "MK"), ("protein_3", "MV")]
    assert (report.counts["unnamed"], report.counts["empty"]) == (3, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.fasta", b"", "none is left of 0 records"),
        ("in.fasta", b">a\n>b\n", "none is left of 2 records"),
        ("in.fasta", b"MKVA\n", r"FASTA header .* line 1, but got 'MKVA'"),
        ("in.fasta", b">a\nMK\n>b\nM@K\n", r"in\.fasta, record b at line 3, but got '@'"),
        ("in.fasta", ">a\nMKé\n".encode("latin-1"), "record a at line 1"),
        ("in.fasta", ">a\nMKß\n".encode(), "record a at line 1, but got 'ß'"),
        ("in.fasta", b">a\nMK\x00V\n", "line 2 is binary"),
        ("in.fasta", ">a\nMK\n".encode("utf-16"), "binary"),
        ("in.fasta.gz", gzip.compress(b">a\n" + bytes(range(65, 85)) * 999, mtime=0)[:-12], "cut off or damaged"),
        ("in.fasta.gz", b"\x1f\x8bnot gzip at all", "cut off or damaged"),
        (
            "in.zst",
            pa.compress(b">a\nMK" * 999, "zstd", asbytes=True)[:-3],
            r"in\.zst .* cut off or damaged \(Truncated",
        ),
        ("in.zst", b"\x28\xb5\x2f\xfdnot zstd", "cut off or damaged"),
        ("in.tsv", "\t".join(f"c{i}" for i in range(999)).encode(), "but got c0, c1, c2, ...; rename"),
        ("in.csv", b"id,family\na,x\n", "column named sequence or seq .* but got id, family"),
        ("in.csv", b"", "but got nothing"),
        ("in.csv", b"id,sequence\na,MK\nb, x,MV\n", r"Expected 2 cells, .* in .*in\.csv, line 3, but got 3"),
        ("in.csv", b'id,sequence\na,"MK\n', r"in\.csv but line 2 is malformed"),
    ],
)
def test_refused_in_one_line(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, content, name)
    assert "\n" not in str(caught.value)


def test_missing_and_folder(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_proteins(tmp_path / "none.fasta")
    with pytest.raises(InputError, match="it is a folder"):
        read_proteins(tmp_path)


def test_no_standard_input_and_a_name_that_is_too_long(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input but this process has none"):
        read_proteins("-")
    with pytest.raises(InputError, match=r"FASTA file .*File name too long"):
        read_proteins("n" * 300)


def test_records_are_read_no_further_than_asked(tmp_path):
    path = tmp_path / "in.fasta"
    path.write_text(">a\nMK\n>b\nMV\n>c\nM@\n")
    assert next(iter_records(path, CleaningReport(""))) == Protein("a", "MK")


records = st.lists(
    st.tuples(
        st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=12),
        st.text("ACDEFGHIKLMNPQRSTVWYXBZUOJacdxj*-. 019", max_size=60),
    ),
    min_size=1,
    max_size=12,
)


@given(records, st.sampled_from(["\n", "\r\n"]), st.integers(1, 61))
def test_any_fasta_gives_unique_names_and_tokens_of_esm2(tmp_path_factory, entries, ending, width):
    lines = []
    for header, sequence in entries:
        lines.append(f">{header}")
        lines += [sequence[i : i + width] for i in range(0, len(sequence), width)]
    path = tmp_path_factory.mktemp("any") / "in.fasta"
    path.write_bytes(ending.join(lines).encode())
    try:
        proteins, report = read_proteins(path)
    except InputError as error:
        assert "none is left" in str(error)
        assert not any(set(sequence) & set("ABCDEFGHIJKLMNOPQRSTUVWXYZacdxj") for _, sequence in entries)
        return
    names = [protein.id for protein in proteins]
    assert len(set(names)) == len(names) == report.counts["kept"]
    assert all(protein.sequence and set(protein.sequence) <= set("ACDEFGHIKLMNPQRSTVWYXBZUO") for protein in proteins)
    assert report.counts["records"] == len(entries)
    assert report.counts["kept"] + report.counts["empty"] + report.counts["repeated"] == len(entries)
