"""Exported networks: formats, `dist_graft.load`, predict and push."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stored_runs import damage_file, export_run, network, related_states, write_run

import dist_graft
from dist_graft import cli
from dist_graft.analysis.stored_weights import open_run
from dist_graft.config import DataConfig
from dist_graft.errors import ConfigError, RunDirectoryError
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import mark_complete, save_network
from dist_graft.training.data import load_data
from dist_graft.training.weights import exported_files


def data(**options: Any) -> Any:
    """Test images of fashion-mini as a run loads them."""
    return load_data(
        DataConfig(batch_size=4, **options),
        seed=0,
        network=0,
        device=torch.device("cpu"),
        channels_last=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of two networks that recorded its classes."""
    run = write_run(tmp_path_factory.mktemp("named") / "run", related_states(2))
    images = data()
    RunDirectory(run).write_classes(images.classes, asdict(images.preprocessing))
    (run / "network01").mkdir()
    (run / "network01/metrics.jsonl").write_text(
        '{"epoch": 0, "test_accuracy": 1.0}\n{"epoch": 1, "test_accuracy": 61.5, "graft": {}}\n'
    )
    return run


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    export_run(run, kind="safetensors")
    return run / "export"


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A color photo of another size."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def called(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    status = cli.run([str(word) for word in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


class TestLoad:
    def test_output_equals_the_network(self, exported: Path) -> None:
        images, _ = next(data().eval_batches("test"))
        expected = network(0)
        for number, state in enumerate(related_states(2)):
            model = dist_graft.load(exported / f"network{number:02d}.safetensors")
            assert not model.training
            expected.load_state_dict(state)
            with torch.no_grad():
                assert torch.equal(model(images), expected.eval()(images))
        assert torch.equal(
            dist_graft.load(exported)(images),
            dist_graft.load(exported / "network00.safetensors")(images),
        )

    @pytest.mark.parametrize("options", [{}, {"image_size": 32}, {"channels": 3}])
    def test_preprocessing_equals_that_of_the_test_images(
        self, tmp_path: Path, options: dict[str, int]
    ) -> None:
        images = data(**options)
        expected, _ = next(images.eval_batches("test"))
        with np.load(
            Path(dist_graft.__file__).parent / "training/data/fashion_mini/fashion_mini.npz"
        ) as file:
            pixels = file["test_images"][:4]
        for number, image in enumerate(pixels):
            path = tmp_path / f"{number}.png"
            Image.fromarray(image).save(path)
            assert torch.equal(images.preprocessing(path), expected[number])
            assert torch.equal(images.preprocessing(Image.open(path)), expected[number])
            assert torch.equal(
                images.preprocessing(torch.from_numpy(image)[None]), expected[number]
            )

    def test_names_and_preprocessing_of_an_export(self, exported: Path, photo: Path) -> None:
        model = dist_graft.load(exported)
        assert model.classes is not None
        assert model.classes[9] == "Ankle boot"
        assert model.preprocess(photo).shape == (1, 28, 28)

    def test_format_pt_and_soup(self, run: Path, exported: Path) -> None:
        export_run(run, kind="pt")  # into the same folder
        for stem in ("network01", "uniform_soup"):
            pt = dist_graft.load(exported / f"{stem}.pt").state_dict()
            other = dist_graft.load(exported / f"{stem}.safetensors").state_dict()
            assert all(torch.equal(tensor, other[key]) for key, tensor in pt.items())

    def test_pickles_are_refused(self, exported: Path, tmp_path: Path) -> None:
        description = json.loads((exported / "export.json").read_text())
        torch.save(network(0), tmp_path / "network00.pt")  # a pickled module
        content = (tmp_path / "network00.pt").read_bytes()
        description["sha256"] = {"network00.pt": hashlib.sha256(content).hexdigest()}
        (tmp_path / "export.json").write_text(json.dumps(description))
        with pytest.raises(RunDirectoryError, match="cannot be read as weights"):
            dist_graft.load(tmp_path)

    def test_damaged_and_missing(self, run: Path, tmp_path: Path) -> None:
        export_run(run, out=tmp_path, kind="safetensors")
        damage_file(tmp_path / "network00.safetensors")
        with pytest.raises(RunDirectoryError, match=r"is not the file that export\.json describes"):
            dist_graft.load(tmp_path)
        with pytest.raises(RunDirectoryError, match=r"export\.json cannot be read"):
            dist_graft.load(run)

    def test_own_model_runs_only_when_trusted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "my_widths.py").write_text(
            "from torch import nn\n"
            "def net(num_classes, channels, width=3):\n"
            "    return nn.Sequential(nn.Conv2d(channels, width, 3), nn.Flatten(),\n"
            "                         nn.Linear(width * 26 * 26, num_classes))\n"
        )
        import my_widths

        state = my_widths.net(10, 1, width=5).state_dict()
        run = write_run(tmp_path / "run", [state], model="my_widths:net", model_kwargs={"width": 5})
        assert "load it with dist_graft.load(path, trust_code=True), or" in export_run(run)
        with pytest.raises(ConfigError, match="trust_code"):
            dist_graft.load(run / "export")
        model = dist_graft.load(run / "export", trust_code=True)
        assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
        given = dist_graft.load(run / "export", model=my_widths.net(10, 1, width=5))
        assert torch.equal(given.model[0].weight, state["0.weight"])
        with pytest.raises(ConfigError, match="does not say how its images were prepared"):
            model.preprocess(torch.zeros(1, 28, 28, dtype=torch.uint8))


