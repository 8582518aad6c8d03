"""Grafting with the Hugging Face Trainer: each process trains a network of its own.

The Trainer takes the processes of a launcher for replicas of one model. `network_arguments` creates
the arguments of one network, which has its own output folder, and `GraftCallback` grafts the
networks. Start the script with torchrun or `dist_graft.launch`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
    launcher_hidden,
    local_device,
)
from dist_graft.run_directory import RunDirectory

_Arguments = TypeVar("_Arguments", bound=TrainingArguments)


def network_arguments(
    output_dir: str | Path,
    *,
    kind: type[_Arguments] = TrainingArguments,  # type: ignore[assignment]
    **arguments: Any,
) -> _Arguments:
    """Create the training arguments of this process's network, and connect the networks.

    Call this before anything else of transformers or accelerate uses a device. The files are in
    ``OUTPUT_DIR/network03``; ``resume_from_checkpoint=True`` finds them there. Each network has
    its own data order and dropout: its number is added to ``seed`` and ``data_seed``. Only network
    0 shows a progress bar, unless ``disable_tqdm`` is given.

    Args:
        output_dir: folder of the population.
        kind: class of the arguments.
        arguments: further arguments of `transformers.TrainingArguments`.

    Raises: RuntimeError when accelerate has already been set up.
    """
    if PartialState._shared_state:
        raise RuntimeError(
            "network_arguments: accelerate has already been set up in this process; call "
            "network_arguments before other arguments, Accelerators or models are created"
        )
    device = local_device(use_cpu=bool(arguments.get("use_cpu")))
    if device.type == "cuda" and not torch.cuda.is_initialized():
        # With several visible GPUs the Trainer would use nn.DataParallel.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        own = visible.split(",")[device.index] if visible else str(device.index)
        os.environ["CUDA_VISIBLE_DEVICES"] = own
        device = torch.device("cuda", 0)
    with launcher_hidden() as process:
        seed = arguments.pop("seed", 42)
        data_seed = arguments.pop("data_seed", None)
        created = kind(
            output_dir=str(RunDirectory(output_dir).network(process.rank)),
            seed=seed + process.rank,
            data_seed=(seed if data_seed is None else data_seed) + process.rank,
            **{"disable_tqdm": process.rank > 0 or None} | arguments,
        )
        created.device  # noqa: B018  a property that sets up accelerate, for a single process
    join_networks(device)
    return created


def _save_on_every_rank(model: nn.Module) -> None:
    """Let `save_pretrained` write this network, whatever the rank of the process among networks."""
    for module in model.modules():
        if hasattr(module, "should_save_on_this_rank"):
            vars(module)["should_save_on_this_rank"] = _unchanged


def _unchanged(is_main_process: bool) -> bool:
    return is_main_process


class GraftCallback(TrainerCallback):
    """Runs a round of grafting between the networks after epochs or steps.

    Logs ``graft/coefficient`` and ``graft/distance``, the means over the layers. Rounds come before
    the evaluation and the checkpoint at the end of an epoch or step.

    Args:
        every_n_epochs: epochs between rounds.
        every_n_steps: optimizer steps between rounds, instead of epochs.
        options: arguments of `dist_graft.Grafter`.

    Attributes:
        record (GraftRecord | None): the latest round.

    Raises: ValueError for an interval below 1 or a rule with a state (Diloco); at the start of
        training, when networks would write the same files, or when the Trainer trains one network
        in all processes.
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
        self._grafter: Grafter | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the networks: files, models, options and round. A collective."""
        del control
        model: nn.Module = kwargs["model"]
        if args.world_size > 1 and not {"group", "replica_group"} <= self.options.keys():
            raise ValueError(
                "the Trainer trains one network in all processes, and there is nothing to graft: "
                "create its arguments with dist_graft.integrations.transformers.network_arguments"
            )
        device = next(model.parameters()).device
        join_networks(device)
        paths = encode_paths({"checkpoints": args.output_dir})
        refuse_shared_paths(
            gather_texts(paths, device, self.options.get("group")),
            "create the arguments with dist_graft.integrations.transformers.network_arguments",
        )
        if args.world_size == 1:
            _save_on_every_rank(model)
        self._grafter = Grafter(model, **self.options)
        self._grafter.round = self._rounds(state)
        self._grafter.check()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run a round, if one is due after this step. A collective."""
        del args, control, kwargs
        if self.every_n_steps and state.global_step % self.every_n_steps == 0:
            self._graft(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run a round, if one is due after this epoch. A collective."""
        del args, control, kwargs
        if not self.every_n_steps and round(state.epoch or 0) % self.every_n_epochs == 0:
            self._graft(state)

    def _rounds(self, state: TrainerState) -> int:
        """Number of rounds until a position of the training."""
        if self.every_n_steps:
            return state.global_step // self.every_n_steps
        return int((state.epoch or 0) + 1e-6) // self.every_n_epochs

    def _graft(self, state: TrainerState) -> None:
        assert self._grafter is not None
        self.record = self._grafter.graft()
        where = {"epoch": state.epoch or 0.0, "step": state.global_step}
        state.log_history.append(where | round_metrics(self.record))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Release the process group's buffers."""
        del args, state, control, kwargs
        self._grafter = None
