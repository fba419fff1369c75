"""What a recommendation is made for: the vectors of several layers, the tasks, and which proteins do what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distil_rank.codes.copies import Copies, embed_copies_by_layer
from distil_rank.codes.fitting import Metric, copy_noise, group_noise
from distil_rank.codes.perturbation import Perturbations
from distil_rank.data.formats import Embeddings, load_matrix
from distil_rank.data.mmseqs import CLUSTER_CACHE, mmseqs_binary, mmseqs_clusters
from distil_rank.embedding.layer_spec import split_source
from distil_rank.embedding.location import is_remote
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.recommendation.parts import CONFIRM, FIT, VALIDATE, joined, split_parts
from distil_rank.tasks.groups import make_groups
from distil_rank.tasks.labelled import check_ids, labelled_source, own_labels, with_clusters
from distil_rank.tasks.labels import LabelSource, read_labels
from distil_rank.tasks.retrieval import Relevance
from distil_rank.tasks.task import Kind, Target, make_target

MOST_CLUSTERED = 20_000  # proteins that are clustered where nobody asked for it
Noise = Callable[[str | None, np.ndarray], Tensor]  # layer, rows to fit on (N,) bool -> (d, d)
COPY_TASK = "perturbed copies"
JUDGED_COPIES = 300  # proteins of each judged side whose copies are searched for


@dataclass(frozen=True)
class Task:
    """One labelled task.

    Attributes:
        name: of its labels.
        target: the labels of `rows` as numbers.
        rows: of the vectors, `(n,)`.
        metric: the score that is to be kept; the task's first by default.
    """

    name: str
    target: Target
    rows: np.ndarray
    metric: str | None = None


@dataclass(frozen=True)
class Problem:
    """Everything that pipelines are fitted, compared and confirmed on.

    Attributes:
        source: of the vectors.
        layers: vectors by layer in order of depth, `(N, d)` each; the last one is the full vector.
        group: of each row, `(N,)` integers: no group is on two sides.
        part: of each row, `(N,)`; see `parts`.
        tasks: what must keep working.
        about: of each layer's vectors: backbone, weights, layer, precision.
        sequences: of the rows.
        noise: makes the noise covariance of a layer from some rows, for the invariant metric; None without a source.
        noise_source: in words.
        groups: how groups were made, in words.
        notes: what a reader must know.
    """

    source: str
    layers: Mapping[str | None, np.ndarray]
    group: np.ndarray
    part: np.ndarray
    tasks: tuple[Task, ...]
    about: Mapping[str | None, Mapping[str, Any]]
    sequences: Sequence[str] | None = None
    noise: Noise | None = None
    noise_source: str = "none"
    groups: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def last(self) -> str | None:
        """The layer whose vectors everybody uses."""
        return list(self.layers)[-1]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Metrics of code maps that can be fitted here."""
        return ("variance", "whitened") if self.noise is None else ("variance", "whitened", "invariant")

    def parted(self, shares: Sequence[float], seed: int) -> Problem:
        """The same with the groups of a labelled task drawn into other parts."""
        used = self.part >= 0
        part = self.part.copy()
        part[used] = split_parts(np.unique(self.group[used], return_inverse=True)[1], shares, seed)
        return replace(self, part=part)


def open_problem(
    data: str,
    labels: LabelSource,
    kind: Kind | str = "auto",
    groups: str | None = None,
    metric: str | None = None,
    seed: int = 0,
    folder: Path = Path("results"),
    perturbations: Perturbations = Perturbations(),  # noqa: B008 - frozen
) -> Problem:
    """Read vectors of all layers and labels, and set groups apart.

    Args:
        data: a store of one or several layers, or any file that distil reads.
        labels: where labels come from; several tables separated by commas are several tasks. Without any, and without
            labels in the data, the task is to find proteins by their perturbed copies.
        kind: of the task.
        groups: see `make_groups`.
        metric: the score that is to be kept.
        seed: of the draw of groups.
        folder: for embedded copies.
        perturbations: how copies are perturbed.

    Raises:
        InputError: nothing to read, no task, or too few groups.
    """
    source = labelled_source(data, labels)
    layers, about, last = _open_layers(source)
    last = with_clusters(last, source)
    check_ids(last.ids, source)
    tasks, groupings, words, notes = [], [], [], []
    for one in _label_sources(labels):
        table = read_labels(one) if one.source is not None else own_labels(source, last, one)
        if table is None:
            break
        rows, texts, told = table.aligned(last.ids)
        target = make_target(texts, one, kind)  # type: ignore[arg-type]
        columns = {
            name: [cells[last.ids[row]] for row in rows]
            for name, cells in table.columns.items()
            if all(last.ids[row] in cells for row in rows)
        }
        chosen = [last.ids[row] for row in rows]
        sequences, clusters = (
            None if column is None else [column[row] for row in rows] for column in (last.sequences, last.clusters)
        )
        sides = make_groups(groups, target, chosen, sequences, clusters, columns, 0.5, seed)
        grouping = np.full(len(last.ids), -1)
        grouping[rows] = sides.number
        groupings.append(grouping)
        words.append(sides.description.partition(":")[0])
        tasks.append(Task(Path(table.source).name, target, rows, metric))
        notes += told
    if last.provenance.get("fallback"):
        notes.append(f"NOTE: {last.provenance['fallback']}")
    if not tasks:
        return _copy_problem(source, layers, about, last, groups, seed, folder, perturbations, notes)
    group = joined(groupings)
    unlabelled = np.all([grouping < 0 for grouping in groupings], axis=0)
    part = np.where(unlabelled, -1, 0)
    part[~unlabelled] = split_parts(np.unique(group[~unlabelled], return_inverse=True)[1], seed=seed)
    noise, noise_source = _label_noise(layers, part, tasks)
    described = " and ".join(dict.fromkeys(words)) + (", joined where they overlap" if len(words) > 1 else "")
    return Problem(
        source, layers, group, part, tuple(tasks), about, last.sequences, noise, noise_source, described, tuple(notes)
    )


