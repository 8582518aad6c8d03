from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import subprocess
import tempfile
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import contents

from dist_graft import cli
from dist_graft.config import DataConfig, GraftConfig, OptimConfig, PopulationConfig, TrainConfig
from dist_graft.config.parsing import option_names
from dist_graft.errors import RunDirectoryError
from dist_graft.run_directory import RunDirectory, atomic_path, git_commit, write_atomically
from dist_graft.training.command import read_options

FREE = {
    "data.download",
    "run_dir",
    "resume_networks",
    "resume",
    "callbacks",
    "checkpoint",
    "monitor",
    "runtime.timeout_seconds",
    "runtime.timeout_epochs",
    "runtime.threads",
    "data.root",
    "data.workers",
    "data.skip_broken",
    "graft.exchange",
    "graft.bucket_mb",
}
OTHER: dict[str, Any] = {
    "seed": 1,
    "method": "none",
    "on_divergence": "abort",
    "data.name": "cifar10",
    "data.root": "/elsewhere",
    "data.batch_size": 127,
    "data.train_samples": 100,
    "data.test_samples": 100,
    "data.val_fraction": 0.5,
    "data.image_size": 32,
    "data.channels": 3,
    "data.augment": False,
    "data.mixup": 0.2,
    "data.cutmix": 1.0,
    "data.random_erasing": 0.3,
    "data.rand_augment": "3,7",
    "data.transform": "mypackage.transforms:transform",
    "data.workers": 1,
    "data.skip_broken": True,
    "data.download": False,
    "model.name": "resnet32",
    "model.activation": "leaky_relu",
    "model.kwargs": {"width": 2},
    "init_from": "/runs/before",
    "init_strict": False,
    "model.shared_init": True,
    "model.dropout": 0.3,
    "optim.name": "adamw",
    "optim.kwargs": {"eps": 1e-6},
    "optim.loss": "mypackage.losses:loss",
    "optim.lr": 0.2,
    "optim.lr_diversity": "cosine",
    "optim.lrs": [0.1, 0.1],
    "optim.momentum": 0.8,
    "optim.nesterov": True,
    "optim.betas": (0.8, 0.9),
    "optim.weight_decay": 1e-5,
    "optim.schedule": "constant",
    "optim.schedule_unit": "step",
    "optim.step_epochs": 30,
    "optim.step_factor": 0.2,
    "optim.schedule_epochs": 40,
    "optim.cycles": 2,
    "optim.warmup_epochs": 1.5,
    "optim.clip_norm": 1.0,
    "optim.accumulation": 2,
    "optim.label_smoothing": 0.1,
    "optim.ema_decay": 0.99,
    "graft.ema": False,
    "graft.every": 2,
    "graft.every_steps": 5,
    "graft.start": 1,
    "graft.stop": 9,
    "graft.source": "noise",
    "graft.topology": "random",
    "graft.level": "filter",
    "graft.threshold": 0.01,
    "graft.noise_annealing": 0.9,
    "papa.every_steps": 5,
    "papa.beta": 0.9,
    "papa.variant": "pairs",
    "papa.every": 2,
    "wash.probability": 0.01,
    "wash.every_steps": 2,
    "diloco.every_steps": 2,
    "diloco.outer_lr": 0.5,
    "diloco.outer_momentum": 0.5,
    "distill.teachers": ["RUN/checkpoints/epoch_0001/network00.pt"],
    "distill.temperature": 4.0,
    "distill.weight": 0.5,
    "graft.criterion": "l1",
    "graft.num_bins": 12,
    "graft.amplitude": 0.5,
    "graft.sensitivity": 500.0,
    "graft.lead": "conv+linear",
    "graft.exchange": "p2p",
    "graft.bucket_mb": 16.0,
    "graft.reset_momentum": True,
    "graft.rule": "mypackage.rules:MyRule",
    "runtime.device": "cpu",
    "runtime.backend": "gloo",
    "runtime.precision": "bf16",
    "runtime.threads": 3,
    "runtime.replicas": 2,
    "runtime.channels_last": False,
    "runtime.matmul_precision": "highest",
    "runtime.compile": "reduce-overhead",
    "runtime.deterministic": True,
    "run_dir": "runs/elsewhere",
    "callbacks": ["mypackage.callbacks:MyCallback", {"mypackage.callbacks:Other": {"every": 3}}],
    "members": [{"optim.lr": 0.05, "data.mixup": 0.2}, {}],
    "diversity": {"optim.weight_decay": {"log_uniform": [1e-5, 1e-3]}},
    "resume": "must",
    "resume_networks": [0, 1],
    "checkpoint.every": 3,
    "checkpoint.every_minutes": 7.5,
    "checkpoint.keep": 5,
    "checkpoint.before_last_round": True,
    "checkpoint.max_failures": 1,
    "checkpoint.grace_seconds": 9.0,
    "monitor.loggers": ["wandb", "mypackage.loggers:MyLogger"],
    "monitor.tensorboard": False,
    "monitor.progress": "lines",
    "monitor.profile_steps": "2:4",
    "runtime.timeout_seconds": 5.0,
    "runtime.timeout_epochs": 2.0,
}
"""Another legal value of every option except epochs."""


