"""What a recommendation is made for: the vectors of several layers, the tasks, and which proteins do what.

With labels every labelled task is to be retained. Without, a protein and its augmented copy are to find each other.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distil_rank.codes.augment import Copies, embed_copies
from distil_rank.codes.fit import EVALUATION_COPIES, copy_noise, group_noise
from distil_rank.data.files import LABELLED, Embeddings, find_source, layer_names
from distil_rank.data.labels import read_labels
from distil_rank.data.split import join_groups, split_groups
from distil_rank.embedding.sequences import read_proteins
from distil_rank.errors import InputError
from distil_rank.evaluation.labelled import (
    UNLABELLED,
    LabelledData,
    label,
    load_vectors,
    own_labels,
    unlabelled,
)
from distil_rank.evaluation.retrieval import Relevance
from distil_rank.evaluation.task import Target
from distil_rank.options.codes import AugmentationOptions, CodeMetric
from distil_rank.options.evaluation import LabelOptions, TaskKind

FIT, VALIDATE, CONFIRM = range(3)
SHARES = (0.5, 0.25, 0.25)  # of the proteins that go to each
LEAST = 10  # groups in each: an interval over fewer says nothing
LARGE = 10  # a class gets at most this share of a subset, or, where there are fewer classes, as much as others
COPIES_NOTE = (
    "NO LABELS: a protein and its augmented copy are to find each other, which composition alone can do: what is "
    "retained of that tells little of your own task; give labels. Early layers, which see composition best, are left "
    "out: those before the middle."
)
Noise = Callable[[str | None, np.ndarray], Tensor]  # layer, rows to fit on (N,) bool -> (d, d)


@dataclass(frozen=True)
class Task:
    """One task: the name of its labels, and the labels of `rows` of the vectors, `(n,)`, as numbers."""

    name: str
    target: Target
    rows: np.ndarray


@dataclass(frozen=True)
class Problem:
    """Everything that pipelines are fitted, compared and confirmed on."""

    source: str
    layers: Mapping[str | None, np.ndarray]  # (N, d) each in order of depth; the last one is the full vector
    about: Mapping[str | None, Mapping[str, Any]]  # provenance of each layer's vectors
    group: np.ndarray  # of each row, (N,): no group is in two splits
    split: np.ndarray  # of each row, (N,): FIT, VALIDATE or CONFIRM; -1 for rows without a label
    tasks: tuple[Task, ...]
    groups: str  # how groups were made, in words
    sequences: Sequence[str] | None = None  # of the rows
    noise: Noise | None = None  # for the invariant metric; None without a source
    noise_source: str = "none"
    notes: tuple[str, ...] = ()

    @property
    def last(self) -> str | None:
        """The layer whose vectors everybody uses."""
        return list(self.layers)[-1]

    @property
    def searched(self) -> bool:
        """Whether vectors are stored to be searched, for some task; else time is all that they cost."""
        return any(task.target.kind == "retrieval" for task in self.tasks)

    @property
    def metrics(self) -> tuple[CodeMetric, ...]:
        """Metrics of encoders that can be fitted here."""
        return ("variance", "whitened") if self.noise is None else ("variance", "whitened", "invariant")


def open_problem(
    data: str,
    labels: LabelOptions,
    kind: TaskKind = "auto",
    groups: str | None = None,
    seed: int = 0,
    folder: Path = Path("results"),
) -> Problem:
    """Read vectors of all layers and labels, and set groups apart that no task cuts in two.

    Several tables of labels, separated by commas, are several tasks. Without any, and without labels in the data, the
    task is to find proteins by their augmented copies, which are embedded into `folder`.

    Raises:
        InputError: nothing to read, no task, or too few groups.
    """
    source = find_source(data, LABELLED)
    layers: dict[str | None, Embeddings] = {name: load_vectors(f"{source}:{name}") for name in layer_names(source)}
    if not layers:
        one = load_vectors(source)
        layer = one.provenance.get("layer")
        layers = {None if layer is None else str(layer): one}
    proteins = list(layers.values())[-1]

    several = labels.source is not None and not Path(labels.source).is_file()
    names = str(labels.source).split(",") if several else [labels.source]
    every = [replace(labels, source=name and name.strip()) for name in names]
    tables = [(one, own_labels(source, proteins, one) if one.source is None else read_labels(one)) for one in every]
    tasks = [label(source, proteins, table, one, kind, groups, 0.5, seed) for one, table in tables if table is not None]
    if not tasks:
        return _copy_problem(source, layers, groups, seed, folder / "copies")

    groupings = np.full((len(tasks), len(proteins.ids)), None, dtype=object)
    for grouping, task in zip(groupings, tasks, strict=True):
        grouping[task.rows] = task.groups.number
    group = join_groups(groupings.tolist())
    labelled = np.isin(np.arange(len(group)), np.concatenate([task.rows for task in tasks]))
    split = np.full(len(group), -1)
    split[labelled] = split_groups(group[labelled], SHARES, seed, least=LEAST)
    vectors = {name: one.x for name, one in layers.items()}
    noise, noise_source = _label_noise(vectors, split, tasks)
    words = dict.fromkeys(task.groups.description.partition(":")[0] for task in tasks)
    return Problem(
        source=source,
        layers=vectors,
        about={name: one.provenance for name, one in layers.items()},
        group=group,
        split=split,
        tasks=tuple(Task(task.labels, task.target, task.rows) for task in tasks),
        groups=" and ".join(words) + (", joined where they overlap" if len(tasks) > 1 else ""),
        sequences=proteins.sequences,
        noise=noise,
        noise_source=noise_source,
        notes=tuple(dict.fromkeys(note for task in tasks for note in task.notes)),
    )


def _label_noise(
    layers: Mapping[str | None, np.ndarray], split: np.ndarray, tasks: Sequence[LabelledData]
) -> tuple[Noise | None, str]:
    """The covariance within the classes of the first task that has classes with several proteins to fit on."""
    for task in tasks:
        if task.target.relevance is not None:
            classes, level = task.target.relevance.levels[0], task.target.relevance.names[0]
        elif task.target.kind == "classification" and task.target.y is not None:
            classes, level = task.target.y, "class"
        else:
            continue
        group = np.full(len(split), -1)
        group[task.rows] = classes
        fitted = group[(split == FIT) & (group >= 0)]
        if len(fitted) and np.bincount(fitted).max() > 1:
            words = f"labels of the proteins to fit on: each {level}"
            return lambda layer, fit, group=group: group_noise(layers[layer], fit, group), words
    return None, "none"


def _copy_problem(
    source: str, layers: Mapping[str | None, Embeddings], groups: str | None, seed: int, folder: Path
) -> Problem:
    """The problem without labels: copies of the proteins to fit on for the noise, and of the others for the task."""
    deep = dict(list(layers.items())[(len(layers) - 1) // 2 :])
    proteins = list(layers.values())[-1]
    sequences = proteins.sequences
    if sequences is None:
        raise InputError(
            f"Expected labels, or sequences whose augmented copies are to be found, in {source} but it has neither; "
            "give --labels.source, a CSV, TSV, FASTA or .npz file."
        )
    whole = unlabelled(source, proteins, groups, 0.5, seed)
    split = split_groups(whole.groups.number, SHARES, seed, least=LEAST)

    def copies_of(splits: Sequence[int], how: AugmentationOptions) -> dict[str | None, Copies]:
        draws = [np.random.default_rng([seed, one]).permutation(np.flatnonzero(split == one)) for one in splits]
        chosen = np.sort(np.concatenate([draw[: how.proteins] for draw in draws]))
        about = [one.provenance for one in deep.values()]
        return dict(zip(deep, embed_copies(sequences, chosen, how, about, folder), strict=True))

    fitted = copies_of([FIT], AugmentationOptions())
    sought = copies_of([VALIDATE, CONFIRM], AugmentationOptions(proteins=EVALUATION_COPIES, copies=1, seed=1))
    owner = next(iter(sought.values())).owner
    everybody = np.concatenate([np.arange(len(split)), owner])
    rows = np.flatnonzero(split[everybody] != FIT)
    target = Target("retrieval", Relevance(everybody[rows][None], ("protein",)), levels=(tuple(map(str, rows)),))

    def noise(layer: str | None, fit: np.ndarray) -> Tensor:
        copies = fitted[layer]
        inside = fit[copies.owner]
        return copy_noise(deep[layer].x, copies.x[inside], copies.owner[inside])

    return Problem(
        source=source,
        layers={name: np.concatenate([one.x, sought[name].x]) for name, one in deep.items()},
        about={name: one.provenance for name, one in deep.items()},
        group=whole.groups.number[everybody],
        split=split[everybody],
        tasks=(Task(UNLABELLED, target, rows),),
        groups=whole.groups.description.partition(":")[0],
        sequences=[sequences[row] for row in everybody],
        noise=noise,
        noise_source=f"augmented copies of {len(np.unique(next(iter(fitted.values())).owner)):,} proteins",
        notes=(COPIES_NOTE, *whole.notes),
    )


def subset_of(fasta: str, labels: LabelOptions, proteins: int, seed: int, folder: Path) -> tuple[str, str | None]:
    """The file itself where it has no more than `proteins`, else a file in `folder` of some, and a note that says so.

    With labels these are whole classes, so that there is something to find, and a part of classes too large for that.
    """
    everything, _ = read_proteins(fasta)
    if len(everything) <= proteins:
        return fasta, None
    dice = np.random.default_rng(seed)
    chosen = dice.permutation(len(everything))
    if labels.source is not None:
        first = labels.source if Path(labels.source).is_file() else labels.source.split(",")[0]
        table = read_labels(replace(labels, source=first)).labels
        members: dict[str, list[int]] = {}
        for row in chosen:
            if everything[row].id in table:
                members.setdefault(table[everything[row].id], []).append(row)
        if not members:
            raise InputError(f"Expected labels of the proteins in the FASTA file but {first} has none of them.")
        most = max(proteins // len(members), proteins // LARGE, 1)
        chosen = np.concatenate([members[name][:most] for name in dice.permutation(sorted(members))])
    chosen = np.sort(chosen[:proteins])
    text = "".join(f">{everything[row].id}\n{everything[row].sequence}\n" for row in chosen)
    path = folder / f"subset-{hashlib.sha256(text.encode()).hexdigest()[:12]}.fasta"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    how = "classes at random, the largest in part" if labels.source is not None else "at random"
    return str(path), f"FEWER PROTEINS: {len(chosen):,} of {len(everything):,}, {how} (--proteins takes more)"
