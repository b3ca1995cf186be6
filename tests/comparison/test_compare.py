"""The commands compare and analyze: their files and reports, and a comparison that is interrupted and resumed."""

import contextlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from transformers import ViTImageProcessorPil, set_seed

from mm_hf.cli import main
from mm_hf.comparison import compare
from mm_hf.comparison.derived import derived_names
from tests.helpers import digits
from tests.helpers.commands import COSTS, OPTIONS, read_results

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Compare two methods with the command, and return its directory and its output."""
    directory = tmp_path_factory.mktemp("compared")
    command = ["compare", *OPTIONS, "--ood_classes", "8", "9", "--seeds", "2"]
    command += ["--methods", "erm", "few=dense_multimix:num_mixed=20,attention=gap", "--output_dir", str(directory)]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(command) == 0
    return directory, output.getvalue()


def test_compare_writes_runs_and_results(compared):
    directory, output = compared
    lines = [line for line in output.splitlines() if re.match(r"(erm|few), seed \d: accuracy .* of 4 runs", line)]
    assert len(lines) == 4 and "(4 of 4 runs)" in lines[-1]
    rows = read_results(directory / "results.csv")
    assert {(row["method"], row["seed"]) for row in rows} == {
        (m, s) for m in ("erm", "few", *derived_names("erm").values()) for s in "01"
    }
    metrics = {row["metric"] for row in rows}
    assert {
        "accuracy",
        "nll",
        "brier",
        "calibration_error",
        "macro_f1",
        "balanced_accuracy",
        "fgsm_accuracy",
        "corruption_accuracy",
    } <= metrics
    assert {"ood_auroc", "ood_fpr95", "alignment", "uniformity", "class_spread", "jpeg_5_accuracy"} <= metrics
    settings = json.loads((directory / "settings.json").read_text())
    assert settings["methods"]["few"]["num_mixed"] == 20 and settings["task"]["classes"] == 8
    for run in (directory / "runs").glob("*/*"):
        with np.load(run / "predictions.npz", allow_pickle=False) as arrays:
            assert arrays["logits"].shape == (len(arrays["labels"]), 8)
            if run.parent.name in ("erm", "few"):
                assert arrays["features"].shape[1] == 16 and arrays["ood_logits"].shape[1] == 8
        assert not (run / "checkpoints").exists()
    assert len(list((directory / "runs").glob("*/*/model/config.json"))) == 2  # one per method


def test_metrics_equal_those_of_the_written_arrays(compared):
    directory, _ = compared
    for run in (directory / "runs").glob("*/*"):
        result = json.loads((run / "result.json").read_text())
        with np.load(run / "predictions.npz", allow_pickle=False) as arrays:
            accuracy = (arrays["logits"].argmax(axis=1) == arrays["labels"]).mean()
        assert result["metrics"]["accuracy"] == pytest.approx(accuracy)


class Page(HTMLParser):
    """The resources that a page would fetch, and its images."""

    def __init__(self):
        super().__init__()
        self.fetched, self.images, self.tags = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action"):
                (self.images if tag == "img" else self.fetched).append(value)


def test_html_report_is_one_file_with_all_plots(compared):
    directory, _ = compared
    text = (directory / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.fetched and not page.tags & {"script", "link", "iframe", "object"}
    assert "@import" not in text and "url(" not in text
    plots = sorted(path.stem for path in (directory / "figures").glob("*.png"))
    drawn = "differences reliability confusion mistakes corruptions ood embeddings alignment_uniformity cost training"
    assert plots == sorted(drawn.split())
    assert len(page.images) == len(plots)
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in page.images)
    markdown = (directory / "report.md").read_text()
    for name in plots:
        assert f"(figures/{name}.png)" in markdown
    assert "nan" not in text.replace("nanos", "").lower().split("base64")[0]


def test_report_has_the_mean_of_the_results(compared):
    directory, _ = compared
    rows = read_results(directory / "results.csv")
    values = [100 * float(r["value"]) for r in rows if (r["method"], r["metric"]) == ("erm", "accuracy")]
    spread = f"({min(values):.2f} to {max(values):.2f})"  # of two seeds
    assert f"| erm | {np.mean(values):.2f} {spread} " in (directory / "report.md").read_text()


def test_analyze_equals_the_evaluation_of_the_comparison(compared, tmp_path, capsys):
    directory, _ = compared
    (model,) = (directory / "runs" / "few").glob("*/model")
    skipped = (
        "--num_train_epochs",
        "--per_device_train_batch_size",
        "--learning_rate",
        "--model_type",
        "--config_overrides",
    )
    options = [x for i, x in enumerate(OPTIONS) if x not in skipped and OPTIONS[i - 1] not in skipped]
    assert main(["analyze", str(model), *options, "--ood_classes", "8", "9", "--output_dir", str(tmp_path)]) == 0
    assert "accuracy: " in capsys.readouterr().out
    there = json.loads((model.parent / "result.json").read_text())
    here = json.loads((tmp_path / "result.json").read_text())
    expected = {k: v for k, v in there["metrics"].items() if k not in (*COSTS, "loss_terms_per_step")}
    assert here["metrics"] == expected and here["corruptions"] == there["corruptions"]
    assert here["metrics"].keys() >= {"ood_auroc", "fgsm_accuracy"}
    report = (tmp_path / "report.md").read_text()
    assert "num_mixed=20" in report and "figures/reliability.png" in report
    assert len(list((tmp_path / "figures").iterdir())) == 6


def test_analyze_accepts_a_model_trained_without_mm_hf(tmp_path, capsys):
    set_seed(0)
    model = digits.vit()
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    ).save_pretrained(tmp_path / "model")
    options = ["--dataset_name", "digits", "--max_test_samples", "60", "--robustness_samples", "0", "--use_cpu"]
    given = ["analyze", str(tmp_path / "model"), *options, "--output_dir", str(tmp_path / "out")]
    assert main(given) == 0
    assert "Settings" not in (tmp_path / "out" / "report.md").read_text()
    assert main([*given, "--ood_classes", "3"]) == 2
    assert "has 10 classes, but the dataset has 9" in capsys.readouterr().err


def test_interrupted_comparison_resumes_with_the_next_run(tmp_path, monkeypatch, capsys):
    command = [
        "compare",
        *OPTIONS,
        "--robustness_samples",
        "0",
        "--methods",
        "erm",
        "multimix:num_mixed=10",
        "--seeds",
        "2",
    ]
    assert main([*command, "--output_dir", str(tmp_path / "complete")]) == 0
    calls, train = [], compare.train_run

    def stops(*args, **kwargs):
        calls.append(args[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(compare, "train_run", stops)
    assert main([*command, "--output_dir", str(tmp_path / "parts")]) == 130
    assert "run the same command again to resume" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "results.csv").exists()
    assert main([*command, "--output_dir", str(tmp_path / "parts")]) == 0
    assert calls == ["erm", "multimix:num_mixed=10", "multimix:num_mixed=10", "erm", "multimix:num_mixed=10"]
    assert read_results(tmp_path / "parts" / "results.csv") == read_results(tmp_path / "complete" / "results.csv")
