"""The benchmark scripts: input that is not there is one line and exit code 2."""

from pathlib import Path

import pytest

from tests.documented import run_script

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    "command", [["recipe.py"], ["recommendation.py"], ["codes.py", "million"], ["search.py", "folds"]]
)
def test_data_that_are_not_there_are_one_line_and_exit_code_2(command, tmp_path, monkeypatch, capsys):
    script, *arguments = command
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_script([str(BENCHMARKS / script), *arguments, "--data", "absent/absent.npz"])
    assert ended.value.code == 2
    assert "absent" in capsys.readouterr().err.strip().splitlines()[-1]
