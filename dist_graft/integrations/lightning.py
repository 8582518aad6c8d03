"""Grafting with Lightning: each process of the launcher trains a network of its own.

Lightning takes the processes of a launcher for replicas of one model: only rank 0 writes logs and
checkpoints. `network_trainer` creates a trainer that writes those of its own network, and
`GraftCallback` grafts the networks. Start the script with torchrun or `dist_graft.launch`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torchmetrics
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ParallelStrategy, SingleDeviceStrategy

from dist_graft.integrations.rounds import (
    check_interval,
    encode_paths,
    refuse_rule_state,
    refuse_shared_paths,
    round_metrics,
)
from dist_graft.population.grafter import Grafter
from dist_graft.population.round.record import GraftRecord
from dist_graft.population.runtime.framework_processes import (
    gather_texts,
    join_networks,
    local_device,
)
from dist_graft.population.runtime.process_info import read_process_info
from dist_graft.run_directory import RunDirectory

MakeLogger = Callable[[Path], Logger | list[Logger]]


class NetworkStrategy(SingleDeviceStrategy):
    """Trains a network of its own in this process, on this process's GPU or on the CPU.

    Args:
        accelerator: as for `lightning.Trainer`; "cpu", or a GPU if there is one.
    """

    def __init__(self, accelerator: str = "auto") -> None:
        super().__init__(device=local_device(use_cpu=accelerator == "cpu"))
        self.network = read_process_info().rank
        # Otherwise only rank 0 of the launcher writes files.
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
        # Advice for replicas; here nothing is to be averaged over the processes.
        warnings.filterwarnings("ignore", message=r".*sync_dist=True", module=r"lightning\.")

    def setup_environment(self) -> None:
        """Connect the networks."""
        join_networks(self.root_device)
        super().setup_environment()


def network_trainer(
    *,
    default_root_dir: str | Path = "lightning_runs",
    accelerator: str = "auto",
    logger: Logger | MakeLogger | list[Logger] | bool | None = None,
    **options: Any,
) -> lightning.Trainer:
    """Create the trainer of this process's network.

    Its files are in ``DEFAULT_ROOT_DIR/network03``. Only network 0 shows a progress bar and the
    model summary, unless `options` say otherwise. Resume with ``ckpt_path="last"`` or a path in the
    network's own folder.

    Args:
        default_root_dir: folder of the population.
        accelerator: as for `lightning.Trainer`.
        logger: as for `lightning.Trainer`, or a function (folder of the network) -> logger or
            loggers, which is what most loggers need to keep the networks apart.
        options: further arguments of `lightning.Trainer`, except strategy, devices and num_nodes.

    Raises: ValueError for an option that does not fit.
    """
    for name in ("strategy", "devices", "num_nodes"):
        if name in options:
            raise ValueError(
                f"network_trainer sets {name} itself: each process trains one network on one device"
            )
    strategy = NetworkStrategy(accelerator)
    folder = RunDirectory(default_root_dir).network(strategy.network)
    if callable(logger) and not isinstance(logger, Logger):
        logger = logger(folder)
    for name in ("enable_progress_bar", "enable_model_summary"):
        options.setdefault(name, strategy.network == 0)
    plugins = options.pop("plugins", None) or []
    plugins = [*plugins] if isinstance(plugins, list | tuple) else [plugins]
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu" if strategy.root_device.type == "cpu" else "gpu",
        strategy=strategy,
        devices=1,
        logger=logger,
        plugins=[LightningEnvironment(), *plugins],  # not the launcher's, whose size is K
        **options,
    )


class GraftCallback(lightning.Callback):
    """Runs a round of grafting between the networks after epochs or steps.

    Logs ``graft/coefficient`` and ``graft/distance``, the means over the layers. Rounds come before
    the checkpoints that Lightning saves at the end of an epoch. Metrics of torchmetrics are
    computed for each network alone.

    Args:
        every_n_epochs: epochs between rounds.
        every_n_steps: optimizer steps between rounds, instead of epochs.
        options: arguments of `dist_graft.Grafter`. With a strategy that trains replicas, pass
            ``group`` and ``replica_group``.

    Attributes:
        record (GraftRecord | None): the latest round.

    Raises: ValueError for an interval below 1 or a rule with a state (Diloco); at the start of
        training, when networks would write the same files, or when a data-parallel strategy trains
        one network.
    """

    def __init__(
        self, *, every_n_epochs: int = 1, every_n_steps: int | None = None, **options: Any
    ) -> None:
        check_interval(every_n_epochs=every_n_epochs, every_n_steps=every_n_steps)
        refuse_rule_state(options.get("rule"))
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.options = options
        self.record: GraftRecord | None = None
        self._round = 0
        self._grafter: Grafter | None = None
        self._steps = 0

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Check the strategy, before data-parallel training starts."""
        del stage
        is_parallel = isinstance(trainer.strategy, ParallelStrategy)
        if is_parallel and not {"group", "replica_group"} <= self.options.keys():
            raise ValueError(
                f"{type(trainer.strategy).__name__} trains one network in all processes, and there "
                "is nothing to graft: use dist_graft.integrations.lightning.network_trainer, or "
                "pass group and replica_group of a device mesh (docs/your_loop.md)"
            )
        if not is_parallel:
            for module in pl_module.modules():
                if isinstance(module, torchmetrics.Metric):
                    # Otherwise it would be averaged over the networks.
                    module.distributed_available_fn = _is_not_distributed

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Compare the networks: files, models, options and round. A collective."""
        if not isinstance(trainer.strategy, NetworkStrategy):
            join_networks(pl_module.device)
        paths: dict[str, str | Path | None] = {}
        for logger in trainer.loggers:  # before the checkpoints, which go to the first one's folder
            if logger.log_dir:  # others, such as W&B, tell runs apart themselves
                paths[f"the log of {type(logger).__name__}"] = logger.save_dir
        for callback in trainer.checkpoint_callbacks:
            paths["checkpoints"] = getattr(callback, "dirpath", None)
        group = self.options.get("group")
        refuse_shared_paths(
            gather_texts(encode_paths(paths), pl_module.device, group),
            "use dist_graft.integrations.lightning.network_trainer, with a function (folder) -> "
            "logger, or put the rank into their folders",
        )
        self._grafter = Grafter(pl_module, **self.options)
        self._grafter.round = self._round
        self._grafter.check()
        self._steps = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Run a round, if one is due after this step. A collective."""
        del outputs, batch, batch_idx
        took_step = trainer.global_step != self._steps  # accumulated batches take none
        self._steps = trainer.global_step
        if self.every_n_steps and took_step and self._steps % self.every_n_steps == 0:
            self._graft(pl_module)

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Run a round, if one is due after this epoch. A collective."""
        if not self.every_n_steps and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._graft(pl_module)

    def _graft(self, pl_module: lightning.LightningModule) -> None:
        assert self._grafter is not None
        self.record = self._grafter.graft()
        self._round = self._grafter.round
        for name, mean in round_metrics(self.record).items():
            pl_module.log(name, mean, sync_dist=True)  # over replicas, if any

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Release the process group's buffers."""
        del trainer, pl_module
        self._grafter = None

    def state_dict(self) -> dict[str, Any]:
        """The number of the next round, for Lightning's checkpoints."""
        return {"round": self._round}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of the next round."""
        self._round = state_dict["round"]


def _is_not_distributed() -> bool:
    return False
