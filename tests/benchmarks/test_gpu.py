"""Rehearsal of `make gpu` on a CPU."""

import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.gpu import growth, kernels, step, tables, training
from benchmarks.gpu import tests as gpu_tests
from benchmarks.gpu.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.mark.end_to_end
def test_rehearsal_runs_every_part(tmp_path, capfd):
    assert main(["--rehearse", "--output_dir", str(tmp_path)]) == 0
    results = harness.read(gpu_tests.FILE, tmp_path)
    assert len(results) > 20 and {row["result"] for row in results} == {"passed"}, results
    steps = harness.read(step.FILE, tmp_path)
    eager, compiled = ([row["method"] for row in steps if row["compiled"] == text] for text in ("False", "True"))
    assert eager[:4] == [step.PLAIN, "DenseMultiMix()", "DenseMultiMix(num_mixed=1000)", "literal, n = 1,000"]
    assert "kornia MixUp and CutMix" in eager and compiled == eager[:3]
    assert all(float(row["ms"]) > 0 and int(row["kernels"]) > 0 for row in steps)
    assert [row["n"] for row in harness.read(growth.FILE, tmp_path)] == ["0", "10", "50"]
    assert [row["kernel"] for row in harness.read(kernels.FILE, tmp_path)] == list(kernels.KERNELS)
    runs = harness.read(training.FILE, tmp_path)
    assert [row["method"] for row in runs] == list(training.METHODS) and all(
        0 <= float(r["accuracy"]) <= 1 for r in runs
    )
    page = (tmp_path / "gpu.md").read_text()
    assert "Not measured." not in page and "| DenseMultiMix() |" in page and "Measured on CPU, torch" in page
    capfd.readouterr()
    # Finished rows are kept when the command is started again.
    assert main(["--rehearse", "--output_dir", str(tmp_path), "--parts", "step", "growth", "kernels", "training"]) == 0
    assert harness.read(step.FILE, tmp_path) == steps and "'kernels'" not in capfd.readouterr().out


def test_part_that_fails_does_not_stop_the_next_one(tmp_path, monkeypatch, capsys):
    done = []
    for name, part in tables.PARTS.items():
        monkeypatch.setattr(part, "run", lambda setup, name=name: done.append(name) if name != "step" else 1 / 0)
    assert main(["--rehearse", "--output_dir", str(tmp_path)]) == 1
    assert done == ["tests", "growth", "kernels", "training"]
    output = capsys.readouterr()
    assert "failed: step" in output.out and "ZeroDivisionError" in output.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_and_exit_code_2(capsys):
    assert main([]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and "REHEARSE=1" in output.err


def test_command_of_make():
    for arguments, expected in (([], "-m benchmarks.gpu\n"), (["REHEARSE=1"], "-m benchmarks.gpu --rehearse\n")):
        # `make test` runs this test inside of make, which would print its directory.
        command = ["make", "--no-print-directory", "-n", "gpu", *arguments]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert shown.stdout.endswith(expected) and "pip" not in shown.stdout


def test_page_shows_the_committed_results(tmp_path):
    page = tmp_path / "gpu.md"
    page.write_text(tables.PAGE.read_text())
    tables.update(page)
    assert page.read_text() == tables.PAGE.read_text()


def test_time_that_is_left_limits_a_part():
    budgets = [part.MINUTES for part in tables.PARTS.values()]
    assert sum(budgets) == 35
