"""From a protein's sequence to its code, or to the vector of a backbone that was shortened or saved in int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Self

import numpy as np
import torch
from torch import nn

from distil_rank.deployment.artefact import load
from distil_rank.embedding.backbones import load_backbone
from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.extraction import MAX_TOKENS
from distil_rank.embedding.layer_spec import parse_layers
from distil_rank.embedding.precision import saved_encoder
from distil_rank.embedding.saved_int8 import is_int8, open_int8
from distil_rank.embedding.sequences import CleaningReport, clean_sequence
from distil_rank.embedding.shortened import POOLED_ALIKE, is_shortened, read_shortened
from distil_rank.errors import InputError
from distil_rank.lowrank.code_map import CodeMap


@dataclass(frozen=True)
class Recipe:
    """How a sequence becomes the vector that is coded.

    Attributes:
        backbone: As `load_backbone` takes it.
        weights_sha256: That it must have; None where nobody knows.
        pooling: `mean` or `bos`.
        layer: Whose states are pooled; None for the last.
        precision: `fp32`, `bf16`, or `int8` for a backbone that was saved in it.
        long: What happens to proteins above `max_length`, as `embed` has it.
        max_length: Residues in a pass.
    """

    backbone: str
    weights_sha256: str | None = None
    pooling: str = "mean"
    layer: str | None = None
    precision: str = "fp32"
    long: str = "window"
    max_length: int = 1022


def is_backbone(folder: Path) -> bool:
    """Whether a folder holds a backbone that this package has written, shortened or in int8."""
    return is_shortened(folder) or is_int8(folder)


def recipe_of(folder: Path, backbone: str | None = None, precision: str = "auto") -> Recipe:
    """What a backbone or a code map says of the vectors.

    Args:
        folder: Of either.
        backbone: Of the vectors of a code map that does not name it, or another place of the same weights.
        precision: As in `Recipe`; `auto` is int8 for a backbone that was saved in it, fp32 for others.

    Raises:
        InputError: it is neither, is damaged, or does not say.
    """
    if is_backbone(folder):
        stops = read_shortened(folder)[0] if is_shortened(folder) else open_int8(folder).exit
        pooling = POOLED_ALIKE[stops.pooling][0] if stops else "mean"
        return Recipe(str(folder.absolute()), pooling=pooling, precision=_precision(precision, folder))
    code_map = load(folder)
    if not isinstance(code_map, CodeMap):
        raise InputError(f"Expected a code map or a backbone in {folder} but it holds something else.")
    about = code_map.provenance
    name = backbone or about.get("backbone")
    if not name or about.get("pooling") == "residue":
        raise InputError(f"Expected {folder} to name the backbone of its vectors but it does not; use --backbone.")
    if Path(name).exists():
        name = str(Path(name).absolute())
    layer = about.get("layer")
    pooling = about.get("pooling") or "mean"
    return Recipe(
        name,
        about.get("weights_sha256"),
        pooling,
        None if layer is None else str(layer),
        _precision(precision, Path(name)),
        **{key: about[key] for key in ("long", "max_length") if key in about},
    )


def _precision(requested: str, backbone: Path) -> str:
    if requested != "auto":
        return requested
    return "int8" if is_int8(backbone) else "fp32"


class Predictor:
    """Answers for sequences. Made by `load`.

    Args:
        embedder: That makes the vectors.
        code_map: That makes codes of them; None for the vectors themselves.
        long: What happens to proteins that are longer than the embedder's window.
    """

    def __init__(self, embedder: Embedder, code_map: nn.Module | None, long: str = "window"):
        self.embedder, self.code_map, self.long = embedder, code_map, long
        self._one_at_a_time = Lock()  # the server answers each request in a thread, and one keeps all cores busy

    @classmethod
    def load(cls, recipe: Recipe, folder: str | Path) -> Self:
        """Loads backbone and code map, onto a GPU where there is one.

        Args:
            recipe: How to make the vectors.
            folder: Of the code map or the backbone.

        Raises:
            InputError: one is missing, or they do not belong together.
        """
        folder = Path(folder)
        alone = is_backbone(folder)
        backbone = load_backbone(str(folder) if alone else recipe.backbone)
        if recipe.weights_sha256 not in (None, backbone.sha256):
            raise InputError(
                f"Expected the weights {str(recipe.weights_sha256)[:12]}… that the code map was fitted to but "
                f"{recipe.backbone} has {backbone.sha256[:12]}…; name theirs with --backbone."
            )
        device = torch.device("cuda" if torch.cuda.is_available() and backbone.int8 is None else "cpu")
        layers = None if alone else parse_layers(recipe.layer, backbone.num_layers, backbone.name)
        last = layers[-1].layer if layers else backbone.exit.layer if backbone.exit else backbone.num_layers
        embedder = Embedder(
            backbone,
            recipe.pooling,  # type: ignore[arg-type]  # out of a JSON file
            "fp32" if backbone.int8 else recipe.precision,  # not used where there is an encoder
            device,
            layers,
            recipe.max_length,
            MAX_TOKENS[device.type],
            saved_encoder(backbone, recipe.precision, device, last),
        )
        return cls(embedder, None if alone else load(folder), recipe.long)

    @torch.no_grad()
    def __call__(self, sequences: Sequence[str]) -> np.ndarray:
        """One row for each sequence, (N, width): float32 vectors, or a code's numbers.

        Raises:
            InputError: a sequence is empty, holds what is no amino acid, or does not fit into memory.
        """
        report = CleaningReport("the request")
        texts = [
            self._within(clean_sequence(text, number, report), number) for number, text in enumerate(sequences, start=1)
        ]
        found = torch.empty(len(texts), self.embedder.dim)
        with self._one_at_a_time:
            for batch in self.embedder.batches([len(text) for text in texts]):
                done = self.embedder.embed([texts[i] for i in batch])
                if 0 in done.counts:
                    number = batch[done.counts.index(0)] + 1
                    raise InputError(f"Expected sequences that fit into memory but number {number} does not.")
                found[batch] = done.vectors.cpu()
        return (self.code_map.encode(found) if isinstance(self.code_map, CodeMap) else found).numpy()

    def _within(self, text: str, number: int) -> str:
        """The sequence as the vectors' store treats long ones."""
        limit = self.embedder.window
        if limit is None or len(text) <= limit or self.long == "window":
            return text
        if self.long == "error":
            raise InputError(f"Expected at most {limit} residues but sequence {number} has {len(text)}.")
        return text[:limit]
