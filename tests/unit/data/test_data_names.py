from __future__ import annotations

import subprocess
import sys

import pytest

from dist_graft.config import DataConfig
from dist_graft.errors import ConfigError
from dist_graft.training.data import (
    check_dataset_name,
    dataset_names,
    ensure_available,
)


def test_every_name_is_legal():
    for name in dataset_names():
        check_dataset_name(name)


def test_unknown_name_says_near_and_legal_ones():
    with pytest.raises(ConfigError, match=r"got 'cifar1' \(did you mean cifar10.*\?\)") as caught:
        check_dataset_name("cifar1")
    assert all(name in str(caught.value) for name in dataset_names())
    assert "\n" not in str(caught.value)


def test_hopeless_name_has_no_hint():
    with pytest.raises(ConfigError, match=r"got 'zzzz'$"):
        check_dataset_name("zzzz")


def test_ensure_available_refuses_unknown_names_and_leaves_the_others_alone(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.name"):
        ensure_available(DataConfig(name="nothing"))
    for name in ("fashion-mini", "fashion-mnist", "imagefolder"):
        ensure_available(DataConfig(name=name, root=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_names_are_checked_without_heavy_imports():
    program = (
        "import sys; from dist_graft.training.data import dataset_names; dataset_names(); "
        "print([m for m in ('torch', 'torchvision', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"
