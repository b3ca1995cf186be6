"""Settings of a comparison, which must not change between the runs of an output directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import set_seed

from ..methods import Mixing, with_defaults
from .evaluate import EvaluationOptions
from .record import RESULT, read_json, write_json
from .task import Task

SETTINGS = "settings.json"
# Fields of a configuration that training and saving change.
VOLATILE = (
    "architectures", "dtype", "torch_dtype", "problem_type", "transformers_version", "use_cache", "_name_or_path",
)  # fmt: skip


def describe(task: Task, methods: Mapping[str, Mixing], evaluation: EvaluationOptions) -> dict[str, Any]:
    """Return the settings of a comparison in JSON types."""
    set_seed(0)
    model = task.model_init()
    config = getattr(model, "config", None)
    values = {
        "task": {
            "name": task.name,
            "model": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "training_examples": len(task.train_dataset),
            "validation_examples": 0 if task.validation_dataset is None else len(task.validation_dataset),
            "test_examples": len(task.test_dataset),
            "unknown_examples": 0 if task.ood_dataset is None else len(task.ood_dataset),
            **task.settings,
        },
        "model_config": {} if config is None else _plain(config.to_diff_dict()),
        "training_args": _plain(task.training_args),
        "evaluation": _given(asdict(evaluation)),
        "methods": {name: method.to_dict() for name, method in methods.items()},
    }
    for name in VOLATILE:
        values["model_config"].pop(name, None)
    return json.loads(json.dumps(values))


def check_settings(directory: Path, settings: dict[str, Any], task: Task) -> None:
    """Write the settings into a new directory, or compare them with those of an existing one.

    Methods that only one of the two has are not compared. A setting that the directory lacks, because an earlier
    version wrote it, had its default.

    Args:
        directory: Output directory of the comparison.
        settings: The result of [`describe`].
        task: The task, with the defaults of its own settings.

    Raises:
        ValueError: A setting differs, or the file of the settings is damaged; the message names it.
    """
    path = directory / SETTINGS
    directory.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if any(directory.glob(f"runs/*/*/{RESULT}")):
            raise ValueError(f"{directory} has finished runs but no {SETTINGS}: choose another output_dir.")
        write_json(path, settings)
        return
    kinds = dict.fromkeys(("task", "model_config", "training_args", "evaluation", "methods"), dict)
    before = _with_defaults(read_json(path, "restore it, or choose another output_dir", kinds), task)
    merged = {**settings, "methods": {**before["methods"], **settings["methods"]}}
    old, new = _leaves(before), _leaves({**settings, "methods": {}})
    added = {method for method in settings["methods"] if method not in before["methods"]}
    new |= {k: v for k, v in _leaves({"methods": settings["methods"]}).items() if k[1] not in added}
    old = {k: v for k, v in old.items() if k[0] != "methods" or k[1] in settings["methods"]}
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            raise ValueError(
                f"{directory} contains a comparison with other settings: {' '.join(key)} was {_setting(old, key)} and "
                f"is now {_setting(new, key)}. Choose another output_dir, or restore the setting."
            )
    write_json(path, merged)


def _with_defaults(settings: dict[str, Any], task: Task) -> dict[str, Any]:
    """Return the settings of a directory with the defaults of those that it lacks, in JSON types."""
    methods = {
        name: with_defaults(method) if isinstance(method, dict) else method
        for name, method in settings["methods"].items()
    }
    completed = {
        **settings,
        "task": {**_given(task.default_settings), **settings["task"]},
        "evaluation": {**_given(asdict(EvaluationOptions())), **settings["evaluation"]},
        "methods": methods,
    }
    return json.loads(json.dumps(completed))


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _leaves(values: Any, key: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(values, dict) and values:
        return {k: v for name, value in values.items() for k, v in _leaves(value, (*key, name)).items()}
    return {} if values == {} else {key: values}


def _setting(values: Mapping[Any, Any], key: Any) -> str:
    return "not set" if key not in values else repr(values[key])
