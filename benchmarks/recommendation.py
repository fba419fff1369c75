"""How often the claim of a recommendation holds: random splits of the groups into four parts.

    python benchmarks/recommendation.py --data STORE --labels.source scope40.fasta.gz --labels.field 2

Each split fits on the first part, chooses on the second and claims on the third, as `make recommend` does: its answer
*smallest*, whose claim is one of three that hold together. The fourth is not seen by any of these: does the pipeline
keep there at least what the lower end of the claim says? The fourth part is as small as the third and as uncertain.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from script import run, save_markdown
from tqdm import tqdm

from distil_rank.data.split import split_groups
from distil_rank.measure.statistics import LEVEL
from distil_rank.options.evaluation import LabelOptions
from distil_rank.recommendation.pipelines import Fitted, grid
from distil_rank.recommendation.problem import CONFIRM, LEAST, open_problem
from distil_rank.recommendation.search import LOOKS, Evaluator, search_pipelines

PARTS = (0.25, 0.25, 0.25, 0.25)
UNSEEN = 3


def main(
    data: str = "data/functions",
    labels: LabelOptions = LabelOptions(),  # noqa: B008 - frozen
    groups: str | None = None,
    keep: float = 0.99,
    splits: int = 20,
    queries: int = 1000,
) -> None:
    """Every split, then the share in which the claim holds.

    Args:
        data: Store of one or several layers.
        labels: Where labels come from.
        groups: What stays in one split.
        keep: Share of the full vector's score that must be retained.
        splits: How many.
        queries: Searched with when pipelines are compared.
    """
    problem = open_problem(data, labels, groups=groups)
    labelled = problem.split >= 0
    held = confirmed = 0
    lines = ["| split | chosen | claimed (95 %) | retained on unseen groups | holds |", "|---|---|---|---|---|"]
    for seed in tqdm(range(splits), desc="splits", disable=None):
        split = problem.split.copy()
        split[labelled] = split_groups(problem.group[labelled], PARTS, seed, least=LEAST)
        fitted = Fitted(replace(problem, split=split))
        _, answers = search_pipelines(fitted, grid(problem), {}, keep, max_queries=queries)
        chosen, level = answers["smallest"].pipeline, 1 - (1 - LEVEL) / LOOKS
        claim, unseen = (Evaluator(fitted, part).outcome(chosen, {}, level) for part in (CONFIRM, UNSEEN))
        holds = unseen.worst >= claim.at_least
        held += holds
        confirmed += claim.at_least >= keep
        interval = claim.retained[0]
        lines.append(
            f"| {seed} | {chosen} | {interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f}) | "
            f"{unseen.worst:.3f} | {'yes' if holds else 'no'} |"
        )
    lines.append(f"| all {splits} | confirmed in {confirmed} | | | {held} of {splits} |")
    save_markdown(Path(f"results/recommendation-{Path(data).name.partition('.')[0]}.md"), lines)


if __name__ == "__main__":
    run(main)
