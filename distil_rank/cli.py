"""The command line: one table of commands, whose options are frozen objects of `distil_rank.options`."""

import argparse
import ast
import errno
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import jsonargparse

from distil_rank.errors import InputError
from distil_rank.tracking.run_store import SIGNAL_EXIT_CODES, was_interrupted, without_credentials

PROG = "distil-rank"
QUIET = (
    *("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"),
    *("mlflow", "alembic", "matplotlib"),
)  # libraries whose progress is not ours


# By name: the options, `module:class` in `distil_rank.options`, which the function `distil_rank.commands.<name>.<name>`
# takes, and a line for the help.
COMMANDS = {
    "embed": ("embed:EmbedOptions", "protein sequences through ESM-2 into a store"),
    "train-teacher": (
        "training:LabelledTeacherOptions",
        "train the dense layer to be distilled, from labels or without",
    ),
    "distil": ("training:DistilOptions", "distil one teacher and report what is retained"),
    "benchmark": ("training:BenchmarkOptions", "the three teachers of the original, one table"),
    "sweep": ("training:SweepOptions", "one teacher at several ranks"),
    "compress": ("compression:CompressOptions", "one layer of your own model, to a folder that deploys"),
    "export": ("compression:ExportOptions", "a saved layer to ONNX or one dense layer"),
    "evaluate": ("evaluation:EvaluateOptions", "representations of the same proteins on a labelled task"),
    "code": ("codes:CodeOptions", "a few bytes for each protein of a store, fitted and evaluated"),
    "search": ("codes:SearchOptions", "proteins against a store of codes: hits with E-values"),
    "recommend": ("evaluation:RecommendOptions", "the cheapest pipeline that retains your function"),
    "predict": ("prediction:PredictOptions", "new proteins through a predictor: a table of predictions"),
    "ui": ("ui:UiOptions", "browse the runs in MLflow's own pages"),
}
ALIASES = {"judge": "evaluate"}  # for one release


def parse(name: str, argv: Sequence[str]) -> Any:
    """A command's checked options; neither torch nor Lightning nor MLflow is imported.

    Raises:
        InputError: options that there are not, of another type, out of range, or that contradict each other.
    """
    module, _, class_name = COMMANDS[name][0].partition(":")
    options_class = getattr(import_module(f"distil_rank.options.{module}"), class_name)
    parser = jsonargparse.ArgumentParser(
        prog=f"{PROG} {name}",
        usage=f"{PROG} {name} [OPTIONS]",
        description=COMMANDS[name][1],
        formatter_class=_CompactHelp,
        exit_on_error=False,
    )
    config_help = "YAML file; give it again to layer another on top."
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile, help=config_help)
    parser.add_class_arguments(options_class, as_group=False)
    # A switch alone is on: --self, or --self=false.
    flags = {f"--{field.name}" for field in fields(options_class) if field.type is bool}
    pairs = zip(argv, [*argv[1:], "--"], strict=False)
    argv = [f"{one}=true" if one in flags and after[:2] == "--" else one for one, after in pairs]
    # A list of one needs no brackets, nor does one with commas: --seeds 42, or --ranks 8,16.
    lists = {f"--{field.name}" for field in fields(options_class) if "Sequence[" in str(field.type)}
    pairs = zip(["", *argv], argv, strict=False)
    argv = [f"[{one}]" if before in lists and one[:1] not in ("[", "-") else one for before, one in pairs]
    try:
        values = parser.instantiate(parser.parse_args(argv))
    except (jsonargparse.ArgumentError, UnicodeDecodeError) as error:  # the latter from a configuration that is binary
        raise InputError(f"{' '.join(str(error).split())[:300]} (see `{parser.prog} --help`)") from error
    options = options_class(**{field.name: getattr(values, field.name) for field in fields(options_class)})
    if unknown := getattr(options, "trainer", {}).keys() - lightning_options():
        wrong = f"--trainer.{min(unknown)}"
        raise InputError(f"Expected options of Lightning's Trainer but got {wrong}; --trainer.help lists them.")
    options.check()
    return options


