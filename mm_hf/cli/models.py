"""List the classification classes of Transformers and models of timm, and the methods that train them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ._option_files import expand_arguments
from ._options import make_parser, parse, take

if TYPE_CHECKING:
    from ..data.supported_models import SupportedModel

USAGE = "mm-hf models [NAME] [OPTIONS.yaml] [--task TASK] [--method METHOD]"
DESCRIPTION = """\
Lists the text, image, audio and video classification classes of the installed Transformers, and one model of each
family of timm: the methods that train a small random model, the value of attention="auto", and the tokens that the
head reads. NAME selects the rows whose name or architecture contains it.

examples:
  mm-hf models vit
  mm-hf models timm/vit
  mm-hf models --task audio --method dense_multimix"""
EPILOG = """\
Plain training (erm) and the input-space methods (mixup, cutmix) do not depend on the class. See docs/models.md and
docs/timm_models.md for details, and mm-hf check MODEL to test your own model."""
METHODS = ("dense_multimix", "multimix", "manifold_mixup")
MAX_ROWS_WITH_REASONS = 12


@dataclass
class ModelsOptions:
    """Filters of the listed classes."""

    name: str | None = field(default=None, metadata={"help": "Part of the name of a class or an architecture."})
    task: Literal["text", "image", "audio", "video"] | None = field(
        default=None, metadata={"help": "Modality of the inputs."}
    )
    method: Literal["dense_multimix", "multimix", "manifold_mixup"] | None = field(
        default=None, metadata={"help": "Only classes that this method trains."}
    )


def main(arguments: Sequence[str]) -> int:
    """List classes from command-line arguments."""
    parser = make_parser("mm-hf models", USAGE, DESCRIPTION, EPILOG, trains=False, filter=ModelsOptions)
    options = take(parse(parser, expand_arguments(arguments, "--name"), "mm-hf models", {}), ModelsOptions)

    from ..data.supported_models import installed

    classes = installed()
    rows = select(classes, options.name, options.task, options.method)
    if not rows:
        raise ValueError(_no_match_message(classes, options))
    print(format_table(rows))
    return 0


def select(
    rows: Sequence[SupportedModel], name: str | None = None, task: str | None = None, method: str | None = None
) -> list[SupportedModel]:
    """Return the rows that match a name, a task and a method.

    Example:
        >>> from mm_hf.data.supported_models import installed
        >>> [row.name for row in select(installed(), "vitmsn", method="dense_multimix")]
        ['ViTMSNForImageClassification']
    """
    part = (name or "").lower()
    return [
        row
        for row in rows
        if (part in row.name.lower() or part in row.architecture.lower())
        and task in (None, row.task)
        and (method is None or getattr(row, method))
    ]


def format_table(rows: Sequence[SupportedModel]) -> str:
    """Return the rows as a plain-text table with a summary."""
    import transformers

    width = max(len(row.name) for row in rows)
    titles = ("class", "task", *METHODS, "auto", "head reads")
    lines = [f"{titles[0]:<{width}}  {titles[1]:<5}  {'  '.join(titles[2:5])}  {titles[5]:<4}  {titles[6]}"]
    for row in rows:
        values = [("yes" if getattr(row, m) else "no") if row.transformers else "-" for m in METHODS]
        cells = "  ".join(f"{value:<{len(method)}}" for value, method in zip(values, METHODS))
        lines.append(
            f"{row.name:<{width}}  {row.task:<5}  {cells}  {row.attention or '-':<4}  {row.pool or '-'}".rstrip()
        )
        if len(rows) <= MAX_ROWS_WITH_REASONS and row.reason:
            lines.append(f"  {row.reason}.")
    tested = [row for row in rows if row.transformers]
    counts = ", ".join(f"{method} trains {sum(getattr(row, method) for row in tested)}" for method in METHODS)
    versions = ", ".join(sorted({row.transformers for row in tested}))
    lines += ["", f"{len(rows)} classes: {counts}."]
    if tested:
        lines.append(f"Tested with Transformers {versions}; installed: {transformers.__version__}.")
    if len(tested) < len(rows):
        lines.append(
            f"Not tested: {len(rows) - len(tested)} (marked -), for want of a library or a newer Transformers. Test a "
            "model with mm-hf check MODEL."
        )
    return "\n".join(lines)


def _no_match_message(rows: Sequence[SupportedModel], options: ModelsOptions) -> str:
    filters = [f"--task {options.task}"] * bool(options.task) + [f"--method {options.method}"] * bool(options.method)
    if options.name is None or select(rows, options.name):
        return f"No class{f' with {options.name!r} in its name' if options.name else ''} matches {' '.join(filters)}."
    names = {row.architecture for row in rows}
    near = difflib.get_close_matches(options.name.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "mm-hf models lists all classes."
    return f"No classification class of Transformers has {options.name!r} in its name: {hint}"
