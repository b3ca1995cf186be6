"""Tokenization of text datasets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def tokenize(
    rows: Any,
    columns: Sequence[str],
    label: str | None,
    tokenizer: Any,
    max_length: int | None = None,
    *,
    pad_to_max_length: bool = False,
) -> Any:
    """Tokenize a dataset and return it with the tokenizer's outputs and `labels`.

    Args:
        rows: A `datasets.Dataset`.
        columns: Column with texts, or two columns for pairs of texts.
        label: Column with labels, or None.
        tokenizer: Tokenizer of the model.
        max_length: Maximum number of tokens; longer texts are truncated. Default: the tokenizer's `model_max_length`.
        pad_to_max_length: Pad all texts to `max_length`. Otherwise the collator pads each batch.

    Raises:
        ValueError: There are not one or two text columns.
    """
    if len(columns) not in (1, 2):
        raise ValueError(
            f"--text_column_names must be one column, or two for pairs of texts, but is "
            f"{', '.join(columns) or 'empty'}."
        )

    def change(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [[text or "" for text in batch[name]] for name in columns]
        padding = "max_length" if pad_to_max_length else False
        found = tokenizer(*texts, truncation=True, max_length=max_length, padding=padding)
        return dict(found) if label is None else {**found, "labels": batch[label]}

    return rows.map(change, batched=True, remove_columns=rows.column_names, keep_in_memory=True)
