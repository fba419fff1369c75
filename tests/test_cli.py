import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distil_rank.cli import COMMANDS, lightning_options, main, parse
from distil_rank.errors import InputError

# One refusal a command: a value out of range, a contradiction, an unknown option, or a file that is not there.
REFUSED = {
    "embed": "--max_length 0",
    "train-teacher": "--teacher.steps 0",
    "distil": "--trainer.max_stpes 5",
    "benchmark": "--rank 0",
    "sweep": "--data.val_fraction 1.5",
    "compress": "--model missing.safetensors",
    "export": "--artefact missing",
    "evaluate": "--task colouring",
    "code": "--dtype bits",
    "search": "--self true --fasta proteins.fasta",
    "recommend": "--keep 7",
    "predict": "--model missing --fasta proteins.fasta",
    "ui": "--port -1",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_at_most_sixty_lines(name, capsys):
    with pytest.raises(SystemExit):
        parse(name, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 140
    assert all("None" not in line and "type:" not in line for line in lines)


def test_refusals_are_one_line_within_two_seconds_and_without_torch(tmp_path):
    program = f"""
import contextlib, io, sys, time
from distil_rank.cli import main
for name, options in {REFUSED}.items():
    started, error = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stderr(error):
        code = main([name, *options.split()])
    lines = error.getvalue().splitlines()
    assert code == 2 and len(lines) == 1, (name, code, lines)
    assert time.perf_counter() - started < 2, name
heavy = {{"torch", "lightning", "mlflow", "pandas"}} & set(sys.modules)
assert not heavy, heavy
"""
    assert set(REFUSED) == set(COMMANDS)
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    "name", ["train-teacher", "distil", "benchmark", "sweep", "evaluate", "code", "recommend", "search"]
)
def test_results_that_cannot_be_written_are_refused_before_any_work(tmp_path, name):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "results"):
        with pytest.raises(InputError, match=r"Expected a folder to save to at .* is a file; name another place"):
            parse(name, ["--output", str(place), *(["--self", "true"] if name == "search" else [])])


@pytest.mark.parametrize("content", [b"\xff\xfe\xaf\x00", b"id\tlabel\n" * 999, b"{", b""])
def test_a_configuration_that_is_none_is_one_line(tmp_path, content, capsys):
    (tmp_path / "c.yaml").write_bytes(content)
    assert main(["distil", "--config", str(tmp_path / "c.yaml"), "--rank", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("distil-rank: ") and error.count("\n") == 1 and len(error) < 400


def test_options_are_layered_from_files_and_the_command_line(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("rank: 8\ntrainer:\n  max_steps: 7\n")
    second.write_text("rank: 16\nteacher:\n  kind: random\n")
    options = parse("distil", ["--config", str(first), "--config", str(second), "--data.source", "synthetic"])
    assert (options.rank, options.teacher.kind, options.data.source) == (16, "random", "synthetic")
    assert options.trainer == {"max_steps": 7}


@pytest.mark.parametrize(("written", "seeds"), [("42", [42]), ("1,2", [1, 2]), ("[1, 2]", [1, 2])])
def test_a_list_needs_no_brackets(written, seeds):
    assert parse("distil", ["--data.source", "synthetic", "--seeds", written]).seeds == seeds


def test_trainer_options_are_those_of_the_installed_lightning():
    import inspect

    from lightning import Trainer

    assert set(lightning_options()) < set(inspect.signature(Trainer.__init__).parameters)
    assert "max_steps" in lightning_options()
    with pytest.raises(InputError, match="max_stpes"):
        parse("distil", ["--data.source", "synthetic", "--trainer.max_stpes", "5"])


def test_trainer_help_needs_no_lightning(capsys):
    assert main(["distil", "--trainer.help"]) == 0
    assert "--trainer.max_steps (default: -1)" in capsys.readouterr().out


def test_judge_is_evaluate_for_one_release_and_says_so(capsys):
    assert main(["judge", "--task", "colouring"]) == 2
    assert "judge is called evaluate now" in capsys.readouterr().err


def test_unknown_commands_and_interrupts(capsys, monkeypatch):
    assert main(["distill"]) == 2
    assert "distil, benchmark" in capsys.readouterr().err

    def interrupted(name, argv):
        raise KeyboardInterrupt

    def interrupted_as_lightning_does_it(name, argv):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904

    for stopped in (interrupted, interrupted_as_lightning_does_it):
        monkeypatch.setattr("distil_rank.cli.parse", stopped)
        assert main(["distil"]) == 130
        assert capsys.readouterr().err == "distil-rank: stopped; what was finished stays.\n"


def test_a_full_disk_is_one_line(capsys, monkeypatch):
    def full(options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("distil_rank.commands.evaluate.evaluate", full)
    assert main(["evaluate"]) == 2
    assert capsys.readouterr().err.strip().endswith("No space left on device; what was finished stays.")


def test_passwords_are_neither_logged_nor_in_a_traceback():
    program = """
import logging
from distil_rank.cli import configure_output
configure_output(0)
logging.getLogger("distil_rank").info("runs go to %s", "mysql://me:secret@host/db")
raise RuntimeError("no answer of mysql://me:secret@host/db")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "secret" not in ended.stderr
    assert "runs go to mysql://host/db\nTraceback" in ended.stderr
    assert ended.stderr.endswith("RuntimeError: no answer of mysql://host/db\n")


def test_make_takes_variables_from_its_command_line_alone_and_becomes_the_command():
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    env |= {"DATA": "/scratch", "RANK": "3", "ARGS": "--nonsense"}  # as clusters and launchers set them
    command = ["make", "-n", "-o", ".venv/installed", "distil", "TEACHER=random"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["exec", ".venv/bin/distil-rank", "distil", "--teacher.kind", '"random"']
