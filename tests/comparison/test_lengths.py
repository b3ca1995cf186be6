"""Comparisons at several lengths of training, from Python and by the command."""

import csv

import pytest

from mm_hf.cli import main
from mm_hf.comparison import compare as module
from mm_hf.comparison import run_comparison, run_lengths
from mm_hf.comparison.lengths import duration, lengthen
from mm_hf.comparison.report.lengths import sentence
from tests.comparison.test_report import comparison_of
from tests.comparison.test_runs import NO_ROBUSTNESS, small_task
from tests.helpers.commands import OPTIONS, read_results

QUICK = {"evaluation": NO_ROBUSTNESS, "keep_models": "none", "replicates": 50}


def test_each_length_is_the_comparison_with_more_epochs(tmp_path, monkeypatch):
    task, reported = small_task(training_args={"num_train_epochs": 1}), []
    found = run_lengths(
        task,
        ["erm", "mixup"],
        2,
        tmp_path / "a",
        [2, 1],
        on_run=lambda n, run: reported.append((n, run.method)),
        **QUICK,
    )
    assert list(found) == [1, 2] and len(reported) == 8 and (2, "mixup") in reported
    alone = run_comparison(lengthen(task, 2), ["erm", "mixup"], 2, tmp_path / "b", report=False, **QUICK)
    assert {m: [r.metrics["nll"] for r in runs] for m, runs in found[2].runs.items()} == {
        m: [r.metrics["nll"] for r in runs] for m, runs in alone.runs.items()
    }
    assert duration(found[1]) == "1 epoch" and duration(found[2]) == "2 epochs"
    with (tmp_path / "a" / "lengths.csv").open() as file:
        rows = {(row["length"], row["method"], row["metric"]): row for row in csv.DictReader(file)}
    for length, comparison in found.items():
        for name, mean in comparison.mean("accuracy").items():
            row = rows[str(length), name, "accuracy"]
            assert float(row["mean"]) == mean.value
            if name != "erm":
                assert float(row["difference_low"]) == comparison.differences["accuracy"][name].low
    report, page = ((tmp_path / "a" / f"report.{kind}").read_text() for kind in ("md", "html"))
    for text in (report, page.replace("<wbr>", "")):
        assert "1x (1 epoch):" in text and "2x (2 epochs):" in text and "mixup" in text
        assert "erm_early_stopping" in text.replace("\\", "") and "length-2/report.html" in text
    assert "figures/lengths_accuracy.png" in report and page.count("data:image/png;base64,iVBOR") == 2
    assert (tmp_path / "a" / "length-2" / "report.html").exists()
    # A second call trains only what is missing.
    trained, train = [], module.train_run
    monkeypatch.setattr(module, "train_run", lambda *args, **kwargs: trained.append(args[1]) or train(*args, **kwargs))
    again = run_lengths(task, ["erm", "mixup"], 2, tmp_path / "a", [1, 2, 3], report=False, **QUICK)
    assert len(trained) == 4 and list(again) == [1, 2, 3]


def test_steps_are_lengthened_if_they_are_given():
    assert lengthen(small_task(training_args={"max_steps": 5}), 4).training_args["max_steps"] == 20
    task = small_task()
    del task.training_args["num_train_epochs"]
    assert lengthen(task, 4).training_args["num_train_epochs"] == 12  # 4 times the default of TrainingArguments


@pytest.mark.parametrize("lengths", [[], [0, 1], [1, 1], [1.5], [True]])
def test_invalid_lengths_are_rejected(lengths, tmp_path):
    with pytest.raises(ValueError, match="lengths must be different integers of at least 1"):
        run_lengths(small_task(), ["erm"], 1, tmp_path, lengths)


def test_sentences_state_the_best_method_and_whether_its_gain_is_reliable(tmp_path):
    settings = {"training_args": {"num_train_epochs": 8}}
    better = comparison_of(tmp_path, {"erm": 0.4, "mixup": 0.95}, seeds=3, settings=settings)
    assert sentence(4, better).startswith("4x (8 epochs): mixup is best with an accuracy of 9")
    assert sentence(4, better).endswith("] points compared with erm.")
    equal = comparison_of(tmp_path, {"erm": 0.5, "mixup": 0.54}, seeds=2, settings=settings)
    assert sentence(1, equal).endswith("compared with erm: no reliable difference; use more seeds.")
    plain = comparison_of(tmp_path, {"erm": 0.95, "mixup": 0.4}, seeds=3, settings=settings)
    assert "erm is best with an accuracy of 9" in sentence(1, plain) and sentence(1, plain).endswith(" %.")
    first = comparison_of(tmp_path, {"erm": 0.54, "mixup": 0.5}, seeds=2, settings=settings)
    assert sentence(1, first).endswith(" %; no method differs reliably from it: use more seeds.")


@pytest.mark.end_to_end
def test_command_draws_the_map(tmp_path, capsys):
    command = ["compare", *OPTIONS, "--robustness_samples", "0", "--methods", "erm", "mixup", "--seeds", "1"]
    command += ["--lengths", "2", "1", "--output_dir", str(tmp_path)]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "mixup 2x, seed 0: accuracy" in output and "(4 of 4 runs)" in output and "lengths.csv" in output
    assert (tmp_path / "figures" / "lengths_nll.png").stat().st_size > 1000
    assert {row["seed"] for row in read_results(tmp_path / "length-1" / "results.csv")} == {"0"}
