"""The evaluations in the log of a training run, as the model card shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ..evaluation.metrics import METRICS, get_metric
from ..evaluation.templates import markdown_table

NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def read_evaluations(history: Sequence[Mapping[str, Any]], prefix: str = "eval_") -> list[dict[str, Any]]:
    """Return the metrics of each evaluation without their prefix, and the training loss that was logged last before it.

    Args:
        history: `trainer.state.log_history`.
        prefix: Prefix of the metrics, `metric_key_prefix` of `Trainer.evaluate` with an underscore.

    Example:
        >>> read_evaluations([{"step": 5, "loss": 2.0}, {"step": 6, "eval_accuracy": 0.5, "eval_runtime": 1.0}])
        [{'step': 6, 'training loss': 2.0, 'accuracy': 0.5}]
    """
    rows: list[dict[str, Any]] = []
    loss = None
    for entry in history:
        loss = entry.get("loss", loss)
        metrics = {name.removeprefix(prefix): value for name, value in entry.items() if name.startswith(prefix)}
        metrics = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and not k.endswith(NOT_METRICS)}
        if not metrics:
            continue
        if not rows or rows[-1]["step"] != entry["step"]:
            rows.append({"step": entry["step"], **({} if loss is None else {"training loss": loss})})
        loss_name = "validation loss" if prefix == "eval_" else f"{prefix.rstrip('_')} loss"
        rows[-1] |= {(loss_name if name == "loss" else name): value for name, value in metrics.items()}
    return rows


def final_evaluation(history: Sequence[Mapping[str, Any]], best_step: int | None = None) -> dict[str, Any]:
    """Return the evaluation of the current weights, without the training loss; empty if they were not evaluated.

    Args:
        history: `trainer.state.log_history`.
        best_step: The step whose weights were loaded at the end of training. Default: the weights are the last ones.
    """
    ends = [i for i, entry in enumerate(history) if "train_runtime" in entry]
    afterwards = read_evaluations(history[ends[-1] + 1 :]) if ends else []
    rows = afterwards or read_evaluations(history)
    if not afterwards and best_step is not None:
        rows = [row for row in rows if row["step"] == best_step]
    return {k: v for k, v in rows[-1].items() if k != "training loss"} if rows else {}


def final_test(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last evaluation with the prefix "test" after training; empty if there is none.

    Example:
        >>> final_test([{"step": 6, "train_runtime": 9.0}, {"step": 6, "test_accuracy": 0.5, "test_loss": 1.0}])
        {'step': 6, 'accuracy': 0.5, 'test loss': 1.0}
    """
    ends = [i for i, entry in enumerate(history) if "train_runtime" in entry]
    rows = read_evaluations(history[ends[-1] + 1 :] if ends else history, "test_")
    return {k: v for k, v in rows[-1].items() if k != "training loss"} if rows else {}


def result_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the heading and the value of each metric, registered metrics in the order and format of the registry.

    Example:
        >>> result_rows({"step": 6, "my_score": 0.5, "nll": 0.25, "accuracy": 0.5})
        [('Accuracy (%)\\xa0↑', '50.00'), ('NLL (nats)\\xa0↓', '0.250'), ('My score', '0.5000')]
    """
    return [(get_metric(k).heading, _format(k, evaluation[k])) for k in _in_order(evaluation) if k != "step"]


def evaluations_table(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Return a Markdown table of evaluations; a row need not have all metrics."""
    names = _in_order(dict.fromkeys(name for row in rows for name in row))
    cells = [[_format(name, row[name]) if name in row else "" for name in names] for row in rows]
    return markdown_table([get_metric(name).heading for name in names], cells, "r" * len(names))


def _in_order(names: Mapping[str, Any]) -> list[str]:
    first = [name for name in ("step", "training loss", "validation loss", "test loss") if name in names]
    return list(dict.fromkeys([*first, *(name for name in METRICS if name in names), *names]))


def _format(name: str, value: Any) -> str:
    return get_metric(name).format(value) if isinstance(value, float) else str(value)
