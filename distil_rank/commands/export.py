"""A saved student in the format of another runtime."""

from pathlib import Path

import safetensors.torch

from distil_rank.artefact import write_atomically
from distil_rank.compression.saved import load, to_onnx
from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.options.compression import ExportOptions

FILES = {"onnx": "layer.onnx", "dense": "dense.safetensors"}


def export(options: ExportOptions) -> Path:
    """Turn a saved student into what another runtime takes."""
    student = load(options.artefact, options.rank)
    if not isinstance(student, LowRankLinear):
        raise InputError(
            f"Expected a student layer to export but {options.artefact} is an encoder; `distil_rank.load` reads it."
        )
    path = Path(options.output or Path(options.artefact) / FILES[options.to])
    if options.to == "onnx":
        to_onnx(student, path)
    else:
        write_atomically(path, safetensors.torch.save(dict(student.to_linear().state_dict())))
    print(path)
    return path
