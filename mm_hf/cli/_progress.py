"""Progress of a comparison or a training run: a live table or a progress bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from ..comparison import Run
from ..evaluation.metrics import get_metric, metrics_of

EPOCH_METRICS = 2  # metrics per line during training, the first ones of the registry


class TrainingProgress(TrainerCallback):
    """Progress of a training run: a bar on a terminal, and a line per evaluation, or per log without evaluations.

    Args:
        console: Console for the output.
    """

    def __init__(self, console: Console):
        self.console = console
        self.logged: dict[str, Any] = {}
        self._bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()
        if state.is_world_process_zero and self.console.is_terminal and not args.disable_tqdm:
            self._bar = Progress(console=self.console, transient=True)
            self._steps = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self.logged = dict(logs)
        if "eval_loss" in logs or ("loss" in logs and args.eval_strategy == "no"):
            at = f"epoch {state.epoch or 0:.4g}, step {state.global_step} of {state.max_steps}"
            parts = [at, _losses(self.logged), _validation(logs), f"{time.perf_counter() - self._start:.0f} s"]
            self.console.print("; ".join(filter(None, parts)), markup=False, highlight=False, soft_wrap=True)
            self.logged = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _losses(logs: Mapping[str, Any]) -> str:
    if "loss" not in logs:
        return ""
    terms = [
        f"{name[5:]} {logs[name]:.4g}" for name in sorted(logs) if name.startswith("loss_") and name != "loss_terms"
    ]
    return f"loss {logs['loss']:.4g}" + (f" ({', '.join(terms)})" if terms else "")


def _validation(logs: Mapping[str, Any]) -> str:
    shown = [info.name for info in metrics_of("classification")][:EPOCH_METRICS]
    line = metric_line({name: logs[f"eval_{name}"] for name in shown if f"eval_{name}" in logs})
    return f"validation {line}" if line else ""


def metric_line(metrics: Mapping[str, float]) -> str:
    """Return the registered classification metrics among `metrics`, with titles and units.

    Example:
        >>> metric_line({"accuracy": 0.9, "nll": 0.25, "loss": 0.3})
        'accuracy 90.00 %, NLL 0.250 nats'
    """
    known = [info for info in metrics_of("classification") if info.name in metrics]
    return ", ".join(f"{info.title} {info.with_unit(metrics[info.name])}" for info in known)


class ProgressTable:
    """Progress of a comparison: on a terminal a live table of methods and seeds, lines elsewhere.

    Args:
        rows: Names of the rows, in order.
        seeds: Seeds, in order.
        console: Console for the output. Default: standard output.
        work: Relative duration of the runs of each row, for the remaining time. Default: all are equal.
    """

    def __init__(
        self,
        rows: Sequence[str],
        seeds: Sequence[int],
        console: Console | None = None,
        work: Mapping[str, float] | None = None,
    ):
        self.console = console or Console()
        self.rows, self.seeds = list(rows), list(seeds)
        self.work = {row: (work or {}).get(row, 1.0) for row in rows}
        self.cells: dict[tuple[str, int], str] = {}
        self.shares: dict[tuple[str, int], float] = {}  # of the runs that this process trains, how much is done
        self.done = 0
        self.failed: set[str] = set()
        self._finished_before = 0.0
        self._start: float | None = None
        self._live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None

    def __enter__(self) -> ProgressTable:
        if self._live is not None:
            self._live.start()
            self._live.update(self._view())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, row: str, seed: int, status: str) -> None:
        """Show the status of a run, such as "40 %"."""
        self._start = self._start or time.perf_counter()
        self.cells[row, seed] = status.splitlines()[0]
        if status.startswith("not possible"):
            self.failed.add(row)
            self.shares.pop((row, seed), None)
            if self._live is None:
                self._print(f"{row}, seed {seed}: {status}")
        else:
            percent = status.removesuffix(" %")
            self.shares[row, seed] = int(percent) / 100 if percent.isdecimal() else 1.0
        if self._live is not None:
            self._live.update(self._view())

    def finish(self, run: Run, row: str | None = None) -> None:
        """Show the result of a run that finished now or before an interruption, and print a line with its metrics.

        Args:
            run: The run.
            row: Its row. Default: its method.
        """
        row = row or run.method
        self.done += 1
        if (row, run.seed) in self.shares:
            self.shares[row, run.seed] = 1.0
        else:
            self._finished_before += self.work[row]
        self.cells[row, run.seed] = get_metric("accuracy").with_unit(run.metrics["accuracy"])
        seconds = get_metric("train_seconds").with_unit(run.metrics["train_seconds"])
        self._print(f"{row}, seed {run.seed}: {metric_line(run.metrics)}, {seconds} ({self.summary()})")
        if self._live is not None:
            self._live.update(self._view())

    def summary(self) -> str:
        """Return the number of finished runs and the estimated remaining time."""
        total = len(self.seeds) * sum(row not in self.failed for row in self.rows)
        text = f"{self.done} of {total} runs"
        remaining = self.remaining_seconds()
        return f"{text}, about {duration(remaining)} left" if remaining else text

    def remaining_seconds(self) -> float | None:
        """Estimate the remaining time from the time of the runs so far; None if nothing was trained or is left."""
        total = len(self.seeds) * sum(self.work[row] for row in self.rows if row not in self.failed)
        trained = sum(share * self.work[row] for (row, _), share in self.shares.items() if row not in self.failed)
        left = total - self._finished_before - trained
        if self._start is None or trained <= 0 or left <= 1e-9:
            return None
        return (time.perf_counter() - self._start) * left / trained

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _view(self) -> Group:
        # A title of the table would wrap in a narrow one.
        return Group(Text(f"test accuracy ({self.summary()})"), self._table())

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("method")
        for seed in self.seeds:
            table.add_column(f"seed {seed}", justify="right")
        for name in self.rows:
            table.add_row(
                Text(name), *(Text(self.cells.get((name, seed), "·"), overflow="ellipsis") for seed in self.seeds)
            )
        return table


def duration(seconds: float) -> str:
    """Return a duration in rough units.

    Example:
        >>> [duration(seconds) for seconds in (0.4, 89.6, 91, 7100, 7300, 200000)]
        ['1 s', '90 s', '2 min', '1 h 58 min', '2 h 2 min', '55 h']
    """
    if seconds <= 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 10 and minutes else f"{hours} h"
