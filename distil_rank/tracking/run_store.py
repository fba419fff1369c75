"""What runs need without MLflow: where they are kept, what their lists show, versions, and how a process was ended."""

import json
import os
import platform
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("distil-rank", "torch", "lightning", "torchmetrics", "mlflow", "fair-esm")
SIGNAL_EXIT_CODES = {128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}  # exit codes
LINEAGE = ("embedding_run", "fallback", "digest", "backbone", "split")
VIEW = "distil-rank"  # the key of the view that a run list opens with
MODEL_TRAINING = "workflowType=machine_learning"  # in a page's address: not among the pages of generative models
WIDTHS = {"choice": 220, "verdict": 120, "source": 180, "codes": 160, "fasta": 160}  # of columns of long words


# By experiment: what it holds, and the columns that its run list opens with, parameters before the bar and metrics
# behind it; no prefix: charts of curves come first.
_STUDENTS = (
    "teacher rank backbone | children r2 centred_cosine knn_overlap share_of_optimum cosine speed_up parameter_ratio"
)
RUN_LISTS = {
    "embed": (
        "Protein sequences through ESM-2: what was read, with which weights, and how fast.",
        "backbone pooling precision | proteins computed residues_per_second seconds",
    ),
    "teacher": (
        "The dense layers to be compressed: trained denoisers, random and spectral-decay layers, layers of your own.",
        "teacher backbone | effective_rank denoising_r2 noise_to_std",
    ),
    "distil": (
        "Low-rank students beside the teachers they replace, on held-out proteins. A benchmark shows its best.",
        _STUDENTS,
    ),
    "sweep": (
        "One teacher at many ranks: a sweep shows the best of its runs; open it to compare them.",
        _STUDENTS,
    ),
    "evaluate": (
        "Representations of the same proteins on labelled tasks: what each keeps of the full vector's function.",
        "source task labels metric best | full best retained retained_low best_bytes",
    ),
    "recommend": (
        "The cheapest pipeline that retains a function; open a run to compare it with others of the Pareto front.",
        "choice verdict keep source | retained retained_low bytes time",
    ),
    "code": (
        "Encoders of a few bytes a protein: what each retains of the full vector's function.",
        "source metric rank dtype | bytes score full retained retained_low",
    ),
    "predict": (
        "Predictions of new proteins: by which predictor, and for how many.",
        "model fasta data confidence | proteins",
    ),
    "search": (
        "Searches of proteins among codes.",
        "codes fasta targets bytes | queries hits recall seconds",
    ),
}


def list_view(columns: str) -> str:
    """Columns of `RUN_LISTS`, in the form that MLflow's user interface keeps a view in."""
    params, metrics = (part.split() for part in columns.split("|"))
    names = {**{f"params.`{name}`": name for name in params}, **{f"metrics.`{name}`": name for name in metrics}}
    widths = {column: WIDTHS.get(name, max(80, 30 + 7 * len(name))) for column, name in names.items()}  # in pixels
    return json.dumps({"selectedColumns": list(names), "columnOrder": list(names), "columnWidths": widths})


def default_tracking_uri(root: Path = Path()) -> str:
    """Where runs are kept: `MLFLOW_TRACKING_URI` if it is set, otherwise a sqlite database under `root/mlruns`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve() / 'mlruns' / 'mlflow.db'}"


def artifact_location(tracking_uri: str, root: Path, experiment: str) -> str | None:
    """Where an experiment's artifacts go: beside a local database; None leaves it to a remote server.

    >>> artifact_location("sqlite:////project/mlruns/mlflow.db", Path("/project"), "distil")
    '/project/mlruns/artifacts/distil'
    >>> artifact_location("http://tracking.example", Path("/project"), "distil")
    """
    if is_remote(tracking_uri):
        return None
    file = tracking_uri.removeprefix("sqlite:///")
    folder = Path(file).resolve().parent if file != tracking_uri else root.resolve() / "mlruns"
    return str(folder / "artifacts" / experiment)


def is_remote(tracking_uri: str) -> bool:
    """Whether a server keeps the runs, rather than a database that we open ourselves."""
    return tracking_uri.startswith(("http://", "https://", "databricks"))


def without_credentials(text: str) -> str:
    """A text whose addresses are without the user names and passwords that they may hold.

    >>> without_credentials("no answer from 'https://me:s@cret/1@tracking.example'")
    "no answer from 'https://tracking.example'"
    >>> without_credentials("postgresql://host/db?user=me&password=secret&ssl=on")
    'postgresql://host/db?user=me&password=***&ssl=on'
    >>> without_credentials("nothing at me:secret@host:5000")
    'nothing at host:5000'
    """
    text = re.sub(r"(?<=//)[^\s/@:\"']*(:[^\s\"']*)?@", "", text)
    text = re.sub(r"(?<![^\s\"'=(])[^\s/@:\"']+:[^\s/@\"']+@(?=\w)", "", text)  # without a scheme
    return re.sub(r"(?i)([?&]\w*(?:password|passwd|pwd|token|secret)\w*=)[^\s&\"']*", r"\1***", text)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on.

    >>> "torch" in versions()
    True
    """
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def lineage(data: Mapping[str, Any]) -> dict[str, str]:
    """Tags that lead from a run to the data behind it, out of what is known of them.

    >>> lineage({"digest": "ab12", "fallback": None, "seconds": 3})
    {'digest': 'ab12'}
    """
    return {key: str(data[key]) for key in LINEAGE if data.get(key)}


@contextmanager
def exit_on_signals(*signals: signal.Signals) -> Iterator[None]:
    """Turn signals that would end the process at once into `SystemExit`, so that context managers can clean up."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return

    def raise_exit(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, raise_exit) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C or SIGTERM caused an exception: Lightning turns the first into `SystemExit(1)`.

    >>> was_interrupted(KeyboardInterrupt()), was_interrupted(SystemExit(143)), was_interrupted(ValueError("no"))
    (True, True, False)
    """
    if error is None:
        return False
    signalled = isinstance(error, SystemExit) and error.code in SIGNAL_EXIT_CODES
    return signalled or isinstance(error, KeyboardInterrupt) or was_interrupted(error.__cause__ or error.__context__)
