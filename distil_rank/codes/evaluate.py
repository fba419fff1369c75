"""Code maps on a task: the labelled one, or, without labels, finding a protein by its perturbed copy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from distil_rank.codes.copies import Copies
from distil_rank.evaluation.groups import Groups
from distil_rank.evaluation.representations import Candidate, module_output
from distil_rank.evaluation.retrieval import Relevance
from distil_rank.evaluation.task import Target
from distil_rank.lowrank.encoder import CodeEncoder

LEVEL = "protein"  # at which a copy and its original agree


def code_candidate(name: str, encoder: CodeEncoder, x: np.ndarray) -> Candidate:
    """A code map that was fitted on the fit groups of the very task; float queries against decoded targets."""
    made = module_output(name, encoder.eval(), x, encoder.bytes_per_protein, None)
    return replace(made, note=None)


def copy_task(x: np.ndarray, groups: Groups, copies: Copies) -> tuple[np.ndarray, Target, Groups]:
    """The task that needs no label: a protein and its perturbed copy are to find each other among all judged proteins.

    Args:
        x: vectors of all proteins, `(N, d)`.
        groups: of the proteins.
        copies: of judged proteins.

    Returns:
        Vectors with the copies behind the proteins, `(N + C, d)`, and the task on them.
    """
    owner = np.concatenate([np.arange(len(x)), copies.owner])
    names = tuple(str(number) for number in owner)
    target = Target("retrieval", Relevance(owner[None], (LEVEL,)), levels=(names,))
    fit = np.concatenate([groups.fit, np.zeros(len(copies.x), bool)])
    return np.concatenate([x, copies.x]), target, Groups(groups.number[owner], fit, groups.description)
