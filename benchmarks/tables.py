"""Update the tables of docs/performance.md from benchmarks/results.

python -m benchmarks.tables
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import harness
from benchmarks.markdown import replace_section, table_lines

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def fused() -> list[list[str]]:
    """Return the table of the loss against a literal implementation."""
    table = [["b", "r", "d", "c", "n", "factors", "literal", "ours", "products alone", "faster", "extra memory"]]
    for row in harness.read("fused.csv"):
        sizes = [f"{int(row[size]):,}" for size in "brdcn"]
        times = [f"{row[f'{name}_ms']} ms" for name in ("literal", "ours", "products")]
        memory = f"{row['ours_extra_mb']} MB vs. {row['literal_extra_mb']} MB"
        table.append([*sizes, row["factors"], *times, f"{row['times_faster']}x ({row['quartiles']})", memory])
    return table


def sampling() -> list[list[str]]:
    """Return the table of the time to draw factors."""
    table = [["factors", "time", "faster"]]
    for row in harness.read("sampling.csv"):
        table.append([f"`{row['factors']}`", f"{row['ms']} ms", f"{row['times_faster']}x ({row['quartiles']})"])
    return table


def variance() -> list[list[str]]:
    """Return the table of the gradient's variance per way of drawing factors."""
    ways = ["independent", "permutations", "shared", "few examples"]
    rows = harness.read("gradient_variance.csv")
    table = [["mixed examples", "effective examples", *ways]]
    for n, k in dict.fromkeys((row["n"], row["effective_examples"]) for row in rows):
        found = {row["way"]: row["variance"] for row in rows if (row["n"], row["effective_examples"]) == (n, k)}
        table.append([n, k, *(found[way] for way in ways)])
    return table


def step() -> list[list[str]]:
    """Return the table of complete training steps."""
    table = [["model", "method", "median step", "time", "peak memory"]]
    for row in harness.read("step.csv"):
        time = f"{row['time']}x ({row['quartiles']})"
        memory = f"{row['memory']}x" if row.get("memory") else ""
        table.append([row["case"], row["method"], f"{int(row['median_ms']):,} ms", time, memory])
    return table


def update(page: Path, *makers: Callable[[], list[list[str]]]) -> None:
    """Replace the sections of a page that are named as the given functions by the tables that they return."""
    for make in makers:
        replace_section(page, make.__name__, ["", *table_lines(make(), align="l"), ""])


def main() -> None:
    """Update docs/performance.md."""
    update(PAGE, fused, sampling, variance, step)


if __name__ == "__main__":
    main()
