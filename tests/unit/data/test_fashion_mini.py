from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from debian import cannot

from dist_graft.config import DataConfig
from dist_graft.training.data import load_data
from dist_graft.training.data.prepare import DEBIAN_FASHION
from dist_graft.training.data.sources import FASHION_MINI, read_small

TOOL = Path(__file__).parents[3] / "tools" / "make_fashion_mini.py"


@pytest.fixture(scope="module")
def mini():
    return read_small("fashion-mini", "nowhere")[:2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_fashion_mini", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_counts_and_balance(mini):
    for part, per_class in zip(mini, (500, 200), strict=True):
        assert part.images.shape == (10 * per_class, 1, 28, 28)
        assert np.bincount(part.labels).tolist() == [per_class] * 10


def test_the_first_images_are_about_balanced(mini):
    for part in mini:
        assert np.bincount(part.labels[:1000], minlength=10).min() > 70


def test_the_license_is_shipped():
    assert "Zalando SE" in (FASHION_MINI.parent / "LICENSE").read_text()


def test_default_configuration_loads_it():
    data = load_data(
        DataConfig(), seed=0, network=0, device=torch.device("cpu"), channels_last=True
    )
    assert (data.train_size, data.steps_per_epoch, data.num_classes) == (5000, 40, 10)
    images = torch.cat([x for x, _ in data.eval_batches("test")])
    assert len(images) == 2000
    assert abs(float(images.mean())) < 0.02
    assert abs(float(images.std()) - 1) < 0.02


def test_saved_bytes_depend_on_the_arrays_only(tool, tmp_path):
    arrays = {"train_images": np.arange(12, dtype=np.uint8).reshape(3, 2, 2)}
    tool.save(arrays, tmp_path / "one.npz")
    tool.save(arrays, tmp_path / "other.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "other.npz").read_bytes()
    with np.load(tmp_path / "one.npz") as saved:
        np.testing.assert_array_equal(saved["train_images"], arrays["train_images"])


def test_the_tool_makes_the_shipped_arrays(tool):
    if not DEBIAN_FASHION.is_dir():
        cannot("dataset-fashion-mnist is not installed")
    with np.load(FASHION_MINI) as shipped:
        made = tool.mini(DEBIAN_FASHION)
        assert sorted(made) == sorted(shipped.files)
        for name, array in made.items():
            np.testing.assert_array_equal(array, shipped[name])
