"""Options of compress and export."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distil_rank.artefact import check_writable
from distil_rank.errors import InputError, check_range
from distil_rank.options.training import DataOptions, check_rank_option

FORMAT = "distil-rank"  # of the folder that `distil_rank.save` writes


@dataclass(frozen=True)
class CompressOptions:
    """Compress one layer of a saved model into a folder that deploys.

    Attributes:
        model: A .safetensors or PyTorch file with a state dict, or a Hugging Face directory.
        layer: Its name in there, like classifier.dense; not needed where there is just one.
        data: The layer's inputs.
        rank: An integer, a share of the layer's output variance to retain (0.99), or `auto`.
        output: Folder to save to.
    """

    model: str = ""
    layer: str | None = None
    data: DataOptions = field(default_factory=DataOptions)
    rank: int | float | str = 0.99
    output: str = "compressed"

    def check(self) -> None:
        """Raises `InputError` for what can be told before any work."""
        if not self.model or not Path(self.model).exists():
            raise InputError(f"Expected a saved model at --model but got {self.model or 'none'!r}; give its file.")
        self.data.check()
        check_rank_option(self.rank)
        check_writable(self.output, FORMAT)


@dataclass(frozen=True)
class ExportOptions:
    """Turn a saved student into what another runtime takes.

    Attributes:
        artefact: The folder that compress or distil made.
        to: onnx; or dense, weight and bias of one plain layer.
        rank: A lower rank than the saved one.
        output: The file; by default within that folder.
    """

    artefact: str = ""
    to: Literal["onnx", "dense"] = "onnx"
    rank: int | None = None
    output: str | None = None

    def check(self) -> None:
        """Raises `InputError` for what can be told before any work."""
        if not self.artefact or not Path(self.artefact).is_dir():
            raise InputError(f"Expected a saved student at --artefact but got {self.artefact or 'none'!r}.")
        if self.rank is not None:
            check_range("--rank", self.rank, 1)
        if self.output is not None and Path(self.output).is_dir():
            raise InputError(f"Expected a file at --output but {self.output} is a folder; name a file in it.")
        check_writable(Path(self.output).parent if self.output else self.artefact)
