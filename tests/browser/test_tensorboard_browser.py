"""TensorBoard of a run of three networks, as a browser shows it.

The screenshots are saved in $DIST_GRAFT_ARTEFACTS, or in pytest's temporary folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import Page, require_browser, tensorboard
from launching import run_program, torchrun

from dist_graft.monitoring.chart_layout import custom_scalars

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NETWORKS, EPOCHS = 3, 3
OPTIONS = (
    *("--epochs", str(EPOCHS), "--optim.lr_diversity", "cosine", "--model.name", "resnet8"),
    *("--data.train_samples", "640", "--data.test_samples", "400", "--runtime.backend", "gloo"),
)
CHARTS = custom_scalars("entropy", validation=False, rounds=True)
CHART = "tf-custom-scalar-margin-chart-card"
Y_LABELS = """inside(element, '.y-axis .tick-label')
    .filter((label) => label.style.visibility !== 'hidden').map((label) => label.textContent)"""
LINES = "inside(element, 'path.line').filter((path) => path.getAttribute('d').includes('L')).length"
HEAT_MAPS = ("heat_map/coefficient", "heat_map/entropy")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    require_browser()
    run = tmp_path_factory.mktemp("browser") / "run"
    done = run_program(torchrun(NETWORKS, run, *OPTIONS), timeout=400)
    assert done.status == 0, done
    with tensorboard(run) as page:
        yield page


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("DIST_GRAFT_ARTEFACTS")
    return Path(given) if given else tmp_path_factory.mktemp("screenshots")


def count_lines(tags: list[str]) -> int:
    """Number of lines in a chart: for each run, its values and the edge of the band."""
    return 2 if tags[0].startswith("population") else 2 * NETWORKS


def test_all_charts_of_the_layout_show_all_networks(page: Page, screenshots: Path) -> None:
    """In the order of the layout; with TensorBoard's defaults, the labels of each axis differ."""
    expected = {
        f"{category}: {title}": count_lines(tags)
        for category, charts in CHARTS.items()
        for title, (_, tags) in charts.items()
    }
    by_category = "tf-category-paginated-view"
    charts_inside = f"inside(element, '{CHART}').map((chart) => chart.title)"

    def titles() -> list[str]:
        found = page.evaluate(by_category, f"[element.category.name, {charts_inside}]")
        return [f"{category}: {title}" for category, inner in found for title in inner]

    page.open("custom_scalars")
    page.wait(lambda: len(titles()) >= len(expected), "the charts of the layout")
    assert titles() == list(expected)
    page.wait(
        lambda: page.evaluate(CHART, LINES) == list(expected.values()),
        "a line for each network in every chart",
    )
    for title, labels in zip(expected, page.evaluate(CHART, Y_LABELS), strict=True):
        assert len(set(labels)) == len(labels) > 1, f"{title}: {labels}"
    page.save_screenshot(screenshots / "custom_scalars.png", height=1130)


def test_images_of_all_networks_load(page: Page, screenshots: Path) -> None:
    expected = [
        *(f"{heat_map} network{network:02d}" for heat_map in HEAT_MAPS for network in range(3)),
        "round/who_gave_what_to_whom population",
    ]
    page.open("images")
    cards = "tf-image-loader"

    def loaded() -> list[str]:
        width = "inside(element, 'img').some((image) => image.complete && image.naturalWidth > 400)"
        found = page.evaluate(cards, f"[element.tag, element.run, {width}]")
        return sorted(f"{tag} {run}" for tag, run, wide in found if wide)

    page.wait(lambda: len(loaded()) >= len(expected), "the images")
    assert loaded() == sorted(expected)
    page.save_screenshot(screenshots / "images.png", height=1560)


def test_texts(page: Page, screenshots: Path) -> None:
    page.open("text")
    texts = "tf-text-loader"

    def shown() -> dict[str, str]:
        body = "inside(element, 'tf-markdown-view').map((text) => text.shadowRoot.textContent)"
        return {tag: " ".join(text) for tag, text in page.evaluate(texts, f"[element.tag, {body}]")}

    page.wait(lambda: len(shown()) == 3 and all(shown().values()), "the texts")
    found = shown()
    assert "name: resnet8" in found["run/configuration/text_summary"]
    assert "torch" in found["run/versions/text_summary"]
    assert os.uname().nodename in found["run/hosts/text_summary"]
    page.save_screenshot(screenshots / "text.png")


def test_hyperparameters(page: Page, screenshots: Path) -> None:
    page.open("hparams")
    rows = "vaadin-grid-cell-content"

    def shown() -> set[str]:
        return {text.strip() for text in page.evaluate(rows, "element.textContent")}

    networks = {f"network{network:02d}" for network in range(NETWORKS)}
    page.wait(lambda: networks <= shown(), "a row for each network")
    assert {"lr", "method", "model", "seed", "graft", "resnet8", "0.10000"} <= shown()
    assert not any("population" in text for text in shown())
    page.save_screenshot(screenshots / "hparams.png")
