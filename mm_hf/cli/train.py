"""Train one model with one method, evaluate it on the test set, and save a plain Transformers model."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.options import DataOptions, LoraOptions, ModelOptions
from ..methods.settings import check_required, settings_of
from ._methods import DEFAULT_METHOD, METHODS_HELP, check_method, method_name, other_settings
from ._option_files import expand_option_file
from ._options import (
    SMALL_VIT,
    TRAINING,
    check_is_directory,
    check_output_dir,
    check_trackers,
    make_parser,
    parse,
    quiet,
    take,
    training_values,
)

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import TrainingArguments

    from ..methods import Mixing

USAGE = "mm-hf train [OPTIONS.yaml] --dataset_name NAME --model_name_or_path NAME [options]"
DESCRIPTION = f"""\
Trains an image or text classifier with a mixing method, evaluates it on the test set once, and saves
a plain Transformers model. OPTIONS.yaml contains options as lines `name: value`.

example without downloads:
  mm-hf train --dataset_name digits {SMALL_VIT} \\
  --mixing dense_multimix --num_train_epochs 10 --learning_rate 2e-3 --output_dir digits"""
EPILOG = f"{METHODS_HELP}\n{TRAINING}"


@dataclass
class TrainOptions:
    """Method and output of a training run."""

    mixing: str = field(default=DEFAULT_METHOD, metadata={"help": "Mixing method, or erm for plain training."})
    output_dir: str = field(default="trained", metadata={"help": "Directory for the model and its checkpoints."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to resume from. Without a value: the newest.", "nargs": "?", "const": "last"},
    )
    allow_changed_settings: bool = field(
        default=False,
        metadata={"help": "Resume although the method, batch size, seed or data differ from those of the checkpoint."},
    )
    check_data: bool = field(
        default=False, metadata={"help": "First read all rows, and list unreadable images and empty texts and labels."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print data, model, steps and expected minutes, and do not train."}
    )
    attention_map_steps: int = field(
        default=0,
        metadata={"help": "Log attention maps every N steps to --report_to. Default: never."},
    )


def main(arguments: Sequence[str]) -> int:
    """Train a model from command-line arguments."""
    given = expand_option_file(arguments)
    method = method_name(given)
    settings = check_method(method)
    groups: dict[str, Any] = {f"settings of {method}": settings}
    groups |= {"data": DataOptions, "model": {**settings_of(ModelOptions), **settings_of(LoraOptions)}}
    parser = make_parser("mm-hf train", USAGE, DESCRIPTION, EPILOG, training=TrainOptions, **groups)
    values = parse(parser, given, "mm-hf train", {}, other_settings(method, settings))
    check_required(method, settings, values)
    kinds = (TrainOptions, DataOptions, ModelOptions, LoraOptions)
    options, data, model, lora = (take(values, kind) for kind in kinds)
    if data.ood_dataset_name is not None:
        raise ValueError(
            "--ood_dataset_name applies to the evaluation of a trained model: "
            "use mm-hf analyze MODEL --ood_dataset_name ..."
        )
    data.check()
    model.check()
    lora.check(model.model_name_or_path)
    check_is_directory(options.output_dir)
    checkpoint = options.resume_from_checkpoint
    if checkpoint not in (None, "last") and not Path(str(checkpoint)).is_dir():
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} is not a directory: give a checkpoint, or omit the value to use "
            "the newest one."
        )
    training = training_values(values, settings, *kinds)
    return _train(options, {name: values[name] for name in settings if name in values}, data, model, lora, training)


def _train(
    options: TrainOptions,
    settings: dict[str, Any],
    data: DataOptions,
    model: ModelOptions,
    lora: LoraOptions,
    training: dict[str, Any],
) -> int:
    from ..methods import get_method

    mixing = get_method(options.mixing)(**settings)  # an invalid combination of settings is an error before the imports

    import transformers
    from rich.console import Console
    from transformers import PrinterCallback, ProgressCallback

    from ..data.adapters import save_classes, with_lora
    from ..data.build import build_task
    from ._progress import TrainingProgress

    args = training_arguments(options, training)
    checkpoint = _checkpoint(options, mixing, lora, args)
    quiet()
    if training.get("log_level") is None:
        transformers.utils.logging.set_verbosity_error()
    if options.check_data and _has_problems(data, model):
        return 2
    task = build_task(data, model)
    if lora.lora_r is not None:
        task = with_lora(task, lora)
    console = Console()
    trainer = task.trainer(args, mixing, callbacks=[TrainingProgress(console)])
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if options.attention_map_steps:
        from ..training.callbacks import AttentionMapCallback

        trainer.add_callback(AttentionMapCallback(trainer, task.validation_dataset, every=options.attention_map_steps))
    if options.dry_run:
        print(*_summary(trainer, task), sep="\n")
        return 0
    result = trainer.train(resume_from_checkpoint=checkpoint, allow_changed_settings=options.allow_changed_settings)
    trainer.save_model()
    if lora.lora_r is not None:
        save_classes(trainer)
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
        console.print(
            _closing_message(args, task.settings["inputs"], lora, model), markup=False, highlight=False, soft_wrap=True
        )
    return 0


def _has_problems(data: DataOptions, model: ModelOptions) -> bool:
    """Print the problems of the data, and return True if there are any."""
    from ..data.check import find_problems

    problems = list(find_problems(data, cache_dir=model.cache_dir, token=model.token))
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        print(f"mm-hf train: --check_data found {count}: remove or repair these rows.", file=sys.stderr)
    return bool(problems)


def _summary(trainer: Any, task: Any) -> list[str]:
    """Describe the training, with the time of a step measured on one mini-batch."""
    loader, args = trainer.get_train_dataloader(), trainer.args
    steps = math.ceil(len(loader) / args.gradient_accumulation_steps) * args.num_train_epochs
    steps = args.max_steps if args.max_steps > 0 else math.ceil(steps)
    inputs, times = trainer._prepare_inputs(next(iter(loader))), []
    trainer.model.train()
    for _ in range(3):
        start = time.perf_counter()
        trainer.compute_loss(trainer.model, inputs).backward()
        times.append(time.perf_counter() - start)
    minutes = min(times) * steps * args.gradient_accumulation_steps / 60
    splits = (trainer.train_dataset, trainer.eval_dataset, task.test_dataset)
    sizes = [0 if rows is None else len(rows) for rows in splits]
    handle, names = trainer.mixing_handle, list(task.class_names)
    return [
        f"data: {task.name}, {sizes[0]:,} training, {sizes[1]:,} validation and {sizes[2]:,} test examples",
        f"classes: {len(names)} ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})",
        f"model: {type(trainer.model).__name__}, {sum(p.numel() for p in trainer.model.parameters()):,} parameters",
        f"method: {trainer.mixing}",
        f"plan: {handle.plan if handle is not None and handle.plan is not None else 'no locations needed'}",
        f"steps: {steps:,} of {args.train_batch_size * args.gradient_accumulation_steps} examples per rank",
        f"expected: {_duration(minutes)} for forward and backward passes, without evaluation",
    ]


def _duration(minutes: float) -> str:
    return f"{minutes:.1f} minutes" if minutes >= 1 else f"{60 * minutes:.2g} seconds"


def training_arguments(options: TrainOptions, given: dict[str, Any]) -> TrainingArguments:
    """Return the given training arguments with defaults: log, evaluate and save a checkpoint after each epoch.

    Raises:
        ValueError: A value is invalid, or a tracker is not installed.
    """
    import torch
    from transformers import TrainingArguments

    for name in ("do_train", "do_eval", "do_predict"):  # option files for the example scripts contain them
        if not given.pop(name, True):
            raise ValueError(f"--{name} must not be False: mm-hf train always trains, validates and tests.")
    for f in fields(TrainingArguments):
        choices = list(f.metadata.get("choices") or ())
        if choices and f.name in given and given[f.name] not in choices:
            raise ValueError(f"--{f.name} must be one of {', '.join(map(str, choices))}, got {given[f.name]!r}.")
    defaults: dict[str, Any] = {"save_total_limit": 1, "disable_tqdm": False}
    defaults["dataloader_pin_memory"] = torch.cuda.is_available()
    for event in ("logging", "eval", "save"):
        defaults[f"{event}_strategy"] = "steps" if f"{event}_steps" in given else "epoch"
    args = TrainingArguments(output_dir=options.output_dir, **{**defaults, **given})
    check_trackers(args.report_to)
    return args


def _checkpoint(options: TrainOptions, mixing: Mixing, lora: LoraOptions, args: TrainingArguments) -> str | None:
    """Return the checkpoint to resume from, or None.

    Raises:
        ValueError: There is no complete checkpoint, the checkpoint was trained with another method, or the output
            directory of a new training run has checkpoints.
    """
    from ..data.adapters import find_adapter_changes
    from ..training.checkpoints import last_complete_checkpoint, list_checkpoints
    from ..training.run_settings import find_changes

    directory, given = Path(options.output_dir), options.resume_from_checkpoint
    if given is None:
        check_output_dir(directory, list_checkpoints(directory))
        return None
    if given == "last":
        found = last_complete_checkpoint(
            directory,
            rank=args.process_index,
            world_size=args.world_size,
            own_files_only=args.local_process_index > 0,
        )
        if found is None:
            raise ValueError(
                f"No valid checkpoint found in output directory ({directory}): start without --resume_from_checkpoint."
            )
    else:
        found = Path(given)
    changes = find_changes(found, mixing, {})  # the trainer compares the other settings
    if adapter_changes := find_adapter_changes(found, lora):
        raise ValueError(f"{found} was trained with {'; '.join(adapter_changes)}. Use the same LoRA settings.")
    if changes and not options.allow_changed_settings:
        raise ValueError(
            f"The checkpoint {found} was trained with other settings: {'; '.join(changes)}. Use the same settings, or "
            "resume with --allow_changed_settings, which is not exact."
        )
    return str(found)


def _table(metrics: dict[str, float], examples: int) -> Table:
    from rich import box
    from rich.table import Table

    from ..evaluation.metrics import metrics_of

    table = Table(title=f"{examples:,} test examples", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for info in metrics_of("classification"):
        value = metrics.get(f"test_{info.name}")
        if value is not None:
            table.add_row(info.title, info.with_unit(value))
    return table


def _closing_message(args: TrainingArguments, kind: str, lora: LoraOptions, model: ModelOptions) -> str:
    from ..training.hub import MIXING_FILE
    from ..training.pretrained import CLASSES

    where, name = str(args.output_dir), CLASSES[kind].__name__
    if lora.lora_r is None:
        lines = [
            f"Wrote the model, {MIXING_FILE} and test_results.json to {where}. Load the model with",
            f"    {name}.from_pretrained({where!r})",
        ]
    else:
        lines = [
            f"Wrote the adapter, {MIXING_FILE} and test_results.json to {where}. Load the adapted model with",
            f"    base = {name}.from_pretrained(",
            f"        {model.model_name_or_path!r}, config=AutoConfig.from_pretrained({where!r}), "
            "ignore_mismatched_sizes=True",
            "    )",
            f"    peft.PeftModel.from_pretrained(base, {where!r})",
        ]
    lines.append(f"Predict the classes of files with mm-hf predict {shlex.quote(where)} FILES.")
    if args.push_to_hub:
        lines.append(f"Pushed to {args.hub_model_id or Path(str(args.output_dir)).name} on the Hub.")
    return "\n".join(lines)
