"""User objects given as package.module:name, and errors for unsuitable ones."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from dist_graft.config import GraftConfig, ModelConfig, TrainConfig
from dist_graft.errors import ConfigError, DataError
from dist_graft.grafting.rules.graft import Graft
from dist_graft.grafting.topology import donors_of
from dist_graft.references import resolve
from dist_graft.training.builders import build_rule, build_user_rule
from dist_graft.training.data.sources import read_custom
from dist_graft.training.models import build_model

MODULE = """
import numpy as np
from torch import nn

SIZES = {"rgb": (6, 3, 5, 5), "flat": (6, 25), "oblong": (6, 1, 5, 4), "empty": (0, 1, 5, 5)}


def rgb(root):
    images = np.full(SIZES["rgb"], 51, dtype=np.uint8)
    return (images, [0, 1, 2, 0, 1, 2]), (images[:2], [0, 3])


def flat(root): return (np.zeros(SIZES["flat"], np.uint8), [0] * 6), rgb(root)[1]
def oblong(root): return (np.zeros(SIZES["oblong"], np.uint8), [0] * 6), rgb(root)[1]
def empty(root): return (np.zeros(SIZES["empty"], np.uint8), []), rgb(root)[1]
def floats(root): return (np.zeros(SIZES["rgb"]), [0] * 6), rgb(root)[1]
def negative(root): return (rgb(root)[0][0], [0, 1, 2, 0, 1, -2]), rgb(root)[1]
def fewer(root): return (rgb(root)[0][0], [0, 1]), rgb(root)[1]
def grey(root): return (rgb(root)[0][0][:, :1], [0] * 6), rgb(root)[1]
def nothing(root): return None
def linear(num_classes, channels): return nn.Linear(channels, num_classes)
def text(num_classes, channels): return "no module"
def few(networks, round_, seed): return [0]
def far(networks, round_, seed): return [1, 2, networks]
def no_rule(): return object()
"""


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "given", raising=False)
    Path("given.py").write_text(MODULE)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("nonesuch.inner:f", "there is no module nonesuch in the working directory"),
        ("given:f", "given has no function or class 'f'"),
        ("given:SIZES", "given has no function or class 'SIZES'"),
        ("given:", "given has no function or class ''"),
    ],
)
def test_reference_that_cannot_be_resolved(reference: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        resolve(reference)


def test_missing_import_inside_the_module_is_raised() -> None:
    Path("needs_more.py").write_text("import a_package_that_is_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        resolve("needs_more:f")


def test_data_set() -> None:
    train, test, info = read_custom("given:rgb", "anywhere")
    assert train.images.shape == (6, 3, 5, 5)
    assert train.labels.dtype == np.int64
    assert len(test.labels) == 2
    assert info.num_classes == 4
    assert info.mean == pytest.approx((0.2, 0.2, 0.2))
    assert info.std == pytest.approx((1e-6, 1e-6, 1e-6))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("flat", r"uint8 \[n, 1 or 3, side, side\], got uint8 \[6, 25\]"),
        ("oblong", r"got uint8 \[6, 1, 5, 4\]"),
        ("empty", r"got uint8 \[0, 1, 5, 5\]"),
        ("floats", "got float64"),
        ("negative", "a non-negative class for each of 6 images"),
        ("fewer", r"each of 6 images, got int64 \[2\]"),
        ("grey", "differ in shape"),
        ("nothing", r"must return \(\(images, labels\), \(images, labels\)\)"),
    ],
)
def test_invalid_data_set(name: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_custom(f"given:{name}", "anywhere")


def test_model() -> None:
    model = build_model(ModelConfig(name="given:linear"), num_classes=4, channels=3)
    assert isinstance(model, nn.Linear)
    for name, says in (("text", "must return an nn.Module"), ("nope", "no function or class")):
        with pytest.raises(ConfigError, match=rf"model.name 'given:{name}'.* {says}"):
            build_model(ModelConfig(name=f"given:{name}"), num_classes=4, channels=3)


@pytest.mark.parametrize("name", ["few", "far"])
def test_invalid_donors(name: str) -> None:
    with pytest.raises(ValueError, match=rf"topology given:{name} must return a donor from 0 to 2"):
        donors_of(f"given:{name}", 3, 0, 0)


def test_name_of_a_criterion() -> None:
    assert Graft(criterion="given:linear").measured == "linear"


@pytest.mark.parametrize(
    ("graft", "says"),
    [
        (
            GraftConfig(rule="given:no_rule"),
            "graft.rule 'given:no_rule' returned .* no measure or decide",
        ),
        (GraftConfig(rule="given:nope"), "graft.rule 'given:nope': given has no function"),
        (GraftConfig(criterion="given:nope"), "Conv2d: criterion 'given:nope': given has no"),
        (
            GraftConfig(topology="nope:f"),
            "Conv2d: topology 'nope:f': there is no module nope",
        ),
    ],
)
def test_invalid_rule(graft: GraftConfig, says: str) -> None:
    config = TrainConfig(graft=graft)
    state: Any = SimpleNamespace(model=nn.Conv2d(1, 2, 3))
    with pytest.raises(ConfigError, match=says):
        build_user_rule(config) or build_rule(config, state, [])


def test_unused_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"graft\.rule requires method graft"):
        TrainConfig(method="papa", graft=GraftConfig(rule="given:no_rule"))
    with pytest.raises(ConfigError, match=r"graft\.rule must be a reference package\.module:name"):
        GraftConfig(rule="best")
