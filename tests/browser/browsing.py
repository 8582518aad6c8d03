"""A real TensorBoard in a real browser."""

from __future__ import annotations

import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from debian import need
from launching import background, free_port, wait_until
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

SECONDS = 90
_WIDTH = 1540  # room for three cards side by side
_EVERYWHERE = """
const inside = (root, selector) => {
  const found = [];
  const descend = (part) => {
    if (part.shadowRoot) descend(part.shadowRoot);
    for (const child of part.children) {
      if (child.matches(selector)) found.push(child);
      descend(child);
    }
  };
  descend(root);
  return found;
};
const found = inside(document, arguments[0]);
"""


def need_a_browser() -> None:
    """Install what is missing where that is possible; else fail in CI, and skip elsewhere."""
    need(("chromium", "chromedriver"), ("chromium", "chromium-driver"))


class Page:
    """A browser's window on TensorBoard."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self._driver = driver
        self._url = url

    def open(self, tab: str) -> None:
        """Show a tab, with lines as they are: not smoothed, and none cut off."""
        self._driver.get(self._url)
        self._driver.execute_script("localStorage.setItem('_ignoreYOutliers', 'false')")
        self._driver.get("about:blank")
        self._driver.get(f"{self._url}/#{tab}&_smoothingWeight=0")

    def ask(self, selector: str, expression: str) -> list[Any]:
        """A JavaScript expression of `element`, for all that fit a selector, shadows included."""
        program = f"{_EVERYWHERE} return found.map((element) => {expression});"
        answers: list[Any] = self._driver.execute_script(program, selector)
        return answers

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Look again and again; an error that says what after so many seconds."""
        WebDriverWait(self._driver, SECONDS).until(lambda _: condition(), what)

    def keep(self, path: Path, *, height: int = 1000) -> None:
        """Save what a window of this height shows."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._driver.set_window_size(_WIDTH, height)
        assert self._driver.save_screenshot(str(path))


@contextmanager
def tensorboard(run: Path) -> Iterator[Page]:
    """TensorBoard on a run, in headless Chromium."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", run.name]
    place = ["--host", "127.0.0.1", "--port", str(port)]
    with background([[*command, *place]], cwd=run.parent) as (server,):
        wait_until(lambda: _answers(url), "TensorBoard's first page", meanwhile=[server])
        options = Options()
        for argument in (
            *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"),
            f"--window-size={_WIDTH},1000",
        ):
            options.add_argument(argument)
        options.binary_location = str(shutil.which("chromium"))
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield Page(driver, url)
        finally:
            driver.quit()
            server.terminate()
            server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
