# /// script
# dependencies = [
#     "mm-hf[examples]",
#     "transformers>=5.20",
#     "datasets>=4.0",
#     "accelerate>=1.10",
#     "torch>=2.7",
# ]
# ///
r"""Fine-tune an image classifier with MultiMix or Dense MultiMix in a custom loop with Accelerate.

Two lines differ from Transformers' script of the same name: `wrap_model(model, mixing)` before `accelerator.prepare`,
and `handle.epoch = epoch` at the start of each epoch. Run it in one process or with `accelerate launch`
(examples/accelerate_configs):

    accelerate launch examples/run_image_classification_no_trainer.py \
        --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans --image_column_name image \
        --label_column_name labels --mixing dense_multimix --output_dir outputs/beans

Offline, train a small ViT from scratch on digits or fashion_mnist (for your own images, use --train_dir):

    python examples/run_image_classification_no_trainer.py examples/recipes/digits_no_trainer.yaml

Options override those of a first argument that ends in .yaml or .json, an option file; --help shows the options.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, set_seed
from huggingface_hub import HfApi, ModelCardData
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import SchedulerType, default_data_collator, get_scheduler

from mm_hf import Mixing, MixingHandle, wrap_model
from mm_hf.cli import scripts
from mm_hf.cli.scripts.images import DataTrainingArguments, ModelArguments, load_data, load_model
from mm_hf.data.images import ImageDataset, ImageTransform
from mm_hf.data.models import num_channels
from mm_hf.distributed import check_processes
from mm_hf.evaluation.files import write_text
from mm_hf.evaluation.metrics import load_metric
from mm_hf.evaluation.templates import escape_markdown
from mm_hf.training.hub import MIXING_FILE, load_num_mixed, restore_method_state, save_method_state, save_mixing
from mm_hf.training.model_card import GENERATED, card_tags, is_repo_id, is_user_edited, method_section
from mm_hf.training.run_settings import find_changes, labels_digest
from mm_hf.training.weights import first_lines

logger = get_logger(__name__)
SECRETS = ("token", "hub_token")
NAME = re.compile(r"(step|epoch)_(\d+)")  # of a checkpoint


@dataclass
class LoopArguments:
    """Training arguments with the names of Transformers' scripts without Trainer."""

    output_dir: str = field(
        default="trained", metadata={"help": "Directory for the model, the results and the checkpoints."}
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Training batch size per process."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Evaluation batch size per process."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate after the warmup."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of parameters except biases and norms."})
    num_train_epochs: int = field(default=3, metadata={"help": "Number of epochs."})
    max_train_steps: int | None = field(
        default=None, metadata={"help": "Number of optimizer steps. Overrides --num_train_epochs."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Number of mini-batches per optimizer step."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Learning rate schedule."})
    num_warmup_steps: int = field(default=0, metadata={"help": "Number of warmup steps."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Number of data loader workers per process."})
    seed: int = field(
        default=42, metadata={"help": "Seed of the initialization, the order of examples, augmentation and mixing."}
    )
    checkpointing_steps: str | None = field(
        default=None, metadata={"help": "Save a checkpoint every N optimizer steps, or after each 'epoch'."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to resume from: a directory step_N or epoch_N. Without a value: the newest.",
            "nargs": "?",
            "const": "last",
        },
    )
    allow_changed_settings: bool = field(
        default=False,
        metadata={"help": "Resume although the method, batch size or seed differ from those of the checkpoint."},
    )
    with_tracking: bool = field(default=False, metadata={"help": "Log to experiment trackers."})
    report_to: str = field(
        default="all", metadata={"help": "Tracker: tensorboard, wandb, ..., or all installed trackers."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Push the model to the Hub after training."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository on the Hub. Default: the name of --output_dir."}
    )
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Hub token. Default: the token stored by `hf auth login`."}
    )

    def __post_init__(self) -> None:
        steps = self.checkpointing_steps
        if steps is not None and steps != "epoch" and not (steps.isdigit() and int(steps)):
            raise ValueError(f"--checkpointing_steps must be a number of optimizer steps or 'epoch', but is {steps!r}.")
        SchedulerType(self.lr_scheduler_type)  # a ValueError lists the schedules
        existing = checkpoints(Path(self.output_dir))
        if self.resume_from_checkpoint is None:
            scripts.check_output_dir(Path(self.output_dir), existing)
        if self.resume_from_checkpoint == "last":
            if not existing:
                raise ValueError(
                    f"No valid checkpoint found in output directory ({self.output_dir}): start without "
                    "--resume_from_checkpoint."
                )
            self.resume_from_checkpoint = str(existing[0])


def checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in a directory, the newest first."""
    # `save_checkpoint` writes this file last.
    found = [file.parent for file in directory.glob(f"*/{MIXING_FILE}") if NAME.fullmatch(file.parent.name)]
    return sorted(found, key=lambda path: (path / MIXING_FILE).stat().st_mtime_ns, reverse=True)


@scripts.reports_errors
def main() -> None:
    """Train the model, evaluate it after each epoch, save it, and push it to the Hub."""
    model_args, data_args, args, mixing = scripts.parse_arguments(
        sys.argv[1:], ModelArguments, DataTrainingArguments, LoopArguments, description=__doc__
    )
    tracking = {"log_with": args.report_to, "project_dir": args.output_dir} if args.with_tracking else {}
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # The order of examples depends only on the seed and the epoch, so that a resumed run repeats it.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        **tracking,
    )
    set_up_logging(accelerator)
    check_processes(accelerator)
    set_seed(args.seed)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)

    with accelerator.main_process_first():
        data = load_data(data_args, model_args, args.seed)
    names = data["train"].features[data_args.label_column_name].names
    model, processor = load_model(model_args, names)
    handle = wrap_model(model, mixing)

    train, validation = prepare_images(data, data_args, processor, num_channels(model.config))
    # The loaders have their own generators. Otherwise a run resumed within an epoch would draw other numbers for mixing
    # and dropout from the global generator than an uninterrupted run.
    train_loader, eval_loader = (
        DataLoader(
            rows,
            batch_size=size,
            shuffle=rows is train,
            generator=torch.Generator(),
            collate_fn=default_data_collator,
            num_workers=args.dataloader_num_workers,
        )
        for rows, size in ((train, args.per_device_train_batch_size), (validation, args.per_device_eval_batch_size))
    )

    batches = math.ceil(len(train_loader) / accelerator.num_processes)
    steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    total = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        # At each optimizer step Accelerate steps the scheduler once per process.
        num_warmup_steps=args.num_warmup_steps * accelerator.num_processes,
        num_training_steps=total * accelerator.num_processes,
    )
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )
    start_tracking(accelerator, args, model_args, data_args, mixing)

    settings = run_settings(accelerator, args, names, data["train"])
    done = resume(accelerator, args, mixing, handle, settings, steps_per_epoch) if args.resume_from_checkpoint else 0
    logger.info(
        f"{len(train)} examples, {accelerator.num_processes} processes, batch size {args.per_device_train_batch_size} "
        f"per process, {args.gradient_accumulation_steps} mini-batches per step, steps {done} to {total}; {mixing}"
    )
    metric = load_metric("classification", cache_dir=model_args.cache_dir)
    shown = accelerator.is_local_main_process and sys.stderr.isatty()
    progress = tqdm(total=total, initial=done, disable=not shown)
    metrics: dict[str, float] = {}
    for epoch in range(done // steps_per_epoch, math.ceil(total / steps_per_epoch)):
        model.train()
        handle.epoch = epoch  # how much is mixed depends on the epoch
        train.seed_augmentation(args.seed, epoch)
        train_loader.set_epoch(epoch)
        skipped = done % steps_per_epoch * args.gradient_accumulation_steps
        losses = []
        for batch in accelerator.skip_first_batches(train_loader, skipped) if skipped else train_loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                losses.append(loss.detach().float())
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            done += 1
            progress.update()
            if (args.checkpointing_steps or "").isdigit() and done % int(args.checkpointing_steps) == 0:
                save_checkpoint(accelerator, args, f"step_{done}", mixing, handle, settings)
            if done >= total:
                break

        metrics = evaluate(accelerator, model, eval_loader, metric)
        train_loss = accelerator.gather(torch.stack(losses)).mean().item() if losses else float("nan")
        log = {"epoch": epoch + 1, "train_loss": train_loss, **metrics, **handle.pop_logs()}
        logger.info(", ".join(f"{name} {value:.4g}" for name, value in log.items()))
        if args.with_tracking:
            accelerator.log(log, step=done)
        if args.checkpointing_steps == "epoch":
            save_checkpoint(accelerator, args, f"epoch_{epoch}", mixing, handle, settings)
    progress.close()
    metrics = metrics or evaluate(accelerator, model, eval_loader, metric)  # the resumed run had finished all steps
    save(accelerator, model, processor, handle, mixing, {**metrics, "steps": done}, args)
    if accelerator.is_main_process and args.push_to_hub:
        push_to_hub(args, mixing, model_args)
    accelerator.end_training()
    logger.info(f"Wrote the model and its metrics to {args.output_dir}.")


def set_up_logging(accelerator: Accelerator) -> None:
    """Log warnings in the first process of each machine and errors in the others."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logger.info(accelerator.state, main_process_only=False)
    main = accelerator.is_local_main_process
    if not sys.stderr.isatty():
        scripts.quiet()
    datasets.utils.logging.set_verbosity(logging.WARNING if main else logging.ERROR)
    transformers.utils.logging.set_verbosity(logging.WARNING if main else logging.ERROR)


def prepare_images(data: Any, data_args: DataTrainingArguments, processor: Any, channels: int) -> list[ImageDataset]:
    """Return training and validation datasets. Augmentation depends only on the seed, the epoch and the mini-batch."""
    columns = (data_args.image_column_name, data_args.label_column_name)
    augmentations = {"train": data_args.augmentation, "validation": "none"}
    return [
        ImageDataset(
            data[split],
            ImageTransform(processor, *columns, augmentation=name, num_channels=channels, train=name != "none"),
        )
        for split, name in augmentations.items()
    ]


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups with and without weight decay; biases and norms have none."""
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    groups = (
        (weight_decay, [p for n, p in model.named_parameters() if n not in vectors]),
        (0.0, [p for n, p in model.named_parameters() if n in vectors]),
    )
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups]


def start_tracking(accelerator: Accelerator, args: LoopArguments, *others: Any) -> None:
    """Start the trackers and log all settings except tokens."""
    if not args.with_tracking:
        return
    settings = {name: value for some in (args, *others) for name, value in asdict(some).items() if name not in SECRETS}
    # TensorBoard accepts only numbers and strings.
    settings = {name: v if isinstance(v, (int, float, str)) else str(v) for name, v in settings.items()}
    accelerator.init_trackers("image_classification_no_trainer", settings)
    if accelerator.is_main_process and not accelerator.trackers:
        raise ValueError(
            f"--with_tracking requires a tracker for --report_to {args.report_to}: install one, such as tensorboard."
        )


def run_settings(accelerator: Accelerator, args: LoopArguments, names: list[str], train: Any) -> dict[str, Any]:
    """Return the settings that determine which examples each optimizer step has, as `MultiMixTrainer` saves them."""
    settings = {
        "num_processes": accelerator.num_processes,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "seed": args.seed,
        "num_labels": len(names),
        "train_examples": len(train),
        "train_labels": labels_digest(train),
    }
    return {name: value for name, value in settings.items() if value is not None}


def save_checkpoint(
    accelerator: Accelerator,
    args: LoopArguments,
    name: str,
    mixing: Mixing,
    handle: MixingHandle,
    settings: dict[str, Any],
) -> None:
    """Save everything that a resumed run needs."""
    handle.check_losses()  # a loss that is not finite raises an error before it reaches a checkpoint
    directory = Path(args.output_dir, name)
    accelerator.save_state(str(directory))
    save_method_state(directory, handle.state_dict(), accelerator.process_index, accelerator.num_processes)
    if accelerator.is_main_process:
        save_mixing(directory, mixing, handle.plan, handle.num_mixed, settings)


def resume(
    accelerator: Accelerator,
    args: LoopArguments,
    mixing: Mixing,
    handle: MixingHandle,
    settings: dict[str, Any],
    steps_per_epoch: int,
) -> int:
    """Load a checkpoint and return its number of optimizer steps.

    Raises:
        ValueError: The directory is not a checkpoint, or the method, the settings or the model differ.
    """
    directory = Path(str(args.resume_from_checkpoint))
    match = NAME.fullmatch(directory.name)
    if match is None or not (directory / MIXING_FILE).is_file():
        raise ValueError(
            "--resume_from_checkpoint must be a directory step_N or epoch_N written with --checkpointing_steps, but is "
            f"{directory}."
        )
    changes = find_changes(directory, mixing, settings)
    if changes and not args.allow_changed_settings:
        raise ValueError(
            f"The checkpoint {directory} was trained with other settings: {'; '.join(changes)}. Use the same settings, "
            "or resume with --allow_changed_settings, which is not exact."
        )
    try:
        accelerator.load_state(str(directory))
    except RuntimeError as error:  # other weights or shapes
        raise ValueError(
            f"The checkpoint {directory} does not fit the model: {first_lines(error)}. Use a model of the class and "
            "size that it was saved from."
        ) from error
    handle.num_mixed = load_num_mixed(directory)
    restore_method_state(handle, directory, accelerator.process_index, accelerator.num_processes)
    number = int(match[2])
    return number if match[1] == "step" else (number + 1) * steps_per_epoch


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader, metric: Any) -> dict[str, float]:
    """Compute metrics over all examples, counting each once."""
    model.eval()
    examples = 0
    for batch in loader:
        logits, labels = accelerator.gather_for_metrics((model(**batch).logits, batch["labels"]))
        metric.add_batch(predictions=logits.float().cpu(), references=labels.cpu())
        examples += len(labels)
    return {f"eval_{name}": value for name, value in metric.compute().items()} | {"eval_examples": examples}


def save(
    accelerator: Accelerator,
    model: torch.nn.Module,
    processor: Any,
    handle: MixingHandle,
    mixing: Mixing,
    results: dict[str, float],
    args: LoopArguments,
) -> None:
    """Save a plain Transformers model, `mixing.json` and the results."""
    accelerator.wait_for_everyone()
    state = accelerator.get_state_dict(model)  # gathers sharded weights
    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir, is_main_process=accelerator.is_main_process, save_function=accelerator.save, state_dict=state
    )
    if accelerator.is_main_process:
        processor.save_pretrained(args.output_dir)
        save_mixing(args.output_dir, mixing, handle.plan, handle.num_mixed)
        write_text(Path(args.output_dir, "all_results.json"), json.dumps(results, indent=2) + "\n")
    accelerator.wait_for_everyone()  # wait until the first process has written the files


def push_to_hub(args: LoopArguments, mixing: Mixing, model_args: ModelArguments) -> None:
    """Upload the saved files except checkpoints, with a model card."""
    path = Path(args.output_dir, "README.md")
    if not is_user_edited(path):
        base = model_args.model_name_or_path
        card = ModelCardData(
            library_name="transformers",
            pipeline_tag="image-classification",
            tags=["vision", *card_tags(mixing)],
            base_model=base if is_repo_id(base) else None,
        )
        title = escape_markdown(Path(args.output_dir).resolve().name)
        write_text(path, f"---\n{card.to_yaml()}\n---\n\n# {title}\n\n{GENERATED}\n\n{method_section(mixing)}")
    api = HfApi(token=args.hub_token)
    repository = api.create_repo(args.hub_model_id or Path(args.output_dir).resolve().name, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repository,
        folder_path=args.output_dir,
        ignore_patterns=["step_*/**", "epoch_*/**"],
        commit_message="End of training",
    )


if __name__ == "__main__":
    main()
