# /// script
# dependencies = [
#     "mm-hf[examples]",
#     "transformers>=5.20",
#     "datasets>=4.0",
#     "accelerate>=1.10",
#     "torch>=2.6",
# ]
# ///
"""Fine-tune any image classifier of Transformers with MultiMix or Dense MultiMix in a loop of one's own, with Accelerate.

Transformers' script of the same name with two lines more: `wrap_model(model, mixing)` before `accelerator.prepare`, and
`handle.epoch = epoch` at the start of each epoch.
On one process, or on as many as `accelerate launch` starts (examples/accelerate_configs):

    accelerate launch examples/run_image_classification_no_trainer.py \
        --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans --image_column_name image \
        --label_column_name labels --mixing dense_multimix --output_dir outputs/beans

Offline, a small ViT from scratch (data sets: digits, fashion_mnist; or your folders by --train_dir):

    python examples/run_image_classification_no_trainer.py examples/recipes/digits_no_trainer.yaml

One argument that ends in .yaml or .json is a file with options; --help shows them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import common
import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, set_seed
from huggingface_hub import HfApi, ModelCard, ModelCardData
from run_image_classification import DataTrainingArguments, ModelArguments, load_data, load_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import EvalPrediction, SchedulerType, default_data_collator, get_scheduler

from mm_hf import Mixing, MixingHandle, wrap_model
from mm_hf.data.images import ImageDataset, ImageTransform
from mm_hf.evaluation.metrics import classification_metrics
from mm_hf.training.hub import load_mixing, load_num_mixed, save_mixing
from mm_hf.training.model_card import GENERATED, card_tags, is_user_edited, method_section

logger = get_logger(__name__)
SECRETS = ("token", "hub_token")


@dataclass
class LoopArguments:
    """How it is trained, in the words of Transformers' scripts without Trainer."""

    output_dir: str = field(metadata={"help": "Where the model, the results and the checkpoints go."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Examples of a process in a step."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Likewise, in evaluation."})
    learning_rate: float = field(default=5e-5, metadata={"help": "After the warm-up."})
    weight_decay: float = field(default=0.0, metadata={"help": "Of all parameters but biases and norms."})
    num_train_epochs: int = field(default=3, metadata={"help": "How often all examples are gone through."})
    max_train_steps: int | None = field(default=None, metadata={"help": "So many updates, whatever the epochs."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Mini-batches of an update."})
    lr_scheduler_type: SchedulerType = field(default=SchedulerType.LINEAR, metadata={"help": "How the rate falls."})
    num_warmup_steps: int = field(default=0, metadata={"help": "Updates in which it rises first."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that load images, for each process."})
    seed: int = field(default=42, metadata={"help": "Of weights, order of examples, augmentation and mixing."})
    checkpointing_steps: str | None = field(
        default=None, metadata={"help": "Save the whole state every so many updates, or each 'epoch'."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A directory step_N or epoch_N that --checkpointing_steps wrote."}
    )
    with_tracking: bool = field(default=False, metadata={"help": "Log to experiment trackers."})
    report_to: str = field(
        default="all", metadata={"help": "Which: tensorboard, wandb, ..., or all that are installed."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the model at the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Where to. Default: the name of --output_dir."})
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Token to upload with, if not the one of `hf auth login`."}
    )

    def __post_init__(self) -> None:
        steps = self.checkpointing_steps
        if steps is not None and steps != "epoch" and not (steps.isdigit() and int(steps)):
            raise ValueError(f"--checkpointing_steps must be a number of updates or 'epoch', got {steps!r}.")


def main() -> None:
    """Train, evaluate after each epoch, save, and push to the Hub."""
    model_args, data_args, args, mixing = common.parse_arguments(
        sys.argv[1:], ModelArguments, DataTrainingArguments, LoopArguments
    )
    tracking = {"log_with": args.report_to, "project_dir": args.output_dir} if args.with_tracking else {}
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # The order of examples follows from the seed and the epoch: a resumed training finds it again.
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

    train, validation = prepare_images(data, data_args, processor, getattr(model.config, "num_channels", 3))
    # With generators of their own the loaders draw nothing from the global one, which mixing and dropout draw from: a
    # resumed training begins an epoch in its middle, and draws what an uninterrupted one does nevertheless.
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
    updates_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    total = args.max_train_steps or args.num_train_epochs * updates_per_epoch
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        # Accelerate takes as many steps of the scheduler at each update as there are processes.
        num_warmup_steps=args.num_warmup_steps * accelerator.num_processes,
        num_training_steps=total * accelerator.num_processes,
    )
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )
    start_tracking(accelerator, args, model_args, data_args, mixing)

    done = resume(accelerator, args, mixing, handle, updates_per_epoch) if args.resume_from_checkpoint else 0
    logger.info(
        f"{len(train)} examples, {accelerator.num_processes} processes, {args.per_device_train_batch_size} examples each "
        f"in a mini-batch, {args.gradient_accumulation_steps} mini-batches an update, updates {done} to {total}; {mixing}"
    )
    progress = tqdm(total=total, initial=done, disable=not accelerator.is_local_main_process)
    metrics: dict[str, float] = {}
    for epoch in range(done // updates_per_epoch, math.ceil(total / updates_per_epoch)):
        model.train()
        handle.epoch = epoch  # some methods mix inputs in late epochs
        train.seed_augmentation(args.seed, epoch)
        train_loader.set_epoch(epoch)
        skipped = done % updates_per_epoch * args.gradient_accumulation_steps
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
                save_checkpoint(accelerator, args, f"step_{done}", mixing, handle)
            if done >= total:
                break

        metrics = evaluate(accelerator, model, eval_loader)
        train_loss = accelerator.gather(torch.stack(losses)).mean().item() if losses else float("nan")
        log = {"epoch": epoch + 1, "train_loss": train_loss, **metrics, **handle.pop_logs()}
        logger.info(", ".join(f"{name} {value:.4g}" for name, value in log.items()))
        if args.with_tracking:
            accelerator.log(log, step=done)
        if args.checkpointing_steps == "epoch":
            save_checkpoint(accelerator, args, f"epoch_{epoch}", mixing, handle)
    progress.close()
    metrics = metrics or evaluate(accelerator, model, eval_loader)  # where all updates were done before
    save(accelerator, model, processor, handle, mixing, {**metrics, "steps": done}, args)
    if accelerator.is_main_process and args.push_to_hub:
        push_to_hub(args, mixing, model_args)
    accelerator.end_training()


def set_up_logging(accelerator: Accelerator) -> None:
    """The first process of each machine tells what happens, the others what goes wrong."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logger.info(accelerator.state, main_process_only=False)
    main = accelerator.is_local_main_process
    datasets.utils.logging.set_verbosity(logging.WARNING if main else logging.ERROR)
    transformers.utils.logging.set_verbosity(logging.WARNING if main else logging.ERROR)


def check_processes(accelerator: Accelerator) -> None:
    """Refuse processes that were started together and do not train together, such as torchrun's on a CPU."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, and each would train alone: Accelerate sees {accelerator.num_processes}. On "
            "CPUs, set ACCELERATE_USE_CPU=true."
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type != "FSDP":
        raise ValueError(
            f"FSDP was asked for, and Accelerate would train with {accelerator.distributed_type.value} without a word: it "
            "shards on accelerators only. Use another configuration on CPUs."
        )


def prepare_images(data: Any, data_args: DataTrainingArguments, processor: Any, channels: int) -> list[ImageDataset]:
    """Training and validation examples. Their augmentation follows from the seed, the epoch and the mini-batch alone."""
    columns = (data_args.image_column_name, data_args.label_column_name)
    augmentation = {"train": data_args.augmentation, "validation": "none"}
    return [
        ImageDataset(
            data[split],
            ImageTransform(processor, *columns, augmentation=how, num_channels=channels, train=how != "none"),
        )
        for split, how in augmentation.items()
    ]


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with weight decay, and those without: biases and norms."""
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    groups = (
        (weight_decay, [p for n, p in model.named_parameters() if n not in vectors]),
        (0.0, [p for n, p in model.named_parameters() if n in vectors]),
    )
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups]


def start_tracking(accelerator: Accelerator, args: LoopArguments, *others: Any) -> None:
    """Open the trackers, and give them all settings but tokens."""
    if not args.with_tracking:
        return
    settings = {name: value for some in (args, *others) for name, value in asdict(some).items() if name not in SECRETS}
    # TensorBoard takes numbers and strings only.
    settings = {name: v if isinstance(v, (int, float, str)) else str(v) for name, v in settings.items()}
    accelerator.init_trackers("image_classification_no_trainer", settings)
    if accelerator.is_main_process and not accelerator.trackers:
        raise ValueError(
            f"--with_tracking found no tracker for --report_to {args.report_to}: install one, tensorboard say."
        )


def dealing(accelerator: Accelerator, args: LoopArguments) -> dict[str, int]:
    """What decides which examples an update has."""
    return {
        "processes": accelerator.num_processes,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "seed": args.seed,
    }


def save_checkpoint(
    accelerator: Accelerator, args: LoopArguments, name: str, mixing: Mixing, handle: MixingHandle
) -> None:
    """Everything that a resumed training needs."""
    directory = Path(args.output_dir, name)
    accelerator.save_state(str(directory))
    if accelerator.is_main_process:
        save_mixing(directory, mixing, handle.plan, handle.num_mixed)
        (directory / "loop.json").write_text(json.dumps(dealing(accelerator, args)) + "\n")


def resume(
    accelerator: Accelerator, args: LoopArguments, mixing: Mixing, handle: MixingHandle, updates_per_epoch: int
) -> int:
    """Load a checkpoint's state, and give the number of updates that are done."""
    directory = Path(str(args.resume_from_checkpoint))
    name = re.fullmatch(r"(step|epoch)_(\d+)", directory.name)
    if name is None or not (directory / "loop.json").is_file():
        raise ValueError(
            f"--resume_from_checkpoint must be a directory step_N or epoch_N that --checkpointing_steps wrote, got {directory}."
        )
    before, now = json.loads((directory / "loop.json").read_text()), dealing(accelerator, args)
    for what in now:
        if before[what] != now[what]:
            raise ValueError(
                f"{directory} was trained with {what}={before[what]}, and now it is {now[what]}: an epoch would go on with "
                "other examples. Give the same, or train on from the saved weights (--model_name_or_path)."
            )
    if load_mixing(directory) != mixing:
        raise ValueError(
            f"{directory} was trained with {load_mixing(directory)}, and now it is {mixing}: give the same."
        )
    accelerator.load_state(str(directory))
    handle.num_mixed = load_num_mixed(directory)
    done = int(name[2])
    return done if name[1] == "step" else (done + 1) * updates_per_epoch


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> dict[str, float]:
    """Metrics over all examples, each counted once."""
    model.eval()
    logits, labels = [], []
    for batch in loader:
        found = accelerator.gather_for_metrics((model(**batch).logits, batch["labels"]))
        logits.append(found[0].float().cpu())
        labels.append(found[1].cpu())
    metrics = classification_metrics(EvalPrediction(torch.cat(logits).numpy(), torch.cat(labels).numpy()))
    return {f"eval_{name}": value for name, value in metrics.items()} | {"eval_examples": sum(map(len, labels))}


def save(
    accelerator: Accelerator,
    model: torch.nn.Module,
    processor: Any,
    handle: MixingHandle,
    mixing: Mixing,
    results: dict[str, float],
    args: LoopArguments,
) -> None:
    """The model as a plain one of Transformers, with `mixing.json` and the results beside it."""
    accelerator.wait_for_everyone()
    state = accelerator.get_state_dict(model)  # gathered, where it is sharded
    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir, is_main_process=accelerator.is_main_process, save_function=accelerator.save, state_dict=state
    )
    if accelerator.is_main_process:
        processor.save_pretrained(args.output_dir)
        save_mixing(args.output_dir, mixing, handle.plan, handle.num_mixed)
        Path(args.output_dir, "all_results.json").write_text(json.dumps(results, indent=2) + "\n")
    accelerator.wait_for_everyone()  # nobody ends before the first process has written


def push_to_hub(args: LoopArguments, mixing: Mixing, model_args: ModelArguments) -> None:
    """Upload what was saved, checkpoints left out, with a model card."""
    path = Path(args.output_dir, "README.md")
    if not is_user_edited(path):
        card = ModelCardData(
            library_name="transformers",
            pipeline_tag="image-classification",
            tags=["vision", *card_tags(mixing)],
            base_model=model_args.model_name_or_path,
        )
        title = Path(args.output_dir).resolve().name
        ModelCard(f"---\n{card.to_yaml()}\n---\n\n# {title}\n\n{GENERATED}\n\n{method_section(mixing)}").save(path)
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
