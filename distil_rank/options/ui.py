"""Options of ui."""

from dataclasses import dataclass

from distil_rank.errors import check_range


@dataclass(frozen=True)
class UiOptions:
    """Browse the runs in MLflow.

    Attributes:
        root: The project, whose mlruns/ holds the runs.
        port: To listen on; 5000, or a free one where that is taken, if not given.
        host: Address to listen on; 0.0.0.0 lets other machines in.
    """

    root: str = "."
    port: int | None = None
    host: str = "127.0.0.1"

    def check(self) -> None:
        """Raises `InputError` for a port that there is not."""
        if self.port is not None:
            check_range("--port", self.port, 0, 65535)
