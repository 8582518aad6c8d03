"""Every recipe in launch/configs trains one step at reduced size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from launching import Train

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "launch/configs"
RECIPES = sorted(
    path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("configs", "sections")
)
ONE_STEP = (
    *("--data.name", "fashion-mini", "--data.channels", "3", "--data.image_size", "32"),
    *("--data.batch_size", "4", "--data.train_samples", "4", "--data.test_samples", "4"),
    *("--epochs", "1", "--monitor.tensorboard", "false", "--runtime.threads", "2"),
)


def recipe_id(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def train_one_step(train: Train, run: Path, recipe: Path, *options: str) -> dict:
    """Train one step of a recipe; returns the resolved configuration."""
    done = train(run, "--config", str(recipe), *ONE_STEP, *options)
    assert done.status == 0, done.errors
    metrics = json.loads((run / "network00/metrics.jsonl").read_text())
    assert math.isfinite(metrics["train_loss"])
    return yaml.safe_load((run / "config.yaml").read_text())


@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_id)
def test_one_step(recipe: Path, train: Train, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    teachers = content.get("distill", {}).get("teachers", [])
    options = []
    if teachers:
        teacher = tmp_path / "teacher"
        architecture = teachers[0].split("/")[1].removeprefix("teacher_")
        train_one_step(
            train, teacher, CONFIGS / "cifar/baseline.yaml", "--model.name", architecture
        )
        options = ["--distill.teachers", f"[{teacher}/checkpoints/epoch_0001/network00.pt]"]
    resolved = train_one_step(train, tmp_path / "run", recipe, *options)
    assert resolved["model"] == resolved["model"] | content["model"]
    section = content.get("graft", {})
    if isinstance(section, str):
        section = yaml.safe_load((recipe.parent / section).read_text())
    assert resolved["graft"] == resolved["graft"] | section
    assert resolved["diversity"].keys() == content.get("diversity", {}).keys()
    rates = yaml.safe_load((recipe.parent / content["optim"]).read_text())
    assert resolved["optim"] == resolved["optim"] | rates


@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_id)
def test_a_recipe_cites_its_source(recipe: Path) -> None:
    comment = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    sources = [f"arXiv {number}" for number in ("2001.05868", "2004.12311", "2304.03094")]
    assert any(source in line for line in comment for source in sources)
    assert len(recipe.read_text().splitlines()) < 20


def test_every_section_is_used() -> None:
    used = {
        (path.parent / value).resolve()
        for path in RECIPES
        for value in yaml.safe_load(path.read_text()).values()
        if str(value).endswith(".yaml")
    }
    assert used == set((CONFIGS / "sections").glob("*.yaml"))


def test_grafting_has_the_published_coefficients() -> None:
    """A and c of the published scripts, except in the recipes that vary them."""
    others = set()
    for path in GRAFTING:
        section = yaml.safe_load(path.read_text()).get("graft", {})
        if isinstance(section, str):
            section = yaml.safe_load((path.parent / section).read_text())
        if (section.get("amplitude"), section.get("sensitivity")) != (0.4, 500):
            others.add(path.stem)
    assert others == OTHER_COEFFICIENTS


OTHER_COEFFICIENTS = {
    *("baseline", "mobilenetv2_ensemble"),  # no grafting
    *("mobilenetv2_internal", "mobilenetv2_noise", "vgg16_filter"),  # no coefficients of layers
    *("mobilenetv2_a", "mobilenetv2_c"),  # sweeps
}
GRAFTING = [path for path in RECIPES if path.parent.name != "papa"]


@pytest.mark.parametrize("recipe", GRAFTING, ids=recipe_id)
def test_a_cosine_schedule_follows_steps_as_in_the_scripts(recipe: Path) -> None:
    optim = yaml.safe_load(recipe.read_text())["optim"]
    rates = yaml.safe_load((recipe.parent / optim).read_text())
    assert rates.get("schedule_unit", "epoch") == {"cosine": "step"}.get(rates["schedule"], "epoch")
