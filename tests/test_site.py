"""The documentation site builds strictly, and loads nothing from elsewhere."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ZENSICAL = Path(sys.executable).with_name("zensical")
pytestmark = pytest.mark.skipif(not ZENSICAL.exists(), reason="zensical is not installed (the docs extra)")


@pytest.fixture
def project(tmp_path):
    """A copy of what the site is made of."""
    for name in ("docs", "distil_rank"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("zensical.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def build(project: Path) -> subprocess.CompletedProcess:
    return subprocess.run([ZENSICAL, "build", "--strict"], cwd=project, capture_output=True, text=True, check=False)


def test_the_site_builds_strictly_and_is_self_contained(project):
    done = build(project)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.parent.relative_to(project / "site").as_posix(): path for path in project.glob("site/**/index.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= pages.keys()
    loaded = re.compile(
        r"<(?:script|img)[^>]*\ssrc=\"https?:|<link[^>]*rel=\"?(?:stylesheet|preload|icon)\"?[^>]*\shref=\"https?:"
    )
    for name, page in pages.items():
        assert not loaded.search(page.read_text()), name
    assert "LowRankLinear" in pages["api"].read_text()


def test_a_broken_link_fails(project):
    page = project / "docs" / "scaling.md"
    page.write_text(page.read_text() + "\n[nowhere](absent.md)\n")
    done = build(project)
    assert done.returncode != 0
    assert "page does not exist" in done.stdout + done.stderr
