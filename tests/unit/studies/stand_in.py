"""Stand-in for ``train`` and ``evaluate`` that writes their files without training.

    stand_in.py train OPTIONS RUN_DIR NETWORKS BEHAVIOUR
    stand_in.py evaluate RUN_DIR

BEHAVIOUR is a folder. A file with the name of the run directory contains what the run does: fail,
fail once, diverge, no space, heal, lose, lose once, silent, killed or sleep. Each start appends the
name to the file `starts`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from dist_graft.analysis.evaluate import EVALUATION_FORMAT
from dist_graft.errors import NonFiniteError


def train(options: dict, run: Path, networks: int, behaviour: Path) -> int:
    with (behaviour / "starts").open("a") as file:
        file.write(f"{run.name}\n")
    path = behaviour / run.name
    action = path.read_text() if path.exists() else ""
    print(f"training {run}")
    if action == "fail once":
        path.unlink()
    if action in ("fail", "fail once"):
        print("dist-graft: error: network 1: stopped by SIGTERM; another network failed")
        print("dist-graft: error: out of memory")
        print("and a table of failures")
        return 1
    stored = {"versions": {"dist_graft": "0", "torch": "0"}, "git_commit": "c0ffee"}
    (run / "config.yaml").write_text(json.dumps({"run_dir": str(run), "run": stored}))
    if action == "diverge":
        error = NonFiniteError.of_networks({0: "a weight that is not finite in conv"}, 1)
        print(f"dist-graft: error: epoch 0: {error}")
        return 1
    if action == "no space":
        print("dist-graft: error: /runs/diverged/network00 cannot be written: No space left")
        return 1
    if action in ("lose", "lose once"):
        (run / "lost").touch()
    if action == "lose once":
        path.write_text("find")
    if action == "find":
        (run / "lost").unlink()
    if action == "silent":
        return 3
    if action == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    value = 80.0 + options["seed"] + (0.5 if options["method"] == "graft" else 0.0)
    for network in range(networks):
        folder = run / f"network{network:02d}"
        folder.mkdir(exist_ok=True)
        line = {"test_accuracy": value, "val_accuracy": value - 1, "graft": None}
        (folder / "metrics.jsonl").write_text(f"{json.dumps(line)}\n" * options["epochs"])
        (folder / "status.json").write_text(
            json.dumps({"steps_per_epoch": 8, "train_samples": 1_000})
        )
    if action == "heal":
        (run / "population").mkdir()
        event = {"kind": "healed", "text": "network 1 copied network 0"}
        (run / "population" / "events.jsonl").write_text(json.dumps(event) + "\n")
    if action == "sleep":
        time.sleep(60)
    for epoch in (1, 2):
        folder = run / "checkpoints" / f"epoch_{epoch:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        files = {f"network{network:02d}.pt": "" for network in range(networks)}
        complete = {"epoch": epoch, "round": epoch, "networks": networks, "sha256": files}
        (folder / "COMPLETE.json").write_text(json.dumps(complete))
    rates = options["optim"]["lrs"] or [options["optim"]["lr"]] * networks
    summary = {
        "networks": [
            {"network": k, "lr": rate, "accuracy_after_last_round": value}
            for k, rate in enumerate(rates)
        ],
        "ensemble_accuracy_after_last_round": value + 1,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    return 0


def evaluate(run: Path) -> int:
    networks = len(list(run.glob("network*")))
    averages = {
        kind: {"test_accuracy": 60.0 + n, "val_accuracy": 50.0 + n}
        | dict.fromkeys(("test_loss", "test_calibration_error"), 1.0)
        for n, kind in enumerate(("soup", "ema", "checkpoints"))
    }
    last = json.loads((run / "network00" / "metrics.jsonl").read_text().splitlines()[-1])
    scores = dict.fromkeys(("test_loss", "test_calibration_error"), 1.0)
    member = {f"{name}_reestimated": last[name] for name in ("test_accuracy", "val_accuracy")}
    member |= {f"{name}_reestimated": value for name, value in scores.items()}
    lost = run / "lost"  # the last checkpoint, until another training
    epochs = len((run / "network00" / "metrics.jsonl").read_text().splitlines())
    result = {
        "protocol": EVALUATION_FORMAT,
        "epoch": epochs - lost.exists(),
        "averages": averages,
        "members": [member] * networks,
        "ensemble_test_accuracy_reestimated": last["test_accuracy"] + 1,
        **{f"ensemble_{name}_reestimated": value for name, value in scores.items()},
        **dict.fromkeys(("disagreement", "barrier", "barrier_before_last_round")),
        "uniform_soup": {"batch_norm_as_is": 10.0, "batch_norm_reestimated": 20.0, **scores},
        "greedy_soup": None,
    }
    (run / "evaluation.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "train":
        options = json.loads(Path(sys.argv[2]).read_text())
        sys.exit(train(options, Path(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5])))
    sys.exit(evaluate(Path(sys.argv[2])))
