from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from stored_runs import export_run, network, related_states, write_run

from dist_graft.analysis import inspect_filters
from dist_graft.analysis.stored_weights import labels, read_source
from dist_graft.errors import ConfigError, NonFiniteError, RunDirectoryError
from dist_graft.population.runtime.process_info import ProcessInfo

THRESHOLDS = [20.0, 10.0]


def inspect(
    *paths: Path,
    out: Path | None,
    model_name: str | None = None,
    lead: str | None = None,
    thresholds: list[float] = THRESHOLDS,
) -> str:
    """Inspect the paths and return the printed text."""
    options = {
        "sources": [str(path) for path in paths],
        "thresholds": thresholds,
        "num_bins": 10,
        "out": out and str(out),
        "model": {"name": model_name},
        "graft": {"lead": lead},
    }
    return "\n".join(inspect_filters.run(options, ProcessInfo()))


def lines_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "inspect.csv").open() as file:
        return list(csv.DictReader(file))


def plain_entropy(values: np.ndarray) -> float:
    """Eq. 4 with ten bins, the last one closed, in a plain loop."""
    low, high = np.float32(values.min()), np.float32(values.max())
    counts = [0] * 10
    for value in values.ravel():
        counts[min(9, int(np.float32(value - low) / np.float32(high - low) * np.float32(10)))] += 1
    return -sum(c / values.size * math.log(c / values.size) for c in counts if c)


