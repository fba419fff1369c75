"""A headless Chromium to look at pages with, as a user would see them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,1100",
)


class Browser:
    """One browser window; `sees` waits, because the pages are drawn by scripts."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        self.driver.get("about:blank")  # a change after the '#' alone would not load the page anew
        self.driver.get(address)

    def text(self) -> str:
        return self.driver.execute_script("return document.body.innerText")

    def sees(self, *words: str, seconds: float = 30) -> bool:
        """Whether all the words come up on the page within so many seconds."""
        return self._until(lambda: all(word in self.text() for word in words), seconds)

    def count(self, selector: str, at_least: int = 1, seconds: float = 30) -> int:
        """How many elements match a CSS selector, once there are at least so many."""
        self._until(lambda: len(self._find(selector)) >= at_least, seconds)
        return len(self._find(selector))

    def link(self, words: str) -> str:
        """Where the link with these words leads."""
        return self.driver.find_element("partial link text", words).get_attribute("href")

    def screenshot(self, name: str) -> None:
        """Keep a picture, where `DISTIL_RANK_SCREENSHOTS` names a folder for them."""
        if folder := os.environ.get("DISTIL_RANK_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def _find(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def _until(self, condition, seconds: float) -> bool:
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.wait import WebDriverWait

        try:
            return WebDriverWait(self.driver, seconds, 0.2).until(lambda _: condition())
        except TimeoutException:
            return False


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Chromium with a new profile; skips the test where it or selenium is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="the extra `browser` (selenium) is not installed")
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
