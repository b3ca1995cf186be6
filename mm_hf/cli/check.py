"""Try a model of your own: does the method rest on solid ground, which methods train it, at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers

from ..data.dummy_inputs import detect_task, example_batch, load
from ..evaluation.model_check import MIXED, ModelCheck, check_model, within_rounding
from ..methods import ERM, METHODS, get_method
from ._options import expand_arguments, make_parser, parse
from ._progress import quiet

USAGE = "mm-hf check MODEL [OPTIONS.yaml] [--task image|text|audio] [--mixing METHOD] [options]"
DESCRIPTION = """Loads MODEL (a directory or a Hub name), makes a small batch, and says whether logits made of the locations'
features are the model's own, whether mixing features is mixing logits, which methods train the model, and what
a step of each costs. Exit code 0: --mixing trains it; 1: it does not; 2: the question was wrong.

example:
  mm-hf check google/vit-base-patch16-224"""
EPILOG = """The batch is noise or a few sentences; the model is left as it is, and nothing is written. In Python:
mm_hf.check_model(model, batch)."""
ATTENTION = {
    "cls": "the attention of the one token that the head reads",
    "gap": "agreement of a location's features with their mean",
    "uniform": "none: every location counts the same",
}


@dataclass
class CheckOptions:
    """Which model is tried, and how."""

    model: str | None = field(default=None, metadata={"help": "Directory or Hub name, in place of MODEL."})
    task: Literal["image", "text", "audio"] | None = field(
        default=None, metadata={"help": "What it classifies. Default: what its configuration says."}
    )
    mixing: str = field(default="dense_multimix", metadata={"help": "The method that decides the exit code."})
    batch_size: int = field(default=8, metadata={"help": "Examples in the batch; what a step costs depends on it."})
    rounds: int = field(default=5, metadata={"help": "How often a step of each method is timed; 0: not at all."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ... Default: a GPU, where there is one."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    token: str | None = field(default=None, metadata={"help": "For the Hub, if not that of `hf auth login`."})


def main(arguments: Sequence[str]) -> int:
    """Check a model as the arguments say."""
    parser = make_parser("check", USAGE, DESCRIPTION, EPILOG, trains=False, check=CheckOptions)
    options, _ = parse(parser, expand_arguments(arguments, "--model"), "mm-hf check", {})
    if options.model is None:
        raise ValueError("Say which model: mm-hf check MODEL, a directory or a Hub name.")
    get_method(options.mixing)
    if options.batch_size < 2 or options.rounds < 0:
        raise ValueError("--batch_size must be 2 at least, since examples are mixed with each other, and --rounds 0.")
    quiet()
    transformers.utils.logging.set_verbosity_error()
    hub = {"revision": options.model_revision, "cache_dir": options.cache_dir, "token": options.token}
    task = options.task or detect_task(options.model, **hub)
    model, processor = load(options.model, task, **hub)
    model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    batch, other = (
        example_batch(model, processor, task, size, seed) for seed, size in enumerate((options.batch_size, 3))
    )
    found = check_model(
        model, batch, other_inputs=other, rounds=options.rounds, processing_class=processor if task == "text" else None
    )
    print(
        "\n".join([heading(options.model, model, batch), "", *said(found, options.mixing, model.dtype), *costs(found)])
    )
    return 1 if found.problems[options.mixing] else 0


def heading(name: str, model: Any, batch: dict[str, torch.Tensor]) -> str:
    """What was tried."""
    shapes = ", ".join(f"{k} {' x '.join(map(str, v.shape))}" for k, v in batch.items() if k != "labels")
    size = sum(p.numel() for p in model.parameters())
    return (
        f"{type(model).__name__} of {name}: {size / 1e6:.3g} million parameters in {str(model.dtype)[6:]} on "
        f"{model.device}, {model.config.num_labels} labels; a batch of {shapes}."
    )


def said(found: ModelCheck, mixing: str, dtype: torch.dtype) -> list[str]:
    """The answer in plain words, and what it rests on."""
    problem = found.problems[mixing]
    lines = [f"{mixing} does not train this model: {problem}" if problem else f"{mixing} trains this model.", ""]
    plan = found.plan
    if plan is None:
        lines += ["Locations: none. " + found.reason]
    else:
        head = " → ".join(plan.chain) or "a layer that scores every token"
        good = "the model's own" if within_rounding(found.pooled_error, dtype) else "NOT the model's own"
        lines += [
            f"Locations: up to {found.locations} an example, where {plan.source} has its {plan.side}.",
            f"Head: reads {plan.pool}, then {head}. The logits made of the locations are {good} on another batch "
            f"(relative error {found.pooled_error:.1e}).",
            f"Attention: auto is {found.attention!r}, {ATTENTION[str(found.attention)]}"
            + (f" (read from {plan.attention}, {plan.attention_base})." if found.attention == "cls" else "."),
        ]
    if found.mixed_error is None:
        lines += ["Mixing: the head is not linear, so that mixing features is not mixing logits."]
    else:
        equal = "are" if within_rounding(found.mixed_error, dtype) else "are NOT"
        lines += [
            f"Mixing: the logits of {MIXED:,} mixed features {equal} the mixed logits (relative error {found.mixed_error:.1e})."
        ]
    return lines


def costs(found: ModelCheck) -> list[str]:
    """A table of methods: whether each trains the model, and the time of a step."""
    width = max(map(len, METHODS))
    lines = ["", f"{'method':<{width}}  trains  forward and backward pass (plain training = 1)"]
    for name, problem in found.problems.items():
        time = f"{found.cost[name]:.2f}" if name in found.cost else "1" if name == ERM.name else ""
        lines.append(f"{name:<{width}}  {'no' if problem else 'yes':<6}  {problem or time}".rstrip())
    return lines
