"""One teacher from start to finish: solve, train, run the original recipe, compare, and assemble the result."""

import copy
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.errors import InputError
from distil_rank.evaluation.comparison import ConstantOutput, HeldOut, compare, solved_students
from distil_rank.evaluation.results import (
    OURS,
    RECIPE,
    Curve,
    ParetoPoint,
    Spectrum,
    TeacherCheck,
    TeacherResult,
)
from distil_rank.lowrank.low_rank import LowRankLinear, break_even_rank, parameter_count
from distil_rank.lowrank.solvers import r2_curve, solve
from distil_rank.measure.latency import LayerLatency, compare_layers
from distil_rank.measure.metrics import r2
from distil_rank.options.training import DistilOptions
from distil_rank.training.callbacks import KeepIfBetter, LogFidelity, LogLatency, Progress, SaveLast
from distil_rank.training.distil import ORIGINAL, ORIGINAL_BATCH, ORIGINAL_STEPS, DistilModule

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    "max_steps": 500,
    "enable_progress_bar": False,  # Lightning's begins anew each epoch; ours is one bar with the time left
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,  # the start is validated in full before the first step
    "log_every_n_steps": 10,
}
RANK = 64  # by default, as in the original
VALIDATIONS = 20  # over a run of a fixed number of steps, however long its epochs are
PARETO_RANKS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
RANK_TOLERANCE = 0.02  # between the R² that the training rows predict and the held-out one


def trainer_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of Lightning's Trainer, with our defaults where there are none.

    >>> trainer_options({"max_steps": 100})["val_check_interval"]
    5
    """
    merged = {**TRAINER_DEFAULTS, **options}
    if merged["max_steps"] > 0 and not {"val_check_interval", "check_val_every_n_epoch"} & options.keys():
        interval = max(merged["max_steps"] // VALIDATIONS, 1)
        merged |= {"check_val_every_n_epoch": None, "val_check_interval": interval}
    return merged


@dataclass(frozen=True)
class Trained:
    """Students of several seeds.

    Attributes:
        students: one per seed.
        curve: of the first seed.
        seconds: wall time of one.
        note: what training gained, in words.
        steps: that the first seed's student was trained for; 0 where it is the start.
        latency: of the first seed's student, where it was timed.
    """

    students: Sequence[LowRankLinear]
    curve: Curve
    seconds: float
    note: str = ""
    steps: int = 0
    latency: Sequence[LayerLatency] = ()


def run_experiment(
    name: str,
    teacher: nn.Linear,
    check: TeacherCheck,
    data: EmbeddingDataModule,
    options: DistilOptions,
    head: nn.Module | None,
    logger: Logger,
    checkpoints: Path,
) -> tuple[TeacherResult, LowRankLinear]:
    """Distil one dense layer at one rank, and compare every method on the held-out rows.

    Returns the result for the report, and the first seed's student.

    Args:
        name: of the teacher, for the report.
        teacher: the dense layer.
        check: whether it is worth it.
        data: set up already.
        options: rank, how students are trained, and their seeds; the first is returned, logged and saved.
        head: what stands behind the layer.
        logger: of the first seed.
        checkpoints: folder for the first seed's.

    Raises:
        InputError: the rank does not fit, the teacher's width is not the data's, or the checkpoint is another model's.
    """
    started = time.perf_counter()
    module = DistilModule(teacher, options.rank or RANK, **asdict(options.distil), head=head)
    module.solve(data)
    solving = time.perf_counter() - started
    assert module.moments is not None and module.spectrum is not None
    baselines = solved_students(module.teacher, module.moments, module.layer.rank, module.spectrum)
    paired = data.with_targets(module.teacher)
    ours = train_students(module, baselines, paired, options, logger, checkpoints)
    recipe = train_recipes(module, baselines, paired, options.seeds)

    held_out = HeldOut.of(data)
    seconds = {"closed_form": solving, RECIPE: recipe.seconds, OURS: ours.seconds + solving}
    single = {"constant": ConstantOutput(module.output_mean), **baselines}
    methods = {**{method: [layer] for method, layer in single.items()}, RECIPE: recipe.students, OURS: ours.students}
    rows = compare(module.teacher, methods, module.output_mean, held_out, seconds=seconds)

    n, m, reached = teacher.in_features, teacher.out_features, module.layer.rank
    predicted = float(r2_curve(module.spectrum[0])[reached - 1])
    measured = next(row for row in rows if row.method == "closed_form").metrics["r2"].value
    dense, small = parameter_count(n, m), parameter_count(n, m, reached)
    with torch.no_grad():
        x = data.rows("val")
        optimum = 1 - r2(baselines["closed_form"](x), module.teacher(x), module.output_mean)
    result = TeacherResult(
        teacher=name,
        check=check,
        rank=reached,
        rank_requested=options.rank or RANK,
        rank_note=_rank_note(teacher, reached, predicted - measured, len(data.split_rows.train)),
        shape=(m, n),
        parameters={"dense": dense, "student": small, "ratio": dense / small, "break_even_rank": break_even_rank(n, m)},
        predicted_r2=predicted,
        held_out_r2=measured,
        held_out_note=held_out.note,
        comparison=rows,
        latency=list(ours.latency or compare_layers(teacher, ours.students[0])),
        spectrum=Spectrum(_relative(torch.linalg.svdvals(teacher.weight)), _relative(module.spectrum[0].sqrt())),
        curves={OURS: ours.curve, RECIPE: recipe.curve},
        training_note=ours.note,
        validation_optimum=optimum,
        pareto=pareto(module, held_out),
    )
    student = ours.students[0]
    student.provenance |= {"warm_start": options.distil.warm_start, "trained_steps": ours.steps}
    return result, student


def train_students(
    module: DistilModule,
    baselines: Mapping[str, nn.Module],
    data: EmbeddingDataModule,
    options: DistilOptions,
    logger: Logger | None = None,
    checkpoints: Path | None = None,
) -> Trained:
    """Students of several seeds that start where a solved module stands; see `run_experiment` for the arguments."""
    started, start = time.perf_counter(), copy.deepcopy(module.layer)
    fidelity, latency, keep = LogFidelity({"svd": baselines["svd"]}), LogLatency(), KeepIfBetter()
    saving = [] if checkpoints is None else [SaveLast(checkpoints)]
    first = Trainer(
        **trainer_options(options.trainer),
        logger=logger or False,
        enable_checkpointing=bool(saving),
        callbacks=[fidelity, latency, keep, Progress("distilling"), *saving],
    )
    seed_everything(options.seeds[0], verbose=False)
    with torch.random.fork_rng(devices=[]):  # batches are those of a run without this look at the start
        first.validate(module, datamodule=data, verbose=False)
    if module.solved:
        note = "Not trained: the closed form already is the exact minimum of this loss."
        return Trained([module.layer.eval()], fidelity.curve, time.perf_counter() - started, note)
    try:
        first.fit(module, datamodule=data, ckpt_path=options.ckpt_path, weights_only=True)  # never unpickled
    except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        if options.ckpt_path is None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"Expected a checkpoint of this very student in {options.ckpt_path} but it does not fit: {reason}"
        ) from error
    students = [module.cpu().layer.eval()]
    for seed in options.seeds[1:]:
        again = Trainer(
            **trainer_options(options.trainer), logger=False, enable_checkpointing=False, callbacks=[KeepIfBetter()]
        )
        module.start_from(module, start)
        seed_everything(seed, verbose=False)
        again.fit(module, datamodule=data)
        students.append(module.cpu().layer.eval())
    seconds = (time.perf_counter() - started) / len(options.seeds)
    steps = first.global_step
    note = f"Training ({steps} steps) did not beat the warm start on validation: the warm start was retained."
    if keep.better:
        gain = 100 * (1 - keep.best_loss / keep.start_loss)
        note = f"Training ({steps} steps) lowered the validation loss by {gain:.1f} % from the warm start."
    return Trained(students, fidelity.curve, seconds, note, steps if keep.better else 0, latency.rows)


def train_recipes(
    module: DistilModule, baselines: Mapping[str, LowRankLinear], data: EmbeddingDataModule, seeds: Sequence[int]
) -> Trained:
    """The original's recipe: from the SVD, a fixed number of steps, the last step whatever it is."""
    started, fidelity, students = time.perf_counter(), LogFidelity({}), []
    data = data.with_batches(ORIGINAL_BATCH, replacement=True, epoch_batches=ORIGINAL_STEPS)
    teacher, rank = module.teacher, module.layer.rank
    recipe = DistilModule(teacher, rank, **ORIGINAL)
    for number, seed in enumerate(seeds):
        watched: dict[str, Any] = {"val_check_interval": 50, "callbacks": [fidelity]}
        options = {**TRAINER_DEFAULTS, "max_steps": ORIGINAL_STEPS, **({"limit_val_batches": 0} if number else watched)}
        seed_everything(seed, verbose=False)
        LowRankLinear(teacher.in_features, teacher.out_features, rank)  # draws weights before batches, as the original
        recipe.start_from(module, baselines["svd"])
        Trainer(**options, logger=False, enable_checkpointing=False).fit(recipe, datamodule=data)
        students.append(recipe.cpu().layer.eval())
    return Trained(students, fidelity.curve, (time.perf_counter() - started) / len(seeds))


