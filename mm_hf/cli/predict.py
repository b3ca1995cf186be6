"""Predict the class of images, texts or recordings, as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..data.options import check_path
from ..methods.settings import setting
from ._option_files import expand_option_file
from ._options import make_parser, parse, quiet, take

USAGE = "mm-hf predict MODEL FILES_OR_DIRECTORIES ... [--output_file FILE.csv] [options]"
DESCRIPTION = """Predicts the class of each file and writes CSV with the columns file, label and probability. MODEL is a
directory or a Hub name. Directories are searched for images, texts (.txt) or recordings (.wav, .flac, ...), as the
model requires.

example:
  mm-hf predict trained photos/ --output_file predictions.csv"""


@dataclass
class PredictOptions:
    """Options of `mm-hf predict`."""

    model: str | None = field(default=None, metadata={"help": "Directory or Hub name; the same as MODEL."})
    files: list[str] = field(default_factory=list, metadata={"help": "Files and directories; the same as FILES."})
    output_file: str | None = field(default=None, metadata={"help": "CSV file. Default: print."})
    task: Literal["image", "text", "audio"] | None = field(
        default=None, metadata={"help": "Kind of the model's inputs. Default: from its configuration."}
    )
    batch_size: int = setting(32, "Number of files in memory at a time.", within="[1, inf)")
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ... Default: a GPU if there is one."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Directory of downloaded files."})
    token: str | None = field(default=None, metadata={"help": "Hub token. Default: that of `hf auth login`."})


def main(arguments: Sequence[str]) -> int:
    """Predict files from command-line arguments."""
    given = list(arguments)
    count = next((i for i, word in enumerate(given) if word.startswith("-")), len(given))
    words, rest = given[:count], given[count:]
    parser = make_parser("mm-hf predict", USAGE, DESCRIPTION, "", trains=False, predict=PredictOptions)
    values = parse(parser, expand_option_file(rest), "mm-hf predict", {})
    options = take({**values, **({"model": words[0]} if words else {})}, PredictOptions)
    options.files = [*words[1:], *options.files]
    if options.model is None or not options.files:
        raise ValueError("MODEL or FILES are missing: mm-hf predict MODEL FILES_OR_DIRECTORIES ...")
    check_path("model", options.model)
    for path in options.files:
        if not Path(path).exists():
            raise ValueError(f"{path} does not exist: give files or directories.")
    return _predict(options)


def _predict(options: PredictOptions) -> int:
    import contextlib
    import csv
    import sys

    import torch
    import transformers

    from ..data.dummy_inputs import detect_task, load
    from ..data.predict import find_files, predict_files

    quiet()
    transformers.utils.logging.set_verbosity_error()
    name = str(options.model)
    hub = {"revision": options.model_revision, "cache_dir": options.cache_dir, "token": options.token}
    task = options.task or detect_task(name, **hub)
    files = find_files(options.files, task)
    model, processor = load(name, task, **hub)
    if processor is None:
        raise ValueError(f"{name} has no processor: save the model's image processor, tokenizer or feature extractor.")
    model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    predictions = predict_files(model, processor, files, task, options.batch_size)
    with contextlib.ExitStack() as stack:
        out = sys.stdout
        if options.output_file is not None:
            out = stack.enter_context(Path(options.output_file).open("w", newline="", encoding="utf-8"))
        writer = csv.writer(out)
        writer.writerow(["file", "label", "probability"])
        for file, label, probability in predictions:
            writer.writerow([_cell(file), _cell(label), f"{probability:.4f}"])
    if options.output_file is not None:
        print(f"Wrote {len(files)} predictions to {options.output_file}.")
    return 0


def _cell(text: str) -> str:
    """Return a text as a cell that spreadsheets do not read as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
