"""Perturbed copies of proteins, embedded as the proteins themselves were, and kept as an ordinary store."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distil_rank.codes.augment import Augmentation
from distil_rank.embedding.layers import State
from distil_rank.embedding.run import OPTIONS, embed, options_like
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copies:
    """Embedded copies.

    Attributes:
        x: `(C, d)` float32.
        owner: index of the protein that each is a copy of, `(C,)`.
        sequences: the copies themselves, C.
    """

    x: np.ndarray
    owner: np.ndarray
    sequences: list[str] = field(default_factory=list)


def embed_copies(
    sequences: Sequence[str], chosen: np.ndarray, how: Augmentation, about: Mapping[str, Any], folder: str | Path
) -> Copies:
    """Perturb some proteins and embed the copies, unless that was done before.

    Args:
        sequences: of all proteins.
        chosen: indices of those to perturb.
        how: rates and seed.
        about: the manifest of the proteins' own store: backbone, layer, pooling, precision.
        folder: where stores of copies are kept.

    Raises:
        InputError: the backbone is not known or cannot be had, or its weights differ from those of the store.
    """
    [copies] = embed_copies_by_layer(sequences, chosen, how, [about], folder)
    return copies


def embed_copies_by_layer(
    sequences: Sequence[str],
    chosen: np.ndarray,
    how: Augmentation,
    layers: Sequence[Mapping[str, Any]],
    folder: str | Path,
) -> list[Copies]:
    """The same at several layers of one backbone, in one pass.

    Args:
        sequences: of all proteins.
        chosen: indices of those to perturb.
        how: rates and seed.
        layers: what the proteins' own store tells of each of its layers.
        folder: where stores of copies are kept.

    Raises:
        InputError: as for one layer.
    """
    about = layers[-1]
    if about.get("weights_sha256") is None or about.get("backbone") is None:
        raise InputError(
            "Expected vectors of a known backbone to embed perturbed copies with but these do not tell theirs; give a "
            "store made by embed, or another source of noise (--noise labels or clusters)."
        )
    texts = {f"{row}.{number}": text for row in chosen.tolist() for number, text in enumerate(how.of(sequences[row]))}
    settings = {key: about[key] for key in OPTIONS}
    names = [str(one["layer"]) for one in layers]
    if len(names) > 1:
        settings["layer"] = ",".join(names)
    content = json.dumps([about["weights_sha256"], settings, asdict(how), texts, *_calibration(about)])
    path = Path(folder) / f"copies-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    fasta = path.with_suffix(".fasta")
    fasta.parent.mkdir(parents=True, exist_ok=True)
    fasta.write_text("".join(f">{name}\n{text}\n" for name, text in texts.items()))
    log.info("Embedding %s perturbed copies of %s proteins", f"{len(texts):,}", f"{len(chosen):,}")
    embed(fasta, path, about["backbone"], **{**options_like(about, about.get("source")), **settings})
    store = Store.open(path)
    if store.manifest["weights_sha256"] != about["weights_sha256"]:
        raise InputError(
            f"Expected the weights {about['weights_sha256'][:12]}… of the store but {about['backbone']} now has "
            f"{store.manifest['weights_sha256'][:12]}…; embed the proteins again, or restore the weights."
        )
    ids = store.ids
    proteins = store.protein_of_row()
    owner = np.array([int(ids[protein].partition(".")[0]) for protein in proteins])
    copied = [store.sequences[protein] for protein in proteins]
    stores = [store.at(State.parse(name)) for name in names] if len(names) > 1 else [store]
    return [Copies(one.embeddings(), owner, copied) for one in stores]


def _calibration(about: Mapping[str, Any]) -> list[str]:
    """What the vectors depend on beside the settings, in int8."""
    return [about["calibration_sha256"]] if "calibration_sha256" in about else []
