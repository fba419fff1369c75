"""The Containerfile installs what a wheel needs, as .ci/check_package does. No container engine is needed."""

import json
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINES = [line.split(maxsplit=1) for line in (ROOT / "Containerfile").read_text().splitlines() if line[:1] != "#"]


def arguments(instruction: str) -> list[list[str]]:
    return [rest.split() for name, rest in LINES if name == instruction]


def test_every_copied_file_exists_and_the_wheel_has_all_it_takes():
    copied = {source for words in arguments("COPY") for source in words[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", "constraints.txt", project["project"]["readme"]}
    assert {*needed, *wheel["packages"], *wheel["force-include"]} <= copied


def test_it_is_installed_as_the_check_of_the_package_installs_it():
    install = next(words for words in arguments("RUN") if words[0] == "pip")
    checked = next(line for line in (ROOT / ".ci" / "check_package").read_text().splitlines() if 'pip" install' in line)
    assert install[:-1] == ["pip", *checked.split()[1:-1]] and install[-1] == "."


def test_it_starts_the_command_as_an_ordinary_user():
    names = [name for name, _ in LINES]
    assert names.index("USER") < names.index("ENTRYPOINT") and arguments("USER") != [["root"]]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    [entry] = [json.loads(rest) for name, rest in LINES if name == "ENTRYPOINT"]
    assert len(entry) == 1 and entry[0] in scripts
