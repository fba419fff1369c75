"""Inputs that break other tools: each ends in vectors or in one clear line, and no earlier result is lost."""

import bz2
import gzip
import io
import lzma
import os
import random
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from distil_rank.embedding.run import embed
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError

NOISE = random.Random(0).randbytes(3000)
GOOD = b">good\nMKTAYIAKQR\n"


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("in.fasta", content)
    return file.getvalue()


def tarred(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("in.fasta")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


# name of the file: its content, and how many proteins it gives; None where it must be refused
CASES: dict[str, tuple[bytes, int | None]] = {
    "empty.fasta": (b"", None),
    "only_newlines.fasta": (b"\n\n\r\n\n", None),
    "only_spaces.fasta": (b"     \t  ", None),
    "only_header.fasta": (b">alone", None),
    "only_comment.fasta": (b"; nothing here\n", None),
    "only_stops.fasta": (b">a\n***\n", None),
    "only_gaps.fasta": (b">a\n-----\n", None),
    "only_digits.fasta": (b">a\n12345\n", None),
    "no_header.fasta": (b"MKTAYIAKQR\n", None),
    "header_after_sequence.fasta": (b"MKTAYIAKQR\n>a\n", None),
    "at_sign.fasta": (b">a\nMK@TAY\n", None),
    "slash.fasta": (b">a\nMKTAYIAKQR//\n", None),
    "brackets.fasta": (b">a\nMKT[PHOS]AY\n", None),
    "unicode_letter.fasta": (">a\nMKÄTAY\n".encode(), None),
    "greek.fasta": (">a\nΜΚΤΑΥ\n".encode(), None),
    "sharp_s.fasta": (">a\nMKßAY\n".encode(), None),
    "escape_codes.fasta": (b">a\nMK\x1b[31mTAY\n", None),
    "null_byte.fasta": (b">a\nMK\x00TAY\n", None),
    "null_in_name.fasta": (b">a\x00b\nMKTAY\n", None),
    "noise.fasta": (NOISE, None),
    "header_then_noise.fasta": (b">a\n" + NOISE, None),
    "utf16.fasta": (">a\nMKTAY\n".encode("utf-16"), None),
    "zip.fasta": (zipped(GOOD), None),
    "tar.fasta": (tarred(GOOD), None),
    "torch.fasta": (saved({"a": torch.zeros(3)}), None),
    "pdf.fasta": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", None),
    "html.fasta": (b"<!DOCTYPE html><html><body>404</body></html>", None),
    "genbank.fasta": (b"LOCUS       AB000001\nORIGIN\n        1 mktay\n//\n", None),
    "fastq.fasta": (b"@read\nACGT\n+\nIIII\n", None),
    "truncated.fasta.gz": (gzip.compress(GOOD * 500)[:-9], None),
    "half.fasta.gz": (gzip.compress(NOISE + GOOD)[:1500], None),
    "flipped.fasta.gz": (gzip.compress(GOOD)[:-6] + b"abcdef", None),
    "magic_only.fasta.gz": (b"\x1f\x8b", None),
    "truncated.fasta.xz": (lzma.compress(GOOD * 500)[:-20], None),
    "zlib.fasta.gz": (zlib.compress(GOOD), None),
    "empty.csv": (b"", None),
    "no_sequence.csv": (b"id,length\na,3\n", None),
    "open_quote.csv": (b'id,sequence\na,"MKT\n', None),
    "wrong_delimiter.tsv": (b"id,sequence\na,MKT\n", None),
    "name_of_other_sequence.fasta": (b">kept\nMMMMM\n", None),
    "one_letter.fasta": (b">one_letter\nM\n", 1),
    "no_last_newline.fasta": (b">no_last\nMKT", 1),
    "old_mac.fasta": (b">mac1\rMKT\r>mac2\rMKV\r", 2),
    "mixed_endings.fasta": (b">mix1\r\nMKT\n>mix2\rMKV\r\n", 2),
    "byte_order_mark.fasta": (b"\xef\xbb\xbf>bom\nMKT\n", 1),
    "lowercase.fasta": (b">low\nmktay\n", 1),
    "every_letter.fasta": (b">letters\nABCDEFGHIJKLMNOPQRSTUVWXYZ*-.\n", 1),
    "inner_stop.fasta": (b">stop\nMK*TAY\n", 1),
    "numbered.fasta": (b">numbered\n1 mktay iakqr 10\n11 qisfv kshfs 20\n", 1),
    "same_name_other_sequence.fasta": (b">twin\nMKA\n>twin\nMKC\n>twin\nMKA\n", 2),
    "same_record_twice.fasta": (b">again\nMKA\n>again\nMKA\n", 1),
    "same_sequence_two_names.fasta": (b">s1\nMKTT\n>s2\nMKTT\n", 2),
    "unnamed.fasta": (b">\nMKW\n> \nMKY\n", 2),
    "odd_names.fasta": (">../../etc/passwd\nMKF\n>ümlaut\nMKG\n>a/b|c\nMKH\n>$(reboot)\nMKI\n".encode(), 4),
    "latin1_name.fasta": (">caf\u00e9\nMKKK\n".encode("latin-1"), 1),
    "long_name.fasta": (b">" + b"n" * 100_000 + b"\nMKL\n", 1),
    "empty_between.fasta": (b">e1\nMKM\n>e2\n>e3\n\n\nMKN\n>e4\n", 2),
    "blank_inside.fasta": (b">blank\nMK\n\n\nTAY\n", 1),
    "line_separator.fasta": ("\u2028>sep\nMKP\n".encode(), None),
    "titin_and_more.fasta": (b">huge\n" + b"MKTAYIAKQR" * 10_000 + b"\n", 1),
    "wide.csv": (b'id,note,sequence\ncsv1,"a, b\nc",MKQ\n', 1),
    "windows.tsv": (b"Entry\tSequence\r\ntsv1\tMKR\r\ntsv2\tMKS\r\n", 2),
    "misnamed_gzip.fasta": (gzip.compress(b">hidden\nMKV\n"), 1),
    "two_members.fasta.gz": (gzip.compress(b">m1\nMKVA\n") + gzip.compress(b">m2\nMKVC\n"), 2),
    "bzip2.fasta.bz2": (bz2.compress(b">bz\nMKVD\n"), 1),
}


@pytest.fixture(scope="module")
def store(tiny_esm2, tmp_path_factory):
    """A store with one earlier result, into which every case goes."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "kept.fasta").write_text(">kept\nMKTAYIAKQRQISFVK\n")
    embed(folder / "kept.fasta", folder / "store", backbone=str(tiny_esm2.fair_esm), accelerator="cpu")
    return folder / "store"


def test_there_are_at_least_forty():
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", CASES)
def test_vectors_or_one_clear_line(tiny_esm2, store, tmp_path, name):
    content, expected = CASES[name]
    path = tmp_path / name
    path.write_bytes(content)
    before = Store.open(store)
    vectors, ids = before.embeddings().copy(), list(before.ids)
    try:
        added = embed(path, store, backbone=str(tiny_esm2.fair_esm), accelerator="cpu").added
    except InputError as error:
        assert expected is None, error
        assert len(str(error).splitlines()) == 1
        assert str(error).isprintable()
        assert name in str(error) or "kept" in str(error)
    else:
        assert added == expected
    after = Store.open(store)
    after.verify()
    assert after.ids[: len(ids)] == ids
    assert (after.embeddings()[: len(ids)] == vectors).all()
    assert len(after) == len(ids) + (expected or 0)


def test_what_is_no_file(tiny_esm2, store, tmp_path):
    options = {"backbone": str(tiny_esm2.fair_esm), "accelerator": "cpu"}
    (tmp_path / "folder.fasta").mkdir()
    (tmp_path / "dangling.fasta").symlink_to(tmp_path / "nothing")
    for name in ("folder.fasta", "dangling.fasta", "missing.fasta"):
        with pytest.raises(InputError, match=f"Expected a FASTA file at .*{name}"):
            embed(tmp_path / name, store, **options)
    if os.geteuid():  # root may read everything
        (tmp_path / "secret.fasta").write_bytes(GOOD)
        (tmp_path / "secret.fasta").chmod(0)
        with pytest.raises(InputError, match="readable"):
            embed(tmp_path / "secret.fasta", store, **options)


def test_a_store_path_that_cannot_be(tiny_esm2, tmp_path):
    fasta = tmp_path / "in.fasta"
    fasta.write_bytes(GOOD)
    for store in (fasta, fasta / "below", Path("/proc/nowhere/store")):
        with pytest.raises(InputError, match="Expected a folder that can be written"):
            embed(fasta, store, backbone=str(tiny_esm2.fair_esm), accelerator="cpu")
