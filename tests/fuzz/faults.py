"""Target of the fuzzer: trainings with one fault, which must end in an error of one sentence."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np

from mm_hf import ERM, MultiMixTrainer
from tests.fuzz.trainings import (
    AUDIO,
    BATCH,
    CLASSES,
    IMAGES,
    STEPS,
    TEXTS,
    build_model,
    is_rejected,
    random_method,
    random_rows,
)
from tests.helpers.digits import arguments

LABELS: dict[str, list[Any]] = {
    "classes": [CLASSES, CLASSES + 3, 10**6, -1, -7, None, "word", 1.5],
    "multi-label": [[0.0, 2.0, 0.0, 1.0], [0.0, -1.0, 0.0, 1.0], [float("nan"), 0.0, 0.0, 1.0], [1.0, 0.0]],
    "regression": [float("nan"), float("inf"), None, "word"],
}


def faults(seed: int) -> None:
    """Train with one wrong label, input or weight in one of three mini-batches: an error of one sentence."""
    random = np.random.default_rng(seed)
    name = str(random.choice(IMAGES + TEXTS + AUDIO))
    kind = str(random.choice(list(LABELS)))
    mixing = random_method(random)
    if isinstance(mixing, ERM) or is_rejected(mixing, name, kind):
        return
    model = build_model(name, seed % 1000, kind)
    rows = random_rows(random, name, model, kind)
    row, where = int(random.integers(len(rows))), str(random.choice(["label", "input", "weight", "batch size"]))
    batch_size: int = BATCH
    fault: Any = None
    if where == "input" and name not in TEXTS:
        fault = [float("nan"), float("inf")][int(random.integers(2))]
        column = next(c for c in rows.column_names if c in ("pixel_values", "input_values"))
        values = rows.with_format(None)[column][:]
        values[row] = np.full_like(values[row], fault).tolist()
        rows = _replaced(rows, column, values)
    elif where == "weight":
        parameters = [p for p in model.parameters() if p.is_floating_point()]
        fault = parameters[int(random.integers(len(parameters)))]
        fault.data.view(-1)[int(random.integers(fault.numel()))] = float("nan")
    elif where == "batch size" and mixing.requirements.min_examples > 1:
        fault = batch_size = 1
    else:
        where = "label"
        fault = LABELS[kind][int(random.integers(len(LABELS[kind])))]
        values = rows.with_format(None)["labels"][:]
        values[row] = fault
        try:
            rows = _replaced(rows, "labels", values)
        except Exception:  # a dataset of such labels cannot be made
            return
    with tempfile.TemporaryDirectory() as directory:
        args = arguments(directory, per_device_train_batch_size=batch_size, max_steps=STEPS, learning_rate=1e-3)
        try:
            MultiMixTrainer(model, args, mixing=mixing, train_dataset=rows).train()
        except ValueError as error:
            if "\n" in str(error) or len(str(error)) > 600:
                raise AssertionError(f"{str(error)!r} is not one line") from error
            return
    raise AssertionError(f"{name}, {mixing}, {kind}: trained with the {where} {fault!r} in row {row}")


def _replaced(rows: Any, column: str, values: Any) -> Any:
    from datasets import Dataset

    columns = {c: list(values) if c == column else rows.with_format(None)[c][:] for c in rows.column_names}
    return Dataset.from_dict(columns).with_format("torch")
