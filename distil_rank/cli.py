"""The command line. Each command's options are the signatures of the functions and classes behind it."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from distil_rank.errors import InputError

# Imports of torch, Lightning and MLflow take seconds, so each command brings its own.
# ruff: noqa: PLC0415

QUIET = (
    *("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"),
    *("mlflow", "alembic", "matplotlib"),
)  # libraries whose progress is not ours
PROG = "distil-rank"


def _parser(name: str, description: str | None) -> Any:
    from jsonargparse import ActionConfigFile, ArgumentParser

    summary = (description or "").splitlines()[0]
    parser = ArgumentParser(prog=f"{PROG} {name}", description=summary, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; give it again to layer another on top.")
    return parser


def _parse(parser: Any, argv: Sequence[str]) -> Any:
    """Parsed options; an error is one line, without the usage of a hundred options before it."""
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(list(argv))
    except ArgumentError as error:
        raise InputError(f"{' '.join(str(error).split())} (see `{parser.prog} --help`)") from error


def _training_parser(name: str, command: Callable[..., Any], student: bool = True) -> Any:
    """Sections `data`, `teacher`, `distil` and `trainer`, and the command's own options beside them."""
    from lightning import Trainer

    from distil_rank.commands.train_teacher import train_teacher
    from distil_rank.data.datamodule import EmbeddingDataModule
    from distil_rank.training.distil import DistilModule
    from distil_rank.training.seeds import TRAINER_DEFAULTS

    sections = {"data", "teacher", "distil", "trainer", "config", "parent", "experiment", "reuse"}
    parser = _parser(name, command.__doc__)
    parser.add_class_arguments(EmbeddingDataModule, "data", instantiate=False)
    parser.add_function_arguments(train_teacher, "teacher", skip={*sections, "output"})
    if student:
        skip = {"teacher", "students", "tail", "output_variance"}
        parser.add_class_arguments(DistilModule, "distil", instantiate=False, skip=skip)
        parser.add_function_arguments(command, None, as_group=False, skip=sections)
    else:
        parser.add_argument("--output", default="results", help="Folder for results.")
    fixed = {"logger", "callbacks", "default_root_dir", "enable_checkpointing", "enable_progress_bar"}
    parser.add_class_arguments(Trainer, "trainer", instantiate=False, skip=fixed)
    parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items() if key not in fixed})
    return parser


def _options_with_data(parser: Any, argv: Sequence[str]) -> dict[str, Any]:
    """The options, with the data behind them ready to be read, and the resolved configuration as `config`."""
    from distil_rank.data.datamodule import EmbeddingDataModule

    parsed = _parse(parser, argv)
    options = {**parsed.as_dict(), "config": parser.dump(parsed)}
    return {**options, "data": EmbeddingDataModule(**options["data"])}


def _train_teacher(argv: Sequence[str]) -> int:
    """train or generate the dense layer to be distilled"""
    from distil_rank.commands.train_teacher import train_teacher

    options = _options_with_data(_training_parser("train-teacher", train_teacher, student=False), argv)
    print(f"Teacher: {train_teacher(**options.pop('teacher'), **options).path}")
    return 0


def _report(name: str, command: Callable[..., Any], argv: Sequence[str]) -> int:
    from distil_rank.report import report

    report.show(command(**_options_with_data(_training_parser(name, command), argv)))
    return 0


def _distil(argv: Sequence[str]) -> int:
    """distil one teacher and report what survived"""
    from distil_rank.commands.distil import distil

    return _report("distil", distil, argv)


def _benchmark(argv: Sequence[str]) -> int:
    """the three teachers of the original, one table"""
    from distil_rank.commands.studies import benchmark

    return _report("benchmark", benchmark, argv)


def _sweep(argv: Sequence[str]) -> int:
    """one teacher at several ranks"""
    from distil_rank.commands.studies import sweep

    return _report("sweep", sweep, argv)


