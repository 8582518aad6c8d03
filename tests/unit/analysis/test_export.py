from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import torchvision
from stored_runs import SMALL, export_run, network, related_states, write_run

from dist_graft.config import ModelConfig
from dist_graft.errors import ConfigError
from dist_graft.training.models import build_model

STEMS = ("network00", "network01", "network02", "uniform_soup")


def test_load_into_a_built_in_model(trio: Path) -> None:
    text = export_run(trio)
    model = build_model(ModelConfig(name="resnet20"), num_classes=10, channels=1)
    for number, state in enumerate(related_states(3)):
        path = trio / "export" / f"network{number:02d}.pt"
        assert str(path) in text
        model.load_state_dict(torch.load(path, weights_only=True))
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[key])


def test_load_into_a_model_of_torchvision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = torchvision.models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    run = write_run(tmp_path / "run", [trained.state_dict()], model="resnet18", channels=3)
    export_run(run)
    path = run / "export/network00.pt"

    model = torchvision.models.resnet18(num_classes=10)
    model.load_state_dict(torch.load(path, weights_only=True))

    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), trained.eval()(images))
    assert all(tensor.is_contiguous() for tensor in torch.load(path, weights_only=True).values())


def test_soup_is_the_mean(trio: Path, tmp_path: Path) -> None:
    export_run(trio, out=tmp_path)
    soup = torch.load(tmp_path / "uniform_soup.pt", weights_only=True)
    states = related_states(3)
    for key, tensor in soup.items():
        if tensor.is_floating_point():
            mean = sum(state[key].double() for state in states) / 3
            torch.testing.assert_close(tensor, mean.float(), rtol=0, atol=1e-7)
        else:
            assert torch.equal(tensor, states[0][key])


def test_description(trio: Path, tmp_path: Path) -> None:
    export_run(trio, out=tmp_path, checkpoint="epoch_0001")
    description = json.loads((tmp_path / "export.json").read_text())
    assert (description["epoch"], description["model"], description["lead"]) == (
        *(1, "resnet20"),
        "conv",
    )
    files = {path.name: path for path in tmp_path.glob("*.pt")}
    assert set(files) == {"network00.pt", "network01.pt", "network02.pt", "uniform_soup.pt"}
    for name, digest in description["sha256"].items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest


def test_description_of_parts_given_in_python(tmp_path: Path) -> None:
    custom = ("model", "data", "loss", "optimizer")
    run = write_run(tmp_path / "run", related_states(1), custom=custom)
    text = export_run(run)
    assert "custom model after 2 epochs; load it with dist_graft.load(path, model=you" in text
    content = (run / "export/export.json").read_text()
    assert "fashion-mini" not in content
    assert "resnet20" not in content
    description = json.loads(content)
    assert (description["data"], description["model"]) == ("custom", None)
    training = description["training"]
    assert [training[part]["name"] for part in ("data", "model", "optim")] == ["custom"] * 3
    assert training["data"]["batch_size"] == SMALL["batch_size"]
    assert "augment" not in training["data"]
    assert "momentum" not in training["optim"]
    assert training["own"] == sorted(custom)


def test_the_folder_of_another_run_is_refused(trio: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights"
    export_run(trio, out=out, checkpoint="epoch_0001")
    export_run(trio, out=out)  # a later epoch
    export_run(trio, out=out, kind="safetensors")  # another format
    names = {f"{stem}.{kind}" for stem in STEMS for kind in ("pt", "safetensors")}
    before = (out / "export.json").read_bytes()
    assert set(json.loads(before)["sha256"]) == names
    other = write_run(tmp_path / "other", related_states(2))
    with pytest.raises(ConfigError, match=f"{out} holds an export of {trio}: choose another --out"):
        export_run(other, out=out, kind="safetensors")
    assert (out / "export.json").read_bytes() == before


def test_a_run_that_was_moved_is_exported_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", related_states(1))
    export_run(run)
    moved = run.rename(tmp_path / "moved")
    export_run(moved, kind="safetensors")
    description = json.loads((moved / "export/export.json").read_text())
    assert description["run_dir"] == str(moved)
    assert {"network00.pt", "network00.safetensors"} < set(description["sha256"])


def test_wrong_architecture_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "run", [network(0).state_dict()], model="resnet32")
    with pytest.raises(ConfigError, match="does not hold the weights of this architecture"):
        export_run(run)
    assert not (run / "export").exists()