def changed(config: TrainConfig, option: str, value: object) -> TrainConfig:
    section, _, name = option.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{name: value})  # type: ignore[arg-type]
    part = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: part})  # type: ignore[arg-type]


def started(path: Path, config: TrainConfig | None = None, *, networks: int = 2) -> RunDirectory:
    """The folder of a run that has started."""
    directory = RunDirectory(path)
    directory.write_config(config or TrainConfig(), networks)
    return directory


class TestWriteAtomically:
    def test_the_file_is_complete_and_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "folder" / "file"
        write_atomically(path, b"first")
        write_atomically(path, b"second")
        assert path.read_bytes() == b"second"
        assert list(path.parent.iterdir()) == [path]

    def test_a_file_in_place_of_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("here")
        with pytest.raises(RunDirectoryError, match=r"file/below cannot be written.*run_dir"):
            write_atomically(tmp_path / "file" / "below", b"content")
        assert (tmp_path / "file").read_text() == "here"

    def test_a_failure_leaves_no_temporary_file(self, tmp_path: Path) -> None:
        """A folder of the same name makes the final rename fail."""
        (tmp_path / "name" / "full").mkdir(parents=True)
        with pytest.raises(RunDirectoryError, match="name cannot be written"):
            write_atomically(tmp_path / "name", b"content")
        assert [path.name for path in tmp_path.iterdir()] == ["name"]


class TestAtomicPath:
    def test_an_error_in_the_block_leaves_the_old_content(self, tmp_path: Path) -> None:
        path = tmp_path / "name"
        path.write_text("old")
        with contextlib.suppress(ValueError), atomic_path(path) as temporary:
            temporary.write_text("new")
            raise ValueError("half of it is written")
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_two_writers(self, tmp_path: Path) -> None:
        """Processes in several containers may have the same id."""
        path = tmp_path / "name"
        with atomic_path(path) as first:
            first.write_text("first")
            with atomic_path(path) as second:
                second.write_text("second")
            assert path.read_text() == "second"
        assert path.read_text() == "first"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_block_that_writes_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "name"):
            pass
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("durable", [True, False])
    def test_exclusive(self, tmp_path: Path, durable: bool) -> None:
        path = tmp_path / "name"
        with atomic_path(path, exclusive=True, durable=durable) as temporary:
            temporary.write_text("first")
        with pytest.raises(FileExistsError), atomic_path(path, exclusive=True) as temporary:
            temporary.write_text("second")
        assert path.read_text() == "first"
        assert list(tmp_path.iterdir()) == [path]


def test_paths() -> None:
    directory = RunDirectory("RUN")
    assert directory.config == Path("RUN/config.yaml")
    assert directory.checkpoints == Path("RUN/checkpoints")
    assert directory.population == Path("RUN/population")
    assert directory.summary == Path("RUN/summary.json")
    assert directory.events == Path("RUN/population/events.jsonl")
    assert directory.stop == Path("RUN/STOP")
    assert directory.stopped == Path("RUN/STOPPED_EARLY")
    assert directory.network(3) == Path("RUN/network03")
    assert directory.metrics(3) == Path("RUN/network03/metrics.jsonl")
    assert directory.status(12) == Path("RUN/network12/status.json")


