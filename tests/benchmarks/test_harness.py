"""Tests of timing, peak memory and CSV files, and of the tables in docs/performance.md."""

import numpy as np
import pytest
import torch

from benchmarks import harness, tables

MARKERS = ("fused", "sampling", "variance", "step")


def test_runs_alternate_and_warm_up_is_not_timed():
    calls = []
    seconds = harness.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, steps=3, warm_up=2)
    assert calls == ["a", "b"] * 5
    assert {name: times.shape for name, times in seconds.items()} == {"a": (3,), "b": (3,)}
    assert all((times >= 0).all() for times in seconds.values())


def test_ratios_are_computed_per_round():
    """A round in which the machine is three times slower does not change the ratio."""
    ours, theirs = np.array([1.0, 3.0, 1.1, 1.2, 1.3]), np.array([2.0, 6.0, 2.2, 2.4, 3.9])
    assert harness.ratio(theirs, ours) == (2.0, "2.00 to 2.00")
    assert harness.ratio(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.ones(5), digits=1) == (3.0, "2.0 to 4.0")


def allocate(megabytes):
    """Write to memory and release it; return a value and the number of threads."""
    held = torch.ones(megabytes * 2**18)
    return float(held[-1]), torch.get_num_threads()


@pytest.mark.distributed
def test_peak_memory_excludes_the_parent_process():
    own = torch.ones(300 * 2**18)  # memory of this process
    (value, threads), peak = harness.in_process(allocate, 400)
    _, base = harness.in_process(allocate, 1)
    assert value == 1 and threads == torch.get_num_threads()
    assert peak - base == pytest.approx(399, abs=60)
    assert own[0] == 1


def test_csv_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    assert harness.read("step.csv") == []
    harness.write("step.csv", [{"method": "plain, or not", "time": 1.03}, {"method": "ours", "time": 2}])
    assert harness.read("step.csv") == [{"method": "plain, or not", "time": "1.03"}, {"method": "ours", "time": "2"}]


def test_page_shows_the_committed_results(tmp_path, monkeypatch):
    """Updating docs/performance.md from benchmarks/results changes nothing."""
    page = tmp_path / "performance.md"
    shown = tables.PAGE.read_text()
    page.write_text(shown)
    monkeypatch.setattr(tables, "PAGE", page)
    tables.main()
    assert page.read_text() == shown


def test_update_replaces_the_table_of_a_section(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    markers = "".join(
        f"<!-- begin: {name} -->\n\n| old |\n|---|\n| row |\n\n<!-- end: {name} -->\n\nText on {name}.\n\n"
        for name in MARKERS
    )
    page.write_text(f"# Title\n\n{markers}")
    monkeypatch.setattr(tables, "PAGE", page)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.write("sampling.csv", [{"factors": "shared", "ms": 3, "times_faster": 2.5, "quartiles": "2.4 to 2.6"}])
    tables.main()
    text = page.read_text()
    assert "old" not in text and all(f"Text on {name}." in text for name in MARKERS)
    table = "| factors | time | faster |\n| --- | --- | --- |\n| `shared` | 3 ms | 2.5x (2.4 to 2.6) |"
    assert f"<!-- begin: sampling -->\n\n{table}\n\n<!-- end: sampling -->" in text
