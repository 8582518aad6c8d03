from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from dist_graft import cli
from dist_graft.command import Command, Options
from dist_graft.config import GraftConfig, OptimConfig, TrainConfig
from dist_graft.config.parsing import option_names
from dist_graft.errors import ConfigError
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.training.command import read_options
from dist_graft.training.help import ALIASES, FREQUENT

pytestmark = pytest.mark.usefixtures("empty_working_directory")
PREFIX = "dist-graft: error: "
UNKNOWN_MODEL = "--model.name=none"
"""Ends training at once if the expected error is not raised."""


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The error message of an invalid command line."""
    assert cli.run([*argv, *([UNKNOWN_MODEL] if argv[:1] == ("train",) else [])]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith(PREFIX)
    assert captured.out == ""
    assert "model.name 'none'" not in lines[0], "not refused"
    return lines[0].removeprefix(PREFIX)


def parsed(*argv: str) -> TrainConfig:
    command, options = cli._parse(["train", *argv])
    assert command == "train"
    config, networks = read_options(options)
    assert networks is None
    return config


def write_file(text: str, name: str = "options.yaml") -> str:
    Path(name).write_text(text)
    return name


@pytest.mark.parametrize(
    ("words", "loggers"),
    [
        ([], ["tensorboard"]),
        (["--monitor.loggers", "wandb"], ["wandb"]),
        (["--monitor.loggers", "tensorboard, wandb,wandb"], ["tensorboard", "wandb"]),
        (["--monitor.loggers", "[mlflow, own.module:Name]"], ["mlflow", "own.module:Name"]),
        (["--monitor.loggers", "[]"], []),
        (["--monitor.tensorboard", "false"], []),
        (
            ["--monitor.loggers", "tensorboard,trackio", "--monitor.tensorboard", "false"],
            ["trackio"],
        ),
    ],
)
def test_loggers_on_the_command_line(words: list[str], loggers: list[str]) -> None:
    assert parsed(*words).monitor.loggers == loggers


@pytest.mark.parametrize("value", ["wandb,mlflow", "[wandb, mlflow]"])
def test_loggers_in_a_file(value: str, tmp_path: Path) -> None:
    config = write_file(f"monitor:\n  loggers: {value}\n", str(tmp_path / "options.yaml"))
    assert parsed("--config", config).monitor.loggers == ["wandb", "mlflow"]


class TestValidOptions:
    def test_defaults(self) -> None:
        assert parsed() == TrainConfig()

    def test_options_of_every_type(self) -> None:
        config = parsed(
            *("--epochs", "3", "--graft.amplitude", "0.25", "--optim.lrs", "[0.1, 1e-3]"),
            *("--optim.nesterov", "true", "--data.channels", "3", "--graft.exchange=p2p"),
            *("--optim.betas", "[0.8, 0.9]", "--callbacks", "a:B", "--callbacks=c.d:E"),
            *("--callbacks", "{f:G: {x: 1.5, y: [a]}}", "--model.kwargs", "{width: 8}"),
        )
        assert config == TrainConfig(
            epochs=3,
            callbacks=["a:B", "c.d:E", {"f:G": {"x": 1.5, "y": ["a"]}}],
            model=type(config.model)(kwargs={"width": 8}),
            graft=GraftConfig(amplitude=0.25, exchange="p2p"),
            optim=OptimConfig(lrs=[0.1, 1e-3], nesterov=True, betas=(0.8, 0.9)),
            data=type(config.data)(channels=3),
        )

    def test_options_override_the_file(self) -> None:
        path = write_file("epochs: 7\ncallbacks: [a:B]\ngraft: {amplitude: 0.1, sensitivity: 2}\n")
        config = parsed("--config", path, "--graft.amplitude", "0.2", "--callbacks", "c:D")
        assert (config.epochs, config.callbacks) == (7, ["a:B", "c:D"])
        assert parsed("--config", path, "--callbacks", "[]").callbacks == []
        assert config.graft == GraftConfig(amplitude=0.2, sensitivity=2.0)

    def test_output_of_print_config_is_a_valid_file(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = ("--optim.lrs", "[0.1, 0.2]", "--seed", "5", "--data.train_samples", "64")
        with pytest.raises(SystemExit) as left:
            cli.run(["train", *options, "--print_config"])
        assert not left.value.code
        path = write_file(capsys.readouterr().out)
        assert parsed("--config", path) == parsed(*options)

    def test_section_run_of_a_run_directory_is_ignored(self) -> None:
        path = write_file("run_dir: somewhere\nepochs: 2\nrun:\n  networks: 4\n")
        assert parsed("--config", path) == TrainConfig(run_dir="somewhere", epochs=2)

    def test_section_run_is_unknown_in_other_files(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "'run" in refused(capsys, "train", "--config", write_file("run:\n  networks: 4\n"))


class TestInvalidOptions:
    @pytest.mark.parametrize(
        ("argv", "names", "meant"),
        [
            (["--graft.amplitud", "0.5"], "--graft.amplitud", "--graft.amplitude"),
            (["--data.train_sample", "5"], "--data.train_sample", "--data.train_samples"),
            (["--epoch=3"], "--epoch", "--epochs"),
            (["--run-dir", "x"], "--run-dir", None),
            (["--optim.lrdiversity", "cosine"], "--optim.lrdiversity", "--optim.lr_diversity"),
            (["--grft.every", "0"], "--grft.every", "--graft.every"),
            (["--xyzzy", "1"], "--xyzzy", None),
            (["surplus"], "surplus", None),
            (["--lr", "0.1"], "--lr", "--optim.lr"),
            (["--learning-rate", "0.1"], "--learning-rate", "--optim.lr"),
            (["--config", "with_alias.yaml"], "learning_rate", "--optim.lr"),
        ],
    )
    def test_unknown_or_abbreviated_option(
        self, capsys: pytest.CaptureFixture[str], argv: list[str], names: str, meant: str | None
    ) -> None:
        write_file("learning_rate: 0.1\n", "with_alias.yaml")
        line = refused(capsys, "train", *argv)
        assert names in line
        assert "dist-graft train --help all lists all options" in line
        if meant:
            assert f"did you mean {meant}?" in line

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (["--graft.amplitude", "1.5"], "graft.amplitude must be in [0, 1], got 1.5"),
            (["--graft.amplitude", "-0.5"], "graft.amplitude must be in [0, 1], got -0.5"),
            (["--graft.sensitivity", "-1"], "graft.sensitivity must be at least 0, got -1.0"),
            (["--optim.lrs", "[0.1, 0.2]"], "optim.lrs has 2 learning rates for 1 networks"),
            (["--data.name", "cifar-10"], "(did you mean cifar10 or cifar100?)"),
            (["--data.name", "mnist"], "fashion-mini, fashion-mnist, cifar10"),
            (["--epochs", "two"], "epochs"),
            (["--optim.schedule", "linear"], "cosine, step, constant, or a reference"),
            (["--graft.exchange", "p2q"], "one of all_gather, p2p, files, got p2q"),
            (["--config", "missing.yaml"], "missing.yaml"),
            (["--epochs"], "--epochs"),
            (
                ["--data", "cifar10"],
                "section data: there is no YAML file 'cifar10'; set its options with --data.NAME",
            ),
        ],
    )
    def test_invalid_value(
        self, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
    ) -> None:
        assert says in refused(capsys, "train", *argv)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("graft:\n  amplitud: 0.3\n", "did you mean --graft.amplitude?"),
            ("epocs: 3\n", "did you mean --epochs?"),
            ("graft:\n  amplitude: 0.3\n  amplitude: 0.4\n", "key 'amplitude' is given twice"),
            ("epochs: 1\nseed: 2\nepochs: 3\n", "key 'epochs' is given twice"),
            ("graft: {every: 1}\ngraft: {every: 2}\n", "key 'graft' is given twice"),
            ("graft:\n  amplitude: 1.3\n", "graft.amplitude must be in [0, 1], got 1.3"),
            ("model:\n  name: 3\n", "model.name"),
            ("graft: 3\n", "graft"),
            ("graft: [1, 2]\n", "graft"),
            ("epochs: [\n", "parsing"),
            ("- a\n- b\n", "config"),
        ],
    )
    def test_invalid_file(self, capsys: pytest.CaptureFixture[str], text: str, says: str) -> None:
        assert says in refused(capsys, "train", "--config", write_file(text))

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            ([], "no command is given; commands: train, prepare, "),
            (["trian"], "there is no command 'trian'; did you mean train?; commands: train, "),
            (["prepare"], "missing: NAME; dist-graft prepare --help lists all options"),
            (["prepare", "mnist"], "mnist"),
            (["push", "weights"], "missing: --repo; dist-graft push --help lists all options"),
            (["export", "x", "--format", "a"], "--format must be one of safetensors, pt, "),
            (["train", "--epochs", "a"], "--epochs must be a whole number, got a; "),
            (["train", "--optim.lr", "a"], "--optim.lr must be a number, got a; "),
            (["compare", "--dry_run", "no.yaml"], "no.yaml cannot be read"),
            (["compare", "p.yaml", "--dry_run=a"], "--dry_run takes no value, got a; "),
        ],
    )
    def test_missing_or_unfit_arguments(
        self, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
    ) -> None:
        assert says in refused(capsys, *argv)


def test_completion_knows_commands_options_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as ending:
        cli.run(["--print_completion", "bash"])
    assert not ending.value.code
    script = capsys.readouterr().out
    words = "dist-graft train --optim.schedule_unit ''"
    asked = f"COMP_WORDS=({words}); COMP_CWORD=3; _shtab_dist_graft; echo ${{COMPREPLY[*]}}"
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["epoch", "step"]


def test_completion_names_the_missing_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.run(["--print_completion", "zsh"]) == 1
    assert "pip install 'dist_graft[completion]'" in capsys.readouterr().err


class TestRefusal:
    def test_nothing_is_written(self, capsys: pytest.CaptureFixture[str]) -> None:
        refused(capsys, "train", "--run_dir", "run", "--graft.amplitude", "2")
        assert not Path("run").exists()

    @pytest.mark.parametrize(
        ("environment", "says"),
        [
            ({"RANK": "1"}, "WORLD_SIZE"),
            ({"RANK": "one", "WORLD_SIZE": "2"}, "'one'"),
            ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 of WORLD_SIZE 2"),
        ],
    )
    def test_invalid_environment(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        environment: dict[str, str],
        says: str,
    ) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert cli.run(["train"]) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith(PREFIX)
        assert says in captured.err
        assert "torchrun" in captured.err


@pytest.mark.parametrize("command", [command for command in cli.COMMANDS if command != "train"])
def test_commands_in_one_process_are_refused_under_torchrun(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(cli, "read_process_info", lambda: ProcessInfo(rank=1, world_size=2))
    arguments = {
        "doctor": [],
        "plan": ["--networks", "2", "--model", "resnet8"],
        "push": ["export", "--repo", "me/mine"],
    }
    assert cli.run([command, *arguments.get(command, ["fashion-mini"])]) == 1
    assert f"{command} runs in one process: start it without torchrun" in capsys.readouterr().err


def test_command_is_added_by_listing_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_parser(settings: Mapping[str, Any]) -> ArgumentParser:
        parser = ArgumentParser(description="Say hello.", **settings)
        parser.add_argument("--times", type=int, default=1)
        return parser

    def run(options: Options, process: ProcessInfo) -> Iterator[str]:
        yield from [f"hello {process.rank}"] * options["times"]

    command = Command(name="hello", help="say hello", build_parser=build_parser, run=run)
    monkeypatch.setitem(cli.COMMANDS, "hello", command)
    assert cli.run(["hello", "--times", "2"]) == 0
    assert capsys.readouterr().out == "hello 0\nhello 0\n"
    with pytest.raises(SystemExit):
        cli.run(["--help"])
    assert "say hello" in capsys.readouterr().out


def test_help_and_errors_of_all_commands_load_no_torch() -> None:
    program = (
        "import sys\n"
        "from dist_graft import cli\n"
        "for command in ([], *([name] for name in cli.COMMANDS)):\n"
        "    try:\n"
        "        cli.run([*command, '--help'])\n"
        "    except SystemExit:\n"
        "        pass\n"
        "assert cli.run(['inspect', 'x', '--num_bins', '0']) == 2\n"
        "assert cli.run(['plan', '--networks', '0', '--model', 'resnet50']) == 2\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'tensorboard', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    for option in ("--data.root", "--thresholds", "--bandwidth_inter", "--watch", "--out"):
        assert option in done.stdout


class TestHelpOfTrain:
    def listed(self, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
        with pytest.raises(SystemExit) as exit_:
            cli.run(["train", "--help", *words])
        assert not exit_.value.code
        return re.findall(r"^  --([\w.]+)", capsys.readouterr().out, re.M)

    def test_frequent_options(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert sorted(self.listed(capsys)) == sorted(FREQUENT)

    def test_one_section(self, capsys: pytest.CaptureFixture[str]) -> None:
        options = {name for name in option_names() if name.startswith("graft.")}
        assert set(self.listed(capsys, "graft")) == options | {"graft"}

    def test_all_options(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert {*option_names(), "networks", "print_config"} <= set(self.listed(capsys, "all"))

    def test_unknown_section(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--help SECTION those of data, model" in refused(capsys, "train", "--help", "grft")

    def test_aliases_stand_for_options(self) -> None:
        assert set(ALIASES.values()) <= {*option_names(), "networks"}
        assert not set(ALIASES) & set(option_names())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "--networks", "two"], "--networks must be int, got two; "),
        (["train", "--data.image_size", "big"], "--data.image_size must be int, got big; "),
        (
            ["plan", "--networks", "2", "--model.name", "resnet8"],
            "unrecognized arguments: --model.name; use --model; ",
        ),
    ],
)
def test_types_are_named_as_in_the_help(
    capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    assert refused(capsys, *argv).startswith(says)


@pytest.mark.parametrize("value", ["0", "-2"])
def test_number_of_networks(capsys: pytest.CaptureFixture[str], value: str) -> None:
    assert "--networks must be at least 1" in refused(capsys, "train", f"--networks={value}")


def test_networks_are_not_started_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"networks": 2}
    with pytest.raises(ConfigError, match="leave out --networks, or start without torchrun"):
        cli.COMMANDS["train"].assign(options, ProcessInfo(launched=True))


def test_exit_status(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dist_graft", "train", "--graft.amplitude", "2"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr == f"{PREFIX}graft.amplitude must be in [0, 1], got 2.0\n"


class TestSectionInSeparateFile:
    def write(self, **files: str) -> None:
        Path("sections").mkdir()
        for name, text in files.items():
            Path("sections", f"{name}.yaml").write_text(text)
        Path("all.yaml").write_text("optim: sections/optim.yaml\n")

    def test_path_is_relative_to_the_config_file(self) -> None:
        self.write(optim="lr: 0.5\nmomentum: 0.5\n")
        config = parsed("--config", "all.yaml", "--optim.momentum", "0.25")
        assert (config.optim.lr, config.optim.momentum) == (0.5, 0.25)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("lrr: 1\n", "did you mean --optim.lr?"),
            ("lr: 1\nlr: 2\n", "section optim: 'sections/optim.yaml': key 'lr' is given twice"),
            ("lr: 0\n", "optim.lr must be above 0"),
        ],
    )
    def test_separate_file_is_validated(
        self, capsys: pytest.CaptureFixture[str], text: str, says: str
    ) -> None:
        self.write(optim=text)
        assert says in refused(capsys, "train", "--config", "all.yaml")

    def test_missing_separate_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.write()
        line = refused(capsys, "train", "--config", "all.yaml")
        assert line.startswith("section optim: there is no YAML file 'sections/optim.yaml'")


CONFIGS = Path(__file__).parents[2] / "launch/configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    config = parsed("--config", str(path))
    given = yaml.safe_load(path.read_text())
    assert given
    assert all(hasattr(config, name) for name in given)
