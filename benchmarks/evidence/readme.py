"""Table of README.md: Dense MultiMix minus plain training, per task and number of epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.methods import BASELINE
from benchmarks.evidence.results import Row, bold_if_significant
from benchmarks.evidence.runs import Paths
from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.verdict import Verdict
from benchmarks.harness import read
from benchmarks.markdown import replace_section, table_lines
from mm_hf.evaluation.metrics.registry import METRICS

HEADER = (
    "`DenseMultiMix()` minus plain training",
    "examples",
    "epochs",
    "seeds",
    "accuracy, points [95 % interval]",
    "NLL",
)


def summarize(paths: Paths, rows: Sequence[Row]) -> list[Path]:
    """Write the table, in decreasing order of the difference, from verdict.csv and the rows of evidence.csv."""
    known = [Verdict.from_row(row) for row in read("verdict.csv", paths.results)]
    known = [verdict for verdict in known if "gain" in verdict.differences]
    if not known or not paths.readme.exists():
        return []
    sizes = {
        (row["task"], int(row["length"])): (f"{row['train_examples']:,.0f}", f"{row['epochs']:,.0f}")
        for row in rows
        if row["method"] == BASELINE
    }
    table = [list(HEADER)]
    for verdict in sorted(known, key=lambda verdict: -verdict.differences["gain"].value):
        gain = verdict.differences["gain"]
        examples, epochs = sizes[verdict.task, verdict.length]
        accuracy = bold_if_significant(METRICS["accuracy"].format_difference(gain), gain)
        title = TASKS[verdict.task].title
        table.append([title, examples, epochs, str(verdict.seeds), accuracy, f"{verdict.ratios['nll']:.2f}x"])
    replace_section(paths.readme, "differences", ["", *table_lines(table), ""])
    return [paths.readme]
