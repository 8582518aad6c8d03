"""Lightning and the Hugging Face Trainer as they are used: with checkpoints, loggers and resume."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import environment
from reading import assert_same_bits
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LIGHTNING = """
import os, sys
import lightning, torch, torchmetrics
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from dist_graft import launch
from dist_graft.integrations.lightning import GraftCallback, network_trainer

class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
                                    nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
        self.mean_target = torchmetrics.MeanMetric()
    def training_step(self, batch, index):
        loss = F.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss
    def validation_step(self, batch, index):
        self.mean_target.update(batch[1].float())
        self.log("mean_target", self.mean_target)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

def data():
    network = int(os.environ["RANK"])
    generator = torch.Generator().manual_seed(network)
    images = torch.rand(64, 1, 8, 8, generator=generator)
    train = DataLoader(TensorDataset(images, torch.randint(4, (64,), generator=generator)), 16)
    return train, DataLoader(TensorDataset(images, torch.full((64,), network)), 16)

def fit(epochs, folder, resume=False, loggers=False):
    torch.manual_seed(0)
    trainer = network_trainer(
        default_root_dir=folder, max_epochs=epochs, accelerator="cpu", log_every_n_steps=1,
        callbacks=[GraftCallback(lead="conv+linear"), ModelCheckpoint(save_last=True)],
        logger=make_loggers if loggers else None,
    )
    trainer.fit(Net(), *data(), ckpt_path="last" if resume else None)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}

def make_loggers(folder):
    wandb = WandbLogger(save_dir=folder, offline=True)
    return [CSVLogger(folder), TensorBoardLogger(folder), wandb]

def first(straight, twice):
    result = fit(2, straight, loggers=True)
    fit(1, twice)
    return result

def second(twice, folder):
    fit(2, twice, resume=True)
    return [refusal(way, folder) for way in ("logger", "plain")]

def refusal(way, folder):
    options = dict(max_epochs=1, accelerator="cpu", callbacks=[GraftCallback(lead="conv+linear")])
    if way == "logger":
        trainer = network_trainer(logger=CSVLogger(folder), **options)
    else:
        trainer = lightning.Trainer(strategy="ddp", devices=2, default_root_dir=folder, **options)
    try:
        trainer.fit(Net(), *data())
    except ValueError as error:
        return str(error)
"""
TRANSFORMERS = """
import os, sys
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from dist_graft import launch
from dist_graft.integrations.transformers import GraftCallback, network_arguments

def trainer(arguments):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    config = BertConfig(intermediate_size=32, max_position_embeddings=8, **sizes)
    texts = [dict(input_ids=torch.randint(50, (8,)), labels=n % 2) for n in range(32)]
    return Trainer(BertForSequenceClassification(config), arguments, train_dataset=texts,
                   eval_dataset=texts, callbacks=[GraftCallback(lead="conv+linear")])

OPTIONS = dict(per_device_train_batch_size=8, use_cpu=True, save_strategy="epoch",
               eval_strategy="epoch", logging_steps=1, lr_scheduler_type="constant",
               report_to=["tensorboard"])

def main(folder, resume):
    one = trainer(network_arguments(folder, num_train_epochs=2, **OPTIONS))
    one.train(resume_from_checkpoint=resume)
    return [row for row in one.state.log_history if "graft/coefficient" in row]

def failing(folder):
    try:
        trainer(TrainingArguments(folder, **OPTIONS)).train()
    except ValueError as error:
        return str(error)
"""
LIMIT = 200


def run_script(folder: Path, text: str, call: str) -> Any:
    """Result of a call of `launch` in a script."""
    path = folder / "script.py"
    path.write_text(
        f"{text}\nif __name__ == '__main__':\n    import json\n"
        f"    result = launch({call}, networks=2)\n"
        "    open('result.json', 'w').write(json.dumps(result))\n"
    )
    done = subprocess.run(
        [sys.executable, str(path)],
        env=environment(WANDB_MODE="offline", WANDB_SILENT="true"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_lightning_saves_logs_and_resumes_every_network(tmp_path: Path) -> None:
    """What is for replicas is refused."""
    straight, twice = tmp_path / "straight", tmp_path / "twice"
    results = run_script(tmp_path, LIGHTNING, f"first, {str(straight)!r}, {str(twice)!r}")
    refusals = run_script(
        tmp_path, LIGHTNING, f"second, {str(twice)!r}, {str(tmp_path / 'logs')!r}"
    )

    for of_logger, of_plain in refusals:
        assert "would both write the log of CSVLogger to " in of_logger
        assert "network_trainer, with a function" in of_logger
        assert "DDPStrategy trains one network in all processes" in of_plain
        assert "network_trainer" in of_plain

    assert [result["mean_target"] for result in results] == [0, 1], "averaged over the networks"
    coefficients = [result["graft/coefficient"] for result in results]
    assert sum(coefficients) == pytest.approx(1)
    states = []
    for network in (0, 1):
        folder = straight / f"network{network:02d}"
        (rows,) = folder.rglob("metrics.csv")
        with rows.open() as file:
            logged = [row["graft/coefficient"] for row in csv.DictReader(file)]
        assert float([value for value in logged if value][-1]) == coefficients[network]
        (events,) = {path.parent for path in folder.rglob("events.out.tfevents.*")}
        accumulator = EventAccumulator(str(events)).Reload()
        assert len(accumulator.Scalars("graft/coefficient")) == 2
        (offline,) = folder.glob("wandb/offline-run-*/*.wandb")
        assert offline.stat().st_size > 0
        one, other = (last_checkpoint(run / folder.name) for run in (straight, twice))
        assert one["epoch"] == other["epoch"]
        assert_same_bits(one["state_dict"], other["state_dict"])
        assert [state["round"] for state in graft_states(other)] == [2]
        states.append(one["optimizer_states"][0]["state"][0]["momentum_buffer"])
    assert not torch.equal(*states)


def last_checkpoint(folder: Path) -> dict[str, Any]:
    newest = max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    state: dict[str, Any] = torch.load(newest, weights_only=True)
    return state


def graft_states(checkpoint: dict[str, Any]) -> list[Any]:
    return [state for key, state in checkpoint["callbacks"].items() if "GraftCallback" in key]


@pytest.mark.slow
def test_transformers_saves_and_resumes_every_network(tmp_path: Path) -> None:
    straight, twice = tmp_path / "straight", tmp_path / "twice"
    results = run_script(tmp_path, TRANSFORMERS, f"main, {str(straight)!r}, False")
    shutil.copytree(straight, twice)
    for network in (0, 1):
        shutil.rmtree(twice / f"network{network:02d}/checkpoint-8")
    run_script(tmp_path, TRANSFORMERS, f"main, {str(twice)!r}, True")

    assert [len(rows) for rows in results] == [2, 2]
    states = []
    for network in (0, 1):
        name = f"network{network:02d}/checkpoint-8/model.safetensors"
        one, other = (load_file(run / name) for run in (straight, twice))
        assert_same_bits(one, other)
        optimizer = torch.load(straight / name.replace("model.safetensors", "optimizer.pt"))
        states.append(optimizer["state"][0]["exp_avg"])
        assert list((straight / f"network{network:02d}").rglob("events.out.tfevents.*"))
    assert not torch.equal(*states)


@pytest.mark.slow
def test_transformers_as_for_replicas_is_refused(tmp_path: Path) -> None:
    messages = run_script(tmp_path, TRANSFORMERS, f"failing, {str(tmp_path / 'out')!r}")
    assert len(messages) == 2
    assert all("arguments with dist_graft.integrations.transformers" in one for one in messages)
