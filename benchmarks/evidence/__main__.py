"""Evidence for docs/evidence.md: methods compared on small real tasks.

    python -m benchmarks.evidence run --tasks digits_vit --seeds 3    # all methods on the test examples
    python -m benchmarks.evidence ablate --tasks mnist1d              # one setting of Dense MultiMix changed at a time
    python -m benchmarks.evidence run --lengths 4 16                  # 4 and 16 times as many epochs
    python -m benchmarks.evidence search --methods erm k2=dense_multimix:effective_examples=2
    python -m benchmarks.evidence summarize                           # tables and plots only; trains nothing

Each command trains the runs that are missing, then updates its CSV file in benchmarks/results and its tables and plots
in docs/. An interrupted command resumes when it is started again. Seeds, methods and tasks can be added later. `search`
evaluates on held-out training examples and never on test examples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.evidence import ablate, run, search
from benchmarks.evidence.runs import add_common_arguments, paths_of, silence_libraries

EXPERIMENTS = {"run": run, "ablate": ablate, "search": search}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.evidence", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in EXPERIMENTS.items():
        title = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(name, help=title, description=module.__doc__, formatter_class=formatter)
        add_common_arguments(command, module.DEFAULT_TASKS, module.DEFAULT_SEEDS)
        module.add_arguments(command)
    summary = commands.add_parser("summarize", help="Write all tables and plots from finished runs and CSV files.")
    add_common_arguments(summary)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = make_parser().parse_args(arguments)
    paths = paths_of(args)
    silence_libraries()
    chosen = EXPERIMENTS if args.command == "summarize" else {args.command: EXPERIMENTS[args.command]}
    try:
        if args.command != "summarize":
            EXPERIMENTS[args.command].train(args, paths)
        written = [path for module in chosen.values() for path in module.summarize(paths)]
    except (ModuleNotFoundError, FileNotFoundError, ValueError) as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 2
    print("\n".join(["Wrote:", *map(str, written)]) if written else "Nothing to summarize.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
