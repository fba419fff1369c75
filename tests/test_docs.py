"""The code in the documentation runs as it stands."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.filterwarnings("ignore:No complete tensor found")  # torch.export's own, about its own file
def test_your_own_layer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "your_own_layer.md").read_text(), re.DOTALL)
    names = {}
    exec("\n".join(blocks), names)
    assert names["small"].rank == 8 and names["layer"].rank == names["report"].layers[0].rank
    assert names["report"].layers[0].held_out_r2 > 0.98
    assert len(blocks[0].splitlines()) < 20
