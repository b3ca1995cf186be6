"""Reports of synthetic runs: what they state, that both formats state the same, and that names are escaped."""

import csv
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from markdown_it import MarkdownIt
from sklearn.metrics import precision_recall_fscore_support
from transformers import EvalPrediction

from mm_hf import ERM, Mixup
from mm_hf.comparison import Comparison, Run, write_report
from mm_hf.comparison.report import figures, tables
from mm_hf.comparison.report.findings import findings
from mm_hf.comparison.report.lengths import rows_of
from mm_hf.comparison.report.tables import class_scores, class_table, confusion_counts
from mm_hf.evaluation.metrics import classification_metrics
from mm_hf.evaluation.metrics.registry import METRICS, MetricInfo, register_metric

LABELS = np.arange(60) % 3
UNUSUAL = "<b>x</b> *y* | `z` [l](http://example.org) _m_ # &amp;"


def run(directory, method, seed, right, **metrics):
    """Return a run whose logits are right for the given share of the examples."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(60, 3))
    chosen = generator.permutation(60)[: int(60 * right)]
    logits[chosen, LABELS[chosen]] += 8
    values = classification_metrics(EvalPrediction(logits, LABELS)) | metrics
    directory = directory / f"{len(list(directory.iterdir()))}"
    directory.mkdir()
    made = Run(method, seed, values, {}, [], [], "", directory)
    made.write({"logits": logits, "labels": LABELS})
    return made


def comparison_of(directory, shares, seeds=4, name="synthetic", **fields):
    """Return runs of methods that are right for given shares of the examples; the first method is the baseline."""
    runs = {method: [run(directory, method, seed, right) for seed in range(seeds)] for method, right in shares.items()}
    methods = {method: Mixup() if i else ERM() for i, method in enumerate(shares)}
    baseline = next(iter(shares)) if len(shares) > 1 else None
    return Comparison(name, methods, runs, baseline, replicates=200, **fields)


def test_findings_state_significant_differences_only(tmp_path):
    found = findings(comparison_of(tmp_path, {"erm": 0.5, "better": 0.95, "equal": 0.5}))
    assert re.fullmatch(
        r"better compared with erm: better accuracy \(\+[\d.]+ points\), NLL \(\u2212[\d.]+ nats\).*\.", found[0]
    )
    assert found[1] == "equal: no reliable difference from erm; use more seeds to detect a smaller one."
    assert len(found) == 2


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_means_have_an_interval_from_three_seeds_on_and_the_range_of_two(tmp_path, seeds):
    comparison = comparison_of(tmp_path, {"erm": 0.5, "mixup": 0.6}, seeds=seeds)
    write_report(comparison, tmp_path)
    assert all(np.isfinite(row.get("low", np.nan)) == (seeds == 3) for row in rows_of({1: comparison}))
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert ("±" in text) == (seeds == 3)
        assert bool(re.search(r"\d \([\d.]+\sto\s[\d.]+\)", text)) == (seeds == 2)
        assert ("(range of their values). A confidence interval requires 3 seeds." in text) == (seeds == 2)
    # Numbers wrap only before an interval or a range, and names only after an underscore.
    numbers = re.findall(r'<td class="(?:number|better|worse)">([^<]*)<', (tmp_path / "report.html").read_text())
    assert numbers and not [text for text in numbers if re.search(r" (?![\[(])", text)]
    (single,) = findings(comparison_of(tmp_path, {"erm": 0.5}, seeds=seeds))
    assert ("(mean and range of 2 seeds)" in single) == (seeds == 2)


def test_findings_of_one_seed_name_their_limit(tmp_path):
    found = findings(comparison_of(tmp_path, {"erm": 0.5, "worse": 0.1}, seeds=1, failed={"bad": "No place.\nMore."}))
    assert "worse accuracy (\u2212" in found[0]
    assert found[1] == "bad was not trained: No place."
    assert "not the variation between training runs" in found[2]


def test_findings_of_one_model_are_its_metrics(tmp_path):
    (found,) = findings(comparison_of(tmp_path, {"erm": 1.0}, seeds=1))
    assert re.fullmatch(
        r"erm: accuracy 100\.00 %, NLL [\d.]+ nats, Brier score [\d.]+ and calibration error [\d.]+ %\.", found
    )


def test_metrics_that_are_not_finite_are_not_compared(tmp_path):
    comparison = comparison_of(tmp_path, {"erm": 0.5, "diverged": 0.5})
    for diverged in comparison.runs["diverged"]:
        diverged.metrics["nll"] = float("nan")
        diverged.write({"logits": np.full((60, 3), np.nan), "labels": LABELS})
    assert findings(comparison) == [
        "diverged: not compared, because some metrics are not finite (training may have diverged)."
    ]
    write_report(comparison, tmp_path / "report")


class Page(HTMLParser):
    """The text of a page, outside of its head, and the names of its elements."""

    def __init__(self):
        super().__init__()
        self.text, self.tags, self.open = [], set(), False

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.open = tag != "style" and (self.open or tag == "body")

    def handle_data(self, data):
        if self.open:
            self.text.append(data)


def words(text):
    return re.findall(r"\S+", text)


def markdown_text(path):
    """Return the text of a Markdown file, and the types of its inline elements."""
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text())
    text, kinds = [], set()
    for token in tokens:
        children = token.children or []
        kinds |= {child.type for child in children if child.type != "image"}
        text.append("".join(child.content for child in children if child.type != "image"))
        if token.type == "fence":
            text.append(token.content)
    return " ".join(text), kinds


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Write a report in which every name that comes from the user has special characters."""
    directory = tmp_path_factory.mktemp("report")
    (directory / "runs").mkdir()
    settings = {"task": {"name": UNUSUAL, "data": UNUSUAL}, "methods": {}}
    comparison = comparison_of(
        directory / "runs",
        {UNUSUAL: 0.5, f"2. {UNUSUAL}": 0.9},
        name=UNUSUAL,
        settings=settings,
        failed={f"- {UNUSUAL}": UNUSUAL},
        class_names=[UNUSUAL] * 3,
    )
    comparison.runs[UNUSUAL][0].notes.append(UNUSUAL)
    write_report(comparison, directory)
    return directory


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\t=1", "erm"])
def test_cells_of_results_are_not_formulas(tmp_path, name):
    comparison = comparison_of(tmp_path, {name: 0.5}, seeds=1)
    comparison.write_csv(tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {name if name == "erm" else f"'{name}"}
    assert [float(row["value"]) for row in rows] == [row["value"] for row in comparison.rows()]


def test_files_are_not_written_through_links(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    (tmp_path / "runs").mkdir()
    output = tmp_path / "report"
    (output / "figures").mkdir(parents=True)
    names = ["report.md", "report.html", "results.csv", "report.md.partial", "figures/reliability.png"]
    for name in names:
        (output / name).symlink_to(kept)
    comparison = comparison_of(tmp_path / "runs", {"erm": 0.5, "other": 0.9})
    comparison.write_csv(output / "results.csv")
    write_report(comparison, output)
    assert kept.read_text() == "kept" and not [path for path in output.rglob("*") if path.is_symlink()]


def test_a_code_block_ends_where_it_should(tmp_path):
    settings = {"task": {"data": "```\n# heading\n```"}}
    (tmp_path / "runs").mkdir()
    write_report(comparison_of(tmp_path / "runs", {"erm": 0.5}, seeds=1, settings=settings), tmp_path)
    tokens = MarkdownIt("commonmark").parse((tmp_path / "report.md").read_text())
    assert sum(token.type == "fence" for token in tokens) == 1
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert "heading" not in headings


def test_names_are_escaped_in_both_formats(report):
    page = Page()
    page.feed((report / "report.html").read_text())
    assert "b" not in page.tags and "a" not in page.tags and "em" not in page.tags
    markdown, kinds = markdown_text(report / "report.md")
    assert kinds <= {"text", "text_special", "em_open", "em_close", "code_inline", "strong_open", "strong_close"}
    for text in ("".join(page.text), markdown):
        assert f"Mixing methods on {UNUSUAL}" in text
        assert f"2. {UNUSUAL} compared with {UNUSUAL}: better" in text
        assert f"- {UNUSUAL} was not trained: {UNUSUAL}" in text
        assert f"Difference of each method from {UNUSUAL} with its" in text


def test_both_formats_have_the_same_text(report):
    page = Page()
    page.feed((report / "report.html").read_text().replace("<wbr>", ""))
    html = " ".join(page.text).replace("green (better) or red (worse)", "bold")
    markdown, _ = markdown_text(report / "report.md")
    assert sorted(words(html)) == sorted(words(markdown))


def test_classes_have_the_precision_recall_and_f1_of_scikit_learn(tmp_path):
    (tmp_path / "runs").mkdir()
    comparison = comparison_of(tmp_path / "runs", {"erm": 0.5, "other": 0.8}, 2, class_names=["a", "b", "c|d"])
    table = class_table(comparison)
    for column, name in enumerate(("erm", "other"), start=2):
        arrays = [run.arrays for run in comparison.runs[name]]
        predictions = np.concatenate([a["logits"].argmax(axis=1) for a in arrays])
        scores = precision_recall_fscore_support(np.tile(LABELS, 2), predictions)[:3]
        for k, row in enumerate(table.rows):
            assert row[column].text == " / ".join(f"{100 * score[k]:.1f}" for score in scores)
    assert [row[0].text for row in table.rows] == ["a", "b", "c|d"] and table.rows[0][1].text == "20"
    write_report(comparison, tmp_path)
    assert "| c\\|d | 20 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "figures" / "confusion.png").stat().st_size > 1000
    assert not (tmp_path / "figures" / "mistakes.png").exists()  # no images


def test_of_many_classes_those_with_the_lowest_f1_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LISTED_CLASSES", 2)
    table = class_table(comparison_of(tmp_path, {"erm": 0.6}, seeds=1))
    scores = class_scores(confusion_counts(comparison_of(tmp_path, {"erm": 0.6}, seeds=1), "erm"))
    assert [int(row[0].text) for row in table.rows] == np.argsort(scores[:, 2])[:2].tolist()
    assert "of the 2 of 3 classes with the lowest mean F1" in table.caption


def test_worst_mistakes_are_the_most_confident_wrong_predictions(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    drawn = []
    monkeypatch.setattr(figures, "plot_mistakes", lambda found, path: drawn.append(found) or path.write_bytes(b""))
    names = ["a", "b", "c"]
    comparison = comparison_of(tmp_path / "runs", {"erm": 0.5, "perfect": 1.0}, class_names=names)
    comparison.test_image = lambda i: i  # so that the index can be compared
    write_report(comparison, tmp_path)
    arrays = comparison.runs["erm"][0].arrays
    exponentials = np.exp(arrays["logits"])
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    wrong = [i for i in range(60) if probabilities[i].argmax() != LABELS[i]]
    expected = sorted(wrong, key=lambda i: -probabilities[i].max())[: figures.MISTAKES]
    found = drawn[0]["erm"]
    assert [mistake.image for mistake in found] == expected and not drawn[0]["perfect"]
    for mistake, i in zip(found, expected, strict=True):
        assert (mistake.label, mistake.prediction) == (names[LABELS[i]], names[probabilities[i].argmax()])
        assert mistake.probability == pytest.approx(probabilities[i].max())


def test_a_registered_metric_appears_in_the_report(tmp_path):
    register_metric(MetricInfo("fifty", "share of fifty", "%", 100, 1, "higher", compute=lambda logits, labels: 0.5))
    try:
        (tmp_path / "runs").mkdir()
        write_report(comparison_of(tmp_path / "runs", {"erm": 0.5}, seeds=1), tmp_path)
    finally:
        del METRICS["fifty"]
    assert "Share of fifty (%)\u00a0↑ |" in (tmp_path / "report.md").read_text()
    assert re.search(r"^\| erm \| .* 50\.0 \|$", (tmp_path / "report.md").read_text(), flags=re.MULTILINE)
