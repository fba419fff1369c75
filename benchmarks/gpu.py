"""What `embedding.py --device cuda` measures: ESM-2 on one GPU, ours beside its baselines, and `embed` as a whole.

One process, one model in memory at a time, random weights, on which the time does not depend. Baselines that are not
installed are left out; all get batches by length, padded, of as many tokens as ours where they hold as many. Each
measurement is as many proteins as take about `SECONDS`, computed twice after a first batch; the better one counts.
On a CPU (`--device cpu`) a tiny model goes the same way, to try the script.
"""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import hugging_face_model, read_fasta
from embedding import SIZES, operations, random_model
from script import save_markdown
from torch import Tensor

from distil_rank.embedding.backbone import load_backbone
from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.extraction import MAX_TOKENS, tokens_that_fit
from distil_rank.embedding.gpu import GpuEncoder
from distil_rank.embedding.run import embed

SECONDS = 1.0  # of one measurement
BUDGET = 240.0  # seconds after which what is left out is named
ALPHABET = "LAGVSERTIDPKQNFYMHWC"
OURS = "ours, bf16, compiled"
BASE = "transformers, SDPA, bf16"
Run = Callable[[list[str]], Tensor]  # vectors of proteins, (N, dim), on the CPU


def drawn(number: int, shortest: int, longest: int) -> list[str]:
    """Random proteins of random lengths."""
    dice = random.Random(0)
    return ["".join(dice.choices(ALPHABET, k=dice.randint(shortest, longest))) for _ in range(number)]


def varied(sequences: list[str], number: int) -> list[str]:
    """As many distinct proteins of the lengths of these."""
    dice = random.Random(0)
    return [sequences[i % len(sequences)][:-3] + "".join(dice.choices(ALPHABET, k=3)) for i in range(number)]


def ours(weights: Path, device: torch.device, precision: str = "bf16", compiled: bool = False) -> Run:
    """As `embed` computes; on the CPU its own encoder."""
    backbone = load_backbone(str(weights))
    embedder = Embedder(backbone, precision=precision, device=device, max_tokens=tokens_of(device, backbone.dim))
    if compiled and isinstance(embedder.encoder, GpuEncoder):
        embedder.encoder.compile()

    def run(sequences: list[str]) -> Tensor:
        vectors = torch.empty(len(sequences), backbone.dim)
        batches = embedder.batches([len(text) for text in sequences])
        for batch, result in embedder.stream((batch, [sequences[i] for i in batch]) for batch in batches):
            vectors[batch] = result.vectors
        return vectors

    return run


