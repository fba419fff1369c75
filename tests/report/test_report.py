"""Printed tables: every figure whole, whatever the terminal's width."""

import pytest
from rich.console import Console

from distil_rank.report.report import NARROW, _print_table

HEAD = ["method", "R²", "95 %", "cen. cos", "kNN@10", "cos p5", "cosine", "rel. MSE", "optimum", "probe"]
ROW = [
    "Distil-Rank",
    "-0.9986",
    "[-0.998, 0.999]",
    "0.9992",
    "0.9978",
    "0.9997",
    "0.9999",
    "1.6e-04",
    "100.0 % ≈",
    "0.88",
]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_figures_are_never_cut(width):
    console = Console(width=width, record=True)
    _print_table(console, "title", HEAD, [ROW])
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    retained = [cell for cell in ROW if cell in text]
    assert {"Distil-Rank", "-0.9986", "100.0 % ≈"} <= set(retained)
    assert ("the report has all" in text) == (len(retained) < len(ROW)) == (width < 200)
    assert set(HEAD) - set(NARROW) == {"method", "R²", "optimum"}
