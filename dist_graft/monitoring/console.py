"""Progress bar and tables of the population on the console and in the log."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from dist_graft.monitoring.callback import Callback
from dist_graft.monitoring.metrics import MOMENTS, EpochReport, NetworkRow
from dist_graft.monitoring.status_file import StatusFile
from dist_graft.printing import format_table, metric_header

if TYPE_CHECKING:
    from dist_graft.training.trainer import Trainer


def duration(seconds: float) -> str:
    """Format a duration in its two largest units."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"


class ProgressBar(Callback):
    """Shows a progress bar over the steps of an epoch, in one process per machine.

    Args:
        mode: "bar"; "lines": no bar; "auto": a bar on a terminal.
        status: estimates the remaining time; called before this callback.
    """

    def __init__(self, mode: Literal["auto", "bar", "lines"], status: StatusFile) -> None:
        self._enabled = mode == "bar" or (mode == "auto" and sys.stderr.isatty())
        self._bar: tqdm[Any] | None = None
        self._status = status

    def on_fit_start(self, trainer: Trainer) -> None:
        self._enabled = self._enabled and trainer.process.local_rank == 0

    def on_epoch_start(self, trainer: Trainer) -> None:
        self._close()
        if not self._enabled:
            return
        with contextlib.suppress(OSError):  # the terminal is gone
            self._bar = tqdm(
                total=trainer.steps_per_epoch,
                initial=trainer.step,
                desc=f"epoch {trainer.epoch + 1}/{trainer.config.epochs}",
                bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, "
                "{rate_noinv_fmt}{postfix}",
                unit="step",
                leave=False,
                dynamic_ncols=True,
            )

    def on_step_end(self, trainer: Trainer) -> None:
        if self._bar is None:
            return
        left = self._status.seconds_left()
        if left is not None:
            self._bar.set_postfix_str(f"{duration(left)} left", refresh=False)
        with contextlib.suppress(OSError):
            self._bar.update()

    def on_evaluate_start(self, trainer: Trainer) -> None:
        self._close()

    def teardown(self, trainer: Trainer) -> None:
        self._close()

    def _close(self) -> None:
        """Remove the bar, after showing its last step."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.refresh()
                self._bar.close()
            self._bar = None


class EpochLog(Callback):
    """Logs a table of all networks after each epoch, and one of the final results."""

    def on_epoch_end(self, trainer: Trainer, report: EpochReport) -> None:
        trainer.log.info("%s", epoch_text(report, trainer.config.epochs))

    def on_fit_end(self, trainer: Trainer) -> None:
        if trainer.summary:
            trainer.log.info("%s", summary_text(trainer.summary))


def epoch_text(report: EpochReport, epochs: int) -> str:
    """Table of the population after an epoch, one line per network."""
    metric = report.metric
    name = metric_header(metric or "")
    header = [
        *("network", "lr", "train loss", f"train {name}", "test loss", f"test {name}"),
        *("images/s", "keeps"),
    ]
    rows = [
        [
            str(network),
            f"{row.lr:.4g}",
            _number(row.train_loss, 4),
            _metric(row.train_metric, metric),
            _number(row.test_loss, 4),
            _metric(row.test_metric, metric),
            f"{row.images_per_second:.0f}",
            _keeps(row),
        ]
        for network, row in enumerate(report.networks, report.first_network)
    ]
    if metric is None:
        for cells in (header, *rows):
            del cells[5], cells[3]
    title = f"epoch {report.metrics.epoch + 1}/{epochs} ({report.seconds:.1f} s)"
    return f"{title}\n{format_table(header, rows)}"


def _metric(value: float, metric: str | None) -> str:
    return f"{value:.2f}" if metric == "accuracy" else _number(value, 4)


def _keeps(row: NetworkRow) -> str:
    if not row.finite:
        return "diverged"
    if row.donor < 0:
        return "all"
    return f"{row.min_coefficient:.2f}-{row.max_coefficient:.2f}, rest of {row.donor:.0f}"


def summary_text(summary: Mapping[str, Any]) -> str:
    """Final test results: one line per network, then mean and ensemble."""
    metric = summary.get("metric", "accuracy")
    title = ", %" if metric == "accuracy" else ""
    header = (f"test {metric}{title}", "before the last round", "after it")
    digits = 2 if metric == "accuracy" else 4
    return format_table(header, final_results(summary, lambda value: _number(value, digits)))


def final_results(summary: Mapping[str, Any], cell: Callable[[Any], str]) -> list[tuple[str, ...]]:
    """Results before and after the last round: a row per network, then mean and ensemble.

    Args:
        summary: content of summary.json.
        cell: formats a result.
    """
    before, after = (f"{summary.get('metric', 'accuracy')}_{moment}" for moment in MOMENTS)
    rows: list[tuple[str, ...]] = [
        (f"network {row['network']} (lr {row['lr']:.4g})", cell(row[before]), cell(row[after]))
        for row in summary["networks"]
    ]
    return rows + [
        (name, cell(summary[f"{name}_{before}"]), cell(summary[f"{name}_{after}"]))
        for name in ("mean", "ensemble")
        if f"{name}_{before}" in summary
    ]


def _number(value: float | None, digits: int) -> str:
    if value is None or math.isnan(value):
        return "nan"
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.3g}"
