"""The problem without labels: a protein and its perturbed copy are to find each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from distil_rank.codes.augment import Copies, embed_copies
from distil_rank.codes.fit import copy_noise
from distil_rank.codes.sources import EVALUATION_COPIES, MOST_CLUSTERED
from distil_rank.data.mmseqs import CLUSTER_CACHE, mmseqs_binary, mmseqs_clusters
from distil_rank.errors import InputError
from distil_rank.evaluation.groups import make_groups
from distil_rank.evaluation.retrieval import Relevance
from distil_rank.evaluation.task import Target
from distil_rank.options.codes import AugmentationOptions
from distil_rank.recommendation.parts import CONFIRM, FIT, VALIDATE, split_parts
from distil_rank.recommendation.problem import Problem, Task, Vectors

COPY_TASK = "perturbed copies"
NOTE = (
    "No labels: a protein and its perturbed copy are to find each other among the judged proteins. Copies share their "
    "composition, which early layers see best: layers before the middle are left out."
)


def copy_problem(
    vectors: Vectors, groups: str | None, seed: int, folder: Path, augmentation: AugmentationOptions
) -> Problem:
    """Set groups apart, embed copies of the fit side for the noise and of the judged sides for the task.

    Args:
        vectors: of the proteins, with their sequences.
        groups: see `make_groups`; MMseqs2 clusters, or those given with the data, by default.
        seed: of all draws.
        folder: for embedded copies.
        augmentation: how copies for the noise are perturbed.

    Raises:
        InputError: no sequences, or too few groups.
    """
    if vectors.proteins.sequences is None:
        raise InputError(
            f"Expected labels, or sequences whose perturbed copies are to be found, in {vectors.source} but it has "
            "neither; give --labels.source, a CSV, TSV, FASTA or .npz file."
        )
    group, described = _groups(vectors, groups, seed)
    part = split_parts(group, seed=seed)
    deep = list(vectors.layers)[(len(vectors.layers) - 1) // 2 :]
    vectors = replace(
        vectors,
        layers={name: vectors.layers[name] for name in deep},
        about={name: vectors.about[name] for name in deep},
    )
    copying = _Copying(vectors, part, seed, folder / "copies")
    fit_copies = copying.embed([FIT], augmentation)
    once = replace(augmentation, proteins=EVALUATION_COPIES, copies=1, seed=augmentation.seed + 1)
    judged = copying.embed([VALIDATE, CONFIRM], once)
    owner = next(iter(judged.values())).owner
    everybody = np.concatenate([np.arange(len(group)), owner])
    rows = np.flatnonzero(part[everybody] != FIT)
    target = Target("retrieval", Relevance(everybody[rows][None], ("protein",)), levels=(tuple(map(str, rows)),))

    def noise(layer: str | None, fit: np.ndarray) -> Tensor:
        mine = fit[fit_copies[layer].owner]
        return copy_noise(vectors.layers[layer], fit_copies[layer].x[mine], fit_copies[layer].owner[mine])

    sequences = vectors.proteins.sequences or []
    return Problem(
        source=vectors.source,
        layers={name: np.concatenate([x, judged[name].x]) for name, x in vectors.layers.items()},
        group=group[everybody],
        part=part[everybody],
        tasks=(Task(COPY_TASK, target, rows),),
        about=vectors.about,
        sequences=[*sequences, *[sequences[row] for row in owner]],
        noise=noise,
        noise_source=f"perturbed copies of {len(np.unique(next(iter(fit_copies.values())).owner)):,} proteins",
        groups=described,
        notes=(NOTE,),
    )


def _groups(vectors: Vectors, groups: str | None, seed: int) -> tuple[np.ndarray, str]:
    """The group of each protein, and how groups were made."""
    proteins, count = vectors.proteins, len(vectors.proteins.ids)
    assert proteins.sequences is not None
    names: Sequence[str]
    if groups is not None:
        identity = Target("retrieval", Relevance(np.arange(count)[None], ("protein",)), levels=(tuple(proteins.ids),))
        sides = make_groups(groups, identity, proteins.ids, proteins.sequences, proteins.clusters, None, 0.5, seed)
        return sides.number, groups
    if proteins.clusters is not None:
        names, described = proteins.clusters, "clusters"
    elif mmseqs_binary() and count <= MOST_CLUSTERED:
        names, described = mmseqs_clusters(proteins.sequences, proteins.ids, cache=CLUSTER_CACHE), "MMseqs2 clusters"
    else:
        names, described = proteins.sequences, "equal sequences"
    return np.unique(names, return_inverse=True)[1], described


@dataclass(frozen=True)
class _Copying:
    """Embeds perturbed copies of some parts' proteins with the backbone of the vectors."""

    vectors: Vectors
    part: np.ndarray
    seed: int
    folder: Path

    def embed(self, parts: Sequence[int], how: AugmentationOptions) -> dict[str | None, Copies]:
        """Copies of proteins drawn from each part, by layer."""
        draws = [
            np.random.default_rng([self.seed, part]).permutation(np.flatnonzero(self.part == part)) for part in parts
        ]
        chosen = np.sort(np.concatenate([draw[: how.proteins] for draw in draws]))
        about = list(self.vectors.about.values())
        copies = embed_copies(self.vectors.proteins.sequences or [], chosen, how, about, self.folder)
        return dict(zip(self.vectors.layers, copies, strict=True))
