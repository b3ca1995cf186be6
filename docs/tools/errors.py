"""Write docs/errors.md: run every bad input of tests/helpers/bad_inputs.py and list its message.

python docs/tools/errors.py
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "errors.md"
HEADER = """# Error messages

`make errors` writes this page: it runs each input and copies its message. An error names the argument, the file or the
row, the value found, and the remedy. Commands print it with exit code 2, and Python raises it. A mistake in the command
line alone is reported before torch and Transformers are imported. `MM_HF_DEBUG=1` shows the traceback of a command.

`VIT` stands for `--model_type vit` with the configuration of a tiny model, `vit` for a model of two classes,
`regression` for one with a single output, `gpt2` for a language model, and `train(model, method, ...)` for
`MultiMixTrainer(model, ..., mixing=method).train()` with these labels or this batch size.
"""


def run_cases(root: Path) -> dict[str, dict[str, str]]:
    """Return the message of each case by subject, run in an empty directory."""
    from tests.helpers import bad_inputs

    with bad_inputs.workspace(root) as names:
        return {
            subject: {case: bad_inputs.message_of(case, names) for case in cases}
            for subject, cases in bad_inputs.CASES.items()
        }


def page(messages: Mapping[str, Mapping[str, str]]) -> str:
    """Return the page: one table per subject."""
    from tests.helpers.bad_inputs import VIT

    parts = [HEADER]
    for subject, cases in messages.items():
        shown = {case.replace(VIT, "VIT"): message for case, message in cases.items()}
        rows = [f"| {_cell(f'`{case}`')} | {_cell(message)} |" for case, message in shown.items()]
        parts.append("\n".join([f"## {subject}", "", "| input | message |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def _cell(text: str) -> str:
    """Return a text as a table cell in which no character is markup."""
    escaped = text.replace("|", "\\|")
    return escaped if text.startswith("`") else re.sub(r"([<*`\[\]])", r"\\\1", escaped)


def main() -> None:
    """Write the page."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as directory:
        text = page(run_cases(Path(directory)))
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
