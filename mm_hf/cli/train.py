"""Train one model with one method, test it once, and leave a plain model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, PrinterCallback, ProgressCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ..data.build import ModelOptions, build_task
from ..data.models import CLASSES
from ..data.splits import DataOptions
from ..methods import METHODS, Mixing, get_method
from ..training.checkpoints import last_complete_checkpoint, list_checkpoints
from ..training.hub import MIXING_FILE, load_mixing
from ._options import SMALL_VIT, TRAINING, make_parser, parse, with_file
from ._progress import Training, quiet

USAGE = """mm-hf train [OPTIONS.yaml] --dataset_name NAME --model_name_or_path NAME
                   [--mixing METHOD and its settings] [--output_dir DIR] [options]"""
DESCRIPTION = f"""Trains a classifier of images or texts with a mixing method, tests it once, and leaves in DIR a plain Transformers
model with its processor or tokenizer and mixing.json. OPTIONS.yaml holds options as `name: value`.

example, which needs no download:
  mm-hf train --dataset_name digits {SMALL_VIT} \\
    --mixing dense_multimix --num_mixed 1000 --num_train_epochs 10 --learning_rate 2e-3 --output_dir digits"""
EPILOG = f"""methods: {", ".join(sorted(METHODS))}
  --mixing METHOD --help shows the settings of another one; erm is plain training.