@torch.no_grad()
def pareto(module: DistilModule, held_out: HeldOut) -> list[ParetoPoint]:
    """Held-out fidelity of the closed form at every usual rank: slices of one full-rank solve."""
    assert module.spectrum is not None and module.moments is not None
    teacher, full = module.teacher, min(module.teacher.weight.shape)
    factors = solve(teacher.weight, teacher.bias, full, "closed_form", module.moments, module.spectrum)
    nested = LowRankLinear.from_factors(factors, module.moments.mean)
    ranks = [rank for rank in PARETO_RANKS if rank < full] + [full]
    slices = {str(rank): [nested.truncate(rank)] for rank in ranks}
    rows = compare(teacher, slices, module.output_mean, held_out, optimum=str(full))
    points, curve = [], r2_curve(module.spectrum[0])
    for rank, row in zip(ranks, rows, strict=True):
        r2, knn = row.metrics["r2"], row.metrics["knn_overlap"]
        points.append(ParetoPoint(rank, float(curve[rank - 1]), r2.value, r2.low, r2.high, knn.value, row.parameters))
    return points


def _relative(values: Tensor) -> list[float]:
    return (values / values.max().clamp_min(1e-300)).tolist()


def _rank_note(teacher: nn.Linear, rank: int, gap: float, rows: int) -> str:
    """Why the R² that the training rows predict may not hold on others, by its distance `gap` from the held-out one."""
    note = ""
    if rows < teacher.in_features:
        note = f" ({rows} training rows for {teacher.in_features} dimensions: the prediction is optimistic)"
    elif abs(gap) > RANK_TOLERANCE:
        note = " (the held-out rows are unlike the training rows: split, or too few of them)"
    if rank >= break_even_rank(teacher.in_features, teacher.out_features):
        note += "; AT THIS RANK THE FACTORS ARE NO SMALLER THAN THE DENSE LAYER"
    return note
