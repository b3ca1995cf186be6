"""Say which classification classes of the installed Transformers can be trained, and how."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import transformers

from ..data.supported_models import SupportedModel, installed
from ._options import make_parser, parse, with_name

USAGE = "mm-hf models [NAME] [OPTIONS.yaml] [--task TASK] [--method METHOD]"
DESCRIPTION = """Lists the classes of the installed Transformers that classify texts, images, audio and videos: which methods train
them, as measured on a tiny random model of each, what attention="auto" is for them, and which tokens their head
reads. NAME keeps those whose class or architecture contains it.

examples:
  mm-hf models vit
  mm-hf models --task audio --method dense_multimix"""
EPILOG = """The input-space methods (mixup, cutmix) and plain training (erm) work with all of them. docs/models.md has more of
what was measured; mm-hf check MODEL tries a model of your own."""
METHODS = ("dense_multimix", "multimix", "manifold_mixup")
FEW = 12  # rows for which it is said what stands in the way


@dataclass
class ModelsOptions:
    """Which classes are listed."""

    name: str | None = field(default=None, metadata={"help": "Part of a class's or an architecture's name."})
    task: Literal["text", "image", "audio", "video"] | None = field(
        default=None, metadata={"help": "What they classify."}
    )
    method: Literal["dense_multimix", "multimix", "manifold_mixup"] | None = field(
        default=None, metadata={"help": "Those that it trains."}
    )


def main(arguments: Sequence[str]) -> int:
    """List the classes that the arguments ask for."""
    parser = make_parser("models", USAGE, DESCRIPTION, EPILOG, trains=False, filter=ModelsOptions)
    options, _ = parse(parser, with_name(arguments, "--name"), "mm-hf models", {})
    every = installed()
    rows = select(every, options.name, options.task, options.method)
    if not rows:
        raise ValueError(_nothing(every, options))
    print(listing(rows))
    return 0


def select(
    rows: Sequence[SupportedModel], name: str | None = None, task: str | None = None, method: str | None = None
) -> list[SupportedModel]:
    """The rows of some name, task and method.

    Example:
        >>> [row.name for row in select(installed(), "swinv2", method="dense_multimix")]
        ['Swinv2ForImageClassification']
    """
    part = (name or "").lower()
    return [
        row
        for row in rows
        if (part in row.name.lower() or part in row.architecture.lower())
        and task in (None, row.task)
        and (method is None or getattr(row, method))
    ]


def listing(rows: Sequence[SupportedModel]) -> str:
    """The rows as a table in plain text, and what they come to."""
    width = max(len(row.name) for row in rows)
    titles = ("class", "task", *METHODS, "auto", "head reads")
    lines = [f"{titles[0]:<{width}}  {titles[1]:<5}  {'  '.join(titles[2:5])}  {titles[5]:<4}  {titles[6]}"]
    for row in rows:
        says = [("yes" if getattr(row, m) else "no") if row.transformers else "?" for m in METHODS]
        cells = "  ".join(f"{said:<{len(method)}}" for said, method in zip(says, METHODS))
        lines.append(
            f"{row.name:<{width}}  {row.task:<5}  {cells}  {row.attention or '-':<4}  {row.pool or '-'}".rstrip()
        )
        if len(rows) <= FEW and row.reason:
            lines.append(f"  {row.reason}.")
    tried = [row for row in rows if row.transformers]
    counts = ", ".join(f"{method} {sum(getattr(row, method) for row in tried)}" for method in METHODS)
    versions = ", ".join(sorted({row.transformers for row in tried}))
    with_version = f", tried with Transformers {versions} ({transformers.__version__} is installed)" if tried else ""
    lines += ["", f"{len(rows)} classes, trained by {counts}{with_version}."]
    if len(tried) < len(rows):
        lines.append(f"{len(rows) - len(tried)} marked ? were not tried: mm-hf check MODEL tries one.")
    return "\n".join(lines)


def _nothing(rows: Sequence[SupportedModel], options: ModelsOptions) -> str:
    filters = [f"--task {options.task}"] * bool(options.task) + [f"--method {options.method}"] * bool(options.method)
    if options.name is None or select(rows, options.name):
        return f"No class{f' with {options.name!r} in its name' if options.name else ''} fits {' '.join(filters)}."
    names = {row.architecture for row in rows}
    near = difflib.get_close_matches(options.name.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "mm-hf models lists them all."
    return f"No classification class of Transformers has {options.name!r} in its name: {hint}"