class TestConfigFile:
    def test_it_has_options_networks_and_versions(self, tmp_path: Path) -> None:
        stored = yaml.safe_load(started(tmp_path, networks=3).config.read_text())
        assert stored["run"]["networks"] == 3
        assert {"dist_graft", "torch", "python"} <= set(stored["run"]["versions"])
        assert "git_commit" in stored["run"]
        assert stored["graft"]["amplitude"] == 0.4
        assert list(stored)[-1] == "run"
        assert "members" not in stored["run"]

    def test_it_has_the_options_of_each_network(self, tmp_path: Path) -> None:
        config = changed(TrainConfig(), "members", [{"optim.betas": (0.8, 0.9)}, {}])
        config = changed(config, "diversity", {"data.cutmix": {"choice": [1.0]}})
        run = yaml.safe_load(started(tmp_path, config).config.read_text())["run"]
        assert run["members"] == [
            {"data.cutmix": 1.0, "optim.betas": [0.8, 0.9]},
            {"data.cutmix": 1.0},
        ]

    @pytest.mark.parametrize(
        "left_out",
        [
            ["optim.nesterov", "optim.lrs", "runtime.replicas", "optim.label_smoothing"],
            ["optim.name", "data.skip_broken", "optim.loss"],
        ],
    )
    def test_every_option_comes_back_through_the_command_line(
        self, tmp_path: Path, left_out: list[str]
    ) -> None:
        """In two parts, because some options exclude each other."""
        config = TrainConfig()
        for option, value in OTHER.items():
            conflicting = {"optim.lr_diversity", "graft.rule", "optim.schedule_unit"}
            conflicting |= {"optim.schedule_epochs", "optim.cycles"}
            if option not in {*left_out, *conflicting}:
                config = changed(config, option, value)
        assert read_back(started(tmp_path, config)) == config

    @settings(max_examples=10)
    @given(
        st.floats(1e-9, 1e9),
        st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=3),
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
        st.integers(0, 2**63 - 1),
    )
    def test_any_value_comes_back(
        self, decay: float, lrs: list[float], name: str, seed: int
    ) -> None:
        config = TrainConfig(
            seed=seed,
            optim=OptimConfig(weight_decay=decay, lrs=lrs),
            data=DataConfig(root=name),
        )
        with tempfile.TemporaryDirectory() as folder:
            assert read_back(started(Path(folder), config)) == with_absolute_root(config)

    def test_it_is_read_without_the_command_line(self, tmp_path: Path) -> None:
        config = TrainConfig(seed=3, optim=OptimConfig(lrs=[0.3, 0.1], betas=(0.8, 0.9)))
        stored = started(tmp_path, config).read_config()
        assert stored == (with_absolute_root(config), 2)
        with pytest.raises(RunDirectoryError, match=r"it has no config\.yaml"):
            RunDirectory(tmp_path / "none").read_config()


def with_absolute_root(config: TrainConfig) -> TrainConfig:
    root = config.data.root if "://" in config.data.root else str(Path(config.data.root).absolute())
    return changed(config, "data.root", root)


def read_back(directory: RunDirectory) -> TrainConfig:
    _, options = cli._parse(["train", "--config", str(directory.config)])
    return read_options(options)[0]


