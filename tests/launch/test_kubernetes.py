"""The manifests of launch/kubernetes against the published schemas and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from dist_graft import cli
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.training.command import read_options
from dist_graft.training.jobs import assign_network

FOLDER = Path(__file__).parents[2] / "launch/kubernetes"


def manifest(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return content


@pytest.fixture
def job() -> dict[str, Any]:
    return manifest("indexed-job.yaml")


def test_the_indexed_job_fits_the_schema(job: dict[str, Any]) -> None:
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(job, version, strict=True)
    job["spec"]["completion_mode"] = job["spec"].pop("completionMode")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, version, strict=True)


def test_each_pod_trains_the_network_of_its_index(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"] == ["dist-graft", "train"]
    config, _ = read_options(cli._parse(["train", *container["args"]])[1])
    assert config.population.size == spec["completions"]
    assert (
        config.checkpoint.grace_seconds < spec["template"]["spec"]["terminationGracePeriodSeconds"]
    )
    for index in range(spec["completions"]):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(index))
        assert assign_network(config, ProcessInfo()).network == index


def test_the_train_job_fits_the_schema() -> None:
    """Nothing is lost on the way through the published classes, so that all names are known."""
    content = manifest("trainjob.yaml")
    assert TrainerV1alpha1TrainJob.from_dict(content).to_dict() == content
    command, args = (content["spec"]["trainer"][key] for key in ("command", "args"))
    assert command == ["torchrun", "-m", "dist_graft", "train"]
    config, _ = read_options(cli._parse(["train", *args])[1])
    assert config.graft.exchange != "files"
