"""The benchmark scripts: input that is not there is one line and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("command", [["int8_bytes.py"], ["recipe.py"], ["recommendation.py"], ["codes.py", "million"]])
def test_data_that_are_not_there_are_one_line_and_exit_code_2(command, tmp_path):
    script, *arguments = command
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--data", "absent/absent.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "absent" in done.stderr.strip().splitlines()[-1]
