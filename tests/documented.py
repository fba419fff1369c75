"""The code in the documentation's pages, and a folder where `make` tells what it would start."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```|`([^`]+)`", re.MULTILINE | re.DOTALL)
SHELL = ("", "sh", "bash")  # a block without a language is shell, so that none is forgotten
IN_TEXT = "in the text"
TYPED = re.compile(r"(?:make|distil-rank|cp|pip|mlflow|srun|(?:\.venv/bin/)?(?:python|distil-rank|pip))\b")
# What a recorded program writes: its arguments, ended by NUL, and a line feed behind the last.
RECORDER = "#!/bin/sh\n{{ printf '%s\\0' {name} \"$@\"; printf '\\n\\0'; }} >> \"$CALLS\"\n"
RECORDED = (
    "distil-rank",
    "mlflow",
    "python",
    "pip",
    "pytest",
    "zensical",
    "ruff",
    "mypy",
    "jupyter-execute",
    "git",
    "pre-commit",
    "ray",
)


@dataclass(frozen=True)
class Code:
    """A fenced block, or a command between backticks in the running text.

    Attributes:
        language: what follows the fence; `IN_TEXT` where there is none.
        text: what it holds.
    """

    language: str
    text: str

    def commands(self) -> list[str]:
        """Shell commands, each on one line and without its comment."""
        if self.language not in (*SHELL, IN_TEXT):
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]


def code_of(page: Path) -> list[Code]:
    """All code of a page in its order: the fenced blocks, and what begins like a command in the text."""
    found = []
    for match in CODE.finditer(page.read_text()):
        _, language, block, span = match.groups()
        if span is None:
            found.append(Code(language, block))
        elif TYPED.match(span):
            found.append(Code(IN_TEXT, " ".join(span.split())))
    return found


def is_a_name(command: str, page: Path) -> bool:
    """Whether words in the text name a program or a target; in the README even a target alone is to be typed."""
    bare = re.fullmatch(r"(make|distil-rank)( [a-z-]+)?", command) and not (page.name == "README.md" and " " in command)
    return bool(bare) or "COMMAND" in command or "…" in command


def commands_of(page: Path) -> dict[str, bool]:
    """The commands that a page tells to type, in order, and whether they stand in a block."""
    found = {command: code.language != IN_TEXT for code in code_of(page) for command in code.commands()}
    return {command: block for command, block in found.items() if block or not is_a_name(command, page)}


class Checkout:
    """A folder with the real Makefile, in whose `.venv/bin` programs are recorded and not run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / ".venv" / "bin"
        programs.mkdir(parents=True)
        for name in RECORDED:
            (programs / name).write_text(RECORDER.format(name=name))
            (programs / name).chmod(0o755)
        (programs / "srun").write_text('#!/bin/sh\nwhile [ "$1" != distil-rank ]; do shift; done\nexec "$@"\n')
        (programs / "srun").chmod(0o755)
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        for name in ("installed", "installed-dev"):  # newer than what they depend on
            (folder / ".venv" / name).touch()
        (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
        (folder / "results").mkdir(exist_ok=True)

    def calls(self, command: str) -> list[list[str]]:
        """Run a command in the shell, and tell which programs it starts, with their arguments.

        A command that fails fails the test.
        """
        recorded = self.folder / ".venv" / "calls"
        recorded.unlink(missing_ok=True)
        programs = str(self.folder / ".venv" / "bin")
        env = {**reader_environment(), "CALLS": str(recorded), "PATH": f"{programs}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-euc", command], cwd=self.folder, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        text = recorded.read_text() if recorded.exists() else ""
        return [call.split("\0")[:-1] for call in text.split("\n\0")[:-1]]


def reader_environment() -> dict[str, str]:
    """This process's environment without what `make test ARGS=...` puts there for the programs that it starts."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "ARGS"))}


class Parsed(BaseException):
    """A parser accepted its arguments."""


@contextmanager
def parse_only() -> Iterator[None]:
    """Inside, the first parser that accepts its arguments ends the program with `Parsed`."""
    import argparse

    import jsonargparse

    with pytest.MonkeyPatch.context() as patch:
        for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
            real = parser.parse_args

            def parse(self, *args, real=real, **kwargs):
                real(self, *args, **kwargs)
                raise Parsed

            patch.setattr(parser, "parse_args", parse)
        yield


def parses(run, *arguments: object) -> bool:
    """Whether a program's own parser accepts what it is given."""
    with parse_only():
        try:
            run(*arguments)
        except Parsed:
            return True
        except SystemExit:
            return False
    return False


def run_script(arguments: list[str]) -> None:
    """Run a Python script in this process, as `python SCRIPT ARGUMENTS` would."""
    import runpy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        patch.syspath_prepend(str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
