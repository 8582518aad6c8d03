"""TensorBoard in headless Chromium."""

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
from launching import free_port, running, wait_until
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

TIMEOUT_SECONDS = 90
_WIDTH = 1540  # fits three cards side by side
_FIND_IN_SHADOWS = """
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


def require_browser() -> None:
    """Install Chromium where possible; otherwise fail in CI and skip elsewhere."""
    need(("chromium", "chromedriver"), ("chromium", "chromium-driver"))


class Page:
    """A browser window that shows TensorBoard."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self._driver = driver
        self._url = url

    def open(self, tab: str) -> None:
        """Show a tab, with TensorBoard's default settings."""
        self._driver.get("about:blank")
        self._driver.get(f"{self._url}/#{tab}")

    def evaluate(self, selector: str, expression: str) -> list[Any]:
        """Evaluate a JavaScript expression of `element` for all matches, in shadow roots too."""
        script = f"{_FIND_IN_SHADOWS} return found.map((element) => {expression});"
        results: list[Any] = self._driver.execute_script(script, selector)
        return results

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Wait for a condition; the error after TIMEOUT_SECONDS contains `what`."""
        WebDriverWait(self._driver, TIMEOUT_SECONDS).until(lambda _: condition(), what)

    def save_screenshot(self, path: Path, *, height: int = 1000) -> None:
        """Save a screenshot of a window of this height."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._driver.set_window_size(_WIDTH, height)
        assert self._driver.save_screenshot(str(path))


@contextmanager
def tensorboard(run: Path) -> Iterator[Page]:
    """Open TensorBoard on a run in headless Chromium."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", run.name]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with running([command], cwd=run.parent) as (server,):
        wait_until(lambda: _responds(url), "TensorBoard's first page", meanwhile=[server])
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


def _responds(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