def _compress(argv: Sequence[str]) -> int:
    """one layer of your own model, from its file to a folder that deploys"""
    from distil_rank.commands.compress import compress
    from distil_rank.compression.deploy import compress_file
    from distil_rank.data.datamodule import EmbeddingDataModule
    from distil_rank.report import report

    parser = _parser("compress", compress_file.__doc__)
    parser.add_class_arguments(EmbeddingDataModule, "data", instantiate=False)
    parser.add_function_arguments(compress_file, None, as_group=False, skip={"data"})
    options = _options_with_data(parser, argv)
    report.show_markdown(str(compress(options.pop("data"), config=options.pop("config"), options=options)))
    return 0


def _export(argv: Sequence[str]) -> int:
    """a saved layer to ONNX, torch.export, one dense layer, or int8"""
    from distil_rank.compression.deploy import export_artefact

    parser = _parser("export", export_artefact.__doc__)
    parser.add_function_arguments(export_artefact, None, as_group=False)
    print(export_artefact(**{key: value for key, value in _parse(parser, argv).as_dict().items() if key != "config"}))
    return 0


def _embed(argv: Sequence[str]) -> int:
    """protein sequences through ESM-2 into a store"""
    from distil_rank.commands.embed import extract
    from distil_rank.embedding.run import embed
    from distil_rank.report import report
    from distil_rank.tracking.run import process_rank

    parser = _parser("embed", embed.__doc__)
    parser.add_function_arguments(embed, None, as_group=False, skip={"retry_skipped", "encoder", "like"})
    parser.add_argument("--code", default=None, help="Folder of a code map: writes codes in place of the vectors.")
    retry = "Compute proteins again that were skipped for lack of memory."
    parser.add_argument("--retry-skipped", action="store_true", help=retry)
    options = {key: value for key, value in _parse(parser, argv).as_dict().items() if key != "config"}
    done = extract(options)
    if process_rank() == 0:
        report.show_facts("Embeddings", asdict(done))
    return 0


def _judge(argv: Sequence[str]) -> int:
    """representations of the same proteins on a labelled task"""
    from distil_rank.commands.evaluate import evaluate
    from distil_rank.options.evaluation import LabelOptions
    from distil_rank.report import evaluation

    parser = _parser("evaluate", evaluate.__doc__)
    parser.add_function_arguments(evaluate, None, as_group=False, skip={"config"})
    parsed = _parse(parser, argv)
    options = {**parsed.as_dict(), "config": parser.dump(parsed)}
    evaluation.show(evaluate(**{**options, "labels": LabelOptions(**options["labels"])}))
    return 0


def _code(argv: Sequence[str]) -> int:
    """a few bytes for each protein of a store, fitted and judged"""
    from distil_rank.codes.augment import Augmentation
    from distil_rank.commands.code import code
    from distil_rank.options.evaluation import LabelOptions
    from distil_rank.report import evaluation, report

    parser = _parser("code", code.__doc__)
    parser.add_function_arguments(code, None, as_group=False, skip={"config"})
    parsed = _parse(parser, argv)
    options = {**parsed.as_dict(), "config": parser.dump(parsed)}
    options["labels"] = LabelOptions(**options["labels"])
    options["augmentation"] = Augmentation(**options["augmentation"])
    done = code(**options)
    if done.evaluation is not None:
        evaluation.show(done.evaluation)
    report.show_facts("Codes", {"code map": done.encoder, "store": done.store})
    return 0


def _search(argv: Sequence[str]) -> int:
    """proteins against a store of codes: hits with E-values"""
    from distil_rank.codes.search import COLUMNS
    from distil_rank.commands.search import search_codes
    from distil_rank.report import report

    parser = _parser("search", search_codes.__doc__)
    parser.add_function_arguments(search_codes, None, as_group=False, skip={"all_against_all"})
    parser.add_argument(
        "--self", action="store_true", help="Search with the codes themselves, each against all others."
    )
    options = {key: value for key, value in _parse(parser, argv).as_dict().items() if key != "config"}
    done = search_codes(all_against_all=options.pop("self"), **options)
    if done.table is not None:
        rows = [[q, t, f"{score:.3f}", str(rank), f"{e:.1e}"] for q, t, score, rank, e in done.first]
        shown = f", the first {len(rows)} below" if done.hits > len(rows) else ""
        report.show_table(f"{done.hits:,} hits of {done.queries:,} queries{shown}: {done.table}", list(COLUMNS), rows)
    if done.exported is not None:
        print(f"Exported: {done.exported}")
    return 0