{TRAINING}
  --resume_from_checkpoint   goes on from the newest checkpoint in DIR, one an epoch is kept
  --report_to tensorboard    or trackio, wandb, ...: the terms of the loss, the figures, the maps of attention
  --push_to_hub --hub_model_id NAME"""
NAMES = {
    "accuracy": ("accuracy", "%"), "macro_f1": ("macro F1", "%"), "nll": ("NLL", "nats"), "brier": ("Brier score", ""),
    "calibration_error": ("calibration error", "%"),
}  # fmt: skip


@dataclass
class TrainOptions:
    """The method, and what is written."""

    mixing: str = field(
        default="dense_multimix", metadata={"help": "The method, or erm for plain training. See below."}
    )
    output_dir: str = field(default="trained", metadata={"help": "For the model and its checkpoints."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Go on from a checkpoint; without a name: the newest one.", "nargs": "?", "const": "last"},
    )
    attention_map_steps: int = field(
        default=0,
        metadata={"help": "Draw what weighs the labels every so many steps, for --report_to. Default: never."},
    )


def main(arguments: Sequence[str]) -> int:
    """Train a model as the arguments say."""
    given = with_file(arguments)
    method = get_method(_chosen(given))
    settings: dict[str, Any] = {f"settings of {method.name}": method} if fields(method) else {}
    parser = make_parser(
        "train", USAGE, DESCRIPTION, EPILOG, training=TrainOptions, **settings, data=DataOptions, model=ModelOptions
    )
    options, *found, training = parse(parser, given, "mm-hf train", {}, _of_others(method))
    mixing, data, model = found if settings else (method(), *found)
    if data.ood_dataset_name is not None:
        raise ValueError(
            "--ood_dataset_name is for tests of a trained model: mm-hf analyze MODEL --ood_dataset_name ..."
        )
    args = training_arguments(options, training)
    checkpoint = _checkpoint(options, mixing, args)
    quiet()
    if training.get("log_level") is None:
        transformers.utils.logging.set_verbosity_error()
    task = build_task(data, model)
    console = Console()
    trainer = task.trainer(args, mixing, callbacks=[Training(console)])
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if options.attention_map_steps:
        from ..training.callbacks import AttentionMapCallback

        trainer.add_callback(AttentionMapCallback(trainer, task.validation_dataset, every=options.attention_map_steps))
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate(task.test_dataset, metric_key_prefix="test")
    trainer.save_metrics("test", metrics)
    card = {
        "finetuned_from": model.model_name_or_path,
        "tasks": f"{task.settings['inputs']}-classification",
        "dataset": task.settings["data"],
    }
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    if trainer.is_world_process_zero():
        console.print(_table(metrics, len(task.test_dataset)))
        console.print(_ending(args, task.settings["inputs"]), markup=False, highlight=False, soft_wrap=True)
    return 0


def training_arguments(options: TrainOptions, given: dict[str, Any]) -> TrainingArguments:
    """The training arguments: those given, and else a log, an evaluation and a checkpoint an epoch.

    Raises:
        ValueError: Transformers refuses them, or a tracker is not installed.
    """
    for name in ("do_train", "do_eval", "do_predict"):  # files of options for the example scripts have them
        if not given.pop(name, True):
            raise ValueError(f"--{name} cannot be switched off: mm-hf train trains, validates and tests.")
    usual: dict[str, Any] = {"save_total_limit": 1, "disable_tqdm": False}
    usual["dataloader_pin_memory"] = torch.cuda.is_available()
    for what in ("logging", "eval", "save"):
        usual[f"{what}_strategy"] = "steps" if f"{what}_steps" in given else "epoch"
    args = TrainingArguments(output_dir=options.output_dir, **{**usual, **given})
    for tracker in args.report_to or ():
        installed = get_available_reporting_integrations()
        if tracker not in installed:
            raise ValueError(
                f"--report_to {tracker} is not installed or unknown to Transformers; installed are "
                f"{', '.join(installed) or 'none'} (pip install tensorboard or trackio)."
            )
    return args


def _chosen(arguments: Sequence[str]) -> str:
    """The value of --mixing."""
    first: Any = HfArgumentParser([TrainOptions], add_help=False, allow_abbrev=False)  # type: ignore[list-item]
    return first.parse_known_args(list(arguments))[0].mixing


def _of_others(method: type[Mixing]) -> dict[str, str]:
    """The settings of the other methods, and what is said to who gives them with this one."""
    own = {f.name for f in fields(method)}
    owners: dict[str, list[str]] = {}
    for name, other in METHODS.items():
        for f in fields(other):
            if f.name not in own:
                owners.setdefault(f"--{f.name}", []).append(name)
    has = f"which has {', '.join(sorted(own))}" if own else "which has no settings"
    return {
        option: f"is a setting of {' and '.join(names)}, not of --mixing {method.name}, {has}."
        for option, names in owners.items()
    }


def _checkpoint(options: TrainOptions, mixing: Mixing, args: TrainingArguments) -> str | None:
    """The checkpoint to go on from, if one is asked for.

    Raises:
        ValueError: There is none, it was trained with another method, or it is in the way of a new training.
    """
    directory, given = Path(options.output_dir), options.resume_from_checkpoint
    if given is None:
        there = list_checkpoints(directory)
        if there:
            raise ValueError(
                f"{directory} has {there[0].name} of an earlier training: give --resume_from_checkpoint to go on from "
                "there, or another --output_dir."
            )
        return None
    of_this_process = {"process": args.process_index, "processes": args.world_size, "model_only": args.save_only_model}
    checkpoint = last_complete_checkpoint(directory, **of_this_process) if given == "last" else Path(given)
    if checkpoint is None or not checkpoint.is_dir():
        raise ValueError(
            f"--resume_from_checkpoint: there is no checkpoint in {directory}, or none that is whole."
            if checkpoint is None
            else f"--resume_from_checkpoint {checkpoint} is no directory: give one, or leave the name out for the newest."
        )
    if (checkpoint / MIXING_FILE).exists() and load_mixing(checkpoint) != mixing:
        raise ValueError(
            f"{checkpoint} was trained with {load_mixing(checkpoint)}, and the options say {mixing}: give the same method "
            "and settings."
        )
    return str(checkpoint)


def _table(metrics: dict[str, float], examples: int) -> Table:
    table = Table(title=f"{examples:,} test examples", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, (said, unit) in NAMES.items():
        value = metrics.get(f"test_{name}")
        if value is not None:
            shown = f"{100 * value:.2f}" if unit == "%" else f"{value:.4f}"
            table.add_row(said, f"{shown} {unit}".rstrip())
    return table


def _ending(args: TrainingArguments, kind: str) -> str:
    loads = f"{CLASSES[kind].__name__}.from_pretrained('{args.output_dir}')"
    lines = [
        f"Wrote {args.output_dir}: a plain Transformers model, which {loads} loads; {MIXING_FILE}; test_results.json."
    ]
    if args.push_to_hub:
        lines.append(f"Pushed to {args.hub_model_id or Path(str(args.output_dir)).name} on the Hub.")
    return "\n".join(lines)
