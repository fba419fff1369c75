"""How often the claim of a recommendation holds: random splits of the groups into four parts.

    python benchmarks/recommendation.py --data STORE --labels scope40.fasta.gz --field 2

Each split fits on the first part, chooses on the second and claims on the third, as `make recommend` does. The fourth
is not seen by any of these: does the pipeline keep there at least what the lower end of the claim says? The fourth part
is as small as the third and as uncertain, so that a perfect 95 % interval would pass about 92 % of the splits.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from distil_rank.data.split import split_groups
from distil_rank.errors import InputError
from distil_rank.options.evaluation import LabelOptions
from distil_rank.recommendation.pipelines import Fitted, grid
from distil_rank.recommendation.problem import CONFIRM, LEAST, open_problem
from distil_rank.recommendation.search import Evaluator, cheapest, search_pipelines

PARTS = (0.25, 0.25, 0.25, 0.25)
UNSEEN = 3


def main() -> int:
    """Every split, then the share in which the claim holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/functions")
    parser.add_argument("--labels")
    for name in ("column", "separator", "names", "level"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--field", type=int)
    parser.add_argument("--groups")
    parser.add_argument("--keep", type=float, default=0.99)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--queries", type=int, default=1000, help="searched with when pipelines are compared")
    options = parser.parse_args()
    source = LabelOptions(
        options.labels, options.column, options.field, options.separator, options.names, options.level
    )
    try:
        problem = open_problem(options.data, source, groups=options.groups)
    except InputError as error:
        print(f"recommendation.py: {error}", file=sys.stderr)
        return 2
    held, confirmed, lines = (
        0,
        0,
        ["| split | chosen | claimed (95 %) | kept on unseen groups | holds |", "|---|---|---|---|---|"],
    )
    for seed in tqdm(range(options.splits), desc="splits", disable=None):
        split, labelled = problem.split.copy(), problem.split >= 0
        split[labelled] = split_groups(problem.group[labelled], PARTS, seed, least=LEAST)
        fitted = Fitted(replace(problem, split=split))
        outcomes = search_pipelines(fitted, grid(problem), {}, max_queries=options.queries)
        chosen = cheapest(outcomes, options.keep, "bytes")[0].pipeline
        claim, unseen = (Evaluator(fitted, part).outcome(chosen, {}) for part in (CONFIRM, UNSEEN))
        holds = unseen.worst >= claim.at_least
        held += holds
        confirmed += claim.at_least >= options.keep
        interval = claim.retained[0]
        lines.append(
            f"| {seed} | {chosen} | {interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f}) | "
            f"{unseen.worst:.3f} | {'yes' if holds else 'no'} |"
        )
        print(lines[-1], flush=True)
    total = f"| all {options.splits} | confirmed in {confirmed} | | | {held} of {options.splits} |"
    print(total)
    Path("results").mkdir(exist_ok=True)
    name = Path(options.data).name.partition(".")[0]
    Path(f"results/recommendation-{name}.md").write_text("\n".join([*lines, total]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
