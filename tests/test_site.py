"""The documentation site builds strictly, and loads nothing from elsewhere."""

import re
import shutil
import subprocess
import sys
import threading
import tomllib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.browser import open_browser

ROOT = Path(__file__).parents[1]
ZENSICAL = Path(sys.executable).with_name("zensical")
pytestmark = pytest.mark.skipif(not ZENSICAL.exists(), reason="zensical is not installed (the docs extra)")


PHONE = 390  # pixels


def copy_sources(folder: Path) -> None:
    """Copy what the site is made of."""
    for name in ("docs", "distil_rank"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("zensical.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)


@pytest.fixture
def project(tmp_path):
    """A copy of what the site is made of."""
    copy_sources(tmp_path)
    return tmp_path


def build(project: Path) -> subprocess.CompletedProcess:
    return subprocess.run([ZENSICAL, "build", "--strict"], cwd=project, capture_output=True, text=True, check=False)


def test_the_site_builds_strictly_and_is_self_contained(project):
    done = build(project)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.parent.relative_to(project / "site").as_posix(): path for path in project.glob("site/**/index.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} | {"."} == pages.keys()
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert {page for entry in nav for page in entry.values()} == {path.name for path in (ROOT / "docs").glob("*.md")}
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


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the built site, served."""
    folder = tmp_path_factory.mktemp("site")
    copy_sources(folder)
    assert build(folder).returncode == 0
    handler = partial(QuietHandler, directory=str(folder / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, *_):
        pass


def test_no_page_is_wider_than_a_phone(site, tmp_path):
    names = [f"{path.stem}/" for path in sorted((ROOT / "docs").glob("*.md")) if path.stem != "index"]
    with open_browser(tmp_path / "profile") as browser:
        phone = {"width": PHONE, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        for name in ["", *names]:
            browser.open(f"{site}/{name}")
            assert browser.count("article h1") == 1, name
            width = browser.driver.execute_script("return document.scrollingElement.scrollWidth")
            assert width <= PHONE, f"{name} is {width} pixels wide"
            browser.screenshot(f"phone-{name.strip('/') or 'index'}")
