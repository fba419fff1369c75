"""Layers from files of other projects: one projection, or the short head behind it, from a saved state dict."""

from pathlib import Path

import torch
from torch import Tensor, nn

from distil_rank.embedding.weight_files import hugging_face_files, load_tensors
from distil_rank.errors import InputError, examples
from distil_rank.lowrank.predictor import ACTIVATIONS

NESTED = ("state_dict", "model_state_dict", "model")  # Lightning, the PyTorch tutorials, fair-esm
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Reads every tensor of a `.safetensors` or PyTorch file, or of a Hugging Face directory (sharded or not), by name.

    Raises:
        InputError: nothing is there, it is damaged, or it holds anything that would have to be unpickled.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"Expected a saved model at {path} but there is nothing; check the path.")
    state: dict[str, Tensor] = {}
    for file in hugging_face_files(path) if path.is_dir() else [path]:
        content = load_tensors(file)
        content = next((content[key] for key in NESTED if isinstance(content.get(key), dict)), content)
        state |= {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return state


def load_linear(spec: str) -> nn.Linear:
    """Reads one linear layer out of a saved model, in its own dtype, with a bias if one lies beside the weight.

    Args:
        spec: `<file>:<key>`, for example `head.safetensors:classifier.dense`, `my_model/:esm.pooler.dense`, or its
            weight `my_model/:esm.pooler.dense.weight`; the key may be left out where the file holds a single matrix.

    Raises:
        InputError: no such layer, or it is not a finite floating-point matrix with a fitting bias.
    """
    path, _, key = (spec, "", "") if Path(spec).exists() else spec.rpartition(":")
    source = path or spec
    state = read_state_dict(source)
    matrices = [name for name, value in state.items() if value.ndim == 2]
    if not (path and key):
        if len(matrices) != 1:
            raise InputError(
                f"Expected one matrix in {source} but it holds {len(matrices)}; name one: {examples(matrices)}."
            )
        key = matrices[0]
    name = next((name for name in (key, f"{key}.weight") if name in state), None)
    if name is None:
        raise InputError(f"Expected a layer {key!r} in {source} but it has none; its matrices: {examples(matrices)}.")
    weight = state[name]
    bias = state.get(f"{name.removesuffix('weight')}bias") if name.endswith("weight") else None
    if weight.ndim != 2 or weight.dtype not in FLOATS:
        raise InputError(
            f"Expected {name!r} in {source} to be a floating-point (m, n) weight but got"
            f" {str(weight.dtype).removeprefix('torch.')} {tuple(weight.shape)}; name one of {examples(matrices)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"Expected a bias of {len(weight)} numbers beside {name!r} in {source} but got {len(bias)}.")
    if not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
        raise InputError(f"Expected finite weights in {name!r} of {source} but found NaN or inf; save it again.")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
    linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return linear


def load_head(spec: str) -> nn.Sequential:
    """Reads the modules behind a layer, frozen, so that a student can be trained on the model's output.

    Args:
        spec: steps separated by commas, each one of `ACTIVATIONS` or a layer as in `load_linear`:
            `tanh,head.safetensors:classifier.out_proj`.

    >>> load_head("tanh,relu")
    Sequential(
      (0): Tanh()
      (1): ReLU()
    )
    """
    steps = [step.strip() for step in spec.split(",")]
    for step in steps:
        if step not in ACTIVATIONS and ":" not in step and not Path(step).exists():
            raise InputError(
                f"Expected {', '.join(ACTIVATIONS)} or <file>:<key> as a step of the head but got {step!r}."
            )
    layers = [ACTIVATIONS[step]() if step in ACTIVATIONS else load_linear(step) for step in steps]
    return nn.Sequential(*layers).eval().requires_grad_(False)