class _CompactHelp(jsonargparse.DefaultHelpFormatter):
    """Help with choices and defaults where there are any, and without Python's types."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=140, max_help_position=28)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return action.option_strings[0]

    def _get_help_string(self, action: argparse.Action) -> str:
        choices = f" {action.metavar}" if str(action.metavar).startswith("{") else ""
        default = " (%(default)s)" if action.default not in (None, argparse.SUPPRESS, {}, "") else ""
        return f"{action.help or ''}{choices}{default}"


def lightning_options() -> dict[str, str]:
    """Options of Lightning's Trainer and their defaults, as its source has them: importing it takes seconds."""
    package = find_spec("lightning")
    assert package is not None and package.origin is not None
    source = Path(package.origin).parent / "pytorch" / "trainer" / "trainer.py"
    trainer = next(node for node in ast.parse(source.read_text()).body if getattr(node, "name", "") == "Trainer")
    init = next(node for node in ast.walk(trainer) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    defaults = zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    fixed = {"logger", "callbacks", "default_root_dir", "enable_checkpointing", "enable_progress_bar"}
    return {name.arg: ast.unparse(value) for name, value in defaults if value is not None and name.arg not in fixed}


class _WithoutCredentials(logging.Formatter):
    """Messages, and tracebacks, without the passwords in addresses."""

    def format(self, record: logging.LogRecord) -> str:
        return without_credentials(super().format(record))


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(without_credentials("".join(traceback.format_exception(kind, error, trace))))


class _ErrorsOnly(logging.Logger):
    """A library's logger; importing the library, which takes seconds and comes later, does not set its level back."""

    def setLevel(self, level: int | str) -> None:
        super().setLevel(logging.ERROR)


def configure_output(verbosity: int) -> None:
    """Set up logging to standard error: -1 warnings only, 0 progress too, 1 everything, also from dependencies."""
    level = {-1: logging.WARNING, 1: logging.DEBUG}.get(verbosity, logging.INFO)
    screen = logging.StreamHandler(sys.stderr)
    screen.setFormatter(_WithoutCredentials())
    logging.basicConfig(level=logging.WARNING, handlers=[screen], force=True)
    sys.excepthook = _show_traceback
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
        print(f"usage: {PROG} [-q | -v] COMMAND [OPTIONS]   (COMMAND --help tells the options)\n")
        print("\n".join(f"  {name:<14} {summary}" for name, (_, summary) in COMMANDS.items()))
        return 0
    name = arguments.pop(0)
    if name in ALIASES:
        print(f"{PROG}: {name} is called {ALIASES[name]} now.", file=sys.stderr)
        name = ALIASES[name]
    if name not in COMMANDS:
        print(f"{PROG}: Expected a command out of {', '.join(COMMANDS)} but got {name!r}.", file=sys.stderr)
        return 2
    if "--trainer.help" in arguments and COMMANDS[name][0].startswith("training:"):
        print("\n".join(f"--trainer.{key} (default: {value})" for key, value in lightning_options().items()))
        return 0
    try:
        configure_output(verbosity)
        options = parse(name, arguments)
        function = name.replace("-", "_")
        getattr(import_module(f"distil_rank.commands.{function}"), function)(options)
        return 0
    except (InputError, OSError) as error:
        reason = str(error)
        if isinstance(error, OSError):
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            reason = f"Expected room for files but got: {error.strerror}; what was finished stays."
        print(f"{PROG}: {without_credentials(reason)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and (error.code in SIGNAL_EXIT_CODES or not was_interrupted(error)):
            raise  # otherwise it is Lightning's, after Ctrl-C
        print(f"{PROG}: stopped; what was finished stays.", file=sys.stderr)
        return 130