class TestCheck:
    def test_all_options_are_tested(self) -> None:
        impossible_alone = {"runtime.sync_bn", "graft.max_lag", "graft.wait_seconds"}
        impossible_alone |= {"graft.qsr_alpha", "graft.filter_rule", "graft.internal"}
        impossible_alone |= {"optim.schedule_kwargs", "optim.loss_kwargs", "data.transform_kwargs"}
        impossible_alone |= {f"population.{name}" for name in ("size", "network", "join")}
        assert set(OTHER) | {"epochs"} | impossible_alone == set(option_names())

    @pytest.mark.parametrize("option", OTHER)
    def test_only_some_options_may_change(self, tmp_path: Path, option: str) -> None:
        directory, config = started(tmp_path), changed(TrainConfig(), option, OTHER[option])
        before = contents(tmp_path)
        if option in FREE or option.partition(".")[0] in FREE:
            directory.check(config, 2)
        else:
            with pytest.raises(RunDirectoryError) as caught:
                directory.check(config, 2)
            text = str(caught.value)
            value = list(OTHER[option]) if option == "optim.betas" else OTHER[option]
            assert f"{option} was " in text
            assert f" and is now {value!r}" in text
            assert "another run_dir" in text
            assert text.count(" was ") == 1
        assert contents(tmp_path) == before

    def test_arguments_of_the_model_that_were_left_out(self, tmp_path: Path) -> None:
        directory = started(tmp_path, changed(TrainConfig(), "model.kwargs", {"width": 2}))
        with pytest.raises(RunDirectoryError, match=r"model\.kwargs was \{'width': 2\}"):
            directory.check(TrainConfig(), 2)

    @pytest.mark.parametrize(
        ("section", "option"),
        [
            ("optim", {"schedule": "a:b", "schedule_kwargs": {"peak": 0.5}}),
            ("optim", {"loss": "a:b", "loss_kwargs": {"margin": 0.5}}),
            ("data", {"transform": "a:b", "transform_kwargs": {"std": 0.5}}),
        ],
    )
    def test_other_arguments_of_a_function(
        self, tmp_path: Path, section: str, option: dict[str, Any]
    ) -> None:
        (reference, kwargs) = option
        kind = type(getattr(TrainConfig(), section))
        before = dataclasses.replace(TrainConfig(), **{section: kind(**option)})
        now = dataclasses.replace(TrainConfig(), **{section: kind(**{reference: "a:b"})})
        with pytest.raises(RunDirectoryError, match=rf"{section}\.{kwargs} was .* is now \{{\}}"):
            started(tmp_path, before).check(now, 2)

    @pytest.mark.parametrize("option", ["members", "diversity"])
    def test_options_of_single_networks_may_not_be_left_out(
        self, tmp_path: Path, option: str
    ) -> None:
        directory = started(tmp_path, changed(TrainConfig(), option, OTHER[option]))
        with pytest.raises(RunDirectoryError, match=f"{option} was .*optim.* and is now"):
            directory.check(TrainConfig(), 2)

    def test_all_differences_are_named(self, tmp_path: Path) -> None:
        directory = started(tmp_path)
        config = TrainConfig(seed=3, graft=GraftConfig(amplitude=0.1, sensitivity=9.0))
        with pytest.raises(RunDirectoryError) as caught:
            directory.check(config, 2)
        for part in (
            "seed was 0 and is now 3",
            "graft.amplitude was 0.4 and is now 0.1",
            "graft.sensitivity was 5.0 and is now 9.0",
        ):
            assert part in str(caught.value)

    @pytest.mark.parametrize("networks", [1, 3])
    def test_another_number_of_networks(self, tmp_path: Path, networks: int) -> None:
        with pytest.raises(RunDirectoryError, match=f"run of 2 networks, but {networks} processes"):
            started(tmp_path).check(TrainConfig(), networks)

    def test_a_population_that_grows_has_options_of_new_networks(self, tmp_path: Path) -> None:
        def of(*members: dict[str, float]) -> TrainConfig:
            return TrainConfig(
                graft=GraftConfig(exchange="files"),
                population=PopulationConfig(size=len(members)),
                members=list(members),
            )

        first, second = {"optim.lr": 0.1}, {"optim.lr": 0.2}
        directory = RunDirectory(tmp_path, job=0)
        directory.write_config(of(first, second), 2)
        directory.check(of(first, second, first), 3)
        with pytest.raises(RunDirectoryError, match="members was"):
            directory.check(of(second, second, first), 3)

    @pytest.mark.parametrize(
        ("optim", "members", "free"),
        [
            (OptimConfig(lr_diversity="cosine"), [{}], True),
            (OptimConfig(lrs=[0.1] * 2), [{}], False),
            (OptimConfig(), [{"optim.lr": 0.1}], False),
        ],
    )
    def test_rates_of_further_networks_must_not_move_rounds(
        self, tmp_path: Path, optim: OptimConfig, members: list[dict[str, Any]], free: bool
    ) -> None:
        def of(size: int) -> TrainConfig:
            return TrainConfig(
                graft=GraftConfig(exchange="files", every_steps=2, qsr_alpha=0.1),
                population=PopulationConfig(size=size),
                optim=dataclasses.replace(optim, lrs=optim.lrs and [*optim.lrs, 0.2][:size]),
                members=members * size,
            )

        directory = RunDirectory(tmp_path, job=0)
        directory.write_config(of(2), 2)
        directory.check(of(2), 2)
        with (
            contextlib.nullcontext()
            if free
            else pytest.raises(RunDirectoryError, match="move its rounds")
        ):
            directory.check(of(3), 3)

    @pytest.mark.parametrize(
        ("option", "value", "free"),
        [
            ("graft.wait_seconds", "inf", True),
            ("population.network", 1, True),
            ("population.join", "donor", True),
            ("graft.max_lag", 3.0, False),
            ("seed", 1, False),
        ],
    )
    def test_jobs_of_one_population(
        self, tmp_path: Path, option: str, value: object, free: bool
    ) -> None:
        config = TrainConfig(
            graft=GraftConfig(exchange="files"), population=PopulationConfig(size=2)
        )
        first, second = RunDirectory(tmp_path, job=0), RunDirectory(tmp_path, job=1)
        first.write_config(config, 2)
        before = contents(tmp_path)
        other = changed(config, option, value)
        if free:
            second.write_config(other, 2)
        else:
            with pytest.raises(RunDirectoryError, match=f"{option} was "):
                second.write_config(other, 2)
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("together", ["all_gather", "p2p"])
    def test_networks_cannot_turn_into_jobs(
        self, tmp_path: Path, together: typing.Literal["all_gather", "p2p"]
    ) -> None:
        files = TrainConfig(
            graft=GraftConfig(exchange="files"), population=PopulationConfig(size=2)
        )
        with pytest.raises(RunDirectoryError, match=r"graft\.exchange was .* and is now 'files'"):
            started(tmp_path, TrainConfig(graft=GraftConfig(exchange=together))).check(files, 2)
        with pytest.raises(RunDirectoryError, match=r"graft\.exchange was 'files' and is now"):
            started(tmp_path, files).check(TrainConfig(), 2)

    @pytest.mark.parametrize("schedule", ["constant", "step"])
    def test_more_epochs_when_the_schedule_does_not_depend_on_them(
        self, tmp_path: Path, schedule: typing.Literal["constant", "step"]
    ) -> None:
        config = TrainConfig(epochs=3, optim=OptimConfig(schedule=schedule))
        directory = started(tmp_path, config)
        directory.check(dataclasses.replace(config, epochs=4), 2)
        with pytest.raises(RunDirectoryError, match="run of 3 epochs, more than --epochs 2"):
            directory.check(dataclasses.replace(config, epochs=2), 2)

    def test_more_epochs_with_a_round_after_the_last_step(self, tmp_path: Path) -> None:
        optim = OptimConfig(schedule="constant")
        graft = GraftConfig(every_steps=2, qsr_alpha=0.1)
        config = TrainConfig(epochs=3, optim=optim, graft=graft)
        directory = started(tmp_path, config)
        directory.check(config, 2)
        with pytest.raises(RunDirectoryError, match=r"qsr_alpha adds a round .* another run_dir"):
            directory.check(dataclasses.replace(config, epochs=4), 2)

    def test_more_epochs_when_it_does(self, tmp_path: Path) -> None:
        directory = started(tmp_path, TrainConfig(epochs=3))
        with pytest.raises(RunDirectoryError) as caught:
            directory.check(TrainConfig(epochs=4), 2)
        text = str(caught.value)
        assert "cosine schedule depends on" in text
        assert "--epochs 4" in text
        assert "another run_dir" in text

    def test_more_epochs_within_the_span_of_the_schedule(self, tmp_path: Path) -> None:
        config = TrainConfig(epochs=3, optim=OptimConfig(schedule_epochs=4))
        started(tmp_path, config).check(dataclasses.replace(config, epochs=4), 2)

    def test_never_refuses_a_folder_with_a_run(self, tmp_path: Path) -> None:
        config = TrainConfig(resume="never")
        RunDirectory(tmp_path).check(config, 2)
        with pytest.raises(RunDirectoryError, match="already holds a run"):
            started(tmp_path).check(config, 2)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "epochs: [",
            "- a",
            "3",
            "epochs: 3\n",
            "epochs: 20\nrun: 4\n",
            "run: {networks: 2}\n",
        ],
    )
    def test_a_configuration_that_cannot_be_read(self, tmp_path: Path, text: str) -> None:
        directory = started(tmp_path)
        directory.config.write_text(text)
        with pytest.raises(RunDirectoryError, match="another run_dir"):
            directory.check(TrainConfig(), 2)
        assert directory.config.read_text() == text

    def test_a_name_that_is_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(RunDirectoryError, match="another run_dir"):
            RunDirectory(tmp_path / ("n" * 300)).check(TrainConfig(), 2)


def test_without_git_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None


def test_only_changes_of_the_package_mark_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    for path in (module := package / "module.py", other := tmp_path / "results.csv"):
        path.write_text("first")
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr("dist_graft.run_directory.__file__", str(module))
    commit = git_commit()
    assert commit
    other.write_text("second")
    assert git_commit() == commit
    module.write_text("second")
    assert git_commit() == f"{commit}-dirty"


def test_a_new_file_on_a_disk_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "config.yaml"
    write_atomically(path, b"first", exclusive=True)
    with pytest.raises(FileExistsError):
        write_atomically(path, b"second", exclusive=True)
    assert path.read_bytes() == b"first"
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
