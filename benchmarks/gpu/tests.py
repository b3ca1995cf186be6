"""Results of the tests that are marked `gpu`, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.gpu.setup import Setup, describe

FILE, MINUTES = "gpu_tests.csv", 4.0
ROOT = Path(__file__).parents[2]


def run(setup: Setup) -> None:
    """Run the tests and write their results."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu"]
        environment = {**os.environ, "MM_HF_GPU_TESTS_ON": setup.device.type, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        subprocess.run(
            [*command, f"--junitxml={report}"], cwd=ROOT, env=environment, check=False, timeout=60 * setup.minutes
        )
        rows = results(report)
    harness.write(FILE, [{**row, "device": describe(setup.device)} for row in rows], setup.directory)


def results(report: Path) -> list[dict[str, Any]]:
    """Return test, result and message of each test in a JUnit report."""
    rows = []
    for case in ElementTree.parse(report).iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        message = "" if bad is None else str(bad.get("message", "")).split("\n")[0][:200]
        rows.append({"test": case.get("name"), "result": "passed" if bad is None else bad.tag, "message": message})
    return rows


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the table of docs/gpu.md."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["test"].split("[")[0].removeprefix("test_").replace("_", " "), []).append(row)
    body = [["test", "cases", "result"]]
    for name, found in cases.items():
        bad = [f"{row['test']}: {row['result']}, {row['message']}" for row in found if row["result"] != "passed"]
        body.append([name, f"{len(found)}", "; ".join(bad) or "passed"])
    return body
