"""What the benchmarks measure with, and the tables that they write."""

import harness
import numpy as np
import pytest
import tables
import torch

MARKERS = ("fused", "sampling", "variance", "step")


def test_runs_take_turns_and_warming_up_is_not_counted():
    calls = []
    seconds = harness.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, steps=3, warm_up=2)
    assert calls == ["a", "b"] * 5
    assert {name: times.shape for name, times in seconds.items()} == {"a": (3,), "b": (3,)}
    assert all((times >= 0).all() for times in seconds.values())


def test_ratios_are_taken_round_by_round():
    """A machine that is three times slower in one round is so for both."""
    ours, theirs = np.array([1.0, 3.0, 1.1, 1.2, 1.3]), np.array([2.0, 6.0, 2.2, 2.4, 3.9])
    assert harness.ratio(theirs, ours) == (2.0, "2.00 to 2.00")
    assert harness.ratio(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.ones(5), digits=1) == (3.0, "2.0 to 4.0")


def holds(megabytes):
    """In a process of its own: memory that is written to and let go, so that only the peak knows of it."""
    held = torch.ones(megabytes * 2**18)
    return float(held[-1]), torch.get_num_threads()


def test_peak_memory_is_that_of_the_process_alone():
    here = torch.ones(300 * 2**18)  # what this process holds does not count there
    (value, threads), peak = harness.in_process(holds, 400)
    _, base = harness.in_process(holds, 1)
    assert value == 1 and threads == torch.get_num_threads()
    assert peak - base == pytest.approx(399, abs=60)
    assert here[0] == 1


def test_tables_are_read_as_they_were_written(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    assert harness.read("step.csv") == []
    harness.write("step.csv", [{"method": "plain, or not", "time": 1.03}, {"method": "ours", "time": 2}])
    assert harness.read("step.csv") == [{"method": "plain, or not", "time": "1.03"}, {"method": "ours", "time": "2"}]


def test_the_page_shows_what_was_measured(tmp_path, monkeypatch):
    """docs/performance.md holds the tables of benchmarks/results, and making them again changes nothing."""
    page = tmp_path / "performance.md"
    shown = tables.PAGE.read_text()
    page.write_text(shown)
    monkeypatch.setattr(tables, "PAGE", page)
    tables.main()
    assert page.read_text() == shown


def test_a_table_goes_behind_its_marker_and_the_old_one_goes(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    markers = "".join(f"<!-- {name} -->\n\n| old |\n|---|\n| row |\n\nText on {name}.\n\n" for name in MARKERS)
    page.write_text(f"# Title\n\n{markers}")
    monkeypatch.setattr(tables, "PAGE", page)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.write("sampling.csv", [{"factors": "shared", "ms": 3, "times_faster": 2.5, "quartiles": "2.4 to 2.6"}])
    tables.main()
    text = page.read_text()
    assert "old" not in text and all(f"Text on {name}." in text for name in MARKERS)
    assert (
        "<!-- sampling -->\n\n| factors | time | faster |\n|---|---|---|\n| `shared` | 3 ms | 2.5x (2.4 to 2.6) |\n\n"
        in text
    )
