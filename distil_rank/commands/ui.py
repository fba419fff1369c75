"""MLflow's own pages on the project's runs."""

from __future__ import annotations

from pathlib import Path

from distil_rank.options.ui import UiOptions
from distil_rank.tracking.ui import serve_ui


def ui(options: UiOptions) -> None:
    """Show the runs in a browser until Ctrl-C."""
    serve_ui(Path(options.root), options.port, options.host)
