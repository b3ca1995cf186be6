"""A slice of the fuzzer: the first seeds of each target, one minute in total."""

import pytest

from tests.fuzz.__main__ import main, run, run_case
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_no_case_fails(target):
    done, failures = run([target], 60 / len(TARGETS), {})
    assert done[target] and not failures, "\n".join(failures)


def test_failure_prints_the_command_that_repeats_it(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TARGETS, "losses", lambda seed: 1 / (seed - 2))
    assert run_case("losses", 1)
    assert not run_case("losses", 2)
    assert "python -m tests.fuzz losses 2" in capsys.readouterr().err
    assert main(["losses", "2"]) == 1 and main(["losses", "3"]) == 0


def test_next_run_continues_with_the_next_seed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seeds = []
    monkeypatch.setitem(TARGETS, "losses", seeds.append)
    for _ in range(2):
        assert main(["losses", "--seconds", "0.01"]) == 0
    assert seeds == list(range(len(seeds))) and len(seeds) > 2
