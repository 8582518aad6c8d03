from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from runs import config_of

from dist_graft import train
from dist_graft.config import DataConfig, GraftConfig, ModelConfig, PopulationConfig, TrainConfig
from dist_graft.errors import RunDirectoryError


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    data = DataConfig(train_samples=12, test_samples=6, batch_size=6)
    model = ModelConfig(name="resnet8", kwargs={"width": 4})
    graft = GraftConfig(every=0)
    return dataclasses.replace(
        config_of(tmp_path / "run"), epochs=1, data=data, model=model, graft=graft
    )


def test_a_complete_run_returns_its_summary(config: TrainConfig) -> None:
    first = train(config)
    assert len(first["networks"]) == 1
    assert train(config) == first

    path = Path(config.run_dir, "summary.json")
    path.write_text("{")
    with pytest.raises(RunDirectoryError, match=r"summary\.json cannot be read \(.*restore or"):
        train(config)
    path.unlink()
    assert train(config) == {}


def test_a_complete_job_returns_its_own_summary_until_all_have_finished(
    config: TrainConfig,
) -> None:
    job = dataclasses.replace(
        config,
        graft=GraftConfig(exchange="files"),
        population=PopulationConfig(size=2, network=0),
    )
    first = train(job)
    assert first["networks"][0]["network"] == 0
    assert train(job) == first
    other = dataclasses.replace(job, population=PopulationConfig(size=2, network=1))
    both = train(other)
    assert len(both["networks"]) == 2
    assert train(job) == train(other) == both
