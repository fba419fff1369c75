"""What the baselines of `embedding.py` compute: each embeds proteins in a process of its own, whenever a line comes in.

It imports nothing of this project before it knows its baseline, whose environment may have no more than that needs:

    python benchmarks/baselines.py "fair-esm fp32" WEIGHTS FASTA PROTEINS LENGTHS

All peers but esm-cpp need `transformers`; general engines also torchao; openvino and nncf; or onnx, onnxscript and
onnxruntime.
"""

from __future__ import annotations

import gzip
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch

TOKENS = 4096  # in a baseline's batch; ours takes its own default
ENGINES = ("torchao", "openvino", "onnxruntime")  # int8 alone
FITTED = 8  # proteins that OpenVINO calibrates on
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def read_fasta(path: Path, proteins: int, lengths: str = "1-100000") -> list[str]:
    """Every n-th sequence within the lengths, so that the choice is spread over the file."""
    with gzip.open(path, "rt") as file:
        blocks = f"\n{file.read()}".split("\n>")[1:]
    sequences = ["".join(block.split("\n")[1:]).upper() for block in blocks]
    shortest, longest = map(int, lengths.split("-"))
    sequences = [text for text in sequences if shortest <= len(text) <= longest]
    step = max(len(sequences) // proteins, 1)
    return sequences[::step][:proteins]


def fair_esm_batches(sequences: list[str]) -> list[list[int]]:
    """fair-esm's own batching."""
    from esm import FastaBatchedDataset

    return FastaBatchedDataset([str(i) for i in range(len(sequences))], sequences).get_batch_indices(TOKENS, 1)


def padded_batches(sequences: list[str]) -> list[list[int]]:
    """The same, for who has no batching of his own: by length, padded size within the budget."""
    batches: list[list[int]] = [[]]
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        if batches[-1] and (len(batches[-1]) + 1) * (len(sequences[i]) + 2) > TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches


def mean_of_residues(hidden: torch.Tensor, batch: list[int], sequences: list[str], means: list[Any]) -> None:
    """Pools one padded batch (B, T, dim) as all baselines do."""
    for row, i in enumerate(batch):
        means[i] = hidden[row, 1 : len(sequences[i]) + 1].float().mean(0)


def fair_esm(weights: Path, sequences: list[str], precision: str) -> Callable[[], list[torch.Tensor]]:
    """fair-esm's own forward, alphabet and batches."""
    from distil_rank.embedding.backbone import load_backbone

    backbone = load_backbone(str(weights))
    convert = backbone.model.alphabet.get_batch_converter()
    last = backbone.num_layers

    def run() -> list[torch.Tensor]:
        means: list[Any] = [None] * len(sequences)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            for batch in fair_esm_batches(sequences):
                _, _, tokens = convert([(str(i), sequences[i]) for i in batch])
                hidden = backbone.model(tokens, repr_layers=[last])["representations"][last]
                mean_of_residues(hidden, batch, sequences, means)
        return means

    return run


def hugging_face(weights: Path, sequences: list[str], precision: str, faesm: bool) -> Callable[[], list[torch.Tensor]]:
    """`EsmModel` with SDPA, or faesm's version of it (which uses SDPA where flash-attn is missing)."""
    model = hugging_face_model(weights, faesm).to(getattr(torch, DTYPES[precision]))
    return padded_runs(sequences, lambda ids, mask: model(input_ids=ids, attention_mask=mask)[0])


def hugging_face_model(weights: Path, faesm: bool = False) -> torch.nn.Module:
    """The model without its head, in fp32."""
    from transformers import EsmConfig, EsmModel

    config = EsmConfig.from_pretrained(weights)
    if faesm:
        from faesm.esm import FAEsmModel

        config.use_fa = False
        model = FAEsmModel(config, add_pooling_layer=False)
    else:
        config._attn_implementation = "sdpa"
        model = EsmModel(config, add_pooling_layer=False)
    if (weights / "model.safetensors").exists():
        from safetensors.torch import load_file

        state = load_file(weights / "model.safetensors")
    else:
        state = torch.load(weights / "pytorch_model.bin", weights_only=True)
    state = {key.removeprefix("esm."): value for key, value in state.items() if key.startswith("esm.")}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert not [key for key in missing if "inv_freq" not in key and "position" not in key and "contact" not in key], (
        missing
    )
    return model.eval()


def padded_runs(
    sequences: list[str], forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Callable[[], list[torch.Tensor]]:
    """Padded batches through a model from tokens and mask, (B, T), to hidden states."""
    from transformers import EsmTokenizer

    vocabulary = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(vocabulary))
        tokenizer = EsmTokenizer(str(Path(folder) / "vocab.txt"))

    def run() -> list[torch.Tensor]:
        means: list[Any] = [None] * len(sequences)
        for batch in padded_batches(sequences):
            inputs = tokenizer([sequences[i] for i in batch], return_tensors="pt", padding=True)
            hidden = forward(inputs["input_ids"], inputs["attention_mask"])
            mean_of_residues(hidden, batch, sequences, means)
        return means

    return run


def esm_cpp(weights: Path, sequences: list[str]) -> Callable[[], None]:
    """esm-cpp's quantised weights and its own scheduling; it returns logits, and hidden states only one by one."""
    import esm_cpp as library
    import numpy as np

    model = library.Model.load_from_safetensors(str(weights / "model.safetensors"))
    model.quantize_weights()
    letters = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-"]
    inputs = [np.array([0, *(letters.index(letter) for letter in text), 2], np.int32) for text in sequences]

    def run() -> None:
        model.forward_scheduled(inputs)

    return run


def general_engine(name: str, weights: Path, sequences: list[str]) -> Callable[[], list[torch.Tensor]]:
    """Hugging Face's ESM-2 in int8 by an engine that knows no proteins."""
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
        inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        return torch.from_numpy(session.run(["hidden"], inputs)[0])

    return padded_runs(sequences, forward)


def distil_rank(weights: Path, sequences: list[str], precision: str) -> Callable[[], list[torch.Tensor]]:
    """Ours, as `embed` calls it; `PRECISION@LAYER` stops after that layer."""
    from distil_rank.embedding.backbone import load_backbone
    from distil_rank.embedding.embedder import Embedder

    backbone = load_backbone(str(weights))
    precision, _, exit_layer = precision.partition("@")
    layer = int(exit_layer or backbone.num_layers)
    if precision == "int8":
        from distil_rank.embedding.precision import calibrate

        _, encoder, figures = calibrate(backbone, sequences, layer)
        print(figures, file=sys.stderr)
        embedder = Embedder(backbone, layers=[layer], encoder=encoder)
    else:
        embedder = Embedder(backbone, precision=precision, layers=[layer])

    def run() -> list[torch.Tensor]:
        means: list[Any] = [None] * len(sequences)
        batches = embedder.batches([len(text) for text in sequences])
        for batch, result in embedder.stream((batch, [sequences[i] for i in batch]) for batch in batches):
            for i, vector in zip(batch, result.vectors, strict=True):
                means[i] = vector
        return means

    return run


def serve(baseline: str, weights: Path, sequences: list[str]) -> None:
    """A baseline's process: computes whenever a line comes in, and answers with seconds; keeps its last vectors."""
    name, precision = baseline.split()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a baseline's chatter is no answer
    if name == "distil-rank":
        run = distil_rank(weights, sequences, precision)
    elif name == "esm-cpp":
        run = esm_cpp(weights, sequences)
    elif name in ENGINES:
        run = general_engine(name, weights, sequences)
    elif name == "fair-esm":
        run = fair_esm(weights, sequences, precision)
    else:
        run = hugging_face(weights, sequences, precision, faesm=name == "faesm")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        with torch.inference_mode():
            vectors = run()
        print(time.perf_counter() - start, *memory(), file=answers, flush=True)
        if vectors is not None:
            torch.save(torch.stack(vectors), line.strip())


def memory() -> tuple[float, float]:
    """What this process holds in memory now, and the most it ever held, loading included, in GB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (int(status[name].split()[0]) * 1024 / 1e9 for name in ("VmRSS", "VmHWM"))
    return now, most


if __name__ == "__main__":
    baseline, weights, fasta, proteins, lengths = sys.argv[1:]
    serve(baseline, Path(weights), read_fasta(Path(fasta), int(proteins), lengths))
