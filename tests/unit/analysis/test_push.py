"""`dist-graft push`, into a folder and to a recorded server."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from stored_runs import export_run, network, write_run

import dist_graft
from dist_graft import cli
from dist_graft.analysis.hub import model_card

pytestmark = pytest.mark.usefixtures("empty_working_directory")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export in the format pt of a run with a summary."""
    folder = tmp_path_factory.mktemp("push")
    states = [network(seed, name="resnet8").state_dict() for seed in range(2)]
    run = write_run(folder / "run", states, model="resnet8", epochs=(20,))
    summary = {
        "networks": [
            {
                "network": k,
                "lr": 0.1,
                "accuracy_before_last_round": 60.0 + k,
                "accuracy_after_last_round": 61.25 + k,
            }
            for k in range(2)
        ],
        "events": [{"kind": "slow", "text": "network 0 on secret-host is slow"}],
        "mean_accuracy_before_last_round": 60.5,
        "mean_accuracy_after_last_round": 61.75,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    export_run(run, out=folder / "weights")
    return folder / "weights"


def test_into_a_folder(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "hub"
    assert cli.run(["push", str(exported), "--repo", "me/boots", "--out", str(out)]) == 0
    assert str(out / "README.md") in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        *("network00.safetensors", "network01.safetensors", "uniform_soup.safetensors"),
        *("export.json", "README.md"),
    }
    state = safetensors.torch.load_file(out / "network01.safetensors")
    expected = network(1, name="resnet8").state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    card = (out / "README.md").read_text()
    assert "| network 1 (lr 0.1) | 61.00 | 62.25 |" in card
    assert "| mean | 60.50 | 61.75 |" in card
    assert "Needs dist_graft with its extra hub:" in card
    assert 'dist_graft.load(snapshot_download("me/boots"))' in card
    published = card + (out / "export.json").read_text()
    assert str(exported.parent) not in published
    assert "secret-host" not in published
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(dist_graft.load(out)(images), dist_graft.load(exported)(images))


def test_moving_averages_are_no_networks(exported: Path) -> None:
    description = json.loads((exported / "export.json").read_text())
    names = [f"network0{k}{kind}.safetensors" for k in (0, 1) for kind in ("", "_ema")]
    card = model_card(description | {"sha256": dict.fromkeys(names, "0")}, "me/boots")
    assert "2 x resnet8, trained side by side" in card


def test_files_of_weights_are_published_without_their_folders(
    exported: Path, tmp_path: Path
) -> None:
    export, out = shutil.copytree(exported, tmp_path / "export"), tmp_path / "hub"
    description = json.loads((export / "export.json").read_text())
    teachers = ["/home/me/runs/big/network00.pt"]
    description["training"] |= {
        "init_from": "/home/me/runs/base",
        "distill": description["training"]["distill"] | {"teachers": teachers},
    }
    (export / "export.json").write_text(json.dumps(description))
    assert cli.run(["push", str(export), "--repo", "me/boots", "--out", str(out)]) == 0
    text = (out / "export.json").read_text()
    assert "/home/me" not in text
    training = json.loads(text)["training"]
    assert (training["init_from"], training["distill"]["teachers"]) == ("base", ["network00.pt"])


@pytest.mark.parametrize("finished", [True, False])
def test_the_card_of_a_regression(finished: bool, tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    run = write_run(
        tmp_path / "run",
        [model.state_dict()],
        epochs=(20,),
        custom=("model", "data", "loss", "metrics"),
    )
    if finished:
        results = {f"absolute_error_{when}_last_round": 0.0765432 for when in ("before", "after")}
        summary = {"networks": [{"network": 0, "lr": 0.1, **results}], "metric": "absolute_error"}
        summary |= {f"mean_{key}": value for key, value in results.items()}
        (run / "summary.json").write_text(json.dumps(summary))
    else:
        (run / "network00").mkdir()
        line = {"epoch": 19, "test_loss": 0.0123456, "test_absolute_error": 0.0765432}
        (run / "network00/metrics.jsonl").write_text(json.dumps(line) + "\n")
    export_run(run)
    out = tmp_path / "hub"
    push = ["push", str(run / "export"), "--repo", "me/waves", "--out", str(out)]
    assert cli.run(push) == 0
    card = (out / "README.md").read_text()
    for word in ("image-classification", "preprocess(", "class names", "fashion-mini", "resnet"):
        assert word not in card
    assert "1 x a model built in Python, trained side by side on custom data for 20 epochs" in card
    assert 'dist_graft.load(snapshot_download("me/waves"), model=make_model())' in card
    assert "`make_model()` must return" in card
    if finished:
        assert "|  | test absolute_error before the last round | after it |" in card
        assert "| mean | 0.07654 | 0.07654 |" in card
    else:
        assert "| network | test absolute_error | test loss |" in card
        assert "| network00 | 0.07654 | 0.01235 |" in card
    loaded = dist_graft.load(out, model=torch.nn.Linear(2, 1))
    assert torch.equal(loaded.model.weight, model.weight)


def test_the_card_of_images_with_classes(exported: Path) -> None:
    description = json.loads((exported / "export.json").read_text())
    assert "image-classification" not in model_card(description, "me/boots")  # an older run
    classes = {"classes": ["boot", "shirt"], "preprocessing": {"channels": 1}}
    card = model_card(description | classes, "me/boots")
    assert "\npipeline_tag: image-classification\ntags:\n- image-classification\n" in card
    assert 'logits = model(model.preprocess("image.jpg")[None])' in card
    assert "Prepare" not in card
    own = model_card(description | classes | {"model": "my_widths:net"}, "me/boots")
    assert 'dist_graft.load(snapshot_download("me/boots"), trust_code=True)' in own


def test_a_run_is_not_an_export(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = exported.parent / "run"
    assert cli.run(["push", str(run), "--repo", "me/boots", "--out", "out"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{run} is not an exported folder: run dist-graft export" in error


def test_an_export_of_own_parts_has_no_control(
    control: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((control / "config.yaml").read_text())
    states = [network(0, name="resnet8").state_dict()]
    run = write_run(tmp_path / "own", states, epochs=(config["epochs"],), custom=("model", "data"))
    (run / "summary.json").write_bytes((control / "summary.json").read_bytes())
    export_run(run)
    push = ["push", str(run / "export"), "--repo", "me/boots", "--out", "out"]
    assert cli.run([*push, "--control", str(control)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "export was trained in Python with its own data, model" in error


def test_the_card_names_the_extras(exported: Path) -> None:
    description = json.loads((exported / "export.json").read_text())
    card = model_card(description | {"model": "timm/resnet18"}, "me/boots")
    assert "Needs dist_graft with its extras hub and timm:" in card


@pytest.fixture
def control(exported: Path, tmp_path: Path) -> Path:
    """A finished run with the options of the exported one, without rounds."""
    run = write_run(tmp_path / "alone", [network(7, name="resnet8").state_dict()], model="resnet8")
    accuracies = {f"accuracy_{when}_last_round": 58.5 for when in ("before", "after")}
    summary = {"networks": [{"network": 0, "lr": 0.1, **accuracies}]}
    summary |= {f"mean_{key}": value for key, value in accuracies.items()}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_the_card_has_the_control(exported: Path, control: Path, tmp_path: Path) -> None:
    out = tmp_path / "hub"
    push = ["push", str(exported), "--repo", "me/boots", "--out", str(out)]
    assert cli.run(push) == 0
    assert "No control was trained" in (out / "README.md").read_text()
    assert cli.run([*push, "--control", str(control)]) == 0
    card = (out / "README.md").read_text()
    assert "| control without exchange (1 network): mean | 58.50 | 58.50 |" in card
    assert "No control" not in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("data", "has data.name cifar10, but .* has data.name fashion-mini: only the exchange"),
        ("model", "has model.name resnet20, but .* has model.name resnet8"),
        ("epochs", r"has epochs 7, but .* has epochs \d+"),
        ("start", "has init_from weights.pt, but .* has init_from None"),
        ("own", "was trained in Python with its own data, loss, which cannot be compared"),
        ("rounds", "exchanged weights: train it with --method none"),
        ("summary", "has no summary.json: let this run finish"),
        ("run", "is not a run directory"),
    ],
)
def test_another_control_is_refused(
    change: str,
    says: str,
    exported: Path,
    control: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = yaml.safe_load((control / "config.yaml").read_text())
    if change == "data":
        config["data"]["name"] = "cifar10"
    elif change == "model":
        config["model"]["name"] = "resnet20"
    elif change == "epochs":
        config["epochs"] = 7
    elif change == "start":
        config["init_from"] = "weights.pt"
    elif change == "own":
        config["run"]["custom"] = ["loss", "data"]
    elif change == "rounds":
        (control / "network00").mkdir()
        line = {"epoch": 0, "graft": {"round": 0}}
        (control / "network00/metrics.jsonl").write_text(json.dumps(line) + "\n")
    elif change == "summary":
        (control / "summary.json").unlink()
    else:
        control = tmp_path / "nothing"
    if control.exists():
        (control / "config.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "hub"
    push = ["push", str(exported), "--repo", "me/boots", "--out", str(out)]
    assert cli.run([*push, "--control", str(control)]) != 0
    (error,) = capsys.readouterr().err.splitlines()
    assert re.search(says, error)
    assert not out.exists()


class _Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does, and records the requests."""

    requests: list[tuple[str, bytes]]
    private = True

    def do_GET(self) -> None:
        self._answer({"id": "me/boots", "private": self.private})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, body))
        host = f"http://{self.headers['Host']}"
        answer: dict[str, Any] = {"url": f"{host}/me/boots"}
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in files
                ]
            }
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{host}/me/boots/commit/1", "commitOid": "1", "success": True}
        self._answer(answer)

    def _answer(self, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Silence."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, bytes]]]:
    """Requests that reached a server in the Hub's place."""
    constants = pytest.importorskip("huggingface_hub.constants")
    _Hub.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield _Hub.requests
    server.shutdown()
    server.server_close()
    thread.join()


def test_recorded_request(
    exported: Path, hub: list[tuple[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["push", str(exported), "--repo", "me/boots", "--private"]) == 0
    assert "uploaded 5 files: http://127.0.0.1" in capsys.readouterr().out
    paths = [path for path, _ in hub]
    assert paths[0] == "/api/repos/create"
    assert b"private" in hub[0][1]  # the key depends on the version
    (commit,) = (body for path, body in hub if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    files = {line["value"]["path"] for line in lines if line["key"] == "file"}
    assert files == {
        *("network00.safetensors", "network01.safetensors", "uniform_soup.safetensors"),
        *("export.json", "README.md"),
    }


def test_a_public_repository_gets_nothing_private(
    exported: Path,
    hub: list[tuple[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(_Hub, "private", False)
    assert cli.run(["push", str(exported), "--repo", "me/boots", "--private"]) == 2
    assert "me/boots exists and is public, so nothing was uploaded" in capsys.readouterr().err
    assert [path for path, _ in hub] == ["/api/repos/create"]


def test_unreachable_hub(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert cli.run(["push", str(exported), "--repo", "me/boots"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert "me/boots cannot be uploaded" in error


def test_huggingface_hub_is_missing(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.run(["push", str(exported), "--repo", "me/boots"]) == 2
    assert "pip install 'dist_graft[hub]'" in capsys.readouterr().err


def test_programs_are_refused(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    description = json.loads((exported / "export.json").read_text())
    description["sha256"] = {"network00.onnx": ""}
    (tmp_path / "export.json").write_text(json.dumps(description))
    assert cli.run(["push", str(tmp_path), "--repo", "me/boots", "--out", "out"]) == 2
    assert "export the run with --format safetensors" in capsys.readouterr().err