def _label_sources(labels: LabelSource) -> list[LabelSource]:
    """One for each table of `a.tsv,b.tsv`."""
    if labels.source is None or Path(labels.source).is_file():
        return [labels]
    return [replace(labels, source=part.strip()) for part in labels.source.split(",")]


def _open_layers(
    source: str,
) -> tuple[dict[str | None, np.ndarray], dict[str | None, Mapping[str, Any]], Embeddings]:
    """Vectors and provenance by layer, and the last layer's data."""
    path, wanted = split_source(source)
    names: list[str | None] = [None]
    if wanted is None and (is_remote(path) or (Path(path) / "manifest.json").is_file()):
        names = [str(layer) for layer in Store.open(path).layers] or [None]
    found = {name: load_matrix(source if name is None else f"{path}:{name}") for name in names}
    last = found[names[-1]]
    if names == [None] and last.provenance.get("layer") is not None:
        found = {str(last.provenance["layer"]): last}
    return {k: one.x for k, one in found.items()}, {k: one.provenance for k, one in found.items()}, last


def _label_noise(
    layers: Mapping[str | None, np.ndarray], part: np.ndarray, tasks: Sequence[Task]
) -> tuple[Noise | None, str]:
    """The covariance within the classes of the first task that has classes with several proteins on the fit side."""
    for task in tasks:
        target = task.target
        if target.relevance is not None:
            classes, level = target.relevance.levels[0], target.relevance.names[0]
        elif target.kind == "classification" and target.y is not None:
            classes, level = target.y, "class"
        else:
            continue
        group = np.full(len(part), -1)
        group[task.rows] = classes
        fitted = group[(part == FIT) & (group >= 0)]
        if len(fitted) and np.bincount(fitted).max() > 1:
            words = f"labels of the fit side: each {level}"
            return lambda layer, fit, group=group: group_noise(layers[layer], fit, group), words
    return None, "none"


def _copy_problem(
    source: str,
    layers: Mapping[str | None, np.ndarray],
    about: Mapping[str | None, Mapping[str, Any]],
    last: Embeddings,
    groups: str | None,
    seed: int,
    folder: Path,
    how: Perturbations,
    notes: Sequence[str],
) -> Problem:
    """Without labels: a protein and its perturbed copy are to find each other."""
    if last.sequences is None:
        raise InputError(
            f"Expected labels, or sequences whose perturbed copies are to be found, in {source} but it has neither; "
            "give --labels.source, a CSV, TSV, FASTA or .npz file."
        )
    count, names = len(last.ids), tuple(last.ids)
    if groups is None and last.clusters is None and mmseqs_binary() and count <= MOST_CLUSTERED:
        clusters: Sequence[str] = mmseqs_clusters(last.sequences, last.ids, cache=CLUSTER_CACHE)
        described = "MMseqs2 clusters"
    elif groups is None:
        clusters, described = last.clusters or last.sequences, "clusters" if last.clusters else "equal sequences"
    else:
        identity = Target("retrieval", Relevance(np.arange(count)[None], ("protein",)), levels=(names,))
        sides = make_groups(groups, identity, names, last.sequences, last.clusters, None, 0.5, seed)
        clusters, described = [str(number) for number in sides.number], groups
    group = np.unique(clusters, return_inverse=True)[1]
    part = split_parts(group, seed=seed)
    deep = list(layers)[(len(layers) - 1) // 2 :]
    layers, about = {name: layers[name] for name in deep}, {name: about[name] for name in deep}
    about_layers, folder = list(about.values()), folder / "copies"

    def copied(sides: Sequence[int], how: Perturbations) -> dict[str | None, Copies]:
        draws = [np.random.default_rng([seed, side]).permutation(np.flatnonzero(part == side)) for side in sides]
        chosen = np.sort(np.concatenate([draw[: how.proteins] for draw in draws]))
        sequences = last.sequences or []
        return dict(zip(layers, embed_copies_by_layer(sequences, chosen, how, about_layers, folder), strict=True))

    fit_copies = copied([FIT], how)
    judged = copied([VALIDATE, CONFIRM], replace(how, proteins=JUDGED_COPIES, copies=1, seed=how.seed + 1))
    owner = next(iter(judged.values())).owner
    everybody = np.concatenate([np.arange(count), owner])
    rows = np.flatnonzero(part[everybody] != FIT)
    target = Target("retrieval", Relevance(everybody[rows][None], ("protein",)), levels=(tuple(map(str, rows)),))

    def noise(layer: str | None, fit: np.ndarray) -> Tensor:
        mine = fit[fit_copies[layer].owner]
        return copy_noise(layers[layer], fit_copies[layer].x[mine], fit_copies[layer].owner[mine])

    sequences = [*last.sequences, *[last.sequences[row] for row in owner]]
    told = [
        "No labels: a protein and its perturbed copy are to find each other among the judged proteins. Copies share "
        "their composition, which early layers see best: layers before the middle are left out."
    ]
    return Problem(
        source,
        {name: np.concatenate([x, judged[name].x]) for name, x in layers.items()},
        group[everybody],
        part[everybody],
        (Task(COPY_TASK, target, rows),),
        about,
        sequences,
        noise,
        f"perturbed copies of {len(np.unique(next(iter(fit_copies.values())).owner)):,} proteins",
        described,
        (*notes, *told),
    )