def tokens_of(device: torch.device, dim: int) -> int:
    """Tokens in a batch."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return tokens_that_fit(memory, dim) if memory else MAX_TOKENS


def padded(forward: Callable[[Tensor], Tensor], backbone: Any, device: torch.device, tokens: int) -> Run:
    """Padded batches through a model from token numbers, (B, T), to hidden states, (B, T, C); means over residues."""

    def run(sequences: list[str]) -> Tensor:
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        means = []
        while sum(map(len, means)) < len(sequences):
            first = sum(map(len, means))
            longest = len(sequences[order[first]]) + 2
            batch = [sequences[i] for i in order[first : first + max(tokens // longest, 1)]]
            ids = np.full((len(batch), longest), backbone.model.alphabet.padding_idx)
            for row, text in enumerate(batch):
                ids[row, : len(text) + 2] = backbone.tokens.pack([text])[0]
            lengths = torch.tensor([len(text) for text in batch]).to(device)[:, None]
            positions = torch.arange(longest, device=device)
            inner = ((positions >= 1) & (positions <= lengths)).float()
            hidden = forward(torch.from_numpy(ids).to(device)).float()
            means.append(torch.einsum("btc,bt->bc", hidden, inner) / lengths)
        vectors = torch.empty(len(sequences), means[0].shape[1])
        vectors[order] = torch.cat(means).cpu()
        return vectors

    return run


def fair_esm(weights: Path, device: torch.device, autocast: bool) -> Run:
    """fair-esm's own forward, whose attention is not fused: batches of an eighth."""
    backbone: Any = load_backbone(str(weights))
    model, last = backbone.model.to(device), backbone.num_layers

    def forward(ids: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return model(ids, repr_layers=[last])["representations"][last]  # type: ignore[no-any-return]

    return padded(forward, backbone, device, tokens_of(device, backbone.dim) // 8)


def hugging_face(weights: Path, device: torch.device, faesm: bool = False, compiled: bool = False) -> Run:
    """`EsmModel` with SDPA in bf16, or faesm's version of it."""
    backbone: Any = load_backbone(str(weights))
    model: Any = hugging_face_model(weights, faesm).to(torch.bfloat16).to(device)
    model = torch.compile(model, dynamic=True) if compiled else model
    forward = partial(hidden_states, model, backbone.model.alphabet.padding_idx)
    return padded(forward, backbone, device, tokens_of(device, backbone.dim) // 2)


def hidden_states(model: Any, padding: int, ids: Tensor) -> Tensor:
    """Of a Hugging Face model."""
    return model(input_ids=ids, attention_mask=(ids != padding).long())[0]  # type: ignore[no-any-return]


def esm_efficient(weights: Path, device: torch.device) -> Run:
    """Packed, with flash-attn; with weights of its own, as its format is another."""
    from esme import ESM2

    backbone: Any = load_backbone(str(weights))
    with torch.device(device):
        model = ESM2(backbone.num_layers, backbone.dim, int(backbone.model.attention_heads)).eval()

    def run(sequences: list[str]) -> Tensor:
        order, means, tokens = sorted(range(len(sequences)), key=lambda i: -len(sequences[i])), [], 2**15
        while order[sum(map(len, means)) :]:
            rest, size = order[sum(map(len, means)) :], 0
            batch = [rest[0]]
            for i in rest[1:]:
                size += len(sequences[i]) + 2
                if size + len(sequences[rest[0]]) + 2 > tokens:
                    break
                batch.append(i)
            packed, lengths = backbone.tokens.pack([sequences[i] for i in batch])
            ends = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device)
            hidden = model.forward_representation(packed.to(device), (ends, max(lengths))).float()
            means.append(torch.stack([part[1:-1].mean(0) for part in hidden.split(lengths)]))
        vectors = torch.empty(len(sequences), backbone.dim)
        vectors[order] = torch.cat(means).cpu()
        return vectors

    return run


ENGINES: dict[str, Callable[[Path, torch.device], Run]] = {  # in the order in which they are measured
    OURS: partial(ours, compiled=True),
    BASE: hugging_face,
    "ours, bf16, not compiled": ours,
    "fair-esm, bf16 autocast": partial(fair_esm, autocast=True),
    "fair-esm, fp32": partial(fair_esm, autocast=False),
    "faesm, bf16": partial(hugging_face, faesm=True),
    "esm-efficient, bf16": esm_efficient,
    "transformers, SDPA, bf16, compiled": partial(hugging_face, compiled=True),
}


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds, with all that the device was told to do."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def product_rate(device: torch.device, width: int, tokens: int = 2**15) -> float:
    """Operations a second of bf16 products of the model's shapes."""
    tokens = tokens if device.type == "cuda" else 512
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    y = torch.randn(tokens, 4 * width, device=device, dtype=torch.bfloat16)
    weights = [torch.randn(n * width, width, device=device, dtype=torch.bfloat16) for n in (3, 1, 4)]
    back = torch.randn(width, 4 * width, device=device, dtype=torch.bfloat16)

    def products() -> None:
        for _ in range(10):
            for weight in weights:
                torch.nn.functional.linear(x, weight)
            torch.nn.functional.linear(y, back)

    return 10 * 2 * 12 * tokens * width**2 / min(timed(products, device) for _ in range(4))


def in_memory(
    size: str, weights: Path, sets: dict[str, list[str]], device: torch.device, left: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """A row for each engine and set of proteins."""
    check = sets[next(iter(sets))][:64]
    reference = ours(weights, device, "fp32")(check)
    rate = product_rate(device, reference.shape[1])
    for name, make in ENGINES.items():
        row: dict[str, Any] = {"size": size, "engine": name}
        if left() < 0:
            yield row | {"missing": "no time left"}
            continue
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            start = time.perf_counter()
            with torch.no_grad():
                run = make(weights, device)
                vectors = run(check)
                row["first_seconds"] = time.perf_counter() - start
                cosine = torch.cosine_similarity(vectors - vectors.mean(0), reference - reference.mean(0))
                row["worst_cosine"] = None if "esm-efficient" in name else float(cosine.min())
                for key, sequences in sets.items():
                    few = sequences[:: max(len(sequences) // 32, 1)][:32]
                    run(few)
                    share = SECONDS / timed(partial(run, few), device) * len(few)
                    some = sequences[:: max(round(len(sequences) / max(share, 1)), 1)]
                    seconds = min(timed(partial(run, some), device) for _ in range(2))
                    work = operations(weights, [len(text) for text in some]) / seconds
                    row[key] = {"residues_per_second": sum(map(len, some)) / seconds, "share": work / rate}
            if device.type == "cuda":
                row["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        except Exception as error:  # a baseline that is not installed, or does not run here
            row["missing"] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        run = None  # its model leaves the device
        yield row


def whole_command(
    weights: Path, sample: list[str], numbers: tuple[int, int, int], device: torch.device, folder: Path
) -> Iterator[dict[str, Any]]:
    """`embed` from FASTA to store: seconds to the first batch and in all."""
    few, many, residues = numbers
    cases: list[tuple[str, int, dict[str, Any]]] = [
        ("mean", few, {}),
        ("mean, again", few, {}),
        ("mean", many, {}),
        ("mean, again", many, {}),
        ("residue vectors", residues, {"pooling": "residue"}),
        ("all layers", few, {"layer": "all"}),
    ]
    stream, options = Embedder.stream, {"backbone": str(weights), "accelerator": device.type}
    for case, (label, number, more) in enumerate(cases):
        texts = varied(sample, number)
        fasta, first = folder / f"{case}.fasta", []
        fasta.write_text("".join(f">p{i}\n{text}\n" for i, text in enumerate(texts)))

        def noted(self: Embedder, batches: Any, first: list[float] = first) -> Any:
            for item in stream(self, batches):
                first.append(time.perf_counter())
                yield item

        Embedder.stream = noted  # type: ignore[method-assign]
        start = time.perf_counter()
        summary = embed(fasta, folder / f"store{case}", precision="bf16", **{**options, **more})  # type: ignore[arg-type]
        seconds = time.perf_counter() - start
        Embedder.stream = stream  # type: ignore[method-assign]
        yield {
            "what": label,
            "proteins": number,
            "first_batch_seconds": first[0] - start,
            "seconds": seconds,
            "residues_per_second": sum(map(len, texts)) / seconds,
            "computing_residues_per_second": summary.residues_per_second,
            "kernels": summary.precision_note,
        }
    fasta = folder / "0.fasta"
    command = [sys.executable, "-m", "distil_rank", "embed", "--fasta", fasta, "--store", folder / "process"]
    command += [part for key, value in options.items() for part in (f"--{key}", value)] + ["--precision", "bf16"]
    seconds = timed(lambda: subprocess.run(command, check=True, capture_output=True), torch.device("cpu"))
    rate = sum(map(len, varied(sample, few))) / seconds
    yield {"what": "mean, a new process", "proteins": few, "seconds": seconds, "residues_per_second": rate}


def facts(weights: Path, sequences: list[str], device: torch.device) -> dict[str, Any]:
    """Seconds to the device, waits inside batches, the same bytes, and a protein alone beside one in a batch."""
    load_backbone(str(weights))  # its hash is known from here on
    run: Any = None
    seconds = timed(lambda: ours(weights, device), device)
    run = ours(weights, device)
    together = run(sequences)
    same = torch.equal(together, run(sequences))
    alone = torch.cat([run([text]) for text in sequences[:32]])
    mean = together.mean(0)
    cosine = torch.cosine_similarity(alone - mean, together[:32] - mean).min().item()
    waits: int | None = None
    if device.type == "cuda":
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            run(sequences)
            torch.cuda.set_sync_debug_mode("default")
            waits = sum("synchroniz" in str(warning.message) for warning in noted)
    return {"load_seconds": seconds, "waits": waits, "same_bytes": same, "worst_cosine_alone_to_batch": cosine}


def compare(device: torch.device, fasta: Path, output: Path) -> None:
    """Measures, and writes the output: JSON, and a page with tables."""
    begun = time.perf_counter()
    card = device.type == "cuda"
    sample = [text[:1022] for text in read_fasta(fasta, 2500 if card else 8)]
    sets = {"50-300": drawn(20_000, 50, 300), "600-1000": drawn(4000, 600, 1000), "sample": sample}
    if not card:
        sets = {key: texts[:8] for key, texts in sets.items()}
    sizes = {"650M": SIZES["650M"], "8M": SIZES["8M"]} if card else {"tiny": (2, 64, 4)}
    rows: list[dict[str, Any]] = []
    commands: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for number, (size, shape) in enumerate(sizes.items(), start=1):
            folder = Path(name) / size
            folder.mkdir()
            weights = random_model(shape, folder)
            if number == 1:
                found = facts(weights, sample[:256], device)
                commands = list(
                    whole_command(weights, sample, (2500, 10_000, 1000) if card else (9, 12, 3), device, folder)
                )
            end = begun + BUDGET * (0.4 + 0.6 * number / len(sizes))
            rows += in_memory(size, weights, sets, device, lambda end=end: end - time.perf_counter())
    result = {"in_memory": rows, "whole_command": commands, "facts": found, "seconds": time.perf_counter() - begun}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    save_markdown(output.with_suffix(".md"), page(result, list(sets)))


def page(result: dict[str, Any], sets: list[str]) -> list[str]:
    """The tables."""
    lines = [
        f"| in memory, residues a second | {' | '.join(sets)} | of the products' rate | GB | first 64, s | cosine |"
    ]
    lines.append("|---" * (len(sets) + 5) + "|")
    for row in result["in_memory"]:
        cells = [f"{row['size']}: {row['engine']}"]
        if "missing" in row:
            lines.append(f"| {cells[0]} | {row['missing']} |{' |' * (len(sets) + 3)}")
            continue
        cells += [f"{row[key]['residues_per_second']:,.0f}" for key in sets]
        cells += [" / ".join(f"{row[key]['share']:.0%}" for key in sets)]
        cells += [f"{row['peak_gb']:.1f}" if "peak_gb" in row else "–", f"{row['first_seconds']:.1f}"]
        cells += ["–" if row["worst_cosine"] is None else f"{row['worst_cosine']:.5f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| `embed` | proteins | first batch, s | all, s | residues a second | while computing | with |"]
    lines.append("|---" * 7 + "|")
    for row in result["whole_command"]:
        first, rate = row.get("first_batch_seconds"), row.get("computing_residues_per_second")
        cells = [row["what"], f"{row['proteins']:,}", "–" if first is None else f"{first:.1f}", f"{row['seconds']:.1f}"]
        cells += [
            f"{row['residues_per_second']:,.0f}",
            "–" if rate is None else f"{rate:,.0f}",
            row.get("kernels") or "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    found = result["facts"]
    lines += ["", "| | |", "|---|---|", f"| weights to the device, s, hash known | {found['load_seconds']:.1f} |"]
    lines += [f"| waits for the device inside batches | {found['waits']} |"]
    lines += [f"| the same bytes twice | {found['same_bytes']} |"]
    cosine = found["worst_cosine_alone_to_batch"]
    return [*lines, f"| worst centred cosine of a protein alone to it in a batch | {cosine:.6f} |"]
