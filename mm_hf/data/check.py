"""Problems of a dataset, all at once: unreadable images, empty texts and empty labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Image

from .image_columns import with_images
from .images import read_image_row
from .options import DataOptions
from .splits import input_columns, label_column, load


def find_problems(options: DataOptions, **hub: Any) -> Iterator[str]:
    """Read every row of every split, and describe each problem with the split and the row.

    Args:
        options: Data options.
        hub: Keyword arguments of `datasets.load_dataset`, such as `cache_dir` and `token`.

    Raises:
        ValueError: The dataset cannot be loaded, or a column is missing.
    """
    data = load(options.dataset_name, options.dataset_config_name, options, **hub)
    if "train" in data:
        data = with_images(data, options, label_column(data["train"], options.label_column_name), check=False)
    for split, rows in data.items():
        label = label_column(rows, options.label_column_name)
        kind, inputs = input_columns(rows, options, label)
        labels = rows[label]
        are_images = kind == "image" and isinstance(rows.features[inputs[0]], Image)
        texts = {name: rows[name] for name in inputs} if kind == "text" else {}
        for i in range(len(rows)):
            where = f"{split}, row {i}"
            if labels[i] is None or labels[i] == "":
                yield f"{where}: the label is empty."
            for name, column in texts.items():
                if column[i] is None or not str(column[i]).strip():
                    yield f"{where}: the text in the column {name!r} is empty."
            if are_images:
                try:
                    read_image_row(rows, i, inputs[0])
                except ValueError as error:
                    yield f"{where}: {error}"
