"""One teacher at several ranks: a parent run with a child for each."""

from distil_rank.commands.benchmark import distil_several
from distil_rank.commands.train_teacher import largest_rank, open_data
from distil_rank.evaluation.results import Result
from distil_rank.options.training import DistilOptions, SweepOptions

RANKS = (8, 16, 32, 64, 128)


def sweep(options: SweepOptions) -> Result:
    """Distil one teacher at several ranks, with the picture of what each retains."""
    o, data = options, open_data(options.data)
    ranks = o.ranks or [rank for rank in RANKS if rank <= largest_rank(data, o.teacher)]
    children = [DistilOptions(o.data, o.teacher, o.trainer, o.output, o.distil, rank, o.seeds) for rank in ranks]
    return distil_several("sweep", o, children, data)
