"""What code and search refuse before any work, and without the libraries that take seconds to import."""

import subprocess
import sys

import pytest

from distil_rank.errors import InputError
from distil_rank.options.codes import AugmentationOptions, CodeOptions, SearchOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CodeOptions(augmentation=AugmentationOptions(window=0.0)), "window in (0, 1]"),
        (CodeOptions(augmentation=AugmentationOptions(window=1.5)), "window in (0, 1]"),
        (CodeOptions(augmentation=AugmentationOptions(substitutions=-0.1)), "substitutions in [0, 1]"),
        (CodeOptions(augmentation=AugmentationOptions(window=1.0, substitutions=0.0)), "differ"),
        (CodeOptions(augmentation=AugmentationOptions(copies=0)), "copies of at least 1"),
        (CodeOptions(augmentation=AugmentationOptions(proteins=0)), "proteins of at least 1"),
        (CodeOptions(rank=0), "--rank of at least 1"),
        (CodeOptions(train=-1), "--train of at least 0"),
        (CodeOptions(regularisation=-1), "--regularisation"),
        (CodeOptions(fit_fraction=1), "between 0 and 1"),
        (CodeOptions(metric="whitened", noise="labels"), "invariant metric only"),
        (CodeOptions(metric="whitened", regularisation=0), "--regularisation above 0"),
        (CodeOptions(encoder="folder", rank=8), "no --rank with --encoder"),
        (SearchOptions(), "but got none"),
        (SearchOptions(fasta="x", self=True), "but got --fasta and --self"),
        (SearchOptions(self=True, hits=0), "at least 1"),
        (SearchOptions(self=True, evalue=-1), "E-value above 0"),
        (SearchOptions(self=True, evalue=0.01, decoys=0), "decoys to estimate it with"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(InputError) as caught:
        options.check()
    assert message in str(caught.value)


def test_what_is_taken():
    CodeOptions().check()
    CodeOptions(data="store", encoder="folder", codes="others").check()
    SearchOptions(self=True).check()


def test_nothing_heavy_is_imported():
    code = "import sys, distil_rank.options.codes; sys.exit(bool({'torch', 'numpy', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
