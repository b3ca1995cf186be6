"""Put the tables of benchmarks/results into docs/performance.md, between their markers.

python benchmarks/tables.py
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import harness

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def fused() -> list[list[str]]:
    """The loss against the literal one."""
    table = [["b", "r", "d", "c", "n", "factors", "literal", "ours", "products alone", "faster", "extra memory"]]
    for row in harness.read("fused.csv"):
        sizes = [f"{int(row[size]):,}" for size in "brdcn"]
        times = [f"{row[f'{name}_ms']} ms" for name in ("literal", "ours", "products")]
        memory = f"{row['ours_extra_mb']} MB for {row['literal_extra_mb']}"
        table.append([*sizes, row["factors"], *times, f"{row['times_faster']}x ({row['quartiles']})", memory])
    return table


def sampling() -> list[list[str]]:
    """What drawing factors costs."""
    table = [["factors", "time", "faster"]]
    for row in harness.read("sampling.csv"):
        table.append([f"`{row['factors']}`", f"{row['ms']} ms", f"{row['times_faster']}x ({row['quartiles']})"])
    return table


def variance() -> list[list[str]]:
    """What ways of drawing cost the gradient."""
    ways = ["independent", "permutations", "shared", "vertices"]
    rows = harness.read("gradient_variance.csv")
    table = [["mixed", "effective examples", *ways]]
    for n, k in dict.fromkeys((row["n"], row["effective_examples"]) for row in rows):
        here = {row["way"]: row["variance"] for row in rows if (row["n"], row["effective_examples"]) == (n, k)}
        table.append([n, k, *(here[way] for way in ways)])
    return table


def step() -> list[list[str]]:
    """Whole steps."""
    table = [["model", "method", "median step", "time", "peak memory"]]
    for row in harness.read("step.csv"):
        time = f"{row['time']}x ({row['quartiles']})"
        memory = f"{row['memory']}x" if row.get("memory") else ""
        table.append([row["case"], row["method"], f"{int(row['median_ms']):,} ms", time, memory])
    return table


def markdown(table: list[list[str]]) -> str:
    """Rows, the first of them the heads."""
    head, *rest = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([head, "|" + "---|" * len(table[0]), *rest])


def put(page: Path, *makers: Callable[[], list[list[str]]]) -> None:
    """Replace, in a page, what stands behind the marker of each table, by what the function of that name makes."""
    text = page.read_text()
    for make in makers:
        marker = f"<!-- {make.__name__} -->"
        before, after = re.split(rf"{marker}\n(?:\n?\|.*\n)*", text)
        text = f"{before}{marker}\n\n{markdown(make())}\n{after}"
    page.write_text(text)


def main() -> None:
    """The tables of docs/performance.md."""
    put(PAGE, fused, sampling, variance, step)


if __name__ == "__main__":
    main()
