"""One metric fitted once: nested directions, from which an encoder of any rank and type follows.

The noise of the metric comes from augmented copies or labels of the proteins that may be fitted on.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distil_rank.codes.augment import Copies, embed_copies
from distil_rank.data.files import LABELLED, OWN_LABELS, find_source, load_matrix
from distil_rank.errors import InputError, check_range
from distil_rank.evaluation.labelled import UNLABELLED, LabelledData, open_labelled, unlabelled
from distil_rank.evaluation.retrieval import Relevance
from distil_rank.evaluation.task import Groups, Target
from distil_rank.lowrank.encoder import CodeEncoder, CodeType, int8_scale
from distil_rank.lowrank.moments import Moments, MomentSums
from distil_rank.lowrank.solvers import Directions, noise_directions
from distil_rank.options.codes import AugmentationOptions, CodeMetric, CodeOptions, NoiseSource
from distil_rank.options.evaluation import LabelOptions
from distil_rank.origin import vector_origin

log = logging.getLogger(__name__)

REGULARISATION = 0.1  # of N, in units of its mean eigenvalue
GAIN = 0.25  # see `FittedMetric.encoder`
BLOCK_ROWS = 16_384  # of a pass over a matrix that may be memory-mapped
RETAINED_ROWS = 20_000  # of the fit rows, for the scales of int8
EVALUATION_COPIES = 300  # of proteins that nothing was fitted on


@dataclass(frozen=True)
class FittedMetric:
    """What one metric makes of some proteins: directions, best first, and a `sample` `(n, d)` of the rows fitted on."""

    metric: CodeMetric
    mean: Tensor
    directions: Directions
    sample: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    def encoder(self, rank: int, dtype: CodeType = "float32") -> CodeEncoder:
        """The encoder of one rank, in [1, d], and type of code: each direction at a variance of `λ^(2 gain)`.

        At a gain of ½ the noise has the same variance in every direction, at 0 the signal has. For `variance` and
        `whitened` it is ½: their directions are scaled as they should be.
        """
        check_range("`rank`", rank, 1, len(self.mean))
        values, V = self.directions.values[:rank], self.directions.V[:, :rank]
        gain = GAIN if self.metric == "invariant" else 0.5
        floor = values[0] * torch.finfo(torch.float32).eps
        weight, mean = (V * values.clamp_min(floor) ** (gain - 0.5)).T.float(), self.mean.float()
        scale = torch.full((rank,), rank**-0.5) if dtype == "bit" else None
        if dtype == "int8":
            scale = int8_scale(CodeEncoder.of(mean, weight)(self.sample))
        encoder = CodeEncoder.of(mean, weight, dtype, scale)
        encoder.provenance = {**self.provenance, "eigenvalues": self.directions.values[:rank].tolist()}
        return encoder


def fit_metric(
    x: np.ndarray,
    fit: np.ndarray,
    metric: CodeMetric = "invariant",
    noise: Tensor | None = None,
    regularisation: float = REGULARISATION,
    seed: int = 0,
    provenance: dict[str, Any] | None = None,
) -> FittedMetric:
    """Fit the directions of one metric, in one pass over the rows.

    Args:
        x: vectors `(N, d)` float32; may be memory-mapped.
        fit: which rows to fit on, `(N,)` bool.
        metric: what varies most in units of N. `variance`: of the identity, principal components; `whitened`: of the
            vectors' own covariance, the same at equal variance; `invariant`: of `noise`, within-class whitening.
        noise: covariance of what should not matter, `(d, d)`, for `invariant`.
        regularisation: of N, in units of its mean eigenvalue; `variance` has none, `whitened` needs some.
        seed: of the choice of rows that `FittedMetric.sample` keeps.
        provenance: of the vectors, to be passed on to the encoders.
    """
    rows = np.flatnonzero(fit)
    if len(rows) < 2:
        raise InputError(f"Expected at least 2 proteins to fit on but got {len(rows)}.")
    starts = range(0, len(rows), BLOCK_ROWS)
    moments = Moments.of(torch.from_numpy(np.asarray(x[rows[start : start + BLOCK_ROWS]])) for start in starts)
    S, about = moments.covariance, {**(provenance or {}), "metric": metric, "rows": len(rows)}
    if not S.diagonal().sum() > 0:
        raise InputError("Expected vectors that vary but all are the same; give other proteins.")
    if metric == "variance":
        directions = noise_directions(S, torch.eye(len(S)))
    else:
        N = S if metric == "whitened" else noise
        if N is None or N.shape != S.shape:
            shape = "none" if N is None else f"one of {tuple(N.shape)}"
            raise InputError(f"Expected a noise covariance of {tuple(S.shape)} but got {shape}.")
        directions = noise_directions(S, N, regularisation)
        about["regularisation"] = regularisation
    chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:RETAINED_ROWS])
    return FittedMetric(metric, moments.mean, directions, torch.from_numpy(np.asarray(x[chosen])), about)


def group_noise(x: np.ndarray, fit: np.ndarray, group: np.ndarray) -> Tensor:
    """What varies within groups of the rows to use, `(d, d)` float64; rows whose group is negative have none.

    With rows `x_i` of group g and their mean `m_g` it is `Σ_g Σ_i (x_i − m_g)(x_i − m_g)ᵀ / Σ_g (n_g − 1)`, summed up
    over some thousands of rows at a time.
    """
    rows = np.flatnonzero(fit & (group >= 0))
    rows = rows[np.argsort(group[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(group[rows], prepend=-1))  # of each group in `rows`
    blocks_start = starts[np.unique(np.searchsorted(starts, np.arange(0, len(rows), BLOCK_ROWS), "right") - 1)]
    sums, freedom = MomentSums.zeros(x.shape[1]), 0
    for part in np.split(rows, blocks_start[1:]):
        block = np.asarray(x[part], dtype=np.float64)
        _, first, member, counts = np.unique(group[part], True, True, True)
        means = np.add.reduceat(block, first) / counts[:, None]
        sums.add(torch.from_numpy(block - means[member]))
        freedom += len(part) - len(counts)
    if not freedom:
        raise InputError("Expected groups with at least two proteins to fit on but each protein is alone in its own.")
    return (sums.outer + sums.outer.T) / (2 * freedom)


def copy_noise(originals: np.ndarray, copies: np.ndarray, owner: np.ndarray) -> Tensor:
    """What varies between proteins `(P, d)` and their copies `(C, d)`, each of the protein `owner`: `(d, d)`."""
    used = np.unique(owner)
    group = np.concatenate([used, owner])
    return group_noise(np.concatenate([originals[used], copies]), np.ones(len(group), bool), group)


def origin_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """What an encoder tells of the vectors it is for, out of what is known of them."""
    more = {key: about[key] for key in ("source", "digest") if about.get(key) is not None}
    return {**vector_origin(about), **more}


def open_proteins(options: CodeOptions) -> LabelledData:
    """Read vectors, with labels where there are any, and set groups apart; without, `labels` is `UNLABELLED`."""
    labels, draw = options.labels, (options.fit_fraction, options.seed)
    source = find_source(options.data, LABELLED)
    if labels != LabelOptions() or (Path(source) / OWN_LABELS).is_file():
        return open_labelled(source, labels, options.task, options.groups, *draw)
    return unlabelled(source, load_matrix(source), options.groups, *draw)


def copies_of(proteins: LabelledData, fit: bool, how: AugmentationOptions, folder: Path) -> Copies:
    """Augmented copies of proteins that may be fitted on, or else of `EVALUATION_COPIES` of the others, one each."""
    vectors = proteins.embeddings
    if vectors.sequences is None:
        raise InputError(
            f"Expected sequences in {proteins.source} to make augmented copies of but it has none; give a store made "
            "by embed, or another source of noise (--noise labels), or --metric whitened."
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
    relevance = proteins.target.relevance
    if proteins.labels == UNLABELLED or relevance is None:
        raise InputError("Expected labels of a retrieval task for --noise labels but got none; give --labels.source.")
    return group_noise(vectors.x, fit, relevance.levels[0]), f"labels: each {relevance.names[0]}"