@pytest.fixture(scope="module")
def folder(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run, with the printed text in text.txt."""
    folder = tmp_path_factory.mktemp("inspected")
    (folder / "text.txt").write_text(inspect(trio, out=folder))
    return folder


@pytest.fixture(scope="module")
def exported(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "weights"
    export_run(trio, out=folder)
    return folder


class TestOutput:
    def test_csv_has_a_line_per_filter_in_order(self, folder: Path) -> None:
        lines = lines_of(folder)
        assert len(lines) == 3 * 688
        assert {line["source"] for line in lines} == {"run"}
        assert [line["network"] for line in lines[::688]] == ["0", "1", "2"]
        units = list(dict.fromkeys(line["unit"] for line in lines))
        assert units[:2] == ["conv1", "layer1.0.conv1"]
        assert len(units) == 19
        assert [int(line["filter"]) for line in lines if line["unit"] == "conv1"] == [
            *range(16)
        ] * 3

    @pytest.mark.parametrize("unit", ["conv1", "layer2.0.conv1"])
    def test_values_equal_plain_loops(self, folder: Path, unit: str) -> None:
        for number, state in enumerate(related_states(3)[:2]):
            weight = state[f"{unit}.weight"].numpy()
            lines = [
                line
                for line in lines_of(folder)
                if line["unit"] == unit and line["network"] == str(number)
            ]
            for line, own in zip(lines, weight, strict=True):
                assert int(line["weights"]) == own.size
                assert float(line["l1_norm"]) == pytest.approx(np.abs(own).sum(), rel=1e-5)
                assert float(line["entropy_nats"]) == pytest.approx(plain_entropy(own), abs=1e-6)
                assert float(line["unit_entropy_nats"]) == pytest.approx(
                    plain_entropy(weight), abs=1e-6
                )
                assert float(line["unit_mean_absolute_weight"]) == pytest.approx(
                    np.abs(weight).mean(), rel=1e-5
                )

    def test_network_table(self, folder: Path) -> None:
        text = (folder / "text.txt").read_text().splitlines()
        for number, state in enumerate(related_states(3)):
            norms = torch.cat(
                [tensor.abs().flatten(1).sum(1) for tensor in state.values() if tensor.dim() == 4]
            )
            counts = [int((norms < threshold).sum()) for threshold in THRESHOLDS]
            shares = [f"{count} ({count / 6.88:.1f}%)" for count in counts]
            assert text[1 + number].split() == [
                "run",
                str(number),
                "688",
                *" ".join(shares).split(),
            ]

    def test_layer_table(self, folder: Path) -> None:
        text = (folder / "text.txt").read_text()
        for name in ("conv1", "layer1.0.conv1", "layer3.2.conv2"):
            assert f" {name} " in text
        assert "written:" in text

    def test_plots(self, folder: Path) -> None:
        for name in ("invalid_filters.png", "entropy.png", "norms.png"):
            assert (folder / name).read_bytes()[:4] == b"\x89PNG"


class TestSources:
    @pytest.mark.parametrize("path", [".", "checkpoints/epoch_0001"])
    def test_run_and_checkpoint(self, trio: Path, path: str) -> None:
        assert list(read_source(trio / path).states) == ["0", "1", "2"]

    def test_relative_path(self, trio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(trio / "checkpoints")
        assert list(read_source(Path("epoch_0001")).states) == ["0", "1", "2"]

    def test_file_of_a_checkpoint(self, trio: Path) -> None:
        source = read_source(trio / "checkpoints/epoch_0002/network01.pt")
        assert list(source.states) == ["1"]
        expected = related_states(3)[1]["conv1.weight"]
        assert torch.equal(source.states["1"]["conv1.weight"], expected)

    def test_exported_folder(self, exported: Path) -> None:
        assert list(read_source(exported).states) == ["0", "1", "2"]
        soup = read_source(exported / "uniform_soup.pt")
        assert list(soup.states) == ["uniform_soup"]
        assert soup.model.name == "resnet20"

    def test_single_file(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.pt"
        torch.save(network(0).state_dict(), path)
        with pytest.raises(
            ConfigError, match=r"mine\.pt is neither in a run .*: give --model\.name"
        ):
            read_source(path)
        inspect(path, out=tmp_path, model_name="resnet20")
        assert {line["network"] for line in lines_of(tmp_path)} == {"mine"}

    def test_weights_of_torchvision(self, tmp_path: Path) -> None:
        path = tmp_path / "theirs.pt"
        torch.save(network(0, name="squeezenet1_1", channels=3).state_dict(), path)
        inspect(path, out=tmp_path, model_name="squeezenet1_1")
        assert lines_of(tmp_path)[0]["unit"] == "features.0"

    def test_several_sources(self, trio: Path, exported: Path, tmp_path: Path) -> None:
        text = inspect(trio, exported, exported / "uniform_soup.pt", out=tmp_path)
        sources = list(dict.fromkeys(line["source"] for line in lines_of(tmp_path)))
        assert len(sources) == 3
        assert text.count(" layer1.0.conv1 ") == 1
        assert all(text.count(f" {source} ") >= 19 for source in sources)

    def test_different_models_are_compared_in_shared_layers(
        self, trio: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "file.pt"
        torch.save(network(0, name="resnet14").state_dict(), path)
        text = inspect(trio, path, out=tmp_path, model_name="resnet14")
        units = {"run": set(), "file.pt": set()}  # type: dict[str, set[str]]
        for line in lines_of(tmp_path):
            units[line["source"].rpartition("/")[2]].add(line["unit"])
        assert units["run"] == units["file.pt"]
        assert len(units["run"]) == 13
        assert "only the 13 layers" in text

    def test_results_are_written_into_the_run(
        self, trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        run = shutil.copytree(trio, tmp_path / "run")
        inspect(run / "checkpoints/epoch_0001", run, out=None)
        assert (run / "inspect/inspect.csv").is_file()
        torch.save(network(0).state_dict(), tmp_path / "mine.pt")
        inspect(tmp_path / "mine.pt", out=None, model_name="resnet20")
        assert (tmp_path / "inspect/inspect.csv").is_file()
        assert {path.name for path in tmp_path.iterdir()} == {"run", "mine.pt", "inspect"}

    def test_no_empty_plot(self, trio: Path, tmp_path: Path) -> None:
        inspect(trio, out=tmp_path)
        assert (tmp_path / "invalid_filters.png").is_file()
        text = inspect(trio, out=tmp_path, thresholds=[1e-6])
        assert not (tmp_path / "invalid_filters.png").exists()
        assert "no L1 norm is below 1e-06" in text
        assert (tmp_path / "norms.png").is_file()

    def test_linear_layers(self, trio: Path, tmp_path: Path) -> None:
        inspect(trio, out=tmp_path, lead="conv+linear")
        assert lines_of(tmp_path)[-1]["unit"] == "linear"


class TestLabels:
    @pytest.mark.parametrize(
        ("paths", "expected"),
        [
            (["runs/a"], ["a"]),
            (["runs/a", "runs/b"], ["a", "b"]),
            (["runs/a/", "runs/./b"], ["a", "b"]),
            (["x/a/run", "x/b/run"], ["a/run", "b/run"]),
            (
                ["a/checkpoints/epoch_0001", "a/checkpoints/epoch_0002"],
                ["epoch_0001", "epoch_0002"],
            ),
            (["a", "a/checkpoints/epoch_0001"], ["a", "a/epoch_0001"]),
            (["a/checkpoints/epoch_0001/network01.pt"], ["network01.pt"]),
        ],
    )
    def test_common_parent_is_removed(self, paths: list[str], expected: list[str]) -> None:
        assert labels([Path(path) for path in paths]) == expected

    def test_same_path_twice(self) -> None:
        with pytest.raises(ConfigError, match="runs/a is given twice"):
            labels([Path("runs/b"), Path("runs/a"), Path("runs/../runs/a")])


class TestErrors:
    def test_missing_path(self, tmp_path: Path) -> None:
        with pytest.raises(RunDirectoryError, match="nowhere does not exist"):
            read_source(tmp_path / "nowhere")

    def test_not_a_run_directory(self, tmp_path: Path) -> None:
        with pytest.raises(RunDirectoryError, match="is not a run directory"):
            read_source(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 broken"])
    def test_unreadable_file(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "file.pt"
        path.write_bytes(content)
        with pytest.raises(RunDirectoryError, match=r"file\.pt cannot be read as weights"):
            read_source(path, "resnet20")

    @pytest.mark.parametrize("content", [[1, 2], {"model": 3}, {"a": 1}, torch.zeros(2)])
    def test_no_state_dict(self, tmp_path: Path, content: object) -> None:
        path = tmp_path / "file.pt"
        torch.save(content, path)
        with pytest.raises(RunDirectoryError, match=r"file\.pt holds no state dict"):
            read_source(path, "resnet20")

    def test_no_image_classifier(self, tmp_path: Path) -> None:
        path = tmp_path / "file.pt"
        torch.save({"weight": torch.zeros(3, 4)}, path)
        with pytest.raises(ConfigError, match="no classifier of images with 1 or 3 channels"):
            inspect(path, out=tmp_path, model_name="resnet20")

    def test_wrong_architecture(self, tmp_path: Path) -> None:
        path = tmp_path / "file.pt"
        torch.save(network(0).state_dict(), path)
        with pytest.raises(
            ConfigError, match=r"not hold the weights of this architecture: Missing"
        ):
            inspect(path, out=tmp_path, model_name="resnet32")

    def test_no_shared_layers(self, trio: Path, tmp_path: Path) -> None:
        path = tmp_path / "file.pt"
        torch.save(network(0, name="vgg16_bn").state_dict(), path)
        with pytest.raises(ConfigError, match="share no layers: inspect them separately"):
            inspect(trio, path, out=tmp_path, model_name="vgg16_bn")

    def test_non_finite_weight(self, tmp_path: Path) -> None:
        state = network(0).state_dict()
        state["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
        run = write_run(tmp_path / "run", [state])
        with pytest.raises(NonFiniteError, match=r"layer layer1\.0\.conv1 of network 0"):
            inspect(run, out=tmp_path)

    def test_other_file_of_a_checkpoint(self, trio: Path) -> None:
        with pytest.raises(RunDirectoryError, match=r"COMPLETE\.json is not a network of"):
            read_source(trio / "checkpoints/epoch_0002/COMPLETE.json")
