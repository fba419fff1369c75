"""How often a recommendation is confirmed, and how often its claim holds: random splits of the groups into four parts.

    python benchmarks/recommendation.py --data STORE --labels.source scope40.fasta.gz --labels.field 2 --proteins 4000

Each split fits on the first part, chooses on the second and claims on the third, as `make recommend` does. The fourth
is not seen by any of these: does each of the three answers retain there what was asked for, and at least what the lower
end of its claim says? The fourth part is as small as the third and as uncertain. Layers count as if they took equal
time: the clock decides nothing here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from script import run, save_markdown
from tqdm import tqdm

from distil_rank.data.split import split_groups
from distil_rank.measure.statistics import LEVEL
from distil_rank.options.evaluation import Answer, LabelOptions
from distil_rank.recommendation.pipelines import Cost, Fitted, grid
from distil_rank.recommendation.problem import CONFIRM, LEAST, VALIDATE, open_problem
from distil_rank.recommendation.search import Evaluator, Outcome, search_pipelines

PARTS = (0.25, 0.25, 0.25, 0.25)
UNSEEN = 3


def main(
    data: str = "data/functions",
    labels: LabelOptions = LabelOptions(),  # noqa: B008 - frozen
    groups: str | None = None,
    keep: float = 0.99,
    proteins: int = 20_000,
    splits: int = 20,
    queries: int = 1000,
) -> None:
    """Every split, then how often each answer was confirmed and held.

    Args:
        data: Store of one or several layers.
        labels: Where labels come from.
        groups: What stays in one split.
        keep: Share of the full vector's score that must be retained.
        proteins: At most, in whole groups drawn at random.
        splits: How many.
        queries: Searched with when pipelines are compared.
    """
    problem = open_problem(data, labels, groups=groups)
    order = np.random.default_rng(0).permutation(np.unique(problem.group))
    enough = order[np.bincount(problem.group)[order].cumsum() <= proteins]
    labelled, depth = (problem.split >= 0) & np.isin(problem.group, enough), len(problem.layers)
    costs = {layer: Cost(layer, number / depth, 0.0) for number, layer in enumerate(problem.layers, 1)}
    rows: dict[Answer, list[tuple[Outcome, Outcome, Outcome]]] = {}
    for seed in tqdm(range(splits), desc="splits", disable=None):
        split = np.full(len(labelled), -1)
        split[labelled] = split_groups(problem.group[labelled], PARTS, seed, least=LEAST)
        fitted = Fitted(replace(problem, split=split))
        _, answers = search_pipelines(Evaluator(fitted, VALIDATE, max_queries=queries), grid(problem), costs, keep)
        level = 1 - (1 - LEVEL) / len({one.pipeline for one in answers.values()}) / len(problem.tasks)
        evaluators = [Evaluator(fitted, part) for part in (CONFIRM, UNSEEN)]
        for name, chosen in answers.items():
            claim, unseen = (one.outcome(chosen.pipeline, costs, level) for one in evaluators)
            rows.setdefault(name, []).append((chosen, claim, unseen))
            print(seed, name, chosen.pipeline, chosen.likely, claim.retained, unseen.worst, flush=True)
    lines = [
        f"| answer | likely (mean) | confirmed | of these, {keep:g} retained on unseen groups "
        "| at least the claim's lower end there | layer, bytes (median) |",
        "|---|---|---|---|---|---|",
    ]
    for name, outcomes in rows.items():
        confirmed = [one for one in outcomes if one[1].at_least >= keep]
        kept = sum(unseen.worst >= keep for _, _, unseen in confirmed)
        held = sum(unseen.worst >= claim.at_least for _, claim, unseen in outcomes)
        likely, layer, stored = np.array(
            [[one.likely or 0, depth * (one.time or 1), one.bytes] for one, *_ in outcomes]
        ).T
        lines.append(
            f"| {name} | {likely.mean():.2f} | {len(confirmed)} of {splits} | {kept} of {len(confirmed)} | "
            f"{held} of {splits} | {np.median(layer):g}, {np.median(stored):g} |"
        )
    save_markdown(Path(f"results/recommendation-{Path(data).name.partition('.')[0]}.md"), lines)


if __name__ == "__main__":
    run(main)
