"""Measure everything that a GPU has to report, in at most 35 minutes; without a network.

    make gpu                                     # all parts; benchmarks/results/gpu_*.csv, docs/gpu.md
    make gpu REHEARSE=1                          # all parts in miniature on a CPU; outputs/gpu_rehearsal
    python -m benchmarks.gpu --parts tests step  # some parts

Each part writes its CSV file when it finishes; step, growth and training write each row when it is measured. They keep
rows that are there, so that an interrupted command resumes when it is started again: delete the files to start anew.
A part that fails does not stop the next one; the exit code is then 1. Without a GPU it is 2.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.gpu import tables
from benchmarks.gpu.setup import Setup, describe

REHEARSAL = Path("outputs") / "gpu_rehearsal"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and return the exit code."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__, formatter_class=formatter)
    parser.add_argument("--parts", nargs="+", choices=list(tables.PARTS), default=list(tables.PARTS))
    parser.add_argument("--rehearse", action="store_true", help="Run in miniature on a CPU.")
    parser.add_argument("--epochs", type=int, default=100, help="Length of the training runs. Default: 100.")
    parser.add_argument("--output_dir", type=Path, help="Directory of the CSV files. Default: benchmarks/results.")
    args = parser.parse_args(arguments)
    if not args.rehearse and not torch.cuda.is_available():
        print(
            "make gpu: PyTorch finds no CUDA device; make gpu REHEARSE=1 runs everything in miniature on a CPU.",
            file=sys.stderr,
        )
        return 2
    directory = args.output_dir or (REHEARSAL if args.rehearse else harness.RESULTS)
    setup = Setup(torch.device("cpu" if args.rehearse else "cuda"), args.rehearse, directory, args.epochs)
    print(describe(setup.device), flush=True)
    failed = [name for name in args.parts if not run_part(name, setup)]
    page = tables.PAGE
    if directory != harness.RESULTS:
        page = directory / tables.PAGE.name
        shutil.copy(tables.PAGE, page)
    tables.update(page, directory)
    print(f"{'failed: ' + ', '.join(failed) if failed else 'finished'}; tables in {page}")
    return int(bool(failed))


def run_part(name: str, setup: Setup) -> bool:
    """Run a part; return False if it fails."""
    part = tables.PARTS[name]
    setup.minutes, setup.started = part.MINUTES, time.monotonic()
    try:
        part.run(setup)
    except Exception:
        traceback.print_exc()
        return False
    finally:
        print(f"{name}: {time.monotonic() - setup.started:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    raise SystemExit(main())
