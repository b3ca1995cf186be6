"""How far a comparison is: a table that fills up on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..comparison import Run


class Board:
    """One row a method, one column a seed.

    Args:
        methods: Names, in order.
        seeds: In order.
        console: Where it is shown. Default: the standard output.
    """

    def __init__(self, methods: Sequence[str], seeds: Sequence[int], console: Console | None = None):
        self.console = console or Console()
        self.methods, self.seeds = list(methods), list(seeds)
        self.cells: dict[tuple[str, int], str] = {}
        self.done = 0
        self._live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
            self._live.update(self._table())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def going_on(self, method: str, seed: int, said: str) -> None:
        """A run goes on: a few words on how far it is."""
        self.cells[method, seed] = said if self._live is None else said.splitlines()[0]
        if self._live is not None:
            self._live.update(self._table())
        elif said.startswith("not possible"):
            self._print(f"{method}, seed {seed}: {said}")

    def finished(self, run: Run) -> None:
        """A run has ended, now or in an earlier start."""
        self.done += 1
        accuracy, seconds = run.metrics["accuracy"], run.metrics["train_seconds"]
        self.cells[run.method, run.seed] = f"{100 * accuracy:.1f} %"
        if self._live is not None:
            self._live.update(self._table())
        else:
            self._print(
                f"{run.method}, seed {run.seed}: accuracy {100 * accuracy:.2f} %, NLL {run.metrics['nll']:.4f}, "
                f"{seconds:.1f} s ({self.done} of {len(self.methods) * len(self.seeds)} runs)"
            )

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(title="test accuracy", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("method")
        for seed in self.seeds:
            table.add_column(f"seed {seed}", justify="right")
        for name in self.methods:
            table.add_row(
                Text(name), *(Text(self.cells.get((name, seed), "·"), overflow="ellipsis") for seed in self.seeds)
            )
        return table
