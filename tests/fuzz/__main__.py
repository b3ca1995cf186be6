"""Run the fuzzer: `python -m tests.fuzz [TARGET [SEED]] [--seconds 600]`. It continues with the next seeds."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.targets import TARGETS

STATE = Path("outputs/fuzz.json")


def run(targets: Sequence[str], seconds: float, first: dict[str, int]) -> tuple[dict[str, int], list[str]]:
    """Run the targets in turn, each for an equal share of the time.

    Args:
        targets: Names of the targets.
        seconds: Time in total.
        first: Seed of the first case of each target, by default 0.

    Returns:
        The seed of the next case of each target, and the commands that repeat the failures.
    """
    following, failures = {}, []
    for target in targets:
        seed, end = first.get(target, 0), time.monotonic() + seconds / len(targets)
        while time.monotonic() < end:
            if not run_case(target, seed):
                failures.append(f"python -m tests.fuzz {target} {seed}")
            seed += 1
        following[target] = seed
    return following, failures


def run_case(target: str, seed: int) -> bool:
    """Run one case. Print the error and the command that repeats it, and return False, if it fails."""
    try:
        TARGETS[target](seed)
    except Exception:
        traceback.print_exc()
        print(f"\nrepeat with: python -m tests.fuzz {target} {seed}\n", file=sys.stderr)
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the fuzzer; return 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="?", choices=list(TARGETS))
    parser.add_argument("seed", nargs="?", type=int)
    parser.add_argument("--seconds", type=float, default=600)
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return 0 if run_case(options.target, options.seed) else 1
    done = json.loads(STATE.read_text()) if STATE.exists() else {}
    targets = [options.target] if options.target else list(TARGETS)
    following, failures = run(targets, options.seconds, done)
    STATE.parent.mkdir(exist_ok=True)
    STATE.write_text(json.dumps({**done, **following}, indent=2) + "\n")
    for target in targets:
        print(f"{target}: seeds {done.get(target, 0)} to {following[target] - 1}")
    print("\n".join([f"{len(failures)} failures", *failures]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
