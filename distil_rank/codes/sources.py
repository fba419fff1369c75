"""The proteins that an encoder is fitted to and evaluated on, and where the noise of its metric comes from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distil_rank.codes.augment import Copies, embed_copies
from distil_rank.codes.fit import copy_noise, group_noise
from distil_rank.data.files import load_matrix
from distil_rank.data.mmseqs import CLUSTER_CACHE, mmseqs_clusters
from distil_rank.errors import InputError
from distil_rank.evaluation.groups import Groups
from distil_rank.evaluation.labelled import (
    OWN_LABELS,
    UNLABELLED,
    LabelledData,
    labelled_source,
    open_labelled,
    unlabelled,
)
from distil_rank.evaluation.retrieval import Relevance
from distil_rank.evaluation.task import Target
from distil_rank.options.codes import AugmentationOptions, CodeOptions, NoiseSource
from distil_rank.options.evaluation import LabelOptions
from distil_rank.origin import VectorOrigin

log = logging.getLogger(__name__)

EVALUATION_COPIES = 300  # of proteins that nothing was fitted on


def origin_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """What an encoder tells of the vectors it is for, out of what is known of them."""
    more = {key: about[key] for key in ("source", "digest") if about.get(key) is not None}
    return {**VectorOrigin.of(about).facts(), **more}


def open_proteins(options: CodeOptions) -> LabelledData:
    """Read vectors, with labels where there are any, and set groups apart; without, `labels` is `UNLABELLED`."""
    labels, draw = options.labels, (options.fit_fraction, options.seed)
    source = labelled_source(options.data, labels)
    if labels != LabelOptions() or (Path(source) / OWN_LABELS).is_file():
        return open_labelled(options.data, labels, options.task, options.groups, *draw)
    return unlabelled(source, load_matrix(source), options.groups, *draw)


def copies_of(proteins: LabelledData, fit: bool, how: AugmentationOptions, folder: Path) -> Copies:
    """Augmented copies of proteins that may be fitted on, or else of `EVALUATION_COPIES` of the others, one each."""
    vectors = proteins.embeddings
    if vectors.sequences is None:
        raise InputError(
            f"Expected sequences in {proteins.source} to make augmented copies of but it has none; give a store made "
            "by embed, or another source of noise (--noise labels or clusters), or --metric whitened."
        )
    split = np.flatnonzero(proteins.groups.fit == fit)
    how = how if fit else replace(how, proteins=EVALUATION_COPIES, copies=1, seed=how.seed + 1)
    chosen = np.sort(np.random.default_rng(how.seed).permutation(split)[: how.proteins])
    if fit and how.copies * len(chosen) < vectors.x.shape[1]:
        log.warning(
            "FEW COPIES: %s of %s proteins for %s dimensions; the result depends strongly on --regularisation",
            *(f"{number:,}" for number in (how.copies * len(chosen), len(chosen), vectors.x.shape[1])),
        )
    [copies] = embed_copies(vectors.sequences, chosen, how, [vectors.provenance], folder)
    return copies


def copy_task(x: np.ndarray, groups: Groups, copies: Copies) -> tuple[np.ndarray, Target, Groups]:
    """The task without labels: a protein and its augmented copy are to find each other among all evaluated proteins.

    Returns:
        Vectors with the copies behind the proteins, `(N + C, d)`, and the task on them.
    """
    owner = np.concatenate([np.arange(len(x)), copies.owner])
    target = Target("retrieval", Relevance(owner[None], ("protein",)), levels=(tuple(map(str, owner)),))
    fit = np.concatenate([groups.fit, np.zeros(len(copies.x), bool)])
    return np.concatenate([x, copies.x]), target, Groups(groups.number[owner], fit, groups.description)


def noise_of(proteins: LabelledData, source: NoiseSource, how: AugmentationOptions, folder: Path) -> tuple[Tensor, str]:
    """The noise covariance of the proteins that may be fitted on, and in words what it was taken from."""
    vectors, fit = proteins.embeddings, proteins.groups.fit
    if source == "copies":
        copies = copies_of(proteins, True, how, folder)
        words = f"{len(copies.x):,} augmented copies of {len(np.unique(copies.owner)):,} proteins"
        return copy_noise(vectors.x, copies.x, copies.owner), words
    if source == "labels":
        if proteins.labels == UNLABELLED or proteins.target.relevance is None:
            raise InputError(
                "Expected labels of a retrieval task for --noise labels but got none; give --labels.source."
            )
        relevance = proteins.target.relevance
        return group_noise(vectors.x, fit, relevance.levels[0]), f"labels: each {relevance.names[0]}"
    clusters = vectors.clusters
    if clusters is None:
        if vectors.sequences is None:
            raise InputError(
                f"Expected clusters or sequences in {proteins.source} for --noise clusters but got neither."
            )
        clusters = mmseqs_clusters(vectors.sequences, vectors.ids, cache=CLUSTER_CACHE)
    number = np.unique(clusters, return_inverse=True)[1]
    return group_noise(vectors.x, fit, number), "clusters of the sequences"
