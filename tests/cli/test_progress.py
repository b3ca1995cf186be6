"""Progress of a comparison: the remaining time, a table on a terminal, and lines elsewhere."""

import io

import pytest
from rich.console import Console

from mm_hf.cli import _progress
from mm_hf.cli._progress import ProgressTable
from mm_hf.comparison import Run


@pytest.fixture
def clock(monkeypatch):
    """Clock that only the test advances."""
    now = [100.0]
    monkeypatch.setattr(_progress.time, "perf_counter", lambda: now[0])
    return now


def run(method, seed):
    return Run(method, seed, {"accuracy": 0.5, "train_seconds": 3.0}, {}, [], [], "", None)


def table_of(rows=("erm", "[b]mix[/b]"), terminal=False, **more):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=90)
    return ProgressTable(list(rows), [0, 1], console, **more), output


def test_remaining_time_follows_the_runs_that_were_trained_now(clock):
    table, _ = table_of()
    assert table.summary() == "0 of 4 runs"
    table.finish(run("erm", 0))  # finished before an interruption: it says nothing about the time
    assert table.remaining_seconds() is None and table.summary() == "1 of 4 runs"
    table.update("[b]mix[/b]", 0, "0 %")
    clock[0] += 30
    table.update("[b]mix[/b]", 0, "50 %")
    assert table.remaining_seconds() == pytest.approx(30 / 0.5 * 2.5)
    clock[0] += 30
    table.finish(run("[b]mix[/b]", 0))
    assert table.summary() == "2 of 4 runs, about 2 min left"


def test_methods_that_cannot_train_are_not_waited_for(clock):
    table, output = table_of()
    table.update("erm", 0, "0 %")
    clock[0] += 20
    table.finish(run("erm", 0))
    table.update("[b]mix[/b]", 0, "not possible: No place.\nMore.")
    assert table.summary() == "1 of 2 runs, about 20 s left"
    assert "[b]mix[/b], seed 0: not possible: No place." in output.getvalue()


def test_runs_of_different_lengths_count_by_their_work(clock):
    table, _ = table_of(["erm 1x", "erm 4x"], work={"erm 1x": 1, "erm 4x": 4})
    for seed in (0, 1):
        table.update("erm 1x", seed, "0 %")
        clock[0] += 10
        table.finish(run("erm", seed), "erm 1x")
    assert table.remaining_seconds() == pytest.approx(80)


def test_lines_are_plain_when_piped(clock):
    table, output = table_of()
    with table:
        for method in table.rows:
            for seed in (0, 1):
                table.update(method, seed, "10 %")
                clock[0] += 60
                table.finish(run(method, seed))
    lines = output.getvalue().splitlines()
    assert lines[0] == "erm, seed 0: accuracy 50.00 %, 3.0 s (1 of 4 runs, about 3 min left)"
    assert lines[-1] == "[b]mix[/b], seed 1: accuracy 50.00 %, 3.0 s (4 of 4 runs)"
    assert len(lines) == 4 and "\x1b" not in output.getvalue()


def test_table_on_a_terminal_has_the_remaining_time(clock):
    table, output = table_of(terminal=True)
    with table:
        table.update("erm", 0, "0 %")
        clock[0] += 60
        table.update("erm", 0, "40 %")
    text = output.getvalue()
    assert "test accuracy (0 of 4 runs, about 9 min left)" in text and "40 %" in text and "[b]mix[/b]" in text