class TestExport:
    def test_description(self, exported: Path) -> None:
        description = json.loads((exported / "export.json").read_text())
        assert description["classes"][0] == "T-shirt/top"
        assert description["model_arguments"]["num_classes"] == 10
        assert description["preprocessing"]["mean"] == [0.286]
        assert description["metrics"]["network01"] == {"epoch": 1, "test_accuracy": 61.5}
        assert description["versions"]["torch"] == torch.__version__

    @pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11 loads so
    def test_torch_export(self, run: Path, tmp_path: Path) -> None:
        export_run(run, out=tmp_path, kind="torch_export")
        program = torch.export.load(tmp_path / "network01.pt2").module()
        expected = network(0)
        expected.load_state_dict(related_states(2)[1])
        images, _ = next(data().eval_batches("test"))
        for count in (1, 3):
            with torch.no_grad():
                torch.testing.assert_close(program(images[:count]), expected.eval()(images[:count]))

    def test_onnx(self, run: Path, tmp_path: Path) -> None:
        pytest.importorskip("onnxscript")
        reference = pytest.importorskip("onnx.reference")
        export_run(
            write_run(tmp_path / "run", [network(3, name="resnet8").state_dict()], model="resnet8"),
            out=tmp_path,
            kind="onnx",
        )
        images = torch.randn(3, 1, 32, 32)
        session = reference.ReferenceEvaluator(str(tmp_path / "network00.onnx"))
        (logits,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = network(3, name="resnet8").eval()(images)
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-4)

    def test_a_model_from_python_is_exported_as_weights_only(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", related_states(1), custom=("model",))
        with pytest.raises(ConfigError, match="use --format safetensors"):
            export_run(run, kind="torch_export")
        export_run(run, kind="safetensors")
        with pytest.raises(ConfigError, match=r"dist_graft\.load\(path, model=your_module\)"):
            dist_graft.load(run / "export")
        given = dist_graft.load(run / "export", model=network(5))
        assert torch.equal(given.model.conv1.weight, related_states(1)[0]["conv1.weight"])

    def test_onnx_without_its_packages(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "onnx", None)
        with pytest.raises(ConfigError, match=r"pip install 'dist_graft\[onnx\]'"):
            export_run(run, out=tmp_path / "out", kind="onnx")
        assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("empty_working_directory")
class TestPredict:
    def test_json_equals_the_mean_probabilities(
        self, exported: Path, photo: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        files = [exported / f"network{number:02d}.safetensors" for number in range(2)]
        status, out, _ = called(capsys, "predict", *files, photo, "--json", "--top", "10")
        assert status == 0
        (result,) = json.loads(out)
        assert result["image"] == str(photo)
        models = [dist_graft.load(file) for file in files]
        mean = sum(model(model.preprocess(photo)[None]).softmax(1)[0] for model in models) / 2
        found = {each["index"]: each["probability"] for each in result["classes"]}
        assert [found[index] for index in range(10)] == pytest.approx(mean.tolist(), abs=1e-6)
        best = result["classes"][0]
        assert best["probability"] == max(found.values())
        assert best["name"] == (models[0].classes or [])[best["index"]]

    def test_table_has_the_five_most_probable_classes(
        self, exported: Path, photo: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _, out, _ = called(capsys, "predict", exported, photo, photo)
        lines = out.splitlines()
        assert lines[0].split() == ["image", "rank", "class", "probability"]
        assert lines[1].split()[0] == str(photo)
        shares = [float(line.split()[-1]) for line in lines[1:6]]
        assert shares == sorted(shares, reverse=True)
        assert len(lines) == 11

    def test_images_of_a_folder(
        self, exported: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("shoes/boot.png", "shirt.PNG", "notes.txt"):
            (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "photos" / name).write_bytes(photo.read_bytes())
        _, out, _ = called(capsys, "predict", exported, tmp_path / "photos", "--json")
        found = [Path(result["image"]).name for result in json.loads(out)]
        assert found == ["shirt.PNG", "boot.png"]

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (["nowhere", "PHOTO"], "nowhere does not exist"),
            (["PHOTO", "PHOTO"], "is neither an exported folder nor a file in one"),
            (["EXPORT"], "no images"),
            (["EXPORT", "empty"], "empty has no images (.jpg, "),
            (["EXPORT", "PHOTO", "--top", "0"], "top must be at least 1, got 0"),
            (["EXPORT", "EXPORT/export.json"], "cannot be read as an image"),
        ],
    )
    def test_errors(
        self,
        exported: Path,
        photo: Path,
        capsys: pytest.CaptureFixture[str],
        argv: list[str],
        says: str,
    ) -> None:
        words = [w.replace("EXPORT", str(exported)).replace("PHOTO", str(photo)) for w in argv]
        Path("empty").mkdir()
        status, _, err = called(capsys, "predict", *words)
        assert status != 0
        assert len(err.splitlines()) == 1
        assert says in err


def test_new_safetensors_are_preferred_to_an_old_state_dict(tmp_path: Path) -> None:
    names = ("network00.pt", "network00.safetensors", "network01.pt", "uniform_soup.pt")
    content = {"model": None, "lead": "conv", "sha256": dict.fromkeys(names, "0")}
    (tmp_path / "export.json").write_text(json.dumps(content))
    files = [path.name for path in exported_files(tmp_path)]
    assert files == ["network00.safetensors", "network01.pt"]


def test_more_than_a_hundred_networks_are_in_order(tmp_path: Path) -> None:
    names = [f"network{number:02d}.safetensors" for number in range(102)]
    content = {"model": None, "lead": "conv", "sha256": dict.fromkeys(names, "0")}
    (tmp_path / "export.json").write_text(json.dumps(content))
    assert [path.name for path in exported_files(tmp_path)] == names


def test_networks_may_change_between_two_checkpoints(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", related_states(2), epochs=(1, 2))
    path = RunDirectory(run).checkpoints / "epoch_0003"
    digests = [save_network(path / f"network0{k}.pt", {"model": {}}) for k in range(3)]
    mark_complete(path, epoch=3, round_=3, sha256=digests, resumed_networks=[0, 1])
    for checkpoint, networks in ((None, 3), ("epoch_0003", 3), ("epoch_0002", 2)):
        stored = open_run(run, checkpoint)
        assert (list(stored.networks), stored.population) == (list(range(networks)), networks)
