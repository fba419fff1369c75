"""Hugging Face's ESM-2 in int8 by general engines, as baselines of `embedding.py`; each in an environment of its own.

They need `transformers`, and torchao; or openvino and nncf; or onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from baselines import hugging_face_model, padded_runs

FITTED = 8  # proteins that OpenVINO calibrates on


def run_of(name: str, weights: Path, sequences: list[str]) -> Callable[[], list[torch.Tensor]]:
    """What an engine computes."""
    make = {"torchao": torchao, "openvino": openvino, "onnxruntime": onnxruntime}[name]
    model = hugging_face_model(weights)
    for module in model.modules():
        if hasattr(module, "_update_cos_sin_tables"):
            module._update_cos_sin_tables = MethodType(rotary_tables, module)
    return make(model, sequences)


def rotary_tables(module: Any, x: torch.Tensor, seq_dimension: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for the tokens at hand: the model's own are kept between calls, which no graph can be."""
    angles = torch.outer(torch.arange(x.shape[seq_dimension]).type_as(module.inv_freq), module.inv_freq)
    both = torch.cat((angles, angles), dim=-1)[None, None]
    return both.cos(), both.sin()


def torchao(model: torch.nn.Module, sequences: list[str]) -> Callable[[], list[torch.Tensor]]:
    """int8 weights, and activations with a scale per token at run time; compiled."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(model, dynamic=True)
    return padded_runs(sequences, lambda ids, mask: compiled(input_ids=ids, attention_mask=mask)[0])


def openvino(model: torch.nn.Module, sequences: list[str]) -> Callable[[], list[torch.Tensor]]:
    """NNCF's int8 for transformers: calibrated scales per tensor, its SmoothQuant; all else as OpenVINO chooses."""
    import nncf
    import openvino as library

    inputs: list[dict[str, torch.Tensor]] = []

    def noted(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        inputs.extend({"input_ids": a[None], "attention_mask": b[None]} for a, b in zip(ids, mask, strict=True))
        return torch.zeros(*ids.shape, 1)

    padded_runs(sequences[:FITTED], noted)()
    graph = library.convert_model(model, example_input=inputs[0])
    dataset = nncf.Dataset(inputs, lambda item: {name: value.numpy() for name, value in item.items()})
    quantised = nncf.quantize(graph, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=FITTED)
    compiled = library.Core().compile_model(quantised, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})

    def forward(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(compiled({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])

    return padded_runs(sequences, forward)


def onnxruntime(model: torch.nn.Module, sequences: list[str]) -> Callable[[], list[torch.Tensor]]:
    """Its dynamic int8: weights per channel, activations with one scale per tensor at run time."""
    import onnxruntime as library
    from onnxruntime.quantization import quantize_dynamic

    folder = tempfile.TemporaryDirectory()
    exact, rounded = (Path(folder.name) / name for name in ("exact.onnx", "int8.onnx"))
    example = torch.ones(2, 16, dtype=torch.int64)
    sizes = {"input_ids": {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: "tokens"}}
    torch.onnx.export(
        model,
        (example, example),
        str(exact),
        input_names=list(sizes),
        output_names=["hidden"],
        dynamic_axes=sizes,
        dynamo=False,
    )
    quantize_dynamic(exact, rounded, per_channel=True, use_external_data_format=True)
    options = library.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = library.InferenceSession(rounded, options, providers=["CPUExecutionProvider"])
    folder.cleanup()

    def forward(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        return torch.from_numpy(session.run(["hidden"], given)[0])

    return padded_runs(sequences, forward)
