"""Rows with texts to what a text model takes."""

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
    """Rows with `input_ids` and the like and `labels`.

    Args:
        rows: A `datasets.Dataset`.
        columns: One column with texts, or two for pairs.
        label: The column with class indices, or whatever the labels are; None: there is none.
        tokenizer: The model's.
        max_length: Texts are cut to so many tokens. Default: what the tokenizer says its model takes.
        pad_to_max_length: Pad all texts to that length. Without it they are not padded: that is for the collator.

    Raises:
        ValueError: There are more than two columns of texts.
    """
    if len(columns) not in (1, 2):
        raise ValueError(
            f"--text_column_names must be one column, or two for pairs, got {', '.join(columns) or 'none'}."
        )

    def change(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [[text or "" for text in batch[name]] for name in columns]
        padding = "max_length" if pad_to_max_length else False
        found = tokenizer(*texts, truncation=True, max_length=max_length, padding=padding)
        return dict(found) if label is None else {**found, "labels": batch[label]}

    return rows.map(change, batched=True, remove_columns=rows.column_names, keep_in_memory=True)