def _recommend(argv: Sequence[str]) -> int:
    """the cheapest pipeline that keeps your function"""
    from distil_rank.codes.augment import Augmentation
    from distil_rank.commands.recommend import recommend
    from distil_rank.options.evaluation import LabelOptions
    from distil_rank.report import recommendation

    parser = _parser("recommend", recommend.__doc__)
    parser.add_function_arguments(recommend, None, as_group=False, skip={"config"})
    parsed = _parse(parser, argv)
    options = {**parsed.as_dict(), "config": parser.dump(parsed)}
    options["labels"] = LabelOptions(**options["labels"])
    options["augmentation"] = Augmentation(**options["augmentation"])
    recommendation.show(recommend(**options))
    return 0


def _ui(argv: Sequence[str]) -> int:
    """browse the runs in MLflow's own pages"""
    from distil_rank.tracking.ui import serve_ui

    parser = _parser("ui", serve_ui.__doc__)
    parser.add_function_arguments(serve_ui, None, as_group=False)
    serve_ui(**{key: value for key, value in _parse(parser, argv).as_dict().items() if key != "config"})
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "embed": _embed,
    "train-teacher": _train_teacher,
    "distil": _distil,
    "benchmark": _benchmark,
    "sweep": _sweep,
    "compress": _compress,
    "export": _export,
    "evaluate": _judge,
    "code": _code,
    "search": _search,
    "recommend": _recommend,
    "ui": _ui,
}


def _usage() -> str:
    lines = [f"  {name:<14} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join([f"usage: {PROG} [-q | -v] COMMAND [OPTIONS]   (COMMAND --help tells the options)", "", *lines])


class _ErrorsOnly(logging.Logger):
    """A library's logger; importing the library, which takes seconds and comes later, does not set its level back."""

    def setLevel(self, level: int | str) -> None:
        super().setLevel(logging.ERROR)


def configure_output(verbosity: int) -> None:
    """Set up logging to standard error: -1 warnings only, 0 progress too, 1 everything, also from dependencies."""
    level = {-1: logging.WARNING, 1: logging.DEBUG}.get(verbosity, logging.INFO)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("distil_rank").setLevel(level)
    if verbosity < 1:
        before = logging.getLoggerClass()
        logging.setLoggerClass(_ErrorsOnly)
        for name in QUIET:
            logger = logging.getLogger(name)
            logger.setLevel(logging.ERROR)
            logger.propagate = False
            for handler in logger.handlers:  # of a library that was imported before, whose logger is of its own class
                handler.setLevel(logging.ERROR)
        logging.setLoggerClass(before)
        # Warnings that a user cannot act on, such as deprecations inside Lightning.
        modules = (
            r"(lightning|lightning_fabric|lightning_utilities|torchmetrics|mlflow|torch|esm|jsonargparse|pydantic)\b"
        )
        warnings.filterwarnings("ignore", module=modules)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit code 2 and one line for what the user can correct."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbosity = (arguments.count("-v") > 0) - (arguments.count("-q") > 0)
    arguments = [argument for argument in arguments if argument not in ("-v", "-q")]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] not in COMMANDS:
        names = ", ".join(COMMANDS)
        print(f"{PROG}: Expected a command out of {names} but got {arguments[0]!r}.", file=sys.stderr)
        return 2
    try:
        configure_output(verbosity)
        return COMMANDS[arguments[0]](arguments[1:])
    except InputError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: stopped; what was finished is kept.", file=sys.stderr)
        return 130
