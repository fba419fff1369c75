"""The proteins that a code map is fitted to and judged on, and where the noise of its metric comes from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from distil_rank.codes.augment import Augmentation
from distil_rank.codes.copies import Copies, embed_copies
from distil_rank.codes.fit import copy_noise, group_noise
from distil_rank.data.files import Embeddings, load_matrix
from distil_rank.data.mmseqs import CLUSTER_CACHE, mmseqs_binary, mmseqs_clusters
from distil_rank.errors import InputError
from distil_rank.evaluation.groups import Groups, make_groups
from distil_rank.evaluation.labelled import OWN_LABELS, labelled_source, open_labelled
from distil_rank.evaluation.retrieval import Relevance
from distil_rank.evaluation.task import Kind, Target
from distil_rank.options.evaluation import LabelOptions

log = logging.getLogger(__name__)

NoiseSource = Literal["copies", "labels", "clusters"]
MOST_CLUSTERED = 20_000  # proteins that are set apart by MMseqs2 clusters where nobody asked for them
JUDGED_COPIES = 300  # of proteins that nothing was fitted on
BELONGING = ("backbone", "weights_sha256", "layer", "pooling", "precision", "long", "max_length", "fallback")
ORIGINS = (*BELONGING, "source", "digest")


@dataclass(frozen=True)
class Proteins:
    """Vectors, and how they are set apart.

    Attributes:
        source: where they come from.
        embeddings: one row for each protein.
        groups: fit and judged groups.
        target: of the labelled task; None without labels.
        labels: where the labels come from.
        notes: what a reader must know.
    """

    source: str
    embeddings: Embeddings
    groups: Groups
    target: Target | None
    labels: str
    notes: tuple[str, ...] = ()

    @property
    def origin(self) -> dict[str, object]:
        """What a code map tells of the vectors it is for."""
        return origin_of(self.embeddings.provenance)


def origin_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a code map tells of the vectors it is for, out of what is known of them."""
    return {key: about[key] for key in ORIGINS if about.get(key) is not None}


def open_proteins(
    data: str, labels: LabelOptions, task: Kind | Literal["auto"], groups: str | None, fit_fraction: float, seed: int
) -> Proteins:
    """Read vectors, with labels where there are any, and set groups apart.

    Raises:
        InputError: they cannot be read, or make no task.
    """
    source = labelled_source(data, labels)
    if labels != LabelOptions() or (Path(source) / OWN_LABELS).is_file():
        opened = open_labelled(data, labels, task, groups, fit_fraction, seed)
        return Proteins(opened.source, opened.embeddings, opened.groups, opened.target, opened.labels, opened.notes)
    found = load_matrix(source)
    names = tuple(found.ids)
    target = Target("retrieval", Relevance(np.arange(len(names))[None], ("protein",)), levels=(names,))
    if groups is None and found.clusters is not None:
        groups = "clusters"
    elif groups is None and found.sequences is not None and mmseqs_binary() and len(names) <= MOST_CLUSTERED:
        groups = "mmseqs"
    sides = make_groups(groups, target, names, found.sequences, found.clusters, None, fit_fraction, seed)
    notes = (f"NOTE: {found.provenance['fallback']}",) if found.provenance.get("fallback") else ()
    return Proteins(source, found, sides, None, "perturbed copies", notes)


def copies_of(proteins: Proteins, judged: bool, how: Augmentation, folder: Path) -> Copies:
    """Perturbed copies of proteins on one side.

    Args:
        proteins: all of them.
        judged: whether of the judged side, one copy each, or of the fit side.
        how: rates; `proteins` of them at most.
        folder: where stores of copies are kept.

    Raises:
        InputError: no sequences, or no backbone to embed the copies with.
    """
    found = proteins.embeddings
    if found.sequences is None:
        raise InputError(
            f"Expected sequences in {proteins.source} to perturb but it has none; give a store made by embed, or "
            "another source of noise (--noise labels or clusters), or --metric whitened."
        )
    side = np.flatnonzero(~proteins.groups.fit if judged else proteins.groups.fit)
    how = replace(how, proteins=JUDGED_COPIES, copies=1, seed=how.seed + 1) if judged else how
    chosen = np.sort(np.random.default_rng(how.seed).permutation(side)[: how.proteins])
    if not judged and how.copies * len(chosen) < found.x.shape[1]:
        log.warning(
            "FEW COPIES: %s of %s proteins for %s dimensions; the result depends strongly on --regularisation",
            *(f"{number:,}" for number in (how.copies * len(chosen), len(chosen), found.x.shape[1])),
        )
    return embed_copies(found.sequences, chosen, how, found.provenance, folder)


def noise_of(proteins: Proteins, source: NoiseSource, how: Augmentation, folder: Path) -> tuple[Tensor, str]:
    """The noise covariance of the fit side, and in words what it was taken from.

    Raises:
        InputError: labels, clusters or copies cannot be had.
    """
    found, fit = proteins.embeddings, proteins.groups.fit
    if source == "copies":
        copies = copies_of(proteins, False, how, folder)
        words = f"{len(copies.x):,} perturbed copies of {len(np.unique(copies.owner)):,} proteins"
        return copy_noise(found.x, copies.x, copies.owner), words
    if source == "labels":
        if proteins.target is None or proteins.target.relevance is None:
            raise InputError(
                "Expected labels of a retrieval task for --noise labels but got none; give --labels.source."
            )
        relevance = proteins.target.relevance
        return group_noise(found.x, fit, relevance.levels[0]), f"labels: each {relevance.names[0]}"
    clusters = found.clusters
    if clusters is None:
        if found.sequences is None:
            raise InputError(
                f"Expected clusters or sequences in {proteins.source} for --noise clusters but got neither."
            )
        clusters = mmseqs_clusters(found.sequences, found.ids, cache=CLUSTER_CACHE)
    number = np.unique(clusters, return_inverse=True)[1]
    return group_noise(found.x, fit, number), "clusters of the sequences"
